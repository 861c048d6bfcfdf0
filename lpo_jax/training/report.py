"""What a run says while it trains: metrics.jsonl, TensorBoard, one live line.

Metrics of step k-1 are fetched after step k has been dispatched, so that reporting never
makes the device wait.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.errors import UserError
from lpo_jax.training import flops
from lpo_jax.training.wandb_run import WandbRun

# So many skipped updates in a row are no accident of a batch.
SKIPS_IN_A_ROW = 10


class NonFiniteLoss(UserError):
  """The loss or gradient became NaN or infinite."""


class Report:
  """Writes a run's metrics, one step late.

  Args:
    workdir: gets `metrics.jsonl` and `tensorboard/` (main process only).
    total_steps: of the run.
    images_per_update: to turn steps into images/s.
    start_step: completed updates before this session (resume).
    every: write every so many steps.
    label: what the live line calls the run.
    on_nonfinite: "stop" raises on a NaN, "skip" counts it, and raises when more than
      `SKIPS_IN_A_ROW` follow each other; "rollback" leaves it to `watch`.
    watch: gets every step's number and values, in order; may raise.
    wandb: gets the rows of metrics.jsonl as well.
    needed_flops: of an update that computes nothing twice, on all devices.
    peak: FLOP/s of all devices together; 0: unknown, and no `mfu` is written.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    total_steps: int,
    images_per_update: int,
    start_step: int = 0,
    every: int = 1,
    label: str = "training",
    on_nonfinite: str = "stop",
    watch: Callable[[int, dict[str, float]], None] | None = None,
    wandb: WandbRun | None = None,
    needed_flops: float = 0.0,
    peak: float = 0.0,
  ):
    self._wandb = wandb
    self._flops, self._peak = needed_flops, peak
    self._watch = watch
    self._images, self._every = images_per_update, every
    self._on_nonfinite = on_nonfinite
    self._total = total_steps
    self._progress = console.Progress(label, total_steps, "steps", start=start_step)
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._clock, self._clock_step = time.perf_counter(), start_step
    self._waited, self._written, self._added = 0.0, start_step, False
    self.skipped, self._in_a_row = 0, 0
    self.last: dict[str, float] = {}
    self._sums: dict[str, tuple[float, int]] = {}
    self._workdir = workdir
    self._jsonl = self._board = None
    self._open(start_step)

  def _open(self, step: int) -> None:
    """Opens the files, without what they say of later steps."""
    if not parallel.is_main_process():
      return
    from tensorboardX import SummaryWriter

    self._workdir.mkdir(parents=True, exist_ok=True)
    path = self._workdir / "metrics.jsonl"
    _forget_after(path, step)
    _forget_after(self._workdir / "alarms.jsonl", step)
    self._jsonl = path.open("a", encoding="utf-8")
    board = str(self._workdir / "tensorboard")
    self._board = SummaryWriter(board, purge_step=step + 1)

  def rewind(self, step: int) -> None:
    """Goes on after `step`: what was written or is pending of later ones is forgotten."""
    self._pending, self._sums, self._in_a_row = None, {}, 0
    self._close_files()
    self._open(step)
    if self._wandb is not None:
      self._wandb.rewind(step)
    self._written = self._clock_step = step
    self._progress.update(step)
    self.restart_clock()

  def take_means(self) -> dict[str, float]:
    """Returns the mean of every finite metric since this was last called."""
    means = {name: total / count for name, (total, count) in self._sums.items()}
    self._sums = {}
    return means

  def data_wait(self, seconds: float) -> None:
    """Adds time the step had to wait for its batch."""
    self._waited += seconds

  def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of `step` (completed updates) and writes those before it.

    Raises:
      NonFiniteLoss: the step before had a NaN and the policy is "stop", or too many had.
    """
    pending, self._pending = self._pending, (step, metrics)
    if pending is not None:
      self._write(*pending)

  def add(self, values: dict[str, float]) -> None:
    """Adds what else is known of the last step, such as scores of its samples."""
    step, metrics = self._pending
    self._pending = step, {**metrics, **values}
    self._added = True

  def alarm(self, row: dict[str, Any]) -> None:
    """Writes down an alarm; `row` has its step."""
    self._progress.interrupt()
    console.warn(row["words"])
    if parallel.is_main_process():
      with (self._workdir / "alarms.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "time": round(time.time(), 3)}) + "\n")

  def image(self, name: str, image: np.ndarray, step: int) -> None:
    """Shows an image [H, W, 3] uint8 in TensorBoard."""
    if self._board is not None:
      self._board.add_image(name, image, step, dataformats="HWC")

  def flush(self) -> None:
    """Writes what is still pending."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._write(*pending)

  def restart_clock(self) -> None:
    """Leaves out of images/s what just happened (a compilation, an evaluation)."""
    self._progress.skip_pause()
    self.flush()
    self._clock, self._waited = time.perf_counter(), 0.0
    self._clock_step = self._written

  def _write(self, step: int, metrics: dict[str, jax.Array]) -> None:
    values = {name: float(x) for name, x in parallel.fetch(metrics).items()}
    watched = ("loss", "grad_norm")
    bad = [n for n in watched if n in values and not math.isfinite(values[n])]
    self._written = step
    for name, value in values.items():
      if math.isfinite(value):
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, count + 1)
    self._in_a_row = self._in_a_row + 1 if bad else 0
    if bad and self._on_nonfinite == "skip":
      self.skipped += 1
      self._progress.interrupt()
      console.warn(f"step {step}: {bad[0]} is {values[bad[0]]}; the update is skipped")
    added, self._added = self._added, False
    if step % self._every == 0 or step == self._total or bad or added:
      now = time.perf_counter()
      elapsed, steps = now - self._clock, max(step - self._clock_step, 1)
      values["images_per_second"] = self._images * steps / max(elapsed, 1e-9)
      values["data_wait_share"] = min(self._waited / max(elapsed, 1e-9), 1.0)
      if self._peak:
        work = self._flops * steps
        values["mfu"] = flops.utilisation(work, max(elapsed, 1e-9), 1, self._peak)
      values |= device_memory()
      self._clock, self._clock_step, self._waited = now, step, 0.0
      self.last = values
      self._record(step, values)
    if bad and self._on_nonfinite == "stop":
      raise NonFiniteLoss(
        f"{bad[0]} became {values[bad[0]]} at step {step}. The last checkpoint is from "
        "before. Give the same command with train.on_nonfinite='rollback' to go back to "
        "it with a lower learning rate; or begin in a new --workdir with a lower "
        "train.learning_rate or objective.beta, or with train.on_nonfinite='skip' to "
        "drop such updates."
      )
    if self._in_a_row > SKIPS_IN_A_ROW:
      raise NonFiniteLoss(
        f"{bad[0]} was not finite for {self._in_a_row} steps in a row, up to step {step}; "
        "all were skipped. Lower train.learning_rate or objective.beta."
      )
    if self._watch is not None:
      self._watch(step, values)

  def _record(self, step: int, values: dict[str, Any]) -> None:
    if self._jsonl is not None:
      row = {"step": step, "time": round(time.time(), 3), **values}
      # JSON has no NaN; null is what a reader expects.
      row = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in row.items()
      }
      self._jsonl.write(json.dumps(row) + "\n")
      self._jsonl.flush()
      if self._wandb is not None:
        self._wandb.log(row)
      for name, value in values.items():
        # No list of some length in an update is nothing to be warned about.
        if math.isfinite(value) or "/" not in name:
          self._board.add_scalar(name, value, step)
    shown = ("loss", "implicit_acc", "images_per_second")
    short = {"images_per_second": "images/s"}
    self._progress.update(
      step, **{short.get(n, n): values[n] for n in shown if n in values}
    )

  def close(self) -> None:
    """Closes everything; what is pending must have been flushed."""
    self._close_files()
    if self._wandb is not None:
      self._wandb.close()

  def _close_files(self) -> None:
    if self._jsonl is not None:
      self._jsonl.close()
      self._board.close()


def device_memory() -> dict[str, float]:
  """GiB of the fullest of this process's devices, now and at most; CPUs say nothing."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
  return {
    name: max(s[key] for s in stats) / 2**30
    for name, key in names.items()
    if all(key in s for s in stats)
  }


def _forget_after(path: pathlib.Path, step: int) -> None:
  """Drops rows past `step`, and a last line cut short: a resumed run writes them again."""
  if not path.exists():
    return
  kept = [row for row in read_metrics(path) if row["step"] <= step]
  text = "".join(json.dumps(row) + "\n" for row in kept)
  if text != path.read_text("utf-8"):
    # Whole or not at all: a kill in between would lose what is kept.
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl; a last line cut short by a crash is left out."""
  rows = []
  for line in pathlib.Path(path).read_text("utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows
