"""Models by the name that their `config.json` carries."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models.attention import check_name
from lpo_jax.models.base import Model, Settings

__all__ = ["CLASSES", "Model", "Settings", "build", "class_name"]

CLASSES: dict[str, str] = {
  "UNet2DConditionModel": "unet",
  "AutoencoderKL": "vae",
  "CLIPTextModel": "clip",
  "CLIPTextModelWithProjection": "clip",
  "CLIPVisionModel": "clip_vision",
  "CLIPVisionModelWithProjection": "clip_vision",
  "CLIPModel": "clip_pair",
  "ViTModel": "vit",
  "ImageReward": "blip",
}


def class_name(config: Mapping[str, Any]) -> str:
  """Returns which class a `config.json` is of.

  Args:
    config: its fields; diffusers names the class in `_class_name`, transformers in
      `architectures`.

  Raises:
    UserError: no class is named.
  """
  name = config.get("_class_name") or (config.get("architectures") or [None])[0]
  if name is None:
    raise UserError(
      "the model config names no class: expected '_class_name' (diffusers) or "
      f"'architectures' (transformers), came only {sorted(config)[:8]}. Is this the "
      "config.json of a model?"
    )
  return name


def build(
  config: Mapping[str, Any],
  *,
  dtype: Any = jnp.float32,
  attention: str = "auto",
  remat: str = "none",
  scan: str = "stacks",
) -> Model:
  """Derives a model's structure from its config, without parameters.

  Args:
    config: the fields of a diffusers or transformers `config.json`; absent ones have
      the defaults these libraries give them.
    dtype: of the activations; parameters are fp32 and so is the output. With float32,
      products are exact to fp32 on accelerators too, at several times the cost.
    attention: a name of `attention.ATTENTION`, or "auto".
    remat: "none", "dots", "blocks" or "full"; see `Settings`.
    scan: "stacks" (equal blocks in a row are one loop) or "none".

  Returns:
    A UNet with `.apply`, an autoencoder with `.encode` and `.decode`, one tower of CLIP
    with `.apply`, both with `.embed_texts` and `.embed_images`, or ImageReward or a ViT
    with `.apply`.

  Raises:
    UserError: an unknown class, attention or remat, or a config field that is not
      implemented, by name.
  """
  name = class_name(config)
  if name not in CLASSES:
    raise unknown_name("model class", name, CLASSES)
  check_name(attention)
  module = importlib.import_module(f"lpo_jax.models.{CLASSES[name]}")
  return module.build(config, Settings(dtype, attention, remat, scan))
