"""The train job: cache and base model in, checkpoints and metrics out."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lpo_jax import console, models, objectives, parallel, pretrained
from lpo_jax.data.pipeline import Batches
from lpo_jax.diffusion import noising, schedule, weighting
from lpo_jax.errors import StoppedEarly, UserError, unknown_name
from lpo_jax.jobs import adapters
from lpo_jax.jobs import cache as cache_job
from lpo_jax.jobs.sampling import RunSamples
from lpo_jax.jobs.stops import StopRequests
from lpo_jax.training import online as online_lib
from lpo_jax.training import optimizer as optimizer_lib
from lpo_jax.training import state as state_lib
from lpo_jax.training import step as step_lib
from lpo_jax.training.checkpoint import Checkpoints
from lpo_jax.training.report import Report
from lpo_jax.training.tuning import Tuning

# Keys that may change between the sessions of one run without making it another run.
FREE_KEYS = (
  "job",
  "mesh.",
  "eval.",
  "export.",
  "inspect.",
  "select.",
  "generate.",
  "quickstart.publish",
  # Of an ablation: each of its runs compares its own config.
  "quickstart.betas",
  "quickstart.seeds",
  "quickstart.methods",
  "quickstart.panels",
  "quickstart.pace",
  "data.cache",
  "data.max_bad_images",
  "model.attention",
  "model.remat",
  "model.scan",
  "train.total_steps",
  "train.microbatch",
  "train.checkpoint_every",
  "train.keep_last",
  "train.log_every",
  "train.max_minutes",
)

# What activations may be stored in, and the least that numbers of `train` may be.
DTYPES = ("bfloat16", "float16", "float32")
LEAST = {
  "images_per_update": 1,
  "microbatch": 0,
  "total_steps": 1,
  "warmup_steps": 0,
  "clip_norm": 0,
  "checkpoint_every": 1,
  "keep_last": 1,
  "log_every": 1,
  "max_minutes": 0,
}


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
  check_settings(config)
  step_lib.check_batch_arithmetic(mesh, train.images_per_update, train.microbatch)
  refuse_other_run(config, workdir)
  checkpoints = Checkpoints(workdir / "checkpoints", keep_last=train.keep_last)
  if checkpoints.latest is not None and checkpoints.latest >= train.total_steps:
    console.say(f"already trained to step {checkpoints.latest}: {workdir}")
    remember_config(config, workdir)
    checkpoints.close()
    return {"step": checkpoints.latest}

  cache = cache_job.open_for(config, workdir)
  batches = Batches(
    cache,
    images_per_update=slots_of_data(config),
    seed=config.seed,
    caption_dropout=config.data.caption_dropout,
    flip=config.data.flip,
    time_ids=config.data.time_ids,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  plan = make_plan(config, mesh)
  # No name is given to the base: what neither tree needs of it is let go.
  trainable, frozen = plan.begin(
    pretrained.load(config.model.path, "unet", sharding=plan.shardings).params, mesh
  )
  online = make_online(config, mesh, plan, frozen, batches)
  remember_config(config, workdir)  # only now: what cannot start claims no workdir
  start = 0
  if checkpoints.latest is None:
    state = state_lib.place(
      mesh,
      trainable,
      plan.optimizer,
      with_ema=train.ema > 0,
      shardings=jax.tree.map(lambda x: x.sharding, trainable),
    )
  else:
    state, meta = checkpoints.restore(plan.like)
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
      plan,
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


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run before any weight is read: structures, shapes and places.

  Attributes:
    model: the UNet's structure.
    method: networks, noising, objective.
    tuning: what of the network is trained.
    optimizer: the gradient transformation.
    shardings: of the network's weights, by name.
    like: the train state as ShapeDtypeStructs with shardings.
  """

  model: models.Model
  method: step_lib.Method
  tuning: Tuning
  optimizer: Any
  shardings: Any
  like: state_lib.TrainState

  def begin(self, base: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Makes the trainable tree before the first update, and the frozen one."""
    frozen = self.tuning.freeze(base, self.method.has_reference)
    return self.tuning.start(base, mesh), frozen


def make_plan(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Plan:
  """Binds the method's three axes and says where everything will live."""
  train, path = config.train, config.model.path
  objective = objectives.get(**config.objective)
  noise = noising.get(**config.noising)
  model = models.build(
    pretrained.read_config(path, "unet"),
    dtype=jnp.dtype(config.model.dtype),
    attention=config.model.attention,
    remat=config.model.remat,
    scan=config.model.scan,
  )
  tuning = adapters.make_tuning(config, model)
  forward = schedule.from_config(pretrained.scheduler_config(path))
  method = step_lib.Method(
    unet=model.apply,
    schedule=forward,
    noising=noise,
    objective=objective,
    seed=config.seed,
    scaling_factor=pretrained.read_config(path, "vae").get("scaling_factor", 0.18215),
    weighting=weighting.get(schedule=forward, **config.weighting),
    weights=tuning.weights,
    microbatch=train.microbatch,
    unroll=jax.default_backend() == "cpu",
  )
  optimizer = optimizer_lib.build(
    train.optimizer,
    tuning.shapes,
    learning_rate=train.learning_rate,
    warmup_steps=train.warmup_steps,
    clip_norm=train.clip_norm,
    decay_rules=train.decay,
    trainable_rules=train.trainable,
    on_nonfinite=train.on_nonfinite,
    options=train.optimizer_args,
  )
  like = state_lib.placement(
    mesh,
    tuning.shapes,
    optimizer,
    with_ema=train.ema > 0,
    shardings=parallel.param_shardings(tuning.shapes, mesh),
  )
  shardings = parallel.param_shardings(model.abstract_params, mesh)
  return Plan(model, method, tuning, optimizer, shardings, like)


def slots_of_data(config: ml_collections.ConfigDict) -> int:
  """How many images of an update come from the data; the others are generated."""
  if not config.online:
    return config.train.images_per_update
  options = online_lib.settings(config.train.images_per_update, **config.online)
  return options.rollouts


def make_online(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  plan: Plan,
  frozen: Any,
  batches: Batches,
) -> online_lib.Offline | online_lib.Online:
  """What stands between the data and the step: nothing, or rollouts and their buffer."""
  if not config.online:
    return online_lib.Offline()
  return online_lib.Online(
    online_lib.settings(config.train.images_per_update, **config.online),
    method=plan.method,
    mesh=mesh,
    params=plan.like.params,
    frozen=frozen,
    experts=batches.batch_spec,
    more=lambda: parallel.global_batch(mesh, next(batches)),
  )


def check_settings(config: ml_collections.ConfigDict) -> None:
  """Refuses settings that can be known to be wrong before anything is loaded.

  Raises:
    UserError: no model, a number out of range, an unknown dtype, remat, scan, objective
      or noising, or an option they do not have.
  """
  if not config.model.path:
    raise UserError(
      "model.path is not set; give the folder of a diffusers pipeline, the base model."
    )
  if config.model.dtype not in DTYPES:
    raise unknown_name("model.dtype", config.model.dtype, DTYPES)
  models.Settings(remat=config.model.remat, scan=config.model.scan)
  for key, least in LEAST.items():
    if (config.train[key] or 0) < least:  # None stands for 0
      raise UserError(f"train.{key}={config.train[key]}: expected at least {least}.")
  if not 0 <= config.train.ema < 1:
    raise UserError(
      f"train.ema={config.train.ema}: expected a decay from 0 (no mean is kept) to "
      "below 1, such as 0.999."
    )
  state_lib.ema_schedule(config.train.ema_schedule, config.train.ema)
  objectives.get(**config.objective)
  noising.get(**config.noising)
  slots_of_data(config)
  if bool(config.online) != (config.noising.name == "trajectory"):
    raise UserError(
      f"noising.name={config.noising.name!r} and online={dict(config.online)}: rollouts "
      "are what the noising 'trajectory' reads. Set both, as configs/dro_sd15.py does, "
      "or neither."
    )
  forward = schedule.from_config(pretrained.scheduler_config(config.model.path))
  weighting.get(schedule=forward, **config.weighting)


def refuse_other_run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Checks that the run in `workdir`, if there is one, is this one.

  Raises:
    UserError: the workdir holds a run with other values of keys that matter.
  """
  file = workdir / "config.json"
  if file.exists():
    then = _flat(json.loads(file.read_text("utf-8")))
    mine = _flat(json.loads(config.to_json_best_effort()))
    differing = [
      key
      for key in sorted(mine.keys() | then.keys())
      if mine.get(key) != then.get(key) and not key.startswith(FREE_KEYS)
    ]
    if differing:
      key = differing[0]
      raise UserError(
        f"{workdir} holds another run: {', '.join(differing)} differ (first: {key} was "
        f"{then.get(key)!r}, is {mine.get(key)!r}). Use the old values to go on "
        "with it, or another --workdir for a new run."
      )


def remember_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes config.json, which makes the workdir this run's.

  Raises:
    UserError: the workdir holds a run with other values of keys that matter.
  """
  refuse_other_run(config, workdir)
  parallel.barrier("config compared")
  if parallel.is_main_process():
    workdir.mkdir(parents=True, exist_ok=True)
    now = json.loads(config.to_json_best_effort())
    text = json.dumps(now, indent=2) + "\n"
    (workdir / "config.json").write_text(text, encoding="utf-8")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Flattens nested dictionaries to dotted keys."""
  if not isinstance(tree, dict) or not tree:
    return {prefix[:-1]: tree}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f"{prefix}{key}.")
  return flat


def say_arithmetic(config: Any, mesh: Any, cache: Any, batches: Batches) -> None:
  """Prints what one update is made of, before anything is compiled."""
  train = config.train
  mean_size = float(np.mean(cache.lists.lengths))
  per_device = train.images_per_update // mesh.size
  count = train.images_per_update // (train.microbatch or train.images_per_update)
  epochs = train.total_steps / max(
    batches.lists_per_epoch * mean_size / slots_of_data(config), 1e-9
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
  plan: Plan,
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
    method=plan.method,
    optimizer=plan.optimizer,
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
        weights = plan.tuning.outside(state.published, frozen)
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


def restore_published(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  step: int | None = None,
) -> tuple[Plan, Any, int]:
  """Loads what a run's checkpoint would publish of what it trains.

  Args:
    config: the run's.
    workdir: the run's.
    mesh: where to put the parameters.
    step: which checkpoint; default the latest.

  Returns:
    The run's plan, its EMA if it has one or else its parameters, and their step.
  """
  plan = make_plan(config, mesh)
  checkpoints = Checkpoints(workdir / "checkpoints", keep_last=config.train.keep_last)
  try:
    state, _ = checkpoints.restore(plan.like, step)
  finally:
    checkpoints.close()
  return plan, state.published, int(state.step)


def trained_params(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  step: int | None = None,
) -> tuple[Any, int]:
  """Loads the UNet's weights that a run's checkpoint would publish.

  Args:
    config: the run's.
    workdir: the run's.
    mesh: where to put the parameters.
    step: which checkpoint; default the latest.

  Returns:
    Parameters as global arrays, and the step they are of.
  """
  plan, trainable, step = restore_published(config, workdir, mesh, step)

  def load_base() -> Any:
    return pretrained.load(config.model.path, "unet", sharding=plan.shardings).params

  return plan.tuning.publish(trainable, load_base), step


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of which a run has checkpoints, ascending."""
  checkpoints = Checkpoints(workdir / "checkpoints")
  try:
    return checkpoints.steps
  finally:
    checkpoints.close()
