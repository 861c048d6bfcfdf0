"""Rows of two images and a label to judgements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.sources.pictures import Pictures
from lpo_jax.data.stores import Block, ImageStore

if TYPE_CHECKING:
  import pyarrow as pa

# Every source of pairs comes down to these columns, which are Pick-a-Pic's.
TYPES = {
  "caption": "large_string",
  "image_0_uid": "large_string",
  "image_1_uid": "large_string",
  "label_0": "double",
  "label_1": "double",
  "has_label": "bool",
  "user_id": "large_string",
  "num_example_per_prompt": "double",
  "model_0": "large_string",
  "model_1": "large_string",
}


def judge(
  table: pa.Table,
  pictures: Pictures | None,
  load: Callable[[int, int], Block] | None = None,
  block: np.ndarray | None = None,
  row: np.ndarray | None = None,
) -> Judgements:
  """Turns columns of `TYPES` into judgements; refuses rows by one reason each.

  Args:
    table: J rows; labels are shares of one win.
    pictures: the images by uid; they go before those beside the labels.
    load: reads a block of the table's own images, in columns 0 and 1; None if it has
      none.
    block: [J] the block of each row.
    row: [J] its place in the block.

  Returns:
    The judgements.
  """

  def numbers(name: str, missing: float) -> np.ndarray:
    if name not in table.column_names:
      return np.full(len(table), missing)
    values = table[name].to_numpy().astype(np.float64)  # null becomes NaN
    return np.where(np.isnan(values), missing, values)

  label_0, label_1 = numbers("label_0", np.nan), numbers("label_1", np.nan)
  first, second = table["image_0_uid"], table["image_1_uid"]
  dropped, keep = {}, np.ones(len(table), bool)
  with np.errstate(invalid="ignore"):
    unfit = (label_0 < 0) | (label_1 < 0) | ~(np.abs(label_0 + label_1 - 1) < 1e-3)
  for reason, bad in (
    ("no_prompt", table["caption"].is_null().to_numpy()),
    ("no_image", first.is_null().to_numpy() | second.is_null().to_numpy()),
    ("unlabelled", ~(numbers("has_label", 1.0) > 0) | np.isnan(label_0 + label_1)),
    ("bad_label", unfit),
    ("same_image", _equal(first, second)),
  ):
    dropped[reason] = int(np.sum(bad & keep))
    keep &= ~bad
  kept = table.filter(keep)
  label_0, examples = label_0[keep], numbers("num_example_per_prompt", 1.0)[keep]
  prompts, (prompt,) = files_lib.vocabulary(kept["caption"])
  uids, (image_a, image_b) = files_lib.vocabulary(
    kept["image_0_uid"], kept["image_1_uid"]
  )
  users, (user,) = files_lib.vocabulary(*_maybe(kept, "user_id"))
  models, (model_0, model_1) = files_lib.vocabulary(*_maybe(kept, "model_0", "model_1"))
  image_model = np.full(len(uids), -1, np.int32)
  np.maximum.at(image_model, image_a, model_0)
  np.maximum.at(image_model, image_b, model_1)
  images = None
  if pictures is not None:
    images = pictures.store(uids)
  elif load is not None:
    images = ImageStore(
      load,
      image=np.concatenate([image_a, image_b]),
      block=np.tile(block[keep], 2),
      column=np.repeat([0, 1], len(kept)),
      row=np.tile(row[keep], 2),
    )
  return Judgements(
    prompts=prompts,
    image_uids=uids,
    users=users,
    prompt=prompt,
    user=user,
    image_a=image_a,
    image_b=image_b,
    label=label_0.astype(np.float32),
    weight=(1 / np.maximum(examples, 1)).astype(np.float32),
    images=images,
    models=models,
    image_model=image_model,
    dropped=dropped,
  )


def shares(first: Sequence[float], second: Sequence[float]) -> list[float]:
  """Returns the share of votes that went to the first; NaN where nobody voted."""
  with np.errstate(invalid="ignore", divide="ignore"):
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return np.where(first + second > 0, first / (first + second), np.nan).tolist()


def _equal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> np.ndarray:
  import pyarrow.compute as pc

  return pc.fill_null(pc.equal(a, b), False).to_numpy()


def _maybe(table: pa.Table, *names: str) -> list[pa.ChunkedArray]:
  """The columns; nulls for those that are not there."""
  import pyarrow as pa

  nothing = pa.chunked_array([pa.nulls(len(table), pa.large_string())])
  return [table[n] if n in table.column_names else nothing for n in names]
