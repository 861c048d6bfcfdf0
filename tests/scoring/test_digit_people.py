"""The digits' people: tastes by hand, opposites, and the scorer that is told of them."""

import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.scoring import digit_people, digits, scorers
from lpo_jax.scoring.digit_people import Person


def bars():
  """A thin upright bar, a bold one, and a thin one that leans a column every two rows."""
  images = np.full((3, 32, 32, 3), 255, np.uint8)
  images[0, 4:28, 15:17] = 0
  images[1, 4:28, 13:19] = 0
  for row in range(4, 28):
    left = 21 - (row - 4) // 2
    images[2, row, left : left + 2] = 0
  return images


def test_tastes_by_hand():
  images = bars()
  ink = np.array([48, 144, 48]) / 32**2
  np.testing.assert_allclose(digit_people.like(images, 1, 0), ink / (0.9 * 0.018))
  lean = digit_people.like(images, 0, 1)
  np.testing.assert_allclose(lean[:2], 0, atol=1e-9)
  np.testing.assert_allclose(lean[2], -0.5 / (0.7 * 0.085), rtol=0.02)
  # Opposites like the opposite, and mixtures the sum.
  both = digit_people.like(images, np.full(3, -0.6), np.full(3, -0.8))
  np.testing.assert_allclose(both, -0.6 * digit_people.like(images, 1, 0) - 0.8 * lean)


def test_people_point_everywhere_and_follow_the_seed():
  people = digit_people.make_people(400, seed=0)
  tastes = np.array([(p.bold, p.upright) for p in people.values()])
  np.testing.assert_allclose(np.linalg.norm(tastes, axis=1), 1, atol=1e-5)
  assert np.abs(tastes.mean(0)).max() < 0.15
  counts = {}
  for person in people.values():
    counts[person.words] = counts.get(person.words, 0) + 1
  assert len(counts) == 8 and min(counts.values()) > 25
  assert people == digit_people.make_people(400, seed=0)
  assert people != digit_people.make_people(400, seed=1)
  assert [Person(np.cos(a), np.sin(a)).words for a in (0.3, 0.5, -0.5)] == [
    "bold", "bold and upright", "bold and tilted",
  ]  # fmt: skip


def test_a_scorer_is_told_whose_each_image_is(tmp_path):
  file = tmp_path / "people.json"
  digit_people.write(file, {"a": Person(1.0, 0.0), "b": Person(-1.0, 0.0)})
  scorer = scorers.get("digits_person", path=str(file))
  assert scorer.needs == ("users",)
  images = bars()
  scores = scorer(images, ["x"] * 3, users=["a", "b", "b"])
  ink = digits.boldness(images) / (0.9 * 0.018)
  np.testing.assert_allclose(scores, ink * [1, -1, -1])
  with pytest.raises(UserError, match="knows nothing of 1 people"):
    scorer(images, ["x"] * 3, users=["a", "b", "c"])
  with pytest.raises(UserError, match="users"):
    scorer(images, ["x"] * 3)
  with pytest.raises(UserError, match=r"eval\.scorer_paths\.digits_person"):
    scorers.get("digits_person")(images, ["x"] * 3, users=["a"] * 3)
