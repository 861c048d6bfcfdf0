"""The cache: every image and prompt encoded once, and lists that index them.

  manifest.json            what the records are and what made them; written last
  begun.json               the same promise, while the cache is unfinished
  moments-00000.*          one record per image: mean and log-variance [h, w, 2c]
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
from typing import Any

import numpy as np

import lpo_jax
from lpo_jax.data import records
from lpo_jax.data.encoding import (
  DTYPES,
  LOGVAR_RANGE,
  refuse_too_many,
  write_bad_images,
)
from lpo_jax.data.lists import RankedLists
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Conditioning

FORMAT = 1
_LIST_COLUMNS = ("prompt", "list_id", "weight", "offsets", "image", "rank", "score")


def lists_key(settings: Mapping[str, Any]) -> str:
  """Short hash of list-building settings: the `<key>` of their file names."""
  text = json.dumps(dict(settings), sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def begin(
  folder: str | os.PathLike,
  identity: Mapping[str, Any],
  *,
  expect: Mapping[str, Any] | None = None,
) -> None:
  """Notes what an unfinished cache will be, or checks that it is the same as before.

  Args:
    folder: the cache.
    identity: what the records are made from and how, as the manifest will say.
    expect: the part of it that must be equal in work begun before; all of it if None.

  Raises:
    UserError: the folder holds the unfinished work of other settings.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shards = [p for k in ("moments", "prompts") for p in folder.glob(f"{k}-[0-9]*")]
  begun = records.read_json(folder / "begun.json")
  if begun is None:  # nobody says what these records were made from
    for path in shards:
      path.unlink()
  elif any(path.suffix == ".json" for path in shards):  # there is work to lose
    wanted = identity if expect is None else expect
    refuse_differences(folder, "unfinished cache", begun, wanted)
  records.write_json(folder / "begun.json", dict(identity))


def finish(
  folder: str | os.PathLike,
  identity: Mapping[str, Any],
  *,
  shards: Mapping[str, int],
  max_bad: float,
  notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Checks that all shards are there and writes the manifest.

  Args:
    folder: the cache.
    identity: what `begin` was given, with the "dtype" of the records.
    shards: number of "moments" and of "prompts" shards, of all processes.
    max_bad: share of the images that may be unusable.
    notes: further facts for the manifest that readers never compare.

  Returns:
    The manifest.

  Raises:
    UserError: a shard is missing, or too many images are bad.
  """
  folder = Path(folder)
  moments = records.Records(folder, "moments", shards["moments"])
  prompts = records.Records(folder, "prompts", shards["prompts"])
  bad = moments.refused
  refuse_too_many(folder, bad, max_bad, len(moments) + len(bad))
  write_bad_images(folder, bad)
  if not len(moments):
    raise UserError(f"no image of {len(bad)} could be used: {folder} would be empty.")
  shape = prompts.about[0]
  # All that lists depend on: which record holds what.
  index = json.dumps([moments.keys, prompts.keys]).encode()
  manifest = {
    **identity,
    "package": lpo_jax.__version__,
    "moments": {"shape": moments.about[0]["moments"], "logvar_range": LOGVAR_RANGE},
    "prompts": {"prompt_embeds": shape["prompt_embeds"], "pooled": shape["pooled"]},
    "counts": {
      "images": len(moments),
      "bad_images": len(bad),
      "prompts": len(prompts),
    },
    "shards": dict(shards),
    "records": hashlib.sha256(index).hexdigest()[:16],
    "notes": dict(notes or {}),
  }
  records.write_json(folder / "manifest.json", manifest)
  (folder / "begun.json").unlink(missing_ok=True)
  return manifest


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
  manifest, moments, prompts = _open_records(folder)
  bad = {uid for uid, _ in moments.refused}
  image_record = {uid: i for i, uid in enumerate(moments.keys)}
  prompt_record = {prompt: i for i, prompt in enumerate(prompts.keys)}
  used = np.unique(lists.image)
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
      f"ranked. See {folder / 'bad_images.jsonl'}."
    )
  kept = dataclasses.replace(kept, image=image[kept.image], prompt=prompt[kept.prompt])
  key = lists_key(settings)
  packed = io.BytesIO()
  np.savez(packed, **{name: getattr(kept, name) for name in _LIST_COLUMNS})
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


def drop_missing(
  lists: RankedLists, image_record: np.ndarray
) -> tuple[RankedLists, dict[str, int]]:
  """Removes the items whose image has no record, and lists that this empties of meaning.

  A list that lost items is dropped when fewer than two are left or all of them tie.
  Ranks stay dense, list ids stay as they are.

  Args:
    lists: the lists.
    image_record: [images] for each index in `lists.image`, negative where missing.

  Returns:
    The lists that remain (image still indexes `lists.image_uids`), and the counts.
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
  lost = {
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
    offsets=np.concatenate([[0], np.cumsum(left[stays])]).astype(np.int64),
    image=lists.image[keep],
    rank=(which.ravel() - first).astype(np.int32),
    score=lists.score[keep],
  )
  return kept, lost


# Reading.


class Cache:
  """A finished cache with one set of lists; made by `open_cache`.

  Attributes:
    folder: where it is.
    manifest: the record store's manifest.
    lists_manifest: the lists' own manifest.
    lists: ranked lists; `image` and `prompt` are record indices, `image_uids` and
      `prompts` are in record order.
    null_prompt: the record index of the empty prompt.
  """

  def __init__(self, folder: Path, key: str):
    self.folder = folder
    self.manifest, self._moments, self._prompts = _open_records(folder)
    self.lists_manifest = records.read_json(folder / f"lists-{key}.json")
    prompts = self._prompts.keys
    with np.load(folder / f"lists-{key}.npz") as columns:
      arrays = {name: columns[name] for name in _LIST_COLUMNS}
    self.lists = RankedLists(**arrays, prompts=prompts, image_uids=self._moments.keys)
    self.null_prompt = prompts.index("")
    self._dtype = DTYPES[self.manifest["dtype"]]
    about = self._moments.about
    self._original_size = np.array([a["original_size"] for a in about], np.float32)
    self._crop = np.array([a["crop"] for a in about], np.float32)

  def moments(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, h, w, 2c] fp32: mean and log-variance, unscaled."""
    shape = self.manifest["moments"]["shape"]
    flat = self._decode(self._moments.read(indices), math.prod(shape))
    return flat.reshape(-1, *shape)

  def prompt_embeds(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, L, D] fp32 text states."""
    return self._text(indices)[0]

  def conditioning(
    self, prompts: np.ndarray, images: np.ndarray, *, time_ids: str = "resolution"
  ) -> Conditioning:
    """What the UNet is told about images under prompts.

    Args:
      prompts: [n] prompt record indices.
      images: [n] image record indices.
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
    self._moments.close()
    self._prompts.close()

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
      raise unknown_name("time_ids", policy, sizes)
    return np.concatenate([*sizes[policy](), target], axis=1)

  def _decode(self, data: list[bytes], size: int) -> np.ndarray:
    flat = np.frombuffer(b"".join(data), self._dtype).astype(np.float32)
    return flat.reshape(-1, size)


def open_cache(
  folder: str | os.PathLike,
  lists_key: str | None = None,
  *,
  expect: Mapping[str, Any] | None = None,
) -> Cache:
  """Opens a finished cache for reading.

  Args:
    folder: the cache.
    lists_key: which lists; may be left out where there is only one set.
    expect: values, nested as in the manifest, that must be equal to it.

  Raises:
    UserError: no finished cache, no such lists, or a difference from `expect`; every
      differing key is named.
  """
  folder = Path(folder)
  manifest = read_manifest(folder)
  if manifest is None:
    begun = ", only an unfinished one" if (folder / "begun.json").exists() else ""
    raise UserError(
      f"no finished cache in {folder}{begun}; run --job cache with the same config "
      "(it continues where it stopped), or set data.cache to the folder that has one."
    )
  refuse_differences(folder, "cache", manifest, {"format": FORMAT, **(expect or {})})
  known = known_lists(folder)
  if lists_key is None and len(known) == 1:
    (lists_key,) = known
  if lists_key not in known:
    raise UserError(
      f"the cache {folder} has no lists {lists_key or '(no key given)'}; it has: "
      f"{', '.join(known) or 'none'}. Run --job cache with the list settings of this "
      "config: images are not encoded again."
    )
  return Cache(folder, lists_key)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the manifest of a finished cache, None if there is none."""
  return records.read_json(Path(folder) / "manifest.json")


def known_lists(folder: str | os.PathLike) -> list[str]:
  """Returns the keys of the lists that index the records now in the folder."""
  folder = Path(folder)
  current = (read_manifest(folder) or {}).get("records")
  keys = []
  for path in sorted(folder.glob("lists-*.json")):
    described = records.read_json(path)
    if described["records"] == current and path.with_suffix(".npz").exists():
      keys.append(path.stem.removeprefix("lists-"))
  return keys


def differences(
  found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
  """Lists (dotted key, expected, found) wherever `expected` is not as `found`.

  >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}})
  [('a.b', 3, 1)]
  """
  result = []
  for key, value in expected.items():
    other = found.get(key)
    if isinstance(value, Mapping) and isinstance(other, Mapping):
      result += differences(other, value, f"{prefix}{key}.")
    elif json.dumps(value) != json.dumps(other):  # tuples come back as lists
      result.append((f"{prefix}{key}", value, other))
  return result


def refuse_differences(
  folder: str | os.PathLike,
  what: str,
  found: Mapping[str, Any],
  expected: Mapping[str, Any],
) -> None:
  """Names every key in which `found` is not as `expected`.

  Raises:
    UserError: there is one.
  """
  unlike = differences(found, expected)
  if unlike:
    lines = "; ".join(f"{k}: this run has {e!r}, found {f!r}" for k, e, f in unlike)
    raise UserError(
      f"the {what} in {folder} was made differently ({lines}). Delete that folder, or "
      "point data.cache elsewhere."
    )


def _open_records(folder: Path) -> tuple[dict, records.Records, records.Records]:
  manifest = read_manifest(folder)
  shards = manifest["shards"]
  moments = records.Records(folder, "moments", shards["moments"])
  prompts = records.Records(folder, "prompts", shards["prompts"])
  return manifest, moments, prompts
