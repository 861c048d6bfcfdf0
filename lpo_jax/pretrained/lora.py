"""Files of LoRA factors: PEFT's keys, as diffusers writes them, and kohya's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpo_jax import models, parallel, trees
from lpo_jax.errors import UserError, nearest, unknown_name
from lpo_jax.models import lora
from lpo_jax.pretrained import lora_names, names, tensors

Path = str | os.PathLike

# What diffusers looks for in a folder.
FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "lora_adapter_metadata"

# The end of a key -> what the tensor is.
KINDS = {
  "lora_A.weight": "A",
  "lora_B.weight": "B",
  "lora.down.weight": "A",
  "lora.up.weight": "B",
  "lora_down.weight": "A",
  "lora_up.weight": "B",
  "alpha": "alpha",
}
KEY = re.compile(rf"(.+)\.({'|'.join(re.escape(end) for end in KINDS)})")
# Keys of attention processors, which diffusers wrote before PEFT.
PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
# Adapters of other kinds, by a part of their keys.
OTHERS = {
  "dora_scale": "DoRA",
  "lora_magnitude_vector": "DoRA",
  "lora_mid": "a LoRA in Tucker form",
  "hada_": "LoHa",
  "lokr_": "LoKr",
  "lora_B.bias": "a LoRA with biases",
  "diff": "a difference of whole weights",
}
TEXT = ("text_encoder", "lora_te")


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """What a file holds.

  Attributes:
    adapter: the factors of the UNet.
    metadata: of the file's header.
    text_keys: keys of text encoders, which are not in the adapter.
  """

  adapter: lora.Adapter
  metadata: Mapping[str, str]
  text_keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Place:
  """One kernel, as files know it: a parameter, or one block of a stack."""

  name: str
  block: int
  shape: tuple[int, ...]


def find(path: Path) -> pathlib.Path | None:
  """Returns the LoRA file that `path` is or holds, or None.

  A folder holds one if diffusers' name is in it, or one other .safetensors.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return path if path.suffix == ".safetensors" else None
  if (path / FILE_NAME).is_file():
    return path / FILE_NAME
  inside = sorted(path.glob("*.safetensors")) if path.is_dir() else []
  return inside[0] if len(inside) == 1 else None


def _places(model: models.Model) -> dict[str, _Place]:
  """All names that files may have for the model's kernels."""
  places = {}
  to_sgm = lora_names.to_sgm(model.config)
  for name, leaf in model.named_shapes().items():
    if name.rpartition(".")[2] != "kernel":
      continue
    shape = leaf.shape[1:] if trees.is_stacked(name) else leaf.shape
    for block, full in enumerate(trees.block_names(name, leaf.shape)):
      module = full.removesuffix(".kernel")
      place = _Place(name, block, shape)
      for spelling in (
        module,
        lora_names.kohya(module),
        lora_names.kohya(to_sgm(module)),
      ):
        places[spelling] = place
  return places


def load(path: Path, model: models.Model) -> Loaded:
  """Reads the factors of a UNet from a file of PEFT's, diffusers' or kohya's keys.

  Blocks of a stack may be missing or of different ranks: they are filled with zeros.

  Args:
    path: a .safetensors file, or a folder with one.
    model: the UNet that it is for.

  Raises:
    UserError: no such file, an adapter of another kind, a key or a shape that the model
      does not have, or a factor without its other half.
  """
  from safetensors import SafetensorError, safe_open

  file = find(path)
  if file is None:
    raise UserError(
      f"no LoRA file at {str(path)!r}: expected a .safetensors file, or a folder with "
      f"{FILE_NAME} or one other .safetensors in it."
    )
  try:
    with safe_open(file, framework="numpy") as handle:
      metadata = dict(handle.metadata() or {})
      arrays = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
  except SafetensorError as error:
    raise UserError(
      f"{file} is not a readable safetensors file ({error}). It may be cut short, or a "
      "git-lfs pointer: fetch it again."
    ) from None
  text_keys = tuple(key for key in arrays if key.startswith(TEXT))
  parts = _sort(file, {k: v for k, v in arrays.items() if k not in text_keys}, model)
  if not parts:
    raise UserError(
      f"{file} has no factors for a UNet; it holds {len(text_keys)} tensors for text "
      "encoders, which are not trained here."
    )
  alpha_of = _alphas(file, metadata)
  return Loaded(_assemble(file, parts, alpha_of, model), metadata, text_keys)


def _sort(
  file: pathlib.Path, arrays: Mapping[str, np.ndarray], model: models.Model
) -> dict[_Place, dict[str, np.ndarray]]:
  """Finds what each tensor is, and of which kernel."""
  places = _places(model)
  parts: dict[_Place, dict[str, np.ndarray]] = {}
  unknown = []
  for key, array in arrays.items():
    match = KEY.fullmatch(PROCESSOR.sub(_without_processor, key))
    if match is None:
      other = next((what for part, what in OTHERS.items() if part in key), None)
      raise UserError(
        f"{file}: {key!r} is of {other}, which is not implemented; expected plain LoRA."
        if other
        else f"{file}: {key!r} is no key of a LoRA; expected one that ends with "
        f"{', '.join(KINDS)}."
      )
    module = lora_names.without_prefix(match[1])
    if module in places:
      parts.setdefault(places[module], {})[KINDS[match[2]]] = array
    else:
      unknown.append(module)
  if unknown:
    close = nearest(unknown[0], places)
    hint = f" (closest: {close!r})" if close else ""
    raise UserError(
      f"{file}: {len(unknown)} of {len(arrays)} tensors are for modules that this UNet "
      f"does not have, first {unknown[0]!r}{hint}. Is it for another model?"
    )
  return parts


def _without_processor(match: re.Match) -> str:
  layer = "out.0" if match[1] == "out" else match[1]
  return f".to_{layer}.lora.{match[2]}.weight"


def _alphas(
  file: pathlib.Path, metadata: Mapping[str, str]
) -> Callable[[str, int], float]:
  """Returns a function of (module, rank): the alpha that PEFT's config gives."""
  config = json.loads(metadata.get(PEFT_CONFIG, "{}"))
  if any(key.startswith("unet.") for key in config):
    config = {key.removeprefix("unet."): value for key, value in config.items()}
  if config.get("use_dora"):
    raise UserError(
      f"{file} is of DoRA, which is not implemented; expected plain LoRA."
    )
  patterns = config.get("alpha_pattern") or {}

  def alpha_of(module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in patterns.items():
      if re.match(rf"(.*\.)?({pattern})$", module):
        alpha = value
        break
    # Rank-stabilised LoRA divides by the root of the rank.
    return float(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)

  return alpha_of


def _assemble(
  file: pathlib.Path,
  parts: Mapping[_Place, Mapping[str, np.ndarray]],
  alpha_of: Callable[[str, int], float],
  model: models.Model,
) -> lora.Adapter:
  """Puts the blocks of stacks together, as wide as the widest of them."""
  leaves = model.named_shapes()
  pieces: dict[str, dict[int, tuple[np.ndarray, np.ndarray, float]]] = {}
  for place, part in parts.items():
    module = trees.block_names(place.name, leaves[place.name].shape)[place.block]
    module = module.removesuffix(".kernel")
    if not {"A", "B"} <= part.keys():
      raise UserError(f"{file}: {module!r} has {sorted(part)}; expected both factors.")
    a, b = _to_ours(file, module, part["A"], part["B"], place.shape)
    rank = a.shape[-1]
    alpha = lora.as_alpha(part.get("alpha", alpha_of(module, rank)))
    pieces.setdefault(place.name, {})[place.block] = (a, b, alpha)

  layout, filled = {}, {}
  for name, leaf in leaves.items():
    if name not in pieces:
      continue
    blocks = leaf.shape[0] if trees.is_stacked(name) else 1
    of = pieces[name]
    ranks = tuple(of[i][0].shape[-1] if i in of else 0 for i in range(blocks))
    alphas = tuple(of[i][2] if i in of else 0.0 for i in range(blocks))
    layout[name] = lora.Site(ranks, alphas)
    shapes = lora.shapes(name, leaf.shape, max(ranks))
    both = {factor: np.zeros(shape, np.float32) for factor, shape in shapes.items()}
    for block, (a, b, _) in of.items():
      where = (block,) if trees.is_stacked(name) else ()
      both["A"][(*where, ..., slice(ranks[block]))] = a
      both["B"][(*where, slice(ranks[block]))] = b
    filled[name] = both
  make = lambda name, _, factor: filled[name][factor]  # noqa: E731
  return lora.Adapter(lora.build(model.abstract_params, layout, make), layout)


def _to_ours(
  file: pathlib.Path,
  module: str,
  a: np.ndarray,
  b: np.ndarray,
  shape: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
  """Turns a file's [rank, inputs, ...] and [outputs, rank, ...] to our order."""
  axes = names.KERNEL_AXES[len(shape)]
  kernel = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
  rank = a.shape[0]
  # A matrix and a 1 x 1 convolution are the same numbers: files have either.
  if a.size != rank * math.prod(kernel[1:]) or b.size != kernel[0] * rank:
    raise UserError(
      f"{file}: the factors of {module!r} are {a.shape} and {b.shape}; expected "
      f"{(rank, *kernel[1:])} and {(kernel[0], rank)}. Is it for another model?"
    )
  ours = a.reshape(rank, *kernel[1:]).transpose(axes)
  return ours.astype(np.float32), b.reshape(kernel[0], rank).T.astype(np.float32)


def save(
  path: Path,
  adapter: lora.Adapter,
  config: Mapping[str, Any],
  *,
  style: str = "peft",
  dtype: Any = jnp.float32,
  facts: Mapping[str, str] | None = None,
) -> pathlib.Path:
  """Writes factors as diffusers or kohya's scripts would.

  In a run of several processes all must call it, and the first one writes.

  Args:
    path: the file.
    adapter: what to write.
    config: of the UNet, for its architecture and the names of its blocks.
    style: "peft" or "kohya".
    dtype: of the factors in the file; alphas are fp32.
    facts: more entries of the header, such as "ss_seed" or "modelspec.title".

  Returns:
    The file.

  Raises:
    UserError: an unknown style.
  """
  if style not in STYLES:
    raise unknown_name("LoRA file format", style, STYLES)
  path = pathlib.Path(path)
  delta = trees.named_leaves(parallel.fetch(adapter.delta))
  arrays, header = STYLES[style](adapter.layout, delta, config, jnp.dtype(dtype))
  entries = {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
  digest = hashlib.sha256()
  for key in tensors.order(entries):
    digest.update(arrays[key].tobytes())
  header |= {**(facts or {}), **lora_names.architecture(config)}
  header |= {"modelspec.hash_sha256": f"0x{digest.hexdigest()}"}
  if style == "kohya":
    header["sshs_model_hash"] = digest.hexdigest()
  tensors.write(path, entries, arrays.__getitem__, metadata=header)
  parallel.barrier("saved LoRA")
  return path


def _in_files(
  layout: lora.Layout, delta: Mapping[str, np.ndarray], dtype: Any
) -> Iterator[tuple[str, np.ndarray, np.ndarray, float]]:
  """Yields (module, A, B, alpha) of every kernel, in the order of files."""
  for name, site in layout.items():
    a, b = delta[f"{name}.A"], delta[f"{name}.B"]
    stacked = trees.is_stacked(name)
    modules = trees.block_names(name.removesuffix(".kernel"), a.shape)
    for block, module in enumerate(modules):
      rank = site.ranks[block]
      if rank:
        one, two = (a[block], b[block]) if stacked else (a, b)
        axes = np.argsort(names.KERNEL_AXES[one.ndim])
        one = np.ascontiguousarray(one[..., :rank].transpose(axes)).astype(dtype)
        two = np.ascontiguousarray(two[:rank].T).astype(dtype)
        ones = (1,) * (one.ndim - 2)
        yield module, one, two.reshape(*two.shape, *ones), site.alphas[block]


def _peft(
  layout: lora.Layout,
  delta: Mapping[str, np.ndarray],
  config: Mapping[str, Any],
  dtype: Any,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  del config
  arrays, ranks, alphas = {}, {}, {}
  for module, a, b, alpha in _in_files(layout, delta, dtype):
    arrays[f"unet.{module}.lora_A.weight"] = a
    arrays[f"unet.{module}.lora_B.weight"] = b
    ranks[module], alphas[module] = a.shape[0], alpha
  rank, alpha = _most_common(ranks), _most_common(alphas)
  described = {
    "peft_type": "LORA",
    "r": rank,
    "lora_alpha": _number(alpha),
    # ^: the whole name, not the end of a longer one.
    "rank_pattern": {f"^{m}": r for m, r in ranks.items() if r != rank},
    "alpha_pattern": {f"^{m}": _number(a) for m, a in alphas.items() if a != alpha},
    "target_modules": sorted(ranks),
    "bias": "none",
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
  }
  packed = {f"unet.{field}": value for field, value in described.items()}
  return arrays, {PEFT_CONFIG: json.dumps(packed, indent=2, sort_keys=True)}


def _kohya(
  layout: lora.Layout,
  delta: Mapping[str, np.ndarray],
  config: Mapping[str, Any],
  dtype: Any,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  # kohya's scripts train SDXL on Stability's own network, and 1.x on diffusers'.
  xl = config.get("addition_embed_type") == "text_time"
  spell = lora_names.to_sgm(config) if xl else str
  arrays, ranks, alphas = {}, {}, {}
  for module, a, b, alpha in _in_files(layout, delta, dtype):
    key = lora_names.kohya(spell(module))
    arrays[f"{key}.lora_down.weight"] = a
    arrays[f"{key}.lora_up.weight"] = b
    arrays[f"{key}.alpha"] = np.asarray(alpha, np.float32)
    ranks[module], alphas[module] = a.shape[0], alpha
  header = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": str(_most_common(ranks)),
    "ss_network_alpha": str(_most_common(alphas)),
  }
  return arrays, header


def _most_common(values: Mapping[str, Any]) -> Any:
  return Counter(values.values()).most_common(1)[0][0]


def _number(value: float) -> float | int:
  return int(value) if value == int(value) else value


STYLES = {"peft": _peft, "kohya": _kohya}


def fingerprint(path: Path) -> str:
  """Identifies a LoRA file by its bytes: 16 hex digits of a SHA-256."""
  digest = hashlib.sha256()
  with open(find(path), "rb") as stream:
    while chunk := stream.read(1 << 20):
      digest.update(chunk)
  return digest.hexdigest()[:16]
