"""Parquet rows whose images are cells of the row: their names, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lpo_jax.data import files as files_lib

if TYPE_CHECKING:
  from etils import epath

  from lpo_jax.data.sources.kinds import Kind


def read(
  files: Sequence[epath.Path], kind: Kind, types: dict[str, str]
) -> tuple[files_lib.Table, list[str]]:
  """Reads the columns without images.

  Returns:
    The table; for each row a name of its own, as no column gives one.
  """
  table = files_lib.read_table(files, types, kind.check)
  names = []
  for path in files:
    count = files_lib.open_parquet(path).metadata.num_rows
    names += [f"{path.stem}/{row}" for row in range(count)]
  return table, names


def file_names(files: Sequence[epath.Path], column: str) -> list[str | None]:
  """Returns the file name beside each image, reading no bytes; None where none is.

  An image cell of `datasets` is a struct of bytes and path.
  """
  found: list[str | None] = []
  for path in files:
    file = files_lib.open_parquet(path)
    leaves = {file.schema.column(i).path for i in range(len(file.schema.names))}
    if f"{column}.path" not in leaves:
      found += [None] * file.metadata.num_rows
      continue
    cells = file.read(columns=[f"{column}.path"]).column(0).to_pylist()
    found += [(cell or {}).get("path") for cell in cells]
  return found


def names(
  files: Sequence[epath.Path], columns: Sequence[str], rows: Sequence[str]
) -> list[list[str]]:
  """Returns a name for every image: [column][row], its file's name or the row's."""
  made = []
  for column in columns:
    given = file_names(files, column)
    made.append([g or f"{row}/{column}" for g, row in zip(given, rows, strict=True)])
  return made


def places(table: files_lib.Table, column: int) -> list[tuple[int, int, int, int]]:
  """Returns (block, column, row, item) of each row's image in one column."""
  zero = np.zeros(len(table.row), np.int64)
  at = np.stack([table.block, zero + column, table.row, zero], 1)
  return [tuple(place) for place in at.tolist()]
