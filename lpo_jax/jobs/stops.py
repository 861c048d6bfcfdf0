"""Requests to stop a job early, so that the same command can go on later."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lpo_jax import parallel

# On several hosts all must stop at the same step; they ask each other this often. What
# cannot wait, a preemption, jax's own service makes known at the next step.
AGREE_EVERY = 16


class StopRequests:
  """Notices SIGTERM, SIGINT, a STOP file in the workdir, and the end of the budget.

  Args:
    workdir: where the STOP file would be.
    max_minutes: the budget; 0 for none.
    began: when it began to run, on `time.monotonic`'s clock.
    in_step: whether `reason` is asked after every step by all processes. Of several, jax
      then listens to SIGTERM, which is how clusters announce a preemption, and tells all.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    max_minutes: float,
    began: float,
    in_step: bool = False,
  ):
    self._jax_listens = in_step and jax.process_count() > 1
    self._agreed: str | None = None
    self._file = workdir / "STOP"
    self._deadline = began + 60 * max_minutes if max_minutes else float("inf")
    self._signal: str | None = None
    self._old: dict[int, Any] = {}

  def __enter__(self) -> StopRequests:
    ours = (signal.SIGINT,) if self._jax_listens else (signal.SIGTERM, signal.SIGINT)
    for number in ours:
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
    """Why to stop after `step`, the same on every process; None to go on.

    Of several processes each must ask after every step. Once there is a reason it stays.
    """
    if jax.process_count() == 1:
      return self.reason_here()
    from jax.experimental import multihost_utils

    if self._agreed is None and _preempted(step):
      self._agreed = "one of the hosts received SIGTERM or is to be preempted"
    if self._agreed is None and step % AGREE_EVERY == 0:
      here = self.reason_here()
      if multihost_utils.process_allgather(np.array(here is not None)).any():
        self._agreed = here or "another host asked to stop"
    return self._agreed


def _preempted(step: int) -> bool:
  """Whether all processes are to save at this step, since one of them must end."""
  from jax.experimental import multihost_utils

  try:
    return multihost_utils.reached_preemption_sync_point(step)
  except RuntimeError:  # jax_enable_preemption_service is off
    return False


class Interrupted(KeyboardInterrupt):
  """A signal outside of what saves itself on one; the front door exits with 3."""


@contextlib.contextmanager
def sigterm_interrupts(job: str) -> Iterator[None]:
  """Makes SIGTERM end a job as Ctrl-C does: by an exception in the main thread.

  Files are whole or not there, so that the same command can go on. Jobs that have
  something to save first take the signal themselves, through `StopRequests`.

  Args:
    job: where several processes train together jax has the signal, see there, and keeps
      it until their first step is over.
  """

  def interrupt(number: int, frame: Any) -> None:
    del frame
    raise Interrupted(signal.Signals(number).name)

  main_thread = threading.current_thread() is threading.main_thread()
  jax_listens = job == "train" and jax.process_count() > 1
  if jax_listens or not main_thread:  # a notebook's jobs may be in another thread
    yield
    return
  old = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)
