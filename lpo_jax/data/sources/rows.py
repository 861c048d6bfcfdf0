"""Rows of JSON files, as they come and with the place of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lpo_jax.data import files as files_lib
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  import pyarrow as pa
  from etils import epath

  from lpo_jax.data.sources.kinds import Kind

JSON = (".json", ".jsonl")


def first(path: epath.Path) -> list[str]:
  """Returns the names of a file's columns, by its first row.

  Raises:
    UserError: it cannot be read.
  """
  if path.suffix in JSON:
    return list(next(of_json(path), ("", {}))[1])
  return files_lib.open_parquet(path).schema_arrow.names


def of_json(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place in words, object) of JSON lines, or of one list of objects.

  Raises:
    UserError: anything else.
  """
  if path.suffix == ".jsonl":
    for offset, value in files_lib.json_lines(path):
      yield f"{path}, byte {offset}", value
    return
  try:
    values = json.loads(path.read_bytes())
  except ValueError as error:
    raise files_lib.refuse_file(path, error) from error
  if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
    raise UserError(f"{path}: expected a list of objects, one per row.")
  for number, value in enumerate(values):
    yield f"{path}, row {number}", value


def read_json(files: Sequence[epath.Path], kind: Kind) -> list[tuple[str, dict]]:
  """Returns (place in words, object) of every row of all files.

  Raises:
    UserError: no rows, or a row without a required column.
  """
  found = [row for path in files for row in of_json(path)]
  if not found:
    raise UserError(f"{files[0]}: no rows. The file holds nothing to learn from.")
  for place, values in found:
    kind.check(place, list(values))
  return found


def table(path: Any, columns: dict[str, list], types: dict[str, str]) -> pa.Table:
  """Makes an arrow table of the columns.

  Raises:
    UserError: a column with values of different types, or of another than wanted.
  """
  import pyarrow as pa

  try:
    made = pa.table(columns)
  except (pa.ArrowException, TypeError) as error:
    raise UserError(
      f"{path}: a field has values of different types in different rows ({error})."
    ) from error
  return files_lib.cast(path, made, types)
