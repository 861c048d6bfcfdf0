"""A few judgements of every person, kept out of the lists: what a person is known by.

An embedding made of judgements that are also trained on would tell a run what it is
about to be asked, and one made of those it is evaluated on would tell it the answer.
Whole sessions are kept out, all that a person said under a prompt, because two judgements
of one session share images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from lpo_jax.data.judgements import Judgements


@dataclasses.dataclass(frozen=True)
class FewShot:
  """What is known of people.

  Attributes:
    held: [J] bool, the judgements that no list may state.
    examples: person -> rows of the clear judgements that describe them, at most as many
      as were asked for; people without any are not there.
  """

  held: np.ndarray
  examples: Mapping[str, np.ndarray]


def choose(source: Judgements, count: int) -> FewShot:
  """Takes sessions of each person until they hold so many clear judgements.

  Which come first follows from the names of person and prompt alone: not from the order
  of rows, nor from how many there are.

  Args:
    source: the judgements.
    count: clear ones that describe a person; ties and missing labels are none.
  """
  label = np.asarray(source.label, np.float64)
  clear = np.isfinite(label) & (label != 0.5) & (source.image_a != source.image_b)
  sessions: dict[int, dict[int, list[int]]] = {}
  known = np.flatnonzero(source.user >= 0)
  for row in known.tolist():
    own = sessions.setdefault(int(source.user[row]), {})
    own.setdefault(int(source.prompt[row]), []).append(row)
  held, examples = np.zeros(len(source), bool), {}
  for user, own in sessions.items():
    name, found = source.users[user], []
    prompts = sorted(own, key=lambda p: _place(name, source.prompts[p]))
    for prompt in prompts:
      if len(found) >= count:
        break
      rows = sorted(own[prompt], key=lambda r: _names(source, r))
      held[rows] = True
      found += [row for row in rows if clear[row]]
    if found:
      examples[name] = np.asarray(found[:count], np.int64)
  return FewShot(held, dict(sorted(examples.items())))


def winner_and_loser(
  source: Judgements, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the images that were preferred, and of those that were not."""
  first = source.label[rows] > 0.5
  a, b = source.image_a[rows], source.image_b[rows]
  return np.where(first, a, b), np.where(first, b, a)


def without(source: Judgements, held: np.ndarray) -> Judgements:
  """The judgements that may be in lists; the others are counted as few_shot."""
  columns = ("prompt", "user", "image_a", "image_b", "label", "weight")
  rest = {name: getattr(source, name)[~held] for name in columns}
  dropped = {**source.dropped, "few_shot": int(held.sum())}
  return dataclasses.replace(source, **rest, dropped=dropped)


def _place(user: str, prompt: str) -> bytes:
  text = f"few_shot/{user}\0{prompt}".encode("utf-8", "surrogatepass")
  return hashlib.blake2b(text, digest_size=8).digest()


def _names(source: Judgements, row: int) -> tuple:
  a, b = source.image_uids[source.image_a[row]], source.image_uids[source.image_b[row]]
  # The same judgement, whichever side it was shown on.
  label = float(source.label[row])
  return (a, b, label) if a <= b else (b, a, 1 - label)
