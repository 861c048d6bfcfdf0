"""The reference's errors, computed once and stored: one number per item and draw.

All that is random about an item hangs on its list and epoch, so that `ref_err` is a
function of the two. Training that reads it needs neither the reference's weights nor its
forward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lpo_jax.data import records
from lpo_jax.errors import UserError

ERRORS, ABOUT = "ref_err.npy", "reference.json"


@dataclasses.dataclass
class References:
  """What is known of the reference's errors.

  Attributes:
    errors: [epochs, items] fp32, the items of all lists in their order; NaN where not
      computed yet.
    lists: of the cache.
    updates: how many updates' slots were computed.
    position: of the iterator of batches, for the update after them.
    order: what decides which lists an update holds, besides the lists.
  """

  errors: np.ndarray
  lists: Any
  updates: int = 0
  position: dict[str, Any] | None = None
  order: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def empty(cls, lists: Any) -> References:
    """Nothing computed yet."""
    return cls(np.empty((0, int(lists.offsets[-1])), np.float32), lists)

  @functools.cached_property
  def _index_of(self) -> dict[int, int]:
    return {int(list_id): i for i, list_id in enumerate(self.lists.list_id)}

  def covers(self, updates: int, draws: int) -> bool:
    """Whether training for so many updates finds all it asks for.

    Args:
      updates: of the run.
      draws: epochs after which a list repeats itself; 0: it never does.
    """
    whole = draws == len(self.errors) > 0 and not np.isnan(self.errors).any()
    return whole or self.updates >= updates

  def in_order(self, order: Mapping[str, Any]) -> References:
    """The same errors for updates of this order: of another one, none is counted yet."""
    if dict(self.order) == dict(order):
      return self
    return References(self.errors, self.lists, order=order)

  def of(self, epoch: int, items: slice) -> np.ndarray:
    """Returns the errors of some items [n], fp32.

    Raises:
      UserError: they were never computed.
    """
    found = (
      self.errors[epoch, items] if epoch < len(self.errors) else np.array([np.nan])
    )
    if np.isnan(found).any():
      raise UserError(
        f"data.reference lacks errors of epoch {epoch} (it was made by {self.updates} "
        "updates): run --job reference with the train.total_steps of this run."
      )
    return found

  def add(
    self,
    identity: np.ndarray,
    slot: np.ndarray,
    valid: np.ndarray,
    ref_err: np.ndarray,
  ) -> None:
    """Files the errors of an update.

    Args:
      identity: [S, 2], of a whole `Batch`, as are
      slot: [B, N] and
      valid: [B, N].
      ref_err: [S].
    """
    for slots in (row[held] for row, held in zip(slot, valid, strict=True)):
      if not len(slots):
        continue
      list_id, epoch = (int(x) for x in identity[slots[0]])
      while epoch >= len(self.errors):
        fresh = np.full((1, self.errors.shape[1]), np.nan, np.float32)
        self.errors = np.concatenate([self.errors, fresh])
      start = int(self.lists.offsets[self._index_of[list_id]])
      self.errors[epoch, start : start + len(slots)] = ref_err[slots]
    self.updates += 1


def save(
  folder: str | os.PathLike, references: References, about: Mapping[str, Any]
) -> None:
  """Writes what is known so far; a kill leaves the old files or the new ones.

  Raises:
    UserError: the disk is full, or the folder cannot be written to.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  stream = io.BytesIO()
  np.save(stream, references.errors)
  records.write_atomically(folder / ERRORS, stream.getvalue())
  records.write_json(
    folder / ABOUT,
    {
      "about": about,
      "order": references.order,
      "updates": references.updates,
      "position": references.position,
    },
  )


def read(
  folder: str | os.PathLike, lists: Any, about: Mapping[str, Any]
) -> References | None:
  """Opens what was stored for these lists and this reference; None if nothing was.

  Args:
    folder: where `save` wrote.
    lists: of the cache.
    about: what the errors depend on.

  Raises:
    UserError: it was stored for something else.
  """
  folder = Path(folder)
  found = records.read_json(folder / ABOUT)
  if found is None:
    return None
  plain = json.loads(json.dumps(about))
  differing = sorted(k for k in plain if found["about"].get(k) != plain[k])
  if differing:
    key = differing[0]
    raise UserError(
      f"{folder} holds errors of another reference: {', '.join(differing)} differ "
      f"(first: {key} was {found['about'].get(key)!r}, is {plain[key]!r}). Set "
      "data.reference to another folder and run --job reference."
    )
  errors = np.load(folder / ERRORS)
  return References(
    errors, lists, found["updates"], found["position"], found.get("order", {})
  )
