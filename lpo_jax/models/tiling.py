"""Large images through an autoencoder by overlapping tiles, blended where they meet."""

from __future__ import annotations

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpo_jax.types import Array

# A tile begins where 3/4 of the one before it ends: diffusers' tile_overlap_factor.
STEPS_PER_TILE = 4


def by_tiles(
  run: Callable[[Array], Array], x: Array, *, tile: int, result_tile: int
) -> Array:
  """Applies `run` to tiles and joins what they give, as diffusers' `enable_tiling` does.

  Tiles of one size go through one after the other, so that memory is that of one tile.
  A tile fades in from its upper and its left neighbour over a quarter of its side.

  Args:
    run: [N, h, w, c] -> [N, r h, r w, d], for any h and w.
    x: [N, H, W, c].
    tile: side of a tile of x, a multiple of 4.
    result_tile: side of what `run` makes of it, r tile, a multiple of 4.

  Returns:
    [N, r H, r W, d].
  """
  step = tile - tile // STEPS_PER_TILE
  rows, columns = range(0, x.shape[1], step), range(0, x.shape[2], step)
  places = collections.defaultdict(list)
  for i in rows:
    for j in columns:
      part = x[:, i : i + tile, j : j + tile]
      places[part.shape].append((i, j, part))
  done = {}
  for same in places.values():  # those at the right and lower edges are smaller
    results = jax.lax.map(run, jnp.stack([part for *_, part in same]))
    done |= {(i, j): result for (i, j, _), result in zip(same, results)}

  overlap = result_tile // STEPS_PER_TILE
  keep = result_tile - overlap
  joined = []
  for i in rows:
    row = []
    for j in columns:
      y = done[i, j]
      if i:
        y = _fade_in(done[i - step, j], y, overlap, axis=1)
      if j:
        y = _fade_in(done[i, j - step], y, overlap, axis=2)
      done[i, j] = y
      row.append(y[:, :keep, :keep])
    joined.append(jnp.concatenate(row, axis=2))
  return jnp.concatenate(joined, axis=1)


def _fade_in(before: Array, y: Array, overlap: int, axis: int) -> Array:
  """Replaces the beginning of `y` by a passage to it from the end of `before`."""
  count = min(before.shape[axis], y.shape[axis], overlap)
  end = jax.lax.slice_in_dim(before, before.shape[axis] - count, None, axis=axis)
  beginning, rest = jnp.split(y, [count], axis=axis)
  share = jnp.arange(count, dtype=y.dtype) / count
  share = jnp.expand_dims(share, [a for a in range(y.ndim) if a != axis])
  return jnp.concatenate([end * (1 - share) + beginning * share, rest], axis=axis)
