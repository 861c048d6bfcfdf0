"""Batches: nothing lost, nothing broken, the same for every process and after a resume."""

import collections
import dataclasses
import json
import subprocess
import sys
import textwrap
import threading
import types

import jax
import numpy as np
import pytest

from lpo_jax.data import draws, fingerprints, packing, pipeline, references
from lpo_jax.data.lists import RankedLists
from lpo_jax.errors import UserError
from lpo_jax.types import Batch, Conditioning


class MemoryCache:
  """Stands in for `cache.Cache`: image i has moments i, prompt p has states p."""

  null_prompts = (0,)
  has_mirrored = True  # image i + image_count has moments i + image_count
  folder = "memory"

  def __init__(self, lengths, pooled=False, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    items = int(lengths.sum())
    self.reads = []
    self.pooled = pooled
    self.manifest = {
      "moments": {"shape": [2, 2, 4]},
      "prompts": {"prompt_embeds": [3, 5], "pooled": [6] if pooled else None},
    }
    self.lists = RankedLists(
      prompt=np.arange(1, len(lengths) + 1, dtype=np.int32),
      list_id=rng.integers(0, 2**32, len(lengths), np.uint32),
      weight=rng.random(len(lengths), np.float32) + 0.5,
      offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      image=rng.permutation(items).astype(np.int32),
      rank=np.concatenate([rng.permutation(n) for n in lengths]).astype(np.int32),
      score=rng.random(items, np.float32),
      prompts=["", *(f"p{i}" for i in range(len(lengths)))],
      image_uids=[f"i{i}" for i in range(items)],
    )
    self.image_count = items
    self.parts = (draws.Part("", len(lengths)),)

  def moments(self, indices):
    self.reads.append(np.asarray(indices))
    values = np.asarray(indices, np.float32)[:, None, None, None]
    return np.broadcast_to(values, (len(indices), 2, 2, 4)).copy()

  def source_latents(self, indices):
    return self.moments(indices)[..., :2]

  def conditioning(self, prompts, images, *, time_ids):
    states = np.broadcast_to(np.float32(prompts)[:, None, None], (len(prompts), 3, 5))
    if not self.pooled:
      return Conditioning(states)
    pooled = np.broadcast_to(np.float32(prompts)[:, None], (len(prompts), 6))
    return Conditioning(states, pooled, np.zeros((len(images), 6), np.float32))


def _batches(cache, slots=16, **options):
  defaults = {"images_per_update": slots, "seed": 0, "prefetch": 0}
  return pipeline.Batches(cache, **{**defaults, **options})


def _take(batches, count):
  return [next(batches) for _ in range(count)]


def _equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


MIXED = np.random.default_rng(1).integers(2, 9, 150)


def _seen(batches, cache):
  """(list index, epoch) of every list of every batch, in order, checked on the way."""
  index_of = {int(key): i for i, key in enumerate(cache.lists.list_id)}
  seen = []
  for batch in batches:
    used = np.zeros(len(batch.item), bool)
    for row in np.flatnonzero(batch.ranking.valid[:, 0]):
      valid = batch.ranking.valid[row]
      length = int(valid.sum())
      assert valid[:length].all()
      slot = batch.slot[row, :length]
      assert not used[slot].any()
      used[slot] = True
      (identity,) = np.unique(batch.identity[slot], axis=0)
      index, epoch = index_of[int(identity[0])], int(identity[1])
      items = slice(cache.lists.offsets[index], cache.lists.offsets[index + 1])
      assert length == items.stop - items.start
      np.testing.assert_array_equal(
        batch.moments[slot, 0, 0, 0], cache.lists.image[items]
      )
      np.testing.assert_array_equal(
        batch.ranking.rank[row, :length], cache.lists.rank[items]
      )
      np.testing.assert_array_equal(
        batch.ranking.score[row, :length], cache.lists.score[items]
      )
      np.testing.assert_array_equal(batch.item[slot], np.arange(length))
      assert batch.ranking.weight[row] == cache.lists.weight[index]
      assert (batch.conditioning.prompt_embeds[slot] == cache.lists.prompt[index]).all()
      seen.append((index, epoch))
    rows = batch.ranking.valid[:, 0]
    assert (batch.ranking.weight[~rows] == 0).all()
    assert (batch.slot[~batch.ranking.valid] == 0).all()
  return seen


def test_every_list_once_per_epoch_with_all_its_parts():
  cache = MemoryCache(MIXED)
  batches = _batches(cache, 32)
  updates = int(3.5 * MIXED.sum() / 32)
  seen = _seen(_take(batches, updates), cache)
  counts = collections.Counter(seen)
  assert max(counts.values()) == 1
  for epoch in (0, 1):  # three and a half epochs are through: the first two are whole
    assert {i for i, e in seen if e == epoch} == set(range(len(MIXED)))
  orders = [[i for i, e in seen if e == epoch] for epoch in (0, 1)]
  assert orders[0] != orders[1]  # every epoch has its own order
  assert batches.epochs_seen == pytest.approx(len(seen) / len(MIXED))
  assert batches.lists_per_epoch == 150


def test_shapes_are_those_of_batch_spec():
  for pooled in (False, True):
    batches = _batches(MemoryCache(MIXED, pooled=pooled), 32)
    spec = batches.batch_spec
    assert isinstance(spec, Batch)
    assert spec.slot.shape == (16, 8)  # at most 16 lists of two, at most 8 items
    assert spec.identity.dtype == np.uint32 and spec.moments.shape == (32, 2, 2, 4)
    for batch in _take(batches, 3):
      same = jax.tree.map(
        lambda s, x: (s.shape, s.dtype) == (x.shape, x.dtype), spec, batch
      )
      assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_hold_the_slices_of_one_batch(count):
  cache = MemoryCache(MIXED, pooled=True)
  whole = _take(_batches(cache, 32, caption_dropout=0.3), 8)
  parts = [
    _take(
      _batches(cache, 32, caption_dropout=0.3, process_index=i, process_count=count), 8
    )
    for i in range(count)
  ]
  for k, batch in enumerate(whole):
    shares = [part[k] for part in parts]
    for share in shares:  # the plan is known to all
      _equal(share.slot, batch.slot)
      _equal(share.ranking, batch.ranking)

    def joined(get, shares=shares):
      return jax.tree.map(lambda *x: np.concatenate(x), *[get(s) for s in shares])

    for get in (
      lambda b: b.moments,
      lambda b: b.conditioning,
      lambda b: b.identity,
      lambda b: b.item,
    ):
      _equal(joined(get), get(batch))


def test_a_process_reads_only_its_own_records():
  cache = MemoryCache(MIXED)
  batch = next(_batches(cache, 32, process_index=1, process_count=4))
  assert len(batch.moments) == 8
  assert sum(len(indices) for indices in cache.reads) <= 8


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resume_from_anywhere(prefetch):
  cache = MemoryCache(MIXED)
  first = _batches(cache, 32, prefetch=prefetch, caption_dropout=0.2)
  states, expected = [], []
  for _ in range(25):
    states.append(json.loads(json.dumps(first.get_state())))
    expected.append(next(first))
  first.close()
  for k in (0, 1, 7, 24):
    again = _batches(cache, 32, prefetch=prefetch, caption_dropout=0.2)
    next(again), next(again)  # whatever it did before does not matter
    again.set_state(states[k])
    assert again.get_state() == states[k]
    for batch in expected[k : k + 3]:
      _equal(next(again), batch)
    again.close()


def test_state_is_small_and_the_same_for_all_processes():
  cache = MemoryCache(np.random.default_rng(0).integers(2, 9, 3000))
  a = _batches(cache, 64)
  b = _batches(cache, 64, process_index=1, process_count=2)
  _take(a, 40), _take(b, 40)
  assert a.get_state() == b.get_state()
  assert len(json.dumps(a.get_state())) < 4096
  # ... so that a run of two processes goes on as one.
  a.set_state(b.get_state())
  _equal(next(a).item[32:], next(b).item)


def test_state_of_other_data_is_refused():
  cache = MemoryCache(MIXED)
  state = _batches(cache).get_state()
  with pytest.raises(UserError, match="seed was 0, is 1"):
    _batches(cache, seed=1).set_state(state)
  with pytest.raises(UserError, match="lists was"):
    _batches(MemoryCache(MIXED, seed=5)).set_state(state)


def test_order_depends_on_the_seed_only():
  cache = MemoryCache(MIXED)
  a, b, c = (_seen(_take(_batches(cache, 32, seed=s), 10), cache) for s in (0, 0, 1))
  assert a == b and a != c
  _batches(cache, seed=2**40 + 3), _batches(cache, seed=-1)  # any integer will do


def test_utilisation_of_mixed_lengths():
  """Lists of 2 to 8 fill 64 slots: the house says that no slot runs empty."""
  cache = MemoryCache(np.random.default_rng(2).integers(2, 9, 1000))
  batches = _batches(cache, 64)
  assert batches.utilisation == 1.0
  taken = _take(batches, 200)
  filled = sum(int(batch.ranking.valid.sum()) for batch in taken)
  assert batches.utilisation == filled / (200 * 64)
  assert batches.utilisation >= 0.9999


def test_skewed_lengths_still_fill_the_slots():
  """Mostly pairs with a few long lists, as Pick-a-Pic is."""
  rng = np.random.default_rng(3)
  lengths = rng.choice([2, 3, 4, 5, 8], 2000, p=[0.7, 0.15, 0.1, 0.04, 0.01])
  batches = _batches(MemoryCache(lengths), 64)
  _take(batches, 150)
  assert batches.utilisation == 1.0


def test_empty_slots_are_counted_and_unreferenced():
  """Lists of three cannot fill 64 slots: one stays empty, and that is said."""
  cache = MemoryCache([3] * 50)
  batches = _batches(cache, 64)
  taken = _take(batches, 5)
  _seen(taken, cache)
  for batch in taken:
    assert batch.slot[batch.ranking.valid].tolist() == list(range(63))
    for column in (batch.moments, batch.identity, batch.item):
      np.testing.assert_array_equal(column[63], column[0])
    np.testing.assert_array_equal(
      batch.conditioning.prompt_embeds[63], batch.conditioning.prompt_embeds[0]
    )
  assert batches.utilisation == 63 / 64


def test_lists_that_do_not_fit_wait_and_are_not_lost():
  packer = packing.Packer([5, 4, 3], slots=8)
  order = [0, 1, 2, 0, 1, 2, 0, 1, 2]  # lengths 5 4 3 5 4 3 5 4 3
  lengths = [5, 4, 3]

  def length_at(position):
    return lengths[order[position]]

  plan, after = packer.plan(packing.Progress(), length_at)
  assert plan == packing.Plan((0, 2), 8)  # the 4 waits, the 3 fills the hole
  assert after == packing.Progress(3, (1,), updates=1, filled=8)
  plan, after = packer.plan(after, length_at)
  assert plan == packing.Plan((1, 4), 8)  # the oldest first, then a 4; the 5 waits
  assert after == packing.Progress(5, (3,), updates=2, filled=16)
  plan, after = packer.plan(after, length_at)
  assert plan == packing.Plan((3, 5), 8)
  assert after == packing.Progress(6, (), updates=3, filled=24)


def test_look_ahead_is_bounded():
  """A hole that only distant lists could fill stays; the queue does not grow."""
  lengths = [5] * 100 + [3] * 100
  packer = packing.Packer(lengths, slots=8, look_ahead=10)
  plan, after = packer.plan(packing.Progress(), lengths.__getitem__)
  assert plan == packing.Plan((0,), 5)
  assert after.position <= 11 and after.pending == tuple(range(1, after.position))
  progress = packing.Progress()
  for _ in range(60):
    plan, progress = packer.plan(progress, lambda p: lengths[p % 200])
    assert len(progress.pending) <= 10
  # One list of five per update; whatever else was looked at is waiting, in order.
  assert progress == packing.Progress(70, tuple(range(60, 70)), 60, 300)


def test_look_ahead_stays_within_an_epoch():
  """With few lists, none is drawn many epochs ahead of the others."""
  cache = MemoryCache([5, 5, 5, 2])
  seen = _seen(_take(_batches(cache, 16), 50), cache)
  reached = dict.fromkeys(range(4), -1)
  for index, epoch in seen:
    assert epoch == reached[index] + 1
    reached[index] = epoch
    assert max(reached.values()) - min(reached.values()) <= 2


def test_caption_dropout_is_by_list_and_epoch():
  cache = MemoryCache(np.full(400, 4))
  taken = _take(_batches(cache, 64, caption_dropout=0.25), 100)  # 1600 draws
  dropped = {}
  for batch in taken:
    states = batch.conditioning.prompt_embeds[:, 0, 0]
    for row in np.flatnonzero(batch.ranking.valid[:, 0]):
      slot = batch.slot[row, :4]
      assert len(set(states[slot])) == 1  # all items of a list or none
      key = tuple(int(v) for v in batch.identity[slot[0]])
      dropped[key] = bool(states[slot[0]] == cache.null_prompts[0])
  rate = np.mean(list(dropped.values()))
  assert abs(rate - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1600)
  # The decision hangs on (seed, list, epoch): another packing changes nothing, ...
  for batch in _take(_batches(cache, 32, caption_dropout=0.25), 50):
    states = batch.conditioning.prompt_embeds[:, 0, 0]
    for key, state in zip(batch.identity.tolist(), states):
      assert (state == cache.null_prompts[0]) == dropped[tuple(key)]
  # ... another epoch does, and so does another seed.
  ids = [int(key) for key in cache.lists.list_id]
  assert any(dropped[i, 0] != dropped[i, 1] for i in ids)
  other = _take(_batches(cache, 64, caption_dropout=0.25, seed=1), 20)
  assert any(
    (state == cache.null_prompts[0]) != dropped[tuple(key)]
    for batch in other
    for key, state in zip(
      batch.identity.tolist(), batch.conditioning.prompt_embeds[:, 0, 0]
    )
  )


@pytest.mark.parametrize(("rate", "all_null"), [(0.0, False), (1.0, True)])
def test_caption_dropout_at_its_ends(rate, all_null):
  batch = next(_batches(MemoryCache(MIXED), caption_dropout=rate))
  assert (batch.conditioning.prompt_embeds == 0).all() == all_null
  assert (batch.conditioning.prompt_embeds == 0).any() == all_null


def test_prefetch_gives_the_same_batches_and_ends():
  cache = MemoryCache(MIXED)
  plain = _take(_batches(cache, 32), 6)
  threads = threading.active_count()
  ahead = _batches(cache, 32, prefetch=2)
  for batch in plain:
    _equal(next(ahead), batch)
  assert threading.active_count() > threads
  ahead.close()
  assert threading.active_count() == threads
  assert ahead.utilisation > 0.9 and ahead.epochs_seen > 0  # for the report at the end


def test_forgotten_close_does_not_spoil_the_exit():
  """The exit code is a promise, and a reading thread at shutdown would abort."""
  code = textwrap.dedent("""
    import importlib.util, sys, time
    spec = importlib.util.spec_from_file_location("this", sys.argv[1])
    this = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(this)
    batches = this._batches(this.MemoryCache([2] * 50), prefetch=2)
    next(batches)
    sys.exit(3)
  """)
  run = [sys.executable, "-c", code, __file__]
  done = subprocess.run(run, capture_output=True, text=True, check=False)
  assert done.returncode == 3
  assert done.stderr == ""


def test_errors_of_the_thread_reach_the_caller():
  cache = MemoryCache(MIXED)

  def broken(indices):
    raise OSError("the disk is gone")

  cache.moments = broken
  batches = _batches(cache, prefetch=2)
  with pytest.raises(OSError, match="the disk is gone"):
    next(batches)


def test_lists_of_one_image():
  cache = MemoryCache([1] * 10)
  batches = _batches(cache, 8)
  assert batches.batch_spec.slot.shape == (8, 1)
  _seen(_take(batches, 5), cache)
  assert batches.utilisation == 1.0


def test_one_list_alone():
  cache = MemoryCache([4])
  batches = _batches(cache, 8)
  assert _seen(_take(batches, 2), cache) == [(0, 0), (0, 1), (0, 2), (0, 3)]
  assert batches.epochs_seen == 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"slots": 7}, "longest list has 8 images but train.images_per_update=7"),
    (
      {"slots": 9, "process_count": 2},
      "positive multiple of the number of processes, 2",
    ),
    ({"slots": 0}, "positive multiple"),
    ({"caption_dropout": 1.5}, "between 0 and 1"),
  ],
)
def test_refusals(options, message):
  with pytest.raises(UserError, match=message):
    _batches(MemoryCache(MIXED), **options)


def test_no_lists():
  empty = types.SimpleNamespace(
    lists=MemoryCache([2]).lists, folder="here", manifest={}
  )
  none = np.zeros(0, np.int64)
  empty.lists = dataclasses.replace(
    empty.lists, offsets=np.zeros(1, np.int64), image=none
  )
  with pytest.raises(UserError, match="here has no lists"):
    _batches(empty)


def _views(cache, batches):
  """(list key, epoch, item) -> whether the image came mirrored."""
  seen = {}
  for batch in batches:
    for slot in batch.slot[batch.ranking.valid]:
      key = (*batch.identity[slot].tolist(), int(batch.item[slot]))
      seen[key] = bool(batch.moments[slot, 0, 0, 0] >= cache.image_count)
  return seen


def _by_list(views):
  lists = collections.defaultdict(set)
  for (list_id, epoch, _), mirrored in views.items():
    lists[list_id, epoch].add(mirrored)
  return lists


def test_flip_of_a_list_is_one_coin():
  cache = MemoryCache([4] * 400)
  views = _views(cache, _take(_batches(cache, 64, flip="list"), 75))
  lists = _by_list(views)
  assert all(len(both) == 1 for both in lists.values())  # all images of a list or none
  rate = np.mean([both == {True} for both in lists.values()])
  assert abs(rate - 0.5) < 4 * np.sqrt(0.25 / 1200)
  # By identity: another packing, another share of the slots, the same coins.
  other = _views(cache, _take(_batches(cache, 32, flip="list"), 100))
  assert all(views[key] == mirrored for key, mirrored in other.items() if key in views)
  # Another epoch and another seed are other coins; so is the caption's.
  ids = cache.lists.list_id.tolist()
  assert any(lists[i, 0] != lists[i, 1] for i in ids)
  again = _by_list(_views(cache, _take(_batches(cache, 64, flip="list", seed=1), 20)))
  assert any(again[key] != lists[key] for key in again if key in lists)
  batch = next(_batches(cache, 64, flip="list", caption_dropout=0.5))
  dropped = batch.conditioning.prompt_embeds[:, 0, 0] == cache.null_prompts[0]
  assert (dropped != (batch.moments[:, 0, 0, 0] >= cache.image_count)).any()


def test_independent_flips_differ_within_a_list():
  cache = MemoryCache([4] * 100)
  views = _views(cache, _take(_batches(cache, 64, flip="independent"), 25))
  lists = _by_list(views)
  mixed = np.mean([len(both) == 2 for both in lists.values()])
  assert abs(mixed - 7 / 8) < 0.15  # 1 - 2 / 2^4
  assert abs(np.mean(list(views.values())) - 0.5) < 4 * np.sqrt(0.25 / 1600)


def test_flip_off_and_unknown_flips():
  cache = MemoryCache([4] * 20)
  assert not any(_views(cache, _take(_batches(cache, 16), 5)).values())
  with pytest.raises(
    UserError, match=r"unknown data\.flip 'lists'; did you mean 'list'"
  ):
    _batches(cache, flip="lists")
  cache.has_mirrored = False
  with pytest.raises(UserError, match="'list', but memory has no mirrored images"):
    _batches(cache, flip="list")


def test_utilisation_on_the_papers_lengths():
  """Diffusion-LPO says: 95 % of the lists have at most 8 images, and 56 % of the pairs
  are in lists of more than two. With a geometric tail from three images on, these two
  numbers leave one distribution: 84 % are pairs, and the tail falls by 0.824 an image.
  """
  rng = np.random.default_rng(0)
  longer = 3 + rng.geometric(1 - 0.824, 60_000) - 1
  lengths = np.where(rng.random(60_000) < 0.84, 2, longer)
  pairs = lengths - 1  # a path of n images is n - 1 of them
  assert np.mean(lengths <= 8) == pytest.approx(0.95, abs=0.005)
  assert pairs[lengths > 2].sum() / pairs.sum() == pytest.approx(0.56, abs=0.01)
  lengths = np.minimum(lengths, 8).tolist()
  packer, progress = packing.Packer(lengths, 256), packing.Progress()
  updates = sum(lengths) // 256 // 2
  for _ in range(updates):
    _, progress = packer.plan(progress, lengths.__getitem__)
  assert progress.filled / (256 * updates) >= 0.98  # it is 1.0
  assert len(progress.pending) <= packing.LOOK_AHEAD


def edits(lengths, **options):
  """A cache of edits: list b edits the image 1000 + b, prompt b + 1 says how."""
  cache = MemoryCache(lengths, **options)
  source = np.arange(1000, 1000 + len(lengths), dtype=np.int32)
  cache.lists = dataclasses.replace(cache.lists, source_image=source)
  return cache


def test_edits_show_their_source_in_every_slot():
  cache = edits([2, 3, 2, 4])
  batch = next(_batches(cache, slots=11))
  index_of = {int(key): i for i, key in enumerate(cache.lists.list_id)}
  wanted = [1000 + index_of[int(key)] for key, _ in batch.identity]
  shown = batch.conditioning.source_latents
  assert shown.shape == (11, 2, 2, 2) and shown.dtype == np.float32
  np.testing.assert_array_equal(shown[:, 0, 0, 0], wanted)
  # A mirrored image is edited from the mirrored source.
  batch = next(_batches(cache, slots=11, flip="independent"))
  mirrored = batch.moments[:, 0, 0, 0] >= cache.image_count
  assert 0 < mirrored.sum() < 11
  np.testing.assert_array_equal(
    batch.conditioning.source_latents[:, 0, 0, 0],
    np.where(mirrored, cache.image_count, 0)
    + [1000 + index_of[int(key)] for key, _ in batch.identity],
  )


def test_text_source_and_both_are_withheld_by_one_coin_of_the_list():
  cache = edits([2] * 400)
  chances = {"caption_dropout": 0.1, "source_dropout": 0.2, "both_dropout": 0.3}
  batch = next(_batches(cache, slots=800, **chances))
  text = batch.conditioning.prompt_embeds[:, 0, 0] == 0
  source = (batch.conditioning.source_latents == 0).all((1, 2, 3))
  for row in batch.slot:  # lists are withheld whole
    assert len({(text[i], source[i]) for i in row}) == 1
  shares = [np.mean(text & ~source), np.mean(source & ~text), np.mean(text & source)]
  np.testing.assert_allclose(shares, [0.1, 0.2, 0.3], atol=0.06)  # 2.6 sigma of 400
  # The coin for the text is the one that lists without a source have.
  plain = MemoryCache([2] * 400)
  alone = next(_batches(plain, slots=800, caption_dropout=0.1))
  dropped = alone.conditioning.prompt_embeds[:, 0, 0] == 0
  np.testing.assert_array_equal(dropped, text & ~source)
  with pytest.raises(UserError, match="are no edits"):
    _batches(plain, source_dropout=0.1)
  with pytest.raises(UserError, match="at most 1 together"):
    _batches(cache, caption_dropout=0.8, both_dropout=0.3)


def test_noise_repeats_after_so_many_epochs_and_errors_are_read_with_it():
  cache = MemoryCache([2, 3])
  store = references.References.empty(cache.lists)
  store.errors = np.arange(10, dtype=np.float32).reshape(2, 5)
  batches = _batches(cache, slots=5, draws=2, references=store)
  index_of = {int(key): i for i, key in enumerate(cache.lists.list_id)}
  for update, batch in enumerate(_take(batches, 5)):
    assert set(batch.identity[:, 1]) == {update % 2}
    first = [cache.lists.offsets[index_of[int(key)]] for key, _ in batch.identity]
    np.testing.assert_array_equal(
      batch.ref_err, 5 * (update % 2) + np.array(first) + batch.item
    )
  with pytest.raises(UserError, match=r"lacks errors of epoch 2"):
    _take(_batches(cache, slots=5, references=store), 3)


def test_the_source_of_an_edit_is_part_of_what_a_run_learns_from():
  cache = edits([2, 3, 2, 4])
  batches = _batches(cache, slots=11)
  found, state = fingerprints.of_lists(cache.lists), batches.get_state()
  other = edits([2, 3, 2, 4])
  changed = other.lists.source_image.copy()
  changed[1] += 1
  other.lists = dataclasses.replace(other.lists, source_image=changed)
  theirs = fingerprints.of_lists(other.lists)
  assert theirs["lists"] != found["lists"] and theirs["images"] == found["images"]
  with pytest.raises(UserError, match="lists"):
    _batches(other, slots=11).set_state(state)
  plain = MemoryCache([2, 3, 2, 4])
  assert fingerprints.of_lists(plain.lists)["lists"] != found["lists"]
