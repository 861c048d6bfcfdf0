"""What an ablation shows in the end: frontiers, who leads where, and the tables."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import pages
from lpo_jax.jobs.quickstart_report import percent, versions
from lpo_jax.pages import charts
from lpo_jax.scoring.frontier import Frontier, Mean, Point, compare

SHARES = (0.25, 0.5, 1.0)  # of the drift that all arms reach
LOSSES = (0.0, 0.01, 0.02)  # of legibility, in shares of all images
ON_A_LINE = 25  # drifts at which a frontier is drawn


@dataclasses.dataclass(frozen=True)
class Measure:
  """What methods are compared by.

  Attributes:
    field: of a point.
    words: its name.
    none: the base's value.
    number: a value as text, with its unit.
    bare: a value as text, without.
    difference: of two values, as text.
  """

  field: str
  words: str
  none: float
  number: Callable[[float], str]
  bare: Callable[[float], str]
  difference: Callable[[float], str]


def _three(value: float) -> str:
  return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


# The score itself first: what changes all images a little, and alike, wins nearly every
# comparison of the same seeds and gains next to nothing.
GAINED = Measure("gained", "taste gained", 0.0, _three, _three, "{:+.3f}".format)
WON = Measure(
  "won",
  "win rate over base, taste",
  0.5,
  percent,
  lambda x: f"{100 * min(max(x, 0.0), 1.0):.1f}",  # an interval's ends may be beyond
  lambda x: f"{100 * x:+.1f}",
)
LOST = Measure(
  "lost",
  "legibility lost",
  0.0,
  percent,
  lambda x: f"{100 * x:.1f}",
  lambda x: f"{100 * x:+.1f}",
)


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
    at_equal_drift(frontiers, drifts, GAINED),
    against(frontiers, drifts, next(iter(config.quickstart.panels.values()))[0]),
    at_equal_legibility(frontiers),
    at_equal_images(frontiers, config),
    at_equal_drift(frontiers, drifts, WON),
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


def with_interval(mean: Mean | None, measure: Measure, beta: bool = True) -> str:
  """'87.3 % (85.0 to 89.6), beta 2000'; '–' where there is nothing."""
  if mean is None:
    return "–"
  text = measure.number(mean.mean)
  if not math.isnan(mean.low):
    text += f" ({measure.bare(mean.low)} to {measure.bare(mean.high)})"
  return text + (f", beta {mean.beta:g}" if beta else "")


def difference(gap: Mean, measure: Measure = GAINED) -> str:
  """'+0.051 (-0.010 to +0.112)'."""
  text = measure.difference(gap.mean)
  if math.isnan(gap.low):
    return text
  return f"{text} ({measure.difference(gap.low)} to {measure.difference(gap.high)})"


def at_equal_drift(
  frontiers: Mapping[str, Frontier], drifts: Sequence[float], measure: Measure
) -> Table:
  """What was won or gained where the methods moved equally far."""

  def row(frontier: Frontier) -> list[str]:
    means = (frontier.at_drift(drift, measure.field) for drift in drifts)
    return [with_interval(mean, measure) for mean in means]

  return Table(
    f"At equal drift: {measure.words}",
    "Interpolated between checkpoints, with the beta that does best there; mean over "
    "seeds and its 95 % t interval.",
    ["method", *(f"drift {drift:.3g}" for drift in drifts)],
    [[arm, *row(frontier)] for arm, frontier in frontiers.items()],
  )


def against(
  frontiers: Mapping[str, Frontier], drifts: Sequence[float], arm: str
) -> Table:
  """Taste gained less than one arm gains, where all moved equally far."""

  def cell(frontier: Frontier, drift: float) -> str:
    mine = frontier.at_drift(drift, GAINED.field)
    theirs = frontiers[arm].at_drift(drift, GAINED.field)
    return difference(compare(mine, theirs)) if mine and theirs else "–"

  return Table(
    f"Against {arm}, at equal drift",
    f"Taste gained less that of {arm}, each with its best beta there; mean of the "
    "differences between runs of one seed and its 95 % t interval.",
    ["method", *(f"drift {drift:.3g}" for drift in drifts)],
    [
      [other, *(cell(frontier, drift) for drift in drifts)]
      for other, frontier in frontiers.items()
      if other != arm
    ],
  )


def at_equal_legibility(frontiers: Mapping[str, Frontier]) -> Table:
  """Taste gained where the methods lost no more legibility than allowed."""

  def row(frontier: Frontier) -> list[str]:
    means = (frontier.within_loss(most, GAINED.field) for most in LOSSES)
    return [with_interval(mean, GAINED) for mean in means]

  return Table(
    "At equal loss of legibility",
    "The most taste gained among the checkpoints and betas whose mean loss of "
    "legibility is at most so many points.",
    ["method", *(f"at most {100 * most:g} points" for most in LOSSES)],
    [[arm, *row(frontier)] for arm, frontier in frontiers.items()],
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
          with_interval(gained, GAINED, beta=False),
          with_interval(won, WON, beta=False),
          with_interval(lost, LOST, beta=False),
          f"{drift.mean:.3g}",
        ]
      )
  return Table(
    f"At equal images: after {step} updates of {config.train.images_per_update}",
    "Whoever moves faster has the advantage here; the tables above take it away.",
    ["method", "beta", "taste gained", "win rate, taste", "legibility lost", "drift"],
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
  """Says who gains most taste where, and whether the seeds agree on it."""
  field = GAINED.field
  said = [
    f"At a drift of {drift:.3g} "
    + _leader({arm: f.at_drift(drift, field) for arm, f in frontiers.items()})
    for drift in drifts
  ]
  return said + [
    f"Losing at most {100 * most:g} points of legibility, "
    + _leader({arm: f.within_loss(most, field) for arm, f in frontiers.items()})
    for most in LOSSES
  ]


def _leader(means: Mapping[str, Mean | None]) -> str:
  """The first and the second, and whether their difference is beyond the scatter."""
  found = {arm: mean for arm, mean in means.items() if mean is not None}
  ranked = sorted(found, key=lambda arm: -found[arm].mean)
  if not ranked:
    return "no method can be compared."
  first = ranked[0]
  text = f"{first} gains most taste, {with_interval(found[first], GAINED)}"
  if len(ranked) == 1:
    return text + "; no other method is there."
  second = ranked[1]
  gap = compare(found[first], found[second])
  text += f"; next is {second}, {with_interval(found[second], GAINED)}. "
  if math.isnan(gap.low):
    return text + "With one seed nothing can be said about their difference."
  if gap.low > 0:
    return text + f"It leads: the difference over seeds is {difference(gap)}."
  return text + f"Their difference over seeds is {difference(gap)}: no leader."


def notes(config: ml_collections.ConfigDict) -> list[str]:
  """What a careful reader should know."""
  return [
    "Intervals are over seeds: each has its own candidates, people and order of training. "
    "The prompts and seeds of the evaluation are the same for all.",
    "The beta of a frontier is the best one in hindsight, by the mean over seeds. This is "
    f"optimistic, and alike for all methods: each had {len(config.quickstart.betas)}. The "
    "same holds for the one named leader among many: intervals are of single "
    "differences, and nothing is taken off for their number.",
    "Drift is the mean squared difference of the predictions from the base's, of the "
    "weights that are drawn with, on the same images, timesteps and noise for all runs "
    "of a seed.",
    "Beyond their last checkpoints frontiers are not continued.",
    "The taste scorer is the simulated people's own taste without their noise. What is "
    "gained of it is in spreads of the slant among real digits of one class. Win rates "
    "compare images of the same seed, where a small change that all images share wins "
    "nearly always: of two methods the one that wins more may gain less.",
  ]


def panel(frontiers: Mapping[str, Frontier]) -> list[tuple[Any, str]]:
  """The charts of some methods, with what they mean; the first is the one to beat."""
  about = (
    "Line: the best beta at each {}, mean over seeds, with its 95 % interval. Dots: "
    "every beta and checkpoint, means over seeds."
  )
  first = next(iter(frontiers))
  colors = {arm: index for index, arm in enumerate(frontiers)}
  words = {"y_label": GAINED.words, "hline": GAINED.none, "colors": colors}
  return [
    (
      charts.band_chart(
        {arm: _by_drift(frontier) for arm, frontier in frontiers.items()},
        title="Taste gained against drift",
        x_label="drift",
        **words,
      ),
      about.format("drift"),
    ),
    (
      charts.band_chart(
        {
          arm: _by_drift(frontier, than=frontiers[first])
          for arm, frontier in frontiers.items()
          if arm != first
        },
        title=f"Against {first}, at equal drift",
        x_label="drift",
        **words | {"y_label": f"taste gained, less that of {first}"},
      ),
      "Mean of the differences between runs of one seed, with its 95 % interval: what all "
      "methods owe to their seed is out of it.",
    ),
    (
      charts.band_chart(
        _by_loss(frontiers),
        title="Taste gained against legibility lost",
        x_label="legibility lost, points",
        **words,
      ),
      about.format("loss that is allowed"),
    ),
  ]


def _by_drift(frontier: Frontier, than: Frontier | None = None) -> charts.Band:
  """What is gained along the drift, or how much more than another method gains."""
  field = GAINED.field
  if than is None:
    drifts = np.linspace(0.0, frontier.reach, ON_A_LINE)
    means = [frontier.at_drift(drift, field) for drift in drifts]
    return _band(drifts, means, _dots(frontier, "drift"))
  drifts = np.linspace(0.0, min(frontier.reach, than.reach), ON_A_LINE)
  pairs = [(frontier.at_drift(d, field), than.at_drift(d, field)) for d in drifts]
  return _band(drifts, [compare(mine, theirs) for mine, theirs in pairs], ())


def _by_loss(frontiers: Mapping[str, Frontier]) -> dict[str, charts.Band]:
  """What is gained along the loss that is allowed, up to the largest that was seen."""
  dots = {arm: _dots(frontier, "lost") for arm, frontier in frontiers.items()}
  most = max((lost for own in dots.values() for lost, _ in own), default=0.0)
  losses = np.linspace(0.0, max(most, 0.0), ON_A_LINE)
  return {
    arm: _band(
      100 * losses,
      [frontier.within_loss(lost, GAINED.field) for lost in losses],
      [(100 * lost, gained) for lost, gained in dots[arm]],
    )
    for arm, frontier in frontiers.items()
  }


def _dots(frontier: Frontier, field: str) -> list[tuple[float, float]]:
  return [
    (x.mean, y.mean)
    for step in sorted({p.step for p in frontier.points})
    for x, y in zip(frontier.at_step(step, field), frontier.at_step(step, GAINED.field))
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
