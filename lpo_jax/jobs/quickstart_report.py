"""What the quickstart shows in the end: report.html, in plain words and honest figures."""

from __future__ import annotations

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
from lpo_jax.jobs.evaluate import Evaluation
from lpo_jax.pages import Headline, ImageGrid, RunReport, write_run_report
from lpo_jax.scoring import scorers

TASTE, LEGIBILITY = "digits_taste", "digits_legibility"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
ROWS, SEEDS_SHOWN = 10, 3


def write(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  evaluation: Evaluation,
  data_report: Mapping[str, Any],
  runs: Mapping[str, Sequence[Mapping[str, Any]]],
  timings: Mapping[str, float],
  exported: Mapping[str, Any],
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
  """
  rows = evaluation.rows
  methods = list(runs)
  pages = [
    f"{m}/report.html" for m in methods if (workdir / m / "report.html").exists()
  ]
  report = RunReport(
    title="lpo_jax quickstart: teaching a model what people like",
    summary=summary(rows, methods),
    headlines=headlines(rows, methods, config.quickstart.publish),
    grid=grid(evaluation),
    win_rates=rows,
    scorers={name: scorers.get(name).measures for name in config.eval.scorers},
    training=runs,
    data=data_figures(data_report),
    list_lengths=list_lengths(data_report),
    timings={**timings, "total": sum(timings.values())},
    notes=notes(config, rows, methods, exported) + rollout_notes(runs),
    config=json.loads(config.to_json_best_effort()),
    defaults=json.loads(common.get_config().to_json_best_effort()),
    versions=versions(),
    files={
      "judgements/judgements.parquet": "what the simulated people clicked, in "
      "Pick-a-Pic's columns",
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


def summary(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
  """The outcome in plain words."""
  base = find(rows, methods[0], "base", LEGIBILITY)["mean_baseline"]
  said = [
    "A small Stable-Diffusion-shaped model drew handwritten digits. Simulated people, "
    "who like upright and bold strokes, compared its drawings two at a time. The model "
    "was then fine-tuned on these judgements, and drew again for phrasings and seeds "
    f"that training never met. An independent reader recognises {percent(base)} of the "
    "base model's digits."
  ]
  for method in methods:
    taste, legible = (find(rows, method, "base", s) for s in (TASTE, LEGIBILITY))
    said.append(
      f"{method.upper()} wins {interval(taste)} of same-seed comparisons with the base "
      f"under the taste; the reader recognises {percent(legible['mean_candidate'])} of "
      "its digits."
    )
  if len(methods) == 2:
    duel = find(rows, methods[1], methods[0], TASTE)
    said.append(
      f"Head to head at equal images, {methods[1].upper()} wins {interval(duel)} against "
      f"{methods[0].upper()}."
    )
  return "\n\n".join(said)


def headlines(
  rows: Sequence[Mapping[str, Any]], methods: Sequence[str], published: str
) -> list[Headline]:
  """The few figures to see first."""
  shown = []
  for method in methods:
    row = find(rows, method, "base", TASTE)
    shown.append(
      Headline(
        f"{method.upper()} over base, taste",
        percent(row["win_rate"]),
        f"95 %: {percent(row['ci_low'])} to {percent(row['ci_high'])}, n = {row['n']}",
      )
    )
  legible = find(rows, published, "base", LEGIBILITY)
  shown.append(
    Headline(
      f"{published.upper()} legible",
      percent(legible["mean_candidate"]),
      f"base: {percent(legible['mean_baseline'])}",
    )
  )
  return shown


def grid(evaluation: Evaluation) -> ImageGrid:
  """Some prompts with the same seeds in all columns."""
  texts = list(dict.fromkeys(evaluation.prompts))[:ROWS]
  places = {text: [] for text in texts}
  for i, text in enumerate(evaluation.prompts):
    if text in places and len(places[text]) < SEEDS_SHOWN:
      places[text].append(i)
  index = np.array([places[text] for text in texts])
  return ImageGrid(
    candidates=list(evaluation.images),
    prompts=texts,
    seeds=[[evaluation.seeds[i] for i in row] for row in index],
    images={name: images[index] for name, images in evaluation.images.items()},
    scores={
      name: {scorer: values[index].tolist() for scorer, values in by_scorer.items()}
      for name, by_scorer in evaluation.scores.items()
    },
    pixelated=False,
  )


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
  methods: Sequence[str],
  exported: Mapping[str, Any],
) -> list[str]:
  """What a careful reader should know."""
  train = config.train
  said = [
    f"All methods saw the same judgements and {train.total_steps} updates of "
    f"{train.images_per_update} images; they differ in how many comparisons each image "
    "takes part in.",
    "The taste scorer is the simulated people's own taste without their noise: it says "
    "whether the judgements were learnt, not whether the images are good. The "
    "legibility scorer was not used in training, nor to choose anything.",
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
