"""What people said: comparisons of two images, and what the majority makes of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lpo_jax.data.stores import ImageStore


@dataclasses.dataclass(frozen=True)
class Judgements:
  """Recorded comparisons of two images, columnar: J judgements, I images.

  Attributes:
    prompts: texts that `prompt` indexes.
    image_uids: names that `image_a` and `image_b` index.
    users: annotators that `user` indexes.
    prompt: [J] int32.
    user: [J] int32, -1 where unknown.
    image_a: [J] int32.
    image_b: [J] int32.
    label: [J] float32 share of the win that went to image_a: 1, 0, 0.5 for a tie, NaN
      where nobody judged.
    weight: [J] float32, 1 / num_example_per_prompt where the source says so, else 1.
    images: the encoded images by index, or None.
    models: generators that `image_model` indexes.
    image_model: [I] int32, -1 where unknown; None if no image has one.
    dropped: reason -> number of rows refused while reading (`ranked.DROP_REASONS`).
  """

  prompts: Sequence[str]
  image_uids: Sequence[str]
  users: Sequence[str]
  prompt: np.ndarray
  user: np.ndarray
  image_a: np.ndarray
  image_b: np.ndarray
  label: np.ndarray
  weight: np.ndarray
  images: ImageStore | None = None
  models: Sequence[str] = ()
  image_model: np.ndarray | None = None
  dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.prompt)


def take(source: Judgements, rows: np.ndarray) -> Judgements:
  """Returns some of the judgements, with the words that these use, without images."""
  prompts, (prompt,) = _compact(source.prompts, source.prompt[rows])
  users, (user,) = _compact(source.users, source.user[rows])
  uids, (image_a, image_b) = _compact(
    source.image_uids, source.image_a[rows], source.image_b[rows]
  )
  return Judgements(
    prompts=prompts,
    image_uids=uids,
    users=users,
    prompt=prompt,
    user=user,
    image_a=image_a,
    image_b=image_b,
    label=source.label[rows],
    weight=source.weight[rows],
    dropped=source.dropped,
  )


def concatenate(pieces: Sequence[Judgements]) -> Judgements:
  """Returns all judgements, one piece after the other, without images."""
  prompts, (prompt,) = _merge(pieces, "prompts", "prompt")
  users, (user,) = _merge(pieces, "users", "user")
  uids, (image_a, image_b) = _merge(pieces, "image_uids", "image_a", "image_b")
  dropped: collections.Counter[str] = collections.Counter()
  for piece in pieces:
    dropped.update(piece.dropped)
  return Judgements(
    prompts=prompts,
    image_uids=uids,
    users=users,
    prompt=prompt,
    user=user,
    image_a=image_a,
    image_b=image_b,
    label=np.concatenate([piece.label for piece in pieces]),
    weight=np.concatenate([piece.weight for piece in pieces]),
    dropped=dict(dropped),
  )


def _compact(
  words: Sequence[str], *columns: np.ndarray
) -> tuple[list[str], list[np.ndarray]]:
  """The words that the columns use, and the columns as indices of these."""
  used = np.unique(np.concatenate(columns))
  used = used[used >= 0]
  place = np.full(len(words) + 1, -1, np.int32)  # the last is for "unknown"
  place[used] = np.arange(len(used))
  return [words[i] for i in used], [place[column] for column in columns]


def _merge(
  pieces: Sequence[Judgements], words: str, *columns: str
) -> tuple[list[str], list[np.ndarray]]:
  """The different words of all pieces, and the columns as indices of these."""
  merged = sorted({word for piece in pieces for word in getattr(piece, words)})
  number = {word: i for i, word in enumerate(merged)}
  maps = [
    np.asarray([number[word] for word in getattr(piece, words)] + [-1], np.int32)
    for piece in pieces
  ]
  return merged, [
    np.concatenate([m[getattr(piece, column)] for m, piece in zip(maps, pieces)])
    for column in columns
  ]


@dataclasses.dataclass(frozen=True)
class Numbered:
  """Labelled judgements on *nodes*: a node is one image within one group.

  Groups and nodes are numbered by prompt text, user name and image uid, so that nothing
  downstream can depend on the order of rows.

  Attributes:
    a: [R] node of image_a.
    b: [R] node of image_b, in the same group.
    label: [R] float64, finite.
    weight: [R] float64.
    node_group: [V] ascending.
    node_image: [V] index into `image_uids`.
    group_prompt: [G] index into `prompts`.
    group_user: [G] index into `users`, -1 if annotators are pooled or unknown.
    ties: labelled ties, before any were dropped.
    dropped: reason -> judgements refused so far.
  """

  a: np.ndarray
  b: np.ndarray
  label: np.ndarray
  weight: np.ndarray
  node_group: np.ndarray
  node_image: np.ndarray
  group_prompt: np.ndarray
  group_user: np.ndarray
  ties: int
  dropped: dict[str, int]

  @property
  def repeated(self) -> int:
    """Judgements beyond the first of the same two images in the same group."""
    low, high = np.minimum(self.a, self.b), np.maximum(self.a, self.b)
    return len(low) - len(np.unique(low * max(len(self.node_group), 1) + high))


def _text_ranks(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Rank of each text in sorted order, and the first index that holds each rank."""
  names = np.empty(len(texts), object)
  names[:] = texts
  _, first, rank = np.unique(names, return_index=True, return_inverse=True)
  return rank.astype(np.int64), first.astype(np.int64)


def number(source: Judgements, *, by_user: bool, keep_ties: bool) -> Numbered:
  """Drops what nobody can use and numbers groups and images by their names.

  Args:
    source: the judgements.
    by_user: a group is one prompt and one annotator instead of one prompt.
    keep_ties: whether ties stay.

  Returns:
    The labelled judgements of two different images.
  """
  dropped = dict(source.dropped)
  label = np.asarray(source.label, np.float64)
  prompt_rank, prompt_first = _text_ranks(source.prompts)
  user_rank, user_first = _text_ranks(source.users)
  image_rank, image_first = _text_ranks(source.image_uids)
  a, b = image_rank[source.image_a], image_rank[source.image_b]
  tie = label == 0.5
  ties = int(np.sum(tie & (a != b)))
  keep = np.ones(len(label), bool)
  for reason, bad in (
    ("unlabelled", np.isnan(label)),
    ("same_image", a == b),
    ("ties_dropped", tie & (not keep_ties)),
  ):
    dropped[reason] = dropped.get(reason, 0) + int(np.sum(bad & keep))
    keep &= ~bad
  group = prompt_rank[source.prompt]
  users = 1
  if by_user:
    users = 1 + len(user_first)  # number 0 is "unknown"
    group = group * users + np.append(user_rank, -1)[source.user] + 1
  groups, group = np.unique(group[keep], return_inverse=True)
  images = max(len(image_first), 1)
  keys, node = np.unique(
    np.concatenate([group * images + a[keep], group * images + b[keep]]),
    return_inverse=True,
  )
  return Numbered(
    a=node[: len(group)],
    b=node[len(group) :],
    label=label[keep],
    weight=np.asarray(source.weight, np.float64)[keep],
    node_group=keys // images,
    node_image=image_first[keys % images],
    group_prompt=prompt_first[groups // users],
    group_user=np.append(user_first, -1)[groups % users - 1],
    ties=ties,
    dropped=dropped,
  )


@dataclasses.dataclass(frozen=True)
class Majority:
  """What the sum of labels says about each two nodes, strongest first.

  Strongest: largest margin, then most votes, then first by name.

  Attributes:
    better: [P] node.
    worse: [P] node.
    tie: [P] bool, only ties were said; better and worse are then in order of name.
    agree: [P] judgements that say the same.
    weight: [P] sum of their weights.
    contradicted_pairs: pairs without a majority, which are left out.
    contradictions: their judgements.
    outvoted: judgements against the majority, ties among them.
  """

  better: np.ndarray
  worse: np.ndarray
  tie: np.ndarray
  agree: np.ndarray
  weight: np.ndarray
  contradicted_pairs: int
  contradictions: int
  outvoted: int


def majority(rows: Numbered) -> Majority:
  """Collapses all judgements of two images into one relation, or none."""
  low, high = np.minimum(rows.a, rows.b), np.maximum(rows.a, rows.b)
  # The judgement's margin for the lower node: +1 for a win, -1 for a loss, 0 for a tie.
  margin = (2 * rows.label - 1) * np.where(rows.a == low, 1, -1)
  nodes = max(len(rows.node_group), 1)
  pairs, pair = np.unique(low * nodes + high, return_inverse=True)
  # Soft labels are fp32 upstream: 0.7 and 0.3 must still cancel.
  total = np.round(np.bincount(pair, margin, len(pairs)), 6)
  votes = np.bincount(pair, minlength=len(pairs))
  decided = np.bincount(pair, margin != 0, len(pairs)) > 0
  contradicted = decided & (total == 0)
  agrees = (np.sign(margin) == np.sign(total)[pair]) & ~contradicted[pair]
  agree = np.bincount(pair, agrees, len(pairs)).astype(np.int64)
  low, high = np.divmod(pairs, nodes)
  better, worse = np.where(total < 0, high, low), np.where(total < 0, low, high)
  order = np.lexsort((worse, better, -votes, -np.abs(total)))
  order = order[~contradicted[order]]
  return Majority(
    better=better[order],
    worse=worse[order],
    tie=~decided[order],
    agree=agree[order],
    weight=np.bincount(pair, rows.weight * agrees, len(pairs))[order],
    contradicted_pairs=int(np.sum(contradicted)),
    contradictions=int(np.sum(votes[contradicted])),
    outvoted=int(np.sum((votes - agree)[~contradicted])),
  )


@dataclasses.dataclass(frozen=True)
class Components:
  """Connected components of nodes, numbered by their first node.

  Attributes:
    of_node: [V] component of each node.
    place: [V] place of each node within its component, ascending with the node.
    nodes: [V] nodes sorted by (component, node).
    start: [C + 1] where each component begins in `nodes`.
  """

  of_node: np.ndarray
  place: np.ndarray
  nodes: np.ndarray
  start: np.ndarray


def components(better: np.ndarray, worse: np.ndarray, count: int) -> Components:
  """Finds which of `count` nodes the relations connect."""
  from scipy import sparse
  from scipy.sparse import csgraph

  graph = sparse.coo_matrix(
    (np.ones(len(better), np.int8), (better, worse)), shape=(count, count)
  )
  _, label = csgraph.connected_components(graph, directed=False)
  _, first, label = np.unique(label, return_index=True, return_inverse=True)
  by_first = np.empty(len(first), np.int64)
  by_first[np.argsort(first)] = np.arange(len(first))
  of_node = by_first[label]
  nodes = np.argsort(of_node, kind="stable")
  start = np.concatenate([[0], np.cumsum(np.bincount(of_node, minlength=len(first)))])
  place = np.empty(count, np.int64)
  place[nodes] = np.arange(count) - start[of_node[nodes]]
  return Components(of_node, place, nodes, start)
