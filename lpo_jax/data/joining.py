"""Judgements joined into lists under construction: what each strategy makes of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lpo_jax.data import judgements as judgements_lib
from lpo_jax.data import orders
from lpo_jax.data.judgements import Numbered

SHARE_STEP = 1e-6  # shares of a win are rounded to this: labels are fp32 upstream


@dataclasses.dataclass
class Made:
  """Lists under construction, flat, in no particular order.

  Attributes:
    size: images of each list.
    node: its images, best first.
    rank: their ranks.
    owned: number of relations each list states.
    relation: which, as indices into `agree` and `weight`.
    agree: judgements that each relation stands for.
    weight: the sum of their weights.
    facts: fields of the report.
    score: of each image, in step with `node`; empty where the strategy gives none.
  """

  agree: np.ndarray
  weight: np.ndarray
  facts: dict[str, Any]
  size: list[int] = dataclasses.field(default_factory=list)
  node: list[int] = dataclasses.field(default_factory=list)
  rank: list[int] = dataclasses.field(default_factory=list)
  owned: list[int] = dataclasses.field(default_factory=list)
  relation: list[int] = dataclasses.field(default_factory=list)
  score: list[float] = dataclasses.field(default_factory=list)

  def add(self, node: Sequence[int], rank: Sequence[int], relation: Sequence[int]):
    """Appends one list."""
    self.size.append(len(node))
    self.node += node
    self.rank += rank
    self.owned.append(len(relation))
    self.relation += relation

  def add_pairs(self, better: np.ndarray, worse: np.ndarray, relation: np.ndarray):
    """Appends a list of two per relation."""
    self.size += [2] * len(better)
    self.node += np.stack([better, worse], 1).reshape(-1).tolist()
    self.rank += [0, 1] * len(better)
    self.owned += [1] * len(better)
    self.relation += relation.tolist()


def _joined(
  rows: Numbered,
  max_size: int,
  tie_tolerance: float,
  *,
  strategy: Callable[[orders.Component, int], orders.Outcome],
  ties_join: bool,
) -> Made:
  """Runs a strategy on every connected component of the majority's relations."""
  del tie_tolerance  # near ties are ties by now
  voted = judgements_lib.majority(rows)
  facts = {
    "repeated": rows.repeated,
    "contradicted_pairs": voted.contradicted_pairs,
    "contradictions": voted.contradictions,
    "outvoted": voted.outvoted,
  }
  made = Made(voted.agree, voted.weight, facts)
  joins = np.flatnonzero(~voted.tie | ties_join)
  parts = judgements_lib.components(
    voted.better[joins], voted.worse[joins], len(rows.node_group)
  )
  part = parts.of_node[voted.better[joins]]
  # Components of two images are most of a data set and need no graph.
  simple = (np.diff(parts.start)[part] == 2) & ~voted.tie[joins]
  pairs = joins[simple]
  made.add_pairs(voted.better[pairs], voted.worse[pairs], pairs)
  # The others one by one. The sort is stable: relations stay strongest first.
  order = np.argsort(part, kind="stable")
  order = order[~simple[order]]
  relation, part = joins[order], part[order]
  edges = np.stack([voted.better[relation], voted.worse[relation]], 1)
  edges = list(map(tuple, parts.place[edges].tolist()))
  tie, relation = voted.tie[relation].tolist(), relation.tolist()
  bounds = np.flatnonzero(np.diff(part, prepend=-1, append=-1)).tolist()
  refused: dict[str, list[int]] = {"cycles": [], "ties_yielded": [], "all_tied": []}
  tied_components = 0
  for begin, end in itertools.pairwise(bounds):
    nodes = parts.nodes[parts.start[part[begin]] : parts.start[part[begin] + 1]]
    nodes = nodes.tolist()
    wins = [i for i in range(begin, end) if not tie[i]]
    ties = [i for i in range(begin, end) if tie[i]]
    component = orders.Component(
      len(nodes), [edges[i] for i in wins], [edges[i] for i in ties]
    )
    outcome = strategy(component, max_size)
    for sublist in outcome.lists:
      stated = [relation[wins[i]] for i in sublist.wins]
      stated += [relation[ties[i]] for i in sublist.ties]
      made.add([nodes[i] for i in sublist.images], sublist.ranks, stated)
    refused["cycles"] += [relation[wins[i]] for i in outcome.cut]
    refused["ties_yielded"] += [relation[ties[i]] for i in outcome.yielded]
    refused["all_tied"] += [relation[ties[i]] for i in outcome.all_tied]
    tied_components += bool(outcome.all_tied)
  left = np.ones(len(voted.tie), bool)
  left[made.relation] = False
  for reason, lost in refused.items():
    facts[reason] = int(voted.agree[lost].sum())
    left[lost] = False
  facts["ties_not_expressible"] = int(voted.agree[left].sum())
  facts["cycle_cuts"] = len(refused["cycles"])
  facts["lists_dropped"] = {"all tied": tied_components} if tied_components else {}
  return made


def _pairs(rows: Numbered, max_size: int, tie_tolerance: float) -> Made:
  """One list of two per judgement with a winner, repeated and opposed ones alike."""
  del max_size, tie_tolerance
  won = np.flatnonzero(rows.label != 0.5)
  a_won = rows.label[won] > 0.5
  better = np.where(a_won, rows.a[won], rows.b[won])
  worse = np.where(a_won, rows.b[won], rows.a[won])
  order = np.lexsort((rows.weight[won], worse, better))
  facts = {
    "repeated": rows.repeated,
    "ties_not_expressible": len(rows.label) - len(won),
  }
  made = Made(np.ones(len(won), np.int64), rows.weight[won], facts)
  made.add_pairs(better[order], worse[order], order)
  return made


def win_shares(rows: Numbered) -> np.ndarray:
  """The share of the win that each image got over all its judgements.

  share_i = sum_j w_j y_ij / sum_j w_j, over the judgements j of image i, where y_ij is 1
  for a win, 0 for a loss, 1/2 for a tie, and what a soft label says.

  Args:
    rows: the judgements.

  Returns:
    [V] float64 in 0..1, rounded to `SHARE_STEP`; 1/2 where all that was said of an image
    weighs nothing.
  """
  node = np.concatenate([rows.a, rows.b])
  share = np.concatenate([rows.label, 1 - rows.label])
  weight = np.concatenate([rows.weight, rows.weight])
  won = np.bincount(node, weight * share, len(rows.node_group))
  total = np.bincount(node, weight, len(rows.node_group))
  half = np.full(len(total), 0.5)
  return np.round(np.divide(won, total, out=half, where=total > 0), 6)


def _by_name(rows: Numbered) -> Numbered:
  """The judgements in an order that what they say decides, and with it every sum."""
  low, high = np.minimum(rows.a, rows.b), np.maximum(rows.a, rows.b)
  # fp32: one less 0.3 is not quite 0.7.
  label = np.round(np.where(rows.a == low, rows.label, 1 - rows.label), 6)
  order = np.lexsort((rows.weight, label, high, low))
  return dataclasses.replace(
    rows,
    a=low[order],
    b=high[order],
    label=label[order],
    weight=rows.weight[order],
  )


def _scores(rows: Numbered, max_size: int, tie_tolerance: float) -> Made:
  """One list per connected set of images, ranked by their shares of the win."""
  rows = _by_name(rows)
  facts: dict[str, Any] = {"repeated": rows.repeated}
  made = Made(np.ones(len(rows.label), np.int64), rows.weight, facts)
  share, count = win_shares(rows), len(rows.node_group)
  parts = judgements_lib.components(rows.a, rows.b, count)
  order = np.lexsort((np.arange(count), -share, parts.of_node))
  nodes, worse = order.tolist(), (-share[order]).tolist()
  ranks: list[int] = []
  # Windows overlap in their first image alone: `own` is where an image is new.
  own, head = [-1] * count, []
  tied = np.zeros(len(parts.start) - 1, bool)
  for part, (begin, end) in enumerate(itertools.pairwise(parts.start.tolist())):
    found = orders.anchors(worse[begin:end], tie_tolerance + SHARE_STEP / 2)
    found = orders.dense(found)
    ranks += found
    cuts = orders.windows(found, max_size)
    tied[part] = not cuts
    for window, window_ranks in cuts:
      images = [nodes[begin + i] for i in window]
      head.append(images[0])
      for image in images[own[images[0]] >= 0 :]:
        own[image] = len(made.size)
      made.add(images, window_ranks, [])
      made.score += [-worse[begin + i] for i in window]
  place, rank = np.empty(count, np.int64), np.empty(count, np.int64)
  place[order], rank[order] = np.arange(count), ranks
  first = place[rows.a] < place[rows.b]
  above, below = np.where(first, rows.a, rows.b), np.where(first, rows.b, rows.a)
  own, head = np.asarray(own, np.int64), np.asarray([*head, -1], np.int64)
  inside = own[below]  # -1 is no list, and the last of `head` is nobody
  together = (inside >= 0) & ((own[above] == inside) | (head[inside] == above))
  _settle(
    made,
    inside=np.where(together, inside, -1),
    all_tied=tied[parts.of_node[rows.a]],
    tie=rows.label == 0.5,
    # > 0: the shares say what the judgement says; 0: that the images tie.
    agrees=np.sign(rows.label - 0.5) * (rank[rows.b] - rank[rows.a]),
    ordered=rank[rows.a] != rank[rows.b],
  )
  facts["lists_dropped"] = {"all tied": int(tied.sum())} if tied.any() else {}
  return made


def _settle(
  made: Made,
  *,
  inside: np.ndarray,
  all_tied: np.ndarray,
  tie: np.ndarray,
  agrees: np.ndarray,
  ordered: np.ndarray,
) -> None:
  """Gives every judgement to the list that states it, or to the reason against it.

  Args:
    made: gets the relations, which are single judgements here, and the facts.
    inside: [R] the list that both images are in, -1 for none.
    all_tied: [R] bool, the images belong to a set without any order.
    tie: [R] bool, the judgement says that the images tie.
    agrees: [R] > 0 where the images are ranked as the judgement says.
    ordered: [R] bool, the images have different ranks.
  """
  stated = ~all_tied & np.where(tie, ~ordered, agrees > 0)
  used = stated & (inside >= 0)
  reasons = {
    "all_tied": all_tied,
    "ties_yielded": ~all_tied & tie & ordered,
    "against_scores": ~all_tied & ~tie & (agrees <= 0),
    "ties_not_expressible": stated & ~used & tie,
    "split_apart": stated & ~used & ~tie,
  }
  made.facts.update({reason: int(lost.sum()) for reason, lost in reasons.items()})
  rows = np.flatnonzero(used)
  made.relation = rows[np.argsort(inside[rows], kind="stable")].tolist()
  made.owned = np.bincount(inside[rows], minlength=len(made.size)).tolist()


# (judgements, most images per list, how close scores tie) -> lists.
STRATEGIES: dict[str, Callable[[Numbered, int, float], Made]] = {
  "paths": functools.partial(_joined, strategy=orders.paths, ties_join=False),
  "levels": functools.partial(_joined, strategy=orders.levels, ties_join=True),
  "choice": functools.partial(_joined, strategy=orders.choice, ties_join=False),
  "pairs": _pairs,
  "scores": _scores,
}
