"""Data sets on disk to judgements or ranked lists: the one place with column names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lpo_jax.data import files as files_lib
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.data.sources import (
  canonical,
  editing,
  hpd,
  imagereward,
  pickapic,
  pictures,
  places,
  rows,
  votes,
)
from lpo_jax.data.sources.kinds import Kind
from lpo_jax.data.sources.pickapic import PICKAPIC_COLUMNS, write_pickapic
from lpo_jax.data.sources.pictures import Pictures, open_pictures
from lpo_jax.errors import UserError, nearest, unknown_name

if TYPE_CHECKING:
  from etils import epath

__all__ = [
  "BENCHMARKS",
  "PICKAPIC_COLUMNS",
  "SOURCES",
  "Kind",
  "Opened",
  "open",
  "open_pictures",
  "read",
  "refuse_training",
  "write_pickapic",
]

SOURCES: dict[str, Kind] = {
  "pickapic": pickapic.PAIRS,
  "pickapic_rankings": pickapic.RANKINGS,
  "lists": canonical.LISTS,
  "webdataset": canonical.WEBDATASET,
  "folder": canonical.FOLDER,
  "tfds": canonical.RECORDS,
  "hpdv2": hpd.V2,
  "hpdv2_ranks": hpd.V2_RANKS,
  "hpdv2_annotations": hpd.V2_ANNOTATIONS,
  "hpdv3": hpd.V3,
  "imagereward": imagereward.RANKS,
  "imagereward_pairs": imagereward.PAIRS,
  "rapidata": votes.VOTES,
  "rapidata_weighted": votes.WEIGHTED,
  **editing.KINDS,
}
# Sources that are known by their files instead of by columns.
BY_FILES = ("webdataset", "folder", "tfds")
# Sources whose JSON files name images that lie beside them.
BESIDE = {
  *("hpdv2", "hpdv2_ranks", "hpdv2_annotations", "hpdv3", "seed_edit"),
  *("imagereward", "imagereward_pairs"),
}
# Splits on which published numbers are measured, under whatever name of file or folder.
BENCHMARKS = {
  "test_unique": "the 500 prompts on which Pick-a-Pic's users compare models"
}


@dataclasses.dataclass(frozen=True)
class Opened:
  """One source that is known, and not read yet.

  Attributes:
    path: as it was given.
    name: of its kind, a key of `SOURCES`.
    kind: columns, licence and splits.
    files: what is read, in order of name; for a folder or a prepared data set itself.
    split: as it was given.
    images: where its images are, as it was given; None or "" if with the labels.
  """

  path: str
  name: str
  kind: Kind
  files: Any
  split: str | None
  images: str | None

  def read(self) -> Judgements | RankedLists:
    """Reads the labels; images stay where they are until asked for.

    Raises:
      UserError: no rows, a file that cannot be read, a missing column.
    """
    return self.kind.read(self.files, self.split, self._pictures())

  def _pictures(self) -> Pictures | None:
    if self.images:
      return open_pictures(self.images)
    if self.name in BESIDE and self.files[0].suffix in rows.JSON:
      return pictures.beside(self.files[0].parent)
    return None


def open(
  path: str | os.PathLike,
  source: str = "auto",
  *,
  split: str | None = None,
  images: str | os.PathLike | None = None,
) -> Opened:
  """Finds out what a path holds, from names and from the columns of the first file.

  Args:
    path: a file, a folder of files (read in order of name), or a pattern with ``*``; on
      this machine, in a bucket (gs://, s3://) or on the hub (hf://owner/name).
    source: a key of `SOURCES`, or "auto" for the one whose columns are there.
    split: which files of a folder: those named ``<split>-*`` or ``<split>.*``, or in a
      folder of that name.
    images: where the images are, if not with the labels; see `open_pictures`.

  Returns:
    The source; several are opened by several calls, and read when wanted.

  Raises:
    UserError: nothing there, or nothing that is known.
  """
  if not path:
    raise UserError(
      "data.path is not set; give the parquet file, or the folder of parquet files, "
      "that holds the judgements."
    )
  if source != "auto" and source not in SOURCES:
    raise unknown_name("data.source", source, ["auto", *SOURCES])
  place = places.resolve(path)
  files: Any = place
  if source == "auto" and (place / "features.json").exists():
    source = "tfds"
  if source == "auto" and canonical.is_folder(place / split if split else place):
    source = "folder"
  if source not in ("tfds", "folder"):
    files = files_lib.find(place, split)
  if source == "auto":
    source = _detect(files[0])
  where = os.fspath(images) if images else None
  return Opened(os.fspath(path), source, SOURCES[source], files, split, where)


def read(
  path: str | os.PathLike,
  source: str = "auto",
  *,
  split: str | None = None,
  images: str | os.PathLike | None = None,
) -> Judgements | RankedLists:
  """Reads what people said; images stay where they are until asked for.

  Args:
    path: as `open` takes it.
    source: as `open` takes it.
    split: as `open` takes it.
    images: as `open` takes it.

  Returns:
    Judgements, or ranked lists from sources that hold these; their `images` is None
    where there are none with the labels and none were named.

  Raises:
    UserError: nothing there, no rows, a file that cannot be read, a missing column.
  """
  return open(path, source, split=split, images=images).read()


def refuse_training(opened: Opened) -> None:
  """Refuses a source that only measures.

  Raises:
    UserError: names the split.
  """
  files: Sequence[epath.Path] = (
    opened.files if isinstance(opened.files, list) else [opened.files]
  )
  names = {opened.split}
  for file in files:
    names |= {files_lib.split_of(file, opened.path), file.stem, file.parent.name}
  for name, why in BENCHMARKS.items():
    if name in names:
      raise UserError(
        f"{opened.path}: the split {name!r} is {why}; it is never trained on. Set "
        "data.split to 'train', and give this one to eval.prompts."
      )


def _detect(path: epath.Path) -> str:
  """Returns the source of whose required columns most are there."""
  if path.suffix == ".tar":
    return "webdataset"
  columns = rows.first(path)
  found = {
    name: [c for c in kind.required if c in columns]
    for name, kind in SOURCES.items()
    if name not in BY_FILES
  }
  best = max(
    found, key=lambda n: (len(found[n]) / len(SOURCES[n].required), len(found[n]))
  )
  if not found[best]:
    known = {c: n for n in found for c in SOURCES[n].required}
    near = [
      f"{c!r} may be {m!r} of {known[m]}" for c in columns if (m := nearest(c, known))
    ]
    kinds = "; ".join(
      f"{n} ({SOURCES[n].about}): {', '.join(SOURCES[n].required)}" for n in found
    )
    raise UserError(
      f"{path} has none of the columns of any known source. It has {sorted(columns)}"
      f"{'; ' + ', '.join(near) if near else ''}. Rename its columns. Known: {kinds}."
    )
  return best
