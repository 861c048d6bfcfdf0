"""Frontiers: what is gained against what it costs, over betas, checkpoints and seeds.

A method can win a comparison by merely moving faster. So each is a curve: its points are
the checkpoints of its runs, one run for every beta and seed, and methods are compared
where they paid the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Point:
  """One checkpoint of one run, measured.

  Attributes:
    arm: which method.
    beta: its temperature.
    seed: of its world and its training.
    step: completed updates; equal steps are equal images.
    drift: how far the drawn weights are from the base's.
    won: win rate over the base under the score that people judged by.
    gained: mean of that score, less the base's.
    lost: what of a second score's mean was lost; below 0 where it rose.
  """

  arm: str
  beta: float
  seed: int
  step: int
  drift: float
  won: float
  gained: float
  lost: float


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over seeds with its interval.

  Attributes:
    mean: of the seeds' values.
    low: lower end of the 95 % t interval; NaN with one seed.
    high: its upper end.
    beta: of the runs that it is a mean of.
    values: [seeds] in ascending order of the seeds.
  """

  mean: float
  low: float
  high: float
  beta: float
  values: tuple[float, ...]


def mean_over_seeds(values: Sequence[float], beta: float = np.nan) -> Mean:
  """mean +- t(0.975, n - 1) s / sqrt(n), for runs that differ by their seeds alone.

  >>> m = mean_over_seeds([1.0, 2.0, 3.0])
  >>> round(m.mean, 3), round(m.low, 3), round(m.high, 3)
  (2.0, -0.484, 4.484)
  """
  from scipy import stats

  values = tuple(float(v) for v in values)
  mean, half = float(np.mean(values)), float("nan")
  if len(values) > 1:
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * error)
  return Mean(mean, mean - half, mean + half, float(beta), values)


class Frontier:
  """All points of one method.

  Args:
    points: of every method; those of other arms are left out.
    arm: which method.
  """

  def __init__(self, points: Sequence[Point], arm: str):
    self.points = sorted(
      (p for p in points if p.arm == arm), key=lambda p: (p.beta, p.seed, p.step)
    )
    self.arm = arm
    self.betas = sorted({p.beta for p in self.points})
    self.seeds = sorted({p.seed for p in self.points})

  def curve(self, beta: float, seed: int) -> list[Point]:
    """One run's checkpoints by drift, from the base (nothing paid or won)."""
    own = [p for p in self.points if p.beta == beta and p.seed == seed]
    return sorted(
      [Point(self.arm, beta, seed, 0, 0.0, 0.5, 0.0, 0.0), *own], key=lambda p: p.drift
    )

  @property
  def reach(self) -> float:
    """The largest drift at which every seed has a run of one beta."""
    furthest = [
      min(self.curve(beta, seed)[-1].drift for seed in self.seeds)
      for beta in self.betas
    ]
    return max(furthest)

  def at_drift(self, drift: float, field: str = "won") -> Mean | None:
    """What is won or gained at a drift, with the beta that does best there.

    Runs are interpolated linearly between checkpoints and never extrapolated: a beta
    whose runs do not all come as far is left out. The beta is chosen by the mean over
    seeds, not for each seed.

    Returns:
      The mean of the best beta, or None where no beta's runs all come so far.
    """
    found = []
    for beta in self.betas:
      curves = [self.curve(beta, seed) for seed in self.seeds]
      if min(curve[-1].drift for curve in curves) < drift:
        continue
      values = [
        np.interp(drift, [p.drift for p in curve], [getattr(p, field) for p in curve])
        for curve in curves
      ]
      found.append(mean_over_seeds(values, beta))
    return max(found, key=lambda m: m.mean, default=None)

  def at_step(self, step: int, field: str = "won") -> list[Mean]:
    """A field's mean over seeds after so many updates, of every beta."""
    return [
      mean_over_seeds(
        [getattr(p, field) for p in self.points if p.beta == beta and p.step == step],
        beta,
      )
      for beta in self.betas
    ]

  def within_loss(self, most: float, field: str = "won") -> Mean | None:
    """The most that is won or gained while the mean of `lost` is at most `most`.

    Returns:
      The mean of the best beta and checkpoint, or None where all of them lose more.
    """
    found = [
      best
      for step in sorted({p.step for p in self.points})
      for best, lost in zip(self.at_step(step, field), self.at_step(step, "lost"))
      if lost.mean <= most + 1e-12
    ]
    return max(found, key=lambda m: m.mean, default=None)


def compare(first: Mean, second: Mean) -> Mean:
  """The difference first - second of runs on the same seeds, paired by seed."""
  return mean_over_seeds(np.subtract(first.values, second.values))
