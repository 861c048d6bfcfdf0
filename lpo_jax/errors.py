"""The two ways a run ends early on purpose, and the words of a good refusal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """Bad usage, config or data: what was expected, what came, what to change.

  The front door prints the message as one paragraph and exits with 2.
  """


class StoppedEarly(Exception):
  """The run stopped before its end but saved itself: exit 3, same command resumes."""


def nearest(name: str, known: Iterable[str]) -> str | None:
  """Returns the known name closest in spelling to `name`, or None if none is close."""
  matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
  return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
  """Builds the refusal of a name that is in no table.

  Args:
    kind: what the name names, e.g. "objective".
    name: what came.
    known: what would have been accepted.

  Returns:
    An error that lists the known names and says which one was probably meant.

  >>> print(unknown_name("objective", "lop", ["dpo", "lpo", "sft"]))
  unknown objective 'lop'; did you mean 'lpo'? Known: dpo, lpo, sft.
  """
  known = sorted(str(k) for k in known)
  match = nearest(name, known)
  hint = f"; did you mean {match!r}?" if match else "."
  return UserError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}.")
