"""What the workers of the list builder do: its steps on Apache Beam.

The steps go to other machines by the name of their module, which therefore is never the
one that is run as a command.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data import judgements as judgements_lib
from lpo_jax.data import lists, ranked, sources
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import ListReport, RankedLists
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  import apache_beam as beam


@dataclasses.dataclass(frozen=True)
class Work:
  """What is built from what.

  Attributes:
    files: the source's files, in the order in which `sources.read` would read them.
    source: their kind, as `data.source`.
    settings: keyword arguments of `lists.build`.
    parts: number of parts that the prompts are dealt into; one part has to fit in the
      memory of one worker, without images.
  """

  files: tuple[str, ...]
  source: str
  settings: Mapping[str, Any]
  parts: int


@dataclasses.dataclass(frozen=True)
class Places:
  """Where a pipeline writes what is not a record.

  Attributes:
    report: file of the account.
    pieces: folder for the columns, until they are put together.
  """

  report: str
  pieces: str


@dataclasses.dataclass(frozen=True)
class Picture:
  """One image as one file shows it first.

  Attributes:
    file: the file's place in `Work.files`; the first file's bytes count.
    data: the encoded bytes, b"" if there are none.
    model: its generator, "" where unknown.
  """

  file: int
  data: bytes
  model: str


def read_file(place: tuple[int, str], *, source: str, parts: int) -> Iterator[Any]:
  """Reads one file; the main output is (part, (file, judgements)), image by image beside.

  Args:
    place: the file's place in `Work.files`, and its name.
    source: its kind.
    parts: number of parts.

  Yields:
    Judgements without images, one piece per part that the file has any for, and
    outputs tagged "images": (uid, Picture).

  Raises:
    UserError: the file cannot be read, holds ready lists, or lacks images.
  """
  import apache_beam as beam

  number, file = place
  if _is_empty(file):  # one of many; `sources.read` minds only if all are
    return
  judged = sources.read(file, source)
  if isinstance(judged, RankedLists) or judged.images is None:
    what = "ranked lists" if isinstance(judged, RankedLists) else "no images"
    raise UserError(
      f"{file} holds {what}; the builder joins judgements of two images and writes the "
      "lists with their images. Ranked lists need no building: give them to the cache "
      "job as they are, and labels alone with data.images."
    )
  absent = np.flatnonzero(~judged.images.present)
  if len(absent):
    raise UserError(
      f"{len(absent)} of the {judged.images.count} images of {file} are not there (the "
      f"first: {judged.image_uids[absent[0]]!r}), and the builder writes lists with "
      "their images. Put them beside the labels; or leave the builder out: --job cache "
      "does without images that are missing."
    )
  yield from ((part, (number, piece)) for part, piece in deal(judged, parts))
  models = judged.image_model
  for index, data in judged.images.iterate():
    model = -1 if models is None else int(models[index])
    name = judged.models[model] if model >= 0 else ""
    uid = judged.image_uids[index]
    yield beam.pvalue.TaggedOutput("images", (uid, Picture(number, data, name)))


def _is_empty(file: str) -> bool:
  from etils import epath

  if not file.endswith(".parquet"):
    return False
  return not files_lib.open_parquet(epath.Path(file)).metadata.num_rows


def deal(source: Judgements, parts: int) -> Iterator[tuple[int, Judgements]]:
  """Deals judgements into parts by prompt; what reading refused goes to part 0.

  The part of a prompt depends on its text and the number of parts alone.

  Yields:
    (part, its judgements in the same order), without images.
  """
  texts = (text.encode("utf-8", "surrogatepass") for text in source.prompts)
  by_prompt = np.fromiter((zlib.crc32(text) % parts for text in texts), np.int64)
  part = by_prompt[source.prompt] if len(source) else np.zeros(0, np.int64)
  for number in np.union1d(part, [0]).tolist():
    piece = judgements_lib.take(source, np.flatnonzero(part == number))
    dropped = source.dropped if number == 0 else {}
    yield number, dataclasses.replace(piece, dropped=dropped)


def build_part(
  element: tuple[int, Iterable[tuple[int, Judgements]]], *, settings: Mapping[str, Any]
) -> Iterator[Any]:
  """Builds the lists of one part.

  Args:
    element: the part's number, and its pieces by file.
    settings: keyword arguments of `lists.build`.

  Yields:
    (key, canonical row without images), and outputs tagged "wanted": (uid, (key,
    place in the list)), and "reports": the part's account.
  """
  import apache_beam as beam

  pieces = [piece for _, piece in sorted(element[1], key=lambda piece: piece[0])]
  built, report = lists.build(judgements_lib.concatenate(pieces), **settings)
  yield beam.pvalue.TaggedOutput("reports", report)
  for key, row in rows(built):
    yield key, row
    for place, uid in enumerate(row["image_uids"]):
      yield beam.pvalue.TaggedOutput("wanted", (uid, (key, place)))


def rows(built: RankedLists) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (key, canonical row without images) of each list.

  The key is a hash of prompt, annotator and the list's number among theirs: the same
  whatever else there is. Records are sorted by it.
  """
  numbers: collections.Counter[str] = collections.Counter()
  for index in range(len(built)):
    span = slice(built.offsets[index], built.offsets[index + 1])
    prompt, user = built.prompts[built.prompt[index]], ""
    if built.user is not None and built.user[index] >= 0:
      user = built.users[built.user[index]]
    about = f"{prompt}\x1f{user}"
    text = f"{about}\x1f{numbers[about]}".encode("utf-8", "surrogatepass")
    numbers[about] += 1
    # 63 bits: what Beam and parquet take as a number.
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    row = {
      "prompt": prompt,
      "image_uids": [built.image_uids[i] for i in built.image[span]],
      "ranks": built.rank[span].tolist(),
      "scores": built.score[span].tolist() if built.score[span].any() else [],
      "weights": float(built.weight[index]),
      "user_id": user,
    }
    yield key, row


def first_picture(pictures: Iterable[Picture]) -> Picture:
  """Returns what `sources.read` would say of an image that several files show."""
  pictures = list(pictures)
  first = min(pictures, key=lambda picture: picture.file)
  return dataclasses.replace(first, model=max(p.model for p in pictures))


def _hand_out(element: tuple[str, Mapping[str, list]]) -> Iterator[Any]:
  """(uid, who wants it and what it is) -> (key, (place, picture)) for each list."""
  _, sides = element
  for picture in sides["pictures"]:
    for key, place in sides["wanted"]:
      yield key, (place, picture)


def _complete(element: tuple[int, Mapping[str, list]]) -> tuple[int, dict[str, Any]]:
  """Puts the images into a row."""
  key, sides = element
  (row,) = sides["rows"]
  pictures = [
    picture for _, picture in sorted(sides["items"], key=lambda item: item[0])
  ]
  return key, {
    **row,
    "images": [picture.data for picture in pictures],
    "models": [picture.model for picture in pictures],
  }


def expand(pipeline: beam.Pipeline, work: Work, places: Places) -> beam.PCollection:
  """Adds all steps to a pipeline.

  Args:
    pipeline: an empty one.
    work: what to build.
    places: where to write what is not a record.

  Returns:
    (key, canonical row) of every list.
  """
  import apache_beam as beam

  read = functools.partial(read_file, source=work.source, parts=work.parts)
  build = functools.partial(build_part, settings=dict(work.settings))
  files = (
    pipeline
    | "Files" >> beam.Create(list(enumerate(work.files)))
    | "Spread" >> beam.Reshuffle()
    | "Read" >> beam.FlatMap(read).with_outputs("images", main="judgements")
  )
  parts = (
    files.judgements
    | "Meet" >> beam.GroupByKey()
    | "Build" >> beam.FlatMap(build).with_outputs("wanted", "reports", main="rows")
  )
  pictures = files.images | "FirstPicture" >> beam.CombinePerKey(first_picture)
  images = (
    parts.wanted
    | "UidOf" >> beam.Keys()
    | "Distinct" >> beam.Distinct()
    | "Count" >> beam.combiners.Count.Globally()
  )
  _ = (
    parts.reports
    | "Sum" >> beam.CombineGlobally(ranked.add_reports).without_defaults()
    | "WriteReport"
    >> beam.Map(_write_report, places.report, beam.pvalue.AsSingleton(images))
  )
  items = (
    {"wanted": parts.wanted, "pictures": pictures}
    | "Find" >> beam.CoGroupByKey()
    | "HandOut" >> beam.FlatMap(_hand_out)
  )
  complete = (
    {"rows": parts.rows, "items": items}
    | "Join" >> beam.CoGroupByKey()
    | "Complete" >> beam.Map(_complete)
  )
  _ = (
    complete
    | "Columns" >> beam.Map(_columns, work.parts)
    | "Gather" >> beam.GroupByKey()
    | "WriteColumns" >> beam.Map(_write_piece, places.pieces)
  )
  return complete


def _columns(
  element: tuple[int, dict[str, Any]], pieces: int
) -> tuple[int, dict[str, Any]]:
  """(key, row) -> (piece, row without images and with its key)."""
  key, row = element
  return key % pieces, {"key": key, **{k: v for k, v in row.items() if k != "images"}}


def _write_piece(element: tuple[int, Iterable[dict[str, Any]]], folder: str) -> None:
  import pyarrow as pa
  from etils import epath
  from pyarrow import parquet

  piece, found = element
  path = epath.Path(folder) / f"{piece:06d}.parquet"
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("wb") as file:
    parquet.write_table(pa.Table.from_pylist(list(found)), file)


def _write_report(report: ListReport, path: str, images: int) -> None:
  from etils import epath

  described = dataclasses.replace(report, images=images).as_dict()
  text = json.dumps(described, indent=1, ensure_ascii=False, sort_keys=True)
  epath.Path(path).write_text(text + "\n")
