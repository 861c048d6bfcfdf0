"""Lists that are never trained on: by their prompt or their person.

Which prompts and people they are of follows from their names and the seed alone. All
lists of a prompt are on one side, whoever judged them, and all lists of a person,
whatever they judged; images that lists of several prompts share are not looked at.
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


def is_held_out_person(user: str, share: float, seed: int) -> bool:
  """Whether this share of all people has this one."""
  return is_held_out(f"\0{user}", share, seed)


def split(
  lists: RankedLists, share: float, seed: int, people: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the lists to train on, and of those held out, both ascending.

  Args:
    lists: of a cache.
    share: `data.held_out`, of the prompts.
    seed: of the run.
    people: `data.held_out_users`, of the people; lists of nobody known are trained on.

  Raises:
    UserError: a share is no share, or one of the two sides gets no list.
  """
  for key, value in {"held_out": share, "held_out_users": people}.items():
    if not 0 <= value < 1:
      raise UserError(
        f"data.{key}={value}: expected a share of the "
        f"{'prompts' if key == 'held_out' else 'people'} from 0 to below 1, such as 0.05."
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
  if people:
    held |= _of_held_people(lists, people, seed)
    if held.all():
      raise UserError(
        f"data.held_out_users={people} leaves no list to train on; expected a smaller "
        "share."
      )
  return np.flatnonzero(~held), np.flatnonzero(held)


def _of_held_people(lists: RankedLists, share: float, seed: int) -> np.ndarray:
  """[B] bool, the lists of people who are held out."""
  if lists.user is None:
    raise UserError(
      f"data.held_out_users={share}, but no list says whose it is: expected 0, or "
      "judgements with people's names and data.group_by='prompt_user'."
    )
  chosen = [is_held_out_person(user, share, seed) for user in lists.users]
  held = np.append(np.array(chosen, bool), False)[lists.user]  # the last is for -1
  if not held.any():
    raise UserError(
      f"data.held_out_users={share} of {len(lists.users)} people holds no list out; "
      "expected a larger share."
    )
  return held


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
