"""A plain vision transformer, as DINO trained it: images as vectors of what is in them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lpo_jax.models import layers
from lpo_jax.models.attention import attend
from lpo_jax.models.base import Model, Settings, Stack
from lpo_jax.models.clip import FeedForward, tower_fields
from lpo_jax.models.clip_vision import check_size
from lpo_jax.types import Array, Params

KIND = "ViTModel"
# transformers' ViTConfig; DINO's ViT-S/16 has 384 channels, 6 heads and a width of 1536.
DEFAULTS: dict[str, Any] = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_channels": 3,
  "image_size": 224,
  "patch_size": 16,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "qkv_bias": True,
}


class PatchEmbeddings(nnx.Module):
  """Patches to vectors."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    patch = fields["patch_size"]
    self.projection = layers.Conv(
      fields["num_channels"],
      fields["hidden_size"],
      size=patch,
      stride=patch,
      padding=(0, 0),
      dtype=dtype,
    )

  def __call__(self, images: Array) -> Array:
    y = self.projection(images)
    return y.reshape(y.shape[0], -1, y.shape[-1])


class Embeddings(nnx.Module):
  """A class token and the patches of the image, plus their places."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    channels = fields["hidden_size"]
    places = (fields["image_size"] // fields["patch_size"]) ** 2 + 1
    self.cls_token = layers.param(1, 1, channels, used_as=dtype)
    self.position_embeddings = layers.param(1, places, channels, used_as=dtype)
    self.patch_embeddings = PatchEmbeddings(fields, dtype)

  def __call__(self, images: Array) -> Array:
    patches = self.patch_embeddings(images)
    first = self.cls_token[...].astype(patches.dtype)
    first = jnp.broadcast_to(first, (len(patches), 1, patches.shape[-1]))
    tokens = jnp.concatenate([first, patches], axis=1)
    return tokens + self.position_embeddings[...].astype(patches.dtype)


class Attention(nnx.Module):
  """Attention of all patches to all."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    channels, dtype = fields["hidden_size"], settings.dtype
    has_bias = fields["qkv_bias"]
    self.q_proj = layers.Linear(channels, channels, bias=has_bias, dtype=dtype)
    self.k_proj = layers.Linear(channels, channels, bias=has_bias, dtype=dtype)
    self.v_proj = layers.Linear(channels, channels, bias=has_bias, dtype=dtype)
    self.o_proj = layers.Linear(channels, channels, dtype=dtype)
    self.heads = fields["num_attention_heads"]
    self.implementation = settings.attention

  def __call__(self, x: Array) -> Array:
    projections = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (layers.split_heads(one(x), self.heads) for one in projections)
    y = attend(q, k, v, implementation=self.implementation)
    return self.o_proj(y.reshape(x.shape))


class Layer(nnx.Module):
  """Attention and a feed-forward layer, each behind a norm and added to its input."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    channels, eps = fields["hidden_size"], fields["layer_norm_eps"]
    self.attention = Attention(fields, settings)
    self.layernorm_before = layers.LayerNorm(channels, eps=eps, dtype=settings.dtype)
    self.mlp = FeedForward(fields, settings.dtype)
    self.layernorm_after = layers.LayerNorm(channels, eps=eps, dtype=settings.dtype)

  def __call__(self, x: Array) -> Array:
    x = x + self.attention(self.layernorm_before(x))
    return x + self.mlp(self.layernorm_after(x))


class ViT(nnx.Module):
  """The encoder under transformers' names."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    self.embeddings = Embeddings(fields, settings.dtype)
    make = functools.partial(Layer, fields, settings)
    self.layers = Stack(make, fields["num_hidden_layers"], settings)
    self.layernorm = layers.LayerNorm(
      fields["hidden_size"], eps=fields["layer_norm_eps"], dtype=jnp.float32
    )

  def __call__(self, images: Array) -> Array:
    last = self.layers.states(self.embeddings(images))[-1]
    return self.layernorm(last.astype(jnp.float32))


class VisionTransformer(Model):
  """Turns prepared images into states, the class token's first."""

  def apply(self, params: Params, images: Array) -> Array:
    """Runs the encoder.

    Args:
      params: nested dict in the shape of `abstract_params`.
      images: [N, H, W, 3], of the config's `image_size`, normalised.

    Returns:
      [N, 1 + patches, D] fp32 states after the final norm.

    Raises:
      UserError: images of another size.
    """
    check_size(images, {**DEFAULTS, **self.config})
    run = self.settings.whole(lambda params, x: self.bind(params)(x))
    return run(params, images)


def build(config: Mapping[str, Any], settings: Settings) -> VisionTransformer:
  """Derives the structure from its config.

  Args:
    config: the fields of a transformers `ViTConfig`.
    settings: how to compute.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  fields = tower_fields(config, DEFAULTS, KIND)
  return VisionTransformer.of(lambda: ViT(fields, settings), config, settings)
