"""Data sets on disk to judgements or ranked lists: the one place with column names."""

from __future__ import annotations

import base64
import binascii
import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data import orders
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists, list_ids
from lpo_jax.data.stores import Block, ImageStore
from lpo_jax.errors import UserError, nearest, unknown_name

if TYPE_CHECKING:
  import pyarrow as pa
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
_IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Kind:
  """One layout of data sets.

  Attributes:
    about: what it is, for errors.
    required: columns without which there is nothing to learn.
    optional: columns that are used where they are there.
    images: the required columns that hold image bytes, read only when asked for.
    read: (files or folder, split) -> judgements or ranked lists.
  """

  about: str
  required: tuple[str, ...]
  optional: tuple[str, ...]
  images: tuple[str, ...]
  read: Callable[[Any, str | None], Judgements | RankedLists]


def read(
  path: str | os.PathLike, source: str = "auto", *, split: str | None = None
) -> Judgements | RankedLists:
  """Reads what people said; images stay where they are until asked for.

  Sources:

  * ``pickapic``: parquet with exactly Pick-a-Pic's columns.
  * ``lists``: parquet or JSON lines, one ranked list per row: prompt, images,
    image_uids, ranks (0 best, equal = tie) or scores (higher is better), and optionally
    weights, user_id, models. In JSON an image is base64, or a file name relative to the
    JSON file, which then also is its uid by default.
  * ``tfds``: a folder prepared by tensorflow_datasets as array_record, whose features
    are Pick-a-Pic's columns. Needs no TensorFlow.
  * ``auto``: whichever has the columns that are there.

  Args:
    path: a file, a folder of files (read in order of name), or a pattern with ``*``.
    source: see above.
    split: which files of a folder: those named ``<split>-*`` or ``<split>.*``, or in a
      folder of that name.

  Returns:
    Judgements, or ranked lists from sources that hold these.

  Raises:
    UserError: nothing there, no rows, a file that cannot be read, a missing column.
  """
  from etils import epath

  if not path:
    raise UserError(
      "data.path is not set; give the parquet file, or the folder of parquet files, "
      "that holds the judgements."
    )
  if source != "auto" and source not in SOURCES:
    raise unknown_name("data.source", source, ["auto", *SOURCES])
  folder = epath.Path(path)
  if source == "tfds" or (source == "auto" and (folder / "features.json").exists()):
    return _read_tfds(folder, split)
  files = files_lib.find(folder, split)
  if source == "auto":
    source = _detect(files[0])
  return SOURCES[source].read(files, split)


def _detect(path: epath.Path) -> str:
  """Returns the source of whose required columns most are there."""
  if path.suffix == ".jsonl":
    columns = set(next(files_lib.json_lines(path), (0, {}))[1])
  else:
    columns = set(files_lib.open_parquet(path).schema_arrow.names)
  shares = {
    name: sum(c in columns for c in kind.required) / len(kind.required)
    for name, kind in SOURCES.items()
  }
  best = max(shares, key=shares.__getitem__)
  if not shares[best]:
    kinds = "; ".join(
      f"{n} ({k.about}): {list(k.required)}" for n, k in SOURCES.items()
    )
    raise UserError(
      f"{path} has none of the columns of any known source. It has "
      f"{sorted(columns)}; known: {kinds}. Rename its columns."
    )
  return best


def _chooser(source: str) -> Callable[[Any, Sequence[str]], list[str]]:
  return functools.partial(_check_columns, source=source)


def _check_columns(path: Any, present: Sequence[str], source: str) -> list[str]:
  """Returns the columns to read, without images; refuses a file that lacks one."""
  kind = SOURCES[source]
  for name in kind.required:
    if name not in present:
      near = nearest(name, present)
      raise UserError(
        f"{path} has no column {name!r}"
        f"{f'; the nearest one there is {near!r}' if near else ''}. A {source} source "
        f"({kind.about}) needs {', '.join(kind.required)}; this file has "
        f"{', '.join(present) or 'no columns'}. Rename the column, or set data.source."
      )
  wanted = (*kind.required, *kind.optional)
  return [name for name in wanted if name in present and name not in kind.images]


# Pick-a-Pic, from parquet or tensorflow_datasets.

_PICKAPIC_TYPES = {
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


def _read_pickapic(files: Sequence[epath.Path], split: str | None) -> Judgements:
  table = files_lib.read_table(files, _PICKAPIC_TYPES, _chooser("pickapic"))
  load = table.loader(("jpg_0", "jpg_1"))
  return _pickapic(table.columns, load, table.block, table.row)


def _pickapic(
  table: pa.Table,
  load: Callable[[int, int], Block],
  block: np.ndarray,
  row: np.ndarray,
) -> Judgements:
  """Turns Pick-a-Pic's columns into judgements; refuses rows by one reason each."""

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
  table, block, row = table.filter(keep), block[keep], row[keep]
  label_0, examples = label_0[keep], numbers("num_example_per_prompt", 1.0)
  prompts, (prompt,) = files_lib.vocabulary(table["caption"])
  uids, (image_a, image_b) = files_lib.vocabulary(
    table["image_0_uid"], table["image_1_uid"]
  )
  users, (user,) = files_lib.vocabulary(*_maybe(table, "user_id"))
  models, (model_0, model_1) = files_lib.vocabulary(
    *_maybe(table, "model_0", "model_1")
  )
  image_model = np.full(len(uids), -1, np.int32)
  np.maximum.at(image_model, image_a, model_0)
  np.maximum.at(image_model, image_b, model_1)
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
    images=ImageStore(
      load,
      image=np.concatenate([image_a, image_b]),
      block=np.tile(block, 2),
      column=np.repeat([0, 1], len(table)),
      row=np.tile(row, 2),
    ),
    models=models,
    image_model=image_model,
    dropped=dropped,
  )


def _equal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> np.ndarray:
  import pyarrow.compute as pc

  return pc.fill_null(pc.equal(a, b), False).to_numpy()


def _maybe(table: pa.Table, *names: str) -> list[pa.ChunkedArray]:
  """The columns; nulls for those that are not there."""
  import pyarrow as pa

  nothing = pa.chunked_array([pa.nulls(len(table), pa.large_string())])
  return [table[n] if n in table.column_names else nothing for n in names]


def _read_tfds(path: epath.Path, split: str | None) -> Judgements:
  """Reads a data set prepared by tensorflow_datasets; passes over all records once."""
  import pyarrow as pa
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(path)
  except Exception as error:  # tfds raises anything for a folder that is not one
    raise UserError(
      f"data.path={str(path)!r} is no data set of tensorflow_datasets ({error})."
      " It should be the folder that holds features.json and dataset_info.json."
    ) from error
  names = _check_columns(path, list(builder.info.features), "tfds")
  splits = list(builder.info.splits)
  split = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
  if split not in splits:
    raise unknown_name("data.split", split, splits)
  sides = ("jpg_0", "jpg_1")
  encoded = {
    side: tfds.decode.SkipDecoding()
    for side in sides
    if isinstance(builder.info.features[side], tfds.features.Image)
  }
  try:
    records = builder.as_data_source(split, decoders=encoded or None)
  except NotImplementedError as error:
    raise UserError(
      f"{path} cannot be read without TensorFlow ({error}). Prepare it again with "
      "file_format='array_record'."
    ) from error
  columns: dict[str, list] = {name: [] for name in names}
  for index in range(len(records)):
    record = records[index]
    for name in names:
      value = record[name]
      columns[name].append(value.decode() if isinstance(value, bytes) else value)
  if not len(records):
    raise UserError(f"{path}: split {split!r} has no records.")

  def load(block: int, column: int) -> Block:
    return lambda row, item: bytes(records[block][sides[column]])

  table = files_lib.cast(path, pa.table(columns), _PICKAPIC_TYPES)
  return _pickapic(table, load, np.arange(len(table)), np.zeros(len(table), np.int64))


# Lists that come ranked.

_LISTS_TYPES = {
  "prompt": "large_string",
  "image_uids": "list large_string",
  "ranks": "list double",
  "scores": "list double",
  "weights": "double",
  "user_id": "large_string",
  "models": "list large_string",
}


def _read_lists(files: Sequence[epath.Path], split: str | None) -> RankedLists:
  if files[0].suffix == ".jsonl":
    return _lists(*_read_json(files))
  table = files_lib.read_table(files, _LISTS_TYPES, _chooser("lists"))
  return _lists(table.columns, table.loader(("images",)), table.block, table.row)


def _read_json(
  files: Sequence[epath.Path],
) -> tuple[pa.Table, Callable[[int, int], Block], np.ndarray, np.ndarray]:
  """Reads ranked lists from JSON lines; images are found again by byte offset."""
  import pyarrow as pa

  columns: dict[str, list] = {name: [] for name in _LISTS_TYPES}
  places = []
  for path in files:
    for offset, values in files_lib.json_lines(path):
      images = values.get("images") or []
      named = all(isinstance(i, str) and _IMAGE_FILE.search(i) for i in images)
      if "image_uids" not in values and images and named:
        values["image_uids"] = images
      _check_columns(f"{path}, byte {offset}", list(values), "lists")
      for name, column in columns.items():
        column.append(values.get(name))
      places.append((path, offset))
  if not places:
    raise UserError(f"{files[0]}: no rows. The file holds no ranked list.")
  try:
    table = pa.table(columns)
  except (pa.ArrowException, TypeError) as error:
    raise UserError(
      f"{files[0]}: a field has values of different types in different rows ({error})."
    ) from error

  def load(block: int, column: int) -> Block:
    path, offset = places[block]
    with path.open("rb") as file:
      file.seek(offset)
      images = json.loads(file.readline()).get("images") or []
    return lambda row, item: (
      _json_image(path.parent, images[item]) if item < len(images) else b""
    )

  table = files_lib.cast(files[0], table, _LISTS_TYPES)
  return table, load, np.arange(len(places)), np.zeros(len(places), np.int64)


def _json_image(folder: epath.Path, value: Any) -> bytes:
  """Bytes of an image given by file name or in base64; b"" if there are none."""
  if not isinstance(value, str):
    return b""
  if _IMAGE_FILE.search(value):
    file = folder / value
    return file.read_bytes() if file.is_file() else b""
  try:
    return base64.b64decode(value.partition("base64,")[2] or value, validate=True)
  except binascii.Error:
    return b""


def _lists(
  table: pa.Table,
  load: Callable[[int, int], Block],
  block: np.ndarray,
  row: np.ndarray,
) -> RankedLists:
  """Turns canonical rows into ranked lists; refuses rows by one reason each."""
  import pyarrow as pa

  dropped: collections.Counter[str] = collections.Counter()
  prompts, uids, users, models = [], [], [], []
  ranks, scores, weights, sizes, places = [], [], [], [], []
  rows = (values for batch in table.to_batches(4096) for values in batch.to_pylist())
  for values, in_block, in_row in zip(rows, block.tolist(), row.tolist(), strict=True):
    order = _order(values)
    if isinstance(order, str):
      dropped[order] += 1
      continue
    names, score = values["image_uids"], values.get("scores")
    generators, weight = values.get("models"), values.get("weights")
    if not generators or len(generators) != len(names):
      generators = [None] * len(names)
    worse = values.get("ranks") or [-s for s in score]
    prompts.append(values["prompt"])
    users.append(values.get("user_id"))
    weights.append(1.0 if weight is None else weight)
    sizes.append(len(names))
    uids += [names[i] for i in order]
    ranks += orders.dense([worse[i] for i in order])
    scores += [score[i] for i in order] if score else [0.0] * len(names)
    models += [generators[i] for i in order]
    places += [(in_block, in_row, i) for i in order]

  def vocabulary(texts: list) -> tuple[list[str], np.ndarray]:
    words, (index,) = files_lib.vocabulary(pa.chunked_array([texts], pa.large_string()))
    return words, index

  offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
  prompt_words, prompt = vocabulary(prompts)
  uid_words, image = vocabulary(uids)
  user_words, user = vocabulary(users)
  model_words, model = vocabulary(models)
  image_model = np.full(len(uid_words), -1, np.int32)
  np.maximum.at(image_model, image, model)
  block, row, item = np.asarray(places, np.int64).reshape(-1, 3).T
  return RankedLists(
    prompt=prompt,
    list_id=list_ids(prompts, uids, offsets, [u or "" for u in users]),
    weight=np.asarray(weights, np.float32),
    offsets=offsets,
    image=image,
    rank=np.asarray(ranks, np.int32),
    score=np.asarray(scores, np.float32),
    prompts=prompt_words,
    image_uids=uid_words,
    user=user,
    users=user_words,
    images=ImageStore(load, image=image, block=block, row=row, item=item),
    models=model_words,
    image_model=image_model,
    dropped=dict(dropped),
  )


def _order(values: Mapping[str, Any]) -> list[int] | str:
  """Returns the places of a row's images, best first, or why the row is refused."""
  names, ranks, scores = (values.get(k) for k in ("image_uids", "ranks", "scores"))
  if values.get("prompt") is None:
    return "no_prompt"
  if not names or any(name is None for name in names):
    return "no_image"
  if not ranks and not scores:
    return "unlabelled"
  for given in (ranks, scores):
    if given and (len(given) != len(names) or any(g is None for g in given)):
      return "bad_label"
    if given and not np.all(np.isfinite(given)):
      return "unlabelled"
  if len(set(names)) < len(names):
    return "same_image"
  worse = ranks or [-score for score in scores]
  return sorted(range(len(names)), key=lambda i: (worse[i], names[i]))


_PICKAPIC = Kind(
  about="two images and a label per row, as Pick-a-Pic",
  required=(
    "caption",
    "image_0_uid",
    "image_1_uid",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
  ),
  optional=("has_label", "user_id", "num_example_per_prompt", "model_0", "model_1"),
  images=("jpg_0", "jpg_1"),
  read=_read_pickapic,
)
SOURCES = {
  "pickapic": _PICKAPIC,
  "lists": Kind(
    about="one ranked list per row",
    required=("prompt", "images", "image_uids"),
    optional=("ranks", "scores", "weights", "user_id", "models"),
    images=("images",),
    read=_read_lists,
  ),
  "tfds": dataclasses.replace(
    _PICKAPIC, about="prepared by tensorflow_datasets with Pick-a-Pic's columns"
  ),
}


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
