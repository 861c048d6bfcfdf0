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
import functools
import json
import logging
import os
import re
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data import beam_steps, lists, prepared, sources
from lpo_jax.data.beam_steps import Places, Work
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import ListReport
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  import tensorflow_datasets as tfds
  from etils import epath

NAME, VERSION = "ranked_lists", "1.0.0"
REPORT = "list_report.json"
LOCAL_RUNNER = "FnApiRunner"  # in this process


def plan(
  path: str | os.PathLike,
  source: str = "auto",
  *,
  split: str | None = None,
  images: str | None = None,
  parts: int | None = None,
  **settings: Any,
) -> Work:
  """Finds the files, and checks what can be checked before any worker starts.

  Args:
    path: as in `sources.read`.
    source: as in `sources.read`; judgements, not lists.
    split: as in `sources.read`.
    images: refused, see below.
    parts: see `Work`; default one per file.
    **settings: of `lists.build`.

  Returns:
    The work.

  Raises:
    UserError: no such files, files that only measure, images that lie elsewhere, or
      settings that `lists.build` refuses.
  """
  if images:
    # Every worker would have to list them all, to find the few that its file names.
    raise UserError(
      f"--images={images}: the builder reads images from the files with the labels. "
      "Leave the builder out: --job cache takes data.images, and builds the same lists."
    )
  nothing = np.zeros(0, np.int32)
  lists.build(Judgements([], [], [], *[nothing] * 6), **settings)
  opened = sources.open(path, source, split=split)
  sources.refuse_training(opened)
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
            "scores": features.Sequence(np.float32),  # none: the strategy gives none
            "user_id": features.Text(),
            "weights": np.float32,
          }
        ),
        disable_shuffling=True,  # sorted by our key, as the columns beside are
      )

    def _split_generators(self, dl_manager, pipeline):
      return {"train": beam_steps.expand(pipeline, self.work, self.places)}

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
  made.add_argument("--images", help="refused: images are read beside the labels")
  made.add_argument("--max_list_size", type=int, default=8)
  made.add_argument("--group_by", default="prompt", help=", ".join(lists.GROUPS))
  made.add_argument("--ties", default="keep", help=", ".join(lists.TIES))
  made.add_argument("--weight", default="uniform", help=", ".join(lists.WEIGHTS))
  made.add_argument("--tie_tolerance", type=float, default=0.0)
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
      images=flags.images,
      parts=flags.parts,
      strategy=flags.strategy,
      max_size=flags.max_list_size,
      group_by=flags.group_by,
      ties=flags.ties,
      weight=flags.weight,
      tie_tolerance=flags.tie_tolerance,
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
