"""Scorers by name: (images, prompts) -> scores, higher is better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.scoring import digits

ScorerFn = Callable[[np.ndarray, Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Something that gives an image a score.

  Attributes:
    name: its name in `SCORERS`.
    measures: what a score is, in one sentence with its scale.
    fn: images [n, H, W, 3] uint8 and n prompts -> [n] fp64.
  """

  name: str
  measures: str
  fn: ScorerFn = dataclasses.field(repr=False)

  def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Scores images [n, H, W, 3] uint8 for n prompts: [n] fp64, all finite.

    Raises:
      UserError: shapes do not fit, or a score is not finite.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(prompts):
      raise UserError(
        f"scorer {self.name!r} expected images [n, H, W, 3] and n prompts, came "
        f"{images.shape} and {len(prompts)}."
      )
    scores = np.asarray(self.fn(images, prompts), np.float64)
    bad = int(np.count_nonzero(~np.isfinite(scores)))
    if bad:
      raise UserError(f"scorer {self.name!r} gave {bad} scores that are not finite.")
    return scores


SCORERS: dict[str, Scorer] = {
  scorer.name: scorer
  for scorer in (
    Scorer(
      "digits_taste",
      "What the simulated annotators like: upright strokes, and bold ones, in units of "
      "the spread among real digits.",
      digits.taste,
    ),
    Scorer(
      "digits_legibility",
      "Whether an independent reader, trained on real digits alone, recognises the "
      "prompted digit (0 or 1; the mean is the share recognised).",
      digits.legibility,
    ),
  )
}


def get(name: str) -> Scorer:
  """Returns the scorer called `name`; an unknown name is refused with the list."""
  if name not in SCORERS:
    raise unknown_name("scorer", name, SCORERS)
  return SCORERS[name]
