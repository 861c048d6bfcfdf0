"""What a run is between two steps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lpo_jax import parallel
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
  """

  step: Array
  params: Params
  opt_state: Any
  ema: Params | None

  @property
  def published(self) -> Params:
    """What the run draws with and exports: the running mean where there is one."""
    return self.params if self.ema is None else self.ema


def create(
  params: Params, optimizer: optax.GradientTransformation, *, with_ema: bool
) -> TrainState:
  """Builds the state before the first update; works under `jax.eval_shape` and jit."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if with_ema else None,
  )


def placement(
  mesh: Mesh,
  params: Params,
  optimizer: optax.GradientTransformation,
  *,
  with_ema: bool,
  shardings: Any,
) -> TrainState:
  """Describes the state on the mesh, optimizer slots beside their parameters.

  Args:
    mesh: from `parallel.make_mesh`.
    params: arrays or ShapeDtypeStructs.
    optimizer: from `optimizer.build`.
    with_ema: keep a running mean of the parameters.
    shardings: `parallel.param_shardings` of the params.

  Returns:
    A state of ShapeDtypeStructs with shardings: what a checkpoint is restored onto.
  """
  init = functools.partial(create, optimizer=optimizer, with_ema=with_ema)
  abstract = jax.eval_shape(init, params)
  where = parallel.state_shardings(abstract, params, mesh, shardings)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where
  )


def place(
  mesh: Mesh,
  params: Params,
  optimizer: optax.GradientTransformation,
  *,
  with_ema: bool,
  shardings: Any,
) -> TrainState:
  """Builds the state before the first update where `placement` says.

  Without explicit shardings a jit'd initialiser would replicate the optimizer's slots.

  Args:
    mesh: from `parallel.make_mesh`.
    params: global arrays, placed by `shardings`.
    optimizer: from `optimizer.build`.
    with_ema: keep a running mean of the parameters.
    shardings: `parallel.param_shardings` of the params.
  """
  like = placement(mesh, params, optimizer, with_ema=with_ema, shardings=shardings)
  init = functools.partial(create, optimizer=optimizer, with_ema=with_ema)
  return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, like))(params)
