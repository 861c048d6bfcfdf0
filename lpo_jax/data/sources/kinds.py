"""What a source is: its columns, its licence, its splits, and how it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.data.sources.pictures import Pictures
from lpo_jax.errors import UserError, nearest

OWN = "whatever its makers say"


@dataclasses.dataclass(frozen=True)
class Kind:
  """One layout of data sets.

  Attributes:
    about: what it is, for errors.
    required: columns without which there is nothing to learn.
    optional: columns that are used where they are there.
    images: columns that hold image bytes, read only when asked for.
    read: (files or the folder, the split, images by name or None) -> what is in them.
    licence: of the published data set.
    splits: what may be trained on, in words.
  """

  about: str
  required: tuple[str, ...]
  optional: tuple[str, ...]
  images: tuple[str, ...]
  read: Callable[[Any, str | None, Pictures | None], Judgements | RankedLists]
  licence: str = OWN
  splits: str = "as its makers say"

  def check(self, path: Any, present: Sequence[str]) -> list[str]:
    """Returns the columns to read, without images; refuses a file that lacks one.

    Raises:
      UserError: names the column that is missing, and the nearest one there is.
    """
    for name in self.required:
      if name not in present:
        near = nearest(name, present)
        raise UserError(
          f"{path} has no column {name!r}"
          f"{f'; the nearest one there is {near!r}' if near else ''}. This source "
          f"({self.about}) needs {', '.join(self.required)}; this file has "
          f"{', '.join(present) or 'no columns'}. Rename the column, or set data.source."
        )
    wanted = dict.fromkeys((*self.required, *self.optional))
    return [name for name in wanted if name in present and name not in self.images]
