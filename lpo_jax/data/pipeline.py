"""Batch after batch, forever: lists in a seeded order, packed into the slots.

Which lists an update holds, and in which slots, follows from the seed and the lists
alone: every process computes the same plan and reads only the records of its own slots.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lpo_jax.data.cache import Cache
from lpo_jax.data.draws import Draws, Part
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Batch, Conditioning, Ranking

LOOK_AHEAD = 256  # how far behind the oldest unused list a filler may be found
# data.flip -> what one coin decides for: (list key, epoch, item) -> name of the coin.
FLIPS: dict[str, Callable[[int, int, int], str] | None] = {
  "off": None,
  "list": lambda list_id, epoch, item: f"{list_id}/{epoch}",
  "independent": lambda list_id, epoch, item: f"{list_id}/{epoch}/{item}",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which lists an update holds; they lie in the slots one after the other.

  Attributes:
    positions: places in the endless order of lists, in slot order.
    filled: number of slots that hold an item; the rest is empty.
  """

  positions: tuple[int, ...]
  filled: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """Where in the endless order of lists the next update begins.

  Attributes:
    position: the first place nobody looked at.
    pending: earlier places whose lists are not used yet, oldest first.
    updates: number of updates before this one.
    filled: number of slots they filled.
  """

  position: int = 0
  pending: tuple[int, ...] = ()
  updates: int = 0
  filled: int = 0


class Packer:
  """Fills a fixed number of slots with whole lists, as full as their lengths allow."""

  def __init__(
    self, lengths: Sequence[int], slots: int, *, look_ahead: int = LOOK_AHEAD
  ):
    """Prepares for lists of these lengths.

    Args:
      lengths: items per list.
      slots: S, at least the longest length.
      look_ahead: bound on how far the order is bent to fill a hole; never more than an
        epoch.
    """
    self._slots = slots
    self._look_ahead = min(look_ahead, len(lengths))
    # most[r]: the most of r slots that any number of lists of these lengths can fill.
    self._most = np.zeros(slots + 1, np.int64)
    distinct = sorted({int(n) for n in lengths})
    for room in range(1, slots + 1):
      fits = [n + self._most[room - n] for n in distinct if n <= room]
      self._most[room] = max(fits, default=0)

  def plan(
    self, progress: Progress, length_at: Callable[[int], int]
  ) -> tuple[Plan, Progress]:
    """Chooses the lists of one update.

    The oldest unused list goes first. One that is too long for the room left, or that
    would leave a hole which others could have avoided, waits at the head of the queue
    for the next update: nothing is lost or broken.

    Args:
      progress: where to begin.
      length_at: place in the order -> number of items of the list there.

    Returns:
      The plan, and where the next one begins.
    """
    most, room = self._most, self._slots
    pending, position = list(progress.pending), progress.position
    taken: list[int] = []
    while most[room]:
      exact = second = None
      at = 0
      while exact is None:
        if at == len(pending):
          oldest = pending[0] if pending else position
          if position - oldest >= self._look_ahead:
            break
          pending.append(position)
          position += 1
        length = length_at(pending[at])
        if length <= room:
          if length + most[room - length] == most[room]:
            exact = at
          elif second is None:
            second = at
        at += 1
      choice = second if exact is None else exact
      if choice is None:
        break
      room -= length_at(pending[choice])
      taken.append(pending.pop(choice))
    filled = self._slots - room
    following = Progress(
      position, tuple(pending), progress.updates + 1, progress.filled + filled
    )
    return Plan(tuple(taken), filled), following


class Batches:
  """Endless iterator of `Batch`es; prepares the next ones in a thread.

  Per-slot arrays hold this process's share of the slots; `slot` and `ranking` are the
  whole update's, the same on every process. Shapes never change: B is the most lists
  that fit, N the longest list of the cache.

  Attributes:
    batch_spec: the whole update's shapes and dtypes, as a `Batch` of
      `jax.ShapeDtypeStruct`.
    lists_per_epoch: number of lists in the cache.
  """

  def __init__(
    self,
    cache: Cache,
    *,
    images_per_update: int,
    seed: int,
    caption_dropout: float = 0.0,
    flip: str = "off",
    time_ids: str = "resolution",
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
  ):
    """Starts before the first update.

    Args:
      cache: an opened cache, or a mixture of several.
      images_per_update: S, the number of slots.
      seed: of the order and of caption dropout.
      caption_dropout: probability that a list is trained under the empty prompt.
      flip: "off"; "list" mirrors all images of a list or none, with probability 1/2;
        "independent" decides image by image.
      time_ids: what SDXL is told about sizes; see `Cache.conditioning`.
      process_index: this process.
      process_count: P; this process reads slots index * S/P and the S/P - 1 after it.
      prefetch: number of batches prepared ahead; 0 prepares in the caller's thread.

    Raises:
      UserError: S is not divisible by P or shorter than a list, or a value is out of
        range.
    """
    import grain

    if images_per_update < 1 or images_per_update % process_count:
      raise UserError(
        f"train.images_per_update={images_per_update} must be a positive multiple of "
        f"the number of processes, {process_count}."
      )
    if not 0 <= caption_dropout <= 1:
      raise UserError(f"caption_dropout={caption_dropout} must be between 0 and 1.")
    if flip not in FLIPS:
      raise unknown_name("data.flip", flip, FLIPS)
    if FLIPS[flip] and not cache.has_mirrored:
      raise UserError(f"data.flip={flip!r}, but {cache.folder} has no mirrored images.")
    self._updates = _Updates(
      cache,
      slots=images_per_update,
      seed=seed,
      caption_dropout=caption_dropout,
      coin=FLIPS[flip],
      time_ids=time_ids,
      share=(process_index, process_count),
    )
    # A thread that still reads when the interpreter goes down would abort the process:
    # whoever forgets `close` gets it at exit. The list lets go of the iterator then.
    self._iterator = [
      grain.experimental.ThreadPrefetchDatasetIterator(
        self._updates, prefetch_buffer_size=prefetch
      )
    ]
    self._ending = weakref.finalize(self, _close, self._iterator)
    self._state = self._updates.get_state()
    self.batch_spec = self._updates.batch_spec
    self.lists_per_epoch = self._updates.lists_per_epoch

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> Batch:
    (iterator,) = self._iterator
    batch = next(iterator)
    self._state = iterator.get_state()  # of the batches given, not of those prepared
    return batch

  def get_state(self) -> dict[str, Any]:
    """Returns what `set_state` needs to continue with the batch that comes next.

    Small and JSON-able; the same on every process and for any number of processes.
    """
    return copy.deepcopy(self._state)

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `get_state` was called; costs no reading.

    Raises:
      UserError: the state belongs to another seed or to other lists.
    """
    (iterator,) = self._iterator
    iterator.set_state(state)
    self._state = iterator.get_state()

  @property
  def epochs_seen(self) -> float:
    """How often a list was seen on average in the batches given so far."""
    state = self._state
    used = state["position"] - len(state["pending"])
    return used / self.lists_per_epoch

  @property
  def utilisation(self) -> float:
    """Share of the slots that held an item in the batches given so far; 1 at first."""
    state = self._state
    slots = state["updates"] * self.batch_spec.item.shape[0]
    return state["filled"] / slots if slots else 1.0

  @property
  def drawn(self) -> dict[str, dict[str, float]]:
    """Source -> lists drawn from it so far, their share, and the source's epochs."""
    state, parts = self._state, self._updates.parts
    counts = self._updates.draws.counts(state["position"], state["pending"])
    total = max(sum(counts), 1)
    return {
      part.name: {"lists": n, "share": n / total, "epochs": n / part.count}
      for part, n in zip(parts, counts, strict=True)
    }

  def close(self) -> None:
    """Ends the thread; no batch can be taken afterwards."""
    self._ending()


def _close(iterators: list) -> None:
  while iterators:
    iterators.pop().close()


class _Updates:
  """The same endless iterator without a thread; its state is the next update's."""

  def __init__(self, cache, *, slots, seed, caption_dropout, coin, time_ids, share):
    lists = cache.lists
    self._cache, self._lists, self._seed = cache, lists, int(seed)
    self._caption_dropout, self._coin = caption_dropout, coin
    self._time_ids = time_ids
    self._lengths = np.diff(lists.offsets)
    self.lists_per_epoch = len(self._lengths)
    if not self.lists_per_epoch:
      raise UserError(f"the cache {cache.folder} has no lists; run --job cache.")
    longest = int(self._lengths.max())
    if longest > slots:
      raise UserError(
        f"the longest list has {longest} images but train.images_per_update={slots}: a "
        "list is never split over updates. Raise train.images_per_update, or lower "
        "data.max_list_size and run --job cache again."
      )
    self._slots = slots
    self._rows = slots // int(self._lengths.min())
    self._longest = longest
    index, count = share
    self._share = slice(index * slots // count, (index + 1) * slots // count)
    self.parts, self.draws = cache.parts, Draws(cache.parts, self._seed)
    self._packer = Packer(self._lengths, slots)
    self._progress = Progress()
    self._digest = _lists_digest(lists, cache.parts)
    self.batch_spec = self._spec()

  def __next__(self) -> Batch:
    plan, following = self._packer.plan(self._progress, self._length_at)
    batch = self._assemble(plan)
    self._progress = following
    return batch

  def get_state(self) -> dict[str, Any]:
    state = dataclasses.asdict(self._progress)
    state["pending"] = list(self._progress.pending)
    return {**state, "seed": self._seed, "lists": self._digest}

  def set_state(self, state: dict[str, Any]) -> None:
    here = {"seed": self._seed, "lists": self._digest}
    unlike = [key for key in here if state.get(key) != here[key]]
    if unlike:
      raise UserError(
        "the saved place in the data does not fit this run: "
        + "; ".join(f"{k} was {state.get(k)!r}, is {here[k]!r}" for k in unlike)
        + ". Resume with the seed, lists and cache the run began with, or start in a "
        "new workdir."
      )
    fields = {f.name: state[f.name] for f in dataclasses.fields(Progress)}
    self._progress = Progress(**{**fields, "pending": tuple(state["pending"])})

  def _length_at(self, position: int) -> int:
    return int(self._lengths[self.draws.at(position).index])

  def _assemble(self, plan: Plan) -> Batch:
    lists, slots = self._lists, self._slots
    image = np.zeros(slots, np.int64)
    prompt = np.zeros(slots, np.int64)
    identity = np.zeros((slots, 2), np.uint32)
    item = np.zeros(slots, np.uint32)
    slot = np.zeros((self._rows, self._longest), np.int32)
    rank = np.zeros((self._rows, self._longest), np.int32)
    score = np.zeros((self._rows, self._longest), np.float32)
    valid = np.zeros((self._rows, self._longest), bool)
    weight = np.zeros(self._rows, np.float32)
    start = 0
    for row, position in enumerate(plan.positions):
      draw = self.draws.at(position)
      index, epoch = draw.index, draw.epoch
      items = slice(int(lists.offsets[index]), int(lists.offsets[index + 1]))
      length = items.stop - items.start
      here = slice(start, start + length)
      list_id = int(lists.list_id[index])
      image[here] = lists.image[items] + self._mirrored(list_id, epoch, length)
      prompt[here] = lists.prompt[index]
      if self._drops_caption(list_id, epoch):
        prompt[here] = self._cache.null_prompts[draw.part]
      identity[here] = list_id, epoch
      item[here] = slot[row, :length] = np.arange(length)
      slot[row, :length] += start
      rank[row, :length] = lists.rank[items]
      score[row, :length] = lists.score[items]
      valid[row, :length] = True
      weight[row] = lists.weight[index]
      start += length
    for column in (image, prompt, identity, item):
      column[start:] = column[0]  # an empty slot costs no read and holds sane numbers
    image, prompt = image[self._share], prompt[self._share]
    distinct, which = np.unique(image, return_inverse=True)
    return Batch(
      moments=self._cache.moments(distinct)[which],
      conditioning=self._cache.conditioning(prompt, image, time_ids=self._time_ids),
      identity=identity[self._share],
      item=item[self._share],
      slot=slot,
      ranking=Ranking(rank=rank, valid=valid, score=score, weight=weight),
    )

  def _drops_caption(self, list_id: int, epoch: int) -> bool:
    return self._happens(self._caption_dropout, f"caption_dropout/{list_id}/{epoch}")

  def _mirrored(self, list_id: int, epoch: int, length: int) -> np.ndarray:
    """[length] what to add to an image's index to get the view that is shown."""
    add = np.zeros(length, np.int64)
    if self._coin:
      names = [f"flip/{self._coin(list_id, epoch, item)}" for item in range(length)]
      shown = [self._happens(0.5, name) for name in names]
      add[shown] = self._cache.image_count
    return add

  def _happens(self, probability: float, name: str) -> bool:
    """Decides by identity, so that neither packing nor a resume changes it."""
    text = f"{self._seed}/{name}".encode()
    draw = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return draw < probability * 2**64

  def _spec(self) -> Batch:
    manifest, slots = self._cache.manifest, self._slots
    rows = (self._rows, self._longest)
    text, shape = manifest["prompts"], manifest["moments"]["shape"]

    def spec(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape, dtype)

    pooled = text["pooled"]
    return Batch(
      moments=spec(slots, *shape),
      conditioning=Conditioning(
        prompt_embeds=spec(slots, *text["prompt_embeds"]),
        pooled_prompt_embeds=spec(slots, *pooled) if pooled else None,
        time_ids=spec(slots, 6) if pooled else None,
      ),
      identity=spec(slots, 2, dtype=np.uint32),
      item=spec(slots, dtype=np.uint32),
      slot=spec(*rows, dtype=np.int32),
      ranking=Ranking(
        rank=spec(*rows, dtype=np.int32),
        valid=spec(*rows, dtype=bool),
        score=spec(*rows),
        weight=spec(self._rows),
      ),
    )


def _lists_digest(lists: Any, parts: Sequence[Part]) -> str:
  """Short hash of the lists: the order is a function of them and of the seed."""
  digest = hashlib.sha256()
  for column in (lists.list_id, lists.offsets, lists.image, lists.rank):
    digest.update(np.ascontiguousarray(column).tobytes())
  if len(parts) > 1:
    digest.update(repr(parts).encode())
  return digest.hexdigest()[:16]
