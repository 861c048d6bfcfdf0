"""Scores that another program gave: read from a file, one JSON object a line."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Hashable, Mapping
from typing import Any

from lpo_jax.errors import UserError
from lpo_jax.scoring.scorer import Scorer

HEADER = ("scorer", "version", "measures", "scale", "preprocessing", "higher_is_better")


class External(Scorer):
  """What a file says.

  Lines are objects. Those with a "score" are about one image, which is said in one of
  three ways:

    {"name": "lpo/00012.png", "score": 0.71}      what the caller calls the image
    {"candidate": "lpo", "prompt": "a cat", "seed": 3, "score": 0.71}
    {"prompt": "a cat", "seed": 3, "score": 0.71}   where there are no candidates

  One line without a score may say what the numbers are: "scorer", "version", "measures",
  "scale", "preprocessing", "higher_is_better".

  Args:
    path: the file.

  Raises:
    UserError: no such file, a line that is none of these, or two scores for one image.
  """

  name = "external"

  def __init__(self, path: str):
    self._path = pathlib.Path(path)
    if not path or not self._path.is_file():
      raise UserError(
        f"scorer 'external' reads scores from a file, one JSON object a line, and "
        f"{path!r} is none: set eval.scorer_paths.external to it."
      )
    data = self._path.read_bytes()
    self._digest = hashlib.sha256(data).hexdigest()[:16]
    self._scores: dict[Hashable, float] = {}
    header: dict[str, Any] = {}
    for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
      if not line.strip():
        continue
      fields = self._object(line, number)
      if "score" in fields:
        self._add(fields, number)
      elif header or set(fields) - set(HEADER):
        self._refuse(number, f"has no 'score', and keys {sorted(fields)}")
      else:
        header = fields
    self.version = " ".join(
      str(header[key]) for key in ("scorer", "version") if key in header
    )
    self.measures = str(header.get("measures", f"Scores of {self._path.name}."))
    self.scale = str(header.get("scale", "not stated"))
    self.preprocessing = str(header.get("preprocessing", "not stated"))
    self.higher_is_better = header.get("higher_is_better", True)
    if not isinstance(self.higher_is_better, bool):
      raise UserError(f"{self._path}: 'higher_is_better' is neither true nor false.")

  def _refuse(self, number: int, why: str) -> None:
    raise UserError(
      f"{self._path}, line {number}, {why}; expected an object with a finite 'score' and "
      "either 'name', or 'prompt' and 'seed' (and 'candidate' where there are several)."
    )

  def _object(self, line: str, number: int) -> Mapping[str, Any]:
    try:
      fields = json.loads(line)
    except ValueError:
      fields = None
    if not isinstance(fields, dict):
      self._refuse(number, "is no JSON object")
    return fields

  def _add(self, fields: Mapping[str, Any], number: int) -> None:
    score = fields["score"]
    if isinstance(score, bool) or not isinstance(score, int | float):
      self._refuse(number, f"has the score {score!r}")
    if not math.isfinite(score):
      self._refuse(number, f"has the score {score!r}")
    if "name" in fields:
      key: Hashable = str(fields["name"])
    elif "prompt" in fields and isinstance(fields.get("seed"), int):
      candidate = fields.get("candidate")
      key = (None if candidate is None else str(candidate), fields["prompt"],
             fields["seed"])  # fmt: skip
    else:
      self._refuse(number, f"says of no image what it is: keys {sorted(fields)}")
    if self._scores.setdefault(key, float(score)) != score:
      self._refuse(number, f"gives {key!r} another score than an earlier line")

  @property
  def identity(self) -> str:
    return self._digest

  def score(self, images, prompts, told):
    keys = [self._keys(i, prompts, told.seeds, told.names) for i in range(len(images))]
    found = [
      next((self._scores[key] for key in choice if key in self._scores), None)
      for choice in keys
    ]
    missing = [i for i, score in enumerate(found) if score is None]
    if missing:
      raise UserError(
        f"{self._path} has no score for {len(missing)} of {len(images)} images; of the "
        f"first it looked for {' or '.join(map(repr, keys[missing[0]]))}."
      )
    return found

  def _keys(self, i, prompts, seeds, names) -> list[Hashable]:
    """What an image may be called in the file, the most exact first."""
    keys: list[Hashable] = []
    candidate = None
    if names is not None:
      keys.append(names[i])
      # One score for the images of several candidates would make all of them equal.
      candidate = names[i].rpartition("/")[0] or None
    if seeds is not None:
      keys.append((candidate, prompts[i], int(seeds[i])))
    return keys or [(candidate, prompts[i], None)]
