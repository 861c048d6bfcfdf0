"""The cache: every image and prompt encoded once, and lists that index them.

  manifest.json            what the records are and what made them; written last
  begun.json               the same promise, while the cache is unfinished
  moments-00000.*          one record per image: mean and log-variance [h, w, 2c]
  mirrored-00000.*         the same of the mirrored images, where `data.flip` asked for it
  prompts-00000.*          one record per prompt: states [L, D], then pooled [P] if any
  bad_images.jsonl         the images that could not be used, and why
  lists-<key>.npz, .json   lists built with one set of settings, as record indices

Lists are an index: building them differently never encodes an image again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lpo_jax.data import manifest as manifests
from lpo_jax.data import records
from lpo_jax.data.draws import Part
from lpo_jax.data.encoding import storage_dtype
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Conditioning

_LIST_COLUMNS = ("prompt", "list_id", "weight", "offsets", "image", "rank", "score")
_SOME_LISTS_COLUMNS = ("source_image", "user")  # not all lists have them


def lists_key(settings: Mapping[str, Any]) -> str:
  """Short hash of list-building settings: the `<key>` of their file names."""
  text = json.dumps(dict(settings), sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_lists(
  folder: str | os.PathLike,
  lists: RankedLists,
  settings: Mapping[str, Any],
  report: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Stores `lists` as indices of the finished cache's records.

  Args:
    folder: a finished cache.
    lists: as built, with indices into their own `prompts` and `image_uids`.
    settings: what they were built with; their hash names the file.
    report: what building dropped and why, kept for the reader.

  Returns:
    The lists' own manifest, with what bad images cost under "lost".

  Raises:
    UserError: a list names an image or prompt that the cache was not made from, or no
      list is left.
  """
  folder = Path(folder)
  manifest = manifests.read(folder)
  moments, prompts = (_records(folder, manifest, k) for k in ("moments", "prompts"))
  bad = {uid for uid, _ in moments.refused}
  kept, lost = index_lists(lists, moments.keys, prompts.keys, bad, folder)
  key = lists_key(settings)
  packed = io.BytesIO()
  columns = {name: getattr(kept, name) for name in _LIST_COLUMNS}
  columns |= {
    name: getattr(kept, name)
    for name in _SOME_LISTS_COLUMNS
    if getattr(kept, name) is not None
  }
  np.savez(packed, **columns, users=np.array(list(kept.users), str))
  records.write_atomically(folder / f"lists-{key}.npz", packed.getvalue())
  described = {
    "settings": dict(settings),
    "records": manifest["records"],
    "lists": len(kept.prompt),
    "items": len(kept.image),
    "lost": lost,
    "report": dict(report or {}),
  }
  records.write_json(folder / f"lists-{key}.json", described)
  return described


def index_lists(
  lists: RankedLists,
  image_keys: Sequence[str],
  prompt_keys: Sequence[str],
  bad: Sequence[str] | set[str],
  folder: str | os.PathLike,
) -> tuple[RankedLists, dict[str, int]]:
  """Makes lists index the records instead of their own prompts and images.

  Args:
    lists: as built, with indices into their own `prompts` and `image_uids`.
    image_keys: uids in record order.
    prompt_keys: prompts in record order.
    bad: uids of images that have no record because they cannot be used.
    folder: where the records are, to say so.

  Returns:
    The lists that are left, and the counts of what bad images cost.

  Raises:
    UserError: an image or prompt that the records were not made from, or no list left.
  """
  image_record = {uid: i for i, uid in enumerate(image_keys)}
  prompt_record = {prompt: i for i, prompt in enumerate(prompt_keys)}
  source = lists.source_image
  used = np.unique(np.concatenate([lists.image, [] if source is None else source]))
  used = used[used >= 0].astype(np.int64)
  unknown = [
    uid
    for uid in (lists.image_uids[i] for i in used)
    if uid not in image_record and uid not in bad
  ]
  unknown += [
    lists.prompts[i]
    for i in np.unique(lists.prompt)
    if lists.prompts[i] not in prompt_record
  ]
  if unknown:
    raise UserError(
      f"{len(unknown)} images or prompts of the lists are not in the cache {folder} "
      f"(first: {unknown[0]!r}): it was made from another source. Delete that folder, "
      "or point data.cache elsewhere."
    )
  image = np.array([image_record.get(uid, -1) for uid in lists.image_uids], np.int32)
  prompt = np.array([prompt_record.get(p, -1) for p in lists.prompts], np.int32)
  kept, lost = drop_missing(lists, image)
  if not len(kept.prompt):
    raise UserError(
      f"no list is left: {len(lists.prompt)} were built, all lost too many images to be "
      f"ranked. See {Path(folder) / 'bad_images.jsonl'}."
    )
  source = kept.source_image
  if source is not None:
    source = np.where(source >= 0, image[source], -1).astype(np.int32)
  kept = dataclasses.replace(
    kept,
    source_image=source,
    image=image[kept.image],
    prompt=prompt[kept.prompt],
    image_uids=image_keys,
    prompts=prompt_keys,
  )
  return kept, lost


def drop_missing(
  lists: RankedLists, image_record: np.ndarray
) -> tuple[RankedLists, dict[str, int]]:
  """Removes the items whose image has no record, and lists that this empties of meaning.

  A list that lost items is dropped when fewer than two are left or all of them tie, and
  an edit whose source image is missing. Ranks stay dense, list ids stay as they are.

  Args:
    lists: the lists.
    image_record: [images] for each index in `lists.image`, negative where missing.

  Returns:
    The lists that remain (images still index `lists.image_uids`), and the counts; of
    edits also "lists_without_source".
  """
  count = len(lists.prompt)
  length = np.diff(lists.offsets)
  owner = np.repeat(np.arange(count), length)
  keep = image_record[lists.image] >= 0
  left = np.bincount(owner[keep], minlength=count)
  low = np.full(count, np.iinfo(np.int32).max, np.int64)
  high = np.full(count, -1, np.int64)
  np.minimum.at(low, owner[keep], lists.rank[keep])
  np.maximum.at(high, owner[keep], lists.rank[keep])
  short = (left < length) & (left < 2)
  tied = (left < length) & (left >= 2) & (low == high)
  stays = ~(short | tied)
  source = lists.source_image
  lost = {}
  if source is not None:
    alone = (source >= 0) & (image_record[source] < 0)
    stays &= ~alone
    lost["lists_without_source"] = int(alone.sum())
  lost |= {
    "items": int((~keep).sum()),
    "lists_shortened": int((stays & (left < length)).sum()),
    "lists_too_short": int(short.sum()),
    "lists_all_tied": int(tied.sum()),
  }
  keep &= stays[owner]
  owner = owner[keep]
  # Dense ranks: the position of (list, rank) among the list's distinct ranks.
  pairs = np.stack([owner, lists.rank[keep].astype(np.int64)], axis=1)
  distinct, which = np.unique(pairs, axis=0, return_inverse=True)
  first = np.searchsorted(distinct[:, 0], owner)
  kept = dataclasses.replace(
    lists,
    prompt=lists.prompt[stays],
    list_id=lists.list_id[stays],
    weight=lists.weight[stays],
    user=None if lists.user is None else lists.user[stays],
    source_image=None if source is None else source[stays],
    offsets=np.concatenate([[0], np.cumsum(left[stays])]).astype(np.int64),
    image=lists.image[keep],
    rank=(which.ravel() - first).astype(np.int32),
    score=lists.score[keep],
  )
  return kept, lost


# Reading.


class Store(Protocol):
  """Records by index: `records.Records`, or what `live` encodes when it is asked."""

  keys: Sequence[str]
  about: Sequence[Any]

  def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes]: ...

  def close(self) -> None: ...


class Cache:
  """Encoded images and prompts by index, and the lists that index them.

  Attributes:
    folder: where it is.
    manifest: what the records are; see `manifest`.
    lists: ranked lists; `image` and `prompt` are record indices, `image_uids` and
      `prompts` are in record order.
    image_count: I. Index i + I is image i mirrored, where `has_mirrored`.
    has_mirrored: whether the images are there mirrored too.
    parts: the sources that the lists are of: one.
    null_prompts: for each of them the record index of the empty prompt.
  """

  def __init__(
    self,
    folder: Path,
    manifest: Mapping[str, Any],
    lists: RankedLists,
    moments: Store,
    prompts: Store,
    mirrored: Store | None = None,
  ):
    """Puts the parts together; `open_cache` and `live.open_source` find them.

    Args:
      folder: where it is, for messages.
      manifest: "dtype", "moments", "prompts" and "preprocessing" are read.
      lists: with record indices.
      moments: a record per image.
      prompts: a record per prompt.
      mirrored: a record per mirrored image, by the same keys.
    """
    self.folder, self.manifest = folder, manifest
    self.lists = dataclasses.replace(
      lists, prompts=prompts.keys, image_uids=moments.keys
    )
    self.image_count = len(self.lists.image_uids)
    self.has_mirrored = mirrored is not None
    self.null_prompts = (list(self.lists.prompts).index(""),)
    self.parts = (Part("", len(self.lists)),)
    self._prompts = prompts
    # Which record of which store each index means.
    self._stores = [moments] if mirrored is None else [moments, mirrored]
    plain = np.stack([np.zeros(self.image_count, int), np.arange(self.image_count)], 1)
    self._place = plain
    if mirrored is not None:
      known = {uid: (1, i) for i, uid in enumerate(mirrored.keys)}
      uids = enumerate(self.lists.image_uids)
      twins = [
        known.get(uid, (0, i)) for i, uid in uids
      ]  # one not there stays as it is
      self._place = np.concatenate([plain, np.array(twins).reshape(-1, 2)])
    self._dtype = storage_dtype(manifest["dtype"])
    about = [store.about for store in self._stores]
    facts = [about[store][record] for store, record in self._place.tolist()]
    self._original_size = np.array([f["original_size"] for f in facts], np.float32)
    self._crop = np.array([f["crop"] for f in facts], np.float32)

  def moments(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, h, w, 2c] fp32: mean and log-variance, unscaled."""
    shape = self.manifest["moments"]["shape"]
    place = self._place[np.asarray(indices, np.int64)]
    data: list[bytes] = [b""] * len(place)
    for number, store in enumerate(self._stores):
      rows = np.flatnonzero(place[:, 0] == number)
      for row, record in zip(rows, store.read(place[rows, 1]), strict=True):
        data[row] = record
    return self._decode(data, math.prod(shape)).reshape(-1, *shape)

  def source_latents(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, h, w, c] fp32: the mode of the posterior, unscaled."""
    return np.split(self.moments(indices), 2, axis=-1)[0]

  def prompt_embeds(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, L, D] fp32 text states."""
    return self._text(indices)[0]

  def conditioning(
    self, prompts: np.ndarray, images: np.ndarray, *, time_ids: str = "resolution"
  ) -> Conditioning:
    """What the UNet is told about images under prompts.

    Args:
      prompts: [n] prompt record indices.
      images: [n] image indices, as `moments` takes them.
      time_ids: "resolution" tells SDXL that every image was made at this size and not
        cropped, as Diffusion-DPO does; "original" tells its true size and crop.

    Returns:
      numpy arrays with a leading axis n; pooled and time_ids only where the cache has
      pooled text (SDXL).
    """
    distinct, which = np.unique(prompts, return_inverse=True)
    states, pooled = self._text(distinct)
    if pooled is None:
      return Conditioning(prompt_embeds=states[which])
    return Conditioning(
      prompt_embeds=states[which],
      pooled_prompt_embeds=pooled[which],
      time_ids=self._time_ids(np.asarray(images), time_ids),
    )

  def close(self) -> None:
    """Closes the record files."""
    for store in (*self._stores, self._prompts):
      store.close()

  def _text(self, indices) -> tuple[np.ndarray, np.ndarray | None]:
    shapes = self.manifest["prompts"]
    states, pooled = shapes["prompt_embeds"], shapes["pooled"]
    split = math.prod(states)
    size = split + (math.prod(pooled) if pooled else 0)
    flat = self._decode(self._prompts.read(indices), size)
    return (
      flat[:, :split].reshape(-1, *states),
      flat[:, split:].reshape(-1, *pooled) if pooled else None,
    )

  def _time_ids(self, images: np.ndarray, policy: str) -> np.ndarray:
    """[n, 6]: original height, width, crop top, left, target height, width."""
    side = float(self.manifest["preprocessing"]["resolution"])
    target = np.full((len(images), 2), side, np.float32)
    sizes = {
      "resolution": lambda: (target, np.zeros_like(target)),
      "original": lambda: (self._original_size[images], self._crop[images]),
    }
    if policy not in sizes:
      raise unknown_name("data.time_ids", policy, sizes)
    return np.concatenate([*sizes[policy](), target], axis=1)

  def _decode(self, data: list[bytes], size: int) -> np.ndarray:
    flat = np.frombuffer(b"".join(data), self._dtype).astype(np.float32)
    return flat.reshape(-1, size)


def open_cache(
  folder: str | os.PathLike,
  lists_key: str | None = None,
  *,
  expect: Mapping[str, Any] | None = None,
  mirrored: bool = False,
) -> Cache:
  """Opens a finished cache for reading.

  Args:
    folder: the cache.
    lists_key: which lists; may be left out where there is only one set.
    expect: values, nested as in the manifest, that must be equal to it.
    mirrored: whether the mirrored images are needed.

  Raises:
    UserError: no finished cache, no such lists, no mirrored images, or a difference
      from `expect`; every differing key is named.
  """
  folder = Path(folder)
  manifest = manifests.read(folder)
  if manifest is None:
    begun = ", only an unfinished one" if (folder / "begun.json").exists() else ""
    raise UserError(
      f"no finished cache in {folder}{begun}; run --job cache with the same config "
      "(it continues where it stopped), or set data.cache to the folder that has one."
    )
  expect = {"format": manifests.FORMAT, **(expect or {})}
  manifests.refuse_differences(folder, "cache", manifest, expect)
  known = known_lists(folder)
  if lists_key is None and len(known) == 1:
    (lists_key,) = known
  if lists_key not in known:
    raise UserError(
      f"the cache {folder} has no lists {lists_key or '(no key given)'}; it has: "
      f"{', '.join(known) or 'none'}. Run --job cache with the list settings of this "
      "config: images are not encoded again."
    )
  if mirrored and "mirrored" not in manifest["shards"]:
    raise UserError(
      f"the cache {folder} has no mirrored images, which data.flip needs. Run --job "
      "cache with this config: it adds them and encodes nothing else again."
    )
  with np.load(folder / f"lists-{lists_key}.npz") as columns:
    found = {*_LIST_COLUMNS, *_SOME_LISTS_COLUMNS} & {*columns.files}
    arrays = {name: columns[name] for name in sorted(found)}
    # Lists of before users were kept have none.
    arrays["users"] = columns["users"].tolist() if "users" in columns.files else ()
  names = ["moments", "prompts", *(["mirrored"] if mirrored else [])]
  stores = {name: _records(folder, manifest, name) for name in names}
  return Cache(
    folder, manifest, RankedLists(**arrays, prompts=(), image_uids=()), **stores
  )


def known_lists(folder: str | os.PathLike) -> list[str]:
  """Returns the keys of the lists that index the records now in the folder."""
  folder = Path(folder)
  current = (manifests.read(folder) or {}).get("records")
  keys = []
  for path in sorted(folder.glob("lists-*.json")):
    described = records.read_json(path)
    if described["records"] == current and path.with_suffix(".npz").exists():
      keys.append(path.stem.removeprefix("lists-"))
  return keys


def lists_manifest(folder: str | os.PathLike, key: str) -> dict[str, Any]:
  """Returns what `write_lists` said about the lists of this key."""
  return records.read_json(Path(folder) / f"lists-{key}.json")


def _records(folder: Path, manifest: Mapping[str, Any], name: str) -> records.Records:
  return records.Records(folder, name, manifest["shards"][name])
