"""Lists with another order than people gave them: reversed, or shuffled as a control."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import unknown_name


def _given(lists: RankedLists) -> RankedLists:
  return lists


def _reversed(lists: RankedLists) -> RankedLists:
  """The worst is the best: rank r of 0..R becomes R - r, and a tie stays a tie.

  Scores are mirrored between the list's best and worst, so that they agree with ranks.
  """
  image, rank, score = lists.image.copy(), lists.rank.copy(), lists.score.copy()
  for begin, end in zip(lists.offsets[:-1], lists.offsets[1:]):
    span = slice(begin, end)
    image[span] = lists.image[span][::-1]
    rank[span] = lists.rank[span].max() - lists.rank[span][::-1]
    scores = lists.score[span]
    score[span] = (scores.max() + scores.min() - scores)[::-1]
  return dataclasses.replace(lists, image=image, rank=rank, score=score)


def _shuffled(lists: RankedLists) -> RankedLists:
  """Deals each list's images anew to its ranks and scores, by the list's id alone.

  The id does not depend on ranks: the order that results says nothing about them, and
  is the same in every epoch, process and arrangement of the data.
  """
  image = lists.image.copy()
  for list_id, begin, end in zip(lists.list_id, lists.offsets[:-1], lists.offsets[1:]):
    # From names, not from ranks: a permutation of the ranked order is as random, but
    # the same images in another order would then be another shuffle.
    named = sorted(lists.image[begin:end], key=lambda i: lists.image_uids[i])
    image[begin:end] = np.random.default_rng(int(list_id)).permutation(named)
  return dataclasses.replace(lists, image=image)


RANKS: dict[str, Callable[[RankedLists], RankedLists]] = {
  "given": _given,
  "reversed": _reversed,
  "shuffled": _shuffled,
}


def rerank(lists: RankedLists, ranks: str) -> RankedLists:
  """Returns the lists in the order that `ranks` names; ids and sizes stay.

  Args:
    lists: as built.
    ranks: a name in `RANKS`. "given": as people ranked. "reversed": worst first, what a
      model learns to avoid (NPO). "shuffled": an order that means nothing, a control.

  Raises:
    UserError: an unknown name.
  """
  if ranks not in RANKS:
    raise unknown_name("data.ranks", ranks, RANKS)
  return RANKS[ranks](lists)
