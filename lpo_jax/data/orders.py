"""Partial orders on the images of one prompt: cover them by paths, level ties.

Everything here works on one connected *component*: images are the integers 0..n-1, wins
are (winner, loser) and ties (a, b), both strongest first. What is otherwise equal is
decided by the smaller integer, so that results depend on the numbering alone.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import heapq
import itertools
from collections.abc import Sequence

from lpo_jax.data.precedence import Component, Edge, Order, consistent, kept
from lpo_jax.errors import UserError

MOST_PAIRS = 50_000  # of one list: all pairs of 316 images


@dataclasses.dataclass(frozen=True)
class Sublist:
  """A ranked list and the judgements it absorbs.

  Attributes:
    images: best first.
    ranks: 0 best, dense, equal for ties, in step with `images`.
    wins: indices into `Component.wins` that the list states.
    ties: indices into `Component.ties` that the list states.
  """

  images: Sequence[int]
  ranks: Sequence[int]
  wins: Sequence[int]
  ties: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a strategy made of a component.

  Attributes:
    lists: the ranked lists.
    cut: wins refused because they close a cycle.
    yielded: ties refused because the wins order their images.
    all_tied: ties between images that no win touches, which order nothing.
  """

  lists: Sequence[Sublist]
  cut: Sequence[int] = ()
  yielded: Sequence[int] = ()
  all_tied: Sequence[int] = ()


def paths(component: Component, max_size: int) -> Outcome:
  """Covers the wins by directed paths, longest first.

  Repeatedly takes the longest path over wins that no list states yet; of a path longer
  than `max_size` windows that share one image, so that no win falls between two. A list
  also absorbs every win it implies: a > b > c states a > c.

  Args:
    component: the images and what was said about them; ties have no place in a path.
    max_size: most images per list, at least 2.

  Returns:
    Lists without ties.
  """
  order, cut, _ = consistent(dataclasses.replace(component, ties=()))
  refused = set(cut)
  below: list[dict[int, int]] = [{} for _ in range(component.count)]
  for index, (winner, loser) in enumerate(component.wins):
    if index not in refused:
      below[winner][loser] = index
  # reach[i]: images on the longest path down from i; only ever shrinks.
  reach = [1] * component.count
  downwards = sorted(range(component.count), key=order.position.__getitem__)
  for image in reversed(downwards):
    reach[image] = 1 + max((reach[loser] for loser in below[image]), default=0)
  heap = [(-length, image) for image, length in enumerate(reach) if length > 1]
  heapq.heapify(heap)
  lists = []
  while heap:
    length, image = heapq.heappop(heap)
    if -length != reach[image]:
      continue  # an entry from before the path shrank; the current one is in the heap
    if length == -2:  # only pairs are left below any image
      for loser, index in sorted(below[image].items()):
        lists.append(Sublist((image, loser), (0, 1), (index,)))
      below[image], reach[image] = {}, 1
      continue
    path = [image]
    while reach[path[-1]] > 1:
      losers = below[path[-1]]
      path.append(min(other for other in losers if reach[other] == reach[path[-1]] - 1))
    for start in range(0, len(path) - 1, max_size - 1):
      window = path[start : start + max_size]
      members = set(window)
      wins = []
      for member in window:
        implied = sorted(members & below[member].keys())
        wins += [below[member].pop(loser) for loser in implied]
      lists.append(Sublist(window, range(len(window)), wins))
    _shrink(path, below, order, reach, heap)
  return Outcome(lists, cut)


def _shrink(path, below, order, reach, heap) -> None:
  """Brings `reach` and the heap up to date after wins among `path` were taken."""
  waiting = [(-order.position[image], image) for image in path]
  heapq.heapify(waiting)
  done = set()
  while waiting:
    _, image = heapq.heappop(waiting)
    if image in done:
      continue
    done.add(image)
    length = 1 + max((reach[loser] for loser in below[image]), default=0)
    if length != reach[image]:
      reach[image] = length
      for winner in order.above[image]:
        if image in below[winner]:
          heapq.heappush(waiting, (-order.position[winner], winner))
    if length > 1:
      heapq.heappush(heap, (-length, image))


def levels(component: Component, max_size: int) -> Outcome:
  """Makes one list of each component: rank = longest chain of wins down to the image.

  Tied images are one group and share its level. Images of one level come out tied
  although nobody may have compared them, and images of different levels ordered
  although that may follow from nothing: the price of one long list. A component larger
  than `max_size` is covered by connected windows, each grown from its best-placed image
  over judgements that no window states yet and levelled again by itself.

  Args:
    component: the images and what was said about them.
    max_size: most images per list, at least 2.

  Returns:
    Lists with ties.
  """
  order, cut, yielded = consistent(component)
  wins = kept(component.wins, cut)
  ties = kept(component.ties, yielded)
  level = order.levels()
  joined = Order(component.count)  # only its groups are used: who is connected to whom
  for a, b in (*wins, *ties):
    joined.group[joined.find(a)] = joined.find(b)
  members: dict[int, list[int]] = {}
  for image in range(component.count):
    members.setdefault(joined.find(image), []).append(image)
  by_root: dict[int, tuple[dict[Edge, int], dict[Edge, int]]] = {
    root: ({}, {}) for root in members
  }
  for kind, edges in enumerate((wins, ties)):
    for edge, index in edges.items():
      by_root[joined.find(edge[0])][kind][edge] = index
  lists: list[Sublist] = []
  all_tied: list[int] = []
  for root, images in members.items():
    own_wins, own_ties = by_root[root]
    if not own_wins:
      all_tied += own_ties.values()
    elif len(images) <= max_size:
      images = sorted(images, key=lambda image: (level[image], image))
      ranks = dense([level[image] for image in images])
      lists.append(Sublist(images, ranks, [*own_wins.values()], [*own_ties.values()]))
    else:
      lists += _windows(own_wins, own_ties, level, max_size)
  return Outcome(lists, cut, yielded, all_tied)


def dense(values: Sequence[int]) -> list[int]:
  """Ranks of ascending values: equal values share a rank and none is left out."""
  ranks: list[int] = []
  for i, value in enumerate(values):
    ranks.append(0 if i == 0 else ranks[-1] + int(value != values[i - 1]))
  return ranks


def anchors(values: Sequence[float], tolerance: float) -> list[float]:
  """Replaces ascending values by the first of those that are at most `tolerance` less.

  Groups do not chain: 0, 0.6 and 1.2 are two groups with a tolerance of 1.

  >>> anchors([0.0, 0.6, 1.2, 1.9], 1.0)
  [0.0, 0.0, 1.2, 1.2]
  """
  made: list[float] = []
  for value in values:
    near = bool(made) and value - made[-1] <= tolerance
    made.append(made[-1] if near else value)
  return made


def _windows(
  wins: dict[Edge, int], ties: dict[Edge, int], level: Sequence[int], max_size: int
) -> list[Sublist]:
  """Covers a component too large for one list by connected windows of `max_size`."""
  near: dict[int, dict[int, int]] = {}  # image -> neighbours by uncovered judgements
  for kind, edges in enumerate((wins, ties)):
    for a, b in edges:
      near.setdefault(a, {})[b] = kind
      near.setdefault(b, {})[a] = kind

  def place(image: int) -> tuple[int, int]:
    return level[image], image

  # Neighbours worst first: covered ones are dropped from the end, never looked at again.
  waiting = {
    image: sorted(others, key=place, reverse=True) for image, others in near.items()
  }

  def nearest(image: int) -> list[tuple[int, int]]:
    others, uncovered = waiting[image], near[image]
    while others and others[-1] not in uncovered:
      others.pop()
    found = (place(other) for other in reversed(others) if other in uncovered)
    return list(itertools.islice(found, max_size))

  lists = []
  for winner, loser in sorted(wins, key=lambda win: (place(win[0]), place(win[1]))):
    if loser not in near[winner]:
      continue
    window, frontier = {winner, loser}, []
    for image in (winner, loser):
      frontier += nearest(image)
    heapq.heapify(frontier)
    while frontier and len(window) < max_size:
      _, image = heapq.heappop(frontier)
      if image not in window:
        window.add(image)
        for other in nearest(image):
          heapq.heappush(frontier, other)
    lists.append(_window(sorted(window), wins, ties, near))
  return lists


def _window(images, wins, ties, near) -> Sublist:
  """Levels the images by the judgements among them and marks these as covered."""
  local = {image: i for i, image in enumerate(images)}
  inside = Order(len(images))
  stated: tuple[list[int], list[int]] = ([], [])
  edges: tuple[list[Edge], list[Edge]] = ([], [])
  for a in images:
    for b in images:
      for kind, table in enumerate((wins, ties)):
        if (a, b) in table:
          edges[kind].append((local[a], local[b]))
          if b in near[a]:
            stated[kind].append(table[a, b])
            del near[a][b], near[b][a]
  for win in edges[0]:
    inside.prefer(*win)
  for tie in edges[1]:
    inside.equate(*tie)
  level = inside.levels()
  best_first = sorted(range(len(images)), key=lambda i: (level[i], i))
  ranks = dense([level[i] for i in best_first])
  return Sublist([images[i] for i in best_first], ranks, *stated)


def choice(component: Component, max_size: int) -> Outcome:
  """Makes one list [0, 1, 1, ...] of each image over those it beat directly.

  States nothing that nobody said, so cycles do no harm and none is cut. A winner of
  more than ``max_size - 1`` images heads several lists.

  Args:
    component: the images and what was said about them; ties have no place in a choice.
    max_size: most images per list, at least 2.

  Returns:
    One list per winner and `max_size - 1` losers.
  """
  beaten: list[list[Edge]] = [[] for _ in range(component.count)]
  for index, (winner, loser) in enumerate(component.wins):
    beaten[winner].append((loser, index))
  lists = []
  for winner, losers in enumerate(beaten):
    losers.sort()
    for start in range(0, len(losers), max_size - 1):
      chosen = losers[start : start + max_size - 1]
      images = [winner, *(loser for loser, _ in chosen)]
      ranks = [0] + [1] * len(chosen)
      lists.append(Sublist(images, ranks, [index for _, index in chosen]))
  return Outcome(lists)


Window = tuple[list[int], list[int]]  # places in a ranked list, and their ranks


def windows(
  ranks: Sequence[int], max_size: int, uids: Sequence[str] = ()
) -> list[Window]:
  """Splits a ranked list; later windows start with an image above their first new one.

  Args:
    ranks: ascending and dense.
    max_size: most images per window, at least 2.
    uids: names of the images, in step with `ranks`; not looked at.

  Returns:
    Windows with an order in them. Some of more than `max_size` images that tie for best
    may be in none; if all tie, all are.

  >>> windows([0, 1, 1, 1], 3)
  [([0, 1, 2], [0, 1, 1]), ([0, 3], [0, 1])]
  """
  del uids
  made = []
  start = 0
  while start < len(ranks):
    better = bisect.bisect_left(ranks, ranks[start])  # images above the first new one
    above = [better - 1] if better else []
    stop = min(start + max_size - len(above), len(ranks))
    window = [*above, *range(start, stop)]
    if ranks[window[0]] < ranks[window[-1]]:
      made.append((window, dense([ranks[i] for i in window])))
    start = stop
  return made


def groups(ranks: Sequence[int], max_size: int, uids: Sequence[str]) -> list[Window]:
  """Deals a ranked list at random into separate lists of `max_size`, the last shorter.

  As if nobody had been shown more than `max_size` images at once. `windows` of the same
  size compare neighbours instead, so that they differ in how hard the choices are too.

  Args:
    ranks: ascending and dense.
    max_size: most images per group, at least 2.
    uids: names of the images, in step with `ranks`: their hashes decide who is dealt
      together, and nothing else does.

  Returns:
    Groups with an order in them, best first. An image left over alone is in none.

  >>> groups([0, 1, 2, 3], 2, "abcd")
  [([0, 2], [0, 1]), ([1, 3], [0, 1])]
  """
  dealt = sorted(range(len(ranks)), key=lambda i: _digest(uids[i]))
  made = []
  for start in range(0, len(ranks), max_size):
    chosen = sorted(dealt[start : start + max_size])
    if ranks[chosen[0]] < ranks[chosen[-1]]:
      made.append((chosen, dense([ranks[i] for i in chosen])))
  return made


def _digest(uid: str) -> bytes:
  return hashlib.blake2b(uid.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def best_first(
  ranks: Sequence[int], max_size: int, uids: Sequence[str] = ()
) -> list[Window]:
  """The best images over all others, whatever the order among these: [0, 1, 1, ...]."""
  del uids
  return windows([min(rank, 1) for rank in ranks], max_size)


def all_pairs(
  ranks: Sequence[int], max_size: int, uids: Sequence[str] = ()
) -> list[Window]:
  """Every two images of different rank.

  Raises:
    UserError: more than `MOST_PAIRS`, which nobody means to train on.
  """
  del max_size, uids
  below = [bisect.bisect_right(ranks, rank) for rank in ranks]
  count = sum(len(ranks) - first for first in below)
  if count > MOST_PAIRS:
    raise UserError(
      f"data.strategy='pairs' would make {count:,} lists of one list of {len(ranks):,} "
      f"images; the most is {MOST_PAIRS:,}. With data.max_list_size=2, set it to 'paths' "
      "for pairs of neighbours, or to 'groups' for pairs dealt at random; or set it to "
      "'choice' for the best over the others."
    )
  return [
    ([i, j], [0, 1]) for i, first in enumerate(below) for j in range(first, len(ranks))
  ]


def winners(
  ranks: Sequence[int], max_size: int, uids: Sequence[str] = ()
) -> list[Window]:
  """Each best image by itself, a list of one: what `sft` learns from, and no more."""
  del max_size, uids
  return [([i], [0]) for i, rank in enumerate(ranks) if rank == 0]
