"""People in the digits' world whose tastes are opposed, and what each of them likes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.scoring import digits

# Spread of boldness and of uprightness among the base's drawings of one prompt, in units
# of the spread among real digits: a taste weighs both alike.
BOLD_SPREAD = 0.9
TILT_SPREAD = 0.7


@dataclasses.dataclass(frozen=True)
class Person:
  """A taste: a direction in the plane of two opposites.

  Attributes:
    bold: 1 likes bold strokes, -1 thin ones, 0 does not mind.
    upright: 1 likes upright strokes, -1 tilted ones, 0 does not mind.
  """

  bold: float
  upright: float

  @property
  def words(self) -> str:
    """The nearest of eight directions, such as "bold and tilted".

    >>> Person(1.0, 0.0).words, Person(-0.7, -0.7).words
    ('bold', 'thin and tilted')
    """
    turn = round(math.atan2(self.upright, self.bold) / (math.pi / 4)) % 8
    return (
      *("bold", "bold and upright", "upright", "thin and upright"),
      *("thin", "thin and tilted", "tilted", "bold and tilted"),
    )[turn]


def make_people(count: int, seed: int) -> dict[str, Person]:
  """Draws people whose tastes point in all directions alike: name -> person."""
  angles = np.random.default_rng([seed, 0x70E0]).uniform(0, 2 * math.pi, count)
  return {
    str(i): Person(round(math.cos(a), 6), round(math.sin(a), 6))
    for i, a in enumerate(angles.tolist())
  }


def like(
  images: np.ndarray, bold: np.ndarray | float, upright: np.ndarray | float
) -> np.ndarray:
  """How much somebody likes images: [n], more is better.

  bold boldness / (0.9 * 0.018) - upright |slant| / (0.7 * 0.085)

  Args:
    images: [n, 32, 32, 3] uint8.
    bold: of the person, or [n].
    upright: likewise.
  """
  ink = digits.boldness(images) / (BOLD_SPREAD * digits.BOLDNESS_UNIT)
  tilt = np.abs(digits.slant(images)) / (TILT_SPREAD * digits.SLANT_UNIT)
  return bold * ink - upright * tilt


def write(path: str | os.PathLike, people: Mapping[str, Person]) -> None:
  """Writes people as JSON, for the scorer."""
  found = {name: dataclasses.asdict(person) for name, person in people.items()}
  pathlib.Path(path).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def read(path: str | os.PathLike) -> dict[str, Person]:
  """Reads what `write` wrote.

  Raises:
    UserError: no such file, or another content.
  """
  try:
    found = json.loads(pathlib.Path(path).read_text("utf-8"))
    return {name: Person(**fields) for name, fields in found.items()}
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise UserError(
      f"{str(path)!r} cannot be read as the digits' people ({error}): expected the "
      "people.json of a personal quickstart, in eval.scorer_paths.digits_person."
    ) from error


def liked_by(
  path: str | os.PathLike,
) -> Callable[[np.ndarray, Sequence[str], Sequence[str]], np.ndarray]:
  """Makes a scorer's function: each image by the taste of whom it is for."""
  people: dict[str, Person] = {}

  def score(
    images: np.ndarray, prompts: Sequence[str], users: Sequence[str]
  ) -> np.ndarray:
    del prompts
    if not people:
      people.update(read(path))
    absent = sorted({*users} - people.keys())
    if absent:
      raise UserError(
        f"{path} knows nothing of {len(absent)} people (first {absent[0]!r}); it has "
        f"{len(people)}."
      )
    tastes = np.array([(people[u].bold, people[u].upright) for u in users])
    return like(images, tastes[:, 0], tastes[:, 1])

  return score
