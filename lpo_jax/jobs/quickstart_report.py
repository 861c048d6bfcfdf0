"""What the quickstart shows in the end: report.html, in plain words and honest figures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import __version__
from lpo_jax.configs import common
from lpo_jax.jobs import sampling
from lpo_jax.jobs.evaluate import Evaluation
from lpo_jax.pages import Headline, ImageGrid, RunReport, write_run_report
from lpo_jax.scoring import scorers

TASTE, LEGIBILITY = "digits_taste", "digits_legibility"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
ROWS, SEEDS_SHOWN = 10, 3


@dataclasses.dataclass(frozen=True)
class Words:
  """What a world's report says in its own words.

  Attributes:
    title: of the page.
    story: the first paragraph; {baseline} is the baseline's mean under `second`.
    baseline: the candidate that methods are compared with, and what a sentence calls it.
    called: what a sentence calls the baseline.
    taste: the scorer that says whether people's taste was learnt.
    second: one that training does not see, a share in 0..1.
    second_said: what a method's share under `second` is, {share} in it.
    second_short: the same as a headline.
    judgements: file -> what it holds.
    notes: what else a careful reader should know.
  """

  title: str
  story: str
  baseline: str
  called: str
  taste: str
  second: str
  second_said: str
  second_short: str
  judgements: Mapping[str, str]
  notes: Sequence[str]


DIGITS = Words(
  title="lpo_jax quickstart: teaching a model what people like",
  story="A small Stable-Diffusion-shaped model drew handwritten digits. Simulated people, "
  "who like upright and bold strokes, compared its drawings two at a time. The model "
  "was then fine-tuned on these judgements, and drew again for phrasings and seeds "
  "that training never met. An independent reader recognises {baseline} of the "
  "base model's digits.",
  baseline="base",
  called="the base",
  taste=TASTE,
  second=LEGIBILITY,
  second_said="the reader recognises {share} of its digits",
  second_short="legible",
  judgements={
    "judgements/judgements.parquet": "what the simulated people clicked, in "
    "Pick-a-Pic's columns"
  },
  notes=(
    "The taste scorer is the simulated people's own taste without their noise: it says "
    "whether the judgements were learnt, not whether the images are good. The "
    "legibility scorer was not used in training, nor to choose anything.",
  ),
)


def write(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  evaluation: Evaluation,
  data_report: Mapping[str, Any],
  runs: Mapping[str, Sequence[Mapping[str, Any]]],
  timings: Mapping[str, float],
  exported: Mapping[str, Any],
  words: Words = DIGITS,
) -> None:
  """Writes workdir/report.html.

  Args:
    config: the resolved config.
    workdir: the quickstart's.
    evaluation: what `evaluate` returned.
    data_report: what `inspect` returned.
    runs: method -> its metrics rows.
    timings: stage -> seconds.
    exported: what `export` returned.
    words: what the world says of itself.
  """
  rows = evaluation.rows
  methods = list(runs)
  pages = [
    f"{m}/report.html" for m in methods if (workdir / m / "report.html").exists()
  ]
  report = RunReport(
    title=words.title,
    summary=summary(rows, methods, words),
    headlines=headlines(rows, methods, config.quickstart.publish, words),
    grid=grid(evaluation),
    win_rates=rows,
    scorers={name: scorers.get(name).measures for name in config.eval.scorers},
    training=runs,
    data=data_figures(data_report),
    list_lengths=list_lengths(data_report),
    timings={**timings, "total": sum(timings.values())},
    notes=notes(config, rows, exported, words) + rollout_notes(runs),
    config=json.loads(config.to_json_best_effort()),
    defaults=json.loads(common.get_config().to_json_best_effort()),
    versions=versions(),
    files={
      **words.judgements,
      "data_report.html": "what the data report found in it",
      **{
        f"{m}/": "the training run: config, checkpoints, metrics, TensorBoard"
        for m in methods
      },
      **{page: "the page of that run alone" for page in pages},
      "evaluation/": "every image, per-image scores, tables, gallery.html",
      "summary.json": "every figure of this page",
      str(exported["path"]): "the aligned pipeline, a diffusers folder",
    },
    links=("data_report.html", "summary.json", *pages),
  )
  write_run_report(workdir / "report.html", report)


def find(rows: Sequence[Mapping[str, Any]], candidate: str, baseline: str, scorer: str):
  """The row of one comparison."""
  wanted = (candidate, baseline, scorer)
  return next(r for r in rows if (r["candidate"], r["baseline"], r["scorer"]) == wanted)


def percent(value: float) -> str:
  """0.873 -> '87.3 %'."""
  return f"{100 * value:.1f} %"


def interval(row: Mapping[str, Any]) -> str:
  """A win rate with its interval, in words."""
  return f"{percent(row['win_rate'])} ({percent(row['ci_low'])} to {percent(row['ci_high'])})"


def summary(
  rows: Sequence[Mapping[str, Any]], methods: Sequence[str], words: Words = DIGITS
) -> str:
  """The outcome in plain words."""
  base = find(rows, methods[0], words.baseline, words.second)["mean_baseline"]
  said = [words.story.format(baseline=percent(base))]
  for method in methods:
    taste, second = (
      find(rows, method, words.baseline, s) for s in (words.taste, words.second)
    )
    share = percent(second["mean_candidate"])
    said.append(
      f"{method.upper()} wins {interval(taste)} of same-seed comparisons with "
      f"{words.called} under the taste; {words.second_said.format(share=share)}."
    )
  if len(methods) == 2:
    duel = find(rows, methods[1], methods[0], words.taste)
    said.append(
      f"Head to head at equal images, {methods[1].upper()} wins {interval(duel)} against "
      f"{methods[0].upper()}."
    )
  return "\n\n".join(said)


def headlines(
  rows: Sequence[Mapping[str, Any]],
  methods: Sequence[str],
  published: str,
  words: Words = DIGITS,
) -> list[Headline]:
  """The few figures to see first."""
  shown = []
  for method in methods:
    row = find(rows, method, words.baseline, words.taste)
    shown.append(
      Headline(
        f"{method.upper()} over {words.baseline}, taste",
        percent(row["win_rate"]),
        f"95 %: {percent(row['ci_low'])} to {percent(row['ci_high'])}, n = {row['n']}",
      )
    )
  second = find(rows, published, words.baseline, words.second)
  shown.append(
    Headline(
      f"{published.upper()} {words.second_short}",
      percent(second["mean_candidate"]),
      f"{words.baseline}: {percent(second['mean_baseline'])}",
    )
  )
  return shown


def grid(evaluation: Evaluation) -> ImageGrid:
  """Some prompts with the same seeds in all columns; of edits first what was edited."""
  texts = list(dict.fromkeys(evaluation.prompts))[:ROWS]
  index = np.array([_shown(evaluation, text, row) for row, text in enumerate(texts)])
  images = {name: files[index] for name, files in evaluation.images.items()}
  images = _given(evaluation, index, images) | images
  return ImageGrid(
    candidates=list(images),
    prompts=texts,
    seeds=[[evaluation.seeds[i] for i in row] for row in index],
    images=images,
    scores={
      name: {scorer: values[index].tolist() for scorer, values in by_scorer.items()}
      for name, by_scorer in evaluation.scores.items()
    },
    pixelated=False,
  )


def _shown(evaluation: Evaluation, text: str, row: int) -> list[int]:
  """A few images of a prompt: its first seeds, or edits of sources not yet in the grid."""
  places = [i for i, other in enumerate(evaluation.prompts) if other == text]
  if not evaluation.cases[0].asked.source:
    return places[:SEEDS_SHOWN]
  return [places[(row * SEEDS_SHOWN + k) % len(places)] for k in range(SEEDS_SHOWN)]


def _given(
  evaluation: Evaluation, index: np.ndarray, images: Mapping[str, np.ndarray]
) -> dict[str, list[list[np.ndarray]]]:
  """Of edits the pictures that were edited, and the right edits where there are any."""
  side, columns = next(iter(images.values())).shape[2], {}
  for name, field in (("source", "source"), ("right edit", "target")):
    if all(getattr(case.asked, field) for case in evaluation.cases):
      columns[name] = [
        [sampling.picture(evaluation.cases[i].asked, side, field) for i in row]
        for row in index
      ]
  return columns


def data_figures(report: Mapping[str, Any]) -> dict[str, Any]:
  """The plain numbers of the data report, in words."""
  found, images = report["judgements"], report["images"]
  return {
    "judgements": found["judgements_total"],
    "of them in lists": found["judgements_used"],
    "ties": found["ties"],
    "contradicted pairs": found["contradicted_pairs"],
    "cycles cut": found["cycle_cuts"],
    "images": images["count"],
    "undecodable images": images["undecodable"],
    "prompts": report["prompts"]["count"],
    "evaluation prompts among them": report["prompts"]["leaked"],
    "people": report["annotators"]["count"],
    "lists": found["lists"],
  }


def list_lengths(report: Mapping[str, Any]) -> dict[int, int]:
  """The length histogram of the data report, with int keys."""
  return {int(size): n for size, n in report["judgements"]["lengths"].items()}


def notes(
  config: ml_collections.ConfigDict,
  rows: Sequence[Mapping[str, Any]],
  exported: Mapping[str, Any],
  words: Words = DIGITS,
) -> list[str]:
  """What a careful reader should know."""
  train = config.train
  said = [
    f"All methods saw the same judgements and {train.total_steps} updates of "
    f"{train.images_per_update} images; they differ in how many comparisons each image "
    "takes part in.",
    *words.notes,
    f"Export: {exported['checked']}.",
  ]
  cut_back = [r["candidate"] for r in rows if ", drift of " in r["candidate"]]
  if cut_back:
    said.append(
      f"'{cut_back[0]}' is an earlier checkpoint of the method that moved further, "
      "taken where its drift is nearest the other's final drift: a method should not "
      "win by merely moving faster."
    )
  return said


def rollout_notes(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
  """What generating cost, of the methods that generate while they train."""
  seconds = {
    name: sum(row.get("rollout_seconds", 0.0) for row in rows)
    for name, rows in runs.items()
  }
  return [
    f"Of {name.upper()}'s training {spent:.0f} seconds went into its rollouts."
    for name, spent in seconds.items()
    if spent
  ]


def versions() -> dict[str, str]:
  """What ran."""
  found = {"lpo_jax": __version__, "python": platform.python_version()}
  return found | {name: importlib.metadata.version(name) for name in PACKAGES}
