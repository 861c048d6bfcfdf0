"""What every model is: a config, a structure, and parameters kept outside of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lpo_jax import trees
from lpo_jax.errors import UserError, nearest, unknown_name
from lpo_jax.types import Params

REMAT = ("none", "blocks", "full")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a model computes; nothing here changes what its parameters are.

  Attributes:
    dtype: of the activations. Norms, softmax, the time embedding and the last
      convolution are fp32 whatever it says.
    attention: a name of `layers.ATTENTION`.
    remat: what the backward pass computes again instead of keeping: "none", "blocks"
      (inside of every resnet and transformer block) or "full" (everything).
  """

  dtype: Any = jnp.float32
  attention: str = "auto"
  remat: str = "none"

  def __post_init__(self):
    if self.remat not in REMAT:
      raise unknown_name("remat", self.remat, REMAT)

  def block(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the call of one block as `remat` asks."""
    return jax.checkpoint(function) if self.remat == "blocks" else function

  def whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the call of the whole model as `remat` asks."""
    return jax.checkpoint(function) if self.remat == "full" else function


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A structure without values: parameters are an argument of every call.

  Attributes:
    config: the fields of the model's `config.json`, as given.
    settings: dtype, attention and remat.
    graphdef: the NNX structure.
    abstract_params: nested dict of fp32 `jax.ShapeDtypeStruct`, keyed by the attribute
      names of diffusers and transformers, with ints for places in lists.
    used_as: the same tree, of the dtype that each kernel or embedding is cast to before
      any arithmetic; fp32 for biases and norms.
  """

  config: Mapping[str, Any]
  settings: Settings
  graphdef: nnx.GraphDef
  abstract_params: Params
  used_as: Params

  @classmethod
  def of(
    cls, make: Callable[[], nnx.Module], config: Mapping[str, Any], settings: Settings
  ) -> Model:
    """Derives the structure from `make`, without allocating a parameter."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    used_as = jax.tree.map(
      lambda variable: variable.used_as,
      state,
      is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    params = nnx.to_pure_dict(state)
    return cls(dict(config), settings, graphdef, params, nnx.to_pure_dict(used_as))

  def bind(self, params: Params) -> nnx.Module:
    """Returns the module that holds `params`."""
    return nnx.merge(self.graphdef, params)

  def narrow(self, params: Params) -> Params:
    """Stores kernels in the dtype they are used in: half the memory, the same output.

    Unlike a cast of the whole tree, which also rounds what the model computes in fp32
    (the time embedding, norms, the last convolution) and so moves its predictions.

    Args:
      params: nested dict of fp32 arrays, or of their shapes.

    Returns:
      The same tree with some leaves in `settings.dtype`.
    """

    def cast(leaf: Any, dtype: Any) -> Any:
      if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
      return leaf.astype(dtype)

    return jax.tree.map(cast, params, self.used_as)

  def init(self, seed: int) -> Params:
    """Draws parameters as torch's defaults do, with NumPy.

    Kernels and their biases are uniform in +-1/sqrt(fan_in), embeddings normal with
    deviation 0.02, norms 1 and 0. Each tensor depends on (seed, its name) alone.

    Args:
      seed: any non-negative int.

    Returns:
      Nested dict of fp32 NumPy arrays.
    """
    shapes = {name: leaf.shape for name, leaf in self.named_shapes().items()}
    draw = functools.partial(_draw, shapes, seed)
    return trees.map_named(lambda name, _: draw(name), self.abstract_params)

  def named_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract parameters by dotted name."""
    return trees.named_leaves(self.abstract_params)


def _draw(shapes: Mapping[str, tuple[int, ...]], seed: int, name: str) -> np.ndarray:
  shape = shapes[name]
  generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
  parent, _, kind = name.rpartition(".")
  if kind == "scale":
    return np.ones(shape, np.float32)
  if kind == "embedding":
    return generator.standard_normal(shape, np.float32) * np.float32(0.02)
  kernel = shapes.get(f"{parent}.kernel")
  if kernel is None:
    return np.zeros(shape, np.float32)
  bound = np.float32(1 / math.sqrt(math.prod(kernel[:-1])))
  return (generator.random(shape, np.float32) * 2 - 1) * bound


def resolve_config(
  config: Mapping[str, Any],
  *,
  defaults: Mapping[str, Any],
  only: Mapping[str, tuple[Any, ...]],
  kind: str,
) -> dict[str, Any]:
  """Completes the fields of a `config.json` and refuses what is not implemented.

  Args:
    config: fields as read from the file; names starting with "_" are not fields.
    defaults: the fields that are honoured, with their values when absent.
    only: the fields of which only some values are implemented, with these values; the
      first one stands in when the field is absent.
    kind: the class name, for the error.

  Returns:
    Every field of `defaults`.

  Raises:
    UserError: names the field whose value is not implemented, or that is unknown.
  """
  for name, value in config.items():
    if name.startswith("_") or name in defaults:
      continue
    if name in only:
      if not any(value == good and type(value) is type(good) for good in only[name]):
        raise UserError(
          f"{kind} config field {name!r} is {value!r}; implemented: "
          f"{', '.join(repr(good) for good in only[name])}. Use a model without it."
        )
    elif "_class_name" in config and value not in (None, False):
      # transformers writes much into its configs that no model reads; diffusers does not.
      close = nearest(name, [*defaults, *only])
      hint = f" (did you mean {close!r}?)" if close else ""
      raise UserError(
        f"{kind} config field {name!r} = {value!r} is not known here{hint}, and may "
        "change what the model computes. Remove it from config.json if it does not."
      )
  return {name: config.get(name, default) for name, default in defaults.items()}
