"""Floating point operations of a traced program, and what share of a chip they are."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.extend


def count_flops(jaxpr: Any) -> int:
  """Twice the multiplications of all matrix products and convolutions, on all devices.

  Loops count as often as they run, a branch as much as its dearest, a kernel as often
  as its grid has cells. What a backward pass computes again is in it: it is what the
  chips do, not what had to be done.

  Args:
    jaxpr: of `jax.jit(...).trace(...)`, `.jaxpr` or `.jaxpr.jaxpr`.

  >>> product = jax.make_jaxpr(lambda a, b: a @ b)
  >>> count_flops(product(jax.numpy.ones((2, 3)), jax.numpy.ones((3, 5))))
  60
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
  shapes = [getattr(x.aval, "shape", ()) for x in (*equation.invars, *equation.outvars)]
  params = equation.params
  if equation.primitive is jax.lax.dot_general_p:
    contracted = params["dimension_numbers"][0][0]
    return 2 * math.prod(shapes[2]) * math.prod(shapes[0][i] for i in contracted)
  if equation.primitive is jax.lax.conv_general_dilated_p:
    kernel = params["dimension_numbers"].rhs_spec
    return 2 * math.prod(shapes[2]) * (math.prod(shapes[1]) // shapes[1][kernel[0]])
  inner = [count_flops(x) for x in jax.extend.core.jaxprs_in_params(params)]
  if equation.primitive.name == "cond":
    return max(inner, default=0)
  return _times(equation.primitive.name, params) * sum(inner)


def _times(primitive: str, params: Any) -> int:
  """How often the programs inside of an equation run."""
  if primitive == "scan":
    return params["length"]
  if primitive == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  if primitive == "shard_map":  # its program has the shapes of one device
    mesh = params["mesh"]
    return math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
  return 1


def utilisation(flops: float, seconds: float, chips: int, peak: float) -> float:
  """flops / (seconds chips peak): the share of the peak that was used.

  Args:
    flops: of all chips together. For the model FLOPs utilisation (MFU), of a step that
      computes nothing twice.
    seconds: that they took.
    chips: number of them.
    peak: FLOP/s of one.

  >>> utilisation(1e15, 10.0, 2, 1e14)
  0.5
  """
  return flops / (seconds * chips * peak)
