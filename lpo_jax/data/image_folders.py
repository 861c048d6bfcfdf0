"""Folders of images that others drew: which file is of which prompt and seed."""

from __future__ import annotations

import collections
import concurrent.futures
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lpo_jax.data import decoding
from lpo_jax.errors import UserError
from lpo_jax.types import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
THREADS = 4
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Case:
  """One image that every candidate has.

  Attributes:
    index: its number: the prompt's number times the images per prompt, plus which.
    row: the prompt's number in the set.
    asked: what it is drawn from.
    seed: of the initial noise.
  """

  index: int
  row: int
  asked: Prompt
  seed: int

  @property
  def prompt(self) -> str:
    """The text."""
    return self.asked.text

  @property
  def category(self) -> str:
    """Of the prompt, "" for none."""
    return self.asked.category


@dataclasses.dataclass(frozen=True)
class Matched:
  """What a folder has for the cases.

  Attributes:
    paths: case index -> file.
    missing: the indices of cases without a file.
    unreadable: case index -> why.
    unused: files of no case.
  """

  paths: Mapping[int, pathlib.Path]
  missing: Sequence[int]
  unreadable: Mapping[int, str]
  unused: int

  def lacking(self) -> set[int]:
    """The cases that cannot be compared."""
    return {*self.missing, *self.unreadable}

  def account(self) -> dict[str, Any]:
    """The counts, and the first few names, as JSON."""
    reasons = [f"{self.paths[i].name}: {why}" for i, why in self.unreadable.items()]
    return {
      "missing": len(self.missing),
      "first_missing": list(self.missing[:_SHOWN]),
      "unreadable": len(self.unreadable),
      "first_unreadable": reasons[:_SHOWN],
      "unused": self.unused,
    }


def has_images(folder: pathlib.Path) -> bool:
  """Whether a folder has an index or images."""
  return folder.is_dir() and any(
    path.name in _INDICES or path.suffix.lower() in SUFFIXES
    for path in folder.iterdir()
  )


def match(folder: pathlib.Path, cases: Sequence[Case]) -> Matched:
  """Finds each case's image, and reads all of them once.

  With an index (`index.jsonl`, `index.csv` or `index.tsv`, with the columns prompt, file
  and, where a prompt has several images, seed) by that; else by the number that a
  file's name is: that of the case, as this program itself writes them.

  Raises:
    UserError: an index that cannot be read, that names a file twice or one outside of
      the folder, or files with the same number.
  """
  names = sorted(path.name for path in folder.iterdir())
  index = next((name for name in names if name in _INDICES), None)
  found = _by_index(folder, index, cases) if index else _by_number(folder, names)
  wanted = {case.index for case in cases}
  paths = {i: path for i, path in found.items() if i in wanted}
  there = {i: path for i, path in paths.items() if path.is_file()}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    reasons = list(pool.map(_unreadable, there.values()))
  bad = {i: why for i, why in zip(there, reasons, strict=True) if why}
  images = sum(pathlib.PurePath(name).suffix.lower() in SUFFIXES for name in names)
  used = len({path for path in there.values() if path.parent == folder})
  return Matched(paths, sorted(wanted - set(there)), bad, max(images - used, 0))


def refuse(name: str, folder: Any, matched: Matched, total: int) -> None:
  """Refuses a folder that lacks images.

  Raises:
    UserError: it does, with the first ones.
  """
  if not matched.lacking():
    return
  account = matched.account()
  first = [f"number {i}" for i in account["first_missing"]]
  first += account["first_unreadable"]
  raise UserError(
    f"eval.candidates.{name}: of the {total} images asked for, {account['missing']} are "
    f"missing in {folder} and {account['unreadable']} cannot be read (first: "
    f"{'; '.join(first[:_SHOWN])}). Complete the folder, or set "
    "eval.missing='leave_out' to compare without these for every candidate."
  )


def _unreadable(path: pathlib.Path) -> str:
  try:
    decoding.decode(path.read_bytes())
  except (decoding.BadImage, OSError) as error:
    return str(error)
  return ""


def _by_number(folder: pathlib.Path, names: Sequence[str]) -> dict[int, pathlib.Path]:
  found: dict[int, pathlib.Path] = {}
  for name in names:
    path = folder / name
    if path.suffix.lower() not in SUFFIXES or not (
      path.stem.isascii() and path.stem.isdigit()
    ):
      continue
    number = int(path.stem)
    if number in found:
      raise UserError(
        f"{folder} has two images of number {number}: {found[number].name!r} and "
        f"{name!r}. Remove one."
      )
    found[number] = path
  return found


def _by_index(
  folder: pathlib.Path, index: str, cases: Sequence[Case]
) -> dict[int, pathlib.Path]:
  file = folder / index
  try:
    rows = list(_INDICES[index](file.read_text("utf-8-sig")))
    rows = [(row["prompt"], row.get("seed"), row["file"]) for row in rows]
  except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
    raise UserError(
      f"{file} cannot be read ({type(error).__name__}: {error}); expected rows with "
      "prompt, file and, where a prompt has several images, seed."
    ) from error
  by_seed = {(case.prompt, case.seed): case.index for case in cases}
  in_turn: dict[str, list[int]] = collections.defaultdict(list)
  for case in reversed(cases):
    in_turn[case.prompt].append(case.index)
  root, found = folder.resolve(), {}
  for prompt, seed, name in rows:
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(root):
      raise UserError(f"{file} names {name!r}, which is outside of its folder.")
    if seed in (None, ""):
      place = in_turn[prompt].pop() if in_turn.get(prompt) else None
    else:
      place = by_seed.get((prompt, _seed(file, seed)))
    if place in found:
      raise UserError(f"{file} has two images of {prompt!r}, seed {seed}.")
    if place is not None:
      found[place] = path
  return found


def _seed(file: pathlib.Path, seed: Any) -> int:
  try:
    return int(seed)
  except (TypeError, ValueError):
    raise UserError(f"{file}: seed {seed!r} is no whole number.") from None


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
  return (json.loads(line) for line in text.split("\n") if line.strip())


def _separated(delimiter: str) -> Callable[[str], Iterator[dict[str, Any]]]:
  return lambda text: csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)


_INDICES: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
  "index.jsonl": _json_rows,
  "index.csv": _separated(","),
  "index.tsv": _separated("\t"),
}
