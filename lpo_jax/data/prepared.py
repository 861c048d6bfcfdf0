"""Data sets prepared by tensorflow_datasets: records by number, columns beside them.

A record holds labels and images together, so that finding the labels alone means to read
everything. `write_columns` keeps them in a parquet file beside the records; where there
is one that fits, nothing else is read until an image is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lpo_jax import console
from lpo_jax.errors import UserError, unknown_name

if TYPE_CHECKING:
  import pyarrow as pa
  from etils import epath

_AT_ONCE = 64  # records; each may hold several megabytes of images
_SHARDS = b"lpo_jax.shard_lengths"  # metadata of the columns: which records they are of


@dataclasses.dataclass(frozen=True)
class Prepared:
  """One split.

  Attributes:
    folder: the data set's.
    split: its name.
    features: name -> feature of tensorflow_datasets.
    shard_lengths: records of each file.
    records: serialized examples by number; read when asked for.
  """

  folder: epath.Path
  split: str
  features: Any
  shard_lengths: Sequence[int]
  records: Any

  def __len__(self) -> int:
    return len(self.records)

  def parse(self, record: bytes, names: Sequence[str]) -> dict[str, Any]:
    """Returns some features of a record, images as encoded bytes."""
    import tensorflow_datasets as tfds

    chosen = tfds.features.FeaturesDict({name: self.features[name] for name in names})
    encoded = {
      name: tfds.decode.SkipDecoding()
      for name in names
      if isinstance(self.features[name], tfds.features.Image)
    }
    return chosen.deserialize_example_np(record, decoders=encoded or None)


def open_split(path: epath.Path, split: str | None) -> Prepared:
  """Opens a split without reading a record.

  Args:
    path: the folder with features.json.
    split: its name; default "train", or the only one there is.

  Returns:
    The split.

  Raises:
    UserError: no such data set or split, no records, or a format that needs TensorFlow.
  """
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(path)
  except Exception as error:  # tfds raises anything for a folder that is not one
    raise UserError(
      f"data.path={str(path)!r} is no data set of tensorflow_datasets ({error})."
      " It should be the folder that holds features.json and dataset_info.json."
    ) from error
  splits = list(builder.info.splits)
  split = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
  if split not in splits:
    raise unknown_name("data.split", split, splits)
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    records = builder.as_data_source(split, deserialize_method=raw)
  except NotImplementedError as error:
    raise UserError(
      f"{path} cannot be read without TensorFlow ({error}). Prepare it again with "
      "file_format='array_record'."
    ) from error
  if not len(records):
    raise UserError(f"{path}: split {split!r} has no records.")
  return Prepared(
    folder=path,
    split=split,
    features=builder.info.features,
    shard_lengths=list(builder.info.splits[split].shard_lengths),
    records=records,
  )


def read_columns(prepared: Prepared, names: Sequence[str]) -> pa.Table:
  """Returns some columns, one row per record in the records' order.

  Reads the file beside the records if it is of these records and has these columns,
  else every record.
  """
  import pyarrow as pa

  found = _kept_columns(prepared, names)
  if found is not None:
    return found
  columns: dict[str, list] = {name: [] for name in names}
  progress = console.Progress("reading labels", len(prepared), "records")
  for start in range(0, len(prepared), _AT_ONCE):
    numbers = range(start, min(start + _AT_ONCE, len(prepared)))
    for record in prepared.records.__getitems__(list(numbers)):
      values = prepared.parse(record, names)
      for name, column in columns.items():
        column.append(_plain(values[name]))
    progress.update(numbers.stop)
  return pa.table(columns)


def _kept_columns(prepared: Prepared, names: Sequence[str]) -> pa.Table | None:
  from pyarrow import parquet

  path = columns_path(prepared.folder, prepared.split)
  if not path.exists():
    return None
  with path.open("rb") as file:
    table = parquet.read_table(file)
  lengths = json.loads((table.schema.metadata or {}).get(_SHARDS, b"[]"))
  fits = lengths == list(prepared.shard_lengths)
  return (
    table.select(list(names)) if fits and {*names} <= {*table.schema.names} else None
  )


def write_columns(prepared: Prepared, table: pa.Table) -> None:
  """Keeps columns beside the records.

  Args:
    prepared: the split.
    table: one row per record, in the records' order, without images.
  """
  from pyarrow import parquet

  if len(table) != len(prepared):
    raise ValueError(f"{len(table)} rows of {len(prepared)} records")
  lengths = json.dumps([int(length) for length in prepared.shard_lengths])
  path = columns_path(prepared.folder, prepared.split)
  with path.open("wb") as file:
    parquet.write_table(table.replace_schema_metadata({_SHARDS: lengths}), file)


def columns_path(folder: str | os.PathLike, split: str) -> epath.Path:
  """Where the columns of a split are kept."""
  from etils import epath

  return epath.Path(folder) / f"columns-{split}.parquet"


def _plain(value: Any) -> Any:
  """bytes -> text, also in lists."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, list):
    return [_plain(item) for item in value]
  return value
