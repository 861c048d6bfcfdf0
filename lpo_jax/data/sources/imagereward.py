"""ImageRewardDB: one image per row, one prompt per row, or one pair per row."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lpo_jax.data import files as files_lib
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.data.sources import embedded, pairs, ranking, rows
from lpo_jax.data.sources.kinds import Kind
from lpo_jax.data.sources.pictures import Pictures, inside
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  from etils import epath


def read_ranks(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> RankedLists:
  """Reads rows of one image, gathered by prompt_id, or rows of one prompt with lists.

  Ranks are 1 for the best, with ties and gaps.
  """
  if files[0].suffix in rows.JSON:
    found = [(place, values, None) for place, values in rows.read_json(files, RANKS)]
    return ranking.rank(_of_flat(found), pictures)
  grouped = files_lib.open_parquet(files[0]).schema_arrow.field("rank").type
  nested = "list" in str(grouped)
  types = {
    "prompt_id": "large_string",
    "prompt": "large_string",
    "rank": "list double" if nested else "double",
    "image_path": "list large_string" if nested else "large_string",
    "overall_rating": "list double" if nested else "double",
  }
  table, own = embedded.read(files, RANKS, types)
  load = table.loader(("image",)) if "image" in rows.first(files[0]) else None
  at = embedded.places(table, 0)
  if nested:
    found = zip(table.columns.to_pylist(), own, at, strict=True)
    return ranking.rank(_of_groups(found), pictures, load)
  (names,) = embedded.names(files, ["image"], own)
  cells = table.columns.to_pylist()
  for values, name in zip(cells, names, strict=True):
    values.setdefault("image_path", name)
  places = zip([str(files[0])] * len(cells), cells, at, strict=True)
  return ranking.rank(_of_flat(list(places)), pictures, load)


def _of_flat(found: Sequence[tuple[str, dict, Any]]) -> Iterator[ranking.Row]:
  groups: dict[Any, list] = collections.defaultdict(list)
  for place, values, at in found:
    if not isinstance(values.get("image_path"), str):
      raise UserError(f"{place} names no image; expected `image_path` or `image`.")
    name = values["image_path"]  # beside its own bytes it is a name and no file
    groups[values["prompt_id"]].append(
      (name if at else inside(name, place), values, at)
    )
  for members in groups.values():
    first = members[0][1]
    yield ranking.Row(
      first["prompt"],
      [name for name, _, _ in members],
      ranks=[values["rank"] for _, values, _ in members],
      places=[at for *_, at in members] if members[0][2] else None,
    )


def _of_groups(found: Any) -> Iterator[ranking.Row]:
  for values, own, (block, column, row, _) in found:
    ranks = values["rank"] or []
    paths = values.get("image_path") or [f"{own}/{i}" for i in range(len(ranks))]
    yield ranking.Row(
      values["prompt"],
      paths,
      ranks=ranks,
      places=[(block, column, row, item) for item in range(len(paths))],
    )


def read_pairs(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> Judgements:
  """Reads rows of a better and a worse image."""
  sides = ("img_better", "img_worse")
  if files[0].suffix in rows.JSON:
    found = rows.read_json(files, PAIRS)
    prompts = [values["prompt"] for _, values in found]
    uids = [[inside(values[side], at) for at, values in found] for side in sides]
    table = load = None
  else:
    table, own = embedded.read(files, PAIRS, {"prompt": "large_string"})
    prompts = table.columns["prompt"]
    uids, load = embedded.names(files, sides, own), table.loader(sides)
  columns = {
    "caption": prompts,
    "image_0_uid": uids[0],
    "image_1_uid": uids[1],
    "label_0": [1.0] * len(prompts),
    "label_1": [0.0] * len(prompts),
  }
  made = rows.table(files[0], columns, pairs.TYPES)
  where = (None, None) if table is None else (table.block, table.row)
  return pairs.judge(made, pictures, load, *where)


_SPLITS = "train on train; validation and test hold other prompts"
RANKS = Kind(
  about="ranked images with ratings, as ImageRewardDB, flat or grouped",
  required=("prompt_id", "prompt", "rank", "overall_rating"),
  optional=("image_path",),
  images=("image",),
  read=read_ranks,
  licence="Apache-2.0",
  splits=_SPLITS,
)
PAIRS = Kind(
  about="a better and a worse image per row, as ImageRewardDB's pairs",
  required=("prompt", "img_better", "img_worse"),
  optional=(),
  images=("img_better", "img_worse"),
  read=read_pairs,
  licence="Apache-2.0",
  splits=_SPLITS,
)
