"""The order of lists: seeded, epoch by epoch, and source by source in their shares."""

import collections
from fractions import Fraction

import numpy as np
import pytest

from lpo_jax.data.draws import Draws, Part


def test_one_source_is_every_list_once_an_epoch():
  draws = Draws([Part("", 10)], seed=3)
  places = [draws.at(place) for place in range(30)]
  for epoch in range(3):
    mine = places[10 * epoch : 10 * epoch + 10]
    assert sorted(draw.index for draw in mine) == list(range(10))
    assert {(draw.epoch, draw.part) for draw in mine} == {(epoch, 0)}
  again = Draws([Part("", 10)], seed=3)
  assert [again.at(place) for place in (29, 0, 17)] == [places[i] for i in (29, 0, 17)]


# Grain's shuffle is slow for few: 4 ms a place among 7, 0.05 ms among 700.
PARTS = [
  Part("a", 700, Fraction(1)),
  Part("b", 500, Fraction(2)),
  Part("c", 200, Fraction(1)),
]


def test_shares_are_kept_at_every_place():
  draws = Draws(PARTS, seed=0)
  count = collections.Counter()
  for place in range(400):
    count[draws.at(place).part] += 1
    assert draws.counts(place + 1) == [count[part] for part in range(3)]
    for part, share in enumerate((0.25, 0.5, 0.25)):
      assert abs(count[part] - share * (place + 1)) <= 1
  assert [count[part] for part in range(3)] == [100, 200, 100]
  # Places that wait do not count as drawn.
  part = draws.at(13).part
  fewer = [n - (i == part) for i, n in enumerate(draws.counts(400))]
  assert draws.counts(400, without=[13]) == fewer


def test_each_source_has_epochs_of_its_own():
  draws = Draws(PARTS, seed=0)
  seen = collections.defaultdict(list)
  for place in range(3000):
    draw = draws.at(place)
    seen[draw.part].append((draw.epoch, draw.index))
  starts = [0, 700, 1200]
  for part, start in enumerate(starts):
    lists = range(start, start + PARTS[part].count)
    whole = len(seen[part]) // len(lists)
    assert whole == [1, 3, 3][part]
    assert set(seen[part][: whole * len(lists)]) == {
      (epoch, index) for epoch in range(whole) for index in lists
    }
    assert {epoch for epoch, _ in seen[part][whole * len(lists) :]} <= {whole}


def test_another_source_does_not_change_the_order_of_the_others():
  two = Draws(PARTS[:2], seed=5)
  three = Draws(PARTS, seed=5)

  def order(draws):
    places = [draws.at(place) for place in range(200)]
    return [draw.index for draw in places if draw.part == 1][:40]

  assert order(two) == order(three)
  assert order(two) != order(Draws(PARTS[:2], seed=6))


@pytest.mark.parametrize("place", [10**12, 2**60 + 1])
def test_far_away_places_are_exact(place):
  third = [Part("a", 9, Fraction("0.1")), Part("b", 9, Fraction("0.2"))]
  draws = Draws(third, seed=0)
  a, b = draws.counts(place)
  assert a + b == place and abs(3 * a - place) <= 3
  draw = draws.at(place)
  counts = draws.counts(place + 1)
  assert np.subtract(counts, (a, b)).tolist() == [draw.part == 0, draw.part == 1]
  assert draw.epoch == (a, b)[draw.part] // 9
