"""Transformer blocks over the pixels of a feature map, attending to a text."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lpo_jax.models import layers
from lpo_jax.models.base import Settings, Stack
from lpo_jax.types import Array


class GatedProjection(nnx.Module):
  """GEGLU: one projection, half of it values and half of it gates."""

  def __init__(self, inputs: int, outputs: int, dtype: Any):
    self.proj = layers.Linear(inputs, 2 * outputs, dtype=dtype)

  def __call__(self, x: Array) -> Array:
    value, gate = jnp.split(self.proj(x), 2, axis=-1)
    return value * layers.gelu(gate)


class FeedForward(nnx.Module):
  """A gated layer four times as wide, and back."""

  def __init__(self, channels: int, dtype: Any):
    self.net = nnx.List(
      [
        GatedProjection(channels, 4 * channels, dtype),
        layers.Nothing(),
        layers.Linear(4 * channels, channels, dtype=dtype),
      ]
    )

  def __call__(self, x: Array) -> Array:
    return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
  """Attention to itself, attention to the text, and a feed-forward layer."""

  def __init__(self, channels: int, context: int, heads: int, settings: Settings):
    dtype = settings.dtype
    self.norm1 = layers.LayerNorm(channels, dtype=dtype)
    self.attn1 = layers.Attention(channels, channels, heads, settings)
    self.norm2 = layers.LayerNorm(channels, dtype=dtype)
    self.attn2 = layers.Attention(channels, context, heads, settings)
    self.norm3 = layers.LayerNorm(channels, dtype=dtype)
    self.ff = FeedForward(channels, dtype)

  def __call__(self, x: Array, context: Array) -> Array:
    y = self.norm1(x)
    x = x + self.attn1(y, y)
    x = x + self.attn2(self.norm2(x), context)
    return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
  """Transformer blocks over the pixels of a feature map."""

  def __init__(
    self,
    channels: int,
    context: int,
    heads: int,
    depth: int,
    *,
    groups: int,
    linear: bool,
    settings: Settings,
  ):
    dtype = settings.dtype
    if linear:
      project = functools.partial(layers.Linear, channels, channels, dtype=dtype)
    else:
      project = functools.partial(layers.Conv, channels, channels, size=1, dtype=dtype)
    self.norm = layers.GroupNorm(channels, groups=groups, eps=1e-6, dtype=dtype)
    self.proj_in = project()
    make = functools.partial(TransformerBlock, channels, context, heads, settings)
    # One block, as in Stable Diffusion 1 and 2, is no stack.
    if depth == 1:
      self.transformer_blocks = nnx.List([make()])
    else:
      self.transformer_blocks = Stack(make, depth, settings)
    self.proj_out = project()
    self.settings = settings

  def __call__(self, x: Array, context: Array) -> Array:
    y = self.proj_in(self.norm(x))
    y = y.reshape(x.shape[0], -1, x.shape[-1])
    if isinstance(self.transformer_blocks, Stack):
      y = self.transformer_blocks(y, context)
    else:
      y = self.settings.block(self.transformer_blocks[0].__call__)(y, context)
    return x + self.proj_out(y.reshape(x.shape))
