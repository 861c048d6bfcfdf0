"""Short hashes of files that a cache was made from."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from lpo_jax.data.ranked import RankedLists

_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_SAMPLED = 1 << 18  # bytes read at each end of a large source file


def of_contents(folder: str | os.PathLike) -> str:
  """Hashes names and contents of the files in one folder, e.g. of a tokenizer."""
  digest = hashlib.sha256()
  for path in sorted(p for p in Path(folder).glob("[!.]*") if p.is_file()):
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    digest.update(f"{path.name}\0{content}\n".encode())
  return digest.hexdigest()[:16]


def of_source(path: str | os.PathLike) -> str | None:
  """Hashes names and sizes of a source's files, and the ends of their contents.

  Pictures count by name and size only: there may be a million of them.

  Args:
    path: a file, a folder with all it holds, or a pattern with ``*``.

  Returns:
    16 hex digits; None if nothing of that name is on this machine (or it is remote).
  """
  exact = [Path(path)] if Path(path).exists() else []
  found = exact or sorted(Path(match) for match in glob.glob(os.fspath(path)))
  digest = hashlib.sha256()
  for place in found:
    root = place if place.is_dir() else place.parent
    inside = sorted(p for p in place.rglob("*") if p.is_file())
    for file in inside if place.is_dir() else [place]:
      digest.update(_named_content(file, os.path.relpath(file, root)))
  return digest.hexdigest()[:16] if found else None


def of_lists(lists: RankedLists) -> dict[str, str]:
  """Hashes what a run learns from, part by part, so that a difference has a name.

  Args:
    lists: of an opened cache or mixture.

  Returns:
    "lists" (their order, ranks, scores and weights), "images" and "prompts" (their
    names, in record order) -> 16 hex digits.
  """
  columns = (
    lists.list_id,
    lists.offsets,
    lists.rank,
    lists.score,
    lists.weight,
    lists.image,
    lists.prompt,
    *([] if lists.source_image is None else [lists.source_image]),
  )
  digest = hashlib.sha256()
  for column in columns:
    digest.update(np.ascontiguousarray(column).tobytes())
  return {
    "lists": digest.hexdigest()[:16],
    "images": _of_names(lists.image_uids),
    "prompts": _of_names(lists.prompts),
  }


def of_users(lists: RankedLists) -> str:
  """Hashes whose the lists are: 16 hex digits."""
  user = np.full(len(lists), -1) if lists.user is None else lists.user
  return _of_names(lists.users[i] if i >= 0 else "" for i in user)


def _of_names(names: Iterable[str]) -> str:
  digest = hashlib.sha256()
  for name in names:
    digest.update(f"{name}\0".encode("utf-8", "surrogatepass"))
  return digest.hexdigest()[:16]


def _named_content(file: Path, name: str) -> bytes:
  size = file.stat().st_size
  digest = hashlib.sha256(f"{name}\0{size}\n".encode())
  if file.suffix.lower() not in _PICTURES:
    with open(file, "rb") as content:
      digest.update(content.read(_SAMPLED))
      if size > _SAMPLED:
        content.seek(max(size - _SAMPLED, _SAMPLED))
        digest.update(content.read())
  return digest.digest()
