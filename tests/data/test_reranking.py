"""Lists dealt into groups, reversed and shuffled: worked by hand, or by counting."""

import dataclasses
import itertools

import numpy as np
import pytest

from lpo_jax.data import lists, orders
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError


def ranked(rows):
  """rows: (prompt, names best first, ranks, scores)."""
  names = sorted({name for _, images, _, _ in rows for name in images})
  sizes = [len(images) for _, images, _, _ in rows]
  flat = [[row[k] for row in rows] for k in (1, 2, 3)]
  image, rank, score = (list(itertools.chain(*column)) for column in flat)
  return RankedLists(
    prompt=np.arange(len(rows), dtype=np.int32),
    list_id=np.zeros(len(rows), np.uint32),
    weight=np.ones(len(rows), np.float32),
    offsets=np.cumsum([0, *sizes]),
    image=np.asarray([names.index(name) for name in image], np.int32),
    rank=np.asarray(rank, np.int32),
    score=np.asarray(score, np.float32),
    prompts=[row[0] for row in rows],
    image_uids=names,
  )


STAR = ranked(
  [("p", "wxyz", [0, 1, 1, 1], [9, 5, 5, 5]), ("q", "abc", [0, 1, 2], [3, 1, 0])]
)
MANY = ranked(
  [
    (f"p{i:03d}", [f"{i}-{k}" for k in range(4)], [0, 1, 2, 3], [4, 3, 2, 1])
    for i in range(300)
  ]
)


def names(built):
  return [built.image_uids[i] for i in built.image]


def test_reversed_has_the_worst_first_and_keeps_ties():
  built, _ = lists.build(STAR, "paths", ranks="reversed")
  assert names(built) == ["z", "y", "x", "w", "c", "b", "a"]
  assert built.rank.tolist() == [0, 0, 0, 1, 0, 1, 2]
  assert built.score.tolist() == [9, 9, 9, 5, 3, 2, 0]  # 9 + 5 - s and 3 + 0 - s
  given, report = lists.build(STAR, "paths")
  assert built.list_id.tolist() == given.list_id.tolist()  # the same noise
  assert report == lists.build(STAR, "paths", ranks="reversed")[1]


def test_shuffled_says_nothing_about_the_ranks():
  """Every image of a list is as often in every place, and the ranks are as they were."""
  given, _ = lists.build(MANY, "paths")
  built, _ = lists.build(MANY, "paths", ranks="shuffled")
  assert built.rank.tolist() == given.rank.tolist()
  assert built.score.tolist() == given.score.tolist()
  was, now = given.image.reshape(-1, 4), built.image.reshape(-1, 4)
  assert np.array_equal(np.sort(was), np.sort(now))
  place = (now[:, :, None] == was[:, None, :]).sum(0)  # [place now, place before]
  # 300 draws with p = 1/4: the standard deviation is 7.5; five of them.
  assert np.abs(place - 75).max() < 38, place


def test_shuffled_hangs_on_the_list_and_not_on_its_order_or_its_neighbours():
  built, _ = lists.build(MANY, "paths", ranks="shuffled")
  backwards = dataclasses.replace(MANY, rank=3 - MANY.rank)
  again, _ = lists.build(backwards, "paths", ranks="shuffled")
  assert built.list_id.tolist() == again.list_id.tolist()
  assert names(built) == names(again)


def test_groups_are_separate_lists_in_the_order_that_people_gave():
  built, report = lists.build(MANY, "groups", max_size=2)
  assert report.lengths == {2: 600}
  assert sorted(names(built)) == sorted(names(lists.build(MANY, "paths")[0]))
  places = np.asarray([int(name[-1]) for name in names(built)]).reshape(-1, 2)
  assert (places[:, 0] < places[:, 1]).all()
  # Neighbours are 3 of the 6 pairs of four, and a third of any two pairs' splits.
  gaps = np.bincount(places[:, 1] - places[:, 0])
  assert abs(gaps[1] / 600 - 1 / 2) < 0.1 and abs(gaps[3] / 600 - 1 / 6) < 0.075


def test_groups_by_hand():
  ranks, uids = [0, 1, 1, 2, 3], "abcde"
  dealt = orders.groups(ranks, 4, uids)
  assert [len(places) for places, _ in dealt] == [4]  # the fifth has nobody to beat
  assert orders.groups(ranks, 5, uids) == [([0, 1, 2, 3, 4], ranks)]
  assert orders.groups([0, 0, 0], 3, "abc") == []
  # Who is dealt together does not depend on how people ranked.
  together = [{uids[i] for i in places} for places, _ in orders.groups(ranks, 2, uids)]
  again = [{uids[4 - i] for i in p} for p, _ in orders.groups(range(5), 2, uids[::-1])]
  assert together == again


def test_two_in_a_window_are_neighbours():
  """How configs/ablation_ranks.py says 'adjacent pairs'."""
  built, _ = lists.build(STAR, "paths", max_size=2)
  pairs = sorted(np.asarray(names(built)).reshape(-1, 2).tolist())
  assert pairs == [["a", "b"], ["b", "c"], ["w", "x"], ["w", "y"], ["w", "z"]]


def test_an_unknown_order_is_refused():
  with pytest.raises(UserError, match=r"data\.ranks.*did you mean 'shuffled'"):
    lists.build(STAR, ranks="shufled")
