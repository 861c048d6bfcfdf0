"""The reference's stored errors: filed by list and epoch, found by list and epoch."""

import types

import numpy as np
import pytest

from lpo_jax.data import references
from lpo_jax.errors import UserError

# Three lists of 2, 3 and 1 items with ids that are not their places.
LISTS = types.SimpleNamespace(
  offsets=np.array([0, 2, 5, 6]), list_id=np.array([70, 5, 9], np.uint32)
)


def update(*held, slots=4):
  """identity, slot, valid of an update with (list id, epoch, size) in its slots."""
  identity, slot = np.zeros((slots, 2), np.uint32), np.zeros((3, 3), np.int32)
  valid, start = np.zeros((3, 3), bool), 0
  for row, (list_id, epoch, size) in enumerate(held):
    identity[start : start + size] = list_id, epoch
    slot[row, :size] = np.arange(start, start + size)
    valid[row, :size] = True
    start += size
  return identity, slot, valid


def test_errors_are_filed_under_their_list_and_epoch():
  store = references.References.empty(LISTS)
  store.add(*update((5, 0, 3), (9, 0, 1)), np.array([1, 2, 3, 4], np.float32))
  store.add(*update((9, 1, 1), (70, 0, 2)), np.array([5, 6, 7, 8], np.float32))
  nan = np.nan
  np.testing.assert_array_equal(
    store.errors, [[6, 7, 1, 2, 3, 4], [nan, nan, nan, nan, nan, 5]]
  )
  np.testing.assert_array_equal(store.of(0, slice(2, 5)), [1, 2, 3])
  for epoch, items in ((1, slice(0, 2)), (2, slice(0, 2))):
    with pytest.raises(UserError, match=rf"epoch {epoch} \(it was made by 2 updates\)"):
      store.of(epoch, items)


def test_what_is_covered():
  store = references.References.empty(LISTS)
  store.add(*update((5, 0, 3), (9, 0, 1)), np.zeros(4, np.float32))
  assert store.covers(1, draws=0) and not store.covers(2, draws=0)
  assert not store.covers(2, draws=1)
  store.add(*update((70, 0, 2)), np.zeros(4, np.float32))
  assert store.covers(99, draws=1) and not store.covers(99, draws=0)
  assert not store.covers(99, draws=2)


def test_what_is_saved_is_read(tmp_path):
  store = references.References.empty(LISTS)
  store.add(*update((5, 0, 3)), np.array([1, 2, 3, 0], np.float32))
  store.position = {"position": 1}
  about = {"reference": "abc", "noising": {"name": "forward"}}
  assert references.read(tmp_path, LISTS, about) is None
  references.save(tmp_path, store, about)
  found = references.read(tmp_path, LISTS, about)
  np.testing.assert_array_equal(found.errors, store.errors)
  assert (found.updates, found.position) == (1, {"position": 1})
  # Other updates hold other lists: the errors stay, how far they reach is not known.
  order = {"images_per_update": 4}
  assert found.in_order({}) is found and found.covers(1, draws=0)
  other = found.in_order(order)
  assert not other.covers(1, draws=0) and other.position is None
  np.testing.assert_array_equal(other.errors, store.errors)
  references.save(tmp_path, other, about)
  assert references.read(tmp_path, LISTS, about).in_order(order).order == order
  with pytest.raises(UserError, match=r"reference differ.*was 'abc', is 'def'"):
    references.read(tmp_path, LISTS, {**about, "reference": "def"})
