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
from lpo_jax.data.held_out import parts_of
from lpo_jax.data.packing import Packer, Plan, Progress
from lpo_jax.data.references import References
from lpo_jax.data.user_embeds import ListUsers
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Batch, Conditioning, Ranking

# data.flip -> what one coin decides for: (list key, epoch, item) -> name of the coin.
FLIPS: dict[str, Callable[[int, int, int], str] | None] = {
  "off": None,
  "list": lambda list_id, epoch, item: f"{list_id}/{epoch}",
  "independent": lambda list_id, epoch, item: f"{list_id}/{epoch}/{item}",
}


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
    source_dropout: float = 0.0,
    both_dropout: float = 0.0,
    flip: str = "off",
    time_ids: str = "resolution",
    draws: int = 0,
    references: References | None = None,
    users: ListUsers | None = None,
    user_dropout: float = 0.0,
    only: np.ndarray | None = None,
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
      source_dropout: probability that the image to edit is withheld, and not the prompt.
      both_dropout: probability that both are.
      flip: "off"; "list" mirrors all images of a list or none, with probability 1/2;
        "independent" decides image by image.
      time_ids: what SDXL is told about sizes; see `Cache.conditioning`.
      draws: after so many epochs a list meets the same noise, timestep and views again;
        0: never.
      references: where the reference's errors are read; None if the step computes them.
      users: whose the lists are; None where users are not told apart.
      user_dropout: probability that a list is trained as nobody's.
      only: indices of the lists that are drawn from, ascending; None: all.
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
    if draws < 0:
      raise UserError(
        f"data.draws={draws}: expected epochs, or 0 for new noise in each."
      )
    chances = (caption_dropout, source_dropout, both_dropout)
    if min(chances) < 0 or sum(chances) > 1:
      raise UserError(
        f"data.caption_dropout={caption_dropout}, data.source_dropout={source_dropout}, "
        f"data.both_dropout={both_dropout}: expected probabilities between 0 and 1, at most "
        "1 together."
      )
    if max(chances[1:]) > 0 and cache.lists.source_image is None:
      raise UserError(
        f"data.source_dropout={source_dropout}, data.both_dropout={both_dropout}, but "
        f"the lists in {cache.folder} are no edits: expected 0."
      )
    if not 0 <= user_dropout <= 1 or (user_dropout and users is None):
      raise UserError(
        f"data.user_dropout={user_dropout}: expected a probability between 0 and 1, and 0 "
        "without data.user_embeds."
      )
    if flip not in FLIPS:
      raise unknown_name("data.flip", flip, FLIPS)
    if FLIPS[flip] and not cache.has_mirrored:
      raise UserError(f"data.flip={flip!r}, but {cache.folder} has no mirrored images.")
    self._updates = _Updates(
      cache,
      slots=images_per_update,
      seed=seed,
      dropout=chances,
      coin=FLIPS[flip],
      time_ids=time_ids,
      draws=draws,
      references=references,
      users=users,
      user_dropout=user_dropout,
      only=only,
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

  def __init__(
    self,
    cache,
    *,
    slots,
    seed,
    dropout,
    coin,
    time_ids,
    draws,
    references,
    users,
    user_dropout,
    only,
    share,
  ):
    lists = cache.lists
    self._repeat, self._references = draws, references
    self._cache, self._lists, self._seed = cache, lists, int(seed)
    self._users, self._user_dropout = users, user_dropout
    self._coin = coin
    caption, source, both = dropout
    # Intervals of one coin, so that no list loses its prompt and its source by accident.
    self._no_caption = (0.0, caption), (caption + source, caption + source + both)
    self._no_source = (caption, caption + source), self._no_caption[1]
    self._time_ids = time_ids
    lengths = np.diff(lists.offsets)
    self._only = np.arange(len(lengths)) if only is None else np.asarray(only)
    self._lengths = lengths[self._only]
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
    self.parts = cache.parts if only is None else parts_of(cache.parts, self._only)
    self.draws = Draws(self.parts, self._seed)
    self._packer = Packer(self._lengths, slots)
    self._progress = Progress()
    self._digest = _lists_digest(lists, cache.parts, only)
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
    source = np.zeros(slots, np.int64)
    shown = np.zeros(slots, bool)
    identity = np.zeros((slots, 2), np.uint32)
    item = np.zeros(slots, np.uint32)
    user = np.zeros(slots, np.int64)
    ref_err = np.zeros(slots, np.float32)
    slot = np.zeros((self._rows, self._longest), np.int32)
    rank = np.zeros((self._rows, self._longest), np.int32)
    score = np.zeros((self._rows, self._longest), np.float32)
    valid = np.zeros((self._rows, self._longest), bool)
    weight = np.zeros(self._rows, np.float32)
    start = 0
    for row, position in enumerate(plan.positions):
      draw = self.draws.at(position)
      index, epoch = int(self._only[draw.index]), draw.epoch
      epoch = epoch % self._repeat if self._repeat else epoch
      items = slice(int(lists.offsets[index]), int(lists.offsets[index + 1]))
      length = items.stop - items.start
      here = slice(start, start + length)
      list_id = int(lists.list_id[index])
      mirrored = self._mirrored(list_id, epoch, length)
      image[here] = lists.image[items] + mirrored
      prompt[here] = lists.prompt[index]
      coin = self._coin_of(f"caption_dropout/{list_id}/{epoch}")
      if _in_any(coin, self._no_caption):
        prompt[here] = self._cache.null_prompts[draw.part]
      if lists.source_image is not None:
        source[here] = int(lists.source_image[index]) + mirrored
        shown[here] = not _in_any(coin, self._no_source)
      # A coin of its own: who it is for says nothing of what is asked for.
      name = f"user_dropout/{list_id}/{epoch}"
      if self._users is not None and not self._happens(self._user_dropout, name):
        user[here] = self._users.row[index]
      identity[here] = list_id, epoch
      if self._references is not None:
        ref_err[here] = self._references.of(epoch, items)
      item[here] = slot[row, :length] = np.arange(length)
      slot[row, :length] += start
      rank[row, :length] = lists.rank[items]
      score[row, :length] = lists.score[items]
      valid[row, :length] = True
      weight[row] = lists.weight[index]
      start += length
    for column in (image, prompt, source, shown, user, identity, item):
      column[start:] = column[0]  # an empty slot costs no read and holds sane numbers
    image, prompt = image[self._share], prompt[self._share]
    distinct, which = np.unique(image, return_inverse=True)
    conditioning = self._cache.conditioning(prompt, image, time_ids=self._time_ids)
    if lists.source_image is not None:
      latents = self._sources(source[self._share], shown[self._share])
      conditioning = dataclasses.replace(conditioning, source_latents=latents)
    if self._users is not None:
      embeds = self._users.table[user[self._share]]
      conditioning = dataclasses.replace(conditioning, user_embeds=embeds)
    return Batch(
      moments=self._cache.moments(distinct)[which],
      conditioning=conditioning,
      identity=identity[self._share],
      item=item[self._share],
      slot=slot,
      ranking=Ranking(rank=rank, valid=valid, score=score, weight=weight),
      ref_err=None if self._references is None else ref_err[self._share],
    )

  def _sources(self, images: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """[n, h, w, c] the images to edit; 0 where they are not shown."""
    distinct, which = np.unique(images, return_inverse=True)
    latents = self._cache.source_latents(distinct)[which]
    return np.where(shown[:, None, None, None], latents, np.float32(0))

  def _mirrored(self, list_id: int, epoch: int, length: int) -> np.ndarray:
    """[length] what to add to an image's index to get the view that is shown."""
    add = np.zeros(length, np.int64)
    if self._coin:
      names = [f"flip/{self._coin(list_id, epoch, item)}" for item in range(length)]
      shown = [self._happens(0.5, name) for name in names]
      add[shown] = self._cache.image_count
    return add

  def _happens(self, probability: float, name: str) -> bool:
    return self._coin_of(name) < probability * 2**64

  def _coin_of(self, name: str) -> int:
    """A 64-bit number by identity, so that neither packing nor a resume changes it."""
    text = f"{self._seed}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")

  def _spec(self) -> Batch:
    manifest, slots = self._cache.manifest, self._slots
    rows = (self._rows, self._longest)
    text, shape = manifest["prompts"], manifest["moments"]["shape"]

    def spec(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape, dtype)

    pooled, edits = text["pooled"], self._lists.source_image is not None
    users = self._users
    return Batch(
      moments=spec(slots, *shape),
      conditioning=Conditioning(
        prompt_embeds=spec(slots, *text["prompt_embeds"]),
        pooled_prompt_embeds=spec(slots, *pooled) if pooled else None,
        time_ids=spec(slots, 6) if pooled else None,
        source_latents=spec(slots, *shape[:-1], shape[-1] // 2) if edits else None,
        user_embeds=spec(slots, *users.table.shape[1:]) if users is not None else None,
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
      ref_err=None if self._references is None else spec(slots),
    )


def _in_any(coin: int, intervals: Sequence[tuple[float, float]]) -> bool:
  """Whether a coin falls into one of some intervals of [0, 1)."""
  return any(low * 2**64 <= coin < high * 2**64 for low, high in intervals)


def _lists_digest(lists: Any, parts: Sequence[Part], only: np.ndarray | None) -> str:
  """Short hash of the lists: the order is a function of them and of the seed."""
  digest = hashlib.sha256()
  source = [] if lists.source_image is None else [lists.source_image]
  for column in (lists.list_id, lists.offsets, lists.image, lists.rank, *source):
    digest.update(np.ascontiguousarray(column).tobytes())
  if len(parts) > 1:
    digest.update(repr(parts).encode())
  if only is not None:
    digest.update(np.asarray(only, np.int64).tobytes())
  return digest.hexdigest()[:16]
