"""Ranked lists to files: what `sources.read` takes as the source `lists`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def write(
  path: str | os.PathLike,
  *,
  prompts: Sequence[str],
  images: Sequence[Sequence[bytes]],
  image_uids: Sequence[Sequence[str]],
  ranks: Sequence[Sequence[int]],
  scores: Sequence[Sequence[float]] | None = None,
  models: Sequence[Sequence[str]] | None = None,
  sources: Sequence[bytes] | None = None,
  more: Mapping[str, Sequence[Any]] | None = None,
) -> None:
  """Writes one parquet file, atomically: a file that is there is whole.

  Args:
    path: the file; its folder is made.
    prompts: [B] texts; of edits, the instructions.
    images: [B][n] encoded bytes, in any image format.
    image_uids: [B][n] names.
    ranks: [B][n] 0 best, equal = tie.
    scores: [B][n] higher is better.
    models: [B][n] generators.
    sources: [B] the encoded images that the lists' images are edits of.
    more: further columns, for people; no reader of ours looks at them.
  """
  import pyarrow as pa
  from pyarrow import parquet

  columns = {
    "prompt": pa.array(prompts, pa.string()),
    "images": pa.array(images, pa.list_(pa.binary())),
    "image_uids": pa.array(image_uids, pa.list_(pa.string())),
    "ranks": pa.array(ranks, pa.list_(pa.int32())),
  }
  if scores is not None:
    columns["scores"] = pa.array(scores, pa.list_(pa.float64()))
  if models is not None:
    columns["models"] = pa.array(models, pa.list_(pa.string()))
  if sources is not None:
    columns["cond_image"] = pa.array(sources, pa.binary())
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  parquet.write_table(pa.table({**columns, **(more or {})}), partial)
  partial.replace(path)


def join(parts: Sequence[str | os.PathLike], path: str | os.PathLike) -> None:
  """Writes the rows of several files as one, atomically, one file in memory at a time."""
  from pyarrow import parquet

  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  with parquet.ParquetWriter(partial, parquet.read_schema(parts[0])) as writer:
    for part in parts:
      writer.write_table(parquet.read_table(part))
  partial.replace(path)
