"""Which files hold a network's weights: one, or shards and their index; never pickles."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError

# Stem of the weights' file, by whether the config is one of diffusers.
STEMS = {True: "diffusion_pytorch_model", False: "model"}
MAX_SHARD_SIZE = 5_000_000_000  # bytes


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file.

  Raises:
    UserError: it is not there, or is none.
  """
  try:
    return json.loads(path.read_text("utf-8"))
  except FileNotFoundError:
    raise UserError(f"expected a file {path}, and there is none.") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}). Fetch it again.") from None


def single_name(stem: str, variant: str | None) -> str:
  """Returns the name of a file that holds all the weights."""
  return f"{stem}{_dotted(variant)}.safetensors"


def index_name(stem: str, variant: str | None) -> str:
  """Returns the name of the file that says which shard holds which tensor."""
  return f"{stem}.safetensors.index{_dotted(variant)}.json"


def is_shard(name: str, stem: str, variant: str | None) -> bool:
  """Whether a file is called like a shard; older versions put the variant last."""
  stem, dotted = re.escape(stem), re.escape(_dotted(variant))
  number = r"-\d+-of-\d+"
  pattern = rf"{stem}(?:{dotted}{number}|{number}{dotted})\.safetensors"
  return re.fullmatch(pattern, name) is not None


def _dotted(variant: str | None) -> str:
  return f".{variant}" if variant else ""


def choose(names: Collection[str], stem: str, variant: str | None, where: str) -> str:
  """Picks the single file or the index out of a folder's files.

  Args:
    names: of the files in the folder.
    stem: one of `STEMS`.
    variant: e.g. "fp16"; None for weights that are none.
    where: the folder, for the error.

  Raises:
    UserError: neither is there; says what is.
  """
  wanted = (single_name(stem, variant), index_name(stem, variant))
  for name in wanted:
    if name in names:
      return name
  looked = f"looked for {wanted[0]} and {wanted[1]} in {where}"
  pattern = re.compile(rf"{stem}\.(?:safetensors\.index\.)?(\w+)\.(?:safetensors|json)")
  matches = (pattern.fullmatch(name) for name in names)
  variants = sorted({match[1] for match in matches if match} - {"index", variant})
  if variants:
    raise UserError(f"{looked}; there are the variants {variants}: pass variant=...")
  if any(name.endswith((".bin", ".ckpt")) for name in names):
    raise UserError(
      f"{looked}; there is only a pickle (.bin), which is refused because reading one "
      "runs whatever code is in it. Save the model with safe_serialization=True, or "
      "fetch the .safetensors of the same repository."
    )
  raise UserError(f"{looked}; neither is there.")


def find(
  folder: pathlib.Path, config: Mapping[str, Any], variant: str | None
) -> list[pathlib.Path]:
  """Finds the file of the weights, or the shards that an index names.

  Raises:
    UserError: there is none, or not all of them.
  """
  inside = {path.name for path in folder.iterdir()}
  chosen = choose(inside, STEMS["_class_name" in config], variant, repr(str(folder)))
  if not chosen.endswith(".json"):
    return [folder / chosen]
  shards = sorted(set(read_json(folder / chosen)["weight_map"].values()))
  missing = [shard for shard in shards if not (folder / shard).is_file()]
  if missing:
    raise UserError(
      f"{folder / chosen} names {len(shards)} files and {len(missing)} of them are not "
      f"there, first {missing[0]!r}. Fetch the folder again."
    )
  return [folder / shard for shard in shards]


def split(
  sizes: Mapping[str, int], stem: str, variant: str | None, max_shard_size: int
) -> dict[str, list[str]]:
  """Spreads tensors over files as diffusers and transformers do, and names them.

  Args:
    sizes: bytes by tensor, in the order in which they fill the shards.
    stem: one of `STEMS`.
    variant: e.g. "fp16".
    max_shard_size: bytes; a larger tensor is alone in its shard.

  Returns:
    The tensors of each file.

  >>> split({"a": 2, "b": 2, "c": 3}, "model", None, 4)
  {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
  """
  shards: list[list[str]] = [[]]
  room = max_shard_size
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_size
    shards[-1].append(name)
    room -= size
  if len(shards) == 1:
    return {single_name(stem, variant): shards[0]}
  many = f"{len(shards):05d}"
  return {
    f"{stem}{_dotted(variant)}-{i:05d}-of-{many}.safetensors": shard
    for i, shard in enumerate(shards, 1)
  }


def index_text(shards: Mapping[str, Sequence[str]], total_size: int) -> str:
  """Writes which shard holds which tensor, as diffusers and transformers read it."""
  weight_map = {name: file for file, names in shards.items() for name in names}
  fields = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
  return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def remove_others(
  folder: pathlib.Path, stem: str, variant: str | None, keep: Collection[str]
) -> None:
  """Removes what an earlier save of the same weights left: a reader might prefer it."""
  for path in folder.iterdir():
    old = path.name in (single_name(stem, variant), index_name(stem, variant))
    if (old or is_shard(path.name, stem, variant)) and path.name not in keep:
      path.unlink()
