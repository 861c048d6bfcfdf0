"""Files of IP-Adapters <-> what a UNet has for its users.

  image_proj.proj.weight, .bias; image_proj.norm.weight, .bias     the projector
  ip_adapter.<n>.to_k_ip.weight, ip_adapter.<n>.to_v_ip.weight     n = 1, 3, 5, ...

n counts diffusers' attention processors: down blocks, up blocks, then the middle, of each
transformer block attention to itself (even) and to the text (odd). diffusers loads the
file with `load_ip_adapter` where `refusal` has no objection; the names are the same where
it does not, and `load` reads both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lpo_jax import models, parallel, trees
from lpo_jax.errors import UserError
from lpo_jax.models import users
from lpo_jax.pretrained import names, tensors
from lpo_jax.pretrained.folders import Part
from lpo_jax.types import Params

Path = str | os.PathLike
FILE_NAME = "ip_adapter.safetensors"
FIELDS = ("user_dim", "user_tokens")  # of a UNet's config
FORMAT = "lpo_jax.ip_adapter/1"
# How many tokens diffusers takes every projector of this kind to make.
DIFFUSERS_TOKENS = 4
_PROJECTOR = {
  "encoder_hid_proj.image_projection_layers.0.image_embeds.": "image_proj.proj.",
  "encoder_hid_proj.image_projection_layers.0.norm.": "image_proj.norm.",
}
_ATTENTION = re.compile(r"(.+\.attn2)\.processor\.(to_[kv]_ip)\.0\.weight")
_ORDER = ("down_blocks", "up_blocks", "mid_block")


def refusal(config: Mapping[str, Any]) -> str | None:
  """Says why diffusers' `load_ip_adapter` cannot load a UNet's adapter; None if it can."""
  tokens, width = config.get("user_tokens", 4), config.get("cross_attention_dim")
  if not tokens:
    return "it has no projector, and diffusers knows no adapter without"
  if tokens != DIFFUSERS_TOKENS:
    return (
      f"its projector makes {tokens} tokens of an embedding, and diffusers takes every "
      f"projector of this kind to make {DIFFUSERS_TOKENS}"
    )
  if isinstance(width, list | tuple) and len(set(width)) > 1:
    return "its stages attend to texts of different widths"
  return None


def _in_file(model: models.Model) -> dict[str, tuple[str, int]]:
  """Tensor of the file -> our parameter and, of a stack, the block."""
  found = {}
  for name, leaf in model.named_shapes().items():
    if users.is_adapter(name):
      for block, tensor in enumerate(names.stored(name, leaf.shape).names):
        found[tensor] = (name, block)
  sites = {m[1] for m in map(_ATTENTION.fullmatch, found) if m}

  def place(site: str) -> tuple:
    words = [int(word) if word.isdigit() else word for word in site.split(".")]
    # Within a block diffusers counts by place; only numbers differ after the first word.
    return _ORDER.index(words[0]), [w for w in words if isinstance(w, int)]

  number = {site: 2 * i + 1 for i, site in enumerate(sorted(sites, key=place))}

  def key(tensor: str) -> str:
    attention = _ATTENTION.fullmatch(tensor)
    if attention:
      return f"ip_adapter.{number[attention[1]]}.{attention[2]}.weight"
    ours = next(prefix for prefix in _PROJECTOR if tensor.startswith(prefix))
    return _PROJECTOR[ours] + tensor.removeprefix(ours)

  return {key(tensor): home for tensor, home in found.items()}


def save(
  path: Path,
  model: models.Model,
  params: Params,
  *,
  dtype: Any = jnp.float32,
  facts: Mapping[str, str] | None = None,
) -> pathlib.Path:
  """Writes what a UNet has for its users.

  In a run of several processes all must call it, and the first one writes.

  Args:
    path: the file.
    model: a UNet that knows users.
    params: its weights, or of them at least what users add.
    dtype: of the tensors in the file.
    facts: more entries of the header.

  Returns:
    The file.

  Raises:
    UserError: the UNet knows no users.
  """
  homes, shapes = _in_file(model), model.named_shapes()
  if not homes:
    raise UserError(
      "the UNet knows no users (its config has no user_dim): there is no adapter to write."
    )
  path, kind = pathlib.Path(path), jnp.dtype(dtype)
  leaves = {
    name: parallel.fetch(leaf)
    for name, leaf in trees.named_leaves(params).items()
    if users.is_adapter(name)
  }

  def read(key: str) -> np.ndarray:
    name, block = homes[key]
    stored = names.stored(name, shapes[name].shape)
    leaf = leaves[name][block] if stored.is_stacked else leaves[name]
    return stored.to_file(np.asarray(leaf)).astype(kind)

  entries = {key: (kind.name, read(key).shape) for key in homes}
  fields = {key: model.config.get(key, 4) for key in FIELDS}
  header = {"lpo_jax.format": FORMAT, "lpo_jax.users": json.dumps(fields)}
  tensors.write(path, entries, read, metadata={**(facts or {}), **header})
  parallel.barrier("saved IP-Adapter")
  return path


def load(path: Path, model: models.Model) -> dict[str, np.ndarray]:
  """Reads what a UNet has for its users.

  Args:
    path: a .safetensors file of this kind, ours or another IP-Adapter's.
    model: the UNet that it is for, with the file's `user_dim` and `user_tokens`.

  Returns:
    The parameters by name, fp32: exactly those that `users.is_adapter` names.

  Raises:
    UserError: no such file, or tensors that are missing, unexpected or of another shape.
  """
  with _opened(path) as handle:
    arrays = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
  homes, shapes = _in_file(model), model.named_shapes()
  for what, keys in (
    ("lacks", homes.keys() - arrays.keys()),
    ("has besides", arrays.keys() - homes.keys()),
  ):
    if keys:
      raise UserError(
        f"{path} {what} {len(keys)} tensors (first {min(keys)!r}): it is no adapter of "
        "this UNet. Do their user_dim and user_tokens agree?"
      )
  blocks: dict[str, dict[int, np.ndarray]] = {}
  for key, (name, block) in homes.items():
    stored = names.stored(name, shapes[name].shape)
    if arrays[key].shape != stored.shape:
      raise UserError(
        f"{path}: {key} has shape {arrays[key].shape}, and this UNet asks for "
        f"{stored.shape}. Do their user_dim and user_tokens agree?"
      )
    array = stored.from_file(arrays[key].astype(np.float32))
    blocks.setdefault(name, {})[block] = array
  return {
    name: np.stack([found[i] for i in range(len(found))])
    if trees.is_stacked(name)
    else found[0]
    for name, found in blocks.items()
  }


def detach(part: Part) -> Part:
  """The UNet without what it has for its users, as diffusers knows it."""
  config = {k: x for k, x in part.config.items() if k not in FIELDS}
  model = models.build(config)
  kept = trees.pick(part.params, model.named_shapes().keys())
  return dataclasses.replace(part, config=config, params=kept, model=model)


def attach(part: Part, path: Path) -> Part:
  """The UNet with the users of a file: the inverse of `detach` and `save`.

  Args:
    part: a UNet without users.
    path: see `load`; one from elsewhere is taken to have a projector.

  Raises:
    UserError: see `load`.
  """
  config = {**part.config, **_fields(path)}
  model = models.build(config)
  known = {**trees.named_leaves(part.params), **load(path, model)}
  params = trees.unflatten_named(known, model.abstract_params)
  return dataclasses.replace(part, config=config, params=params, model=model)


def _fields(path: Path) -> dict[str, int]:
  """What the UNet's config has of a file's users."""
  with _opened(path) as handle:
    said = (handle.metadata() or {}).get("lpo_jax.users")
    if said:
      return json.loads(said)
    try:
      rows, width = handle.get_slice("image_proj.proj.weight").get_shape()
      context = handle.get_slice("image_proj.norm.weight").get_shape()[0]
    except SafetensorError:
      raise UserError(
        f"{path} has no image_proj.proj and image_proj.norm: only IP-Adapters with a "
        "linear projector are implemented (not Plus, Full Face or FaceID)."
      ) from None
  return {"user_dim": width, "user_tokens": rows // context}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  try:
    with safe_open(path, framework="numpy") as handle:
      yield handle
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{path} is not a readable safetensors file ({error}); expected an IP-Adapter."
    ) from None


def fingerprint(path: Path) -> str:
  """Identifies a file by its bytes: 16 hex digits."""
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]
