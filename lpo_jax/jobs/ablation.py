"""The ablation job: methods at several betas and seeds, compared on their frontiers.

In the quickstart's world, by the ordinary jobs. Every (arm, beta, seed) is a run in its
own folder and is not run again when it is done. A seed has its own candidates, people
and cache, which its runs share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.data import prompts as prompt_sets
from lpo_jax.data.pipeline import Batches
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import (
  ablation_report,
  blueprint,
  cache,
  candidates,
  evaluate,
  quickstart,
  run_identity,
  sampling,
  train,
)
from lpo_jax.jobs.quickstart_report import LEGIBILITY, TASTE
from lpo_jax.objectives.lists import standing_metrics
from lpo_jax.scoring import scorers, win_rate
from lpo_jax.scoring.frontier import Point
from lpo_jax.training import step as step_lib

DRIFT_UPDATES = 4  # drift is measured on as many images as so many updates have


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run of the ablation.

  Attributes:
    arm: which method.
    beta: its temperature.
    seed: of its world and its training.
    config: an ordinary train config.
    folder: its workdir.
  """

  arm: str
  beta: float
  seed: int
  config: ml_collections.ConfigDict
  folder: pathlib.Path

  @property
  def name(self) -> str:
    """How it is called on the screen."""
    return f"{self.arm}, beta {self.beta:g}, seed {self.seed}"


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Point]:
  """Runs what is not done yet; writes report.html, table.md and points.json.

  Args:
    config: `quickstart.methods` are the arms; `betas` and `seeds` multiply them.
    workdir: gets seed0/, seed1/, ... with the runs in them, and the report.

  Returns:
    Every checkpoint of every run, measured.

  Raises:
    UserError: a setting that no run can have, before the first one begins.
    StoppedEarly: a signal or a STOP file; what is done stays.
  """
  workdir = pathlib.Path(workdir)
  check(config)
  config.model.path = str(quickstart.base_folder(config))
  runs = plan(config, workdir)
  for one in runs:
    blueprint.check_settings(one.config)
  run_identity.remember_config(config, workdir)
  console.say(estimate(config, runs))
  stages = quickstart.Stages(workdir)
  for seed in config.quickstart.seeds:
    own = [one for one in runs if one.seed == seed]
    with stages.stage(f"world of seed {seed}"):
      quickstart.make_judgements(world_config(config, seed), workdir / f"seed{seed}")
      for one in own:
        if one.beta == own[0].beta:  # lists do not depend on it
          cache.run(one.config, workdir)
  meter = Meter(config, workdir)
  points = []
  for done, one in enumerate(runs):
    with stages.stage(f"train {one.name}"):
      train.run(one.config, one.folder)
    with stages.stage(f"evaluate {one.name}"):
      points += meter.measure(one)
    console.say(f"{done + 1} of {len(runs)} runs are done")
  if parallel.is_main_process():
    rows = [dataclasses.asdict(p) for p in points]
    (workdir / "points.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    ablation_report.write(config, workdir, points, timings=stages.seconds)
    console.say(f"\nreport: {workdir / 'report.html'}")
    console.say(f"tables: {workdir / 'table.md'}")
  return points


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a world that is no ablation.

  Raises:
    UserError: no arms, betas or seeds, a panel with an unknown arm, other scorers.
  """
  world = config.quickstart
  for key in ("methods", "betas", "seeds"):
    if not world.get(key):
      raise UserError(
        f"quickstart.{key} is empty; the ablation job runs every arm with every beta and "
        "seed. Start from configs/ablation_ranks.py."
      )
  for panel, arms in world.panels.items():
    for arm in arms:
      if arm not in world.methods:
        raise unknown_name(f"arm in quickstart.panels.{panel}", arm, world.methods)
  missing = {TASTE, LEGIBILITY} - set(config.eval.scorers)
  if missing:
    raise UserError(
      f"eval.scorers lacks {', '.join(sorted(missing))}: the ablation shows what is "
      "gained under the taste against the legibility that is lost."
    )


def plan(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Run]:
  """All runs, beta by beta: those of the first one have arms and seeds to compare."""
  world, made, commons = config.quickstart, [], {}
  for seed in world.seeds:
    commons[seed] = world_config(config, seed)
    path = workdir / f"seed{seed}" / "judgements" / "judgements.parquet"
    commons[seed].data.path = str(path)
  for beta in world.betas:
    for seed, common in commons.items():
      place = workdir / f"seed{seed}"
      for arm in world.methods:
        own = quickstart.method_config(common, place, arm)
        own.objective.beta = float(beta)
        made.append(Run(arm, float(beta), seed, own, place / f"{arm}_beta{beta:g}"))
  return made


def world_config(config: ml_collections.ConfigDict, seed: int):
  """The config with one of the ablation's seeds."""
  own = config.copy_and_resolve_references()
  own.seed = seed
  return own


def estimate(config: ml_collections.ConfigDict, runs: Sequence[Run]) -> str:
  """Says how many runs are to come and about how long they take, in words."""
  world, steps = config.quickstart, config.train.total_steps
  left = [one for one in runs if not (one.folder / "points.json").exists()]
  checkpoints = -(-steps // config.train.checkpoint_every)
  trained = steps * config.train.images_per_update
  drawn = checkpoints * len(prompt_sets.read(config.eval.prompts)) * config.eval.seeds
  each = trained / world.pace.trained + drawn / world.pace.drawn + world.pace.overhead
  return (
    f"{len(world.methods)} arms x {len(world.betas)} betas x {len(world.seeds)} seeds = "
    f"{len(runs)} runs, {len(left)} of them to do. Each trains on {trained} images and "
    f"draws {drawn}: about {console.clock(each)} a run and "
    f"{console.clock(each * len(left))} in all, at the pace that configs/ablation_ranks.py "
    "names. Stop it when you like; the same command goes on."
  )


class Meter:
  """Measures checkpoints: drift on fixed images and noise, scores of the same seeds.

  Args:
    config: the ablation's.
    workdir: the ablation's.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
    self._config, self._workdir = config, workdir
    self._mesh = parallel.mesh_of(config.mesh)
    self._judges = [scorers.get(name) for name in (TASTE, LEGIBILITY)]
    texts, ev = prompt_sets.read(config.eval.prompts), config.eval
    self._prompts = [text for text in texts for _ in range(ev.seeds)]
    self._seeds = [ev.first_seed + s for _ in texts for s in range(ev.seeds)]
    self._generator = self._base = self._base_scores = None
    self._drift: dict[int, Any] = {}

  def measure(self, one: Run) -> list[Point]:
    """Returns the points of a run's checkpoints; those in points.json are not remade."""
    steps = blueprint.saved_steps(one.folder)
    file, settings = one.folder / "points.json", self._settings(steps)
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if known.get("settings") != settings:
      self._prepare()
      found = [dataclasses.asdict(self._point(one, step)) for step in steps]
      known = {"settings": settings, "points": found}
      parallel.barrier("points measured")
      if parallel.is_main_process():
        file.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    return [Point(**row) for row in known["points"]]

  def _settings(self, steps: Sequence[int]) -> dict[str, Any]:
    drawing = {key: self._config.eval[key] for key in evaluate.DRAWING_KEYS}
    prompts = hashlib.sha256("\0".join(self._prompts).encode()).hexdigest()[:16]
    model = sampling.pipeline_identity(self._config)
    return {**drawing, "prompts": prompts, "model": model, "steps": list(steps)}

  def _prepare(self) -> None:
    """Loads, compiles and draws what all runs share, when first needed."""
    if self._generator is not None:
      return
    self._generator = sampling.make_generator(self._config, self._mesh)
    base = self._config.model.path
    self._base, _ = candidates.load_params(base, self._mesh)
    self._base_scores = self._scores(self._base)

  def _scores(self, params: Any) -> dict[str, np.ndarray]:
    images = self._generator(params, self._prompts, self._seeds)
    return {judge.name: judge(images, self._prompts) for judge in self._judges}

  def _point(self, one: Run, step: int) -> Point:
    params, _ = candidates.load_params(f"{one.folder}@{step}", self._mesh)
    mine, theirs = self._scores(params), self._base_scores
    won = win_rate.win_rate(mine[TASTE], theirs[TASTE], resamples=1).win_rate
    gained = float(np.mean(mine[TASTE]) - np.mean(theirs[TASTE]))
    lost = float(np.mean(theirs[LEGIBILITY]) - np.mean(mine[LEGIBILITY]))
    return Point(
      one.arm,
      one.beta,
      one.seed,
      step,
      drift=float(self._drift_of(one)(params, self._base)),
      won=won,
      gained=gained,
      lost=lost,
    )

  def _drift_of(self, one: Run):
    """(policy, reference) -> drift on a seed's images, the same for all its runs."""
    if one.seed not in self._drift:
      first = plan(self._config, self._workdir)
      first = next(r for r in first if r.seed == one.seed)
      self._drift[one.seed] = drift_meter(first.config, first.folder, self._mesh)
    return self._drift[one.seed]


def drift_meter(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
):
  """Returns (params, ref_params) -> mean (pred - ref_pred)^2 on fixed noised images.

  What training logs is of the weights in training, each run on its own lists; this is of
  the weights that are drawn with, for all runs on the same images, timesteps and noise.
  """
  run_blueprint = blueprint.make_blueprint(config, mesh)
  method, opened = run_blueprint.method, cache.open_for(config, workdir)
  batches = Batches(
    opened,
    images_per_update=DRIFT_UPDATES * config.train.images_per_update,
    seed=config.seed,
    caption_dropout=0.0,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  try:
    batch = parallel.global_batch(mesh, next(batches))
  finally:
    batches.close()
    opened.close()

  def drift(params, ref_params, batch):
    noised = method.noising(
      batch, method.schedule, config.seed, scaling_factor=method.scaling_factor
    )
    scalars = step_lib.denoise(
      method.unet, params, ref_params, noised, batch.conditioning
    )
    return standing_metrics(step_lib.to_lists(scalars, batch.slot), batch.ranking)[
      "drift"
    ]

  compiled = jax.jit(drift)
  return lambda params, ref_params: compiled(params, ref_params, batch)
