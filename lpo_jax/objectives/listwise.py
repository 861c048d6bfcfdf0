"""Objectives on whole rankings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lpo_jax.objectives.lists import implicit_logits, is_better, mean_over_lists
from lpo_jax.types import Array, Denoising, Metrics, Ranking


def lpo(
  denoising: Denoising, ranking: Ranking, *, beta: float
) -> tuple[Array, Metrics]:
  r"""Diffusion-LPO: the Plackett-Luce log-likelihood of the whole ranking.

  L = - sum_j [ a_j - log sum_{k >= j} exp a_k ],   a_j = -beta/2 (m_j - r_j)

      code               paper
      denoising.err      m_j = ||eps - eps_theta(x_t^j, c, t)||^2 / D
      denoising.ref_err  r_j = ||eps - eps_ref(x_t^j, c, t)||^2 / D
      beta               beta T omega(lambda_t), in Diffusion-DPO's code units
      logits             a_j = beta T omega(lambda_t) delta_theta(x_t^j) / (2 D)

  Intuition: a ranking is made by choosing the best image, then the best of the rest, and
  so on; each choice is a softmax over what is still on the table. Two items give
  Diffusion-DPO exactly; step 0 gives log m! for m items without ties.

  Ties (equal ranks) mean "no order among us". Item j is then chosen from itself and the
  items ranked *strictly worse*: its tied peers are not on the table. Each factor is the
  exact Plackett-Luce probability of that choice (Luce's axiom: what is not on the table
  does not matter), so this conditions on the tied peers instead of inventing an order.
  Without ties it is the formula above; a star [0, 1, 1, 1] is the winner's choice over
  all losers; a list that is all ties says nothing. For tied groups above the last rank
  it is a composite likelihood (Varin, Reid & Firth 2011), not the marginal over orders.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B].
    beta: inverse temperature; unpublished for LPO, 2000 to 5000 for its two-item case.

  Returns:
    Scalar loss (sum over a list's choices, weighted mean over lists) and no extra
    metrics.

  Reference: Bai et al. 2025 (arXiv:2510.01540), the loss of section 4; Plackett 1975.
  """
  logits = implicit_logits(denoising, ranking, beta)
  beats = is_better(ranking)
  chooses = jnp.any(beats, axis=2)
  on_the_table = beats | jnp.eye(logits.shape[1], dtype=bool)
  rivals = jnp.broadcast_to(logits[:, None, :], beats.shape)
  log_total = jax.nn.logsumexp(rivals, axis=2, where=on_the_table)
  choices = jnp.where(chooses, log_total - logits, 0.0)
  counts = jnp.any(chooses, axis=1)
  return mean_over_lists(jnp.sum(choices, axis=1), counts, ranking), {}
