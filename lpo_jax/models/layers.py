"""The layers all models are made of: NHWC, fp32 parameters, diffusers' names."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lpo_jax.models.attention import attend, precision
from lpo_jax.models.base import Settings
from lpo_jax.parallel import gather, gathered_product
from lpo_jax.types import Array


def param(*shape: int, used_as: Any = jnp.float32) -> nnx.Param:
  """Makes a parameter that the module casts to `used_as` before any arithmetic."""
  # Modules are only ever made under `nnx.eval_shape`: nothing is allocated. For what
  # `used_as` is good, see `Model.narrow`.
  return nnx.Param(jnp.zeros(shape, jnp.float32), used_as=jnp.dtype(used_as))


def _exact_matmul(x: Array, y: Array) -> Array:
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


class Linear(nnx.Module):
  """x W + b over the last axis."""

  def __init__(self, inputs: int, outputs: int, *, bias: bool = True, dtype: Any):
    self.kernel = param(inputs, outputs, used_as=dtype)
    self.bias = param(outputs) if bias else None
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: Array) -> Array:
    product = functools.partial(jnp.matmul, precision=precision(self.dtype))
    x = x.astype(self.dtype)
    y = gathered_product(product, x, self.kernel[...], self.dtype)
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Conv(nnx.Module):
  """A square convolution with explicit padding, as torch pads."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    size: int = 3,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    bias: bool = True,
    dtype: Any,
  ):
    self.kernel = param(size, size, inputs, outputs, used_as=dtype)
    self.bias = param(outputs) if bias else None
    self.stride = stride
    self.padding = (size // 2, size // 2) if padding is None else padding
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: Array) -> Array:
    x = x.astype(self.dtype)
    y = gathered_product(self._convolve, x, self.kernel[...], self.dtype)
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)

  def _convolve(self, x: Array, kernel: Array) -> Array:
    if kernel.shape[:2] == (1, 1) and self.stride == 1:
      return jnp.matmul(x, kernel[0, 0], precision=precision(self.dtype))
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      window_strides=(self.stride, self.stride),
      padding=(self.padding, self.padding),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=precision(self.dtype),
    )


class GroupNorm(nnx.Module):
  """Normalises over space and the channels of a group, in fp32.

  (x - mean) / sqrt(mean (x - mean)^2 + eps) * scale + bias
  """

  def __init__(self, channels: int, *, groups: int, eps: float, dtype: Any):
    self.scale = param(channels)
    self.bias = param(channels)
    self.groups = groups
    self.eps = eps
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: Array) -> Array:
    batch, channels = x.shape[0], x.shape[-1]
    group = jnp.arange(channels)[:, None] // (channels // self.groups)
    member = (group == jnp.arange(self.groups)).astype(jnp.float32)

    def group_mean(y: Array) -> Array:
      # Channels first, then the members of a group by a small product: reducing over
      # an axis of a few channels is 3 to 4 times slower on CPU.
      y = _exact_matmul(y.mean(1), member * (self.groups / channels))
      return _exact_matmul(y, member.T)[:, None]

    y = x.astype(jnp.float32).reshape(batch, -1, channels)
    # The mean of squares minus the squared mean would cancel where the mean is large.
    y = y - group_mean(y)
    y = y * (jax.lax.rsqrt(group_mean(jnp.square(y)) + self.eps) * self.scale[...])
    return (y + self.bias[...]).reshape(x.shape).astype(self.dtype)


class LayerNorm(nnx.Module):
  """Normalises over the last axis, in fp32."""

  def __init__(self, channels: int, *, eps: float = 1e-5, dtype: Any):
    self.scale = param(channels)
    self.bias = param(channels)
    self.eps = eps
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: Array) -> Array:
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + self.eps)
    return (normal * self.scale[...] + self.bias[...]).astype(self.dtype)


class Embedding(nnx.Module):
  """A table of vectors looked up by number."""

  def __init__(self, count: int, channels: int, *, dtype: Any):
    self.embedding = param(count, channels, used_as=dtype)
    self.dtype = jnp.dtype(dtype)

  def __call__(self, indices: Array) -> Array:
    return gather(self.embedding[...])[indices].astype(self.dtype)


class Nothing(nnx.Module):
  """Holds a place in a list where torch has a dropout."""

  def __call__(self, x: Array) -> Array:
    return x


def silu(x: Array) -> Array:
  """x sigmoid(x)."""
  return jax.nn.silu(x)


def gelu(x: Array) -> Array:
  """x Phi(x), with the exact error function."""
  # `jax.nn.gelu` asks for erfc, which is twice as slow on CPU.
  return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x: Array) -> Array:
  """x sigmoid(1.702 x), the approximation of CLIP's first text encoders."""
  return x * jax.nn.sigmoid(1.702 * x)


def split_heads(x: Array, heads: int) -> Array:
  """Views [N, L, C] as [N, L, heads, C / heads]."""
  return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class Attention(nnx.Module):
  """Multi-head attention of one sequence to another, or to itself."""

  def __init__(
    self,
    channels: int,
    context: int,
    heads: int,
    settings: Settings,
    *,
    bias: bool = False,
  ):
    dtype = settings.dtype
    self.to_q = Linear(channels, channels, bias=bias, dtype=dtype)
    self.to_k = Linear(context, channels, bias=bias, dtype=dtype)
    self.to_v = Linear(context, channels, bias=bias, dtype=dtype)
    self.to_out = nnx.List([Linear(channels, channels, dtype=dtype)])
    self.heads = heads
    self.implementation = settings.attention

  def __call__(self, x: Array, context: Array) -> Array:
    q = self.split(self.to_q(x))
    y = self.attend(q, self.split(self.to_k(context)), self.split(self.to_v(context)))
    return self.to_out[0](y.reshape(x.shape))

  def split(self, x: Array) -> Array:
    """Views [N, L, C] as [N, L, heads, C / heads]."""
    return split_heads(x, self.heads)

  def attend(self, q: Array, k: Array, v: Array) -> Array:
    """Attention of all heads as the settings say it is computed."""
    return attend(q, k, v, implementation=self.implementation)


def sinusoidal_embedding(
  values: Array, channels: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Array:
  """Writes numbers as sines and cosines of geometric frequencies, in fp32.

  sin(v w_i), cos(v w_i) with w_i = 10000^(-i / (channels/2 - freq_shift))

  Args:
    values: [N] timesteps, or sizes in pixels.
    channels: of the result; an odd last one is 0.
    flip_sin_to_cos: whether the cosines come first.
    freq_shift: see the formula.

  Returns:
    [N, channels].
  """
  half = channels // 2
  exponents = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32)
  angles = values.astype(jnp.float32)[:, None] * jnp.exp(
    exponents / (half - freq_shift)
  )
  waves = [jnp.sin(angles), jnp.cos(angles)]
  embedding = jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, -1)
  return jnp.pad(embedding, ((0, 0), (0, channels % 2)))


def upsample_nearest(x: Array, height: int, width: int) -> Array:
  """Doubles height and width by repetition, then crops to the size asked for."""
  x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  return x[:, :height, :width]


class ResnetBlock(nnx.Module):
  """Two normalised convolutions around the time embedding, plus the input."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    embedding: int | None,
    groups: int,
    eps: float,
    dtype: Any,
    output_scale: float = 1.0,
  ):
    self.norm1 = GroupNorm(inputs, groups=groups, eps=eps, dtype=dtype)
    self.conv1 = Conv(inputs, outputs, dtype=dtype)
    if embedding is not None:
      self.time_emb_proj = Linear(embedding, outputs, dtype=dtype)
    self.norm2 = GroupNorm(outputs, groups=groups, eps=eps, dtype=dtype)
    self.conv2 = Conv(outputs, outputs, dtype=dtype)
    if inputs != outputs:
      self.conv_shortcut = Conv(inputs, outputs, size=1, dtype=dtype)
    self.output_scale = output_scale

  def __call__(self, x: Array, embedding: Array | None = None) -> Array:
    y = self.conv1(silu(self.norm1(x)))
    if embedding is not None:
      y = y + self.time_emb_proj(silu(embedding))[:, None, None, :]
    y = self.conv2(silu(self.norm2(y)))
    shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
    return (shortcut + y) / self.output_scale


class Downsample(nnx.Module):
  """Halves height and width with a strided convolution."""

  def __init__(self, channels: int, *, padding: tuple[int, int], dtype: Any):
    self.conv = Conv(channels, channels, stride=2, padding=padding, dtype=dtype)

  def __call__(self, x: Array) -> Array:
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles height and width by repetition, then convolves."""

  def __init__(self, channels: int, *, dtype: Any):
    self.conv = Conv(channels, channels, dtype=dtype)

  def __call__(self, x: Array, height: int, width: int) -> Array:
    return self.conv(upsample_nearest(x, height, width))
