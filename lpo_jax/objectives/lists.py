"""What all objectives share: logits, comparisons, and means over lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lpo_jax import tables
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


def differences(x: Array) -> Array:
  """x_i - x_k of all items of a list: [B, N] -> [B, N, N]."""
  return x[:, :, None] - x[:, None, :]


def mean_of_pairs(values: Array, pairs: Array, ranking: Ranking) -> Array:
  """Mean of each list's values where `pairs`, then over lists.

  Args:
    values: [B, N, N] fp32, finite everywhere.
    pairs: [B, N, N] bool; a list without any does not count.
    ranking: gives the [B] weights.
  """
  count = jnp.sum(pairs, axis=(1, 2))
  total = jnp.sum(jnp.where(pairs, values, 0.0), axis=(1, 2))
  return mean_over_lists(total / jnp.maximum(count, 1), count > 0, ranking)


def sum_of_pairs(values: Array, pairs: Array, ranking: Ranking) -> Array:
  """As `mean_of_pairs`, but the sum within a list: long lists count for more."""
  total = jnp.sum(jnp.where(pairs, values, 0.0), axis=(1, 2))
  return mean_over_lists(total, jnp.any(pairs, axis=(1, 2)), ranking)


def bounded_square(x: Array) -> Array:
  """x^2, constant beyond |x| = 1e15: no error comes near, and fp32 stays finite."""
  return jnp.square(jnp.clip(x, -1e15, 1e15))


def _score(ranking: Ranking) -> Array:
  return jnp.where(ranking.valid, ranking.score, 0.0)


def _wins(ranking: Ranking) -> Array:
  others = jnp.maximum(jnp.sum(ranking.valid, axis=1, keepdims=True) - 1, 1)
  return jnp.sum(is_better(ranking), axis=2) / others


# Where graded rewards come from: outside, or the share of the others an item beats.
REWARDS: Mapping[str, Callable[[Ranking], Array]] = {"score": _score, "wins": _wins}


def rewards_of(ranking: Ranking, source: str) -> Array:
  """Graded rewards of the items: [B, N] fp32, 0 where invalid.

  Args:
    ranking: scores and ranks.
    source: a name in `REWARDS`. "score" is `ranking.score`; a data set of votes has
      none (all 0). "wins" makes one out of the ranks, in 0..1.

  Raises:
    UserError: an unknown source.
  """
  return tables.bind("rewards", REWARDS, source, {})(ranking)


def calibrate(rewards: Array, valid: Array) -> Array:
  """Expected win rate of each item against the others of its list: [B, N] in 0..1.

  R_ca(i) = mean_{j != i} sigmoid(R_i - R_j), the Bradley-Terry probability that i wins.
  """
  n = rewards.shape[1]
  others = valid[:, :, None] & valid[:, None, :] & ~jnp.eye(n, dtype=bool)
  win = jnp.where(others, jax.nn.sigmoid(differences(rewards)), 0.0)
  return jnp.sum(win, axis=2) / jnp.maximum(jnp.sum(others, axis=2), 1)


def places(before: Array) -> Array:
  """1 + how many items come before each: [B, N, N] bool -> [B, N] fp32, 1 = first.

  Args:
    before: [B, N, N], item i comes before item k.
  """
  return 1.0 + jnp.sum(before, axis=1)


def dcg_weights(rewards: Array, place: Array) -> Array:
  """|2^phi_i - 2^phi_k| |1 / log(1 + tau_i) - 1 / log(1 + tau_k)|: [B, N, N].

  How much the discounted cumulative gain changes if items i and k swap places.

  Args:
    rewards: [B, N], phi; clipped at +-64, for 2^phi to be finite.
    place: [B, N], tau, 1 = first.
  """
  gain = jnp.exp2(jnp.clip(rewards, -64.0, 64.0))
  return jnp.abs(differences(gain)) * jnp.abs(differences(1.0 / jnp.log1p(place)))


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


QUANTILES = (0.1, 0.5, 0.9)
TIMESTEP_BINS = 4
# Shortest and longest list of each group; the last has no longest.
LIST_SIZES: Mapping[str, tuple[int, float]] = {
  "size2": (2, 2),
  "size3_4": (3, 4),
  "size5_up": (5, float("inf")),
}


def margin_quantiles(denoising: Denoising, ranking: Ranking) -> Metrics:
  """`margin_p10`, `_p50`, `_p90`: of all ordered pairs; NaN where there are none."""
  reward = jnp.where(ranking.valid, denoising.ref_err - denoising.err, 0.0)
  gap = jnp.where(is_better(ranking), differences(reward), jnp.nan)
  found = jnp.nanquantile(gap, jnp.asarray(QUANTILES))
  return {f"margin_p{round(100 * q)}": found[i] for i, q in enumerate(QUANTILES)}


def groups_of_lists(ranking: Ranking, place: Array) -> dict[str, Array]:
  """Which lists belong to which group: name -> [B] bool.

  Args:
    ranking: of the lists; rows that hold none are in no group.
    place: [B] timestep of each list over the number of timesteps, in [0, 1).

  Returns:
    `t0` (the least noise) to `t3`, equal parts of the timesteps, and `LIST_SIZES`.
  """
  size = jnp.sum(ranking.valid, axis=1)
  bins = jnp.clip(jnp.floor(place * TIMESTEP_BINS), 0, TIMESTEP_BINS - 1)
  groups = {f"t{i}": (bins == i) & (size > 0) for i in range(TIMESTEP_BINS)}
  sizes = LIST_SIZES.items()
  return groups | {k: (low <= size) & (size <= high) for k, (low, high) in sizes}


def metrics_by_group(denoising: Denoising, ranking: Ranking, place: Array) -> Metrics:
  """Five of the standing metrics by timestep and by list length.

  Args:
    denoising: [B, N].
    ranking: [B, N].
    place: see `groups_of_lists`.

  Returns:
    `implicit_acc/t0`, `drift/size2` and so on, each as in `standing_metrics` but over
    the lists of one group; NaN where the group has none.
  """
  d, valid = denoising, ranking.valid
  reward = jnp.where(valid, d.ref_err - d.err, 0.0)
  ordered, gap = is_better(ranking), differences(reward)
  best = valid & (ranking.rank == 0)

  def per_list(values: Array, where: Array) -> tuple[Array, Array]:
    axes = tuple(range(1, values.ndim))
    return jnp.sum(jnp.where(where, values, 0.0), axes), jnp.sum(where, axes)

  told = {
    "implicit_acc": per_list(0.5 * (1.0 + jnp.sign(gap)), ordered),
    "margin": per_list(gap, ordered),
    "winner_gain": per_list(reward, best),
    "loser_gain": per_list(reward, valid & ~best),
    "drift": per_list(d.drift, valid),
  }
  metrics = {}
  for group, member in groups_of_lists(ranking, place).items():
    for name, (totals, counts) in told.items():
      count = jnp.sum(jnp.where(member, counts, 0))
      mean = jnp.sum(jnp.where(member, totals, 0.0)) / jnp.maximum(count, 1)
      metrics[f"{name}/{group}"] = jnp.where(count > 0, mean, jnp.nan)
  return metrics
