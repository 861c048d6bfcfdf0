"""What all objectives share: logits, comparisons, and means over lists."""

from __future__ import annotations

import jax.numpy as jnp

from lpo_jax.types import Array, Denoising, Metrics, Ranking


def implicit_logits(denoising: Denoising, ranking: Ranking, beta: float) -> Array:
  """a = -beta/2 (err - ref_err), and 0 where invalid: [B, N] fp32.

  The factor 1/2 and the *mean* error are Diffusion-DPO's code, and make `beta`
  comparable with published runs ("code units").
  """
  difference = denoising.err - denoising.ref_err
  # Zero before scaling: an invalid item may hold 1e30, and inf * 0 is nan in a gradient.
  difference = jnp.where(ranking.valid, difference, 0.0)
  return -0.5 * beta * difference


def is_better(ranking: Ranking) -> Array:
  """[B, N, N] bool: item i was ranked strictly better than item k, both valid."""
  rank, valid = ranking.rank, ranking.valid
  both = valid[:, :, None] & valid[:, None, :]
  return both & (rank[:, :, None] < rank[:, None, :])


def mean_over_lists(per_list: Array, counts: Array, ranking: Ranking) -> Array:
  """sum_b w_b L_b / sum_b w_b over the lists that say something.

  Args:
    per_list: [B] fp32.
    counts: [B] bool, False where the list holds nothing to learn from.
    ranking: gives the [B] weights.

  Returns:
    A scalar; 0 when no list counts.
  """
  weight = jnp.where(counts, ranking.weight, 0.0)
  total = jnp.sum(weight)
  return jnp.sum(weight * jnp.where(counts, per_list, 0.0)) / jnp.where(
    total > 0, total, 1.0
  )


def _mean(values: Array, where: Array) -> Array:
  count = jnp.sum(where)
  return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(count, 1)


def standing_metrics(denoising: Denoising, ranking: Ranking) -> Metrics:
  """What every run with a reference reports, whatever its objective.

  Returns:
    implicit_acc: share of ordered pairs whose better item has the larger implicit
      reward, ties counted half (0.5 at step 0).
    margin: mean difference of implicit reward, better minus worse, in error units.
    winner_gain: mean implicit reward of the best items: is the winner drawn *better*
      than by the reference, or only less badly than the loser?
    loser_gain: the same of all other items.
    drift: mean (pred - ref_pred)^2.
    err, ref_err: mean denoising errors.
  """
  d, valid = denoising, ranking.valid
  reward = jnp.where(valid, d.ref_err - d.err, 0.0)
  ordered = is_better(ranking)
  gap = reward[:, :, None] - reward[:, None, :]
  best = valid & (ranking.rank == 0)
  return {
    "implicit_acc": _mean(0.5 * (1.0 + jnp.sign(gap)), ordered),
    "margin": _mean(gap, ordered),
    "winner_gain": _mean(reward, best),
    "loser_gain": _mean(reward, valid & ~best),
    "drift": _mean(d.drift, valid),
    "err": _mean(d.err, valid),
    "ref_err": _mean(d.ref_err, valid),
  }
