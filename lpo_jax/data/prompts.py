"""Prompt sets from the files they come in, and when two prompts are the same."""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lpo_jax.data.sources.pictures import inside
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Prompt

COLUMNS = ("Prompt", "prompt", "Prompts", "prompts", "caption", "text")
# The first that is there; what is of an edit counts only beside an image to edit.
CATEGORY_COLUMNS = ("Category", "category", "style")
USER_COLUMNS = ("user",)  # whom it is drawn for
SOURCE_COLUMNS = (
  *("cond_image", "source_image", "source_img", "input_image", "original_image"),
)
EDIT_COLUMNS: dict[str, tuple[str, ...]] = {
  "text": ("instruction", "edit_prompt", "instruct_prompt", "edit", *COLUMNS),
  "target": ("target_image", "target_img", "edited_image", "output_image"),
  "source_caption": ("source_caption", "original_prompt", "input_caption", "input"),
  "target_caption": ("target_caption", "edited_prompt", "output_caption", "output"),
}
PICTURES = ("source", "target")
_NOT_WORDS = re.compile(r"[\W_]+")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Prompts, and what is to be known of where they come from.

  Attributes:
    rows: in the order of the source, repetitions included.
    source: the file or name they were asked for by.
    sha256: of the file's bytes; of texts that came as such, of these, joined by NUL; of
      a set of several files, or of a file that names images, of the hashes, one a line.
    pinned: whether these bytes are the ones that a hash or commit was written down for.
    blank: rows without a prompt, left out.
    repeated: texts that came before.
    controls: texts with control characters or bidirectional overrides. They reach the
      text encoder as they are, and no page or terminal.
    surrogates: texts with half a character, replaced by U+FFFD.
  """

  rows: tuple[Prompt, ...]
  source: str = ""
  sha256: str = ""
  pinned: bool = False
  blank: int = 0
  repeated: int = 0
  controls: int = 0
  surrogates: int = 0

  @property
  def texts(self) -> tuple[str, ...]:
    """The prompts; of edits, the instructions."""
    return tuple(row.text for row in self.rows)

  @property
  def categories(self) -> tuple[str, ...]:
    """One for each prompt; empty if the source has none."""
    found = tuple(row.category for row in self.rows)
    return found if any(found) else ()

  def facts(self) -> dict[str, Any]:
    """All but the prompts themselves, as JSON."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    del fields["rows"]
    counted = dict(collections.Counter(self.categories))
    fields |= {"prompts": len(self.rows), "categories": counted}
    edits = sum(bool(row.source) for row in self.rows)
    return fields | ({"edits": edits} if edits else {})


def normalise(prompt: str) -> str:
  """Returns what two prompts share if a reader would call them the same.

  Case, width, punctuation and spacing do not count; accents do.

  >>> normalise("  A cat,  sitting -- on a MAT! ")
  'a cat sitting on a mat'
  """
  folded = unicodedata.normalize("NFKC", prompt).casefold()
  return _NOT_WORDS.sub(" ", folded).strip()


def overlap(prompts: Iterable[str], others: Iterable[str]) -> list[str]:
  """Returns the `prompts` that `others` has too, up to `normalise`; no blank ones."""
  known = {normalise(other) for other in others} - {""}
  return [prompt for prompt in prompts if normalise(prompt) in known]


def read(source: str | os.PathLike | Sequence[str]) -> list[str]:
  """Reads the prompts of a set; see `load`."""
  return list(load(source).texts)


def load(source: str | os.PathLike | Sequence[str], *, sha256: str = "") -> PromptSet:
  """Reads a prompt set.

  Formats by file name: .txt (one per line), .tsv and .csv (with a header), .json (a
  list of texts or objects), .jsonl, .parquet. Tables and objects are asked for one of
  `COLUMNS`, the first one there, for one of `CATEGORY_COLUMNS` and for `USER_COLUMNS`;
  those of edits for one of `SOURCE_COLUMNS` and for what `EDIT_COLUMNS` lists. A picture is its bytes, or
  the name of a file beside this one. Blank prompts are left out and counted; order and
  repetitions stay.

  Args:
    source: a file, the name of a published set (`published_prompts.SETS`), or the
      prompts themselves.
    sha256: what the set's hash must be; "" to take what comes.

  Raises:
    UserError: no such file, a format or column that is not known, no prompt in it, a
      set that cannot be fetched, or another hash.
  """
  from etils import epath

  from lpo_jax.data import published_prompts

  if not isinstance(source, str | os.PathLike):
    texts = [str(prompt) for prompt in source]
    rows, name, pinned = [Prompt(text) for text in texts], "given", False
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(joined).hexdigest()
  else:
    path, name = epath.Path(source), os.fspath(source)
    if not path.is_file() and name in published_prompts.SETS:
      rows, digest, pinned = _read_published(name)
    else:
      rows, digest, pinned = *_read_file(path), False
  if sha256 and digest != sha256:
    raise UserError(
      f"prompt set {name!r} has the hash {digest}, and eval.prompts_sha256 asks for "
      f"{sha256}: it is not the set that was meant. Get that one, or empty the key."
    )
  found = _clean(rows, name, digest, pinned or bool(sha256))
  if not found.texts:
    raise UserError(f"{name} holds no prompt.")
  return found


def _clean(rows: Sequence[Prompt], name: str, digest: str, pinned: bool) -> PromptSet:
  """Leaves out blank rows, mends half characters, counts what is odd."""
  kept = [row for row in rows if row.text.strip()]
  broken = sum(bool(_SURROGATES.search(row.text)) for row in kept)
  kept = [_mended(row) for row in kept]
  return PromptSet(
    tuple(kept),
    source=name,
    sha256=digest,
    pinned=pinned,
    blank=len(rows) - len(kept),
    repeated=len(kept) - len({row.key for row in kept}),
    controls=sum(bool(_CONTROLS.search(row.text)) for row in kept),
    surrogates=broken,
  )


def _mended(row: Prompt) -> Prompt:
  """Replaces half characters in whatever of it is text."""
  fields = ((f.name, getattr(row, f.name)) for f in dataclasses.fields(row))
  texts = {name: value for name, value in fields if isinstance(value, str)}
  whole = {name: _SURROGATES.sub("\ufffd", text) for name, text in texts.items()}
  return dataclasses.replace(row, **whole)


def _read_published(name: str) -> tuple[list[Prompt], str, bool]:
  from lpo_jax.data import published_prompts

  rows, hashes, pinned = [], [], True
  for file in published_prompts.fetch(name):
    own, digest = _read_file(file.path)
    rows += [
      dataclasses.replace(row, category=file.category or row.category) for row in own
    ]
    hashes.append(digest)
    pinned = pinned and file.pinned
  digest = hashes[0]
  if len(hashes) > 1:
    digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
  return rows, digest, pinned


def _read_file(path: Any) -> tuple[list[Prompt], str]:
  from lpo_jax.data import published_prompts

  if not path.is_file():
    raise UserError(
      f"{str(path)!r} is no file with prompts; expected one of "
      f"{', '.join(_READERS)}, a list of prompts, or a published set: "
      f"{', '.join(published_prompts.SETS)}."
    )
  suffix = path.suffix.lower()
  if suffix not in _READERS:
    raise unknown_name("prompt file type", suffix or path.name, _READERS)
  data = path.read_bytes()
  try:
    rows = _READERS[suffix](path, data)
  except (ValueError, OSError, csv.Error) as error:
    raise UserError(f"{path} cannot be read as {suffix}: {error}") from error
  digest = hashlib.sha256(data).hexdigest()
  named = {name: path.parent / name for row in rows for name in _files(row)}
  if not named:
    return rows, digest
  found = {name: _picture(path, file) for name, file in named.items()}
  hashes = [digest, *(hashlib.sha256(found[n]).hexdigest() for n in sorted(found))]
  rows = [
    dataclasses.replace(row, **{f: found.get(getattr(row, f), b"") for f in PICTURES})
    for row in rows
  ]
  return rows, hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _files(row: Prompt) -> list[str]:
  """The files that a row as it was read names in place of pictures."""
  cells = [getattr(row, field) for field in PICTURES]
  return [cell for cell in cells if isinstance(cell, str) and cell]


def _picture(path: Any, file: Any) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise UserError(
      f"{path} names the picture {file}, which cannot be read ({error}); expected a file "
      "beside it."
    ) from None


def _columns(path: Any, names: Iterable[str]) -> dict[str, str]:
  """Field of `Prompt` -> its column, of those that are there."""
  names = list(names)
  wanted = {"text": COLUMNS, "category": CATEGORY_COLUMNS, "source": SOURCE_COLUMNS}
  wanted |= {"user": USER_COLUMNS}
  if any(name in names for name in SOURCE_COLUMNS):
    wanted |= EDIT_COLUMNS
  found = {
    field: next((name for name in columns if name in names), None)
    for field, columns in wanted.items()
  }
  if found["text"] is None:
    raise UserError(
      f"{path} has the columns {names}, none of them one of {', '.join(wanted['text'])}. "
      "Rename the one that holds the prompts."
    )
  return {field: column for field, column in found.items() if column is not None}


def _row(path: Any, value: Mapping[str, Any], columns: Mapping[str, str]) -> Prompt:
  """One row of a table; what is missing is blank. Pictures may still be names of files."""
  cells: dict[str, Any] = {}
  for field, column in columns.items():
    cell = value.get(column)
    if field not in PICTURES:
      cells[field] = "" if cell is None else str(cell)
      continue
    if isinstance(cell, Mapping):  # a Hugging Face image
      cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
      cell = inside(cell, f"{path}, column {column}")
    cells[field] = cell or b""
  return Prompt(**cells)


def _objects(path: Any, values: Any) -> list[Prompt]:
  """Takes the prompts out of parsed JSON."""
  if isinstance(values, dict):
    values = list(values.values())
  if not isinstance(values, list):
    raise UserError(f"{path} holds {type(values).__name__}, not a list of prompts.")
  rows: list[Prompt] = []
  for number, value in enumerate(values):
    if isinstance(value, dict):
      rows.append(_row(path, value, _columns(path, value)))
    elif isinstance(value, str):
      rows.append(Prompt(value))
    else:
      raise UserError(
        f"{path}: entry {number} is {type(value).__name__}; expected a text, or an "
        f"object with one of {', '.join(COLUMNS)}."
      )
  return rows


def _lines(data: bytes) -> list[str]:
  # Not splitlines: a prompt may hold a form feed or U+2028.
  return data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")


def _separated(path: Any, data: bytes, delimiter: str) -> list[Prompt]:
  # A quote within a tab separated prompt is just a quote.
  quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
  file = io.StringIO(data.decode("utf-8-sig"), newline="")
  rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
  columns = _columns(path, rows.fieldnames or [])
  return [_row(path, row, columns) for row in rows]


def _parquet(path: Any, data: bytes) -> list[Prompt]:
  import pyarrow as pa
  from pyarrow import parquet

  table = parquet.ParquetFile(pa.BufferReader(data))
  columns = _columns(path, table.schema_arrow.names)
  wanted = list(columns.values())
  return [_row(path, row, columns) for row in table.read(columns=wanted).to_pylist()]


_READERS: dict[str, Callable[[Any, bytes], list[Prompt]]] = {
  ".txt": lambda path, data: [Prompt(line) for line in _lines(data)[: _end(data)]],
  ".tsv": lambda path, data: _separated(path, data, "\t"),
  ".csv": lambda path, data: _separated(path, data, ","),
  ".json": lambda path, data: _objects(path, json.loads(data.decode("utf-8-sig"))),
  ".jsonl": lambda path, data: _objects(
    path, [json.loads(line) for line in _lines(data) if line.strip()]
  ),
  ".parquet": _parquet,
}


def _end(data: bytes) -> int | None:
  """A final line feed ends a line; it does not begin another."""
  return -1 if data.endswith(b"\n") else None
