"""Objectives that look at one image at a time."""

from __future__ import annotations

import jax.numpy as jnp

from lpo_jax.objectives.lists import mean_over_lists
from lpo_jax.types import Array, Denoising, Metrics, Ranking


def sft(denoising: Denoising, ranking: Ranking) -> tuple[Array, Metrics]:
  r"""Supervised fine-tuning: denoise the best image of each list.

  L = mean over lists of  (1 / |W|) sum_{i in W} ||eps_theta(x_t^i, t, c) - eps||^2

      code               paper
      denoising.err      ||eps_theta(x_t, t, c) - eps||^2 / D
      rank == 0          x^w, the preferred image(s) W

  Intuition: imitate what won, ignore by how much and over what. A plain data set of
  images is lists of one.

  Args:
    denoising: `err` [B, N] is read.
    ranking: ranks and validity [B, N], weights [B].

  Returns:
    Scalar loss and no extra metrics.

  Reference: Ho et al. 2020, eq. 14; as a preference baseline Wallace et al. 2023, 5.1.
  """
  best = ranking.valid & (ranking.rank == 0)
  count = jnp.sum(best, axis=1)
  error = jnp.sum(jnp.where(best, denoising.err, 0.0), axis=1)
  return mean_over_lists(error / jnp.maximum(count, 1), count > 0, ranking), {}
