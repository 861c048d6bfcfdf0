"""Prompt sets from the files they come in, and when two prompts are the same."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lpo_jax.errors import UserError, unknown_name

COLUMNS = ("Prompt", "prompt", "caption", "text")
_NOT_WORDS = re.compile(r"[\W_]+")


def normalise(prompt: str) -> str:
  """Returns what two prompts share if a reader would call them the same.

  Case, width, punctuation and spacing do not count; accents do.

  >>> normalise("  A cat,  sitting -- on a MAT! ")
  'a cat sitting on a mat'
  """
  folded = unicodedata.normalize("NFKC", prompt).casefold()
  return _NOT_WORDS.sub(" ", folded).strip()


def overlap(prompts: Iterable[str], others: Iterable[str]) -> list[str]:
  """Returns the `prompts` that `others` has too, up to `normalise`; no blank ones."""
  known = {normalise(other) for other in others} - {""}
  return [prompt for prompt in prompts if normalise(prompt) in known]


def read(source: str | os.PathLike | Sequence[str]) -> list[str]:
  """Reads a prompt set.

  Formats by file name: .txt (one per line), .tsv and .csv (with a header), .json (a
  list of texts or objects), .jsonl, .parquet. Tables and objects are asked for the
  column `Prompt`, `prompt`, `caption` or `text`, the first one there. Blank prompts are
  left out; order and repetitions stay.

  Args:
    source: a file, or the prompts themselves.

  Returns:
    The prompts.

  Raises:
    UserError: no such file, a format or column that is not known, or no prompt in it.
  """
  from etils import epath

  if not isinstance(source, str | os.PathLike):
    return [str(prompt) for prompt in source if str(prompt).strip()]
  path = epath.Path(source)
  if not path.is_file():
    raise UserError(
      f"{str(path)!r} is no file with prompts; expected one of "
      f"{', '.join(_READERS)}, or a list of prompts."
    )
  suffix = path.suffix.lower()
  if suffix not in _READERS:
    raise unknown_name("prompt file type", suffix or path.name, _READERS)
  try:
    prompts = _READERS[suffix](path)
  except (ValueError, OSError, csv.Error) as error:
    raise UserError(f"{path} cannot be read as {suffix}: {error}") from error
  prompts = [prompt for prompt in prompts if prompt.strip()]
  if not prompts:
    raise UserError(f"{path} holds no prompt.")
  return prompts


def _column(path: Any, names: Iterable[str]) -> str:
  names = list(names)
  for name in COLUMNS:
    if name in names:
      return name
  raise UserError(
    f"{path} has the columns {names}, none of them one of {', '.join(COLUMNS)}. "
    "Rename the one that holds the prompts."
  )


def _texts(path: Any, values: Any) -> list[str]:
  """Takes the prompts out of parsed JSON."""
  if isinstance(values, dict):
    values = list(values.values())
  if not isinstance(values, list):
    raise UserError(f"{path} holds {type(values).__name__}, not a list of prompts.")
  return [
    value if isinstance(value, str) else str(value[_column(path, value)])
    for value in values
  ]


def _lines(path: Any) -> list[str]:
  return path.read_text(encoding="utf-8-sig").splitlines()


def _read_separated(path: Any, delimiter: str) -> list[str]:
  # A quote within a tab separated prompt is just a quote.
  quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
  file = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
  rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
  column = _column(path, rows.fieldnames or [])
  return [row[column] or "" for row in rows]


def _read_parquet(path: Any) -> list[str]:
  from pyarrow import parquet

  with path.open("rb") as file:
    table = parquet.ParquetFile(file)
    column = _column(path, table.schema_arrow.names)
    values = table.read(columns=[column]).column(0).to_pylist()
  return [str(value) for value in values if value is not None]


_READERS: dict[str, Callable[[Any], list[str]]] = {
  ".txt": _lines,
  ".tsv": lambda path: _read_separated(path, "\t"),
  ".csv": lambda path: _read_separated(path, ","),
  ".json": lambda path: _texts(path, json.loads(path.read_text(encoding="utf-8-sig"))),
  ".jsonl": lambda path: _texts(
    path, [json.loads(line) for line in _lines(path) if line.strip()]
  ),
  ".parquet": _read_parquet,
}
