"""Requests to stop a job early, so that the same command can go on later."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np

from lpo_jax import parallel

# On several hosts all must stop at the same step; they ask each other this often.
AGREE_EVERY = 16


class StopRequests:
  """Notices SIGTERM, SIGINT, a STOP file in the workdir, and the end of the budget.

  Args:
    workdir: where the STOP file would be.
    max_minutes: the budget; 0 for none.
    began: when it began to run, on `time.monotonic`'s clock.
  """

  def __init__(self, workdir: pathlib.Path, *, max_minutes: float, began: float):
    self._file = workdir / "STOP"
    self._deadline = began + 60 * max_minutes if max_minutes else float("inf")
    self._signal: str | None = None
    self._old: dict[int, Any] = {}

  def __enter__(self) -> StopRequests:
    for number in (signal.SIGTERM, signal.SIGINT):
      with contextlib.suppress(ValueError):  # not the main thread: a notebook
        self._old[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: Any) -> None:
    del frame
    self._signal = signal.Signals(number).name

  def forget(self) -> None:
    """Removes the STOP file, so that the same command goes on."""
    parallel.barrier("stopped")
    if parallel.is_main_process():
      self._file.unlink(missing_ok=True)

  def reason_here(self) -> str | None:
    """Why this process should stop, whatever the others think; None to go on."""
    if self._signal:
      return f"received {self._signal}"
    if self._file.exists():
      return f"found {self._file}"
    if time.monotonic() > self._deadline:
      return "train.max_minutes is over"
    return None

  def reason(self, step: int) -> str | None:
    """Why to stop after `step`, the same on every process; None to go on."""
    reason = self.reason_here()
    if jax.process_count() == 1:
      return reason
    if step % AGREE_EVERY:
      return None
    from jax.experimental import multihost_utils

    any_host = multihost_utils.process_allgather(np.array(reason is not None)).any()
    return (reason or "another host asked to stop") if any_host else None
