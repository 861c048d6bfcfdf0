"""Images that lie apart from the labels, found again by the names the labels use."""

from __future__ import annotations

import dataclasses
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data.sources import places as places_lib
from lpo_jax.data.stores import Block, ImageStore
from lpo_jax.errors import UserError

if TYPE_CHECKING:
  from etils import epath

IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
# (column of names, column of bytes); a file has those of the first row that fits.
PARQUET_LAYOUTS = (
  (("image_0_uid", "jpg_0"), ("image_1_uid", "jpg_1")),
  (("image_uids", "images"),),
  *(
    ((name, data),)
    for name in ("image_uid", "uid", "image_id", "id")
    for data in ("jpg", "image", "bytes")
  ),
)


def inside(name: str, where: Any) -> str:
  """Returns a file name that stays within the data, with forward slashes.

  Args:
    name: as the data give it.
    where: the file that names it, for the refusal.

  Raises:
    UserError: it is absolute, goes up by ``..``, or is no name.
  """
  parts = name.replace("\\", "/").split("/")
  absolute = parts[0] == "" or parts[0].endswith(":")
  if absolute or ".." in parts or "\0" in name:
    raise UserError(
      f"{where} names the file {name!r}, which is outside the data's own folder. Names "
      "are relative to it and never go up; correct the name, or do not use these data."
    )
  return "/".join(part for part in parts if part != ".")


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Encoded images by name.

  Attributes:
    path: where they are.
    names: the different names.
    name: [S] which name is seen.
    block: [S] in which block of `load`.
    column: [S] in which column of it.
    row: [S] in which row.
    item: [S] at which place of the row.
    load: as `ImageStore` takes it.
  """

  path: Any
  names: Sequence[str]
  name: np.ndarray
  block: np.ndarray
  column: np.ndarray
  row: np.ndarray
  item: np.ndarray
  load: Callable[[int, int], Block]

  def store(self, uids: Sequence[str]) -> ImageStore:
    """Returns the images called so; those that are not here count as absent."""
    number = {uid: index for index, uid in enumerate(uids)}
    wanted = np.asarray([number.get(name, -1) for name in self.names] or [], np.int64)
    image = wanted[self.name] if len(wanted) else np.zeros(0, np.int64)
    here = image >= 0
    return ImageStore(
      self.load,
      image=image[here],
      block=self.block[here],
      column=self.column[here],
      row=self.row[here],
      item=self.item[here],
      count=len(uids),
    )


def open_pictures(path: str | os.PathLike | epath.Path) -> Pictures:
  """Lists the images of a folder, an archive, or parquet files, without reading any.

  A file is called by its path within the folder or archive, with or without the suffix;
  an image of a parquet file by the column beside it (see `PARQUET_LAYOUTS`). Where a
  name is seen in several places the first one in order of file, row group, column and
  row counts.

  Args:
    path: a folder with parquet files, archives or pictures, or one such file, or a
      pattern with ``*``.

  Raises:
    UserError: nothing there, or an archive with a name that leaves it.
  """
  root = places_lib.resolve(path)
  found = [root] if root.is_file() else []
  if "*" in root.name:
    found = sorted(root.parent.glob(root.name))
  elif root.is_dir():
    found = sorted(f for pattern in ("*", "*/*") for f in root.glob(pattern))
  for suffixes, read in _READERS.items():
    chosen = [file for file in found if file.suffix.lower() in suffixes]
    if chosen:
      return read(root, chosen)
  if root.is_dir():
    return _folder(root)
  near = files_lib.near_name(root)
  raise UserError(
    f"data.images={str(path)!r}: there are no images there"
    f"{f'; did you mean {near!r}?' if near else '.'} Expected parquet files, .tar or "
    ".zip archives, or a folder of pictures."
  )


def _collect(
  root: Any,
  seen: Iterator[tuple[str, int, int]],
  load: Callable[[int, int], Block],
) -> Pictures:
  """Makes the table of names out of (file name, block, row)."""
  numbers: dict[str, int] = {}
  places = []
  for name, block, row in seen:
    for called in dict.fromkeys((name, IMAGE_FILE.sub("", name))):
      places.append((numbers.setdefault(called, len(numbers)), block, row))
  name, block, row = np.asarray(places, np.int64).reshape(-1, 3).T
  zero = np.zeros(len(places), np.int64)
  return Pictures(root, list(numbers), name, block, zero, row, zero, load)


def beside(folder: epath.Path) -> Pictures | None:
  """Lists the pictures, else the archives, of a folder with labels; None without any."""
  if any(IMAGE_FILE.search(name) for *_, names in _walk(folder) for name in names):
    return _folder(folder)
  files = sorted(folder.iterdir())
  for suffix in (".tar", ".zip"):
    chosen = [file for file in files if file.suffix == suffix]
    if chosen:
      return _READERS[suffix,](folder, chosen)
  return None


def _folder(root: epath.Path) -> Pictures:
  files: list[str] = []
  for folder, folders, names in _walk(root):
    folders.sort()
    files += [
      os.path.join(folder, name) for name in sorted(names) if IMAGE_FILE.search(name)
    ]
  if not files:
    raise UserError(
      f"data.images={str(root)!r}: no pictures, parquet files or archives in it."
    )
  files = [name.replace(os.sep, "/") for name in files]

  def load(block: int, column: int) -> Block:
    return lambda row, item: (root / files[block]).read_bytes()

  return _collect(root, ((name, i, 0) for i, name in enumerate(files)), load)


def _walk(root: epath.Path) -> Iterator[tuple[str, list[str], list[str]]]:
  """As os.walk, with folders relative to `root`; remote ones level by level."""
  if "://" not in str(root):
    for folder, folders, names in os.walk(os.fspath(root)):
      relative = os.path.relpath(folder, os.fspath(root))
      yield "" if relative == "." else relative, folders, names
    return
  waiting = [""]
  for folder in waiting:  # grows while it is read
    children = list((root / folder if folder else root).iterdir())
    folders = sorted(c.name for c in children if c.is_dir())
    names = [c.name for c in children if c.name not in folders]
    yield folder, folders, names
    waiting += [f"{folder}/{name}" if folder else name for name in folders]


def tar_members(path: epath.Path) -> Iterator[tuple[str, int, int]]:
  """Yields (name, offset, size) of the regular files in a tar archive.

  Raises:
    UserError: a name that leaves the archive, or no tar archive.
  """
  try:
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
      for member in archive:
        name = inside(member.name, path)
        if member.isfile():
          yield name, member.offset_data, member.size
  except tarfile.TarError as error:
    raise UserError(
      f"{path} cannot be read as a tar archive ({error}). It may be cut short, or "
      "compressed: images are read out of order, so unpack .tar.gz first."
    ) from error


def read_at(path: epath.Path, offset: int, size: int) -> bytes:
  """Returns some bytes of a file."""
  with path.open("rb") as file:
    file.seek(offset)
    return file.read(size)


def _tars(root: Any, files: Sequence[epath.Path]) -> Pictures:
  spans: list[tuple[int, int]] = []

  def seen() -> Iterator[tuple[str, int, int]]:
    for block, path in enumerate(files):
      for name, offset, size in tar_members(path):
        if IMAGE_FILE.search(name):
          spans.append((offset, size))
          yield name, block, len(spans) - 1

  def load(block: int, column: int) -> Block:
    return lambda row, item: read_at(files[block], *spans[row])

  return _collect(root, seen(), load)


def _zips(root: Any, files: Sequence[epath.Path]) -> Pictures:
  members: list[str] = []

  def seen() -> Iterator[tuple[str, int, int]]:
    for block, path in enumerate(files):
      try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
          names = [name for name in archive.namelist() if not name.endswith("/")]
      except zipfile.BadZipFile as error:
        raise files_lib.refuse_file(path, error) from error
      for name in names:
        if IMAGE_FILE.search(inside(name, path)):
          members.append(name)
          yield inside(name, path), block, len(members) - 1

  def load(block: int, column: int) -> Block:
    def cell(row: int, item: int) -> bytes:
      with files[block].open("rb") as file, zipfile.ZipFile(file) as archive:
        return archive.read(members[row])

    return cell

  return _collect(root, seen(), load)


def _parquet(root: Any, files: Sequence[epath.Path]) -> Pictures:
  import pyarrow as pa

  present = files_lib.open_parquet(files[0]).schema_arrow.names
  layout = next(
    (
      pairs for pairs in PARQUET_LAYOUTS if all({*pair} <= {*present} for pair in pairs)
    ),
    None,
  )
  if layout is None:
    raise UserError(
      f"data.images: {files[0]} has the columns {', '.join(present)}. Expected names and "
      f"bytes of images, in one of: {'; '.join(map(str, PARQUET_LAYOUTS))}. Rename them."
    )
  named = [name for name, _ in layout]
  kind = "list large_string" if layout[0][0] == "image_uids" else "large_string"
  table = files_lib.read_table(files, dict.fromkeys(named, kind), lambda *_: named)
  columns, places = [], []
  for number, name in enumerate(named):
    column = table.columns[name]
    rows = np.arange(len(column))
    item = np.zeros(len(column), np.int64)
    if kind != "large_string":
      flat = column.combine_chunks()
      sizes = np.asarray(flat.value_lengths().fill_null(0))
      rows = np.repeat(rows, sizes)
      item = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
      column = pa.chunked_array([flat.flatten()])
    columns.append(column)
    places.append(
      (table.block[rows], np.full(len(rows), number), table.row[rows], item)
    )
  names, indices = files_lib.vocabulary(*columns)
  name = np.concatenate(indices)
  block, column, row, item = (np.concatenate(part) for part in zip(*places))
  here = name >= 0
  load = table.loader([data for _, data in layout])
  return Pictures(
    root, names, name[here], block[here], column[here], row[here], item[here], load
  )


_READERS: dict[tuple[str, ...], Callable[[Any, Sequence[Any]], Pictures]] = {
  (".parquet",): _parquet,
  (".tar",): _tars,
  (".zip",): _zips,
}
