"""What an ablation shows in the end: frontiers, who leads where, and the tables."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import pages
from lpo_jax.jobs.quickstart_report import percent, versions
from lpo_jax.pages import charts
from lpo_jax.scoring.frontier import Frontier, Mean, Point, compare

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the drift that all arms reach
LOSSES = (0.0, 0.01, 0.02)  # of legibility, in shares of all images
ON_A_LINE = 25  # drifts at which a frontier is drawn


@dataclasses.dataclass(frozen=True)
class Table:
  """A table for people, the same on the page and as Markdown.

  Attributes:
    title: what it shows.
    about: how to read it.
    columns: names; the first is of the rows.
    rows: cells as text.
  """

  title: str
  about: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]

  def markdown(self) -> str:
    """The title, the explanation and the table."""
    lines = [
      "| " + " | ".join(self.columns) + " |",
      "|---" + "|--:" * (len(self.columns) - 1) + "|",
      *("| " + " | ".join(row) + " |" for row in self.rows),
    ]
    return f"## {self.title}\n\n{self.about}\n\n" + "\n".join(lines) + "\n"


def write(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  points: Sequence[Point],
  *,
  timings: Mapping[str, float],
) -> None:
  """Writes workdir/report.html and workdir/table.md.

  Args:
    config: the resolved config.
    workdir: the ablation's.
    points: every checkpoint of every run.
    timings: stage -> seconds; those of one kind of stage are added up.
  """
  frontiers = {arm: Frontier(points, arm) for arm in config.quickstart.methods}
  drifts = shared_drifts(frontiers)
  tables = [
    at_equal_drift(frontiers, drifts),
    at_equal_legibility(frontiers),
    at_equal_images(frontiers, config),
  ]
  found = leaders(frontiers, drifts)
  title = "What of a ranking is worth enforcing: an ablation on the quickstart's digits"
  text = [f"# {title}", setting(config), "## Who leads where", bullets(found)]
  text += [table.markdown().rstrip() for table in tables]
  text += ["## Good to know", bullets(notes(config))]
  (workdir / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
  kinds: dict[str, float] = {}
  for stage, seconds in timings.items():
    kind = stage.split(" ")[0]
    kinds[kind] = kinds.get(kind, 0.0) + seconds
  pages.write_page(
    workdir / "report.html",
    "ablation_report.html.j2",
    title=title,
    lead=setting(config),
    found=found,
    panels=[
      {
        "title": name.replace("_", " ").capitalize(),
        "charts": panel({arm: frontiers[arm] for arm in arms}),
      }
      for name, arms in config.quickstart.panels.items()
    ],
    tables=tables,
    notes=notes(config),
    timings=kinds,
    config=json.dumps(json.loads(config.to_json_best_effort()), indent=2),
    versions=versions(),
  )


def bullets(sentences: Sequence[str]) -> str:
  """A Markdown list."""
  return "\n".join(f"- {sentence}" for sentence in sentences)


def shared_drifts(frontiers: Mapping[str, Frontier]) -> list[float]:
  """Drifts that every arm reaches with some beta and all seeds."""
  reach = min(frontier.reach for frontier in frontiers.values())
  return [share * reach for share in SHARES]


def with_interval(mean: Mean | None, beta: bool = True) -> str:
  """'87.3 % (85.0 to 89.6), beta 2000'; '–' where there is nothing."""
  if mean is None:
    return "–"
  text = percent(mean.mean)
  if not math.isnan(mean.low):
    text += f" ({100 * mean.low:.1f} to {100 * mean.high:.1f})"
  return text + (f", beta {mean.beta:g}" if beta else "")


def at_equal_drift(frontiers: Mapping[str, Frontier], drifts: Sequence[float]) -> Table:
  """Win rates under the taste where the methods moved equally far."""
  return Table(
    "At equal drift",
    "Win rate over base under the taste, interpolated between checkpoints, with the beta "
    "that does best there; mean over seeds and its 95 % t interval.",
    ["method", *(f"drift {drift:.3g}" for drift in drifts)],
    [
      [arm, *(with_interval(frontier.at_drift(drift)) for drift in drifts)]
      for arm, frontier in frontiers.items()
    ],
  )


def at_equal_legibility(frontiers: Mapping[str, Frontier]) -> Table:
  """Win rates under the taste where the methods lost no more legibility than allowed."""
  return Table(
    "At equal loss of legibility",
    "The best win rate over base under the taste among the checkpoints and betas whose "
    "mean loss of legibility is at most so many points.",
    ["method", *(f"at most {100 * most:g} points" for most in LOSSES)],
    [
      [arm, *(with_interval(frontier.within_loss(most)) for most in LOSSES)]
      for arm, frontier in frontiers.items()
    ],
  )


def at_equal_images(
  frontiers: Mapping[str, Frontier], config: ml_collections.ConfigDict
) -> Table:
  """Every beta's last checkpoint: as many images, whatever the drift."""
  step, rows = config.train.total_steps, []
  for arm, frontier in frontiers.items():
    fields = (frontier.at_step(step, f) for f in ("won", "gained", "lost", "drift"))
    for won, gained, lost, drift in zip(*fields):
      rows.append(
        [
          arm,
          f"{won.beta:g}",
          with_interval(won, beta=False),
          f"{gained.mean:.3f}",
          with_interval(lost, beta=False),
          f"{drift.mean:.3g}",
        ]
      )
  return Table(
    f"At equal images: after {step} updates of {config.train.images_per_update}",
    "Whoever moves faster has the advantage here; the tables above take it away.",
    ["method", "beta", "win rate, taste", "taste gained", "legibility lost", "drift"],
    rows,
  )


def setting(config: ml_collections.ConfigDict) -> str:
  """What was compared, in words."""
  world, train = config.quickstart, config.train
  return (
    f"{len(world.methods)} methods, each with {len(world.betas)} value(s) of beta and "
    f"{len(world.seeds)} seed(s): {len(world.methods) * len(world.betas) * len(world.seeds)} "
    f"runs of {train.total_steps} updates of {train.images_per_update} images. In each "
    f"of {world.sessions} sessions a simulated person ranked {world.images_per_session} "
    "images."
  )


def leaders(frontiers: Mapping[str, Frontier], drifts: Sequence[float]) -> list[str]:
  """Says who leads where, and whether the seeds agree on it."""
  said = [
    f"At a drift of {drift:.3g} " + _leader({a: f.at_drift(drift) for a, f in frontiers.items()})
    for drift in drifts
  ]  # fmt: skip
  return said + [
    f"Losing at most {100 * most:g} points of legibility, "
    + _leader({a: f.within_loss(most) for a, f in frontiers.items()})
    for most in LOSSES
  ]


def _leader(means: Mapping[str, Mean | None]) -> str:
  """The first and the second, and whether their difference is beyond the scatter."""
  found = {arm: mean for arm, mean in means.items() if mean is not None}
  ranked = sorted(found, key=lambda arm: -found[arm].mean)
  if not ranked:
    return "no method can be compared."
  first = ranked[0]
  text = f"{first} has the highest win rate, {with_interval(found[first])}"
  if len(ranked) == 1:
    return text + "; no other method is there."
  second = ranked[1]
  gap = compare(found[first], found[second])
  text += f"; next is {second}, {with_interval(found[second])}. "
  if math.isnan(gap.low):
    return text + "With one seed nothing can be said about their difference."
  ends = f"{100 * gap.mean:.1f} points ({100 * gap.low:.1f} to {100 * gap.high:.1f})"
  if gap.low > 0:
    return text + f"It leads: the difference over seeds is {ends}."
  return text + f"Their difference over seeds is {ends}: no leader."


def notes(config: ml_collections.ConfigDict) -> list[str]:
  """What a careful reader should know."""
  return [
    "Intervals are over seeds: each has its own candidates, people and order of training. "
    "The prompts and seeds of the evaluation are the same for all.",
    "The beta of a frontier is the best one in hindsight, by the mean over seeds. This is "
    f"optimistic, and alike for all methods: each had {len(config.quickstart.betas)}. The "
    "same holds for the one named leader among many.",
    "Drift is the mean squared difference of the predictions from the base's, of the "
    "weights that are drawn with, on the same images, timesteps and noise for all runs "
    "of a seed.",
    "Beyond their last checkpoints frontiers are not continued.",
    "The taste scorer is the simulated people's own taste without their noise.",
  ]


def panel(frontiers: Mapping[str, Frontier]) -> list[tuple[Any, str]]:
  """The two charts of some methods, with what they mean."""
  about = (
    "Line: the best beta at each {}, mean over seeds, with its 95 % interval. Dots: "
    "every beta and checkpoint, means over seeds."
  )
  return [
    (
      charts.band_chart(
        {arm: _by_drift(frontier) for arm, frontier in frontiers.items()},
        title="Taste gained against drift",
        x_label="drift",
        y_label="win rate over base, taste",
        hline=0.5,
      ),
      about.format("drift"),
    ),
    (
      charts.band_chart(
        {arm: _by_loss(frontier) for arm, frontier in frontiers.items()},
        title="Taste gained against legibility lost",
        x_label="legibility lost, points",
        y_label="win rate over base, taste",
        hline=0.5,
      ),
      about.format("loss that is allowed"),
    ),
  ]


def _by_drift(frontier: Frontier) -> charts.Band:
  drifts = np.linspace(0.0, frontier.reach, ON_A_LINE)
  return _band(drifts, [frontier.at_drift(d) for d in drifts], _dots(frontier, "drift"))


def _by_loss(frontier: Frontier) -> charts.Band:
  dots = [(100 * lost, won) for lost, won in _dots(frontier, "lost")]
  losses = sorted({lost for lost, _ in dots if lost >= 0})
  means = [frontier.within_loss(lost / 100) for lost in losses]
  return _band(losses, means, dots)


def _dots(frontier: Frontier, field: str) -> list[tuple[float, float]]:
  return [
    (x.mean, y.mean)
    for step in sorted({p.step for p in frontier.points})
    for x, y in zip(frontier.at_step(step, field), frontier.at_step(step))
  ]


def _band(x: Sequence[float], means: Sequence[Mean | None], dots) -> charts.Band:
  kept = [(at, mean) for at, mean in zip(x, means) if mean is not None]
  return charts.Band(
    [at for at, _ in kept],
    [mean.mean for _, mean in kept],
    [mean.low for _, mean in kept],
    [mean.high for _, mean in kept],
    dots,
  )
