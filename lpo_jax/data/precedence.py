"""What precedes what: wins and ties put together without circles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

Edge = tuple[int, int]
CLOSURE_IMAGES = 16_384  # a bit for each two of these is 32 MB


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
  cut: list[int] = []
  yielded: list[int] = []
  order = _arrange(component)
  if order is None or component.ties:
    # A circle of wins and ties lies within one part, so each part decides by itself.
    for part in _entangled(component):
      decide = _by_closure if part.count <= CLOSURE_IMAGES else _by_search
      own_cut, own_yielded = decide(part.count, part.wins, part.ties)
      cut += [part.win[i] for i in own_cut]
      yielded += [part.tie[i] for i in own_yielded]
    cut.sort()
    yielded.sort()
    wins, ties = kept(component.wins, cut), kept(component.ties, yielded)
    order = _arrange(Component(component.count, [*wins], [*ties]))
  return order, cut, yielded


def _arrange(component: Component) -> Order | None:
  """The order of wins and ties by one topological sort; None if there is a circle."""
  order = Order(component.count)
  for a, b in component.ties:
    order.group[order.find(a)] = order.find(b)
  for winner, loser in component.wins:
    winner, loser = order.find(winner), order.find(loser)
    order.below[winner].add(loser)
    order.above[loser].add(winner)
  groups = [image for image, group in enumerate(order.group) if group == image]
  waiting = {image: len(order.above[image]) for image in groups}
  queue = [image for image in groups if not waiting[image]]
  for image in queue:  # grows while it is read
    for loser in order.below[image]:
      waiting[loser] -= 1
      if not waiting[loser]:
        queue.append(loser)
  if len(queue) < len(groups):
    return None
  for position, image in enumerate(queue):
    order.position[image] = position
  return order


@dataclasses.dataclass
class _Part:
  """Images that reach each other by wins and ties, numbered anew.

  Attributes:
    count: number of its images.
    wins: (winner, loser), strongest first.
    ties: (a, b), most votes first.
    win: for each of `wins` its index in the component.
    tie: for each of `ties` its index in the component.
  """

  count: int = 0
  wins: list[Edge] = dataclasses.field(default_factory=list)
  ties: list[Edge] = dataclasses.field(default_factory=list)
  win: list[int] = dataclasses.field(default_factory=list)
  tie: list[int] = dataclasses.field(default_factory=list)


def _entangled(component: Component) -> list[_Part]:
  """The strongly connected parts, a tie leading both ways, that hold a win."""
  from scipy import sparse
  from scipy.sparse import csgraph

  count = component.count
  edges = [*component.wins, *component.ties, *((b, a) for a, b in component.ties)]
  start, stop = np.asarray(edges, np.int64).reshape(-1, 2).T
  graph = sparse.coo_matrix((np.ones(len(edges), np.int8), (start, stop)), (count,) * 2)
  _, label = csgraph.connected_components(graph, connection="strong")
  parts: dict[int, _Part] = {}
  place, label = [0] * count, label.tolist()
  for image, number in enumerate(label):
    part = parts.setdefault(number, _Part())
    place[image] = part.count
    part.count += 1
  for index, (winner, loser) in enumerate(component.wins):
    if label[winner] == label[loser]:
      part = parts[label[winner]]
      part.wins.append((place[winner], place[loser]))
      part.win.append(index)
  for index, (a, b) in enumerate(component.ties):
    part = parts[label[a]]
    part.ties.append((place[a], place[b]))
    part.tie.append(index)
  return [part for part in parts.values() if part.wins]


def _by_closure(
  count: int, wins: Sequence[Edge], ties: Sequence[Edge]
) -> tuple[list[int], list[int]]:
  """What is cut and what yields, by a bit per two images: does one lead to the other."""
  leads = np.packbits(np.eye(count, dtype=bool), axis=1)

  def lead(a: int, b: int) -> bool:
    return bool(leads[a, b >> 3] & (128 >> (b & 7)))

  def connect(a: int, b: int) -> None:
    to_a = leads[:, a >> 3] & (128 >> (a & 7)) != 0
    to_b = leads[:, b >> 3] & (128 >> (b & 7)) != 0
    leads[to_a & ~to_b] |= leads[b]

  cut, yielded = [], []
  for index, (winner, loser) in enumerate(wins):
    if lead(loser, winner):
      cut.append(index)
    elif not lead(winner, loser):
      connect(winner, loser)
  for index, (a, b) in enumerate(ties):
    above, below = lead(a, b), lead(b, a)  # both: they are in one group already
    if above != below:
      yielded.append(index)
    elif not above:
      connect(a, b)
      connect(b, a)
  return cut, yielded


def _by_search(
  count: int, wins: Sequence[Edge], ties: Sequence[Edge]
) -> tuple[list[int], list[int]]:
  """The same where a bit per two images is too much memory."""
  order = Order(count)
  cut = [i for i, win in enumerate(wins) if not order.prefer(*win)]
  return cut, [i for i, tie in enumerate(ties) if not order.equate(*tie)]


def kept(edges: Sequence[Edge], refused: Iterable[int]) -> dict[Edge, int]:
  """Returns the edges that stay, with their indices."""
  refused = set(refused)
  return {edge: index for index, edge in enumerate(edges) if index not in refused}
