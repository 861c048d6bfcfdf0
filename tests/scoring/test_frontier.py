"""Frontiers by hand arithmetic."""

import math

import pytest

from lpo_jax.scoring.frontier import Frontier, Point, compare, mean_over_seeds

# Two betas, two seeds, two checkpoints: (drift, win rate, lost).
MEASURED = {
  (1.0, 0): [(1.0, 0.6, 0.00), (2.0, 0.8, 0.02)],
  (1.0, 1): [(1.0, 0.7, 0.00), (3.0, 0.9, 0.04)],
  (5.0, 0): [(0.5, 0.7, 0.01), (1.5, 0.7, 0.01)],
  (5.0, 1): [(0.5, 0.6, 0.01), (1.0, 0.6, 0.03)],
}
POINTS = [
  Point("full", beta, seed, 10 * (k + 1), drift, won, 2 * won - 1, lost)
  for (beta, seed), rows in MEASURED.items()
  for k, (drift, won, lost) in enumerate(rows)
]


@pytest.fixture
def frontier():
  other = Point("pairs", 1.0, 0, 10, 9.0, 0.99, 1.0, -1.0)
  return Frontier([other, *reversed(POINTS)], "full")


def test_the_interval_is_students():
  mean = mean_over_seeds([0.6, 0.8], beta=2.0)
  # s / sqrt(n) = 0.1; t(0.975, 1 degree of freedom) = 12.706.
  assert (mean.mean, mean.beta) == (pytest.approx(0.7), 2.0)
  assert mean.high - mean.mean == pytest.approx(1.2706, rel=1e-4)
  assert mean.mean - mean.low == pytest.approx(1.2706, rel=1e-4)
  assert math.isnan(mean_over_seeds([0.6]).low)


def test_reach_is_where_all_seeds_of_one_beta_come(frontier):
  assert (frontier.betas, frontier.seeds) == ([1.0, 5.0], [0, 1])
  assert frontier.reach == 2.0  # of beta 1: the least of 2 and 3; of beta 5: 1


def test_drifts_between_checkpoints_are_interpolated_from_the_base_on(frontier):
  # beta 1: 0.55 and 0.6, beta 5: 0.7 and 0.6.
  early = frontier.at_drift(0.5)
  assert early.values == pytest.approx((0.7, 0.6)) and early.beta == 5.0
  assert frontier.at_drift(0.5, "gained").values == pytest.approx((0.4, 0.2))
  assert frontier.at_drift(0.25).values == pytest.approx((0.6, 0.55))  # base: 0.5 at 0
  # beta 5 ends at 1.0 with seed 1 and is left out, however high seed 0 may be.
  late = frontier.at_drift(1.5)
  assert late.values == pytest.approx((0.7, 0.75)) and late.beta == 1.0
  assert frontier.at_drift(2.1) is None


def test_the_beta_is_chosen_by_the_mean_over_seeds(frontier):
  # At 1.0 seed 0 does better with beta 5 (0.7 against 0.6), seed 1 with beta 1: equal
  # means; a hair further on beta 1 is ahead, for both seeds alike.
  assert frontier.at_drift(1.0).mean == pytest.approx(0.65)
  better = [Point("full", 1.0, 1, 10, 1.0, 0.72, 0.4, 0.0) if p == POINTS[2] else p
            for p in POINTS]  # fmt: skip
  chosen = Frontier(better, "full").at_drift(1.0)
  assert chosen.values == pytest.approx((0.6, 0.72)) and chosen.beta == 1.0


def test_what_is_won_within_a_loss(frontier):
  # Mean losses: beta 1: 0, 0.03; beta 5: 0.01, 0.02.
  assert frontier.within_loss(-0.01) is None
  assert frontier.within_loss(0.0).values == pytest.approx((0.6, 0.7))
  assert frontier.within_loss(0.029).mean == pytest.approx(0.65)
  assert frontier.within_loss(0.03).values == pytest.approx((0.8, 0.9))
  assert frontier.within_loss(0.03, "gained").values == pytest.approx((0.6, 0.8))


def test_fields_after_so_many_updates(frontier):
  lost = frontier.at_step(20, "lost")
  assert [m.mean for m in lost] == pytest.approx([0.03, 0.02])
  assert [m.beta for m in lost] == [1.0, 5.0]


def test_differences_are_paired_by_seed():
  gap = compare(mean_over_seeds([0.6, 0.9]), mean_over_seeds([0.5, 0.8]))
  assert gap.mean == pytest.approx(0.1)
  # The scatter between the seeds cancels.
  assert gap.low == pytest.approx(0.1) and gap.high == pytest.approx(0.1)
