"""The endless order of lists: shuffled per epoch, source by source in their shares."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction


@dataclasses.dataclass(frozen=True)
class Part:
  """One source of lists.

  Attributes:
    name: what it is called; "" where it is the only one.
    count: number of its lists.
    share: how many lists are drawn from it, in proportion to the other parts'.
  """

  name: str
  count: int
  share: Fraction = Fraction(1)


@dataclasses.dataclass(frozen=True)
class Draw:
  """What is at one place of the order.

  Attributes:
    index: which list, counted through all parts.
    epoch: how often all lists of its part came before.
    part: which part it is of.
  """

  index: int
  epoch: int
  part: int


class Draws:
  """Place -> list, for every place: nothing is remembered from one to the next.

  The parts take turns, as evenly as their shares allow and always in the same way.
  Within a part the lists come in an order shuffled per epoch, a function of the seed and
  of the part's name: the other parts do not change it.
  """

  def __init__(self, parts: Sequence[Part], seed: int):
    import grain

    self._parts = tuple(parts)
    counts = [part.count for part in parts]
    self._starts = [sum(counts[:i]) for i in range(len(counts))]
    self._orders = [
      grain.MapDataset.range(part.count)
      .seed(_seed_of(seed, part.name) % 2**32)
      .shuffle()
      .repeat()
      for part in parts
    ]
    # Of what is left by the parts before, which fraction each part takes.
    shares = [Fraction(part.share) for part in parts]
    self._takes = [share / sum(shares[i:]) for i, share in enumerate(shares)]
    # Asked about thrice per place: when looked at, when taken, when laid out.
    self.at = functools.lru_cache(maxsize=1 << 14)(self._at)

  def _at(self, place: int) -> Draw:
    number, left = 0, place
    while (turn := _taken(left, self._takes[number])) == _taken(
      left + 1, self._takes[number]
    ):  # the place is not this part's; the last part takes all that is left
      number, left = number + 1, left - turn
    index = self._starts[number] + int(self._orders[number][turn])
    return Draw(index, turn // self._parts[number].count, number)

  def counts(self, places: int, without: Iterable[int] = ()) -> list[int]:
    """Returns how many of the first places each part has, some places left out."""
    counts, left = [], places
    for take in self._takes:
      counts.append(_taken(left, take))
      left -= counts[-1]
    for place in without:
      counts[self.at(place).part] -= 1
    return counts


def _taken(places: int, fraction: Fraction) -> int:
  """How many of so many places have this fraction of them: rounded, half up."""
  return math.floor(places * fraction + Fraction(1, 2)) if fraction != 1 else places


def _seed_of(seed: int, name: str) -> int:
  if not name:
    return seed
  text = f"{seed}/source/{name}".encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")
