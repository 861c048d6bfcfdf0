"""Edits: a source image, an instruction, and what came of it.

A list's prompt is the instruction and `RankedLists.source_image` is the image to edit.
A row with one result is a list of one (data.strategy="winners", for `sft`): that the
result beats the image it started from is nothing that anyone said.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lpo_jax.data.ranked import RankedLists
from lpo_jax.data.sources import embedded, ranking, rows
from lpo_jax.data.sources.kinds import Kind
from lpo_jax.data.sources.pictures import Pictures, inside
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  from etils import epath

_VOTES = {
  "leftvote": [0, 1],
  "rightvote": [1, 0],
  "tievote": [0, 0],
  "bothbad_vote": [0, 0],
}


@dataclasses.dataclass(frozen=True)
class Step:
  """One edit that a row holds.

  Attributes:
    source: column of the image to edit.
    instruction: column of the text.
    results: columns of the edited images.
    vote: column that says which of two results is better, "" if there is one.
  """

  source: str
  instruction: str
  results: tuple[str, ...]
  vote: str = ""


def _read(
  files: Sequence[epath.Path],
  split: str | None,
  pictures: Pictures | None,
  name: str,
) -> RankedLists:
  kind, steps = KINDS[name], STEPS[name]
  texts = [
    column for step in steps for column in (step.instruction, step.vote) if column
  ]
  table, own = embedded.read(files, kind, dict.fromkeys(texts, "large_string"))
  names = dict(zip(kind.images, embedded.names(files, kind.images, own), strict=True))
  places = {c: embedded.places(table, i) for i, c in enumerate(kind.images)}

  def found() -> Iterator[ranking.Row]:
    for at, values in enumerate(table.columns.to_pylist()):
      for step in steps:
        yield ranking.Row(
          values[step.instruction],
          [names[column][at] for column in step.results],
          ranks=_VOTES.get(values[step.vote]) if step.vote else [0],
          places=[places[column][at] for column in step.results],
          source=names[step.source][at],
          source_place=places[step.source][at],
        )

  return ranking.rank(found(), pictures, table.loader(kind.images))


def read_seed(
  files: Sequence[epath.Path], split: str | None, pictures: Pictures | None
) -> RankedLists:
  """Reads JSON lines of several turns; each starts from the result of the one before."""

  def found() -> Iterator[ranking.Row]:
    for place, values in rows.read_json(files, KINDS["seed_edit"]):
      source = _file(place, values, "source_image")
      turns = sorted(
        int(match.group(1))
        for match in map(re.compile(r"edit_image_(\d+)$").match, values)
        if match
      )
      for turn in turns:
        result = _file(place, values, f"edit_image_{turn}")
        text = values.get(f"instruction_{turn}")
        yield ranking.Row(text, [result], ranks=[0], source=source)
        source = result

  return ranking.rank(found(), pictures)


def _file(place: str, values: dict[str, Any], column: str) -> str:
  if not isinstance(values[column], str):
    raise UserError(
      f"{place}: {column} is {values[column]!r:.80}, expected a file name."
    )
  return inside(values[column], place)


STEPS = {
  "instructpix2pix": [Step("original_image", "edit_prompt", ("edited_image",))],
  "instructpix2pix_samples": [Step("input_image", "edit_prompt", ("edited_image",))],
  "magicbrush": [Step("source_img", "instruction", ("target_img",))],
  "hq_edit": [
    Step("input_image", "edit", ("output_image",)),
    Step("output_image", "inverse_edit", ("input_image",)),
  ],
  "genai_edit": [
    Step(
      "source_image",
      "instruct_prompt",
      ("left_output_image", "right_output_image"),
      "vote_type",
    )
  ],
}
_FACTS = {  # what it is, its licence, its splits
  "instructpix2pix": ("InstructPix2Pix", "MIT for the code; see the card", "one split"),
  "instructpix2pix_samples": ("InstructPix2Pix's samples", "see the card", "one split"),
  "magicbrush": ("MagicBrush", "CC-BY-4.0", "train on train; dev is for evaluation"),
  "hq_edit": ("HQ-Edit, both ways", "CC-BY-NC-4.0: no commercial use", "one split"),
  "genai_edit": ("GenAI-Bench's edits", "see the card", "a benchmark: evaluate on it"),
}


def _kind(name: str) -> Kind:
  steps = STEPS[name]
  images = [c for step in steps for c in (step.source, *step.results)]
  texts = [c for step in steps for c in (step.instruction, step.vote) if c]
  what, licence, splits = _FACTS[name]
  return Kind(
    about=f"edits, as {what}",
    required=tuple(dict.fromkeys([*images, *texts])),
    optional=(),
    images=tuple(dict.fromkeys(images)),
    read=functools.partial(_read, name=name),
    licence=licence,
    splits=splits,
  )


KINDS = {
  **{name: _kind(name) for name in STEPS},
  "seed_edit": Kind(
    about="edits in several turns, as SEED-Data-Edit's JSON lines",
    required=("source_image", "instruction_1", "edit_image_1"),
    optional=(),
    images=(),
    read=read_seed,
    licence="see the card; some images are known to be damaged",
    splits="one split",
  ),
}
