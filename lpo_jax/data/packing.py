"""Whole lists into a fixed number of slots, as full as their lengths allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

LOOK_AHEAD = 256  # how far behind the oldest unused list a filler may be found


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which lists an update holds; they lie in the slots one after the other.

  Attributes:
    positions: places in the endless order of lists, in slot order.
    filled: number of slots that hold an item; the rest is empty.
  """

  positions: tuple[int, ...]
  filled: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """Where in the endless order of lists the next update begins.

  Attributes:
    position: the first place nobody looked at.
    pending: earlier places whose lists are not used yet, oldest first.
    updates: number of updates before this one.
    filled: number of slots they filled.
  """

  position: int = 0
  pending: tuple[int, ...] = ()
  updates: int = 0
  filled: int = 0


class Packer:
  """Fills a fixed number of slots with whole lists, as full as their lengths allow."""

  def __init__(
    self, lengths: Sequence[int], slots: int, *, look_ahead: int = LOOK_AHEAD
  ):
    """Prepares for lists of these lengths.

    Args:
      lengths: items per list.
      slots: S, at least the longest length.
      look_ahead: bound on how far the order is bent to fill a hole; never more than an
        epoch.
    """
    self._slots = slots
    self._look_ahead = min(look_ahead, len(lengths))
    # most[r]: the most of r slots that any number of lists of these lengths can fill.
    self._most = np.zeros(slots + 1, np.int64)
    distinct = sorted({int(n) for n in lengths})
    for room in range(1, slots + 1):
      fits = [n + self._most[room - n] for n in distinct if n <= room]
      self._most[room] = max(fits, default=0)

  def plan(
    self, progress: Progress, length_at: Callable[[int], int]
  ) -> tuple[Plan, Progress]:
    """Chooses the lists of one update.

    The oldest unused list goes first. One that is too long for the room left, or that
    would leave a hole which others could have avoided, waits at the head of the queue
    for the next update: nothing is lost or broken.

    Args:
      progress: where to begin.
      length_at: place in the order -> number of items of the list there.

    Returns:
      The plan, and where the next one begins.
    """
    most, room = self._most, self._slots
    pending, position = list(progress.pending), progress.position
    taken: list[int] = []
    while most[room]:
      exact = second = None
      at = 0
      while exact is None:
        if at == len(pending):
          oldest = pending[0] if pending else position
          if position - oldest >= self._look_ahead:
            break
          pending.append(position)
          position += 1
        length = length_at(pending[at])
        if length <= room:
          if length + most[room - length] == most[room]:
            exact = at
          elif second is None:
            second = at
        at += 1
      choice = second if exact is None else exact
      if choice is None:
        break
      room -= length_at(pending[choice])
      taken.append(pending.pop(choice))
    filled = self._slots - room
    following = Progress(
      position, tuple(pending), progress.updates + 1, progress.filled + filled
    )
    return Plan(tuple(taken), filled), following
