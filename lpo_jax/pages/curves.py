"""A run's metrics as charts: those with a name of their own first, then all others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from markupsafe import Markup

Training = Mapping[str, Sequence[Mapping[str, Any]]]

# What tells when a row was written; no curve.
PLACES = ("step", "time")


@dataclasses.dataclass(frozen=True)
class Curve:
  """How a metric is shown.

  Attributes:
    title: above the chart.
    meaning: below it, one or two sentences.
    hline: y of a dashed line to compare with.
  """

  title: str
  meaning: str = ""
  hline: float | None = None


MAIN = {
  "loss": Curve(
    "Loss",
    "What training minimises. Methods have different losses (a pair starts at log 2, a "
    "ranking of m images at log m!), so compare each curve with its own beginning.",
  ),
  "implicit_acc": Curve(
    "Implicit accuracy",
    "Share of ordered pairs that the model now ranks as people did. "
    "0.5 is a coin toss.",
    0.5,
  ),
  "margin": Curve(
    "Margin",
    "How much more the model improved on the preferred image of a pair than on the "
    "other one, against the reference.",
    0.0,
  ),
  "drift": Curve(
    "Drift",
    "How far the model's predictions have moved from the reference's, as a mean "
    "square. The price paid for the win rate.",
  ),
}
OTHERS = {
  "winner_gain": Curve(
    "Gain on the preferred",
    "Implicit reward of the preferred images: above 0 the model denoises them better "
    "than the reference does.",
    0.0,
  ),
  "loser_gain": Curve(
    "Gain on the others",
    "Implicit reward of the images that lost. Where both gains fall, the model forgets "
    "more than it learns.",
    0.0,
  ),
  "err": Curve("Denoising error", "Of the model, on the images of each update."),
  "ref_err": Curve("Denoising error of the reference", "On the same images and noise."),
  "grad_norm": Curve("Gradient norm", "Before clipping."),
  "update_norm": Curve("Update norm", "How far one update moves the weights."),
  "learning_rate": Curve("Learning rate"),
  "lr_scale": Curve("Scale of the learning rate", "Lowered by each rollback.", 1.0),
  "images_per_second": Curve(
    "Images a second", "Without compiling, samples and checkpoints that are waited for."
  ),
  "data_wait_share": Curve("Waiting for data", "Share of the time between two rows."),
  "rollout_seconds": Curve("Rollouts", "Seconds an update spent on generating images."),
}


def main_charts(
  training: Training, colors: Mapping[str, int]
) -> list[tuple[Markup, str]]:
  """Draws the metrics of `MAIN` that are there; returns (chart, meaning)."""
  return _draw(training, MAIN, colors)


def other_charts(
  training: Training, colors: Mapping[str, int]
) -> list[tuple[Markup, str]]:
  """Draws every other number in the rows, known ones first; returns (chart, meaning).

  Of one run, parts of a whole ("drift/t0", "drift/t1") share a chart.
  """
  names = {
    name: Curve(name)
    for rows in training.values()
    for row in rows
    for name, value in row.items()
    if name not in MAIN and name not in PLACES and _is_number(value)
  }
  known = {name: curve for name, curve in OTHERS.items() if name in names}
  rest = sorted(names.keys() - known.keys())
  groups = parts(rest) if len(training) == 1 else {}
  grouped = {name for members in groups.values() for name in members}
  alone = {name: names[name] for name in rest if name not in grouped}
  drawn = _draw(training, known | alone, colors)
  for title, members in groups.items():
    (rows,) = training.values()
    series = {
      name.partition("/")[2]: [
        {"step": row.get("step"), title: row.get(name)} for row in rows
      ]
      for name in members
    }
    drawn += _draw(series, {title: Curve(title)}, {})
  return drawn


def parts(names: Iterable[str]) -> dict[str, list[str]]:
  """Groups names of the form whole/part by the whole and the part's first letters.

  >>> parts(["drift/size2", "drift/size5_up", "drift/t0", "loss/held_out", "seconds"])
  {'drift by size': ['drift/size2', 'drift/size5_up']}
  """
  found: dict[str, list[str]] = {}
  for name in names:
    split = re.fullmatch(r"(.+)/([a-z]+)\d.*", name)
    if split:
      found.setdefault(f"{split[1]} by {split[2]}", []).append(name)
  return {title: members for title, members in found.items() if len(members) > 1}


def speeds(training: Training) -> dict[str, float]:
  """Returns each run's median images a second."""
  found = {}
  for run, rows in training.items():
    known = [row["images_per_second"] for row in rows if row.get("images_per_second")]
    if known:
      found[run] = float(np.median(known))
  return found


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _points(rows: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[Any, Any]]:
  return [
    (row["step"], row[metric])
    for row in rows
    if row.get("step") is not None and _is_number(row.get(metric))
  ]


def _draw(
  training: Training, names: Mapping[str, Curve], colors: Mapping[str, int]
) -> list[tuple[Markup, str]]:
  from lpo_jax.pages import charts

  drawn = []
  for metric, curve in names.items():
    series = {}
    for run, rows in training.items():
      points = _points(rows, metric)
      if any(np.isfinite(value) for _, value in points):
        series[run] = tuple(np.asarray(points, np.float64).T)
    if series:
      longest = max(len(x) for x, _ in series.values())
      chart = charts.line_chart(
        series,
        title=curve.title,
        x_label="step",
        smooth=max(1, min(longest, 300) // 15),
        hline=curve.hline,
        colors=colors,
      )
      drawn.append((chart, curve.meaning))
  return drawn
