"""The sources of a config: where their caches are, and what these were made from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from lpo_jax import pretrained
from lpo_jax.data import decoding, fingerprints
from lpo_jax.data import manifest as manifests
from lpo_jax.errors import UserError, unknown_name

# The settings in `data` that lists depend on -> the parameters of `lists.build`.
LIST_SETTINGS = {
  "strategy": "strategy",
  "max_list_size": "max_size",
  "group_by": "group_by",
  "ties": "ties",
  "weight": "weight",
  "tie_tolerance": "tie_tolerance",
  "ranks": "ranks",
  "few_shot": "few_shot",
}
# Settings that are only named where they are on: lists from before them keep their key.
OFF = {"few_shot": 0}
# What sources of a mixture may differ in, besides their share.
SOURCE_KEYS = (
  *("path", "source", "split", "images", "cache", "max_bad_images"),
  *LIST_SETTINGS,
)
NETWORKS = ("vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclasses.dataclass(frozen=True)
class Place:
  """One source of lists and where its cache is.

  Attributes:
    name: what the mixture calls it; "" without a mixture.
    share: how many lists are drawn from it, in proportion to the others.
    config: the config as if this source were the only one.
    folder: of the cache; None if there is to be none.
  """

  name: str
  share: Any
  config: Any
  folder: Path | None


def places(config: Any, workdir: str | os.PathLike) -> list[Place]:
  """The sources of a config: those of `data.mixture`, else the one in `data`.

  A cache is in `data.cache`, or in `cache` in the workdir if that is empty; those of a
  mixture in folders of their names below.

  Raises:
    UserError: a key that a source cannot have, or a source without a share.
  """
  folder = config.data.cache
  if folder is not None:
    folder = Path(folder or Path(workdir) / "cache")
  if not config.data.mixture:
    return [Place("", 1, config, folder)]
  found = []
  for name, own in sorted(config.data.mixture.items()):
    for key in own:
      if key not in (*SOURCE_KEYS, "share"):
        raise unknown_name(f"key of data.mixture.{name}", key, (*SOURCE_KEYS, "share"))
    if "share" not in own:
      raise UserError(
        f"data.mixture.{name} has no share; give the number of lists that are drawn "
        "from it in proportion to the other sources."
      )
    alone = config.copy_and_resolve_references()
    with alone.unlocked():
      alone.data.mixture = {}
      alone.data.update({key: own[key] for key in own if key != "share"})
    where = folder / name if folder else None
    if "cache" in own:
      where = Path(own.cache) if own.cache else None
    found.append(Place(name, own.share, alone, where))
  return found


def list_settings(config: Any) -> dict[str, Any]:
  """The settings that lists depend on, and records do not."""
  found = {name: config.data[name] for name in LIST_SETTINGS if name in config.data}
  return {name: x for name, x in found.items() if name not in OFF or x != OFF[name]}


def expectation(config: Any) -> dict[str, Any]:
  """What a cache must have been made from to serve this config, as its manifest says.

  The source is compared by its files where they are at hand, else by its name: a
  training machine need not hold the images.
  """
  path = pretrained.local_folder(config.model.path)
  networks = [name for name in NETWORKS if name == "vae" or (path / name).is_dir()]
  used = {"vae": _vae_use(config)} | dict.fromkeys(NETWORKS[1:], _text_use(config))
  prints = {name: pretrained.fingerprint(path, name) + used[name] for name in networks}
  for name in TOKENIZERS:
    if (path / name).is_dir():
      prints[name] = fingerprints.of_contents(path / name)
  return {
    "format": manifests.FORMAT,
    "fingerprints": prints,
    "dtype": config.data.cache_dtype,
    "preprocessing": {
      "resolution": config.data.resolution,
      "max_pixels": config.data.max_pixels,
      **decoding.PREPROCESSING,
    },
    "source": {**named(config), "split": config.data.get("split")},
  }


def named(config: Any, *, both: bool = False) -> dict[str, str | None]:
  """The source's files, or its name where they are not at hand (or both), by key."""
  found_by: dict[str, str | None] = {}
  keys = {"path": ("files", "path"), "images": ("image_files", "images")}
  for key, (files, name) in keys.items():
    if not config.data.get(key):
      continue
    found = fingerprints.of_source(config.data[key])
    if found or both:
      found_by[files] = found
    if not found or both:
      found_by[name] = str(config.data[key])
  return found_by


def _vae_use(config: Any) -> str:
  """Says, behind the fingerprint, when images are encoded in tiles."""
  tile = config.model.vae_tile
  return f" tile={tile}" if 0 < tile < config.data.resolution else ""


def _text_use(config: Any) -> str:
  """Says, behind the fingerprint, which layers are left out."""
  return f" clip_skip={config.model.clip_skip}" if config.model.clip_skip else ""
