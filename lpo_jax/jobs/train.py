"""The train job: cache and base model in, checkpoints and metrics out."""

from __future__ import annotations

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
from lpo_jax.jobs import run_identity
from lpo_jax.jobs.sampling import RunSamples
from lpo_jax.jobs.stops import StopRequests
from lpo_jax.training import online as online_lib
from lpo_jax.training import state as state_lib
from lpo_jax.training import step as step_lib
from lpo_jax.training.checkpoint import Checkpoints
from lpo_jax.training.report import Report


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains until `train.total_steps` updates are completed; resumes what is there.

  Args:
    config: the resolved config.
    workdir: gets config.json, checkpoints/, metrics.jsonl and tensorboard/.

  Returns:
    The last metrics, and how long compiling and training took in seconds.

  Raises:
    UserError: a config, cache or model that cannot be used, or a NaN loss.
    StoppedEarly: a signal, a STOP file or the time budget; the run is saved.
  """
  workdir = pathlib.Path(workdir)
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
  train = config.train
  blueprints.check_settings(config)
  step_lib.check_batch_arithmetic(mesh, train.images_per_update, train.microbatch)
  run_identity.refuse_other_run(config, workdir)
  checkpoints = Checkpoints(workdir / "checkpoints", keep_last=train.keep_last)
  if checkpoints.latest is not None and checkpoints.latest >= train.total_steps:
    console.say(f"already trained to step {checkpoints.latest}: {workdir}")
    run_identity.remember_config(config, workdir)
    checkpoints.close()
    return {"step": checkpoints.latest}

  cache = cache_job.open_for(config, workdir)
  batches = Batches(
    cache,
    images_per_update=blueprints.slots_of_data(config),
    seed=config.seed,
    caption_dropout=config.data.caption_dropout,
    flip=config.data.flip,
    time_ids=config.data.time_ids,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  blueprint = blueprints.make_blueprint(config, mesh)
  # No name is given to the base: what neither tree needs of it is let go.
  trainable, frozen = blueprint.begin(
    pretrained.load(config.model.path, "unet", sharding=blueprint.shardings).params,
    mesh,
  )
  online = blueprints.make_online(config, mesh, blueprint, frozen, batches)
  run_identity.remember_config(
    config, workdir
  )  # only now: what cannot start claims no workdir
  start = 0
  if checkpoints.latest is None:
    state = state_lib.place(
      mesh,
      trainable,
      blueprint.optimizer,
      with_ema=train.ema > 0,
      shardings=jax.tree.map(lambda x: x.sharding, trainable),
    )
  else:
    state, meta = checkpoints.restore(blueprint.like)
    batches.set_state(meta["data"])
    start = int(state.step)
    online.restore(checkpoints.restore_online(online.like, start))
    console.say(f"resuming from step {start} of {train.total_steps}")
  say_arithmetic(config, mesh, cache, batches)

  report = Report(
    workdir,
    total_steps=train.total_steps,
    images_per_update=train.images_per_update,
    start_step=start,
    every=train.log_every,
    label=f"training {config.objective.name}",
    on_nonfinite=train.on_nonfinite,
  )
  try:
    return _loop(
      config,
      workdir,
      mesh,
      blueprint,
      state,
      frozen,
      batches,
      online,
      checkpoints,
      report,
    )
  finally:
    report.close()
    checkpoints.close()
    batches.close()
    cache.close()


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


def say_drawn(batches: Batches) -> None:
  """Prints how often each source of a mixture was drawn from."""
  if len(batches.drawn) > 1:
    sources = (
      f"{name} {n['lists']} lists ({n['share']:.1%}), {n['epochs']:.2f} epochs"
      for name, n in batches.drawn.items()
    )
    console.say(f"drawn: {'; '.join(sources)}")


def _loop(
  config: Any,
  workdir: pathlib.Path,
  mesh: Any,
  blueprint: blueprints.Blueprint,
  state: state_lib.TrainState,
  frozen: Any,
  batches: Batches,
  online: online_lib.Offline | online_lib.Online,
  checkpoints: Checkpoints,
  report: Report,
) -> dict[str, Any]:
  """Runs updates until the end or a reason to stop."""
  train, began = config.train, time.monotonic()
  stop = StopRequests(workdir, max_minutes=train.max_minutes, began=began)
  samples = RunSamples(config, workdir, mesh) if config.eval.every else None
  step = int(state.step)
  position = batches.get_state()
  batch = parallel.global_batch(mesh, next(batches))
  console.say("compiling the train step (once; the compiled step is kept for later)")
  compiled = step_lib.compile_train_step(
    mesh,
    state,
    frozen,
    online.completed(batch),
    method=blueprint.method,
    optimizer=blueprint.optimizer,
    ema_decay=state_lib.ema_schedule(train.ema_schedule, train.ema),
  )
  compile_seconds = time.monotonic() - began
  console.say(f"compiled in {compile_seconds:.0f} s")
  report.restart_clock()
  began_training = time.monotonic()

  def save() -> None:
    report.flush()  # a NaN of the last step stops the run before it is saved
    checkpoints.save(state, {"data": position}, online=online.saved)

  with stop:
    while step < train.total_steps:
      batch = online.complete(batch, state.params, step)
      state, metrics = compiled(state, frozen, batch)
      step += 1
      report.push(step, {**metrics, **online.metrics})
      position = batches.get_state()  # of the first batch not yet trained on
      if step < train.total_steps:
        waiting = time.perf_counter()
        batch = parallel.global_batch(mesh, next(batches))
        report.data_wait(time.perf_counter() - waiting)
      if samples and step % config.eval.every == 0:
        weights = blueprint.tuning.outside(state.published, frozen)
        report.image("samples", samples.draw(weights, step), step)
        del weights  # a whole network, where factors are trained
        report.restart_clock()
      reason = stop.reason(step)
      if reason or step == train.total_steps or step % train.checkpoint_every == 0:
        save()
      if reason and step < train.total_steps:
        checkpoints.wait()
        stop.forget()
        raise StoppedEarly(
          f"{reason}: saved step {step} of {train.total_steps} in {workdir}. The same "
          "command goes on from there."
        )
  checkpoints.wait()
  say_drawn(batches)
  return {
    "step": step,
    **report.last,
    "compile_seconds": compile_seconds,
    "train_seconds": time.monotonic() - began_training,
    "rollouts_seconds": online.seconds,  # of train_seconds
    "epochs": batches.epochs_seen,
    "slot_utilisation": batches.utilisation,
    "drawn": batches.drawn,
  }
