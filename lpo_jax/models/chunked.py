"""Attention a block of scores at a time, forward and backward, as plain operations.

What is kept for the backward pass is the result and one number per query: the scores
are computed again, a block at a time, and never leave the cache of a processor's core
if a block fits. Keys run along the rows of a block and queries along its columns, so
that a softmax reduces over rows, and every product has its factors the way round that
CPU libraries are fast at.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lpo_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How the scores of [N, L, H, D] queries to [N, M, H, D] keys are cut into blocks.

  Attributes:
    heads: heads and images side by side in a block; divides N H.
    rows: queries in a block.
    is_causal: whether position i sees only positions up to i.
    precision: of the products.
  """

  heads: int
  rows: int
  is_causal: bool
  precision: jax.lax.Precision


def _product(tiling: Tiling, letters: str, a: Array, b: Array) -> Array:
  return jnp.einsum(
    letters, a, b, precision=tiling.precision, preferred_element_type=jnp.float32
  )


def _scores(tiling: Tiling, q: Array, k: Array, first: Array) -> Array:
  """[g, R, D] queries from place `first` on and [g, M, D] keys -> [g, M, R], fp32."""
  scores = _product(tiling, "gmd,grd->gmr", k, q) / math.sqrt(q.shape[-1])
  if not tiling.is_causal:
    return scores
  places = first + jnp.arange(q.shape[1])
  return jnp.where(jnp.arange(k.shape[1])[:, None] <= places, scores, -jnp.inf)


def _forward_block(
  tiling: Tiling, q: Array, k: Array, v: Array, first: Array
) -> tuple[Array, Array]:
  """Returns y [g, R, D] and the logarithm of each query's sum [g, R], fp32."""
  scores = _scores(tiling, q, k, first)
  largest = scores.max(1)
  weights = jnp.exp(scores - largest[:, None])
  # A column of ones beside the values: the same product gives the sums of the weights.
  values = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], -1)
  y = _product(
    tiling, "gdm,gmr->gdr", jnp.swapaxes(values, 1, 2), weights.astype(v.dtype)
  )
  total = y[:, -1]
  return jnp.swapaxes(y[:, :-1] / total[:, None], 1, 2), largest + jnp.log(total)


def _backward_block(
  tiling: Tiling,
  q: Array,
  k: Array,
  v: Array,
  y: Array,
  log_sum: Array,
  cotangent: Array,
  first: Array,
) -> tuple[Array, Array, Array]:
  """Returns the gradients of q [g, R, D], k and v [g, M, D], fp32."""
  weights = jnp.exp(_scores(tiling, q, k, first) - log_sum[:, None])
  by_weight = _product(tiling, "gmd,grd->gmr", v, cotangent)
  mean = (y * cotangent.astype(jnp.float32)).sum(-1)
  by_score = weights * (by_weight - mean[:, None]) / math.sqrt(q.shape[-1])
  by_score, weights = by_score.astype(q.dtype), weights.astype(v.dtype)
  by_q = _product(tiling, "gdm,gmr->gdr", jnp.swapaxes(k, 1, 2), by_score)
  by_k = _product(tiling, "gmr,grd->gmd", by_score, q)
  by_v = _product(tiling, "gmr,grd->gmd", weights, cotangent)
  return jnp.swapaxes(by_q, 1, 2), by_k, by_v


def _grouped(tiling: Tiling, x: Array) -> Array:
  """[N, L, H, D] -> [groups, heads of a group, L, D]."""
  batch, length, heads, width = x.shape
  count = batch * heads // tiling.heads
  return jnp.moveaxis(x, 2, 1).reshape(count, tiling.heads, length, width)


def _cut(tiling: Tiling, x: Array) -> Array:
  """[groups, g, L, ...] -> [groups, blocks, g, R, ...], padded with 0."""
  count = -(-x.shape[2] // tiling.rows)
  spare = count * tiling.rows - x.shape[2]
  x = jnp.pad(x, [(0, spare if axis == 2 else 0) for axis in range(x.ndim)])
  return jnp.moveaxis(x.reshape(*x.shape[:2], count, tiling.rows, *x.shape[3:]), 2, 1)


def _whole(blocks: Array, like: Array) -> Array:
  """[groups, blocks, g, R, D] -> [N, L, H, D], without the padding."""
  batch, length, heads, width = like.shape
  rows = jnp.moveaxis(blocks, 1, 2).reshape(batch, heads, -1, width)[:, :, :length]
  return jnp.moveaxis(rows, 1, 2).astype(like.dtype)


def _places(tiling: Tiling, blocks: Array) -> Array:
  return jnp.arange(blocks.shape[1]) * tiling.rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(tiling: Tiling, q: Array, k: Array, v: Array) -> Array:
  """softmax(q k^T / sqrt(D)) v, scores and softmax in fp32.

  Args:
    tiling: see there.
    q: [N, L, H, D].
    k: [N, M, H, D].
    v: [N, M, H, D].

  Returns:
    [N, L, H, D] in q's dtype.

  Reference: Dao et al. 2022 (FlashAttention), for what is kept and computed again.
  """
  return _forward(tiling, q, k, v)[0]


def _forward(
  tiling: Tiling, q: Array, k: Array, v: Array
) -> tuple[Array, tuple[Array, ...]]:
  blocks = _cut(tiling, _grouped(tiling, q))
  first = _places(tiling, blocks)

  def group(told: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    blocks, k, v = told

    def block(told: tuple[Array, Array]) -> tuple[Array, Array]:
      return _forward_block(tiling, told[0], k, v, told[1])

    return jax.lax.map(block, (blocks, first))

  y, log_sum = jax.lax.map(group, (blocks, _grouped(tiling, k), _grouped(tiling, v)))
  return _whole(y, q), (q, k, v, y, log_sum)


def _backward(
  tiling: Tiling, kept: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
  q, k, v, y, log_sum = kept
  blocks = _cut(tiling, _grouped(tiling, q))
  first = _places(tiling, blocks)

  def group(told: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    k, v, *cut = told

    def block(
      sums: tuple[Array, Array], told: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
      q, y, log_sum, cotangent, first = told
      by_q, by_k, by_v = _backward_block(tiling, q, k, v, y, log_sum, cotangent, first)
      return (sums[0] + by_k, sums[1] + by_v), by_q

    zero = jnp.zeros(k.shape, jnp.float32)
    (by_k, by_v), by_q = jax.lax.scan(block, (zero, zero), (*cut, first))
    return by_q, by_k, by_v

  by_q, by_k, by_v = jax.lax.map(
    group,
    (
      _grouped(tiling, k),
      _grouped(tiling, v),
      blocks,
      y,
      log_sum,
      _cut(tiling, _grouped(tiling, cotangent)),
    ),
  )
  # Keys are not cut: their one block is all of them.
  return _whole(by_q, q), _whole(by_k[:, None], k), _whole(by_v[:, None], v)


attend.defvjp(_forward, _backward)
