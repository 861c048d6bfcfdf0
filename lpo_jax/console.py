"""One calm live line on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import logging
import re
import sys
import time
from typing import Any

LOG_EVERY_S = 10.0

log = logging.getLogger("lpo_jax")

# The live line that now stands on the terminal without an end, if there is one.
_standing: Progress | None = None

# Characters that have no place in text shown to a person: controls (but tab and line
# feed), bidirectional overrides that reorder what follows, lone surrogates.
_UNPRINTABLE = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"
)


def printable(text: str) -> str:
  """Returns `text` with each control character shown as U+FFFD.

  >>> printable("a\\x00b")
  'a\ufffdb'
  """
  return _UNPRINTABLE.sub("\ufffd", text)


def say(message: str) -> None:
  """Prints one line for the person who started the run (main process only).

  What strangers wrote (a prompt, a file's name) cannot steer the terminal: control
  characters are shown, not sent.
  """
  import jax

  if jax.process_index() == 0:
    if _standing is not None:
      _standing.clear()  # what is said stands above it; the next update draws it again
    print(printable(message), flush=True)


def warn(message: str) -> None:
  """Prints one line that should not be missed."""
  say(f"warning: {message}")


def clock(seconds: float) -> str:
  """Formats a duration: 75 -> '1:15', 3675 -> '1:01:15'.

  >>> clock(75), clock(3675)
  ('1:15', '1:01:15')
  """
  minutes, seconds = divmod(round(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
  """Counts work done towards a known total, and says when it will be over.

  Args:
    label: what is being done, e.g. "sampling".
    total: how much there is to do.
    unit: what is counted, e.g. "images".
    start: how much was done before (a resumed run); not counted in the speed.
  """

  def __init__(self, label: str, total: int, unit: str, *, start: int = 0):
    import jax

    self.label, self.total, self.unit = label, total, unit
    self._start, self._done = start, start
    self._began = self._printed = self._updated = time.monotonic()
    self._quiet = jax.process_index() != 0
    self._live = sys.stderr.isatty()
    self._width = 0

  def line(self, **values: Any) -> str:
    """Composes the line: label, count, remaining time, then the values."""
    elapsed = time.monotonic() - self._began
    fresh = self._done - self._start
    speed = fresh / elapsed if elapsed > 0 else 0.0
    parts = [f"{self.label}  {self._done}/{self.total} {self.unit}"]
    if speed > 0 and self._done < self.total:
      parts.append(f"ETA {clock((self.total - self._done) / speed)}")
    elif self._done >= self.total:
      parts.append(f"done in {clock(elapsed)}")
    for name, value in values.items():
      shown = f"{value:.4g}" if isinstance(value, float) else str(value)
      parts.append(f"{name} {shown}")
    return printable("  ·  ".join(parts))

  def update(self, done: int, **values: Any) -> None:
    """Says that `done` of the total are finished; prints when it is time to."""
    self._done = done
    now = self._updated = time.monotonic()
    interval = 0.2 if self._live else LOG_EVERY_S
    if self._quiet or (done < self.total and now - self._printed < interval):
      return
    self._printed = now
    line = self.line(**values)
    if self._live:
      sys.stderr.write("\r" + line.ljust(self._width))
      sys.stderr.write("\n" if done >= self.total else "")
      sys.stderr.flush()
      self._width = len(line)
      _set_standing(self if done < self.total else None)
    else:
      print(line, flush=True)

  def skip_pause(self) -> None:
    """Leaves out of speed and remaining time what happened since the last update."""
    now = time.monotonic()
    self._began += now - self._updated
    self._updated = now

  def interrupt(self) -> None:
    """Leaves the live line, so that what is printed next starts on its own."""
    if self._live and not self._quiet:
      sys.stderr.write("\n")
      _set_standing(None)

  def clear(self) -> None:
    """Takes the live line away until the next update."""
    sys.stderr.write("\r" + " " * self._width + "\r")
    sys.stderr.flush()
    _set_standing(None)


def _set_standing(progress: Progress | None) -> None:
  global _standing
  _standing = progress
