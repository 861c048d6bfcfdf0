"""Rapidata: two images and how many people voted for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lpo_jax.data.judgements import Judgements
from lpo_jax.data.sources import embedded, pairs, rows
from lpo_jax.data.sources.kinds import Kind
from lpo_jax.data.sources.pictures import Pictures, inside

if TYPE_CHECKING:
  from etils import epath

_IMAGES = ("image1", "image2")
_SPLITS = "numbered train splits; none is held out, so hold out prompts"


def _read(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None, column: str
) -> Judgements:
  """Reads votes as the shares of one win; images are called by their paths."""
  kind = {c.required[1]: c for c in (VOTES, WEIGHTED)}[column.format(1)]
  types = {
    **dict.fromkeys(("prompt", "model1", "model2"), "large_string"),
    **dict.fromkeys(("image1_path", "image2_path"), "large_string"),
    **dict.fromkeys((column.format(1), column.format(2)), "double"),
  }
  table, names = embedded.read(files, kind, types)
  found = table.columns.to_pydict()
  uids = []
  for number, beside in enumerate(embedded.names(files, _IMAGES, names), 1):
    paths = found.get(f"image{number}_path") or [None] * len(names)
    uids.append([inside(p, files[0]) if p else b for p, b in zip(paths, beside)])
  label = pairs.shares(
    [v or 0 for v in found[column.format(1)]], [v or 0 for v in found[column.format(2)]]
  )
  columns = {
    "caption": found["prompt"],
    "image_0_uid": uids[0],
    "image_1_uid": uids[1],
    "label_0": label,
    "label_1": [1 - share for share in label],
  }
  for number in (1, 2):
    if f"model{number}" in found:
      columns[f"model_{number - 1}"] = found[f"model{number}"]
  load = table.loader(_IMAGES) if {*_IMAGES} <= {*rows.first(files[0])} else None
  made = rows.table(files[0], columns, pairs.TYPES)
  return pairs.judge(made, pictures, load, table.block, table.row)


VOTES = Kind(
  about="two images and the votes for each, as Rapidata",
  required=("prompt", "votes_image1", "votes_image2"),
  optional=("model1", "model2", "image1_path", "image2_path"),
  images=_IMAGES,
  read=functools.partial(_read, column="votes_image{}"),
  licence="as each set's card says (the 6M set: CC-BY-4.0)",
  splits=_SPLITS,
)
WEIGHTED = dataclasses.replace(
  VOTES,
  about="two images and their weighted shares of preference, as Rapidata's newer sets",
  required=(
    "prompt",
    "weighted_results_image1_preference",
    "weighted_results_image2_preference",
  ),
  read=functools.partial(_read, column="weighted_results_image{}_preference"),
)
