"""Several caches read as one: their lists one after the other, drawn in their shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from lpo_jax.data.cache import Cache
from lpo_jax.data.draws import Part
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError
from lpo_jax.types import Conditioning

# What must be equal for records of two caches to stand in one batch. That the same
# networks made them is checked when each is opened.
_COMMON = {
  "shape of the moments": lambda manifest: list(manifest["moments"]["shape"]),
  "shapes of the texts": lambda manifest: dict(manifest["prompts"]),
  "resolution": lambda manifest: manifest["preprocessing"]["resolution"],
}


class Mixture:
  """Reads like a `Cache`. Indices count through the caches, in the order of the names.

  Attributes:
    folder: the first cache's, for messages.
    manifest: the first cache's.
    lists: all lists; `image` and `prompt` are indices into the caches' joined records.
    image_count: I, of all caches. Index i + I is image i mirrored.
    has_mirrored: whether all caches have the images mirrored too.
    parts: the caches' names, numbers of lists, and shares.
    null_prompts: for each cache the index of the empty prompt.
  """

  def __init__(self, caches: Mapping[str, Cache], shares: Mapping[str, float]):
    """Joins caches.

    Args:
      caches: name -> cache.
      shares: name -> how many lists are drawn from it, in proportion to the others.

    Raises:
      UserError: a share that is no positive number, or caches that do not fit together.
    """
    names = sorted(caches)
    self._caches = [caches[name] for name in names]
    _refuse_unlike(names, self._caches)
    self.parts = tuple(
      Part(name, len(caches[name].lists), _fraction(name, shares[name]))
      for name in names
    )
    self.folder, self.manifest = self._caches[0].folder, self._caches[0].manifest
    images = [cache.image_count for cache in self._caches]
    prompts = [len(cache.lists.prompts) for cache in self._caches]
    self._image_starts = np.cumsum([0, *images])
    self._prompt_starts = np.cumsum([0, *prompts])
    self.image_count = int(self._image_starts[-1])
    self.has_mirrored = all(cache.has_mirrored for cache in self._caches)
    self.null_prompts = tuple(
      cache.null_prompts[0] + int(start)
      for cache, start in zip(self._caches, self._prompt_starts[:-1], strict=True)
    )
    self.lists = _joined(
      [cache.lists for cache in self._caches], self._image_starts, self._prompt_starts
    )

  def moments(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, h, w, 2c] fp32: mean and log-variance, unscaled."""
    owner, local = self._local_images(np.asarray(indices, np.int64))
    return self._gather(owner, lambda cache, rows: cache.moments(local[rows]))

  def source_latents(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, h, w, c] fp32: the mode of the posterior, unscaled."""
    return np.split(self.moments(indices), 2, axis=-1)[0]

  def conditioning(
    self, prompts: np.ndarray, images: np.ndarray, *, time_ids: str = "resolution"
  ) -> Conditioning:
    """What the UNet is told about images under prompts; see `Cache.conditioning`.

    Each prompt must be of the same cache as its image.
    """
    owner, local = self._local_images(np.asarray(images, np.int64))
    text = np.asarray(prompts, np.int64) - self._prompt_starts[owner]
    return self._gather(
      owner,
      lambda cache, rows: cache.conditioning(
        text[rows], local[rows], time_ids=time_ids
      ),
    )

  def close(self) -> None:
    """Closes all caches."""
    for cache in self._caches:
      cache.close()

  def _local_images(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] which cache each image is of, and its index there."""
    mirrored, plain = np.divmod(indices, self.image_count)
    owner = np.searchsorted(self._image_starts, plain, side="right") - 1
    counts = np.diff(self._image_starts)
    return owner, plain - self._image_starts[owner] + mirrored * counts[owner]

  def _gather(self, owner: np.ndarray, read: Callable[[Cache, np.ndarray], Any]) -> Any:
    """Reads from each cache what is its, and puts the rows back in order."""
    rows = [np.flatnonzero(owner == k) for k in range(len(self._caches))]
    read_from = [k for k, mine in enumerate(rows) if len(mine)]
    trees = [read(self._caches[k], rows[k]) for k in read_from]
    order = np.argsort(np.concatenate([rows[k] for k in read_from]), kind="stable")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *trees)


def _joined(
  lists: Sequence[RankedLists], image_starts: np.ndarray, prompt_starts: np.ndarray
) -> RankedLists:
  """The lists of all caches, one cache after the other."""
  items = np.cumsum([0, *(len(each.image) for each in lists)])

  def join(name: str, starts: np.ndarray | None = None) -> np.ndarray:
    columns = [getattr(each, name) for each in lists]
    if starts is not None:
      columns = [c + start for c, start in zip(columns, starts[: len(lists)])]
    return np.concatenate(columns)

  offsets = [each.offsets[1:] + start for each, start in zip(lists, items[:-1])]
  edits = lists[0].source_image is not None
  users, user = _joined_users(lists)
  return dataclasses.replace(
    lists[0],
    prompt=join("prompt", prompt_starts),
    list_id=join("list_id"),
    weight=join("weight"),
    offsets=np.concatenate([[0], *offsets]).astype(np.int64),
    image=join("image", image_starts),
    rank=join("rank"),
    score=join("score"),
    source_image=join("source_image", image_starts) if edits else None,
    users=users,
    user=user,
    prompts=[prompt for each in lists for prompt in each.prompts],
    image_uids=[uid for each in lists for uid in each.image_uids],
  )


def _joined_users(
  lists: Sequence[RankedLists],
) -> tuple[list[str], np.ndarray | None]:
  """Everybody's names, each once, and whose each list is."""
  if all(each.user is None for each in lists):
    return [], None
  users = sorted({name for each in lists for name in each.users})
  number = {name: i for i, name in enumerate(users)}
  columns = []
  for each in lists:
    place = np.array([number[name] for name in each.users] + [-1], np.int32)
    unknown = np.full(len(each), -1)
    columns.append(place[unknown if each.user is None else each.user])
  return users, np.concatenate(columns)


def _refuse_unlike(names: Sequence[str], caches: Sequence[Cache]) -> None:
  """Checks that records of all caches fit into one batch."""
  edits = [cache.lists.source_image is not None for cache in caches]
  if any(edits) and not all(edits):
    raise UserError(
      "the caches of data.mixture do not fit together: "
      + ", ".join(n for n, e in zip(names, edits) if e)
      + " hold edits of images, "
      + ", ".join(n for n, e in zip(names, edits) if not e)
      + " do not. Train on one kind at a time."
    )
  for name, cache in zip(names, caches, strict=True):
    for what, read in _COMMON.items():
      first, other = read(caches[0].manifest), read(cache.manifest)
      if first != other:
        raise UserError(
          f"the caches of data.mixture do not fit together: {what}: {first} in "
          f"{names[0]} ({caches[0].folder}) and {other} in {name} ({cache.folder}). "
          "Encode them with the same model and resolution."
        )


def _fraction(name: str, share: Any) -> Fraction:
  """Reads a share exactly: 0.1 is a tenth, not the float nearest to it."""
  try:
    fraction = Fraction(str(share))
  except (ValueError, ZeroDivisionError):
    fraction = Fraction(0)
  if fraction <= 0:
    raise UserError(
      f"data.mixture.{name}.share={share!r}: expected a positive number, how many lists "
      "are drawn from this source in proportion to the others."
    )
  return fraction
