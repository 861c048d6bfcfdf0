"""Objectives on ordered pairs; a longer list counts as all its ordered pairs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpo_jax.objectives.lists import implicit_logits, is_better, mean_over_lists
from lpo_jax.types import Array, Denoising, Metrics, Ranking


def mean_over_pairs(
  pair_loss: Callable[[Array], Array], logits: Array, ranking: Ranking
) -> Array:
  """Mean over each list's ordered pairs of pair_loss(a_w - a_l), then over lists.

  Args:
    pair_loss: elementwise function of the [B, N, N] differences a_w - a_l.
    logits: [B, N] fp32, 0 where invalid.
    ranking: says which pairs are ordered.
  """
  ordered = is_better(ranking)
  inside = jnp.where(ordered, logits[:, :, None] - logits[:, None, :], 0.0)
  count = jnp.sum(ordered, axis=(1, 2))
  total = jnp.sum(jnp.where(ordered, pair_loss(inside), 0.0), axis=(1, 2))
  return mean_over_lists(total / jnp.maximum(count, 1), count > 0, ranking)


def dpo(
  denoising: Denoising, ranking: Ranking, *, beta: float
) -> tuple[Array, Metrics]:
  r"""Diffusion-DPO: the winner's denoising should improve more than the loser's.

  L = -log sigmoid( -beta/2 [ (m_w - r_w) - (m_l - r_l) ] )

      code               paper
      denoising.err      m = ||eps - eps_theta||^2 / D
      denoising.ref_err  r = ||eps - eps_ref||^2 / D
      beta               beta T omega(lambda_t), in the released code's units

  Intuition: logistic regression on who won, with the improvement over the reference as
  the score. Step 0 gives log 2.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: inverse temperature; 2000 to 5000 in published SD1.5 and SDXL runs.

  Returns:
    Scalar loss and no extra metrics.

  Reference: Wallace et al. 2023, eq. 14 (arXiv:2311.12908).
  """
  logits = implicit_logits(denoising, ranking, beta)
  return mean_over_pairs(
    lambda inside: -jax.nn.log_sigmoid(inside), logits, ranking
  ), {}
