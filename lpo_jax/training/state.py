"""What a run is between two steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lpo_jax import parallel
from lpo_jax.errors import unknown_name
from lpo_jax.training.places import to_device
from lpo_jax.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything the step changes. The reference is not here: it never changes.

  Attributes:
    step: [] int32 number of *completed* updates.
    params: fp32 master weights of the policy.
    opt_state: optax' state.
    ema: fp32 running mean of `params`, or None.
    lr_scale: [] fp32, 1 until a rollback lowers it: multiplies the learning rate.
    reward_cap: [] fp32, infinite until an alarm sets it: see `step.capped`.
  """

  step: Array
  params: Params
  opt_state: Any
  ema: Params | None
  lr_scale: Array
  reward_cap: Array

  @property
  def published(self) -> Params:
    """What the run draws with and exports: the running mean where there is one."""
    weights = self.params if self.ema is None else self.ema
    return to_device(weights, jax.tree.map(lambda x: x.sharding, weights))


def _ramp(decay: float) -> optax.Schedule:
  """min(decay, (1 + n) / (10 + n)) after n updates, and 0 at the first."""

  def schedule(count: Array) -> Array:
    n = jnp.asarray(count, jnp.float32)
    return jnp.where(n > 0, jnp.minimum(decay, (1 + n) / (10 + n)), 0.0)

  return schedule


# "ramp" is what the decay of diffusers' EMAModel means: a mean over the last tenth or so
# of the updates until that is longer than the decay's own window. With a constant decay
# of 0.9999 the mean of a short run is still its first weights.
EMA_SCHEDULES: dict[str, Callable[[float], optax.Schedule]] = {
  "constant": optax.constant_schedule,
  "ramp": _ramp,
}


def ema_schedule(name: str, decay: float) -> optax.Schedule:
  """Returns completed updates -> decay of the running mean; refuses an unknown name."""
  if name not in EMA_SCHEDULES:
    raise unknown_name("train.ema_schedule", name, EMA_SCHEDULES)
  return EMA_SCHEDULES[name](decay)


def create(
  params: Params, optimizer: optax.GradientTransformation, *, with_ema: bool
) -> TrainState:
  """Builds the state before the first update; works under `jax.eval_shape` and jit."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if with_ema else None,
    lr_scale=jnp.ones((), jnp.float32),
    reward_cap=jnp.full((), jnp.inf, jnp.float32),
  )


def placement(
  mesh: Mesh,
  params: Params,
  optimizer: optax.GradientTransformation,
  *,
  with_ema: bool,
  shardings: Any,
  mirrors: Any = None,
  ema: Any = None,
) -> TrainState:
  """Describes the state on the mesh.

  Args:
    mesh: from `parallel.make_mesh`.
    params: arrays or ShapeDtypeStructs.
    optimizer: from `optimizer.build`.
    with_ema: keep a running mean of the parameters.
    shardings: of the params.
    mirrors: of the optimizer's slots, by the parameter that they belong to; default: they
      lie beside it.
    ema: of the running mean; default: beside the slots.

  Returns:
    A state of ShapeDtypeStructs with shardings: what a checkpoint is restored onto.
  """
  init = functools.partial(create, optimizer=optimizer, with_ema=with_ema)
  abstract = jax.eval_shape(init, params)
  mirrors = shardings if mirrors is None else mirrors
  where = dataclasses.replace(
    parallel.state_shardings(abstract, params, mesh, mirrors),
    params=shardings,
    ema=(mirrors if ema is None else ema) if with_ema else None,
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where
  )


def place(
  like: TrainState, params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """Builds the state before the first update where `placement` says.

  Without explicit shardings a jit'd initialiser would replicate the optimizer's slots.

  Args:
    like: from `placement`.
    params: global arrays, placed as there.
    optimizer: from `optimizer.build`.
  """
  init = functools.partial(create, optimizer=optimizer, with_ema=like.ema is not None)
  return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, like))(params)
