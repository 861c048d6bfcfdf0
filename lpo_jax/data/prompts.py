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

from lpo_jax.errors import UserError, unknown_name

COLUMNS = ("Prompt", "prompt", "Prompts", "prompts", "caption", "text")
CATEGORY_COLUMNS = ("Category", "category", "style")
_NOT_WORDS = re.compile(r"[\W_]+")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile("[\ud800-\udfff]")

Row = tuple[str, str]  # a prompt and its category, "" where there is none


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Prompts, and what is to be known of where they come from.

  Attributes:
    texts: in the order of the source, repetitions included.
    categories: one for each text; empty if the source has none.
    source: the file or name they were asked for by.
    sha256: of the file's bytes; of texts that came as such, of these, joined by NUL; of
      a set of several files, of their hashes, one a line.
    pinned: whether these bytes are the ones that a hash or commit was written down for.
    blank: rows without a prompt, left out.
    repeated: texts that came before.
    controls: texts with control characters or bidirectional overrides. They reach the
      text encoder as they are, and no page or terminal.
    surrogates: texts with half a character, replaced by U+FFFD.
  """

  texts: tuple[str, ...]
  categories: tuple[str, ...] = ()
  source: str = ""
  sha256: str = ""
  pinned: bool = False
  blank: int = 0
  repeated: int = 0
  controls: int = 0
  surrogates: int = 0

  def facts(self) -> dict[str, Any]:
    """All but the prompts themselves, as JSON."""
    fields = dataclasses.asdict(self)
    del fields["texts"], fields["categories"]
    counted = dict(collections.Counter(self.categories))
    return fields | {"prompts": len(self.texts), "categories": counted}


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
  `COLUMNS`, the first one there, and for one of `CATEGORY_COLUMNS`. Blank prompts are
  left out and counted; order and repetitions stay.

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
    rows, name, pinned = [(text, "") for text in texts], "given", False
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


def _clean(rows: Sequence[Row], name: str, digest: str, pinned: bool) -> PromptSet:
  """Leaves out blank rows, mends half characters, counts what is odd."""
  kept = [(text, category) for text, category in rows if text.strip()]
  broken = sum(bool(_SURROGATES.search(text)) for text, _ in kept)
  kept = [tuple(_SURROGATES.sub("\ufffd", part) for part in row) for row in kept]
  texts = tuple(text for text, _ in kept)
  categories = tuple(category for _, category in kept)
  return PromptSet(
    texts,
    categories if any(categories) else (),
    source=name,
    sha256=digest,
    pinned=pinned,
    blank=len(rows) - len(kept),
    repeated=len(texts) - len(set(texts)),
    controls=sum(bool(_CONTROLS.search(text)) for text in texts),
    surrogates=broken,
  )


def _read_published(name: str) -> tuple[list[Row], str, bool]:
  from lpo_jax.data import published_prompts

  rows, hashes, pinned = [], [], True
  for file in published_prompts.fetch(name):
    own, digest = _read_file(file.path)
    rows += [(text, file.category or category) for text, category in own]
    hashes.append(digest)
    pinned = pinned and file.pinned
  digest = hashes[0]
  if len(hashes) > 1:
    digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
  return rows, digest, pinned


def _read_file(path: Any) -> tuple[list[Row], str]:
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
  return rows, hashlib.sha256(data).hexdigest()


def _columns(path: Any, names: Iterable[str]) -> tuple[str, str | None]:
  """The columns of the prompt and of its category."""
  names = list(names)
  found = next((name for name in COLUMNS if name in names), None)
  if found is None:
    raise UserError(
      f"{path} has the columns {names}, none of them one of {', '.join(COLUMNS)}. "
      "Rename the one that holds the prompts."
    )
  return found, next((name for name in CATEGORY_COLUMNS if name in names), None)


def _row(value: Mapping[str, Any], prompt: str, category: str | None) -> Row:
  """One row of a table; what is missing is blank."""
  cells = [value.get(prompt), value.get(category) if category else None]
  return tuple("" if cell is None else str(cell) for cell in cells)


def _objects(path: Any, values: Any) -> list[Row]:
  """Takes the prompts out of parsed JSON."""
  if isinstance(values, dict):
    values = list(values.values())
  if not isinstance(values, list):
    raise UserError(f"{path} holds {type(values).__name__}, not a list of prompts.")
  rows = []
  for number, value in enumerate(values):
    if isinstance(value, dict):
      rows.append(_row(value, *_columns(path, value)))
    elif isinstance(value, str):
      rows.append((value, ""))
    else:
      raise UserError(
        f"{path}: entry {number} is {type(value).__name__}; expected a text, or an "
        f"object with one of {', '.join(COLUMNS)}."
      )
  return rows


def _lines(data: bytes) -> list[str]:
  # Not splitlines: a prompt may hold a form feed or U+2028.
  return data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")


def _separated(path: Any, data: bytes, delimiter: str) -> list[Row]:
  # A quote within a tab separated prompt is just a quote.
  quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
  file = io.StringIO(data.decode("utf-8-sig"), newline="")
  rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
  columns = _columns(path, rows.fieldnames or [])
  return [_row(row, *columns) for row in rows]


def _parquet(path: Any, data: bytes) -> list[Row]:
  import pyarrow as pa
  from pyarrow import parquet

  table = parquet.ParquetFile(pa.BufferReader(data))
  columns = _columns(path, table.schema_arrow.names)
  wanted = [column for column in columns if column]
  return [_row(row, *columns) for row in table.read(columns=wanted).to_pylist()]


_READERS: dict[str, Callable[[Any, bytes], list[Row]]] = {
  ".txt": lambda path, data: [(line, "") for line in _lines(data)[: _end(data)]],
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
