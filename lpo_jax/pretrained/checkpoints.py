"""Networks in single files, as their authors published them: names, layouts, identity.

A file is safetensors, or what `torch.save` wrote (see `pickles`). Inside, names are those
of transformers, of open_clip, or of ImageReward; here all become the names that `names`
knows, and from there on everything is as for a folder of transformers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpo_jax import models
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.pretrained import files, folders, hub, names
from lpo_jax.pretrained.pickles import Tensor, state_dict
from lpo_jax.types import Params

Path = str | os.PathLike
TORCH = (".pt", ".pth", ".bin", ".ckpt")

# Fetched with the weights: configs, and what tokenizers read.
BESIDE = ("*.json", "*.txt")

# What open_clip calls an architecture, in the fields of its own config files.
OPEN_CLIP: dict[str, dict[str, Any]] = {
  "ViT-H-14": {
    "embed_dim": 1024,
    "vision_cfg": {"width": 1280, "layers": 32, "head_width": 80, "patch_size": 14},
    "text_cfg": {"width": 1024, "layers": 24, "heads": 16},
  },
  "ViT-B-32-quickgelu": {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"width": 768, "layers": 12, "head_width": 64, "patch_size": 32},
    "text_cfg": {"width": 512, "layers": 12, "heads": 8},
  },
  "ViT-L-14-quickgelu": {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"width": 1024, "layers": 24, "head_width": 64, "patch_size": 14},
    "text_cfg": {"width": 768, "layers": 12, "heads": 12},
  },
}
OPEN_CLIP_CONFIG = "open_clip_config.json"

# Names of open_clip -> names of transformers, after "visual." or nothing.
_TOWER = (
  (r"^class_embedding$", "embeddings.class_embedding"),
  (r"^positional_embedding$", "embeddings.position_embedding.weight"),
  (r"^conv1\.weight$", "embeddings.patch_embedding.weight"),
  (r"^token_embedding\.weight$", "embeddings.token_embedding.weight"),
  (r"^ln_pre\.", "pre_layrnorm."),
  (r"^ln_post\.", "post_layernorm."),
  (r"^ln_final\.", "final_layer_norm."),
  (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
  (r"\.ln_([12])\.", r".layer_norm\1."),
  (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
  (r"\.mlp\.c_fc\.", ".mlp.fc1."),
  (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
# Used as x @ P there, and as a linear layer here.
_PROJECTIONS = {
  "visual.proj": "visual_projection.weight",
  "text_projection": "text_projection.weight",
}
# Of a ViT, what comes after its states.
_NO_STATES = re.compile(r"^(vit\.)?pooler\.|^classifier\.")
# Buffers, and BLIP's own heads for other tasks, which ImageReward's file still has.
_UNUSED = re.compile(r"(^|\.)(attn_mask|position_ids)$|^blip\.(vision|text)_proj\.")


class Weights:
  """The tensors of one network by the names that `names` knows, read when asked for."""

  def __init__(self, tensors: Mapping[str, Tensor]):
    self.tensors = dict(tensors)

  def names(self) -> list[str]:
    return sorted(self.tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.tensors[name].shape

  def array(self, name: str) -> np.ndarray:
    return self.tensors[name].read()

  def slices(self, name: str) -> np.ndarray:
    return self.array(name)  # pages of the file that no slice touches are not read


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
  """A network whose weights are found and not yet read.

  Attributes:
    file: where they are.
    config: the fields that `models.build` takes.
    weights: by today's names.
  """

  file: pathlib.Path
  config: Mapping[str, Any]
  weights: Weights

  def load(self, model: models.Model, *, sharding: folders.Placement = None) -> Params:
    """Reads the parameters in fp32.

    Raises:
      UserError: a tensor that is missing, unexpected or of another shape, by name.
    """
    return folders.read_params(
      self.weights, model, str(self.file), dtype=jnp.float32, sharding=sharding
    )

  def fingerprint(self) -> str:
    """Identifies the tensors: the same ones in another format have the same.

    Returns:
      16 hex digits of a SHA-256.
    """
    return fingerprint(self.weights.tensors)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
  """Identifies tensors by name, dtype, shape and values: 16 hex digits of a SHA-256."""
  digest = hashlib.sha256()
  for name in sorted(tensors):
    tensor = tensors[name]
    digest.update(f"{name} {tensor.dtype.name} {tensor.shape}".encode())
    data = np.ascontiguousarray(tensor.read()).reshape(-1)
    digest.update(data.view(np.uint8).data)
  return digest.hexdigest()[:16]


def locate(path: Path, alternatives: Sequence[str]) -> pathlib.Path:
  """Finds a file of weights.

  Args:
    path: the file, or a folder or an id on the Hub that has one of `alternatives`.
    alternatives: names, the best first.

  Raises:
    UserError: there is none, or it cannot be fetched.
  """
  file = pathlib.Path(path)
  if file.is_file():
    return file
  folder = hub.folder_with(path, alternatives, BESIDE)
  return next(folder / name for name in alternatives if (folder / name).is_file())


def read_file(file: pathlib.Path) -> dict[str, Tensor]:
  """Reads the names, shapes and dtypes in a file, and its tensors when asked for.

  Raises:
    UserError: neither safetensors nor torch's, broken, or a pickle of more than tensors.
  """
  if file.suffix in TORCH:
    return state_dict(file)
  if file.suffix != ".safetensors":
    raise UserError(
      f"{file}: expected a file of weights that ends in .safetensors or "
      f"{', '.join(TORCH)}."
    )
  from safetensors import SafetensorError, safe_open

  try:
    handle = safe_open(file, framework="numpy")
    found = {}
    for name in handle.keys():  # noqa: SIM118 (not a dict)
      part = handle.get_slice(name)
      dtype = _SAFETENSORS.get(part.get_dtype())
      if dtype is None:
        raise UserError(f"{file}: tensor {name!r} is of unknown {part.get_dtype()}.")
      found[name] = Tensor(
        tuple(part.get_shape()),
        jnp.dtype(dtype),
        lambda name=name: handle.get_tensor(name),
      )
  except SafetensorError as error:
    raise UserError(
      f"{file} is not a readable safetensors file ({error}). It may be cut short, or a "
      "git-lfs pointer: fetch it again."
    ) from None
  return found


_SAFETENSORS = {
  **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
  **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
  "BOOL": "bool",
}


def clip(path: Path, alternatives: Sequence[str], architecture: str) -> Checkpoint:
  """Finds both towers of CLIP, in transformers' layout or in open_clip's.

  Args:
    path: see `locate`.
    alternatives: see `locate`.
    architecture: a name of `OPEN_CLIP`: what the file is of when there is no config
      beside it. One that is there (`open_clip_config.json`, or transformers'
      `config.json`) counts.

  Raises:
    UserError: see `locate` and `read_file`; or names of neither layout.
  """
  if architecture not in OPEN_CLIP:
    raise unknown_name("CLIP architecture", architecture, OPEN_CLIP)
  file = locate(path, alternatives)
  found = read_file(file)
  if "visual.conv1.weight" in found:
    beside = file.parent / OPEN_CLIP_CONFIG
    fields = OPEN_CLIP[architecture]
    if beside.is_file():
      fields = files.read_json(beside)
      fields = fields.get("model_cfg", fields)
    return Checkpoint(file, clip_config(fields), Weights(from_open_clip(found)))
  if "vision_model.embeddings.patch_embedding.weight" not in found:
    raise UserError(
      f"{file} is no CLIP of transformers or open_clip: expected "
      "'vision_model.embeddings.patch_embedding.weight' or 'visual.conv1.weight' among "
      f"its tensors, came {sorted(found)[:4]} and {max(len(found) - 4, 0)} more."
    )
  config = clip_config(OPEN_CLIP[architecture])
  if (file.parent / "config.json").is_file():
    config = {**files.read_json(file.parent / "config.json")}
    config["architectures"] = ["CLIPModel"]
  return Checkpoint(file, config, Weights(_used(found)))


def vit(path: Path, alternatives: Sequence[str]) -> Checkpoint:
  """Finds a vision transformer in transformers' layout, with or without a pooler.

  Raises:
    UserError: see `locate` and `read_file`; or no `config.json` beside the weights.
  """
  file = locate(path, alternatives)
  config = {**files.read_json(file.parent / "config.json")}
  config["architectures"] = ["ViTModel"]
  found = {
    names.todays_name(name, "ViTModel"): tensor
    for name, tensor in _used(read_file(file)).items()
    if not _NO_STATES.search(name)
  }
  return Checkpoint(file, config, Weights(found))


def clip_config(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Turns the fields of an open_clip config into those of a transformers `CLIPConfig`.

  >>> clip_config(OPEN_CLIP["ViT-H-14"])["vision_config"]["num_attention_heads"]
  16

  Raises:
    UserError: towers that are no plain transformers.
  """
  vision, text = dict(fields["vision_cfg"]), dict(fields["text_cfg"])
  if not isinstance(vision["layers"], int) or "timm_model_name" in vision:
    raise UserError(
      "the open_clip config has a vision tower that is no ViT; implemented: ViT."
    )
  activation = "quick_gelu" if fields.get("quick_gelu") else "gelu"
  vocabulary = text.get("vocab_size", 49408)
  heads = text.get("heads", 8)

  def tower(own: Mapping[str, Any], heads: int) -> dict[str, Any]:
    return {
      "hidden_size": own["width"],
      "intermediate_size": int(own["width"] * own.get("mlp_ratio", 4)),
      "num_hidden_layers": own["layers"],
      "num_attention_heads": heads,
      "hidden_act": activation,
      "layer_norm_eps": 1e-5,
      "projection_dim": fields["embed_dim"],
    }

  return {
    "architectures": ["CLIPModel"],
    "projection_dim": fields["embed_dim"],
    "vision_config": {
      **tower(vision, vision["width"] // vision.get("head_width", 64)),
      "image_size": vision.get("image_size", 224),
      "patch_size": vision["patch_size"],
    },
    "text_config": {
      **tower(text, heads),
      "vocab_size": vocabulary,
      "max_position_embeddings": text.get("context_length", 77),
      "eos_token_id": vocabulary - 1,
    },
  }


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Gives the tensors of an open_clip file transformers' names and layout.

  q, k and v are cut out of `in_proj`; both projections are transposed.
  """
  found: dict[str, Tensor] = {}
  for name, tensor in _used(tensors).items():
    name = name.removeprefix("text.")  # files of CustomTextCLIP have it
    if name == "logit_scale":
      found[name] = tensor._replace(
        shape=(), read=lambda t=tensor: t.read().reshape(())
      )
    elif name in _PROJECTIONS:
      found[_PROJECTIONS[name]] = Tensor(
        tensor.shape[::-1], tensor.dtype, lambda t=tensor: t.read().T
      )
    else:
      tower = "vision_model" if name.startswith("visual.") else "text_model"
      inner = name.removeprefix("visual.")
      for pattern, replacement in _TOWER:
        inner = re.sub(pattern, replacement, inner)
      found |= _split(f"{tower}.{inner}", tensor)
  return found


def _split(name: str, tensor: Tensor) -> dict[str, Tensor]:
  """Cuts a fused projection in three; anything else stays whole."""
  match = re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name)
  if match is None:
    return {name: tensor}
  third = tensor.shape[0] // 3
  return {
    f"{match[1]}.self_attn.{letter}_proj.{match[2]}": Tensor(
      (third, *tensor.shape[1:]),
      tensor.dtype,
      lambda first=i * third: tensor.read()[first : first + third],
    )
    for i, letter in enumerate("qkv")
  }


def _used(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
  return {
    name: tensor
    for name, tensor in tensors.items()
    if not _UNUSED.search(name) and not names.IGNORED.search(name)
  }


def image_reward(path: Path, alternatives: Sequence[str]) -> Checkpoint:
  """Finds ImageReward: both towers and the head, under the names of its file.

  A `config.json` of architecture "ImageReward" beside it gives other sizes than the
  published ones.

  Raises:
    UserError: see `locate` and `read_file`.
  """
  file = locate(path, alternatives)
  config: dict[str, Any] = {"architectures": ["ImageReward"]}
  beside = file.parent / "config.json"
  if beside.is_file():
    fields = files.read_json(beside)
    if fields.get("architectures") == config["architectures"]:
      config = fields
  return Checkpoint(file, config, Weights(_used(read_file(file))))


@dataclasses.dataclass(frozen=True, eq=False)
class LinearHead:
  """Linear layers with nothing between them: one vector and one number.

  Attributes:
    weight: [D] fp64.
    bias: a number.
    identity: of the layers' tensors.
  """

  weight: np.ndarray
  bias: float
  identity: str


def linear_head(path: Path, alternatives: Sequence[str]) -> LinearHead:
  """Reads a head on CLIP's image embeddings, of one linear layer or of several.

  Args:
    path: see `locate`.
    alternatives: see `locate`.

  Raises:
    UserError: see `locate` and `read_file`; layers that do not fit each other, or that
      had activations between them in training.
  """
  file = locate(path, alternatives)
  found = read_file(file)
  weight, bias = None, np.zeros(0)
  for layer in _in_order(found, file):
    try:
      kernel, shift = found[f"{layer}weight"], found[f"{layer}bias"]
    except KeyError as error:
      raise UserError(f"{file} is no head: tensor {error} is missing.") from None
    first = weight is None
    fits = len(kernel.shape) == 2 and (first or kernel.shape[1] == len(bias))
    if not fits or shift.shape != kernel.shape[:1]:
      raise UserError(
        f"{file}: layer {layer!r} has weights {kernel.shape} and biases {shift.shape} "
        f"after {len(bias)} numbers. Fetch the file again."
      )
    matrix, shift = (part.read().astype(np.float64) for part in (kernel, shift))
    bias = shift if first else matrix @ bias + shift
    weight = matrix if first else matrix @ weight
  if len(bias) != 1:
    raise UserError(f"{file} gives {len(bias)} numbers an image; expected one score.")
  return LinearHead(weight[0], float(bias[0]), fingerprint(found))


def _in_order(tensors: Iterable[str], file: pathlib.Path) -> list[str]:
  """The prefixes of a head's layers, first to last."""
  prefixes = {name.removesuffix("weight").removesuffix("bias") for name in tensors}
  if prefixes == {""}:
    return [""]
  numbers = [re.fullmatch(r"layers\.(\d+)\.", prefix) for prefix in prefixes]
  if not numbers or not all(numbers):
    raise UserError(
      f"{file} is no aesthetic head: expected 'weight' and 'bias', or 'layers.N.weight' "
      f"and 'layers.N.bias', came {sorted(tensors)[:4]}."
    )
  order = sorted(int(match[1]) for match in numbers if match)
  # Linear, Dropout, Linear, Dropout, Linear, Dropout, Linear, Linear. A network with
  # activations between has other numbers.
  if order != [0, 2, 4, 6, 7]:
    raise UserError(
      f"{file} has layers {order}; expected [0, 2, 4, 6, 7], which have no activations "
      "between them. Use the file that ends in linearMSE.pth."
    )
  return [f"layers.{number}." for number in order]
