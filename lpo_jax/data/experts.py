"""Experts: the few images of a collection that are worth imitating."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Every image under every prompt that it was judged for, by prompt and name.

  Attributes:
    prompt: [C] index into the source's `prompts`.
    image: [C] index into the source's `image_uids`.
    wins: [C] comparisons won; a tie is half a win.
    score: [C] the source's own score, the largest where there are several; None if the
      source has none.
  """

  prompt: np.ndarray
  image: np.ndarray
  wins: np.ndarray
  score: np.ndarray | None

  def __len__(self) -> int:
    return len(self.prompt)


def candidates(source: Judgements | RankedLists) -> Candidates:
  """Collects the (prompt, image) pairs of a source and how they fared.

  In a ranked list an image wins against each image below it.
  """
  read = _of_judgements if isinstance(source, Judgements) else _of_lists
  prompt, image, wins, score = read(source)
  order = np.asarray(
    sorted(
      range(len(prompt)),
      key=lambda i: (source.prompts[prompt[i]], source.image_uids[image[i]]),
    ),
    np.int64,
  )
  pairs = np.stack([prompt, image], 1)[order]
  new = np.ones(len(order), bool)
  new[1:] = np.any(pairs[1:] != pairs[:-1], axis=1)
  first = np.flatnonzero(new)
  return Candidates(
    prompt=pairs[first, 0],
    image=pairs[first, 1],
    wins=np.add.reduceat(wins[order], first),
    score=None if score is None else np.maximum.reduceat(score[order], first),
  )


def _of_judgements(source: Judgements) -> tuple:
  label = np.nan_to_num(np.asarray(source.label, np.float64), nan=0.0)
  other = np.where(np.isnan(source.label), 0.0, 1.0 - label)
  return (
    np.tile(source.prompt, 2),
    np.concatenate([source.image_a, source.image_b]),
    np.concatenate([label, other]),
    None,
  )


def _of_lists(source: RankedLists) -> tuple:
  wins = np.zeros(len(source.image))
  for start, stop in zip(source.offsets[:-1], source.offsets[1:], strict=True):
    rank = source.rank[start:stop]
    below = np.sum(rank[:, None] < rank[None], axis=1)
    tied = np.sum(rank[:, None] == rank[None], axis=1) - 1
    wins[start:stop] = below + tied / 2
  owner = np.repeat(np.arange(len(source)), source.lengths)
  score = np.asarray(source.score, np.float64) if np.any(source.score) else None
  return source.prompt[owner], source.image, wins, score


def by_wins(found: Candidates) -> np.ndarray:
  """[C] the number of comparisons won."""
  return found.wins


def by_score(found: Candidates) -> np.ndarray:
  """[C] the source's own score.

  Raises:
    UserError: it has none.
  """
  if found.score is None:
    raise UserError(
      "select.by='score' reads the source's own column `scores`, which it does not have."
      " Name a scorer in select.scorer, or take select.by='wins'."
    )
  return found.score


# What `top` sorts by, where no scorer is asked.
CRITERIA: dict[str, Callable[[Candidates], np.ndarray]] = {
  "score": by_score,
  "wins": by_wins,
}


def top(values: np.ndarray, count: int) -> tuple[np.ndarray, int]:
  """Chooses the `count` largest; equal ones by their place, which is by name.

  Args:
    values: [C] finite.
    count: how many; all of them if there are fewer.

  Returns:
    Indices in order of value, and how many left out are equal to the last one chosen.
  """
  order = np.argsort(-values, kind="stable")
  chosen = order[:count]
  equal = int(np.sum(values[order[count:]] == values[chosen[-1]])) if count else 0
  return chosen, equal


def named(source: Judgements | RankedLists, found: Candidates, uids: Sequence[str]):
  """Chooses the candidates of these names, in order of prompt and name.

  Raises:
    UserError: a name that the source does not have.
  """
  wanted = set(uids)
  missing = sorted(wanted - {source.image_uids[i] for i in found.image})
  if missing:
    raise UserError(
      f"{len(missing)} of {len(wanted)} image uids in select.uids are not in the source "
      f"(first: {missing[0]!r}). Expected names as in its column of uids."
    )
  return np.asarray(
    [i for i in range(len(found)) if source.image_uids[found.image[i]] in wanted],
    np.int64,
  )
