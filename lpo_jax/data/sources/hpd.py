"""HPDv2 and HPDv3: JSON beside folders or archives of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.data.sources import pairs, ranking, rows
from lpo_jax.data.sources.kinds import Kind
from lpo_jax.data.sources.pictures import Pictures, inside
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  from etils import epath


def _several(place: str, values: dict[str, Any], name: str, count: int | None) -> list:
  found = values[name]
  if not isinstance(found, list) or count not in (None, len(found)):
    what = "a list" if count is None else f"a list of {count}"
    raise UserError(f"{place}: {name} is {found!r:.80}, expected {what}.")
  return found


def _columns(found: list[dict[str, Any]], path: Any):
  names = list(found[0])
  columns = {name: [row[name] for row in found] for name in names}
  return rows.table(path, columns, pairs.TYPES)


def read_v2(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> Judgements:
  """Reads train.json: the shares of the choice of two images."""
  found = []
  for place, values in rows.read_json(files, V2):
    first, second = (inside(n, place) for n in _several(place, values, "file_path", 2))
    label_0, label_1 = _several(place, values, "human_preference", 2)
    found.append(
      {
        "caption": values["prompt"],
        "image_0_uid": first,
        "image_1_uid": second,
        "label_0": label_0,
        "label_1": label_1,
      }
    )
  return pairs.judge(_columns(found, files[0]), pictures)


def read_v2_ranks(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> RankedLists:
  """Reads test.json: one list per prompt, ranks averaged over the annotators."""

  def found() -> Iterator[ranking.Row]:
    for place, values in rows.read_json(files, V2_RANKS):
      names = [inside(n, place) for n in _several(place, values, "image_path", None)]
      ranks = _several(place, values, "rank", None)
      scores = [None if r is None else -float(r) for r in ranks]
      yield ranking.Row(values["prompt"], names, ranks=ranks, scores=scores)

  return ranking.rank(found(), pictures)


def read_v2_annotations(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> RankedLists:
  """Reads test.json: one list per annotator and prompt."""

  def found() -> Iterator[ranking.Row]:
    for place, values in rows.read_json(files, V2_ANNOTATIONS):
      names = [inside(n, place) for n in _several(place, values, "image_path", None)]
      for annotation in _several(place, values, "raw_annotations", None):
        yield ranking.Row(
          values["prompt"],
          names,
          ranks=annotation.get("rank"),
          user=str(annotation["user_hash"]) if "user_hash" in annotation else None,
        )

  return ranking.rank(found(), pictures)


def read_v3(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> Judgements:
  """Reads HPDv3: path1 was preferred, by the share that choice_dist says."""
  found = []
  for place, values in rows.read_json(files, V3):
    votes = values.get("choice_dist")
    label = 1.0
    if votes:
      first, second = _several(place, values, "choice_dist", 2)
      (label,) = pairs.shares([first], [second])
    found.append(
      {
        "caption": values["prompt"],
        "image_0_uid": inside(values["path1"], place),
        "image_1_uid": inside(values["path2"], place),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": values.get("model1"),
        "model_1": values.get("model2"),
      }
    )
  return pairs.judge(_columns(found, files[0]), pictures)


_V2 = {
  "images": (),
  "licence": "Apache-2.0",
  "splits": "train on train.json; test.json is the benchmark of HPSv2",
}
V2 = Kind(
  about="two images and a preference per row, as HPDv2's train.json",
  required=("prompt", "file_path", "human_preference"),
  optional=(),
  read=read_v2,
  **_V2,
)
V2_RANKS = Kind(
  about="images and their mean ranks, as HPDv2's test.json",
  required=("prompt", "image_path", "rank"),
  optional=(),
  read=read_v2_ranks,
  **_V2,
)
V2_ANNOTATIONS = Kind(
  about="images and each annotator's ranks, as HPDv2's test.json",
  required=("prompt", "image_path", "raw_annotations"),
  optional=(),
  read=read_v2_annotations,
  **_V2,
)
V3 = Kind(
  about="a preferred and a rejected image per row, as HPDv3",
  required=("prompt", "path1", "path2"),
  optional=("choice_dist", "model1", "model2"),
  images=(),
  read=read_v3,
  licence="MIT",
  splits="train on train.json; the benchmark files are for evaluation",
)
