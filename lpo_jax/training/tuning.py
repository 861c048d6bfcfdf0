"""What of a network is trained: all of its weights, some, or factors beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lpo_jax import parallel, trees
from lpo_jax.errors import UserError
from lpo_jax.models import Model, lora
from lpo_jax.training import step
from lpo_jax.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
  """How a trainable and a frozen tree are made of the base, and weights of these two.

  Attributes:
    shapes: of the trainable tree.
    freeze: (base, is there a reference?) -> the frozen tree, or None where nothing would
      read it; works under `jax.eval_shape`.
    weights: see `step.Method`.
    start: (base, mesh) -> the trainable tree before the first update, on the mesh.
    layout: of the factors; empty where weights themselves are trained.
    has_base: whether `weights` reads the frozen tree.
  """

  shapes: Params
  freeze: Callable[[Params, bool], Params | None]
  weights: step.Weights
  start: Callable[[Params, Mesh], Params]
  layout: lora.Layout
  has_base: bool

  def publish(self, trainable: Params, load_base: Callable[[], Params]) -> Params:
    """Makes the network's weights of a checkpoint; asks for the base if it must."""
    return self.outside(trainable, load_base() if self.has_base else None)

  def outside(self, trainable: Params, frozen: Params | None) -> Params:
    """`weights` outside of a step; where all are trained, these and not a copy."""
    return jax.jit(self.weights)(trainable, frozen) if self.has_base else trainable


def whole(model: Model) -> Tuning:
  """All weights are trained; the reference is a copy of the base.

  The copy has each parameter in the precision in which the network uses it: the policy's
  matrices are rounded to the compute dtype where they are used, its biases and norms are
  not, and only a reference stored the same way gives margins of exactly 0.
  """

  def freeze(base: Params, has_reference: bool) -> Params | None:
    # It must own its memory: the policy's is donated to the first step.
    def copy(tree: Params) -> Params:
      return jax.tree.map(lambda x: x + 0, model.narrow(tree))

    return jax.jit(copy)(base) if has_reference else None

  return Tuning(
    shapes=model.abstract_params,
    freeze=freeze,
    weights=step.whole,
    start=lambda base, mesh: base,
    layout={},
    has_base=False,
  )


def chosen(model: Model, rules: Sequence[tuple[str, bool]]) -> Tuning:
  """The weights are trained that the rules say, such as an adapter's; others are frozen.

  The frozen tree is the whole base: the reference, and what the policy has besides. Only
  the weights that are trained have moments and a running mean, and are in checkpoints.

  Args:
    model: the network.
    rules: `train.trainable`: (regex over names, train?), first match wins.

  Raises:
    UserError: a name that no rule matches, or nothing left to train.
  """
  train = trees.named_leaves(
    trees.match_rules(rules, model.abstract_params, what="trainable")
  )
  names = frozenset(name for name, is_trained in train.items() if is_trained)
  if len(names) == len(train):
    return whole(model)
  if not names:
    raise UserError(
      "train.trainable freezes every parameter; expected a rule that leaves some."
    )

  def freeze(base: Params, has_reference: bool) -> Params:
    del has_reference  # what is not trained is needed in any case

    # What is trained is donated to the first step: the base keeps a copy.
    def own(name: str, leaf: Any) -> Any:
      return leaf + 0 if name in names else leaf

    narrow = jax.jit(lambda tree: trees.map_named(own, model.narrow(tree)))
    return narrow(base)

  return Tuning(
    shapes=trees.pick(model.abstract_params, names),
    freeze=freeze,
    weights=lambda trained, base: trees.overlay(base, trained),
    start=lambda base, mesh: trees.pick(base, names),
    layout={},
    has_base=True,
  )


def beside(model: Model, layout: lora.Layout, first: Callable[[], Params]) -> Tuning:
  """Factors are trained; the frozen base is the reference as well.

  Kernels that factors are added to stay fp32. Stored in bf16, where half a step is 0.2 %
  of a weight, they would swallow all smaller products: W + A B would round to W.

  Args:
    model: the network.
    layout: which kernels have factors.
    first: makes the delta before the first update, on the host.
  """

  def narrow(base: Params) -> Params:
    def choose(name: str, wide: Any, slim: Any) -> Any:
      return wide if name in layout else slim

    return trees.map_named(choose, base, model.narrow(base))

  def start(base: Params, mesh: Mesh) -> Params:
    del base
    delta = first()
    return parallel.put(delta, parallel.param_shardings(delta, mesh))

  return Tuning(
    shapes=lora.abstract(model.abstract_params, layout),
    freeze=lambda base, has_reference: jax.jit(narrow)(base),
    weights=lambda delta, base: lora.merge(base, delta, layout),
    start=start,
    layout=layout,
    has_base=True,
  )
