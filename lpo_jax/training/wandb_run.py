"""The rows of metrics.jsonl in Weights & Biases, for those who ask for it.

`wandb` is imported when a project is named, and never otherwise.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError


class WandbRun:
  """One run of Weights & Biases that stays the same over the sessions of a workdir.

  `wandb.json` in the workdir has its id. Rows that were there before (of a session without
  it) are sent first; rows that a resumed session computes again are not sent twice. After
  a rollback the new rows are sent beside the old ones: what is sent cannot be taken back.

  Args:
    project: its name there.
    workdir: the run's.
    config: the resolved config, as plain values.
    rows: those of metrics.jsonl, before a resumed session leaves out any.

  Raises:
    UserError: wandb is not installed, or does not let the run begin.
  """

  def __init__(
    self,
    project: str,
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
  ):
    try:
      wandb = importlib.import_module("wandb")
    except ImportError as e:
      raise UserError(
        f"logging.wandb={project!r} needs the package wandb, which cannot be imported "
        f"({e}): pip install wandb, or leave logging.wandb empty. metrics.jsonl and "
        "TensorBoard are written in any case."
      ) from e
    file = workdir / "wandb.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    try:
      self._run = wandb.init(
        project=project,
        id=known.get("id"),
        resume="allow" if known else None,
        name=workdir.name,
        dir=str(workdir),
        config=dict(config),
      )
    except Exception as e:  # wandb's own kinds: no key, no network, no such project
      raise UserError(
        f"Weights & Biases does not begin a run in project {project!r}: {e}. Log in with "
        "`wandb login`, or set WANDB_MODE=offline (and `wandb sync` later), or leave "
        "logging.wandb empty."
      ) from e
    # Their own step only ever grows; ours may go back.
    self._run.define_metric("*", step_metric="step")
    self._sent = rows[-1]["step"] if known and rows else 0
    if not known:
      for row in rows:
        self.log(row)
      partial = file.with_suffix(".partial")
      partial.write_text(json.dumps({"id": self._run.id, "project": project}) + "\n")
      os.replace(partial, file)

  def log(self, row: Mapping[str, Any]) -> None:
    """Sends a row, unless it was sent before."""
    if row["step"] > self._sent:
      self._run.log(dict(row))
      self._sent = row["step"]

  def rewind(self, step: int) -> None:
    """Sends again what comes after `step`: it will be other numbers."""
    self._sent = min(self._sent, step)

  def close(self) -> None:
    """Waits until everything is sent."""
    self._run.finish()


def begin(
  project: str, workdir: pathlib.Path, config: Mapping[str, Any]
) -> WandbRun | None:
  """Begins or goes on with the workdir's run; None where no project is named."""
  from lpo_jax import parallel
  from lpo_jax.training.report import read_metrics

  if not project or not parallel.is_main_process():
    return None
  file = workdir / "metrics.jsonl"
  return WandbRun(project, workdir, config, read_metrics(file) if file.exists() else [])
