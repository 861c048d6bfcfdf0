"""Scores out of a file, and the words for files and images that do not fit."""

import json

import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.scoring import scorers

IMAGES = np.zeros((3, 2, 2, 3), np.uint8)
TEXTS = ["a cat", "a cat", "a dog"]


def write(folder, *lines):
  path = folder / "scores.jsonl"
  texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
  path.write_text("\n".join(texts) + "\n", encoding="utf-8")
  return str(path)


def test_finds_images_by_name_or_by_what_they_were_drawn_from(tmp_path):
  path = write(
    tmp_path,
    {"scorer": "HPSv3", "version": "1.0", "scale": "mu", "higher_is_better": False},
    {"name": "lpo/00000.png", "score": 0.5},
    "",
    {"candidate": "lpo", "prompt": "a cat", "seed": 1, "score": 2},
    {"prompt": "a dog", "seed": 0, "score": -1.5},
  )
  scorer = scorers.get("external", path=path)
  names = ["lpo/00000.png", "lpo/00001.png", "alone.png"]
  scores = scorer(IMAGES, TEXTS, seeds=[0, 1, 0], names=names)
  assert scores.tolist() == [0.5, 2.0, -1.5]
  said = scorer.description()
  assert (said["name"], said["version"], said["scale"]) == (
    "external",
    "HPSv3 1.0",
    "mu",
  )
  assert said["higher_is_better"] is False and len(said["identity"]) == 16

  # A score that is of no candidate would make all candidates equal.
  names[2] = "lpo/00002.png"
  with pytest.raises(UserError, match=r"no score for 1 of 3 images.*'lpo/00002.png'"):
    scorer(IMAGES, TEXTS, seeds=[0, 1, 0], names=names)
  with pytest.raises(UserError, match="no score for 3 of 3"):
    scorer(IMAGES, TEXTS)


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("[1]", "no JSON object"),
    ("{", "no JSON object"),
    ({"name": "a"}, "no 'score'"),
    ({"name": "a", "score": "7"}, "has the score '7'"),
    ({"name": "a", "score": True}, "has the score True"),
    ('{"name": "a", "score": NaN}', "has the score nan"),
    ({"prompt": "a cat", "score": 1.0}, "says of no image what it is"),
    ({"name": "first", "score": 2.0}, "another score than an earlier line"),
  ],
)
def test_refuses_lines_by_number(tmp_path, line, words):
  path = write(tmp_path, {"name": "first", "score": 1.0}, line)
  with pytest.raises(UserError, match=f"line 2.*{words}"):
    scorers.get("external", path=path)


def test_refuses_no_file(tmp_path):
  for path in ("", str(tmp_path / "none")):
    with pytest.raises(UserError, match=r"eval\.scorer_paths\.external"):
      scorers.get("external", path=path)
