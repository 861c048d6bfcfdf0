"""Partial orders on the images of one prompt: cut cycles, cover by paths, level ties.

Everything here works on one connected *component*: images are the integers 0..n-1, wins
are (winner, loser) and ties (a, b), both strongest first. What is otherwise equal is
decided by the smaller integer, so that results depend on the numbering alone.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

Edge = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Component:
  """Images that judgements connect.

  Attributes:
    count: number of images n.
    wins: (winner, loser), strongest majority first.
    ties: (a, b) with a < b, most votes first.
  """

  count: int
  wins: Sequence[Edge]
  ties: Sequence[Edge] = ()


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


class Order:
  """A partial order that grows win by win, tie by tie, and refuses to be circular.

  Keeps a topological position per image and repairs it locally (Pearce and Kelly 2006,
  "A dynamic topological sort algorithm for directed acyclic graphs"). A tie contracts
  two images into one group, which is legal exactly when neither stands above the other.

  Attributes:
    group: for each image the image that stands for its tied group (see `find`).
    above: for each group the groups that beat it directly.
    below: for each group the groups it beats directly.
    position: for each group its place in a topological order, winners first.
  """

  def __init__(self, count: int):
    self.group = list(range(count))
    self.above: list[set[int]] = [set() for _ in range(count)]
    self.below: list[set[int]] = [set() for _ in range(count)]
    self.position = list(range(count))

  def find(self, image: int) -> int:
    """Returns the representative of the image's tied group."""
    while self.group[image] != image:
      self.group[image] = self.group[self.group[image]]
      image = self.group[image]
    return image

  def prefer(self, winner: int, loser: int) -> bool:
    """Adds winner > loser; returns False, unchanged, if that would close a cycle."""
    winner, loser = self.find(winner), self.find(loser)
    if winner == loser:
      return False
    if self.position[winner] > self.position[loser]:
      beaten = self._reach(loser, self.below, 1, self.position[winner])
      if winner in beaten:
        return False
      beating = self._reach(winner, self.above, -1, self.position[loser])
      self._reorder(beating, beaten)
    self.below[winner].add(loser)
    self.above[loser].add(winner)
    return True

  def equate(self, a: int, b: int) -> bool:
    """Joins the groups of a and b; False, unchanged, if one stands above the other."""
    a, b = self.find(a), self.find(b)
    if a == b:
      return True
    if self.position[a] > self.position[b]:
      a, b = b, a
    beaten = self._reach(a, self.below, 1, self.position[b])
    if b in beaten:
      return False
    # The order in which b comes just before a also has room for both in b's place:
    # everything above either is before it and everything below either is after it.
    self._reorder(self._reach(b, self.above, -1, self.position[a]), beaten)
    self.group[a] = b
    for neighbours, back in ((self.below, self.above), (self.above, self.below)):
      for other in neighbours[a]:
        back[other].discard(a)
        back[other].add(b)
      neighbours[b] |= neighbours[a]
      neighbours[a] = set()
    return True

  def levels(self) -> list[int]:
    """Returns for each image the longest chain of wins that leads down to it."""
    count = len(self.group)
    level = [0] * count
    groups = [image for image in range(count) if self.group[image] == image]
    for group in sorted(groups, key=self.position.__getitem__):
      level[group] = max((level[up] + 1 for up in self.above[group]), default=0)
    return [level[self.find(image)] for image in range(count)]

  def _reach(self, start: int, step: list[set[int]], sign: int, limit: int) -> set[int]:
    """Groups reachable from `start` whose position has not passed `limit`."""
    seen, stack = {start}, [start]
    while stack:
      for other in step[stack.pop()]:
        if other not in seen and sign * (limit - self.position[other]) >= 0:
          seen.add(other)
          stack.append(other)
    return seen

  def _reorder(self, first: set[int], second: set[int]) -> None:
    """Lets `first` precede `second` within the positions they hold together."""
    by_position = self.position.__getitem__
    slots = sorted(self.position[group] for group in first | second)
    groups = sorted(first, key=by_position) + sorted(second, key=by_position)
    for group, slot in zip(groups, slots, strict=True):
      self.position[group] = slot


def consistent(component: Component) -> tuple[Order, list[int], list[int]]:
  """Builds the order that keeps the strongest wins, then the ties that fit.

  Wins are taken strongest first and one that would close a cycle with stronger ones is
  cut: of every cycle the weakest win goes, and none is cut without need (ranked pairs).

  Args:
    component: the images and what was said about them.

  Returns:
    The order, indices of the wins that were cut, indices of the ties that yielded.

  Reference:
    Tideman 1987, "Independence of clones as a criterion for voting rules".

  >>> consistent(Component(3, [(0, 1), (1, 2), (2, 0)]))[1]
  [2]
  """
  order = _acyclic(component)
  cut: list[int] = []
  if order is None:
    order = Order(component.count)
    cut = [i for i, win in enumerate(component.wins) if not order.prefer(*win)]
  yielded = [i for i, tie in enumerate(component.ties) if not order.equate(*tie)]
  return order, cut, yielded


def _acyclic(component: Component) -> Order | None:
  """The order of wins without cycles by one topological sort; None if there is one."""
  order = Order(component.count)
  for winner, loser in component.wins:
    order.below[winner].add(loser)
    order.above[loser].add(winner)
  waiting = [len(above) for above in order.above]
  queue = [image for image, above in enumerate(waiting) if not above]
  for image in queue:  # grows while it is read
    for loser in order.below[image]:
      waiting[loser] -= 1
      if not waiting[loser]:
        queue.append(loser)
  if len(queue) < component.count:
    return None
  for position, image in enumerate(queue):
    order.position[image] = position
  return order


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
  wins = _kept(component.wins, cut)
  ties = _kept(component.ties, yielded)
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


def _kept(edges: Sequence[Edge], refused: Iterable[int]) -> dict[Edge, int]:
  """The edges that stay, with their indices."""
  refused = set(refused)
  return {edge: index for index, edge in enumerate(edges) if index not in refused}


def dense(values: Sequence[int]) -> list[int]:
  """Ranks of ascending values: equal values share a rank and none is left out."""
  ranks: list[int] = []
  for i, value in enumerate(values):
    ranks.append(0 if i == 0 else ranks[-1] + int(value != values[i - 1]))
  return ranks


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

  lists = []
  for winner, loser in sorted(wins, key=lambda win: (place(win[0]), place(win[1]))):
    if loser not in near[winner]:
      continue
    window, frontier = {winner, loser}, []
    for image in (winner, loser):
      frontier += heapq.nsmallest(max_size, map(place, near[image]))
    heapq.heapify(frontier)
    while frontier and len(window) < max_size:
      _, image = heapq.heappop(frontier)
      if image not in window:
        window.add(image)
        for other in heapq.nsmallest(max_size, map(place, near[image])):
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


def windows(ranks: Sequence[int], max_size: int) -> list[Window]:
  """Splits a ranked list; later windows start with an image above their first new one.

  Args:
    ranks: ascending and dense.
    max_size: most images per window, at least 2.

  Returns:
    Windows with an order in them. Some of more than `max_size` images that tie for best
    may be in none; if all tie, all are.

  >>> windows([0, 1, 1, 1], 3)
  [([0, 1, 2], [0, 1, 1]), ([0, 3], [0, 1])]
  """
  made = []
  start = 0
  while start < len(ranks):
    above = [i for i in range(start) if ranks[i] < ranks[start]][-1:]
    stop = min(start + max_size - len(above), len(ranks))
    window = [*above, *range(start, stop)]
    if ranks[window[0]] < ranks[window[-1]]:
      made.append((window, dense([ranks[i] for i in window])))
    start = stop
  return made


def best_first(ranks: Sequence[int], max_size: int) -> list[Window]:
  """The best images over all others, whatever the order among these: [0, 1, 1, ...]."""
  return windows([min(rank, 1) for rank in ranks], max_size)


def all_pairs(ranks: Sequence[int], max_size: int) -> list[Window]:
  """Every two images of different rank."""
  places = range(len(ranks))
  return [([i, j], [0, 1]) for i in places for j in places if ranks[i] < ranks[j]]


def winners(ranks: Sequence[int], max_size: int) -> list[Window]:
  """Each best image by itself, a list of one: what `sft` learns from, and no more."""
  del max_size
  return [([i], [0]) for i, rank in enumerate(ranks) if rank == 0]
