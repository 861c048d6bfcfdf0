"""What every model is: a config, a structure, and parameters kept outside of it."""

from __future__ import annotations

import dataclasses
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
from lpo_jax.types import Array, Params


def _is_product(primitive: Any, *_: Any, **params: Any) -> bool:
  # Attention's products have a batch (the heads): scores are too large to be kept.
  if primitive is jax.lax.dot_general_p:
    return not params["dimension_numbers"][1][0]
  return primitive is jax.lax.conv_general_dilated_p


# What the backward pass keeps of a block; the rest it computes again.
KEPT = {
  "blocks": jax.checkpoint_policies.nothing_saveable,
  "dots": _is_product,
}
REMAT = ("none", *KEPT, "full")
SCAN = ("stacks", "none")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a model computes; nothing here changes what its parameters are.

  Attributes:
    dtype: of the activations. Norms, softmax, the time embedding and the last
      convolution are fp32 whatever it says.
    attention: a name of `attention.ATTENTION`, or "auto".
    remat: what the backward pass computes again instead of keeping: "none", "dots" (of
      every resnet and transformer block all but the results of its convolutions and
      matrix products), "blocks" (all inside of them) or "full" (everything).
    scan: whether equal blocks in a row are compiled once and looped over ("stacks"), or
      each compiled for itself ("none"): three times the work for the compiler, and no
      faster afterwards where it was measured (docs/performance.md).
  """

  dtype: Any = jnp.float32
  attention: str = "auto"
  remat: str = "none"
  scan: str = "stacks"

  def __post_init__(self):
    if self.remat not in REMAT:
      raise unknown_name("remat", self.remat, REMAT)
    if self.scan not in SCAN:
      raise unknown_name("scan", self.scan, SCAN)

  def block(
    self, function: Callable[..., Any], *, is_looped: bool = False
  ) -> Callable[..., Any]:
    """Wraps the call of one block as `remat` asks.

    Args:
      function: the call.
      is_looped: whether it is the body of a loop. Elsewhere a barrier must keep the
        compiler from finding that it computes the same twice, and keeping it after all.
    """
    if self.remat not in KEPT:
      return function
    return jax.checkpoint(function, policy=KEPT[self.remat], prevent_cse=not is_looped)

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
    shapes = {
      block: leaf.shape[1:] if trees.is_stacked(name) else leaf.shape
      for name, leaf in self.named_shapes().items()
      for block in trees.block_names(name, leaf.shape)
    }

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
      blocks = trees.block_names(name, leaf.shape)
      drawn = [_draw(shapes, seed, block) for block in blocks]
      return np.stack(drawn) if trees.is_stacked(name) else drawn[0]

    return trees.map_named(draw, self.abstract_params)

  def named_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract parameters by dotted name."""
    return trees.named_leaves(self.abstract_params)


def _draw(shapes: Mapping[str, tuple[int, ...]], seed: int, name: str) -> np.ndarray:
  shape = shapes[name]
  generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
  parent, _, kind = name.rpartition(".")
  if kind == "scale":
    return np.ones(shape, np.float32)
  if kind in ("embedding", "class_embedding"):
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


class Stack(nnx.Module):
  """Equal blocks in a row, their parameters stacked: one block's code for all of them.

  The first axis of every parameter is the block; names have `trees.EACH` in the place
  of its number.
  """

  def __init__(self, make: Callable[[], nnx.Module], depth: int, settings: Settings):
    self.each = make()
    for _, parameter in nnx.iter_graph(self.each):
      if isinstance(parameter, nnx.Param):
        shape = (depth, *parameter[...].shape)
        parameter.set_value(jnp.zeros(shape, parameter[...].dtype))
    self.settings = settings
    self.depth = depth

  def __call__(self, x: Array, *args: Any) -> Array:
    """Runs the blocks one after the other.

    Args:
      x: what the first block takes and every block returns.
      args: what every block takes besides.

    Returns:
      x after the last block.
    """
    return self._scan(lambda y: None, x, *args)[0]

  def states(self, x: Array, *args: Any) -> Array:
    """Runs the blocks, and returns what each of them returned: [depth, ...]."""
    return self._scan(lambda y: y, x, *args)[1]

  def _scan(self, kept: Callable[[Array], Any], x: Array, *args: Any) -> Any:
    graphdef, params = nnx.split(self.each)
    is_looped = self.settings.scan == "stacks"

    def body(x: Array, params: Any) -> tuple[Array, Any]:
      block = nnx.merge(graphdef, params).__call__
      y = self.settings.block(block, is_looped=is_looped)(x, *args)
      return y, kept(y)

    return jax.lax.scan(body, x, params, unroll=1 if is_looped else self.depth)
