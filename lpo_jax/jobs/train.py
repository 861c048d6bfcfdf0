"""The train job: cache and base model in, checkpoints and metrics out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from lpo_jax import console, parallel, pretrained
from lpo_jax.data.pipeline import Batches
from lpo_jax.errors import StoppedEarly
from lpo_jax.jobs import blueprint as blueprints
from lpo_jax.jobs import cache as cache_job
from lpo_jax.jobs import (
  compiling,
  plan_chips,
  plan_step,
  reference,
  run_identity,
  run_report,
)
from lpo_jax.jobs.sampling import RunSamples
from lpo_jax.jobs.stops import StopRequests
from lpo_jax.jobs.watchdog import Watchdog
from lpo_jax.training import alarms as alarms_lib
from lpo_jax.training import guard as guards
from lpo_jax.training import held_out as held_out_lib
from lpo_jax.training import online as online_lib
from lpo_jax.training import state as state_lib
from lpo_jax.training import step as step_lib
from lpo_jax.training import wandb_run
from lpo_jax.training.checkpoint import Checkpoints
from lpo_jax.training.report import Report


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains until `train.total_steps` updates are completed; resumes what is there.

  Args:
    config: the resolved config.
    workdir: gets config.json, checkpoints/, metrics.jsonl, tensorboard/ and report.html.

  Returns:
    The last metrics, and how long compiling and training took in seconds.

  Raises:
    UserError: a config, cache or model that cannot be used, a workdir that holds another
      run, a NaN or runaway that is to stop the run, or a disk that is full.
    StoppedEarly: a signal, a STOP file or the time budget; the run is saved.
  """
  workdir = pathlib.Path(workdir)
  mesh = parallel.mesh_of(config.mesh)
  train = config.train
  blueprints.check_settings(config)
  step_lib.check_batch_arithmetic(mesh, train.images_per_update, train.microbatch)
  with run_identity.only_session(workdir), run_report.afterwards(workdir):
    run_identity.set_aside_broken_config(workdir)
    run_identity.refuse_other_run(config, workdir)
    checkpoints = Checkpoints(
      workdir / "checkpoints",
      keep_last=train.keep_last,
      keep_every=train.keep_every,
      keep_best=train.keep_best,
      best_metric=train.best_metric,
    )
    try:
      if checkpoints.latest is not None and checkpoints.latest >= train.total_steps:
        console.say(f"already trained to step {checkpoints.latest}: {workdir}")
        run_identity.remember_config(config, workdir)
        return {"step": checkpoints.latest}
      with contextlib.closing(cache_job.open_for(config, workdir)) as cache:
        return _train(config, workdir, mesh, cache, checkpoints)
    finally:
      checkpoints.close()


def _train(
  config: Any, workdir: pathlib.Path, mesh: Any, cache: Any, checkpoints: Checkpoints
) -> dict[str, Any]:
  """Puts the run together, from its latest checkpoint if it has one, and runs it."""
  train, latest = config.train, checkpoints.latest
  prints = run_identity.fingerprint(config, cache.lists)
  if latest is not None:
    meta = checkpoints.meta(latest)
    run_identity.refuse_other_checkpoint(config, prints, meta, workdir)
  references = reference.open_for(config, workdir, cache)
  batches = blueprints.make_batches(config, cache, references)
  with contextlib.closing(batches):
    blueprint = blueprints.make_blueprint(config, mesh)
    # No name is given to the base: what neither tree needs of it is let go.
    trainable, frozen = blueprint.begin(
      pretrained.load(config.model.path, "unet", sharding=blueprint.shardings).params,
      mesh,
    )
    online = blueprints.make_online(config, mesh, blueprint, frozen, batches)
    # Only now: what cannot start claims no workdir.
    run_identity.remember_config(config, workdir)
    guard = guards.Guard(factor=train.runaway_factor, steps=train.runaway_steps)
    alarms = alarms_lib.Alarms(train.alarms)
    if latest is None:
      state = state_lib.place(blueprint.like, trainable, blueprint.optimizer)
    else:
      state, meta = checkpoints.restore(blueprint.like, latest)
      batches.set_state(meta["data"])
      online.restore(checkpoints.restore_online(online.like, latest))
      if "guard" in meta:
        guard.set_state(meta["guard"])
      if "alarms" in meta:
        alarms.set_state(meta["alarms"])
      console.say(f"resuming from step {latest} of {train.total_steps}")
    del trainable
    say_arithmetic(config, mesh, cache, batches)
    session = Session(
      config=config,
      workdir=workdir,
      mesh=mesh,
      blueprint=blueprint,
      frozen=frozen,
      batches=batches,
      online=online,
      checkpoints=checkpoints,
      guard=guard,
      alarms=alarms,
      held_out=blueprints.make_held_out(config, mesh, blueprint, cache),
      identity=run_identity.describe(config, prints),
      state=state,
    )
    del state  # the session's alone: each step donates it
    with contextlib.closing(session.report):
      return session.run()


def say_arithmetic(config: Any, mesh: Any, cache: Any, batches: Batches) -> None:
  """Prints what one update is made of, before anything is compiled."""
  train = config.train
  mean_size = float(np.mean(cache.lists.lengths))
  per_device = train.images_per_update // mesh.size
  count = train.images_per_update // (train.microbatch or train.images_per_update)
  epochs = train.total_steps / max(
    batches.lists_per_epoch * mean_size / blueprints.slots_of_data(config), 1e-9
  )
  console.say(
    f"{config.objective.name}: {train.images_per_update} images an update = "
    f"{mesh.size} device(s) x {count} microbatch(es) x {per_device // count} images; "
    f"{batches.lists_per_epoch} lists of {mean_size:.2f} images; "
    f"{train.total_steps} updates are about {epochs:.1f} epochs"
  )
  shares = {"prompt": config.data.held_out, "person": config.data.held_out_users}
  by = " and ".join(name for name, share in shares.items() if share)
  if by:
    left_out = len(cache.lists) - batches.lists_per_epoch
    console.say(
      f"held out: {left_out} of {len(cache.lists)} lists, by {by}; never trained on"
    )


def say_drawn(batches: Batches) -> None:
  """Prints how often each source of a mixture was drawn from."""
  if len(batches.drawn) > 1:
    sources = (
      f"{name} {n['lists']} lists ({n['share']:.1%}), {n['epochs']:.2f} epochs"
      for name, n in batches.drawn.items()
    )
    console.say(f"drawn: {'; '.join(sources)}")


def _compute(config: Any, mesh: Any) -> dict[str, float]:
  """What the report needs for the model FLOP utilisation; nothing where it is unknown."""
  peak = plan_chips.peak_of(mesh.devices.flat[0].device_kind)
  if peak is None:
    return {}
  # One more trace of the step, only where there is something to divide it by.
  needed = plan_step.needed_flops(config, mesh)
  return {"needed_flops": float(needed), "peak": peak * mesh.size}


@dataclasses.dataclass
class Session:
  """One process's part of a run, from here to the end or a reason to stop.

  Attributes:
    config: the run's.
    workdir: the run's.
    mesh: the run's.
    blueprint: the run's.
    frozen: what no step changes.
    batches: stands before the next update.
    online: likewise.
    checkpoints: of the workdir.
    guard: has seen every step before.
    alarms: likewise.
    held_out: measures on lists never trained on.
    identity: whose the checkpoints are.
    state: after the last update.
  """

  config: Any
  workdir: pathlib.Path
  mesh: Any
  blueprint: blueprints.Blueprint
  frozen: Any
  batches: Batches
  online: online_lib.Offline | online_lib.Online
  checkpoints: Checkpoints
  guard: guards.Guard
  alarms: alarms_lib.Alarms
  held_out: held_out_lib.HeldOut | None
  identity: dict[str, Any]
  state: state_lib.TrainState

  def __post_init__(self):
    config, train = self.config, self.config.train
    self._began = time.monotonic()
    self._step = int(self.state.step)
    # Steps are judged one step late, and what a rollback leaves out ends with the step
    # that was judged: step -> where the data stood after it.
    self._positions = {self._step: self.batches.get_state()}
    self._stop = StopRequests(
      self.workdir, max_minutes=train.max_minutes, began=self._began, in_step=True
    )
    self._watchdog = Watchdog(
      self.workdir, minutes=train.hang_minutes, on_hang=train.on_hang
    )
    drawing = config.eval.every and (config.eval.prompts or not self.held_out)
    self._samples = RunSamples(config, self.workdir, self.mesh) if drawing else None
    self.report = Report(
      self.workdir,
      total_steps=train.total_steps,
      images_per_update=train.images_per_update,
      start_step=self._step,
      every=train.log_every,
      label=f"training {config.objective.name}",
      on_nonfinite=train.on_nonfinite,
      watch=self._judge,
      **_compute(config, self.mesh),
      wandb=wandb_run.begin(
        config.logging.wandb, self.workdir, self.identity["config"]
      ),
    )

  def run(self) -> dict[str, Any]:
    """Runs updates; returns the last metrics and where the time went."""
    total = self.config.train.total_steps
    self._batch = self._next_batch()
    compiled = self._compile()
    compile_seconds = time.monotonic() - self._began
    self.report.restart_clock()
    began_training = time.monotonic()
    if guards.goes_back(self.config.train) and self.checkpoints.latest is None:
      self._save()  # what to go back to, before there is any other
    with self._stop, self._watchdog:
      while self._step < total:
        try:
          self._update(compiled)
          self._between()
        except guards.GoBack as e:
          self._go_back(e.finding)
    self.checkpoints.wait()
    say_drawn(self.batches)
    return {
      "step": self._step,
      **self.report.last,
      "compile_seconds": compile_seconds,
      "train_seconds": time.monotonic() - began_training,
      "rollouts_seconds": self.online.seconds,  # of train_seconds
      "epochs": self.batches.epochs_seen,
      "slot_utilisation": self.batches.utilisation,
      "drawn": self.batches.drawn,
    }

  def _compile(self) -> Any:
    train = self.config.train
    with compiling.said(self.workdir, "train step"):
      return step_lib.compile_train_step(
        self.mesh,
        self.state,
        self.frozen,
        self.online.completed(self._batch),
        method=self.blueprint.method,
        optimizer=self.blueprint.optimizer,
        ema_decay=state_lib.ema_schedule(train.ema_schedule, train.ema),
        clip_norm=train.clip_norm or 0.0,
        places=self.blueprint.places,
      )

  def _next_batch(self) -> Any:
    return parallel.global_batch(self.mesh, next(self.batches))

  def _update(self, compiled: Any) -> None:
    """One update, and the batch of the next."""
    self._change()
    batch = self.online.complete(self._batch, self.state.params, self._step)
    with jax.transfer_guard("disallow"):  # whatever moves has been moved on purpose
      self.state, metrics = compiled(self.state, self.frozen, batch)
    self._step += 1
    self._positions[self._step] = self.batches.get_state()
    self._positions.pop(self._step - 3, None)
    lowered = {}
    if self.guard.rollbacks or self.guard.scale != 1:
      lowered = {"lr_scale": self.guard.scale, "rollbacks": self.guard.rollbacks}
    self.report.push(self._step, {**metrics, **self.online.metrics, **lowered})
    self._watchdog.beat(f"step {self._step + 1}")
    if self._step < self.config.train.total_steps:
      waiting = time.perf_counter()
      self._batch = self._next_batch()
      self.report.data_wait(time.perf_counter() - waiting)

  def _between(self) -> None:
    """What may happen after an update: samples, a checkpoint, a stop."""
    step, train = self._step, self.config.train
    if self.config.eval.every and step % self.config.eval.every == 0:
      with self._watchdog.paused():
        self._run_point(step)
    reason = self._stop.reason(step)
    if reason or step == train.total_steps or step % train.checkpoint_every == 0:
      self._save()
    if reason and step < train.total_steps:
      self.checkpoints.wait()
      self._stop.forget()
      raise StoppedEarly(
        f"{reason}: saved step {step} of {train.total_steps} in {self.workdir}. The same "
        "command goes on from there."
      )

  def _run_point(self, step: int) -> None:
    """Measures on lists held out, draws, and scores what was drawn."""
    goodness = {}
    if self.held_out:
      self.report.add(self.held_out(self.state.published, self.frozen))
    if self._samples:
      weights = self.blueprint.tuning.outside(self.state.published, self.frozen)
      point = self._samples.draw(weights, step)
      del weights  # a whole network, where factors are trained
      self.report.image("samples", point.grid, step)
      self.report.add({f"score/{name}": x for name, x in point.scores.items()})
      goodness = point.goodness
    self.report.restart_clock()
    self._sound(step, self.alarms.observe_scores(step, goodness))

  def _save(self, scores: dict[str, float] | None = None) -> None:
    """Starts a checkpoint of the last update; `scores` are for train.best_metric."""
    self.report.flush()  # what is wrong with the last step is found before it is saved
    meta = {
      "data": self._positions[self._step],
      "guard": self.guard.get_state(),
      "alarms": self.alarms.get_state(),
      **self.identity,
    }
    metrics = {**self.report.take_means(), **(scores or {})}
    self.checkpoints.save(
      self.state, meta, online=self.online.saved, metrics=metrics or None
    )

  def _judge(self, step: int, values: dict[str, float]) -> None:
    """Acts on what the guard finds, as the run's policies say."""
    train = self.config.train
    finding = self.guard.observe(step, values)
    if finding is None:
      self._sound(step, self.alarms.observe(step, values))
      return
    nonfinite = finding.kind == "nonfinite"
    policy = train.on_nonfinite if nonfinite else train.on_runaway
    if policy == "rollback":
      raise guards.GoBack(finding)
    if nonfinite:  # "stop" and "skip" are the report's
      return
    if policy == "stop":
      raise guards.runaway_error(finding)
    if policy == "warn":
      console.warn(f"{finding.words}; train.on_runaway says what is done about it")

  def _sound(self, step: int, findings: list[guards.Finding]) -> None:
    """Says what alarms were raised by `step`, and does what their policies are."""
    policy = self.alarms.policy
    for finding in alarms_lib.sorted_by_weight(findings, policy):
      row = {"step": step, "alarm": finding.kind, "policy": policy(finding)}
      self.report.alarm({**row, "first": finding.first, "words": finding.words})
      if policy(finding) in alarms_lib.CHANGES:
        # The same update however late this was noticed: a save may notice it at once.
        self.alarms.due[policy(finding)] = step + 1
      elif policy(finding) == "rollback":
        raise guards.GoBack(finding)
      elif policy(finding) == "stop":
        raise alarms_lib.stopped_error(finding)

  def _change(self) -> None:
    """Makes the changes that alarms asked for, from the next update on."""
    now = [name for name, at in self.alarms.due.items() if at == self._step]
    for name in now:
      del self.alarms.due[name]
    if "lower_lr" in now:
      self.guard.lower(self.config.train.rollback_factor)
      self._scale_rate()
      console.warn(
        f"the learning rate is times {self.guard.scale:g} from step {self._step + 1} on"
      )
    if "cap_margin" in now:
      cap = self.alarms.reward_cap
      self._set(reward_cap=cap)
      console.warn(
        f"from step {self._step + 1} on, implicit rewards beyond {cap:g} of the "
        "reference's error have no gradient"
      )

  def _scale_rate(self) -> None:
    """Puts the guard's scale of the learning rate into the state."""
    self._set(lr_scale=self.guard.scale)

  def _set(self, **numbers: float) -> None:
    """Replaces scalars of the state."""
    placed = {
      name: parallel.put(np.float32(x), getattr(self.state, name).sharding)
      for name, x in numbers.items()
    }
    self.state = dataclasses.replace(self.state, **placed)

  def _go_back(self, finding: guards.Finding) -> None:
    """Goes on from the last good checkpoint: a lower rate, the data after the finding.

    All of it follows from what that checkpoint holds. A run that is killed between here
    and its next save comes here again, to the same numbers.
    """
    train = self.config.train
    self.checkpoints.wait()
    good = guards.good_checkpoints(self.checkpoints.steps, finding)
    if self.guard.rollbacks >= train.max_rollbacks or not good:
      raise guards.no_way_back(finding, train.max_rollbacks if good else None)
    step = good[-1]
    self.state = None  # two states may not fit
    self.state, meta = self.checkpoints.restore(self.blueprint.like, step)
    self.online.restore(self.checkpoints.restore_online(self.online.like, step))
    self.checkpoints.forget_after(step)
    self.guard.went_back(meta["guard"], train.rollback_factor)
    if "alarms" in meta:
      self.alarms.set_state(meta["alarms"])
    self._scale_rate()
    position = self._positions[finding.step]
    self.batches.set_state(position)
    self._step, self._positions = step, {step: position}
    self.report.rewind(step)
    self._batch = self._next_batch()
    console.warn(
      f"{finding.words}: back to step {step} with the learning rate times "
      f"{self.guard.scale:g} (rollback {self.guard.rollbacks} of at most "
      f"{train.max_rollbacks}); the data goes on after step {finding.step}"
    )
    self._write_down(finding, step)

  def _write_down(self, finding: guards.Finding, step: int) -> None:
    """Adds the rollback to rollbacks.jsonl; one that is come to again, once."""
    if not parallel.is_main_process():
      return
    number = self.guard.rollbacks
    file = self.workdir / "rollbacks.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    row = {
      "rollback": number,
      "to_step": step,
      "lr_scale": self.guard.scale,
      "time": round(time.time(), 3),
      **dataclasses.asdict(finding),
    }
    file.write_text("\n".join([*lines[: number - 1], json.dumps(row)]) + "\n", "utf-8")
