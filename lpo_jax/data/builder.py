"""Lists of collections that outgrow one machine: `lists.build` on Apache Beam.

  python -m lpo_jax.data.builder --path SOURCE --out DIR --strategy levels
      [--max_list_size 8 ...] [--runner=DataflowRunner and other options of Beam]

Judgements are dealt into parts by their prompt, so that all that is said about a prompt
meets in one part, and each part goes through `lists.build`. The lists and their account
are those of the whole collection at once. Images travel beside, once each. What comes
out is a data set of tensorflow_datasets with one canonical list row per record, for
`data.source="tfds"`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import sys
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data import judgements as judgements_lib
from lpo_jax.data import lists, prepared, ranked, sources
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import ListReport, RankedLists
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  import apache_beam as beam
  import tensorflow_datasets as tfds
  from etils import epath

NAME, VERSION = "ranked_lists", "1.0.0"
REPORT = "list_report.json"
LOCAL_RUNNER = "FnApiRunner"  # in this process


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


def plan(
  path: str | os.PathLike,
  source: str = "auto",
  *,
  split: str | None = None,
  parts: int | None = None,
  **settings: Any,
) -> Work:
  """Finds the files, and checks what can be checked before any worker starts.

  Args:
    path: as in `sources.read`.
    source: as in `sources.read`; judgements, not lists.
    split: as in `sources.read`.
    parts: see `Work`; default one per file.
    **settings: of `lists.build`.

  Returns:
    The work.

  Raises:
    UserError: no such files, or settings that `lists.build` refuses.
  """
  nothing = np.zeros(0, np.int32)
  lists.build(Judgements([], [], [], *[nothing] * 6), **settings)
  opened = sources.open(path, source, split=split)
  if not isinstance(opened.files, list):  # a folder that is read as a whole
    if split is not None:
      raise UserError(
        f"--split cannot be given with a source of kind {opened.name!r}, which the "
        "builder reads as a whole. Take it away."
      )
    found = [opened.files]
  else:
    found = opened.files
  if parts is not None and parts < 1:
    raise UserError(f"--parts is {parts}; there has to be at least 1.")
  return Work(tuple(map(str, found)), opened.name, settings, parts or len(found))


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
    UserError: the file cannot be read, holds ready lists, or no images.
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
      "job as they are."
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


@functools.cache
def _builder_class() -> type[tfds.core.GeneratorBasedBuilder]:
  """Defines the tensorflow_datasets builder; the import takes its time."""
  import tensorflow_datasets as tfds

  features = tfds.features

  class RankedListsBuilder(tfds.core.GeneratorBasedBuilder):
    """One canonical list row per record, images as the bytes they came in."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    url_infos = {}  # noqa: RUF012  nothing is downloaded; do not look for checksums
    work: Work
    places: Places

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        description="Ranked lists of images, best first, built by lpo_jax.",
        features=features.FeaturesDict(
          {
            "prompt": features.Text(),
            "image_uids": features.Sequence(features.Text()),
            "images": features.Sequence(np.object_),  # bytes as they came
            "models": features.Sequence(features.Text()),
            "ranks": features.Sequence(np.int32),
            "user_id": features.Text(),
            "weights": np.float32,
          }
        ),
        disable_shuffling=True,  # sorted by our key, as the columns beside are
      )

    def _split_generators(self, dl_manager, pipeline):
      return {"train": expand(pipeline, self.work, self.places)}

    def _generate_examples(self):
      raise NotImplementedError("the split is a collection of Beam already")

  return RankedListsBuilder


def prepare(
  work: Work, out: str | os.PathLike, beam_flags: Sequence[str] = ()
) -> tuple[str, ListReport]:
  """Builds the lists and writes them.

  Args:
    work: what to build.
    out: the folder, local or remote, below which the data set goes.
    beam_flags: options of Beam, e.g. "--runner=FlinkRunner".

  Returns:
    The data set's folder, for `data.path`, and the account.

  Raises:
    UserError: Beam is not installed, there is a data set already, the source cannot be
      read, or no list came out.
  """
  from etils import epath

  options = _beam_options(beam_flags)
  import tensorflow_datasets as tfds

  out = epath.Path(out)
  with tfds.core.registered.skip_registration():
    builder = _builder_class()(data_dir=os.fspath(out), file_format="array_record")
  folder = epath.Path(builder.data_dir)
  if folder.exists():
    raise UserError(
      f"there is a data set in {folder} already; lists of other data or other settings "
      "need another --out, or take this one away."
    )
  scratch = out / f"unfinished-{uuid.uuid4().hex}"
  pieces = scratch / "columns"
  scratch.mkdir(parents=True)
  builder.work = work
  builder.places = Places(os.fspath(out / REPORT), os.fspath(pieces))
  try:
    config = tfds.download.DownloadConfig(beam_options=options)
    # Nothing is downloaded; tensorflow_datasets makes the folder all the same.
    builder.download_and_prepare(
      download_dir=os.fspath(scratch / "downloads"), download_config=config
    )
    _join_columns(folder, pieces)
  except Exception as error:  # runners wrap what a worker raised, each in its own way
    raise _explained(error) from error
  finally:
    scratch.rmtree()
  return os.fspath(folder), _read_report(out / REPORT)


def _join_columns(folder: epath.Path, pieces: epath.Path) -> None:
  """Puts the columns of all records beside them, in the records' order."""
  import pyarrow as pa
  from pyarrow import parquet

  tables = []
  for path in sorted(pieces.iterdir()):
    with path.open("rb") as file:
      tables.append(parquet.read_table(file))
  table = pa.concat_tables(tables, promote_options="permissive").sort_by("key")
  opened = prepared.open_split(folder, "train")
  prepared.write_columns(opened, table.drop_columns(["key"]))


def _beam_options(flags: Sequence[str]) -> Any:
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(
      f"the builder needs Apache Beam, which is not here ({error}); "
      "pip install 'lpo_jax[beam]'."
    ) from error
  # Beam's own default, DirectRunner, fetches a program from the network if it can.
  return PipelineOptions([f"--runner={LOCAL_RUNNER}", *flags])


def _explained(error: Exception) -> Exception:
  """The reason of a failed pipeline, without the runner's wrapping."""
  text = str(error)
  if isinstance(error, UserError):
    text = f"UserError: {text}"
  refused = re.search(r"UserError: (.+)", text)
  if refused:
    return UserError(refused.group(1).partition(" [while running")[0])
  if "generated examples is 0" in text:
    return UserError(
      "no ranked list could be built. --job inspect on one of the files tells why; "
      "check the labels, or try another --strategy."
    )
  return error


def _write_report(report: ListReport, path: str, images: int) -> None:
  from etils import epath

  described = dataclasses.replace(report, images=images).as_dict()
  text = json.dumps(described, indent=1, ensure_ascii=False, sort_keys=True)
  epath.Path(path).write_text(text + "\n")


def _read_report(path: Any) -> ListReport:
  described = json.loads(path.read_text())
  described.pop("dropped")
  lengths = {int(k): v for k, v in described.pop("lengths").items()}
  return ListReport(**described, lengths=lengths)


def parser() -> argparse.ArgumentParser:
  """The command line; what is not on it goes to Beam."""
  made = argparse.ArgumentParser(
    prog="python -m lpo_jax.data.builder",
    description="Joins judgements into ranked lists with Apache Beam.",
    epilog="All other options go to Beam, e.g. --runner=DataflowRunner --project=P "
    "--region=R --temp_location=gs://BUCKET/tmp --setup_file=./setup.py, or "
    "--runner=FlinkRunner --flink_master=HOST:8081, or, on this machine, "
    "--direct_num_workers=8 --direct_running_mode=multi_processing. Exit codes: 0 done, "
    "2 bad usage or data.",
    allow_abbrev=False,
  )
  made.add_argument("--path", required=True, help="as data.path")
  made.add_argument("--out", required=True, help="folder for the data set")
  made.add_argument("--strategy", required=True, help=", ".join(lists.STRATEGIES))
  made.add_argument("--source", default="auto", help="as data.source")
  made.add_argument("--split", help="as data.split")
  made.add_argument("--max_list_size", type=int, default=8)
  made.add_argument("--group_by", default="prompt", help=", ".join(lists.GROUPS))
  made.add_argument("--ties", default="keep", help=", ".join(lists.TIES))
  made.add_argument("--weight", default="uniform", help=", ".join(lists.WEIGHTS))
  made.add_argument(
    "--parts",
    type=int,
    help="what the prompts are dealt into, each to fit in one worker's memory without "
    "images; default: as many as there are files",
  )
  return made


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the builder from a command line; returns the exit code."""
  # Beam and tensorflow_datasets remark on much that is none of the user's business.
  logging.basicConfig(level=logging.ERROR)
  logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # errors are raised too
  flags, beam_flags = parser().parse_known_args(argv)
  try:
    work = plan(
      flags.path,
      flags.source,
      split=flags.split,
      parts=flags.parts,
      strategy=flags.strategy,
      max_size=flags.max_list_size,
      group_by=flags.group_by,
      ties=flags.ties,
      weight=flags.weight,
    )
    folder, report = prepare(work, flags.out, beam_flags)
  except UserError as error:
    print(f"\nlpo_jax: {error}", file=sys.stderr)
    return 2
  unused = ", ".join(f"{count} {why}" for why, count in report.dropped.items())
  print(
    f"{report.lists:,} lists of {report.images:,} images; "
    f"{report.judgements_used:,} of {report.judgements_total:,} judgements used"
    + (f"; not used: {unused}" if unused else "")
    + f"\n--config.data.path={folder} --config.data.source=tfds"
  )
  return 0


if __name__ == "__main__":
  # Workers find what they run by module, and this one is only called __main__ here.
  from lpo_jax.data import builder

  sys.exit(builder.main())
