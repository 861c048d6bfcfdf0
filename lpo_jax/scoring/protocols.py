"""Which of a prompt's images are compared: protocols by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lpo_jax.errors import unknown_name

Scores = Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Selection:
  """The scores that a protocol compares.

  Attributes:
    scores: candidate -> scorer -> [m].
    prompt: [m] the prompt's number.
    image: [m] which of the n images, the same for all candidates; None where each
      candidate has its own.
  """

  scores: Scores
  prompt: np.ndarray
  image: np.ndarray | None


def same_seed(scores: Scores, prompt: Sequence[int], chooser: str = "") -> Selection:
  """Every image against the other model's from the same prompt and seed.

  Reference: Diffusion-DPO (arXiv:2311.12908).
  """
  del chooser
  prompt = np.asarray(prompt)
  return Selection(scores, prompt, np.arange(len(prompt)))


def median_of_k(scores: Scores, prompt: Sequence[int], chooser: str = "") -> Selection:
  """One image for each prompt and model: the one whose score is the median of its k.

  Of an even k the lower of the two in the middle; of equal scores the earlier image.

  Args:
    scores: candidate -> scorer -> [n].
    prompt: [n] the prompt's number.
    chooser: the scorer whose median is taken, of all scores; "": each scorer its own.

  Raises:
    UserError: a chooser that no candidate was scored by.

  Reference: Diffusion-DRO (arXiv:2510.18353), k = 5, chosen by PickScore.
  """
  prompt = np.asarray(prompt)
  groups = [np.flatnonzero(prompt == number) for number in np.unique(prompt)]

  def middle(values: np.ndarray) -> np.ndarray:
    return np.array([
      group[np.argsort(values[group], kind="stable")[(len(group) - 1) // 2]]
      for group in groups
    ])  # fmt: skip

  selected: dict[str, dict[str, np.ndarray]] = {}
  for name, by_scorer in scores.items():
    if chooser and chooser not in by_scorer:
      raise unknown_name("eval.median_by", chooser, by_scorer)
    selected[name] = {
      scorer: values[middle(by_scorer[chooser or scorer])]
      for scorer, values in by_scorer.items()
    }
  return Selection(selected, np.unique(prompt), None)


PROTOCOLS: dict[str, Callable[..., Selection]] = {
  "same_seed": same_seed,
  "median_of_k": median_of_k,
}


def get(name: str) -> Callable[..., Selection]:
  """Returns a protocol; an unknown name is refused with the list."""
  if name not in PROTOCOLS:
    raise unknown_name("eval.protocols", name, PROTOCOLS)
  return PROTOCOLS[name]
