"""How the policy orders lists that it is never trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lpo_jax import parallel
from lpo_jax.objectives.lists import differences, is_better
from lpo_jax.training import step as step_lib
from lpo_jax.types import Array, Batch, Params


def pair_sums(
  method: step_lib.Method, trainable: Params, frozen: Params, batch: Batch
) -> dict[str, Array]:
  """What a batch adds to the means over ordered pairs; each list in epoch 0 alone.

  All that is random about a list hangs on its identity: the same noise and timestep
  whenever this is asked.

  Returns:
    Scalars: how many `lists` and ordered `pairs`, how many of those are `right`, ties
    counted half, and the sum of the margins, `gap`.
  """
  _, scalars = step_lib.measure(method, trainable, frozen, batch)
  denoising = step_lib.to_lists(scalars, batch.slot)
  first = batch.identity[batch.slot[:, 0], 1] == 0
  ranking = dataclasses.replace(
    batch.ranking, valid=batch.ranking.valid & first[:, None]
  )
  reward = jnp.where(ranking.valid, denoising.ref_err - denoising.err, 0.0)
  ordered, gap = is_better(ranking), differences(reward)
  return {
    "lists": jnp.sum(jnp.any(ranking.valid, axis=1)),
    "pairs": jnp.sum(ordered),
    "right": jnp.sum(jnp.where(ordered, 0.5 * (1.0 + jnp.sign(gap)), 0.0)),
    "gap": jnp.sum(jnp.where(ordered, gap, 0.0)),
  }


class HeldOut:
  """Measures a policy on lists held out.

  Args:
    method: of the run; it has a reference.
    mesh: of the run.
    make_batches: gives these lists' batches from the first on, and `close`.
    lists: how many there are.
  """

  def __init__(
    self,
    method: step_lib.Method,
    mesh: Mesh,
    make_batches: Callable[[], Any],
    lists: int,
  ):
    self._mesh, self._make, self._lists = mesh, make_batches, lists
    self._sums = jax.jit(
      functools.partial(pair_sums, method),
      out_shardings=parallel.replicated(mesh),
      compiler_options=step_lib.compiler_options(mesh),
    )

  def __call__(self, trainable: Params, frozen: Params) -> dict[str, float]:
    """Runs policy and reference over all lists once.

    Returns:
      `held_out/implicit_acc` and `held_out/margin`, as in `standing_metrics`.
    """
    total = {"lists": 0.0, "pairs": 0.0, "right": 0.0, "gap": 0.0}
    with contextlib.closing(self._make()) as batches, jax.set_mesh(self._mesh):
      while total["lists"] < self._lists:
        batch = parallel.global_batch(self._mesh, next(batches))
        found = parallel.fetch(self._sums(trainable, frozen, batch))
        total = {name: total[name] + float(found[name]) for name in total}
    pairs = max(total["pairs"], 1.0)
    return {
      "held_out/implicit_acc": total["right"] / pairs,
      "held_out/margin": total["gap"] / pairs,
    }
