"""Our own row, one ranked list: parquet, JSON lines, WebDataset, folders, records."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data import prepared
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.data.sources import pairs, pickapic, pictures, ranking, rows
from lpo_jax.data.sources.kinds import Kind
from lpo_jax.data.sources.pictures import IMAGE_FILE, Pictures, inside
from lpo_jax.data.stores import Block
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  import pyarrow as pa
  from etils import epath

TYPES = {
  "prompt": "large_string",
  "image_uids": "list large_string",
  "ranks": "list double",
  "scores": "list double",
  "votes": "list double",
  "weights": "double",
  "user_id": "large_string",
  "models": "list large_string",
  "instruction": "large_string",
}
PROMPT_FILE = "prompt.txt"
_NUMBERED = re.compile(r"(\d+)[^/]*$")  # 0-cat.png: the rank of a file in a folder
_ITEM = re.compile(r"(\d+)\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def read_lists(
  files: Sequence[epath.Path], split: str | None, given: Pictures | None
) -> RankedLists:
  """Reads parquet or JSON files."""
  if files[0].suffix in rows.JSON:
    table, load, block, row = _read_json(files)
    return ranking.rank(_of_table(table, block, row), given, load)
  table = files_lib.read_table(files, TYPES, LISTS.check)
  present = rows.first(files[0])
  load = table.loader(("images", "cond_image")) if "images" in present else None
  edits = "cond_image" in present
  return ranking.rank(
    _of_table(table.columns, table.block, table.row, edits=edits), given, load
  )


def _of_table(
  table: pa.Table, block: np.ndarray, row: np.ndarray, *, edits: bool = False
) -> Iterator[ranking.Row]:
  """Yields the rows of a table with columns of `TYPES`."""
  cells = (values for batch in table.to_batches(4096) for values in batch.to_pylist())
  for values, in_block, in_row in zip(cells, block.tolist(), row.tolist(), strict=True):
    uids = values["image_uids"]
    scores = values.get("scores") or values.get("votes")
    name = f"{(uids or [''])[0]}/cond_image" if edits else None
    yield ranking.Row(
      values.get("instruction") or values["prompt"],
      uids,
      ranks=values.get("ranks"),
      scores=scores,
      weight=values.get("weights"),
      user=values.get("user_id"),
      models=values.get("models"),
      places=[(in_block, 0, in_row, i) for i in range(len(uids or ()))],
      source=name,
      source_place=(in_block, 1, in_row, 0) if edits else None,
    )


def _read_json(
  files: Sequence[epath.Path],
) -> tuple[pa.Table, Callable[[int, int], Block] | None, np.ndarray, np.ndarray]:
  """Reads ranked lists from JSON lines; images are found again by byte offset."""
  columns: dict[str, list] = {name: [] for name in TYPES}
  places, any_images = [], False
  for path in files:
    for offset, values in files_lib.json_lines(path):
      where = f"{path}, byte {offset}"
      images = values.get("images") or []
      files_named = [i for i in images if isinstance(i, str) and IMAGE_FILE.search(i)]
      names = [inside(name, where) for name in files_named]
      if "image_uids" not in values and images and len(names) == len(images):
        values["image_uids"] = names
      any_images |= bool(images)
      LISTS.check(where, list(values))
      for name, column in columns.items():
        column.append(values.get(name))
      places.append((path, offset))
  if not places:
    raise UserError(f"{files[0]}: no rows. The file holds no ranked list.")

  def load(block: int, column: int) -> Block:
    path, offset = places[block]
    with path.open("rb") as file:
      file.seek(offset)
      images = json.loads(file.readline()).get("images") or []
    return lambda row, item: (
      _json_image(path.parent, images[item]) if item < len(images) else b""
    )

  if not any_images:
    load = None
  table = rows.table(files[0], columns, TYPES)
  return table, load, np.arange(len(places)), np.zeros(len(places), np.int64)


def _json_image(folder: epath.Path, value: Any) -> bytes:
  """Bytes of an image given by file name or in base64; b"" if there are none."""
  if not isinstance(value, str):
    return b""
  if IMAGE_FILE.search(value):
    file = folder / inside(value, folder)
    return file.read_bytes() if file.is_file() else b""
  try:
    return base64.b64decode(value.partition("base64,")[2] or value, validate=True)
  except binascii.Error:
    return b""


def read_webdataset(
  files: Sequence[epath.Path], split: str | None, given: Pictures | None
) -> RankedLists:
  """Reads tar archives: KEY.json is a row without images, KEY.0.jpg its first image."""
  samples: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
  for number, path in enumerate(files):
    for name, offset, size in pictures.tar_members(path):
      folder, _, base = name.rpartition("/")
      key, _, field = base.partition(".")
      whole = f"{folder}/{key}" if folder else key
      samples.setdefault((number, whole), {})[field] = (offset, size)
  spans: list[tuple[int, int]] = []

  def found() -> Iterator[ranking.Row]:
    for (number, key), members in samples.items():
      if "json" not in members:
        continue
      text = pictures.read_at(files[number], *members["json"])
      values = _object(text, f"{files[number]}, {key}.json")
      items = {
        int(match.group(1)): span
        for field, span in members.items()
        if (match := _ITEM.match(field))
      }
      uids = values.get("image_uids") or [f"{key}.{item}" for item in sorted(items)]
      places = []
      for item in range(len(uids)):
        places.append((number, 0, len(spans), 0))
        spans.append(items.get(item, (0, 0)))
      yield _of_values({**values, "image_uids": uids}, places)

  def load(block: int, column: int) -> Block:
    def cell(row: int, item: int) -> bytes:
      return pictures.read_at(files[block], *spans[row])

    return cell

  lists = ranking.rank(found(), given, load)
  if not len(lists) and not lists.dropped:
    raise UserError(
      f"{files[0]}: no rows. Expected KEY.json with prompt and ranks or scores, and the "
      "images KEY.0.jpg, KEY.1.jpg, ... in the same archive."
    )
  return lists


def _object(text: bytes, where: str) -> dict[str, Any]:
  try:
    values = json.loads(text)
  except ValueError as error:
    raise UserError(f"{where}: expected a JSON object ({error}).") from error
  if not isinstance(values, dict):
    raise UserError(f"{where}: expected a JSON object, not {type(values).__name__}.")
  return values


def _of_values(
  values: Mapping[str, Any], places: Sequence[ranking.Place]
) -> ranking.Row:
  user = values.get("user_id")
  return ranking.Row(
    values.get("prompt"),
    values["image_uids"],
    ranks=values.get("ranks"),
    scores=values.get("scores") or values.get("votes"),
    weight=values.get("weights"),
    user=None if user is None else str(user),
    models=values.get("models"),
    places=places,
  )


def is_folder(path: epath.Path) -> bool:
  """Whether the folder holds lists as folders, each with its prompt.txt."""
  if not path.is_dir():
    return False
  return any((child / PROMPT_FILE).exists() for child in _sorted(path))


def _sorted(path: epath.Path) -> list[epath.Path]:
  return sorted(path.iterdir(), key=lambda child: child.name)


def read_folder(
  path: epath.Path, split: str | None, given: Pictures | None
) -> RankedLists:
  """Reads one list per folder: prompt.txt, and pictures whose names start with a rank."""
  root = path / split if split else path
  if not is_folder(root):
    raise UserError(
      f"{root} holds no folder with a {PROMPT_FILE}. Expected one folder per list, with "
      f"{PROMPT_FILE} and pictures named by rank: 0-a.png, 1-b.png, 1-c.png (a tie)."
    )
  names: list[str] = []

  def found() -> Iterator[ranking.Row]:
    for folder in _sorted(root):
      prompt = folder / PROMPT_FILE
      if not prompt.exists():
        continue
      images = [f.name for f in _sorted(folder) if IMAGE_FILE.search(f.name)]
      matches = [_NUMBERED.match(name) for name in images]
      ranks = [int(match.group(1)) for match in matches if match]
      uids = [f"{folder.name}/{name}" for name in images]
      start = len(names)
      names.extend(uids)
      yield ranking.Row(
        prompt.read_text(encoding="utf-8-sig").strip("\r\n"),
        uids,
        ranks=ranks if len(ranks) == len(images) else None,
        places=[(start + i, 0, 0, 0) for i in range(len(uids))],
      )

  def load(block: int, column: int) -> Block:
    return lambda row, item: (root / names[block]).read_bytes()

  return ranking.rank(found(), given, load)


def read_records(
  path: epath.Path, split: str | None, given: Pictures | None
) -> Judgements | RankedLists:
  """Reads a data set of tensorflow_datasets that has the columns of another source."""
  opened = prepared.open_split(path, split)
  are_lists = "image_uids" in opened.features
  kind = LISTS if are_lists else RECORDS
  names = kind.check(path, list(opened.features))
  row = np.zeros(len(opened), np.int64)

  def load(block: int, column: int) -> Block:
    name = kind.images[column]
    found = opened.parse(opened.records[block], [name])[name]
    return lambda row, item: bytes(found[item] if are_lists else found)

  types = TYPES if are_lists else pairs.TYPES
  table = files_lib.cast(path, prepared.read_columns(opened, names), types)
  if not {*kind.images} & {*opened.features}:
    load = None
  if not are_lists:
    return pairs.judge(table, given, load, np.arange(len(table)), row)
  return ranking.rank(_of_table(_known(table), np.arange(len(table)), row), given, load)


def _known(table: pa.Table) -> pa.Table:
  """Makes empty annotators null: tensorflow_datasets has no missing values."""
  import pyarrow as pa
  import pyarrow.compute as pc

  if "user_id" not in table.column_names:
    return table
  user, nothing = table["user_id"], pa.scalar(None, pa.large_string())
  known = pc.if_else(pc.equal(user, ""), nothing, user)
  return table.set_column(table.column_names.index("user_id"), "user_id", known)


LISTS = Kind(
  about="one ranked list per row",
  required=("prompt", "image_uids"),
  optional=tuple(name for name in TYPES if name not in ("prompt", "image_uids")),
  images=("images", "cond_image"),
  read=read_lists,
)
WEBDATASET = dataclasses.replace(
  LISTS, about="tar archives with a JSON object per list", read=read_webdataset
)
FOLDER = dataclasses.replace(
  LISTS, about=f"folders of pictures with a {PROMPT_FILE}", read=read_folder
)
RECORDS = dataclasses.replace(
  pickapic.PAIRS,
  about="prepared by tensorflow_datasets with Pick-a-Pic's columns",
  read=read_records,
)
