"""LoRA as arithmetic on the tree: W + (alpha / rank) A B, beside any model.

The trainable tree (the `delta`) has the names of the kernels that it changes with `A` and
`B` below them: `mid_block.attentions.0.proj_in.kernel.A`. Models know nothing of it.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import trees
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Array, Params

# The matrices of all attention layers: what diffusers' scripts train.
ATTENTION = ((r"\.attn[12]\.to_(q|k|v|out\.0)\.kernel$", True), (r".*", False))
# All that factors can express: biases and norms are vectors.
KERNELS = ((r"(^|\.)kernel$", True), (r".*", False))


@dataclasses.dataclass(frozen=True)
class Spec:
  """Which kernels get factors, and of what rank.

  Attributes:
    rank: inner dimension of A B.
    targets: (regex, True | False | rank) over parameter names; first match wins, no
      match is an error. True stands for `rank`, False for no factors.
    alpha: A B is multiplied by alpha / rank; None for alpha = rank.
  """

  rank: int
  targets: Sequence[tuple[str, bool | int]] = ATTENTION
  alpha: float | None = None


@dataclasses.dataclass(frozen=True)
class Site:
  """The factors of one kernel, or of each block of a stack of kernels.

  Attributes:
    ranks: one per block, one in all where there is no stack; 0 where a block has none.
      A and B are as wide as the largest, with zeros behind.
    alphas: one per block.
  """

  ranks: tuple[int, ...]
  alphas: tuple[float, ...]

  @property
  def rank(self) -> int:
    """The width of A."""
    return max(self.ranks)

  @property
  def scales(self) -> np.ndarray:
    """alpha / rank of each block, fp32."""
    pairs = zip(self.alphas, self.ranks, strict=True)
    return np.asarray([a / r if r else 0.0 for a, r in pairs], np.float32)


# The kernels that have factors, by dotted name.
Layout = Mapping[str, Site]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
  """A delta and what says how to add it.

  Attributes:
    delta: nested dict: the names of `layout`, then A and B.
    layout: ranks and alphas by the name of the kernel.
  """

  delta: Params
  layout: Layout


def as_alpha(value: Any) -> float:
  """Rounds an alpha to fp32, which files hold, and gives its shortest decimals.

  >>> as_alpha(np.float32(0.1)), as_alpha(1 / 3)
  (0.1, 0.33333334)
  """
  return float(str(np.float32(value)))


def lay_out(spec: Spec, base: Params) -> dict[str, Site]:
  """Finds the kernels that get factors.

  Args:
    spec: ranks, alpha and targets.
    base: parameters or their shapes.

  Returns:
    Their sites by name, in tree order.

  Raises:
    UserError: a target that is no kernel, a value that is no rank, or no target at all.
  """
  rules = trees.match_rules(spec.targets, base, what="LoRA target")
  values, layout = trees.named_leaves(rules), {}
  for name, leaf in trees.named_leaves(base).items():
    value = values[name]
    rank = spec.rank * value if isinstance(value, bool) else value
    if not isinstance(rank, int) or rank < 0:
      raise UserError(
        f"LoRA target rule for {name!r} says {value!r}; expected True (the rank, "
        f"{spec.rank}), False, or a rank of its own."
      )
    if not rank:
      continue
    if name.rpartition(".")[2] != "kernel":
      raise UserError(
        f"LoRA targets choose {name!r}, which is no kernel; factors exist for matrices "
        "and convolutions only. End the regex with '\\.kernel$'."
      )
    blocks = leaf.shape[0] if trees.is_stacked(name) else 1
    alpha = as_alpha(rank if spec.alpha is None else spec.alpha)
    layout[name] = Site((rank,) * blocks, (alpha,) * blocks)
  if not layout:
    raise UserError(
      f"LoRA targets choose nothing: {list(spec.targets)!r} of rank {spec.rank}. "
      "Parameters have names such as "
      "'mid_block.attentions.0.transformer_blocks.0.attn1.to_q.kernel'."
    )
  return layout


def shapes(name: str, shape: Sequence[int], rank: int) -> dict[str, tuple[int, ...]]:
  """Shapes of a kernel's factors: A as the kernel with `rank` outputs, B a matrix.

  >>> shapes("conv_in.kernel", (3, 3, 4, 32), 2)
  {'A': (3, 3, 4, 2), 'B': (2, 32)}
  >>> shapes("layers.each.to_q.kernel", (5, 8, 16), 2)
  {'A': (5, 8, 2), 'B': (5, 2, 16)}
  """
  stack = tuple(shape[:1]) if trees.is_stacked(name) else ()
  return {"A": (*shape[:-1], rank), "B": (*stack, rank, shape[-1])}


def build(base: Params, layout: Layout, make: Callable[..., Any]) -> Params:
  """Makes a delta's tree of `make(name of the kernel, its leaf, "A" | "B")`."""
  delta: Params = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(base):
    name = trees.leaf_name(path)
    if name in layout:
      node = delta
      for entry in path:
        node = node.setdefault(entry.key, {})
      node |= {factor: make(name, leaf, factor) for factor in ("A", "B")}
  return delta


def abstract(base: Params, layout: Layout) -> Params:
  """Shapes of the delta, fp32."""

  def make(name: str, leaf: Any, factor: str) -> jax.ShapeDtypeStruct:
    shape = shapes(name, leaf.shape, layout[name].rank)[factor]
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  return build(base, layout, make)


def _kaiming(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  bound = 1 / math.sqrt(math.prod(shape[:-1]))
  return (generator.random(shape, np.float32) * 2 - 1) * np.float32(bound)


def _gaussian(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  return generator.standard_normal(shape, np.float32) / np.float32(shape[-1])


# PEFT's default (uniform in +-1/sqrt(fan_in)) and its "gaussian" (deviation 1/rank).
INITS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
  "kaiming": _kaiming,
  "gaussian": _gaussian,
}


def init(seed: int, base: Params, layout: Layout, how: str = "kaiming") -> Params:
  """Draws A and sets B to 0, so that the merged weights are those of the base.

  Args:
    seed: any non-negative int; each block depends on (seed, its name) alone.
    base: parameters or their shapes.
    layout: from `lay_out`.
    how: a name of `INITS`.

  Returns:
    The delta, fp32 NumPy.

  Raises:
    UserError: an unknown `how`.
  """
  if how not in INITS:
    raise unknown_name("LoRA init", how, INITS)

  def make(name: str, leaf: Any, factor: str) -> np.ndarray:
    site = layout[name]
    shape = shapes(name, leaf.shape, site.rank)[factor]
    values = np.zeros(shape, np.float32)
    if factor == "B":
      return values
    stack = values if trees.is_stacked(name) else values[None]
    blocks = trees.block_names(f"{name}.A", shape)
    for block, (word, rank) in enumerate(zip(blocks, site.ranks, strict=True)):
      if rank:
        generator = np.random.default_rng([seed, zlib.crc32(word.encode())])
        stack[block, ..., :rank] = INITS[how](generator, (*stack.shape[1:-1], rank))
    return values

  return build(base, layout, make)


def product(name: str, a: Array, b: Array, site: Site) -> Array:
  """(alpha / rank) A B in the kernel's shape, fp32.

  Args:
    name: of the kernel.
    a: [..., inputs, rank], with the block first where kernels are stacked.
    b: [rank, outputs], with the block first where kernels are stacked.
    site: ranks and alphas.
  """
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  # The scale goes to B, which is smaller than the product.
  if trees.is_stacked(name):
    indices, b = "d...r,dro->d...o", b * site.scales[:, None, None]
  else:
    indices, b = "...r,ro->...o", b * site.scales[0]
  return jnp.einsum(indices, a, b, precision=jax.lax.Precision.HIGHEST)


def merge(base: Params, delta: Params, layout: Layout) -> Params:
  """W + (alpha / rank) A B where there are factors, W elsewhere.

  Args:
    base: parameters in the shape of the model.
    delta: factors of some of its kernels.
    layout: their ranks and alphas.

  Returns:
    The tree of `base`; kernels with factors are fp32 and, while B is 0, those of the
    base to the bit.
  """
  factors = trees.named_leaves(delta)

  def add(name: str, leaf: Array) -> Array:
    if name not in layout:
      return leaf
    a, b = factors[f"{name}.A"], factors[f"{name}.B"]
    return leaf.astype(jnp.float32) + product(name, a, b, layout[name])

  return trees.map_named(add, base)


@dataclasses.dataclass(frozen=True, eq=False)
class Extraction:
  """A delta that stands for the difference of two models.

  Attributes:
    adapter: the factors, alpha = rank.
    kept: by kernel, the share of the squared difference that they express.
    kept_overall: of the whole difference, biases and norms included.
  """

  adapter: Adapter
  kept: dict[str, float]
  kept_overall: float


def extract(base: Params, tuned: Params, spec: Spec) -> Extraction:
  """Finds the best A B for tuned - base of each kernel, by its singular values.

  No other matrix of that rank is nearer to the difference (Eckart, Young, 1936). Of a
  convolution the matrix has a row per input and place, a column per output.

  Args:
    base: parameters.
    tuned: the same tree.
    spec: ranks and targets; its alpha only moves a factor between B and the scale.

  Raises:
    UserError: see `lay_out`.
  """
  layout = lay_out(spec, base)
  before = trees.named_leaves(base)
  factors: dict[str, np.ndarray] = {}
  kept, expressed, total = {}, 0.0, 0.0
  for name, leaf in trees.named_leaves(tuned).items():
    difference = np.asarray(leaf, np.float32) - np.asarray(before[name], np.float32)
    energy = _energy(difference)
    total += energy
    if name not in layout:
      continue
    a, b, share = _factorise(name, difference, layout[name])
    factors |= {f"{name}.A": a, f"{name}.B": b}
    kept[name] = share / energy if energy else 1.0
    expressed += share
  delta = build(base, layout, lambda name, _, factor: factors[f"{name}.{factor}"])
  return Extraction(Adapter(delta, layout), kept, expressed / total if total else 1.0)


def _energy(x: np.ndarray) -> float:
  return float(np.sum(np.square(x, dtype=np.float64)))


def _factorise(
  name: str, difference: np.ndarray, site: Site
) -> tuple[np.ndarray, np.ndarray, float]:
  """A, B and the energy of their product, for a kernel or a stack of them."""
  stacked = trees.is_stacked(name)
  wanted = shapes(name, difference.shape, site.rank)
  a, b = (np.zeros(wanted[factor], np.float32) for factor in ("A", "B"))
  energy = 0.0
  blocks = difference if stacked else difference[None]
  for block, (matrix, scale) in enumerate(zip(blocks, site.scales, strict=True)):
    u, s, v = np.linalg.svd(matrix.reshape(-1, matrix.shape[-1]), full_matrices=False)
    rank = min(site.ranks[block], len(s))
    root = np.sqrt(s[:rank])
    here = (block,) if stacked else ()
    a[(*here, ..., slice(rank))] = (u[:, :rank] * root).reshape(
      *matrix.shape[:-1], rank
    )
    b[(*here, slice(rank))] = root[:, None] * v[:rank] / scale
    energy += _energy(s[:rank])
  return a, b, energy


def count(delta: Params) -> int:
  """How many numbers a delta has."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(delta))
