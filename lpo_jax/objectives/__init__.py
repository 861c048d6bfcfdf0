"""The objectives: pure functions of three scalars per image and a ranking.

Every objective has the signature

  objective(denoising: Denoising, ranking: Ranking, *, ...) -> (loss, metrics)

with `[B, N]` inputs in fp32, a scalar loss averaged over the lists by their weights, and
metrics that are scalars. It never sees an image, a key or a device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from lpo_jax import tables
from lpo_jax.objectives.listwise import all_pairs, lair, lipo_lambda, lpo, rankdpo
from lpo_jax.objectives.pairwise import dmpo, dpo, dpo_hinge, ipo, poly_dpo
from lpo_jax.objectives.pairwise_errors import capo, dro, dspo, linear_dpo, mapo
from lpo_jax.objectives.pointwise import kto, sft
from lpo_jax.types import Array, Denoising, Metrics, Ranking

ObjectiveFn = Callable[..., tuple[Array, Metrics]]

OBJECTIVES: dict[str, ObjectiveFn] = {
  # One image at a time.
  "sft": sft,
  "kto": kto,
  # Ordered pairs.
  "dpo": dpo,
  "ipo": ipo,
  "dpo_hinge": dpo_hinge,
  "dspo": dspo,
  "mapo": mapo,
  "dmpo": dmpo,
  "poly_dpo": poly_dpo,
  "linear_dpo": linear_dpo,
  "capo": capo,
  "dro": dro,
  # Whole lists.
  "lpo": lpo,
  "all_pairs": all_pairs,
  "rankdpo": rankdpo,
  "lambda": lipo_lambda,
  "lair": lair,
}

# Options that enter an objective as mere factors. The step takes them as inputs, so that
# runs which differ in them alone compile it once.
INPUTS = ("beta",)

# Which scalars an objective reads. One that needs only `err` runs without a reference.
NEEDS: Mapping[str, frozenset[str]] = {
  **dict.fromkeys(OBJECTIVES, frozenset({"err", "ref_err"})),
  **dict.fromkeys(("sft", "mapo"), frozenset({"err"})),
  "dspo": frozenset({"err", "ref_err", "drift"}),
}


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective with its options bound.

  Attributes:
    name: its name in `OBJECTIVES`.
    needs: the fields of `Denoising` that it reads.
    hyper: the bound options.
  """

  name: str
  needs: frozenset[str]
  hyper: Mapping[str, Any]
  fn: ObjectiveFn = dataclasses.field(repr=False)

  def __call__(self, denoising: Denoising, ranking: Ranking) -> tuple[Array, Metrics]:
    return self.fn(denoising, ranking)

  @property
  def inputs(self) -> dict[str, float]:
    """Those of its options that are in `INPUTS`."""
    return {name: self.hyper[name] for name in INPUTS if name in self.hyper}

  def with_inputs(self, inputs: Mapping[str, Any]) -> Objective:
    """The same with other values of these options; they may be traced scalars."""
    hyper = {**self.hyper, **inputs}
    return dataclasses.replace(
      self, hyper=hyper, fn=functools.partial(self.fn, **inputs)
    )


def get(name: str, **hyper) -> Objective:
  """Returns the objective called `name` with its hyper-parameters bound.

  Args:
    name: a name in `OBJECTIVES`.
    **hyper: the objective's keyword-only parameters.

  Raises:
    UserError: unknown name or hyper-parameter (with the nearest match), or a missing one.

  >>> get("lpo", beta=2000.0).needs == {"err", "ref_err"}
  True
  """
  bound = tables.bind("objective", OBJECTIVES, name, hyper)
  return Objective(name=name, needs=NEEDS[name], hyper=dict(hyper), fn=bound)
