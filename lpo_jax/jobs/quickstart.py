"""The quickstart job: from a base model and judgements to a report, in minutes on a CPU.

Every stage is the ordinary job or module that an SD1.5 run uses; only the world (digits,
simulated people) is small.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pathlib
import time
from collections.abc import Iterator
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
  quickstart_base,
  quickstart_people,
  quickstart_report,
  run_identity,
  sampling,
  select,
  train,
)
from lpo_jax.jobs import candidates as candidate_kinds
from lpo_jax.scoring import digits
from lpo_jax.training.report import read_metrics

SHIPPED_BASE = pathlib.Path(__file__).parent.parent / "assets" / "digits_base"


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
  world = config.quickstart
  base = base_folder(config)
  for method in world.methods:
    own = method_config(config, workdir, method)
    own.model.path = str(base)
    blueprint.check_settings(own)
  run_identity.remember_config(config, workdir)
  config.model.path = str(base)
  stages = Stages(workdir)

  with stages.stage("candidates and judgements"):
    config.data.path = str(make_judgements(config, workdir))
  with stages.stage("inspect"):
    data_report = inspect.run(config, workdir)
  runs = {method: method_config(config, workdir, method) for method in world.methods}
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
    config.eval.candidates = candidates(base, runs, workdir)
    evaluation = evaluate.run(config, workdir)
  published = world.publish
  runs[published].export.evaluation = str(workdir)
  with stages.stage(f"export {published}"):
    exported = export.run(runs[published], workdir / published)
  if parallel.is_main_process():
    quickstart_report.write(
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


class Stages:
  """Times the stages and remembers the times over restarts.

  Several processes may share the file, as those of an ablation do that have a seed each.
  """

  def __init__(self, workdir: pathlib.Path):
    self._file = workdir / "timings.json"
    self.seconds: dict[str, float] = self._read()

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Announces a stage, times it, and adds to what earlier sessions spent on it."""
    console.say(f"\n== {name}")
    began = time.monotonic()
    yield
    spent = time.monotonic() - began
    self.seconds |= self._read()
    self.seconds[name] = self.seconds.get(name, 0.0) + spent
    if parallel.is_main_process():
      partial = self._file.with_suffix(f".{os.getpid()}")
      partial.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")
      partial.replace(self._file)

  def _read(self) -> dict[str, float]:
    return json.loads(self._file.read_text("utf-8")) if self._file.exists() else {}


def base_folder(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns the base pipeline: the config's, or the one that ships."""
  if config.model.path:
    return pathlib.Path(config.model.path)
  if not SHIPPED_BASE.is_dir():
    raise UserError(
      f"the base model that ships with lpo_jax is missing at {SHIPPED_BASE}; make it "
      "with: python -m lpo_jax.main --config configs/quickstart_base.py --workdir "
      "runs/quickstart_base, and give its folder as --config.model.path."
    )
  console.say(
    f"base model: the one that ships ({SHIPPED_BASE}); it was made from real digits by "
    "configs/quickstart_base.py, which can make it again (see its README.md)"
  )
  return SHIPPED_BASE


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
  # Seeds far from those of the evaluation, which start at eval.first_seed.
  seeds = [1_000_000 * (1 + config.seed) + i for i in range(len(prompts))]
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
  generator = sampling.make_generator(config, mesh)
  progress = console.Progress("drawing candidates", len(prompts), "images")
  params, _ = candidate_kinds.load_params(config.model.path, mesh)
  images = generator(params, prompts, seeds, on_progress=progress.update)
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
  base: pathlib.Path, runs: dict[str, Any], workdir: pathlib.Path
) -> ml_collections.ConfigDict:
  """Base, every method's last checkpoint, and the faster mover cut back to equal drift.

  A method must not win by merely moving further: the one that drifted most from the
  base is also shown at the checkpoint whose drift is nearest the other's final one.
  """
  named = {"base": str(base)}
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
