"""Evaluation by person: whom each candidate is told of, and win rates over people."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lpo_jax.data.image_folders import Case
from lpo_jax.errors import unknown_name
from lpo_jax.scoring import win_rate

Scores = Mapping[str, Mapping[str, np.ndarray]]


def _next_person(users: Sequence[str]) -> dict[str, str]:
  """Each person -> the next one, in an order that says nothing of them."""

  def place(user: str) -> bytes:
    text = f"another/{user}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).digest()

  order = sorted({user for user in users if user}, key=place)
  return dict(zip(order, order[1:] + order[:1], strict=True))


# eval.told -> the people of the prompts -> who is told of in place of each.
TOLD: dict[str, Callable[[Sequence[str]], Mapping[str, str]]] = {
  "own": lambda users: {},
  "another": _next_person,
  "nobody": lambda users: dict.fromkeys(users, ""),
}


def check(told: Mapping[str, str], candidates: Mapping[str, Any]) -> None:
  """Refuses what `eval.told` cannot be.

  Raises:
    UserError: an unknown candidate, or an unknown way.
  """
  for name, how in told.items():
    if name not in candidates:
      raise unknown_name("candidate in eval.told", name, candidates)
    if how not in TOLD:
      raise unknown_name(f"eval.told.{name}", how, TOLD)


def as_told(how: str, cases: Sequence[Case]) -> list[Case]:
  """The cases as a candidate is asked them: for whom, as `how` says."""
  instead = TOLD[how]([case.asked.user for case in cases])
  return [
    dataclasses.replace(
      case,
      asked=dataclasses.replace(
        case.asked, user=instead.get(case.asked.user, case.asked.user)
      ),
    )
    for case in cases
  ]


def compare(
  scores: Scores,
  pairs: Sequence[tuple[str, str]],
  cases: Sequence[Case],
  lower_is_better: set[str],
) -> list[dict[str, Any]]:
  """Win rates of all people and of each category of rows; the unit is the person.

  A person's images are not independent, and what is claimed is of people: the interval
  resamples people, each with all of their images.

  Args:
    scores: candidate -> scorer -> [n].
    pairs: (candidate, baseline).
    cases: [n]; those of nobody are left out.
    lower_is_better: scorers of which the smaller score wins.

  Returns:
    Rows as `win_rate.rows`, with "category" ("" for all) and "by_person": name ->
    win rate. Empty where the prompts are for nobody.
  """
  named = [i for i, case in enumerate(cases) if case.asked.user]
  groups = {"": named} if named else {}
  for category in dict.fromkeys(cases[i].category for i in named):
    if category:
      groups[category] = [i for i in named if cases[i].category == category]
  rows = []
  for category, places in groups.items():
    within = {
      name: {scorer: values[places] for scorer, values in by_scorer.items()}
      for name, by_scorer in scores.items()
    }
    people = [cases[i].asked.user for i in places]
    made = win_rate.rows(
      within, pairs, people, unit="prompt", lower_is_better=lower_is_better
    )
    for row in made:
      sides = [within[row[side]][row["scorer"]] for side in ("candidate", "baseline")]
      better = row["scorer"] not in lower_is_better
      each = by_person(*(sides if better else sides[::-1]), people)
      row |= {"category": category, "unit": "person", "by_person": each}
    rows += made
  return rows


def by_person(
  candidate: np.ndarray, baseline: np.ndarray, people: Sequence[str]
) -> dict[str, float]:
  """Each person's win rate: (wins + ties / 2) / images, more is better."""
  won = (candidate > baseline) + 0.5 * (candidate == baseline)
  names, which = np.unique(np.asarray(people), return_inverse=True)
  rates = np.bincount(which, won) / np.bincount(which)
  return dict(zip(names.tolist(), rates.tolist(), strict=True))
