"""Who people are, as arrays: read from a file, joined to lists by the person's name.

  .npz       an array [K, D] or [D] under each person's name; or `users` [U] with
             `user_embeds` [U, K, D] or [U, D]
  .parquet   columns `user` and `user_embeds`: a list of numbers, or of such lists

K embeddings of width D, the same for all: a person is a set of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError, unknown_name

# What a list is trained with whose person has no embedding, or is not known.
MISSING = ("refuse", "nobody")
COLUMNS = ("users", "user_embeds")


@dataclasses.dataclass(frozen=True)
class UserEmbeds:
  """Embeddings by person.

  Attributes:
    users: names.
    values: [U, K, D] fp32.
    source: where they are from, for messages.
  """

  users: tuple[str, ...]
  values: np.ndarray
  source: str = ""

  @property
  def table(self) -> np.ndarray:
    """[1 + U, K, D]: nobody, all zeros, and then everybody."""
    return np.concatenate([np.zeros_like(self.values[:1]), self.values])

  def rows(self, users: Sequence[str]) -> np.ndarray:
    """[n] rows of the table; 0, nobody, for who is not there."""
    place = {user: row + 1 for row, user in enumerate(self.users)}
    return np.array([place.get(user, 0) for user in users], np.int32)

  def of(self, users: Sequence[str]) -> np.ndarray:
    """[n, K, D] embeddings; "" is nobody.

    Raises:
      UserError: somebody who is not there.
    """
    rows = self.rows(users)
    absent = sorted({u for u, row in zip(users, rows, strict=True) if u and not row})
    if absent:
      raise UserError(
        f"{self.source} has no embedding of {len(absent)} people (first {absent[0]!r}); "
        f"it has {len(self.users)}, such as {self.users[0]!r}."
      )
    return self.table[rows]

  def fingerprint(self) -> str:
    """16 hex digits of names and numbers."""
    digest = hashlib.sha256("\0".join(self.users).encode("utf-8", "surrogatepass"))
    digest.update(repr(self.values.shape).encode())
    digest.update(np.ascontiguousarray(self.values).tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ListUsers:
  """Whose the lists are.

  Attributes:
    table: [1 + U, K, D] fp32, nobody first.
    row: [B] int32 of the table, one for each list.
  """

  table: np.ndarray
  row: np.ndarray


def read(path: str | os.PathLike) -> UserEmbeds:
  """Reads a file of embeddings.

  Raises:
    UserError: no such file, another format, embeddings of different shapes, or numbers
      that are not finite.
  """
  path = Path(path)
  if path.suffix not in _READERS:
    raise UserError(
      f"data.user_embeds={str(path)!r}: expected a file of {' or '.join(_READERS)}."
    )
  if not path.is_file():
    raise UserError(
      f"data.user_embeds={str(path)!r}: there is no such file. --job users makes one of "
      "people's own judgements; or give one that was made elsewhere (docs/personal.md)."
    )
  try:
    found = _READERS[path.suffix](path)
  except (ValueError, OSError, KeyError) as error:
    raise UserError(
      f"{path} cannot be read as embeddings of people: {error}"
    ) from error
  arrays = {}
  for user, value in found.items():
    array = np.asarray(value, np.float32)
    arrays[str(user)] = array[None] if array.ndim == 1 else array
  shapes = {array.shape for array in arrays.values()}
  if len(shapes) != 1 or len(next(iter(shapes))) != 2:
    raise UserError(
      f"{path}: expected an array [K, D] or [D] of one shape for everybody; found "
      f"{sorted(shapes)[:4] or 'nobody'}."
    )
  values = np.stack(list(arrays.values()))
  if not np.isfinite(values).all():
    raise UserError(f"{path} holds numbers that are not finite.")
  return UserEmbeds(tuple(arrays), values, str(path))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    if {*file.files} == {*COLUMNS}:
      names, values = (file[name] for name in COLUMNS)
      return dict(zip(names.tolist(), values, strict=True))
    return {name: file[name] for name in file.files}


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
  from pyarrow import parquet

  table = parquet.read_table(path, columns=["user", "user_embeds"])
  users, values = (table[name].to_pylist() for name in table.column_names)
  return dict(zip(map(str, users), values, strict=True))


_READERS = {".npz": _read_npz, ".parquet": _read_parquet}


def write(path: str | os.PathLike, embeds: UserEmbeds) -> None:
  """Writes an .npz that `read` reads, atomically."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  with partial.open("wb") as file:
    np.savez(file, users=np.array(embeds.users, str), user_embeds=embeds.values)
  os.replace(partial, path)


def join(
  embeds: UserEmbeds, lists: RankedLists, missing: str
) -> tuple[ListUsers, dict[str, int]]:
  """Finds the person of every list.

  Args:
    embeds: of people.
    lists: of an opened cache.
    missing: a name of `MISSING`.

  Returns:
    Rows of the embeddings' table, and counts: "lists" without an embedding, the "people"
    that these are of, and the lists whose person is "unknown".

  Raises:
    UserError: lists that know nobody, an unknown policy, or somebody missing where that
      is refused.
  """
  if missing not in MISSING:
    raise unknown_name("data.user_missing", missing, MISSING)
  user = np.full(len(lists), -1) if lists.user is None else lists.user
  if not (user >= 0).any():
    raise UserError(
      "data.user_embeds is set, but no list says whose it is. Expected judgements with a "
      "person's name (user_id), and data.group_by='prompt_user' for --job cache."
    )
  of_user = np.append(embeds.rows(lists.users), 0)  # the last is for -1
  row = of_user[user].astype(np.int32)
  lost = row == 0
  counts = {
    "lists": int(lost.sum()),
    "people": len(np.unique(user[lost & (user >= 0)])),
    "unknown": int((user < 0).sum()),
  }
  if missing == "refuse" and lost.any():
    first = next((lists.users[u] for u in user[lost] if u >= 0), "")
    raise UserError(
      f"{embeds.source} has no embedding of {counts['people']} people "
      f"(first {first!r}) with {counts['lists']} of {len(lists)} lists, "
      f"{counts['unknown']} of them of nobody known. Add them, or set data.user_missing="
      "'nobody' to train these lists as a user left out (zeros)."
    )
  return ListUsers(embeds.table, row), counts
