"""CLIP's image encoders, with and without their projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lpo_jax.errors import UserError
from lpo_jax.models import layers
from lpo_jax.models.base import Model, Settings
from lpo_jax.models.clip import Encoder, tower_fields
from lpo_jax.types import Array, Params

DEFAULTS: dict[str, Any] = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "projection_dim": 512,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_channels": 3,
  "image_size": 224,
  "patch_size": 32,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionOutput:
  """What an image encoder says about an image.

  Attributes:
    last_hidden_state: [N, 1 + patches, D] the last layer's output, before any norm; the
      class token is the first.
    pooled: [N, D] the class token after the final norm; [N, P] projected where the class
      has a projection.
  """

  last_hidden_state: Array
  pooled: Array


class Embeddings(nnx.Module):
  """A class token and the patches of the image, plus their places."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    channels, patch = fields["hidden_size"], fields["patch_size"]
    places = (fields["image_size"] // patch) ** 2 + 1
    self.class_embedding = layers.param(channels, used_as=dtype)
    self.patch_embedding = layers.Conv(
      fields["num_channels"],
      channels,
      size=patch,
      stride=patch,
      padding=(0, 0),
      bias=False,
      dtype=dtype,
    )
    self.position_embedding = layers.Embedding(places, channels, dtype=dtype)

  def __call__(self, images: Array) -> Array:
    patches = self.patch_embedding(images)
    count, channels = patches.shape[0], patches.shape[-1]
    first = self.class_embedding[...].astype(patches.dtype)
    first = jnp.broadcast_to(first, (count, 1, channels))
    tokens = jnp.concatenate([first, patches.reshape(count, -1, channels)], axis=1)
    return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class VisionTransformer(nnx.Module):
  """Everything but the projection."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    channels, eps = fields["hidden_size"], fields["layer_norm_eps"]
    self.embeddings = Embeddings(fields, settings.dtype)
    # transformers' files spell it so.
    self.pre_layrnorm = layers.LayerNorm(channels, eps=eps, dtype=settings.dtype)
    self.encoder = Encoder(fields, settings, is_causal=False)
    self.post_layernorm = layers.LayerNorm(channels, eps=eps, dtype=jnp.float32)

  def __call__(self, images: Array) -> VisionOutput:
    x = self.pre_layrnorm(self.embeddings(images))
    last = self.encoder(x)[-1].astype(jnp.float32)
    return VisionOutput(last, self.post_layernorm(last[:, 0]))


class CLIPVision(nnx.Module):
  """The encoder under the names that the files have."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings, projects: bool):
    self.vision_model = VisionTransformer(fields, settings)
    if projects:
      self.visual_projection = layers.Linear(
        fields["hidden_size"], fields["projection_dim"], bias=False, dtype=jnp.float32
      )

  def __call__(self, images: Array) -> VisionOutput:
    output = self.vision_model(images)
    if not hasattr(self, "visual_projection"):
      return output
    return dataclasses.replace(output, pooled=self.visual_projection(output.pooled))


class VisionEncoder(Model):
  """Turns prepared images into states, one per patch, and a pooled one."""

  def apply(self, params: Params, images: Array) -> VisionOutput:
    """Runs the encoder.

    Args:
      params: nested dict in the shape of `abstract_params`.
      images: [N, H, W, 3], resized to the config's `image_size` and normalised as the
        folder's `preprocessor_config.json` says.

    Returns:
      The states, in fp32.

    Raises:
      UserError: images of another size.
    """
    check_size(images, self.config)
    run = self.settings.whole(lambda params, x: self.bind(params)(x))
    return run(params, images)


def check_size(images: Array, config: Mapping[str, Any]) -> None:
  """Refuses images that the position table has no places for.

  Raises:
    UserError: they are not of the size that the config says.
  """
  size = config.get("image_size", DEFAULTS["image_size"])
  if tuple(images.shape[1:3]) != (size, size):
    raise UserError(
      f"the image encoder takes images of {size}x{size} pixels, came "
      f"{images.shape[1]}x{images.shape[2]}: resize and crop them first."
    )


def vision_fields(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """Completes the fields of a `CLIPVisionConfig`.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  fields = tower_fields(config, DEFAULTS, kind)
  for name in ("image_size", "patch_size"):
    if not isinstance(fields[name], int):
      raise UserError(
        f"{kind} config field {name!r} is {fields[name]!r}; implemented: one int."
      )
  return fields


def build(config: Mapping[str, Any], settings: Settings) -> VisionEncoder:
  """Derives an image encoder's structure from its config.

  Args:
    config: the fields of a transformers `CLIPVisionConfig`; `architectures` decides
      whether there is a projection.
    settings: how to compute.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  kind = config["architectures"][0]
  fields = vision_fields(config, kind)
  projects = kind == "CLIPVisionModelWithProjection"
  return VisionEncoder.of(
    lambda: CLIPVision(fields, settings, projects), config, settings
  )
