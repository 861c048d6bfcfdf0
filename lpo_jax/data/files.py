"""Files of rows: which ones a path means, columns without images, images by place."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data.stores import Block
from lpo_jax.errors import UserError, nearest, unknown_name

if TYPE_CHECKING:
  import pyarrow as pa
  from etils import epath
  from pyarrow import parquet

_SUFFIXES = (".parquet", ".jsonl", ".tar", ".json")
_SPLIT_NAMES = {"train", "validation", "val", "valid", "dev", "eval", "test"} | {
  "validation_unique",
  "test_unique",
}
_SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}")  # train-00000-of-00645-<hash>.parquet


def find(path: epath.Path, split: str | None) -> list[epath.Path]:
  """Returns the data files that `path` means, sorted by name.

  Args:
    path: a file, a folder (its parquet files, else its JSON lines, tar archives or JSON
      files, there and one folder below), or a pattern with ``*`` in its last part.
    split: which of several files, see `sources.read`.

  Raises:
    UserError: nothing there, no such split, or several splits and none chosen.
  """
  if "*" in path.name:
    found = list(path.parent.glob(path.name))
  elif path.is_dir():
    found = [file for pattern in ("*", "*/*") for file in path.glob(pattern)]
  elif path.exists():
    return [path]
  else:
    near = near_name(path)
    raise UserError(
      f"data.path={str(path)!r}: there is no such file or folder"
      f"{f'; did you mean {near!r}?' if near else '.'} Looked for a .parquet, .jsonl, "
      ".tar or .json file, a folder of them, or one prepared by tensorflow_datasets."
    )
  by_suffix = [[f for f in found if f.suffix == suffix] for suffix in _SUFFIXES]
  files = sorted(next(filter(None, by_suffix), []))
  if not files:
    raise UserError(
      f"data.path={str(path)!r}: no .parquet, .jsonl, .tar or .json file there or one "
      "folder below, nor the features.json of a data set prepared by tensorflow_datasets."
    )
  splits: dict[str, list] = collections.defaultdict(list)
  for file in files:
    splits[split_of(file, path)].append(file)
  if split is not None:
    if split not in splits:
      raise unknown_name("data.split", split, splits)
    return splits[split]
  usual = sorted(splits.keys() & _SPLIT_NAMES)
  if len(usual) > 1:
    raise UserError(
      f"data.path={str(path)!r} holds several splits ({', '.join(usual)}); reading "
      "them together would train on what you test on. Set data.split, e.g. to "
      f"{usual[0]!r}."
    )
  return files


def split_of(file: epath.Path, root: Any) -> str:
  """Returns the split that a file below `root` belongs to, by its name or folder."""
  match = _SPLIT.match(file.name)
  inside = file.parent.name if str(file.parent) != str(root) else file.stem
  return match.group(1) if match else inside


def near_name(path: epath.Path) -> str | None:
  """The sibling whose name is closest to a path that does not exist."""
  parent = path.parent
  names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
  name = nearest(path.name, names)
  return str(parent / name) if name else None


def refuse_file(path: Any, error: Exception) -> UserError:
  """Builds the refusal of a file that is not what its name says."""
  return UserError(
    f"{path} cannot be read ({str(error).strip()}). It is probably truncated, by an "
    "interrupted download or copy, or not what its name says: fetch it again, or "
    "take it away."
  )


def open_parquet(path: epath.Path) -> parquet.ParquetFile:
  """Opens a parquet file, local or remote.

  Raises:
    UserError: it is empty, truncated or no parquet file.
  """
  import pyarrow as pa
  from pyarrow import parquet

  try:
    local = "://" not in str(path)
    return parquet.ParquetFile(os.fspath(path) if local else path.open("rb"))
  except (pa.ArrowException, OSError) as error:
    raise refuse_file(path, error) from error


def json_lines(path: epath.Path) -> Iterator[tuple[int, dict]]:
  """Yields (byte offset, object) for each line that is not blank.

  Raises:
    UserError: a line that is no JSON object.
  """
  with path.open("rb") as file:
    offset = 0
    for number, line in enumerate(file, 1):
      if line.strip():
        try:
          value = json.loads(line)
          if not isinstance(value, dict):
            raise ValueError("not an object")
        except ValueError as error:
          raise UserError(
            f"{path}, line {number}: expected one JSON object per line ({error})."
          ) from error
        yield offset, value
      offset += len(line)


@dataclasses.dataclass(frozen=True)
class Table:
  """Columns without images, and where each row's images lie.

  Attributes:
    columns: arrow table, R rows.
    block: [R] running number of the row group.
    row: [R] place within it.
    groups: for each block its file and its number there.
  """

  columns: pa.Table
  block: np.ndarray
  row: np.ndarray
  groups: list[tuple[epath.Path, int]]

  def loader(self, columns: Sequence[str]) -> Callable[[int, int], Block]:
    """Returns what reads a block of one of these image columns.

    A cell is bytes, a struct with `bytes`, or a list of either.
    """
    opened = functools.lru_cache(maxsize=8)(open_parquet)

    def load(block: int, column: int) -> Block:
      import pyarrow as pa

      path, group = self.groups[block]
      try:
        table = opened(path).read_row_group(group, columns=[columns[column]])
      except (pa.ArrowException, OSError) as error:
        raise refuse_file(path, error) from error
      cells = table.column(0)
      nested = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)

      def cell(row: int, item: int) -> bytes:
        value = cells[row]
        if nested:
          value = value.values[item] if item < len(value or ()) else None
        value = value.as_py() if value is not None else None
        if isinstance(value, Mapping):  # the `Image` feature of `datasets`
          value = value.get("bytes")
        return value or b""

      return cell

    return load


def read_table(
  files: Sequence[epath.Path],
  types: Mapping[str, str],
  choose: Callable[[Any, Sequence[str]], list[str]],
) -> Table:
  """Reads some columns of all files.

  Args:
    files: parquet files.
    types: type of each column, see `arrow_type`.
    choose: (file, columns there) -> the columns to read; may refuse.

  Returns:
    The rows of all files, in order.

  Raises:
    UserError: a file that cannot be read or cast, or no rows in any.
  """
  import pyarrow as pa

  tables, blocks, rows, groups = [], [], [], []
  for path in files:
    file = open_parquet(path)
    try:
      table = file.read(columns=choose(path, file.schema_arrow.names))
    except (pa.ArrowException, OSError) as error:
      raise refuse_file(path, error) from error
    tables.append(cast(path, table, types))
    for group in range(file.metadata.num_row_groups):
      count = file.metadata.row_group(group).num_rows
      blocks.append(np.full(count, len(groups)))
      rows.append(np.arange(count))
      groups.append((path, group))
  table = pa.concat_tables(tables, promote_options="default")
  if not len(table):
    shown = files[0] if len(files) == 1 else f"{len(files)} files in {files[0].parent}"
    raise UserError(f"{shown}: no rows. The file has columns but no judgement in it.")
  return Table(table, np.concatenate(blocks), np.concatenate(rows), groups)


def cast(path: Any, table: pa.Table, types: Mapping[str, str]) -> pa.Table:
  """Brings every column to the type it is computed with."""
  import pyarrow as pa

  for i, name in enumerate(table.column_names):
    column = table.column(i)
    try:
      table = table.set_column(i, name, column.cast(arrow_type(types[name])))
    except pa.ArrowException as error:
      raise UserError(
        f"{path}: column {name!r} is of type {column.type}, which cannot be read as "
        f"{types[name]} ({error}). Convert it."
      ) from error
  return table


def arrow_type(name: str) -> pa.DataType:
  """Returns the arrow type of a name as in "int64" or "list int64"."""
  import pyarrow as pa

  if name.startswith("list "):
    return pa.list_(pa.type_for_alias(name.removeprefix("list ")))
  return pa.type_for_alias(name)


def vocabulary(*columns: pa.ChunkedArray) -> tuple[list[str], list[np.ndarray]]:
  """Returns the sorted different texts of all columns, and each column as indices.

  Returns:
    texts; for each column int32 indices, -1 where null.
  """
  import pyarrow as pa

  chunks = [chunk for column in columns for chunk in column.chunks]
  joined = pa.chunked_array(chunks, pa.large_string()).combine_chunks()
  encoded = joined.dictionary_encode()
  texts = encoded.dictionary.to_pylist()
  order = sorted(range(len(texts)), key=texts.__getitem__)
  rank = np.full(len(texts) + 1, -1, np.int32)  # the last is for null
  rank[order] = np.arange(len(texts))
  index = rank[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
  bounds = np.cumsum([len(column) for column in columns])[:-1]
  return [texts[i] for i in order], np.split(index, bounds)
