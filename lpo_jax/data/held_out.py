"""Lists that are never trained on: by their prompt, whatever else is there.

Which prompts they are of follows from the prompt and the seed alone. All lists of a
prompt are on one side, whoever judged them; images that lists of several prompts share
are not looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lpo_jax.data.draws import Part
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError


def is_held_out(prompt: str, share: float, seed: int) -> bool:
  """Whether this share of all prompts has this one."""
  digest = hashlib.blake2b(f"{seed}/held_out/{prompt}".encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < share * 2**64


def split(lists: RankedLists, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the lists to train on, and of those held out, both ascending.

  Args:
    lists: of a cache.
    share: `data.held_out`, of the prompts.
    seed: of the run.

  Raises:
    UserError: the share is no share, or one of the two sides gets no list.
  """
  if not 0 <= share < 1:
    raise UserError(
      f"data.held_out={share}: expected a share of the prompts from 0 to below 1, such "
      "as 0.05."
    )
  used = np.unique(lists.prompt)
  chosen = {int(p) for p in used if is_held_out(lists.prompts[int(p)], share, seed)}
  held = np.isin(lists.prompt, sorted(chosen))
  if share and (held.all() or not held.any()):
    raise UserError(
      f"data.held_out={share} of {len(used)} prompts leaves "
      f"{'none to train on' if held.all() else 'none held out'}; expected a share that "
      "leaves some on both sides."
    )
  return np.flatnonzero(~held), np.flatnonzero(held)


def parts_of(parts: Sequence[Part], only: np.ndarray) -> tuple[Part, ...]:
  """The same sources with as many lists as they have of `only`.

  Raises:
    UserError: a source keeps none.
  """
  ends = np.cumsum([part.count for part in parts])
  counts = np.diff(np.searchsorted(only, ends), prepend=0)
  for part, count in zip(parts, counts, strict=True):
    if not count:
      raise UserError(
        f"data.held_out: no list of {part.name or 'the data'!r} is on one of its two "
        "sides; expected a share that leaves some on both, of every source."
      )
  return tuple(
    Part(part.name, int(count), part.share)
    for part, count in zip(parts, counts, strict=True)
  )
