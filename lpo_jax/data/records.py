"""A long sequence of small records in shard files, written so that a kill is harmless.

A shard is finished when its description `<name>-00012.json` is there: the records are
written to `*.partial`, renamed, and described last. A restart skips finished shards and
redoes the one that was open. Several processes may write one folder, each its share of
the shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpo_jax.errors import UserError

# One record per group, since reads are random; no compression, since noise has none.
_WRITE_OPTIONS = "group_size:1,uncompressed"
_READ_OPTIONS = "readahead_buffer_size:0"  # or every read fetches its neighbours too


@dataclasses.dataclass(frozen=True)
class Record:
  """What became of one key.

  Attributes:
    key: what the record is about; unique in the sequence.
    data: the bytes, or None if there will be no record for this key.
    about: small JSON-able facts kept beside the record; the reason if `data` is None.
  """

  key: str
  data: bytes | None
  about: Any = None


@dataclasses.dataclass(frozen=True)
class Shard:
  """The description of one finished shard file.

  Attributes:
    file: its name in the folder.
    size: its size in bytes.
    keys: the keys of its records, in order.
    about: for each record, the facts given by its writer.
    refused: for each key without record, (key, reason).
  """

  file: str
  size: int
  keys: list[str]
  about: list[Any]
  refused: list[tuple[str, str]]


def shard_count(total: int, shard_size: int) -> int:
  """Number of shards of a sequence: every shard but the last has `shard_size` keys."""
  return -(-total // shard_size)


@dataclasses.dataclass(frozen=True)
class Share:
  """Which of the shards this process writes, and whom it tells.

  Attributes:
    shard_size: keys per shard: what a restart may have to redo.
    process_index: this process writes shards process_index, + process_count, ...
    process_count: number of processes that write the folder.
    progress: called with a number of keys, and whether they were just done (True) or
      found done.
  """

  shard_size: int = 2048
  process_index: int = 0
  process_count: int = 1
  progress: Callable[[int, bool], None] = lambda count, fresh: None

  def ranges(self, total: int) -> dict[int, range]:
    """Returns shard -> positions of its keys, for the shards of this process."""
    size = self.shard_size
    mine = range(self.process_index, shard_count(total, size), self.process_count)
    return {i: range(i * size, min((i + 1) * size, total)) for i in mine}


@contextlib.contextmanager
def _saying_why(path: str | os.PathLike) -> Iterator[None]:
  """Turns what a full disk or a forbidden folder raises into a refusal.

  What the failed write left behind is removed: on a full disk it is in the way.
  """
  try:
    yield
  except (OSError, RuntimeError) as error:  # RuntimeError is array_record's
    with contextlib.suppress(OSError):
      Path(f"{path}.partial").unlink(missing_ok=True)
    raise UserError(
      f"cannot write {path}: {error}. Expected a folder that can be written to, with "
      "room left. Nothing that was finished before is lost: make room, or point "
      "data.cache (or --workdir) elsewhere, and give the same command again."
    ) from error


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """Writes `data` so that a reader finds all of it under `path`, or nothing new.

  Raises:
    UserError: the disk is full, or the folder cannot be written to.
  """
  partial = Path(f"{path}.partial")
  with _saying_why(path):
    with open(partial, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON atomically, one readable file."""
  text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
  write_atomically(path, (text + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
  """Reads a JSON file; None if there is none."""
  try:
    return json.loads(Path(path).read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, process_index: int = 0) -> Iterator[None]:
  """Holds the folder's lock, which ends with this process however it ends.

  Raises:
    UserError: another live process is writing the folder.
  """
  import fcntl

  path = Path(folder) / f".lock-{process_index}"
  with _saying_why(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f"another process is writing {folder}; wait for it to end, or set data.cache "
        "to a folder of its own."
      ) from error
    except OSError:
      pass  # some network file systems have no locks; then nobody is kept out
    yield


def write_shards(
  folder: str | os.PathLike,
  name: str,
  keys: Sequence[str],
  produce: Callable[[Sequence[int]], Iterable[Record]],
  share: Share,
) -> Iterator[Shard]:
  """Writes the shards that are still missing, and yields every shard in order.

  Args:
    folder: where the files go.
    name: what the file names begin with.
    keys: all keys, the same list in every run and process.
    produce: gives the records of positions in `keys`, one per key, in order. Asked once
      for all that is missing, so that it may work ahead over the end of a shard.
    share: what this process does of it.

  Yields:
    The shards of this process, finished ones without work.

  Raises:
    UserError: the disk is full, or the folder cannot be written to.
  """
  folder = Path(folder)
  with _saying_why(folder / name):
    folder.mkdir(parents=True, exist_ok=True)
  ranges = share.ranges(len(keys))
  found = {}
  for index, positions in ranges.items():
    done = read_shard(folder, name, index)
    if done and _holds(done, [keys[p] for p in positions]):
      found[index] = done
  missing = [p for i, positions in ranges.items() if i not in found for p in positions]

  def records() -> Iterator[Record]:
    yield from produce(missing) if missing else ()

  with contextlib.closing(records()) as stream:
    for index, positions in ranges.items():
      if index in found:
        share.progress(len(positions), False)
        yield found[index]
        continue
      _description(folder, name, index).unlink(missing_ok=True)
      batch = itertools.islice(stream, len(positions))
      shard = _write_shard(folder / f"{_stem(name, index)}.array_record", batch, share)
      described = json.dumps(dataclasses.asdict(shard), ensure_ascii=False)
      write_atomically(_description(folder, name, index), described.encode())
      yield shard


def _write_shard(path: Path, batch: Iterable[Record], share: Share) -> Shard:
  """Writes one shard's records; it is not finished before it is described."""
  from array_record.python import array_record_module

  partial = f"{path}.partial"
  kept, refused = [], []
  with _saying_why(path):
    writer = array_record_module.ArrayRecordWriter(partial, _WRITE_OPTIONS)
  try:
    for record in batch:
      if record.data is None:
        refused.append((record.key, str(record.about)))
      else:
        with _saying_why(path):
          writer.write(record.data)
        kept.append(record)
      share.progress(1, True)
  finally:
    with _saying_why(path):  # the writer keeps what went wrong to itself until now
      writer.close()
  with _saying_why(path):
    with open(partial, "rb") as file:
      os.fsync(file.fileno())
    os.replace(partial, path)
  return Shard(
    file=path.name,
    size=path.stat().st_size,
    keys=[r.key for r in kept],
    about=[r.about for r in kept],
    refused=refused,
  )


def read_shard(folder: str | os.PathLike, name: str, index: int) -> Shard | None:
  """Returns a finished shard's description, None if it is unfinished or was cut."""
  described = read_json(_description(folder, name, index))
  if described is None:
    return None
  shard = Shard(**described)
  path = Path(folder) / shard.file
  return shard if path.exists() and path.stat().st_size == shard.size else None


class Records:
  """Random access to the records of finished shards, by position in the sequence."""

  def __init__(self, folder: str | os.PathLike, name: str, count: int):
    """Opens `count` shards.

    Raises:
      UserError: a shard is missing or has not the size it was finished with.
    """
    self._folder = Path(folder)
    self.shards = [read_shard(folder, name, i) for i in range(count)]
    missing = [i for i, shard in enumerate(self.shards) if shard is None]
    if missing:
      raise UserError(
        f"{folder} lacks {len(missing)} of {count} {name} shards or they were cut short "
        f"(first: {_stem(name, missing[0])}); run --job cache again, with the same "
        "folder visible to every process."
      )
    counts = [len(shard.keys) for shard in self.shards]
    self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    self._readers: dict[int, Any] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return int(self._starts[-1])

  @property
  def keys(self) -> list[str]:
    """The keys of all records, in order."""
    return [key for shard in self.shards for key in shard.keys]

  @property
  def about(self) -> list[Any]:
    """What was written beside each record, in order."""
    return [fact for shard in self.shards for fact in shard.about]

  @property
  def refused(self) -> list[tuple[str, str]]:
    """(key, reason) of every key without record."""
    return [tuple(pair) for shard in self.shards for pair in shard.refused]

  def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
    """Returns the records at `indices`, in that order."""
    indices = np.asarray(indices, np.int64)
    if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
      raise IndexError(f"record index outside 0..{len(self) - 1}")
    shard_of = np.searchsorted(self._starts, indices, side="right") - 1
    records: list[bytes] = [b""] * len(indices)
    for shard in np.unique(shard_of):
      places = np.nonzero(shard_of == shard)[0]
      local = (indices[places] - self._starts[shard]).tolist()
      for place, data in zip(places, self._reader(int(shard)).read(local)):
        records[place] = data
    return records

  def close(self) -> None:
    """Closes the shard files; reading again reopens them."""
    with self._lock:
      for reader in self._readers.values():
        reader.close()
      self._readers.clear()

  def _reader(self, shard: int):
    from array_record.python import array_record_module

    with self._lock:
      if shard not in self._readers:
        path = str(self._folder / self.shards[shard].file)
        reader = array_record_module.ArrayRecordReader(path, _READ_OPTIONS)
        self._readers[shard] = reader
      return self._readers[shard]


def _stem(name: str, index: int) -> str:
  return f"{name}-{index:05d}"


def _description(folder: str | os.PathLike, name: str, index: int) -> Path:
  return Path(folder) / f"{_stem(name, index)}.json"


def _holds(shard: Shard, keys: list[str]) -> bool:
  """Whether the shard was written from exactly these keys."""
  return sorted(shard.keys + [key for key, _ in shard.refused]) == sorted(keys)
