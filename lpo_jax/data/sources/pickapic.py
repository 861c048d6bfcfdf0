"""Pick-a-Pic: two images and a label per row, best of four, and a writer of the former."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.data.sources import pairs, ranking
from lpo_jax.data.sources.kinds import Kind
from lpo_jax.data.sources.pictures import Pictures

if TYPE_CHECKING:
  from etils import epath

# Pick-a-Pic's columns in its order, by arrow type.
PICKAPIC_COLUMNS = {
  "are_different": "bool",
  "best_image_uid": "string",
  "caption": "string",
  "created_at": "timestamp[ns]",
  "has_label": "bool",
  "image_0_uid": "string",
  "image_0_url": "string",
  "image_1_uid": "string",
  "image_1_url": "string",
  "jpg_0": "binary",
  "jpg_1": "binary",
  "label_0": "double",
  "label_1": "double",
  "model_0": "string",
  "model_1": "string",
  "ranking_id": "int64",
  "user_id": "int64",
  "num_example_per_prompt": "int64",
  "__index_level_0__": "int64",
}
_IMAGES = ("jpg_0", "jpg_1")


def read_pairs(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> Judgements:
  """Reads the labels; images come from `pictures`, else from the same files."""
  present = files_lib.open_parquet(files[0]).schema_arrow.names
  table = files_lib.read_table(files, pairs.TYPES, PAIRS.check)
  load = table.loader(_IMAGES) if {*_IMAGES} <= {*present} else None
  return pairs.judge(table.columns, pictures, load, table.block, table.row)


_RANKINGS_TYPES = {
  "prompt": "large_string",
  "best_image_uid": "large_string",
  "user_id": "large_string",
  **{f"image_{i}_uid": "large_string" for i in range(1, 5)},
}


def read_rankings(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> RankedLists:
  """Reads the best of four as a star, [0, 1, 1, 1]."""
  table = files_lib.read_table(files, _RANKINGS_TYPES, RANKINGS.check).columns

  def rows() -> Iterator[ranking.Row]:
    for values in table.to_pylist():
      uids = [values[f"image_{i}_uid"] for i in range(1, 5)]
      yield ranking.Row(
        values["prompt"],
        uids,
        ranks=ranking.best_of(uids, values["best_image_uid"]),
        user=values.get("user_id"),
      )

  return ranking.rank(rows(), pictures)


_SPLITS = "train on `train`; v1 lies within v2, and `test_unique` never trains"
PAIRS = Kind(
  about="two images and a label per row, as Pick-a-Pic",
  required=("caption", "image_0_uid", "image_1_uid", "label_0", "label_1"),
  optional=("has_label", "user_id", "num_example_per_prompt", "model_0", "model_1"),
  images=_IMAGES,
  read=read_pairs,
  licence="none stated on its card",
  splits=_SPLITS,
)
RANKINGS = Kind(
  about="the best of four, as PickaPic-rankings",
  required=("prompt", *(f"image_{i}_uid" for i in range(1, 5)), "best_image_uid"),
  optional=("user_id",),
  images=(),
  read=read_rankings,
  licence="none stated on its card",
  splits="one split; its prompts and images are those of Pick-a-Pic",
)


def write_pickapic(
  path: str | os.PathLike,
  *,
  caption: Sequence[str],
  image_0_uid: Sequence[str],
  image_1_uid: Sequence[str],
  jpg_0: Sequence[bytes],
  jpg_1: Sequence[bytes],
  label_0: Sequence[float],
  label_1: Sequence[float] | None = None,
  has_label: Sequence[bool] | None = None,
  user_id: Sequence[int] | None = None,
  ranking_id: Sequence[int] | None = None,
  model_0: Sequence[str] | None = None,
  model_1: Sequence[str] | None = None,
  created_at: Sequence[Any] | None = None,
  row_group_size: int = 256,
) -> None:
  """Writes judgements as one parquet file with exactly Pick-a-Pic's columns and types.

  Args:
    path: the file.
    caption: [J] prompts.
    image_0_uid: [J] name of the first image.
    image_1_uid: [J] name of the second image.
    jpg_0: [J] encoded bytes of the first image, in any image format.
    jpg_1: [J] encoded bytes of the second image.
    label_0: [J] share of the win that went to the first: 1, 0, 0.5 for a tie, NaN where
      nobody judged.
    label_1: [J] share of the second; default 1 - label_0.
    has_label: [J] default: whether label_0 is a number.
    user_id: [J] annotators; default 0.
    ranking_id: [J] annotation events; default 0, 1, 2, ...
    model_0: [J] generator of the first image; default "".
    model_1: [J] generator of the second image; default "".
    created_at: [J] times without zone; default one second after another.
    row_group_size: rows per parquet row group.
  """
  import pyarrow as pa
  from pyarrow import parquet

  count = len(caption)
  label_0 = np.asarray(label_0, np.float64)
  label_1 = 1 - label_0 if label_1 is None else np.asarray(label_1, np.float64)
  labelled = ~np.isnan(label_0) if has_label is None else has_label
  best = [
    "tie" if a == b else first if a > b else second
    for a, b, first, second in zip(label_0, label_1, image_0_uid, image_1_uid)
  ]
  if created_at is None:
    created_at = np.datetime64("2023-01-01", "ns") + np.arange(count) * np.timedelta64(
      1_000_000_000, "ns"
    )
  examples = collections.Counter(caption)
  columns = {
    "are_different": [a != b for a, b in zip(jpg_0, jpg_1)],
    "best_image_uid": best,
    "caption": caption,
    "created_at": created_at,
    "has_label": labelled,
    "image_0_uid": image_0_uid,
    "image_0_url": [""] * count,
    "image_1_uid": image_1_uid,
    "image_1_url": [""] * count,
    "jpg_0": jpg_0,
    "jpg_1": jpg_1,
    "label_0": label_0,
    "label_1": label_1,
    "model_0": [""] * count if model_0 is None else model_0,
    "model_1": [""] * count if model_1 is None else model_1,
    "ranking_id": range(count) if ranking_id is None else ranking_id,
    "user_id": [0] * count if user_id is None else user_id,
    "num_example_per_prompt": [examples[text] for text in caption],
    "__index_level_0__": range(count),
  }
  table = pa.table(
    {
      name: pa.array(columns[name], pa.type_for_alias(kind))
      for name, kind in PICKAPIC_COLUMNS.items()
    }
  )
  parquet.write_table(table, os.fspath(path), row_group_size=row_group_size)
