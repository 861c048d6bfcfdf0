"""What is said when a job on a training run is over: where everything is, what is next."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from lpo_jax import console, parallel
from lpo_jax.errors import StoppedEarly
from lpo_jax.jobs import run_identity, run_report
from lpo_jax.training.report import read_metrics

# Jobs that leave something in a run's workdir.
JOBS = ("train", "evaluate", "export")
# The last values that are worth a word, and what they are called.
LAST = {
  "loss": "loss",
  "implicit_acc": "implicit_acc",
  "drift": "drift",
  "images_per_second": "images/s",
}


@contextlib.contextmanager
def words(job: str, workdir: pathlib.Path) -> Iterator[None]:
  """Says the closing words when what is inside is done, or has stopped resumably.

  After `evaluate` and `export` the run's report is written again: it shows more now.
  """
  workdir = pathlib.Path(workdir)
  try:
    yield
  except StoppedEarly:
    if job == "train":
      _say(workdir)
    raise
  if job in JOBS:
    if job != "train":  # which writes its own
      run_report.refresh(workdir)
    _say(workdir)


def _say(workdir: pathlib.Path) -> None:
  if not parallel.is_main_process() or not (workdir / "metrics.jsonl").exists():
    return
  for line in summary(workdir):
    console.say(line)


def summary(workdir: pathlib.Path) -> list[str]:
  """Composes the closing words of the run in `workdir`, line by line."""
  config = run_identity.recorded(workdir)
  rows = read_metrics(workdir / "metrics.jsonl")
  steps = run_report.saved_steps(workdir)
  step = max([*steps, 0])
  state = f"step {step} of {config.train.total_steps}"
  parts = [f"{config.objective.name}: {state}", *last_values(rows[-1] if rows else {})]
  lines = ["", "  ·  ".join(parts)]
  lines += [f"  {name:<12}{place}" for name, place in places(workdir, steps).items()]
  for what, command in run_report.commands(config, workdir, step).items():
    lines += ["", f"{what}:", f"  {command}"]
  return lines


def last_values(row: Mapping[str, Any]) -> list[str]:
  """The last row's figures, in words.

  >>> last_values({"step": 3, "loss": 0.69314, "images_per_second": 12.345})
  ['loss 0.6931', 'images/s 12.35']
  """
  return [
    f"{word} {row[name]:.4g}"
    for name, word in LAST.items()
    if row.get(name) is not None
  ]


def places(workdir: pathlib.Path, steps: list[int]) -> dict[str, str]:
  """What is there -> where."""
  saved = f" (step {', '.join(map(str, steps))})" if steps else ""
  known = {
    "report": "report.html",
    "gallery": "evaluation/gallery.html",
    "checkpoints": "checkpoints",
    "metrics": "metrics.jsonl",
    "tensorboard": "tensorboard",
    "samples": "samples",
    "figures": "summary.json",
    "export": "export",
    "LoRA": "lora",
  }
  found = {
    name: str(workdir / path)
    for name, path in known.items()
    if (workdir / path).exists()
  }
  if "checkpoints" in found:
    found["checkpoints"] += saved
  return found
