"""Objectives on whole rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lpo_jax import tables
from lpo_jax.objectives.lists import (
  bounded_square,
  dcg_weights,
  differences,
  implicit_logits,
  is_better,
  mean_over_lists,
  places,
  rewards_of,
  sum_of_pairs,
)
from lpo_jax.objectives.pairwise import expect_labels_wrong
from lpo_jax.types import Array, Denoising, Metrics, Ranking

# (sum over a list's choices, how many) -> the list's loss.
REDUCTIONS: Mapping[str, Callable[[Array, Array], Array]] = {
  "sum": lambda total, count: total,
  "mean": lambda total, count: total / jnp.maximum(count, 1),
}


def lpo(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float,
  reduction: str = "sum",
  top_k: int = 0,
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

  The formula as printed is a sum: a list of m counts for up to m - 1 choices, and two
  items are Diffusion-DPO. "mean" divides by the choices, so that all lists count alike.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B].
    beta: inverse temperature; unpublished for LPO, 2000 to 5000 for its two-item case.
    reduction: over a list's choices, a name in `REDUCTIONS`.
    top_k: only the first k choices count, over all that is left at each: those by items
      with fewer than k better ones (tied items choose together). 0 = all.

  Returns:
    Scalar loss (weighted mean over lists) and no extra metrics.

  Raises:
    UserError: an unknown reduction.

  Reference: Bai et al. 2025 (arXiv:2510.01540), the loss of section 4; Plackett 1975.
  """
  logits = implicit_logits(denoising, ranking, beta)
  beats = is_better(ranking)
  chooses = jnp.any(beats, axis=2)
  if top_k:
    chooses &= places(beats) <= top_k
  on_the_table = beats | jnp.eye(logits.shape[1], dtype=bool)
  rivals = jnp.broadcast_to(logits[:, None, :], beats.shape)
  log_total = jax.nn.logsumexp(rivals, axis=2, where=on_the_table)
  choices = jnp.where(chooses, log_total - logits, 0.0)
  count = jnp.sum(chooses, axis=1)
  reduce = tables.bind("reduction", REDUCTIONS, reduction, {})
  per_list = reduce(jnp.sum(choices, axis=1), count)
  return mean_over_lists(per_list, count > 0, ranking), {}


def _weighted_pairs(logits: Array, weights: Array, ranking: Ranking) -> Array:
  ordered = is_better(ranking)
  inside = jnp.where(ordered, differences(logits), 0.0)
  losses = jnp.where(ordered, weights, 0.0) * -jax.nn.log_sigmoid(inside)
  return sum_of_pairs(losses, ordered, ranking)


def all_pairs(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  flip_noise: float = 0.0,
) -> tuple[Array, Metrics]:
  r"""GP-DPO: a list is all its ordered pairs, each a Diffusion-DPO loss.

  L = - sum_{i better than j} log sigmoid(a_i - a_j)

      code               paper
      denoising.err      m_i in a_i = -beta/2 (m_i - r_i)
      denoising.ref_err  r_i in a_i = -beta/2 (m_i - r_i)
      beta               beta T omega(lambda_t), in Diffusion-DPO's code units

  Intuition: every comparison that the ranking implies, as if someone had made it alone.
  The *sum*: a list of m has m (m - 1) / 2 terms. `dpo` on the same list is the mean. Two
  items give `dpo`. Step 0 gives m (m - 1) / 2 log 2 for m items without ties.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: inverse temperature, as for DPO.
    label_smoothing: share of labels expected to be wrong; see `expect_labels_wrong`.
    flip_noise: the same, corrected for instead of hedged against.

  Returns:
    Scalar loss and no extra metrics.

  Reference: the pairwise baseline of Bai et al. 2025 (arXiv:2510.01540); a group's
  pairs also Chen et al. 2025 (GPO, arXiv:2505.11070).
  """
  ordered = is_better(ranking)
  logits = implicit_logits(denoising, ranking, beta)
  inside = jnp.where(ordered, differences(logits), 0.0)
  pair_loss = expect_labels_wrong(
    lambda x: -jax.nn.log_sigmoid(x), label_smoothing, flip_noise
  )
  return sum_of_pairs(pair_loss(inside), ordered, ranking), {}


def rankdpo(
  denoising: Denoising, ranking: Ranking, *, beta: float, rewards: str = "score"
) -> tuple[Array, Metrics]:
  r"""RankDPO: all pairs, weighted by what it would cost to get them wrong.

  L = - sum_{phi_i > phi_j} Delta_ij log sigmoid( -beta (s_i - s_j) ),
  Delta_ij = |2^phi_i - 2^phi_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|

      code               paper
      ranking.score      phi_i; published: share of wins over 5 scorers, in 0..1
      ranking.rank       tau_i - 1: places by phi, tied items share the better one
      a_i - a_j          -beta (s_i - s_j),  s = err - ref_err
      beta               2 beta D: in Diffusion-DPO's code units

  Intuition: discounted cumulative gain: to swap the best with the worst costs more than
  to swap two in the middle. Weights come from the *true* scores and never change.
  Step 0 gives log 2 times the sum of the weights.

  The base of the logarithm is not stated; natural here (log2 is a factor). Pairs are
  ordered by rank, and sizes come from the score: without scores (all 0) every weight,
  and with it the loss, is 0. Use `rewards="wins"` there.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks, validity and scores [B, N], weights [B]; pairs of equal rank say
      nothing. Scores are clipped at +-64.
    beta: inverse temperature; unpublished.
    rewards: "score", or "wins": the share of the list that an item beats.

  Returns:
    Scalar loss (sum over pairs, as printed) and no extra metrics.

  Raises:
    UserError: an unknown source of rewards.

  Reference: Karthik et al. 2024 (arXiv:2410.18013), the ranking loss.
  """
  weights = dcg_weights(rewards_of(ranking, rewards), places(is_better(ranking)))
  logits = implicit_logits(denoising, ranking, beta)
  return _weighted_pairs(logits, weights, ranking), {}


def lipo_lambda(
  denoising: Denoising, ranking: Ranking, *, beta: float, rewards: str = "score"
) -> tuple[Array, Metrics]:
  r"""LiPO-lambda: all pairs, weighted by where the *policy* now puts them.

  L = sum_{psi_i > psi_j} Delta_ij log(1 + exp(-(s_i - s_j))),
  Delta_ij = |G_i - G_j| |1 / D(tau_i) - 1 / D(tau_j)|,  G = 2^psi - 1,  D = log(1 + tau)

      code               paper
      ranking.score      psi_i, the label
      a_i                s_i = beta log pi / pi_ref
      places             tau_i: place by the current a, stop-gradient
      beta               beta, in Diffusion-DPO's code units

  Intuition: as RankDPO, but a pair counts by the places its images hold *now*: what is
  wrong at the top of the policy's own list is repaired first.

  Equal a are placed by the true order; items equal in both share the better place.
  Places by score alone would be all the same at step 0, where every a is 0, and then
  all weights and all gradients 0, for ever. So step 0 is RankDPO's.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks, validity and scores [B, N], weights [B]; pairs of equal rank say
      nothing. Scores are clipped at +-64.
    beta: inverse temperature; published for language models only (0.05 on log-ratios).
    rewards: "score", or "wins": the share of the list that an item beats. Without
      scores (all 0), "score" makes every weight 0.

  Returns:
    Scalar loss (sum over pairs, as printed) and no extra metrics.

  Raises:
    UserError: an unknown source of rewards.

  Reference: Liu et al. 2024 (arXiv:2402.01878), the loss of LiPO-lambda.
  """
  logits = implicit_logits(denoising, ranking, beta)
  a = jax.lax.stop_gradient(logits)
  both = ranking.valid[:, :, None] & ranking.valid[:, None, :]
  ahead = both & (a[:, :, None] > a[:, None, :])
  level = both & (a[:, :, None] == a[:, None, :])
  place = places(ahead | (level & is_better(ranking)))
  weights = dcg_weights(rewards_of(ranking, rewards), place)
  return _weighted_pairs(logits, weights, ranking), {}


def lair(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float,
  temperature: float,
  penalty: float,
  rewards: str = "score",
) -> tuple[Array, Metrics]:
  r"""Diffusion LAIR: improvements in proportion to the centred rewards, and bounded.

  L = - sum_i w_i s_i + (lambda / N) sum_i s_i^2,   w_i = softmax(R / tau)_i - 1 / N

      code               paper
      ranking.score      R_i, a reward model's score
      temperature        tau
      penalty            lambda
      beta / 2 (r - m)   s_i, the improvement over the reference; beta = 2: bare errors
      valid items        N

  Intuition: raise what scores above the list's average, lower the rest; the square ends
  it at s_i = N w_i / (2 lambda). Rewards count by size and not only by order. Step 0
  gives 0. The loss goes below 0: its minimum is -N / (4 lambda) sum_i w_i^2.

  The scale of s is not known to us. As bare errors s is 1e-4 to 1e-3, and lambda would
  have to be 100 to 10000; with beta as for DPO both are of order 1. A list whose ranks
  are all equal says nothing and does not count.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks, validity and scores [B, N], weights [B].
    beta: scale of the improvement, in Diffusion-DPO's code units.
    temperature: of the softmax, in the score's units.
    penalty: of the squares, above 0; with 0 the loss has no minimum.
    rewards: "score", or "wins" where there are only ranks.

  Returns:
    Scalar loss and no extra metrics.

  Raises:
    UserError: an unknown source of rewards.

  Reference: Wang et al. 2026 (arXiv:2605.26491); formula reconstructed from secondary
  sources, not checked against the paper's equations.
  """
  valid = ranking.valid
  s = implicit_logits(denoising, ranking, beta)
  count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
  graded = rewards_of(ranking, rewards) / temperature
  share = jax.nn.softmax(jnp.where(valid, graded, -1e38), axis=1)
  centred = jnp.where(valid, share - 1.0 / count, 0.0)
  per_list = jnp.sum(-centred * s + penalty / count * bounded_square(s), axis=1)
  return mean_over_lists(
    per_list, jnp.any(is_better(ranking), axis=(1, 2)), ranking
  ), {}
