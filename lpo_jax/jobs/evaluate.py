"""The evaluate job: the same prompts and seeds through every candidate, then scores."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.data import image_folders, records
from lpo_jax.data import prompts as prompt_sets
from lpo_jax.data.image_folders import Case, Matched
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import candidates as candidate_kinds
from lpo_jax.jobs import drawing, evaluation_files, evaluation_people, sampling
from lpo_jax.jobs.drawing import ImageFiles
from lpo_jax.jobs.stops import StopRequests
from lpo_jax.scoring import protocols, scorers, typeset, win_rate
from lpo_jax.scoring.scorer import Scorer

# What decides the pixels besides the weights; a change draws everything again.
DRAWING_KEYS = (
  *("sampler", "steps", "guidance_scale", "eta", "sigmas", "seeds", "first_seed"),
)
MISSING = ("refuse", "leave_out")  # what to do about images that a folder lacks
SCORED_AT_ONCE = 64
# What every scorer is told besides what it asks the prompt set for (`sampling.told`): the
# field of `Told`, and (candidate, case, file) -> one image's.
INPUTS: dict[str, Callable[[str, Case, pathlib.Path], Any]] = {
  "seeds": lambda name, case, file: case.seed,
  "names": lambda name, case, file: f"{name}/{file.name}",
}

Scores = Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What came out, in the order of the (prompt, seed) pairs.

  Attributes:
    prompts: [n] texts.
    seeds: [n] ints.
    cases: [n] what was drawn: the prompts, the seeds, and what else was asked.
    images: candidate -> n images, read when asked for.
    scores: candidate -> scorer -> [n].
    rows: of summary.json.
    people: the same with people as units, of all and of each category; of people.json.
  """

  prompts: list[str]
  seeds: list[int]
  cases: Sequence[Case]
  images: Mapping[str, ImageFiles]
  scores: Scores
  rows: list[dict[str, Any]]
  people: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Evaluation:
  """Draws, scores and compares; writes workdir/evaluation/ and summary.json.

  Args:
    config: `eval` and `model` are read. Without candidates: the base model against
      this workdir's own run.
    workdir: gets evaluation/<candidate>/*.png, summary.json, and what
      `evaluation_files.write` writes.

  Raises:
    UserError: unknown scorer, sampler or candidate, no prompts, nothing to compare.
    StoppedEarly: a signal or a STOP file while drawing; what is drawn stays.
  """
  workdir, ev = pathlib.Path(workdir), config.eval
  names = check(config, workdir)
  mesh = parallel.mesh_of(config.mesh)
  judges = scorers.chosen(ev.scorers, ev.scorer_paths, mesh=mesh)
  found = prompt_sets.load(ev.prompts, sha256=ev.prompts_sha256)
  report_prompts(found)
  sampling.refuse_unmet(judges, found.rows)
  descriptions = {judge.name: judge.description() for judge in judges}
  every_case = make_cases(found, ev.seeds, ev.first_seed)
  cases, folders = match_folders(names, every_case, ev.missing)

  images, weights = obtain(config, workdir, names, folders, every_case, cases, mesh)
  scores = score(judges, images, cases)
  pairs = comparisons(list(names), ev.baseline)
  lower = {name for name, said in descriptions.items() if not said["higher_is_better"]}
  rows = compare(config, scores, pairs, cases, lower)
  people = evaluation_people.compare(scores, pairs, cases, lower)
  of_edits = sampling.decided_by(config, [case.asked for case in cases])
  rows = [
    stamp(row, config, found.source, descriptions, weights) | of_edits for row in rows
  ]
  if parallel.is_main_process():
    evaluation_files.write(
      workdir,
      config,
      evaluation_files.Results(
        prompts=found,
        cases=cases,
        left_out=len(every_case) - len(cases),
        locations=names,
        weights=weights,
        folders=folders,
        images=images,
        scores=scores,
        scorers=descriptions,
        lower_is_better=lower,
        rows=rows,
        by_category=compare_categories(config, scores, cases, lower),
      ),
    )
    console.say(typeset.markdown_table(rows, typeset.brief(rows)))
    if people:
      records.write_json(workdir / "evaluation" / "people.json", people)
  prompts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
  return Evaluation(prompts, seeds, cases, images, scores, rows, people)


def check(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, str]:
  """Refuses what can be known to be wrong before anything is loaded.

  Returns:
    candidate -> location, the baseline first.

  Raises:
    UserError: see `run`.
  """
  ev = config.eval
  if not ev.scorers:
    raise UserError(
      f"eval.scorers is empty: expected some of {', '.join(scorers.SCORERS)}."
    )
  for name in ev.protocols:
    protocols.get(name)
  if not ev.protocols:
    raise UserError(
      f"eval.protocols is empty: expected some of {', '.join(protocols.PROTOCOLS)}."
    )
  for key, value, known in (
    ("correction", ev.correction, win_rate.CORRECTIONS),
    ("missing", ev.missing, MISSING),
    ("median_by", ev.median_by or ev.scorers[0], ev.scorers),
  ):
    if value not in known:
      raise unknown_name(f"eval.{key}", value, known)
  if ev.seeds < 1 or ev.first_seed < 0:
    raise UserError(
      f"eval.seeds={ev.seeds}, eval.first_seed={ev.first_seed}: expected at least 1 image "
      "per prompt, and a seed from 0 on."
    )
  if not ev.prompts:
    raise UserError(
      "eval.prompts is empty: expected a prompt file, a published set's name or a tuple of "
      "texts."
    )
  given = {name: str(location) for name, location in ev.candidates.items()}
  given = given or {"base": config.model.path, config.objective.name: str(workdir)}
  candidate_kinds.check(given, ev.baseline, config.model.path)
  evaluation_people.check(ev.told, given)
  return {ev.baseline: given[ev.baseline]} | given


def report_prompts(found: prompt_sets.PromptSet) -> None:
  """Says how many prompts there are, and what is odd about them."""
  odd = {
    "blank (left out)": found.blank,
    "repeated (the later ones get other seeds)": found.repeated,
    "with control characters": found.controls,
    "with half characters (mended)": found.surrogates,
  }
  said = [f"{count} {what}" for what, count in odd.items() if count]
  console.say(f"prompts: {', '.join([str(len(found.texts)), *said])}")
  if found.source != "given" and not found.pinned:
    console.say(
      f"prompt set {found.source}: no hash to compare with; what came is {found.sha256} "
      "(repeat it with eval.prompts_sha256)"
    )


def make_cases(found: prompt_sets.PromptSet, seeds: int, first_seed: int) -> list[Case]:
  """Every prompt with its seeds; a prompt that comes again gets the next ones.

  The initial noise is a function of prompt and seed: the same seeds would give the same
  images again. Different people are drawn the same prompts from the same seeds.
  """
  cases, before = [], collections.Counter()
  for row, asked in enumerate(found.rows):
    start = first_seed + seeds * before[asked.text, asked.user]
    before[asked.text, asked.user] += 1
    cases += [Case(row * seeds + s, row, asked, start + s) for s in range(seeds)]
  return cases


def match_folders(
  names: Mapping[str, str], cases: Sequence[Case], missing: str
) -> tuple[list[Case], dict[str, Matched]]:
  """Finds the images of candidates that are folders of images.

  Returns:
    The cases that all of them have, and what each folder has.

  Raises:
    UserError: images are missing or cannot be read, and `missing` is "refuse"; or there
      is no case that all have.
  """
  folders, lacking = {}, set()
  for name, location in names.items():
    if candidate_kinds.kind(location) != "images":
      continue
    folder = pathlib.Path(location)
    matched = folders[name] = image_folders.match(folder, cases)
    if missing == "refuse":
      image_folders.refuse(name, folder, matched, len(cases))
    if matched.lacking():
      console.warn(
        f"{name}: {len(matched.missing)} images are missing and "
        f"{len(matched.unreadable)} cannot be read; these pairs are left out for all "
        "candidates"
      )
    lacking |= matched.lacking()
  kept = [case for case in cases if case.index not in lacking]
  if not kept:
    raise UserError(
      "no prompt and seed is left that every candidate has an image of. Images are found "
      "by number (00000.png is the first seed of the first prompt) or by index.jsonl."
    )
  return kept, folders


def obtain(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  names: Mapping[str, str],
  folders: Mapping[str, Matched],
  every_case: Sequence[Case],
  cases: Sequence[Case],
  mesh: Any,
) -> tuple[dict[str, ImageFiles], dict[str, str]]:
  """Draws or finds every candidate's images.

  Returns:
    candidate -> images of `cases`, and candidate -> words that identify its weights.
  """
  pairs = json.dumps([[case.prompt, case.seed] for case in every_case])
  settings = {key: config.eval[key] for key in DRAWING_KEYS}
  settings["prompts"] = hashlib.sha256(pairs.encode()).hexdigest()[:16]
  people = sampling.people_of(config)
  images, weights, generator = {}, {}, None
  with StopRequests(workdir, max_minutes=0, began=time.monotonic()) as stop:
    for name, location in names.items():
      if name in folders:
        images[name] = ImageFiles([folders[name].paths[case.index] for case in cases])
        weights[name] = f"images in {location}"
        continue
      if generator is None:
        generator = sampling.make_generator(config, mesh)
        settings["pipeline"] = sampling.pipeline_identity(config)
      params, weights[name] = candidate_kinds.load_params(
        location, mesh, config.model.path
      )
      candidate_kinds.refuse_other_architecture(
        params, generator.unet.abstract_params, location
      )
      folder = workdir / "evaluation" / candidate_kinds.folder_name(name)
      how = config.eval.told.get(name, "own")
      told = evaluation_people.as_told(how, every_case)
      decided = sampling.decided_by(config, [case.asked for case in told])
      drawn = drawing.draw(
        generator, params, folder, [told[case.index] for case in cases], label=name,
        settings=settings | decided | {"weights": weights[name]},
        stop=stop, people=people,
      )  # fmt: skip
      images[name] = drawn
      del params  # before the next candidate's
  return images, weights


def score(
  judges: Sequence[Scorer], images: Mapping[str, ImageFiles], cases: Sequence[Case]
) -> dict[str, dict[str, np.ndarray]]:
  """Scores every image by every scorer, a batch of files at a time.

  One scorer after the other, so that only one's weights are in memory.

  Returns:
    candidate -> scorer -> [n] fp64.
  """
  scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in images}
  total = len(judges) * len(images) * len(cases)
  progress, done = console.Progress("scoring", total, "images"), 0
  for judge in judges:
    for name, files in images.items():
      values = scores[name][judge.name] = np.full(len(cases), np.nan)
      for places, pixels in files.batches(SCORED_AT_ONCE):
        inputs = {
          key: [of(name, cases[i], files.paths[i]) for i in places]
          for key, of in INPUTS.items()
        }
        asked = [cases[i].asked for i in places]
        inputs |= sampling.told(judge, asked, min(pixels.shape[1:3]))
        values[places] = judge(pixels, [row.text for row in asked], **inputs)
        done += len(places)
        progress.update(done)
    judge.release()
  return scores


def comparisons(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
  """Everyone against the baseline, then the others head to head, later against earlier.

  >>> comparisons(["base", "dpo", "lpo"], "base")
  [('dpo', 'base'), ('lpo', 'base'), ('lpo', 'dpo')]
  """
  others = [name for name in names if name != baseline]
  head_to_head = [(b, a) for i, a in enumerate(others) for b in others[i + 1 :]]
  return [(name, baseline) for name in others] + head_to_head


def compare(
  config: ml_collections.ConfigDict,
  scores: Scores,
  pairs: Sequence[tuple[str, str]],
  cases: Sequence[Case],
  lower_is_better: set[str],
) -> list[dict[str, Any]]:
  """All comparisons under all protocols, their sign tests corrected as one family."""
  ev, rows = config.eval, []
  numbers = [case.row for case in cases]
  keys = {case.row: case.asked.key for case in cases}
  for name in ev.protocols:
    chosen = protocols.get(name)(scores, numbers, ev.median_by)
    seeds = None
    if chosen.image is not None:
      seeds = [cases[i].seed for i in chosen.image]
    made = win_rate.rows(
      chosen.scores,
      pairs,
      [keys[number] for number in chosen.prompt],
      seeds=seeds,
      lower_is_better=lower_is_better,
    )
    rows += [{**row, "protocol": name} for row in made]
  return win_rate.correct(rows, ev.correction)


def compare_categories(
  config: ml_collections.ConfigDict,
  scores: Scores,
  cases: Sequence[Case],
  lower_is_better: set[str],
) -> list[dict[str, Any]]:
  """Everyone against the baseline within each category, as a family of its own."""
  names = list(dict.fromkeys(case.category for case in cases))
  pairs = comparisons(list(scores), config.eval.baseline)[: len(scores) - 1]
  rows = []
  for category in names if any(names) else ():
    places = [i for i, case in enumerate(cases) if case.category == category]
    within = {
      name: {scorer: values[places] for scorer, values in by_scorer.items()}
      for name, by_scorer in scores.items()
    }
    own = [cases[i] for i in places]
    made = win_rate.rows(
      within,
      pairs,
      [case.asked.key for case in own],
      seeds=[case.seed for case in own],
      lower_is_better=lower_is_better,
    )
    rows += [{"category": category, **row, "protocol": "same_seed"} for row in made]
  return win_rate.correct(rows, config.eval.correction)


def stamp(
  row: Mapping[str, Any],
  config: ml_collections.ConfigDict,
  prompt_set: str,
  descriptions: Mapping[str, Mapping[str, Any]],
  weights: Mapping[str, str],
) -> dict[str, Any]:
  """Adds to a row all that its numbers hang on, so that it can stand alone."""
  ev, scorer = config.eval, descriptions[row["scorer"]]
  return {
    **row,
    "sampler": ev.sampler,
    "steps": ev.steps,
    "guidance_scale": ev.guidance_scale,
    "images_per_prompt": ev.seeds,
    "first_seed": ev.first_seed,
    "prompt_set": prompt_set,
    **{f"scorer_{key}": scorer[key] for key in scorer if key != "name"},
    "weights_candidate": weights[row["candidate"]],
    "weights_baseline": weights[row["baseline"]],
  }
