"""Saying where a run hangs, while it hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from lpo_jax.errors import UserError, unknown_name

# What is done about a hang once it is written down. A process that exits takes the whole
# run with it: who started it can start it again.
ON_HANG = ("report", "exit")
EXIT_RESUMABLE = 3


def check_policy(minutes: float, on_hang: str) -> None:
  """Refuses settings that cannot be meant.

  Raises:
    UserError: a negative time, or an unknown policy.
  """
  if minutes < 0:
    raise UserError(
      f"train.hang_minutes={minutes}: expected minutes, 0 for no watchdog."
    )
  if on_hang not in ON_HANG:
    raise unknown_name("train.on_hang", on_hang, ON_HANG)


class Watchdog:
  """A thread that writes down all stacks when no step completes for too long.

  It runs while the main thread waits inside XLA or a file system, and is silent while
  steps complete.

  Args:
    workdir: gets `hang-<process>.txt`.
    minutes: without a step before it speaks; 0 for no watchdog.
    on_hang: "report", or "exit" to end the process afterwards, resumably.
  """

  def __init__(self, workdir: pathlib.Path, *, minutes: float, on_hang: str = "report"):
    check_policy(minutes, on_hang)
    self._seconds, self._on_hang = 60 * minutes, on_hang
    # Asked now: a thread that asks jax while jax hangs would hang too.
    self._process, self._count = jax.process_index(), jax.process_count()
    self._file = workdir / f"hang-{self._process}.txt"
    self._ended = threading.Event()
    self._lock = threading.Lock()
    self._paused = 0
    self._thread: threading.Thread | None = None
    self.beat("the first step")

  def beat(self, doing: str) -> None:
    """Says that something was completed, and what is done next."""
    with self._lock:
      self._doing, self._since, self._said = doing, time.monotonic(), False

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Does not watch what may take any time, such as an evaluation."""
    self._paused += 1
    try:
      yield
    finally:
      self._paused -= 1
      self.beat(self._doing)

  def __enter__(self) -> Watchdog:
    if self._seconds:
      self.beat(self._doing)
      self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
      self._thread.start()
    return self

  def __exit__(self, *unused: Any) -> None:
    self._ended.set()
    if self._thread is not None:
      self._thread.join()

  def _watch(self) -> None:
    while not self._ended.wait(min(max(self._seconds / 10, 0.05), 10.0)):
      with self._lock:
        waited = time.monotonic() - self._since
        hangs = waited > self._seconds and not self._said and not self._paused
        self._said = self._said or hangs
      if hangs:
        self._report(waited)
        if self._on_hang == "exit":
          os._exit(EXIT_RESUMABLE)

  def _report(self, waited: float) -> None:
    """Writes to stderr, and to the workdir if that can still be written to."""
    head = (
      f"lpo_jax: nothing was completed for {waited / 60:.1f} minutes "
      f"(train.hang_minutes) on host {socket.gethostname()}, process {self._process} of "
      f"{self._count}, during {self._doing}, at {time.strftime('%Y-%m-%d %H:%M:%S')}. "
      "Where several processes say so, look for the one that says something else, or "
      "nothing: the others wait for it.\n"
    )
    sys.stderr.write("\n" + head)
    with contextlib.suppress(OSError):
      with self._file.open("a", encoding="utf-8") as file:
        file.write(head)
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.write("\n")
      sys.stderr.write(f"lpo_jax: where each thread stands is in {self._file}\n")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no real stderr
      faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
