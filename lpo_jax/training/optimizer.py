"""Optimizers by name, with warm-up, clipping, and regex rules for decay and freezing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from lpo_jax import tables, trees
from lpo_jax.errors import UserError
from lpo_jax.types import Array


def _adamw(
  learning_rate: optax.ScalarOrSchedule,
  decay_mask: Any,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 1e-2,
  mu_dtype: str | None = None,
) -> optax.GradientTransformation:
  return optax.adamw(
    learning_rate, b1, b2, eps, mu_dtype=mu_dtype, weight_decay=weight_decay,
    mask=decay_mask,
  )  # fmt: skip


def _adafactor(
  learning_rate: optax.ScalarOrSchedule,
  decay_mask: Any,
  *,
  weight_decay: float = 0.0,
  momentum: float | None = None,
) -> optax.GradientTransformation:
  # The parts of `optax.adafactor` without its learning rate relative to the weights,
  # as torch's scripts use it. Its own decay is not multiplied by the learning rate: 0.01
  # would take a hundredth of every weight at every update. Here it means what it means
  # to adamw. Of a stack the two largest axes are factored, and so never the blocks.
  return optax.chain(
    optax.scale_by_factored_rms(),
    _clip_by_block_rms(1.0),
    optax.identity() if momentum is None else optax.ema(momentum, debias=False),
    optax.add_decayed_weights(weight_decay, decay_mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _clip_by_block_rms(threshold: float) -> optax.GradientTransformation:
  """Clips the rms of every tensor, of a stack that of every block: as if none were."""

  def clip(name: str, update: Array) -> Array:
    axes = tuple(range(int(trees.is_stacked(name)), update.ndim))
    rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
    return update / jnp.maximum(1.0, rms / threshold)

  return optax.stateless(lambda updates, params: trees.map_named(clip, updates))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": _adamw,
  "adafactor": _adafactor,
}


def learning_rate_schedule(learning_rate: float, warmup_steps: int) -> optax.Schedule:
  """Rises linearly to `learning_rate` over `warmup_steps` updates, then stays."""
  if warmup_steps <= 0:
    return optax.constant_schedule(learning_rate)
  # Update 1 already moves: lr (k + 1) / warmup at the k-th update, counted from 0.
  return lambda count: (
    learning_rate
    * (optax.linear_schedule(1.0 / warmup_steps, 1.0, max(warmup_steps - 1, 1))(count))
  )


def build(
  name: str,
  params: Any,
  *,
  learning_rate: float,
  warmup_steps: int = 0,
  clip_norm: float | None = 1.0,
  decay_rules: Sequence[tuple[str, bool]] = ((".*", True),),
  trainable_rules: Sequence[tuple[str, bool]] = ((".*", True),),
  on_nonfinite: str = "stop",
  options: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
  """Builds the whole gradient transformation.

  Args:
    name: a name in `OPTIMIZERS`.
    params: the (abstract) parameters, for their names.
    learning_rate: effective peak value; nothing multiplies it by a batch size.
    warmup_steps: updates of linear warm-up.
    clip_norm: clip the global gradient norm to this; None or 0 for no clipping.
    decay_rules: (regex over names, decay?) first match wins.
    trainable_rules: (regex over names, train?) first match wins; frozen parameters
      have no optimizer state and get exactly zero updates.
    on_nonfinite: "stop" and "rollback" leave a bad gradient to the run; "skip" drops
      the update and keeps the old state, however often: to give up is the report's.
    options: the optimizer's own keyword-only options.

  Raises:
    UserError: unknown name, option or policy; a parameter that no rule matches; nothing
      left to train.
  """
  labels = trees.match_rules(trainable_rules, params, what="trainable")
  labels = trees.map_named(lambda _, train: "train" if train else "frozen", labels)
  if "train" not in trees.named_leaves(labels).values():
    raise UserError(
      "train.trainable freezes every parameter; expected a rule that leaves some."
    )
  decay = trees.match_rules(decay_rules, params, what="weight decay")
  schedule = learning_rate_schedule(learning_rate, warmup_steps)
  # Inside `partition` the frozen leaves are masked nodes, so the mask must be a function
  # of the tree that arrives there.
  decay_by_name = trees.named_leaves(decay)
  make = tables.bind("optimizer", OPTIMIZERS, name, options or {})
  inner = make(
    schedule, lambda tree: trees.map_named(lambda path, _: decay_by_name[path], tree)
  )
  if clip_norm:
    inner = optax.chain(optax.clip_by_global_norm(clip_norm), inner)
  transform = optax.partition({"train": inner, "frozen": optax.set_to_zero()}, labels)
  wrap = tables.bind("on_nonfinite", NONFINITE, on_nonfinite, {})
  return wrap(transform)


NONFINITE: dict[str, Callable] = {
  "stop": lambda transform: transform,
  "rollback": lambda transform: transform,
  # Past its limit optax would let the NaN into the weights, so there is none.
  "skip": lambda transform: optax.apply_if_finite(transform, np.iinfo(np.int32).max),
}
