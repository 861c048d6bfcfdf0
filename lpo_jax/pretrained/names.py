"""THE name table: how parameters lie in the files of diffusers and transformers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from lpo_jax import trees

# The last word of a name, here -> in the file. All other words are the same.
SUFFIXES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
  "class_embedding": "class_embedding",
  "cls_token": "cls_token",
  "pos_embed": "pos_embed",
  "position_embeddings": "position_embeddings",
  "logit_scale": "logit_scale",
}

# Which axis of the file each of our axes is, by rank: torch holds OIHW and [out, in].
KERNEL_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}

# Names that older files have -> the names of today, by class.
OLD_NAMES: dict[str, tuple[tuple[str, str | Callable[[re.Match], str]], ...]] = {
  "AutoencoderKL": (
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
  ),
  "CLIPTextModel": ((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
  "CLIPTextModelWithProjection": (),
  "CLIPVisionModel": (
    (r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_model.\1."),
  ),
  "CLIPVisionModelWithProjection": (),
  "CLIPModel": (),
  "ViTModel": (  # of before transformers 5, as the files on the Hub are
    (r"^vit\.", ""),
    (r"^encoder\.layer\.(\d+)\.", r"layers.\1."),
    (
      r"\.attention\.attention\.(query|key|value)\.",
      lambda m: f".attention.{m[1][0]}_proj.",
    ),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
  ),
}
# Constants that older versions of transformers stored.
IGNORED = re.compile(r"(^|\.)position_ids$")


@dataclasses.dataclass(frozen=True)
class Stored:
  """How one parameter lies in a file: one tensor, or one for each block of a stack.

  Attributes:
    names: of the tensors, one per block.
    shape: of each of them in the file.
    axes: which axis of a tensor each axis of the parameter (of one block) is.
    is_stacked: whether the parameter's first axis is the block.
  """

  names: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[int, ...]
  is_stacked: bool

  def from_file(self, array: np.ndarray) -> np.ndarray:
    """Turns one tensor of the file, or the same slice of all its axes, to our order."""
    return np.asarray(array.transpose(self.axes), order="C")

  def to_file(self, array: np.ndarray) -> np.ndarray:
    """Turns one block's parameter to the order of the file."""
    return np.asarray(array.transpose(np.argsort(self.axes)), order="C")


def stored(name: str, shape: tuple[int, ...]) -> Stored:
  """Looks a parameter up.

  Args:
    name: dotted, with `trees.EACH` in place of a number where blocks are stacked.
    shape: of the parameter.

  >>> stored("down_blocks.0.resnets.1.conv1.kernel", (3, 3, 4, 8)).names
  ('down_blocks.0.resnets.1.conv1.weight',)
  >>> stored("encoder.layers.each.mlp.fc1.kernel", (2, 8, 16)).names
  ('encoder.layers.0.mlp.fc1.weight', 'encoder.layers.1.mlp.fc1.weight')
  """
  is_stacked = trees.is_stacked(name)
  inner = shape[1:] if is_stacked else shape
  parent, _, kind = name.rpartition(".")
  axes = KERNEL_AXES[len(inner)] if kind == "kernel" else tuple(range(len(inner)))
  return Stored(
    tuple(
      ".".join([*filter(None, [each]), SUFFIXES[kind]])
      for each in trees.block_names(parent, shape)
    ),
    tuple(inner[axes.index(axis)] for axis in range(len(inner))),
    axes,
    is_stacked,
  )


def todays_name(old: str, kind: str) -> str:
  """Returns the name that a tensor of an older file has now, for its class `kind`."""
  for pattern, replacement in OLD_NAMES.get(kind, ()):
    old = re.sub(pattern, replacement, old)
  return old
