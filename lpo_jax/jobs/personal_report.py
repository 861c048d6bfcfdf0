"""What the personal quickstart shows in the end: the same prompt for different people."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax.configs import common
from lpo_jax.jobs import quickstart_report
from lpo_jax.jobs.evaluate import Evaluation
from lpo_jax.jobs.quickstart_report import find, interval, percent
from lpo_jax.pages import Headline, ImageGrid, RunReport, write_run_report
from lpo_jax.scoring import digit_people, scorers

TASTE, LEGIBILITY = "digits_person", "digits_legibility"
PERSONAL, COMMON, ANOTHER = "personal", "common", "another"
GROUPS = {"held_out": "people held out", "held_in": "people trained on"}
AGAINST = {
  COMMON: "the model told of nobody",
  ANOTHER: "itself told of another person",
}
# The tastes that are shown side by side, opposites next to each other.
SHOWN = ("bold", "thin", "upright", "tilted", "bold and upright", "thin and tilted")


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
  """Writes workdir/report.html; see `quickstart_report.write`."""
  people = digit_people.read(config.eval.scorer_paths.digits_person)
  rows = evaluation.people
  report = RunReport(
    title="lpo_jax personal quickstart: one model, people of opposed tastes",
    summary=summary(rows, people),
    headlines=headlines(rows),
    grid=grid(evaluation, people),
    win_rates=[_named(row) for row in rows if row["category"]],
    scorers={name: scorers.get(name).measures for name in config.eval.scorers},
    training=runs,
    data=quickstart_report.data_figures(data_report),
    list_lengths=quickstart_report.list_lengths(data_report),
    timings={**timings, "total": sum(timings.values())},
    notes=notes(config, rows, people, exported),
    config=json.loads(config.to_json_best_effort()),
    defaults=json.loads(common.get_config().to_json_best_effort()),
    versions=quickstart_report.versions(),
    files={
      "judgements/judgements.parquet": "what the simulated people clicked, in "
      "Pick-a-Pic's columns",
      "judgements/people.json": "what each of them likes",
      "judgements/user_embeds.json": "which judgements each is known by",
      "data_report.html": "what the data report found",
      **{f"{m}/": "the training run: config, checkpoints, metrics" for m in runs},
      "evaluation/": "every image, scores, people.json with each person's win rates",
      "summary.json": "every comparison, images as units",
      str(exported["path"]): "the pipeline, and ip_adapter.safetensors beside it",
    },
    links=("data_report.html", "summary.json"),
  )
  write_run_report(workdir / "report.html", report)


def of_group(
  rows: Sequence[Mapping[str, Any]], category: str, baseline: str, scorer: str = TASTE
) -> Mapping[str, Any]:
  """The personal model's row of one group of people."""
  within = [row for row in rows if row["category"] == category]
  return find(within, PERSONAL, baseline, scorer)


def summary(
  rows: Sequence[Mapping[str, Any]], people: Mapping[str, digit_people.Person]
) -> str:
  """The outcome in plain words."""
  said = [
    f"{len(people)} simulated people with opposed tastes (bold or thin, upright or tilted "
    "strokes, and mixtures) compared drawings of handwritten digits two at a time. One "
    "model was trained on what they said, told with each list whose it is: by an "
    "embedding made of a few of the person's other judgements. A second one was trained "
    "on the same, told of nobody."
  ]
  for category, group in GROUPS.items():
    row = of_group(rows, category, COMMON)
    wrong = of_group(rows, category, ANOTHER)
    said.append(
      f"For {row['units']} {group} it wins {interval(row)} of same-seed comparisons with "
      f"{AGAINST[COMMON]}, each by the taste of the person it drew for, and "
      f"{interval(wrong)} against {AGAINST[ANOTHER]}."
    )
  return "\n\n".join(said)


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[Headline]:
  """The few figures to see first."""
  shown = []
  for baseline, words in AGAINST.items():
    row = of_group(rows, "held_out", baseline)
    shown.append(
      Headline(
        f"people held out, over {words}",
        percent(row["win_rate"]),
        f"95 %: {percent(row['ci_low'])} to {percent(row['ci_high'])}, "
        f"{row['units']} people",
      )
    )
  row = of_group(rows, "held_out", COMMON, LEGIBILITY)
  shown.append(
    Headline(
      "legible",
      percent(row["mean_candidate"]),
      f"told of nobody: {percent(row['mean_baseline'])}",
    )
  )
  return shown


def grid(
  evaluation: Evaluation, people: Mapping[str, digit_people.Person]
) -> ImageGrid:
  """A prompt and a seed, drawn for nobody and for people whose taste is clearest."""
  cases = evaluation.cases
  texts = list(dict.fromkeys(case.prompt for case in cases))
  new = {case.asked.user for case in cases if case.category == "held_out"}
  place = {(case.asked.user, case.prompt): i for i, case in enumerate(cases)}
  columns = {"nobody (common)": (COMMON, next(iter(new)))}
  columns |= {
    f"{words} ({user})": (PERSONAL, user)
    for words, user in clearest(people, sorted(new)).items()
  }
  index = {
    name: np.array([[place[user, text]] for text in texts])
    for name, (_, user) in columns.items()
  }
  seeds = [[cases[i].seed for i in row] for row in next(iter(index.values()))]
  return ImageGrid(
    candidates=list(columns),
    prompts=texts,
    seeds=seeds,
    images={
      name: evaluation.images[candidate][index[name]]
      for name, (candidate, _) in columns.items()
    },
    pixelated=False,
    differs="whom it is for: people held out, with their number",
  )


def clearest(
  people: Mapping[str, digit_people.Person], names: Sequence[str]
) -> dict[str, str]:
  """Taste in words -> who of these people has it most clearly, of those in `SHOWN`."""
  found: dict[str, str] = {}
  for words in SHOWN:
    like = [name for name in names if people[name].words == words]
    if like:
      best = {"bold": 1, "thin": -1}.get(words.split()[0], 0)
      up = {"upright": 1, "tilted": -1}.get(words.split()[-1], 0)
      found[words] = max(
        like, key=lambda n: best * people[n].bold + up * people[n].upright
      )
  return found


def notes(
  config: ml_collections.ConfigDict,
  rows: Sequence[Mapping[str, Any]],
  people: Mapping[str, digit_people.Person],
  exported: Mapping[str, Any],
) -> list[str]:
  """What a careful reader should know."""
  data, train = config.data, config.train
  won = of_group(rows, "held_out", COMMON)["by_person"]
  by_taste: dict[str, list[float]] = {}
  for user, rate in won.items():
    by_taste.setdefault(people[user].words, []).append(rate)
  each = "; ".join(
    f"{words} {percent(float(np.mean(rates)))} ({len(rates)})"
    for words, rates in sorted(by_taste.items())
  )
  return [
    f"Over the model told of nobody, by taste (people held out): {each}.",
    f"Both models saw the same judgements and {train.total_steps} updates of "
    f"{train.images_per_update} images.",
    f"An embedding is made of {data.few_shot} judgements of the person that are in no "
    "list, for people held out as for others: the mean of the images they preferred minus "
    "that of the others, as 8 x 8 grey levels. It knows nothing of boldness or tilt.",
    "The other person whose embedding is told instead is the next in a fixed order, "
    "whatever their taste: some like the same.",
    "The unit of the intervals is the person. They do not contain the scatter between "
    "seeds of the whole world: docs/personal.md has three.",
    f"Export: {exported['checked']}.",
  ]


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row with its group of people in the candidate's name."""
  group = GROUPS[row["category"]]
  return {**row, "candidate": f"{row['candidate']}, {group}"}
