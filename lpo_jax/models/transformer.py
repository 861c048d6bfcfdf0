"""Transformer blocks over the pixels of a feature map, attending to text and user."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from lpo_jax.models import layers
from lpo_jax.models.base import Settings, Stack
from lpo_jax.models.users import UserProjections
from lpo_jax.types import Array


class Context(NamedTuple):
  """What cross-attention looks at.

  Attributes:
    text: [N, L, D] text states.
    user: [N, T, E] a user's tokens; None in a network that knows no users.
  """

  text: Array
  user: Array | None = None


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


class CrossAttention(layers.Attention):
  """Attention to the text, plus attention of the same queries to a user's tokens.

  softmax(q k^T / sqrt(d)) v + softmax(q k'^T / sqrt(d)) v'

  The two are not one attention over all tokens: with v' = 0 the sum is the first term to
  the last bit, whoever the user is.

  Reference: Ye et al. 2023 (IP-Adapter), equation 5; Dang et al. 2025 (PPD).
  """

  def __init__(
    self,
    channels: int,
    context: int,
    heads: int,
    settings: Settings,
    user: int | None = None,
  ):
    super().__init__(channels, context, heads, settings)
    if user:
      self.processor = UserProjections(channels, user, settings.dtype)

  def __call__(self, x: Array, context: Context) -> Array:
    q = self.split(self.to_q(x))
    text, user = context.text, context.user
    y = self.attend(q, self.split(self.to_k(text)), self.split(self.to_v(text)))
    if hasattr(self, "processor"):
      k, v = self.processor.to_k_ip[0], self.processor.to_v_ip[0]
      y = y + self.attend(q, self.split(k(user)), self.split(v(user)))
    return self.to_out[0](y.reshape(x.shape))


class TransformerBlock(nnx.Module):
  """Attention to itself, to text and user, and a feed-forward layer."""

  def __init__(
    self,
    channels: int,
    context: int,
    heads: int,
    settings: Settings,
    user: int | None = None,
  ):
    dtype = settings.dtype
    self.norm1 = layers.LayerNorm(channels, dtype=dtype)
    self.attn1 = layers.Attention(channels, channels, heads, settings)
    self.norm2 = layers.LayerNorm(channels, dtype=dtype)
    self.attn2 = CrossAttention(channels, context, heads, settings, user)
    self.norm3 = layers.LayerNorm(channels, dtype=dtype)
    self.ff = FeedForward(channels, dtype)

  def __call__(self, x: Array, context: Context) -> Array:
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
    user: int | None = None,
  ):
    dtype = settings.dtype
    if linear:
      project = functools.partial(layers.Linear, channels, channels, dtype=dtype)
    else:
      project = functools.partial(layers.Conv, channels, channels, size=1, dtype=dtype)
    self.norm = layers.GroupNorm(channels, groups=groups, eps=1e-6, dtype=dtype)
    self.proj_in = project()
    make = functools.partial(TransformerBlock, channels, context, heads, settings, user)
    # One block, as in Stable Diffusion 1 and 2, is no stack.
    if depth == 1:
      self.transformer_blocks = nnx.List([make()])
    else:
      self.transformer_blocks = Stack(make, depth, settings)
    self.proj_out = project()
    self.settings = settings

  def __call__(self, x: Array, context: Context) -> Array:
    y = self.proj_in(self.norm(x))
    y = y.reshape(x.shape[0], -1, x.shape[-1])
    if isinstance(self.transformer_blocks, Stack):
      y = self.transformer_blocks(y, context)
    else:
      y = self.settings.block(self.transformer_blocks[0].__call__)(y, context)
    return x + self.proj_out(y.reshape(x.shape))
