"""What a sweep shows in the end: a table and a plot of its runs, from their own files."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lpo_jax.training.report import read_metrics

LAST_SHARE = 0.1  # of the updates, over which metrics are averaged in the table
COLUMNS = ("loss", "implicit_acc", "margin", "drift", "images_per_second")
CURVES = ("implicit_acc", "margin", "drift")
PER_LINE = 3  # panels of the plot


@dataclasses.dataclass(frozen=True)
class Trained:
  """One training run of the sweep.

  Attributes:
    name: of the sweep's run, with the method where it trained several.
    metrics: rows of metrics.jsonl.
    comparisons: rows of summary.json in which it is the candidate.
  """

  name: str
  metrics: Sequence[Mapping[str, Any]]
  comparisons: Sequence[Mapping[str, Any]]

  def last(self, metric: str) -> float | None:
    """A metric's mean over the last tenth of the updates, None where there is none."""
    values = [row[metric] for row in self.metrics if row.get(metric) is not None]
    count = max(1, round(LAST_SHARE * len(values)))
    return sum(values[-count:]) / count if values else None


def read_runs(workdir: pathlib.Path, names: Sequence[str]) -> list[Trained]:
  """Reads the runs that have trained at all.

  Args:
    workdir: of the sweep; a run is the folder of its name in it, or several (as the
      quickstart's methods) are the folders in that.
    names: of the runs, in the order of the table.
  """
  found = []
  for name in names:
    folder = workdir / name
    files = [folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl"))]
    files = [file for file in files if file.is_file()]
    rows = _summary(folder)
    candidates = {row["candidate"] for row in rows}
    for file in files:
      method = "" if file.parent == folder else file.parent.name
      label = f"{name} {method}" if len(files) > 1 else name
      if method:
        own = [row for row in rows if row["candidate"] == method]
      else:  # the base against this run, or what else was named
        own = rows if len(candidates) <= 1 else []
      found.append(Trained(label, read_metrics(file), own))
  return found


def _summary(folder: pathlib.Path) -> list[dict[str, Any]]:
  try:
    return json.loads((folder / "summary.json").read_text("utf-8"))
  except (OSError, ValueError):
    return []


def rows_of(
  runs: Sequence[Trained], settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Returns one flat record per run: what differs, metrics, win rates.

  Args:
    runs: from `read_runs`.
    settings: name of the sweep's run -> the keys that differ and their values.
  """
  rows = []
  for run in runs:
    row: dict[str, Any] = {"run": run.name}
    row |= settings.get(run.name.split(" ")[0], {})
    row["step"] = run.metrics[-1]["step"] if run.metrics else 0
    row |= {metric: run.last(metric) for metric in COLUMNS}
    for found in run.comparisons:
      key = f"{found['scorer']}, win rate over {found['baseline']}"
      row[key] = {k: found[k] for k in ("win_rate", "ci_low", "ci_high")}
    rows.append(row)
  return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """Lays the records out as a table; what a run does not have is a dash."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  lines = [
    "| " + " | ".join(columns) + " |",
    "|---" + "|--:" * (len(columns) - 1) + "|",
  ]
  for row in rows:
    lines.append("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |")
  return "\n".join(lines)


def _cell(value: Any) -> str:
  """Writes a value for people.

  >>> _cell({"win_rate": 0.9, "ci_low": 0.8, "ci_high": 0.95}), _cell(None), _cell(2e-5)
  ('0.900 (0.800 to 0.950)', '–', '2e-05')
  """
  if value is None:
    return "–"
  if isinstance(value, Mapping):
    return f"{value['win_rate']:.3f} ({value['ci_low']:.3f} to {value['ci_high']:.3f})"
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(
  workdir: pathlib.Path, settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Writes comparison.md, comparison.json and comparison.png.

  Args:
    workdir: of the sweep.
    settings: name of each run -> the keys that differ and their values.

  Returns:
    The records of the table; empty when no run has trained, and nothing is written.
  """
  runs = read_runs(workdir, list(settings))
  rows = rows_of(runs, settings)
  if not rows:
    return rows
  about = (
    f"Metrics are means over the last {LAST_SHARE:.0%} of the updates; win rates count "
    "ties as one half, with the interval of the run's own evaluation."
  )
  text = f"# {workdir.name}\n\n{about}\n\n{markdown(rows)}\n"
  (workdir / "comparison.md").write_text(text, encoding="utf-8")
  text = json.dumps(rows, indent=2) + "\n"
  (workdir / "comparison.json").write_text(text, encoding="utf-8")
  draw(runs, workdir / "comparison.png")
  return rows


def draw(runs: Sequence[Trained], file: pathlib.Path) -> None:
  """Draws the curves of all runs over one another, and their win rates if any has some."""
  from matplotlib.figure import Figure

  scorers = dict.fromkeys(
    row["scorer"] for run in runs for row in run.comparisons
  )  # in order
  panels = len(CURVES) + len(scorers)
  lines = -(-panels // PER_LINE)
  size = (4.2 * PER_LINE, 3.6 * lines)
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  axes = list(figure.subplots(lines, PER_LINE, squeeze=False).flat)
  for empty in axes[panels:]:
    empty.remove()
  for at, metric in zip(axes, CURVES):
    for run in runs:
      points = [
        (row["step"], row[metric])
        for row in run.metrics
        if row.get(metric) is not None and math.isfinite(row[metric])
      ]
      x, y = zip(*points) if points else ((), ())
      at.plot(x, _smooth(y), label=run.name, linewidth=1.6)
    at.set(title=metric.replace("_", " "), xlabel="step")
    at.grid(alpha=0.3)
  axes[0].legend(fontsize=8)
  for at, scorer in zip(axes[len(CURVES) :], scorers):
    for index, run in enumerate(runs):
      for row in run.comparisons:
        if row["scorer"] == scorer:
          ends = [row["ci_low"], row["ci_high"]]
          at.plot([index, index], ends, color=f"C{index % 10}", linewidth=4, alpha=0.4)
          at.plot(index, row["win_rate"], "o", color=f"C{index % 10}")
    at.axhline(0.5, color="grey", linewidth=1, dashes=(4, 4))
    names = [run.name for run in runs]
    at.set_xticks(range(len(runs)), names, rotation=30, ha="right", fontsize=8)
    limits = {"ylim": (-0.03, 1.03), "xlim": (-0.5, len(runs) - 0.5)}
    at.set(title=f"win rate, {scorer}", **limits)
  figure.savefig(file)


def _smooth(values: Sequence[float]) -> list[float]:
  """A running mean over the last fifteenth of the values so far drawn."""
  window = max(1, len(values) // 15)
  return [
    sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window)
    for i in range(len(values))
  ]
