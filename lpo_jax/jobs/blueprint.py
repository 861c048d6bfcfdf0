"""A run before any weight is read, and what its checkpoints hold."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lpo_jax import models, objectives, parallel, pretrained
from lpo_jax.data.pipeline import Batches
from lpo_jax.diffusion import noising, schedule, weighting
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import adapters
from lpo_jax.training import online as online_lib
from lpo_jax.training import optimizer as optimizer_lib
from lpo_jax.training import state as state_lib
from lpo_jax.training import step as step_lib
from lpo_jax.training.checkpoint import Checkpoints
from lpo_jax.training.tuning import Tuning

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


@dataclasses.dataclass(frozen=True)
class Blueprint:
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


def make_blueprint(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Blueprint:
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
  return Blueprint(model, method, tuning, optimizer, shardings, like)


def slots_of_data(config: ml_collections.ConfigDict) -> int:
  """How many images of an update come from the data; the others are generated."""
  if not config.online:
    return config.train.images_per_update
  options = online_lib.settings(config.train.images_per_update, **config.online)
  return options.rollouts


def make_online(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  blueprint: Blueprint,
  frozen: Any,
  batches: Batches,
) -> online_lib.Offline | online_lib.Online:
  """What stands between the data and the step: nothing, or rollouts and their buffer."""
  if not config.online:
    return online_lib.Offline()
  return online_lib.Online(
    online_lib.settings(config.train.images_per_update, **config.online),
    method=blueprint.method,
    mesh=mesh,
    params=blueprint.like.params,
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


def restore_published(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  step: int | None = None,
) -> tuple[Blueprint, Any, int]:
  """Loads what a run's checkpoint would publish of what it trains.

  Args:
    config: the run's.
    workdir: the run's.
    mesh: where to put the parameters.
    step: which checkpoint; default the latest.

  Returns:
    The run's blueprint, its EMA if it has one or else its parameters, and their step.
  """
  blueprint = make_blueprint(config, mesh)
  checkpoints = Checkpoints(workdir / "checkpoints", keep_last=config.train.keep_last)
  try:
    state, _ = checkpoints.restore(blueprint.like, step)
  finally:
    checkpoints.close()
  return blueprint, state.published, int(state.step)


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
  blueprint, trainable, step = restore_published(config, workdir, mesh, step)

  def load_base() -> Any:
    return pretrained.load(
      config.model.path, "unet", sharding=blueprint.shardings
    ).params

  return blueprint.tuning.publish(trainable, load_base), step


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of which a run has checkpoints, ascending."""
  checkpoints = Checkpoints(workdir / "checkpoints")
  try:
    return checkpoints.steps
  finally:
    checkpoints.close()
