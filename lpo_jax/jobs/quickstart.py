"""The quickstart job: from a base model and judgements to a report, in minutes on a CPU.

Every stage is the ordinary job or module that an SD1.5 run uses; only the world (digits,
simulated people) is small.
"""

from __future__ import annotations

import copy
import functools
import pathlib
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import (
  blueprint,
  cache,
  evaluate,
  export,
  inspect,
  personal_report,
  quickstart_base,
  quickstart_edits,
  quickstart_people,
  quickstart_personal,
  quickstart_report,
  run_identity,
  select,
  train,
)
from lpo_jax.jobs.quickstart_world import (
  SHIPPED_BASE,
  Stages,
  World,
  base_folder,
  draw_candidates,
)
from lpo_jax.scoring import digits
from lpo_jax.training.report import read_metrics
from lpo_jax.types import Prompt

__all__ = ["SHIPPED_BASE", "WORLDS", "Stages", "base_folder", "run"]


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Runs the stages that are not done yet; writes report.html and summary.json.

  Args:
    config: `quickstart` describes the world, the rest what every run has.
    workdir: gets everything.
  """
  workdir = pathlib.Path(workdir)
  if config.quickstart.make == "base":
    quickstart_base.run(config, workdir)
    return
  if config.quickstart.make != "report":
    raise UserError(
      f"quickstart.make={config.quickstart.make!r}: expected 'report' or 'base'."
    )
  settings = config.quickstart
  name = settings.get("world", "digits")
  if name not in WORLDS:
    raise unknown_name("quickstart.world", name, WORLDS)
  world, stages = WORLDS[name], Stages(workdir)
  base = world.base(config, workdir, stages)
  for method in settings.methods:
    own = method_config(config, workdir, method)
    own.model.path = str(base)
    blueprint.check_settings(own)
  run_identity.remember_config(config, workdir)
  config.model.path = str(base)

  with stages.stage("candidates and judgements"):
    config.data.path = str(world.judge(config, workdir))
  with stages.stage("inspect"):
    data_report = inspect.run(config, workdir)
  runs = {method: method_config(config, workdir, method) for method in settings.methods}
  for method, own in runs.items():
    if own.online:
      with stages.stage(f"experts of {method}"):
        choose_experts(own, workdir / f"experts_{method}")
  with stages.stage("cache"):
    for own in runs.values():
      cache.run(own, str(workdir))
  for method, own in runs.items():
    with stages.stage(f"train {method}"):
      train.run(own, workdir / method)
  with stages.stage("evaluate"):
    config.eval.candidates = world.candidates(base, runs, workdir)
    evaluation = evaluate.run(config, workdir)
  published = settings.publish
  runs[published].export.evaluation = str(workdir)
  with stages.stage(f"export {published}"):
    exported = export.run(runs[published], workdir / published)
  if parallel.is_main_process():
    world.write(
      config,
      workdir,
      evaluation=evaluation,
      data_report=data_report,
      runs={name: read_metrics(workdir / name / "metrics.jsonl") for name in runs},
      timings=stages.seconds,
      exported=exported,
    )
    console.say(f"\ndone in {console.clock(sum(stages.seconds.values()))}")
    console.say(f"report:  {workdir / 'report.html'}")
    console.say(f"figures: {workdir / 'summary.json'}")
    console.say(f"model:   {exported['path']} (a diffusers folder)")


def method_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, method: str
) -> ml_collections.ConfigDict:
  """The config of one training run: the same but for what the method needs."""
  own = copy.deepcopy(config)
  own.job = "train"
  own.data.cache = str(workdir / "cache")
  with own.unlocked():
    own.update(config.quickstart.methods[method])
  own.quickstart = ml_collections.ConfigDict()
  own.eval.candidates = ml_collections.ConfigDict()
  return own


def choose_experts(own: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """Makes the best of the judged images the data of an online method."""
  own.select.path = str(folder / "experts.parquet")
  select.run(own, folder)
  own.data.path, own.data.source = own.select.path, "lists"
  own.data.strategy, own.data.cache = "winners", str(folder / "cache")


def make_judgements(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path:
  """Draws candidates with the base model and lets simulated people compare them."""
  world, path = config.quickstart, workdir / "judgements" / "judgements.parquet"
  if world.judging not in JUDGING:
    raise unknown_name("quickstart.judging", world.judging, JUDGING)
  if path.exists():
    console.say(f"judgements are there: {path}")
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  texts = digits.prompts(digits.TRAIN_PHRASES)
  per_session = world.images_per_session
  prompts = [
    texts[s % len(texts)] for s in range(world.sessions) for _ in range(per_session)
  ]
  images = draw_candidates(config, [Prompt(text) for text in prompts])
  scores = digits.taste(images, prompts)
  said = JUDGING[world.judging](config, path, scores, images, prompts)
  parallel.barrier("judgements written")
  console.say(f"{said} of {len(images)} images in {world.sessions} sessions: {path}")
  return path


def _compare(config, path, scores, images, prompts) -> str:
  """Writes comparisons of two, the winner stays; returns how many in words."""
  world = config.quickstart
  judgements = quickstart_people.judge(
    scores,
    images_per_session=world.images_per_session,
    users=world.users,
    temperature=world.temperature,
    tie_rate=world.tie_rate,
    seed=config.seed,
  )
  if parallel.is_main_process():
    quickstart_people.write_parquet(
      path, judgements, images, prompts, model="lpo_jax/digits_base"
    )
  ties = sum(j.label == 0.5 for j in judgements)
  return f"{len(judgements)} judgements ({ties} ties) by {world.users} simulated people"


def _rank(config, path, scores, images, prompts) -> str:
  """Writes rankings of whole sessions; returns how many in words."""
  world = config.quickstart
  rankings = quickstart_people.rank(
    scores,
    images_per_session=world.images_per_session,
    temperature=world.temperature,
    seed=config.seed,
  )
  if parallel.is_main_process():
    quickstart_people.write_rankings(
      path, rankings, images, prompts, model="lpo_jax/digits_base"
    )
  return f"{len(rankings)} rankings by simulated people"


# What people do with the candidates of a session: quickstart.judging.
JUDGING = {"compare": _compare, "rank": _rank}


def candidates(
  base: pathlib.Path,
  runs: dict[str, Any],
  workdir: pathlib.Path,
  *,
  baseline: str = "base",
) -> ml_collections.ConfigDict:
  """Base, every method's last checkpoint, and the faster mover cut back to equal drift.

  A method must not win by merely moving further: the one that drifted most from the
  base is also shown at the checkpoint whose drift is nearest the other's final one.
  """
  named = {baseline: str(base)}
  named |= {method: str(workdir / method) for method in runs}
  if len(runs) == 2:
    drifts = {name: drift_curve(workdir / name) for name in runs}
    slow, fast = sorted(drifts, key=lambda name: drifts[name][-1])
    saved = blueprint.saved_steps(workdir / fast)
    step = min(saved, key=lambda s: abs(drifts[fast][s - 1] - drifts[slow][-1]))
    if step != max(saved):
      named[f"{fast}, drift of {slow}"] = f"{workdir / fast}@{step}"
  return ml_collections.ConfigDict(named)


def drift_curve(run: pathlib.Path, window: int = 11) -> np.ndarray:
  """A run's drift by update, as a running mean over `window` updates."""
  values = np.array([row["drift"] for row in read_metrics(run / "metrics.jsonl")])
  ends = np.arange(1, len(values) + 1)
  total = np.concatenate([[0.0], np.cumsum(values)])
  starts = np.maximum(ends - window, 0)
  return (total[ends] - total[starts]) / (ends - starts)


# quickstart.world -> what it does differently.
WORLDS: dict[str, World] = {
  "digits": World(
    base=lambda config, workdir, stages: base_folder(config),
    judge=make_judgements,
    candidates=candidates,
    write=quickstart_report.write,
  ),
  "edits": World(
    base=quickstart_edits.make_base,
    judge=quickstart_edits.make_judgements,
    candidates=functools.partial(candidates, baseline="sft"),
    write=functools.partial(quickstart_report.write, words=quickstart_edits.WORDS),
  ),
  "personal": World(
    base=quickstart_personal.make_base,
    judge=quickstart_personal.make_judgements,
    candidates=quickstart_personal.candidates,
    write=personal_report.write,
  ),
}
