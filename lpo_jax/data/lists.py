"""Judgements joined into ranked lists: majority, cycles, ties, and a full account."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lpo_jax.data import few_shot as few_shot_lib
from lpo_jax.data import judgements as judgements_lib
from lpo_jax.data import orders, reranking
from lpo_jax.data.joining import STRATEGIES, Made
from lpo_jax.data.judgements import Judgements, Numbered
from lpo_jax.data.ranked import DROP_REASONS, ListReport, RankedLists, list_ids
from lpo_jax.errors import UserError, unknown_name

# What judgements have in place of a strategy that is for finished lists alone.
_INSTEAD = {
  "winners": "With 'choice', the objective sft learns from each winner and no other.",
  "groups": "With 'levels', or 'scores', images become lists of data.max_list_size.",
}
GROUPS = ("prompt", "prompt_user")
TIES = ("keep", "drop")
WEIGHTS = ("uniform", "num_example_per_prompt")


def build(
  source: Judgements | RankedLists,
  strategy: str = "paths",
  *,
  max_size: int = 8,
  group_by: str = "prompt",
  ties: str = "keep",
  weight: str = "uniform",
  tie_tolerance: float = 0.0,
  ranks: str = "given",
  few_shot: int = 0,
) -> tuple[RankedLists, ListReport]:
  """Joins judgements into ranked lists of 2 to `max_size` images.

  Repeated judgements of two images are decided by the sum of their labels. The result
  depends on texts and uids only, never on the order of rows, and lists come sorted by
  prompt text. Strategies for judgements:

  * ``paths``: the longest chains of wins, every win in exactly one list (no ties).
  * ``levels``: one list per connected set of images, rank = longest chain of wins down
    to the image, ties kept.
  * ``choice``: each winner over the images it met, [0, 1, 1, ...].
  * ``pairs``: each judgement with a winner by itself, as Diffusion-DPO.
  * ``scores``: one list per connected set of images, ranks by descending share of the
    win over all judgements of an image (see `joining.win_shares`), ties within
    `tie_tolerance`; the shares are the lists' scores.

  A source of finished lists takes `paths` and `levels` as "the list as it is", `choice`
  as the best over the rest, `pairs` as all ordered pairs, `groups` as separate lists
  that its images are dealt into at random, `winners` as the best by itself (for `sft`),
  and `scores` as ranks by descending score, ties within `tie_tolerance`; its own ties
  and weights stay.

  Args:
    source: what `sources.read` returned.
    strategy: see above.
    max_size: most images per list; longer ones are split.
    group_by: "prompt" pools annotators, "prompt_user" joins one person's judgements.
    ties: "keep" lets ties merge images where the strategy can say so, "drop" does not.
    weight: of a list: "uniform" (1), or "num_example_per_prompt" for the mean weight of
      its judgements, or of all in its group where it states none.
    tie_tolerance: scores are a tie if they differ by no more; of judgements, but with
      `scores`, they are the two images' shares of the win (0.55 and 0.45 differ by 0.1).
      Among the scores of a list each is compared with the best of the images it would
      tie with.
    ranks: "given", or the order to replace it by, see `reranking`.
    few_shot: clear judgements of each person that no list may state, see `few_shot`.

  Returns:
    The lists (possibly none, see `refuse_empty`) and what became of every judgement.

  Raises:
    UserError: an unknown choice, a strategy the source has nothing for, max_size < 2,
      few_shot of lists.
  """
  for kind, name, known in (
    ("group_by", group_by, GROUPS),
    ("ties", ties, TIES),
    ("weight", weight, WEIGHTS),
    ("ranks", ranks, reranking.RANKS),
    ("strategy", strategy, sorted({*STRATEGIES, *LIST_STRATEGIES})),
  ):
    if name not in known:
      raise unknown_name(f"data.{kind}", name, known)
  if max_size < 2:
    raise UserError(
      f"data.max_list_size is {max_size}; a ranked list has at least 2 images. "
      "Set it to 2 or more (Diffusion-LPO uses 8)."
    )
  if not tie_tolerance >= 0:
    raise UserError(f"data.tie_tolerance is {tie_tolerance}; expected 0 or more.")
  if few_shot:
    source = _without_few_shot(source, few_shot)
  if isinstance(source, RankedLists):
    lists, report = _from_lists(source, strategy, max_size, tie_tolerance)
    return reranking.rerank(lists, ranks), report
  if strategy not in STRATEGIES:
    raise UserError(
      f"data.strategy={strategy!r} needs ranked lists, but this source holds judgements "
      f"of two images. Set it to one of: {', '.join(STRATEGIES)}. {_INSTEAD[strategy]}"
    )
  if tie_tolerance and strategy != "scores":  # which compares the pooled shares
    source = _with_near_ties(source, tie_tolerance)
  rows = judgements_lib.number(
    source, by_user=group_by == "prompt_user", keep_ties=ties == "keep"
  )
  made = STRATEGIES[strategy](rows, max_size, tie_tolerance)
  lists, report = _finish(source, rows, made, strategy, weight)
  return reranking.rerank(lists, ranks), report


def _without_few_shot(source: Judgements | RankedLists, count: int) -> Judgements:
  """Leaves out what describes people.

  Raises:
    UserError: the source has no judgements of two images, or nobody's name.
  """
  if isinstance(source, RankedLists) or not (source.user >= 0).any() or count < 0:
    raise UserError(
      f"data.few_shot={count}: expected 0, or a number of judgements of two images by "
      "people with names (user_id), and this source has none."
    )
  return few_shot_lib.without(source, few_shot_lib.choose(source, count).held)


def _with_near_ties(source: Judgements, tolerance: float) -> Judgements:
  """Makes ties of the labels whose two shares are close."""
  label = np.asarray(source.label, np.float64)
  near = (
    np.abs(2 * label - 1) <= tolerance + 1e-6
  )  # labels are fp32: 0.55 is 0.55000001
  return dataclasses.replace(source, label=np.where(near, 0.5, label))


def refuse_empty(report: ListReport) -> None:
  """Says why no list came out, if none did.

  Raises:
    UserError: `report.lists` is 0; names the reasons with their counts.
  """
  if not report.lists:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
    raise UserError(
      f"no ranked list could be built from {report.judgements_total} judgements "
      f"({reasons or 'there are none'}). Training needs lists of at least 2 images "
      "with an order between them; check the labels, or try another data.strategy."
    )


def _finish(
  source: Judgements, rows: Numbered, made: Made, strategy: str, weight: str
) -> tuple[RankedLists, ListReport]:
  """Sorts the lists by prompt, names and weighs them, and closes the account."""
  size = np.asarray(made.size, np.int64)
  offsets = np.concatenate([[0], np.cumsum(size)])
  node = np.asarray(made.node, np.int64)
  best = node[offsets[:-1]]
  owner = np.repeat(np.arange(len(size)), np.asarray(made.owned, np.int64))
  relation = np.asarray(made.relation, np.int64)
  used = np.bincount(owner, made.agree[relation], len(size)).astype(np.int64)
  weights = np.ones(len(size))
  if weight == "num_example_per_prompt":
    # A window of a ranking by scores may state no judgement: its group's mean then.
    group = rows.node_group[rows.a]
    mean = np.bincount(group, rows.weight) / np.maximum(np.bincount(group), 1)
    weights = np.bincount(owner, made.weight[relation], len(size))
    weights = np.divide(weights, used, out=mean[rows.node_group[best]], where=used > 0)
  # Nodes are numbered by (prompt, user, uid), so the best image's node sorts lists; the
  # stable sort keeps the strategies' own order among lists with the same best image.
  order = np.argsort(best, kind="stable")
  group = rows.node_group[best[order]]
  items = _gather(offsets, order)
  lists = _make(
    source,
    prompt=rows.group_prompt[group],
    user=rows.group_user[group],
    size=size[order],
    image=rows.node_image[node[items]],
    rank=np.asarray(made.rank, np.int64)[items],
    score=np.asarray(made.score or [0.0] * len(items))[items],
    weight=weights[order],
  )
  facts = {"ties": rows.ties, **made.facts}
  return lists, _account(lists, strategy, used[order], rows.dropped, facts)


def _gather(offsets: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Item indices of the lists `order`, one list after the other."""
  size = np.diff(offsets)[order]
  shift = offsets[:-1][order] - (np.cumsum(size) - size)
  return np.arange(size.sum()) + np.repeat(shift, size)


def _make(
  source: Judgements | RankedLists,
  *,
  prompt: np.ndarray,
  user: np.ndarray,
  size: np.ndarray,
  image: np.ndarray,
  rank: np.ndarray,
  score: np.ndarray,
  weight: np.ndarray,
  source_image: np.ndarray | None = None,
) -> RankedLists:
  """Fills in types, offsets, list ids and what is carried along from the source."""
  offsets = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
  user = np.asarray(user, np.int32)
  return RankedLists(
    prompt=np.asarray(prompt, np.int32),
    list_id=list_ids(
      [source.prompts[i] for i in prompt],
      [source.image_uids[i] for i in image],
      offsets,
      [source.users[i] if i >= 0 else "" for i in user],
    ),
    weight=np.asarray(weight, np.float32),
    offsets=offsets,
    image=np.asarray(image, np.int32),
    rank=np.asarray(rank, np.int32),
    score=np.asarray(score, np.float32),
    prompts=source.prompts,
    image_uids=source.image_uids,
    user=user,
    users=source.users,
    images=source.images,
    models=source.models,
    image_model=source.image_model,
    source_image=source_image,
    dropped=source.dropped,
  )


def _account(
  lists: RankedLists,
  strategy: str,
  used: np.ndarray,
  dropped: Mapping[str, int],
  facts: Mapping[str, Any],
) -> ListReport:
  """Sums up; `used` is the number of judgements that each list states."""
  total_used = int(used.sum())
  reasons = {r: int(facts.get(r, 0) + dropped.get(r, 0)) for r in DROP_REASONS}
  length, count = np.unique(lists.lengths, return_counts=True)
  over_two = int(used[lists.lengths > 2].sum())
  return ListReport(
    strategy=strategy,
    judgements_total=total_used + sum(reasons.values()),
    judgements_used=total_used,
    lists=len(lists),
    prompts=len(np.unique(lists.prompt)),
    images=len(np.unique(lists.image)),
    lengths=dict(zip(length.tolist(), count.tolist(), strict=True)),
    share_over_two=over_two / total_used if total_used else 0.0,
    **{**facts, **reasons},
  )


def _from_lists(
  source: RankedLists, strategy: str, max_size: int, tie_tolerance: float
) -> tuple[RankedLists, ListReport]:
  """Splits and checks lists that came ranked; sorts them by prompt, user and uids."""
  split, uids = LIST_STRATEGIES[strategy], source.image_uids
  if strategy == "scores" and not np.any(source.score):
    raise UserError(
      "data.strategy='scores' ranks by the column `scores`, which this source does not "
      "have. Use 'paths' to take its lists as they are ranked."
    )
  if strategy != "scores" and tie_tolerance:
    raise UserError(
      f"data.tie_tolerance={tie_tolerance} compares scores, but data.strategy="
      f"{strategy!r} takes the lists as they are ranked. Set data.strategy='scores', or "
      "the tolerance to 0."
    )
  users = np.full(len(source), -1) if source.user is None else source.user
  made, lists_dropped, tied_rows = [], collections.Counter(), 0
  for row in range(len(source)):
    span = slice(source.offsets[row], source.offsets[row + 1])
    image, score = source.image[span].tolist(), source.score[span].tolist()
    worse = [-s for s in score] if strategy == "scores" else source.rank[span].tolist()
    order = sorted(range(len(image)), key=lambda i: (worse[i], uids[image[i]]))
    worse = [worse[i] for i in order]
    if strategy == "scores":
      ranks = orders.dense(orders.anchors(worse, tie_tolerance))
    else:
      ranks = orders.dense(worse)
    tied_rows += len(set(ranks)) < len(ranks)
    cuts = split(ranks, max_size, [uids[image[i]] for i in order])
    if not cuts:
      lists_dropped["all tied" if len(ranks) > 1 else "single image"] += 1
      continue
    user = source.users[users[row]] if users[row] >= 0 else ""
    for window, window_ranks in cuts:
      chosen = [order[i] for i in window]
      names = [uids[image[i]] for i in chosen]
      made.append(
        _Window(
          (source.prompts[source.prompt[row]], user, names, window_ranks),
          row,
          [image[i] for i in chosen],
          [score[i] for i in chosen],
        )
      )
  made.sort(key=lambda window: window.key)
  rows = np.asarray([window.row for window in made], np.int64)
  lists = _make(
    source,
    prompt=source.prompt[rows],
    user=users[rows],
    size=np.asarray([len(window.image) for window in made], np.int64),
    image=np.asarray([i for window in made for i in window.image], np.int64),
    rank=np.asarray([r for window in made for r in window.key[3]], np.int64),
    score=np.asarray([s for window in made for s in window.score]),
    weight=source.weight[rows],
    source_image=None if source.source_image is None else source.source_image[rows],
  )
  # A recorded ranking that was split counts once, with its first window.
  used = np.zeros(len(made), np.int64)
  used[np.unique(rows, return_index=True)[1]] = 1
  facts = {
    "ties": tied_rows,
    "lists_dropped": dict(lists_dropped),
    "all_tied": lists_dropped["all tied"],
    "single_image": lists_dropped["single image"],
  }
  return lists, _account(lists, strategy, used, source.dropped, facts)


@dataclasses.dataclass(frozen=True)
class _Window:
  """One list cut from a list of the source; `key` sorts it and ends with its ranks."""

  key: tuple[str, str, list[str], list[int]]
  row: int
  image: list[int]
  score: list[float]


LIST_STRATEGIES: dict[str, Callable[..., list[orders.Window]]] = {
  "paths": orders.windows,
  "levels": orders.windows,
  "scores": orders.windows,
  "choice": orders.best_first,
  "pairs": orders.all_pairs,
  "groups": orders.groups,
  "winners": orders.winners,
}
