"""Several caches as one: every row comes from its own cache, in its share."""

import dataclasses

import jax
import numpy as np
import pytest

from lpo_jax.data import draws, mixture, pipeline
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError
from lpo_jax.types import Conditioning

NAMES = ("big", "other", "small")


class Shelf:
  """Stands in for `cache.Cache`: moments are 1000 * number + index, texts likewise."""

  has_mirrored = True

  def __init__(self, number, lengths, shape=(2, 2, 4)):
    self.number, self.closed = number, False
    self.folder = f"shelf{number}"
    self.manifest = {
      "moments": {"shape": list(shape)},
      "prompts": {"prompt_embeds": [3, 5], "pooled": [2]},
      "preprocessing": {"resolution": 8},
    }
    rng = np.random.default_rng(number)
    items = int(np.sum(lengths))
    self.image_count = items
    self.null_prompts = (1,)
    self.parts = (draws.Part("", len(lengths)),)
    self.lists = RankedLists(
      prompt=rng.integers(2, 4, len(lengths)).astype(np.int32),
      list_id=rng.integers(0, 2**32, len(lengths), np.uint32),
      weight=np.full(len(lengths), number + 1, np.float32),
      offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      image=rng.permutation(items).astype(np.int32),
      rank=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
      score=np.zeros(items, np.float32),
      prompts=["x", "", "y", "z"],
      image_uids=[f"{number}/{i}" for i in range(items)],
    )

  def moments(self, indices):
    indices = np.asarray(indices)
    assert (indices < 2 * self.image_count).all()
    values = (1000 * self.number + indices).astype(np.float32)[:, None, None, None]
    return np.broadcast_to(values, (len(indices), 2, 2, 4)).copy()

  def conditioning(self, prompts, images, *, time_ids):
    assert (np.asarray(prompts) < 4).all()
    states = np.float32(1000 * self.number + np.asarray(prompts))[:, None, None]
    n = len(prompts)
    return Conditioning(
      np.broadcast_to(states, (n, 3, 5)),
      np.zeros((n, 2), np.float32),
      np.broadcast_to(np.float32(images)[:, None], (n, 6)),
    )

  def close(self):
    self.closed = True


def _mixed(shares=(6, 3, 1)):
  shelves = [Shelf(0, [2, 3] * 20), Shelf(1, [4] * 9), Shelf(2, [2] * 5)]
  caches = dict(zip(NAMES, shelves, strict=True))
  return mixture.Mixture(caches, dict(zip(NAMES, shares, strict=True))), shelves


def test_rows_come_from_their_own_cache():
  mixed, shelves = _mixed()
  total = 100 + 36 + 10
  assert mixed.image_count == total and len(mixed.lists) == 54
  assert mixed.null_prompts == (1, 5, 9)
  indices = [0, 99, 100, 135, 136, 145, 3, 100 + total, 145 + total, total]
  # Mirrored image i of a shelf with n images is its index i + n.
  expected = [0, 99, 1000, 1035, 2000, 2009, 3, 1036, 2019, 100]
  assert mixed.moments(indices)[:, 0, 0, 0].tolist() == expected
  got = mixed.conditioning(np.array([3, 6, 9, 2]), np.array([5, 101, 140, 7]))
  assert got.prompt_embeds[:, 0, 0].tolist() == [3, 1002, 2001, 2]
  assert got.time_ids[:, 0].tolist() == [5, 1, 4, 7]
  for number, shelf in enumerate(shelves):  # the lists are the shelves', one by one
    mine = slice(*np.cumsum([0, 40, 9, 5])[number : number + 2])
    np.testing.assert_array_equal(mixed.lists.list_id[mine], shelf.lists.list_id)
    np.testing.assert_array_equal(mixed.lists.lengths[mine], shelf.lists.lengths)
  uids = [mixed.lists.image_uids[i] for i in mixed.lists.image]
  assert uids == [s.lists.image_uids[i] for s in shelves for i in s.lists.image]
  mixed.close()
  assert all(shelf.closed for shelf in shelves)


def _batches(mixed, **options):
  defaults = {"images_per_update": 16, "seed": 1, "prefetch": 0}
  return pipeline.Batches(mixed, **{**defaults, **options})


def test_batches_of_a_mixture():
  mixed, _ = _mixed()
  batches = _batches(mixed, flip="list", caption_dropout=0.3)
  lists = np.zeros(3)
  for _ in range(50):
    batch = next(batches)
    shelf = batch.moments[:, 0, 0, 0] // 1000
    text = batch.conditioning.prompt_embeds[:, 0, 0]
    np.testing.assert_array_equal(text // 1000, shelf)  # never another shelf's text
    assert set(np.unique(text % 1000)) <= {1, 2, 3}  # its own empty prompt, or a text
    for row in np.flatnonzero(batch.ranking.valid[:, 0]):
      slots = batch.slot[row, batch.ranking.valid[row]]
      (number,) = np.unique(shelf[slots])
      assert batch.ranking.weight[row] == number + 1
      lists[int(number)] += 1
  drawn = batches.drawn
  assert [drawn[name]["lists"] for name in NAMES] == lists.tolist()
  shares = [drawn[name]["share"] for name in NAMES]
  np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.02)
  assert drawn["small"]["epochs"] == lists[2] / 5


def test_mixture_resumes_and_splits_over_processes():
  mixed, _ = _mixed()
  batches = _batches(mixed, flip="independent")
  for _ in range(30):
    next(batches)
  state = batches.get_state()
  following = [next(batches) for _ in range(3)]
  halves = [
    _batches(mixed, flip="independent", process_index=i, process_count=2)
    for i in range(2)
  ]
  for half in halves:
    half.set_state(state)
  assert halves[0].drawn == halves[1].drawn
  for batch in following:
    parts = [next(half) for half in halves]
    np.testing.assert_array_equal(
      np.concatenate([part.moments for part in parts]), batch.moments
    )
    joined = [np.concatenate([p.identity for p in parts]), parts[1].ranking]
    same = jax.tree.map(np.array_equal, joined, [batch.identity, batch.ranking])
    assert all(jax.tree.leaves(same))


def test_other_shares_are_another_order():
  state = _batches(_mixed()[0]).get_state()
  with pytest.raises(UserError, match="lists was"):
    _batches(_mixed((5, 3, 1))[0]).set_state(state)
  _batches(_mixed((6.0, "3", 1))[0]).set_state(state)  # the same numbers


def test_refusals():
  for share in (0, -1, "many", None, float("nan")):
    with pytest.raises(UserError, match="expected a positive number"):
      _mixed((1, share, 1))
  caches = {"a": Shelf(0, [2, 2]), "b": Shelf(1, [2], shape=(4, 4, 4))}
  with pytest.raises(UserError, match=r"shape of the moments: \[2, 2, 4\] in a"):
    mixture.Mixture(caches, {"a": 1, "b": 1})
  caches["b"] = Shelf(1, [2])
  caches["b"].has_mirrored = False
  mixed = mixture.Mixture(caches, {"a": 1, "b": 1})
  assert not mixed.has_mirrored
  with pytest.raises(UserError, match="has no mirrored images"):
    _batches(mixed, flip="list")


def test_order_of_names_does_not_matter():
  shelves = {name: Shelf(i, [2] * 4) for i, name in enumerate(NAMES)}
  shares = dict.fromkeys(NAMES, 1)
  one = mixture.Mixture(shelves, shares)
  two = mixture.Mixture(dict(reversed(shelves.items())), shares)
  assert one.parts == two.parts
  assert [dataclasses.astuple(part)[0] for part in one.parts] == list(NAMES)
