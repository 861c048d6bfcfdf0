"""Training without a cache: images and prompts encoded when they are first asked for.

For small runs. What is encoded is kept in memory, so nothing is encoded twice, and every
number is the one that a cache of the same settings would hold.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpo_jax.data import decoding, encoding, records
from lpo_jax.data.cache import Cache, index_lists
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError

MOST_BYTES = 4 * 1024**3  # of encoded images; more is a case for the cache


class Live:
  """Records that are made when they are first read, and then kept."""

  def __init__(
    self,
    keys: Sequence[str],
    about: Sequence[Any],
    make: Callable[[list[int]], Iterable[records.Record]],
  ):
    """Makes nothing yet.

    Args:
      keys: what the records are about.
      about: facts beside each.
      make: gives the records at some indices, in order.
    """
    self.keys, self.about = keys, about
    self._make = make
    self._made: dict[int, bytes] = {}
    self._lock = threading.Lock()

  def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
    """Returns the records at `indices`, in that order.

    Raises:
      UserError: one of them cannot be encoded.
    """
    wanted = [int(i) for i in indices]
    with self._lock:
      missing = list(dict.fromkeys(i for i in wanted if i not in self._made))
      made = self._make(missing) if missing else ()
      for index, record in zip(missing, made, strict=True):
        if record.data is None:
          raise UserError(
            f"{record.key}: {record.about}. A cache leaves such images out, training "
            "straight from images cannot: run --job cache and train from it."
          )
        self._made[index] = record.data
    return [self._made[i] for i in wanted]

  def close(self) -> None:
    """Forgets what was made."""
    with self._lock:
      self._made.clear()


def open_images(
  lists: RankedLists,
  uids: Sequence[str],
  prompts: Sequence[str],
  job: encoding.ImageJob,
  encode_prompts: Callable[[list[str]], Any],
  *,
  folder: str | os.PathLike,
  max_bad: float,
  dtype: str,
) -> Cache:
  """Reads and checks all images, and returns what encodes them when they are needed.

  Args:
    lists: as built, with indices into their own `prompts` and `image_uids`.
    uids: one per image; positions in it are what `job.read` is asked for.
    prompts: distinct, the empty prompt among them.
    job: how to read and encode.
    encode_prompts: n prompts -> (prompt_embeds [n, L, D], pooled [n, P] or None).
    folder: where bad_images.jsonl goes if there are any.
    max_bad: share of the images that may be unusable.
    dtype: name of what a cache would store, for the same numbers as from one.

  Returns:
    What reads like an opened cache; mirrored images are there without asking.

  Raises:
    UserError: too many bad images, too many bytes, or no list is left.
  """
  held, about, bad = _read_all(uids, job)
  encoding.refuse_too_many(folder, bad, max_bad, len(uids))
  if bad:
    encoding.write_bad_images(folder, bad)
  refused = {uid for uid, _ in bad}
  good = [uid for uid in uids if uid not in refused]
  if not good:
    raise UserError(f"no image of {len(bad)} could be used.")
  storage = encoding.storage_dtype(dtype)
  from_memory = dataclasses.replace(
    job, read=lambda i: held[good[i]], speed=encoding.Speed()
  )

  def images(view: str) -> Live:
    how = encoding.VIEWS[view]
    facts = [about[uid][view] for uid in good]
    make = lambda indices: encoding.image_records(  # noqa: E731
      indices, good, from_memory, storage, how
    )
    return Live(good, facts, make)

  def texts(indices: list[int]) -> Iterable[records.Record]:
    return encoding.prompt_records(
      [prompts[i] for i in indices], encode_prompts, storage
    )

  (first,) = encoding.image_records([0], good, from_memory, storage)
  (empty,) = texts([0])
  if first.data is None:
    raise UserError(f"{first.key}: {first.about}.")
  kept, _ = index_lists(lists, good, prompts, refused, folder)
  return Cache(
    Path(folder),
    {
      "dtype": dtype,
      "moments": {"shape": first.about["moments"]},
      "prompts": empty.about,
      "preprocessing": {"resolution": job.resolution},
    },
    kept,
    images("moments"),
    Live(prompts, [empty.about] * len(prompts), texts),
    images("mirrored"),
  )


def _read_all(
  uids: Sequence[str], job: encoding.ImageJob
) -> tuple[dict[str, bytes], dict[str, dict[str, Any]], list[tuple[str, str]]]:
  """Reads and decodes every image once.

  Returns:
    uid -> encoded bytes; uid -> view -> facts; the bad ones as (uid, reason).
  """
  held: dict[str, bytes] = {}
  size = 0

  def read(position: int) -> bytes:
    nonlocal size
    data = held[uids[position]] = job.read(position)
    size += len(data)
    if size > MOST_BYTES:
      raise UserError(
        f"data.cache=None keeps the images in memory; these are more than "
        f"{MOST_BYTES / 1024**3:.0f} GiB. Set data.cache to a folder (empty: in the "
        "workdir) and run --job cache."
      )
    return data

  about: dict[str, dict[str, Any]] = {}
  bad: list[tuple[str, str]] = []
  checked = dataclasses.replace(job, read=read, speed=encoding.Speed())
  for batch in encoding.decoded_batches(range(len(uids)), uids, checked):
    for uid, image in batch:
      if isinstance(image, decoding.PreparedImage):
        views = {name: how(image) for name, how in encoding.VIEWS.items()}
        about[uid] = {name: encoding.facts(view) for name, view in views.items()}
      else:
        bad.append((uid, image))
        held.pop(uid, None)
  return held, about, bad
