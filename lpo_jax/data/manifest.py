"""The manifest: what a cache's records are, and the refusal of one that does not fit.

A cache is begun with a promise (`begun.json`) and finished with the manifest, which is
written last. Readers compare it with what they expect and name every difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lpo_jax
from lpo_jax.data import records
from lpo_jax.data.encoding import LOGVAR_RANGE, VIEWS, refuse_too_many, write_bad_images
from lpo_jax.errors import UserError

FORMAT = 1


def read(folder: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the manifest of a finished cache, None if there is none."""
  return records.read_json(Path(folder) / "manifest.json")


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
  shards = [p for k in (*VIEWS, "prompts") for p in folder.glob(f"{k}-[0-9]*")]
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


def add_view(
  folder: str | os.PathLike, view: str, *, shards: int, notes: Mapping[str, Any]
) -> dict[str, Any]:
  """Notes in a finished cache that its images are there in another view too.

  Args:
    folder: the cache.
    view: a name in `encoding.VIEWS`.
    shards: number of its shards, of all processes.
    notes: further facts that readers never compare.

  Returns:
    The manifest.

  Raises:
    UserError: a shard is missing.
  """
  folder = Path(folder)
  manifest = read(folder)
  added = records.Records(folder, view, shards)
  manifest["shards"][view] = shards
  # An image that has no record in this view is shown as it is.
  manifest["counts"][f"not_{view}"] = manifest["counts"]["images"] - len(added)
  manifest["notes"][view] = dict(notes)
  records.write_json(folder / "manifest.json", manifest)
  return manifest


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
