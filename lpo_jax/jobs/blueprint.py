"""A run before any weight is read, and what its checkpoints hold."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lpo_jax import console, models, objectives, parallel, pretrained
from lpo_jax.data import held_out, user_embeds
from lpo_jax.data.pipeline import Batches
from lpo_jax.data.references import References
from lpo_jax.data.user_embeds import ListUsers
from lpo_jax.diffusion import noising, schedule, weighting
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import adapters, watchdog
from lpo_jax.training import alarms, guard
from lpo_jax.training import held_out as held_out_lib
from lpo_jax.training import online as online_lib
from lpo_jax.training import optimizer as optimizer_lib
from lpo_jax.training import places as places_lib
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
  "keep_every": 0,
  "keep_best": 0,
  "runaway_steps": 1,
  "max_rollbacks": 0,
  "log_every": 1,
  "max_minutes": 0,
}
# Which weights of a checkpoint: what the run exports, or one of its two sets by name.
WEIGHTS = {
  "published": lambda state: state.published,
  "raw": lambda state: state.params,
  "ema": lambda state: state.ema,
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
    places: where all of it lives.
  """

  model: models.Model
  method: step_lib.Method
  tuning: Tuning
  optimizer: Any
  shardings: Any
  like: state_lib.TrainState
  places: places_lib.Places

  def begin(self, base: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Makes the trainable tree before the first update, and the frozen one."""
    freeze = jax.jit(
      lambda tree: self.tuning.freeze(tree, self.method.runs_reference),
      out_shardings=self.places.frozen,
    )
    frozen = freeze(base)
    trainable = jax.device_put(self.tuning.start(base, mesh), self.places.params)
    return trainable, frozen


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
    unroll=mesh.devices.flat[0].platform == "cpu",
    stored=config.data.reference is not None,
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
  base, has_reference = model.abstract_params, method.runs_reference
  split = parallel.param_shardings(base, mesh)
  frozen = jax.eval_shape(lambda tree: tuning.freeze(tree, has_reference), base)
  how = config.mesh
  if "ema" in how.offload and not train.ema:
    raise UserError(
      f"mesh.offload={tuple(how.offload)}, but train.ema=0: there is no running mean to "
      "keep in the host's memory; expected mesh.offload without 'ema'."
    )
  places = places_lib.settle(
    mesh,
    tuning.shapes,
    frozen,
    parameters=how.parameters,
    reference=how.reference,
    offload=how.offload,
    is_base=tuning.has_base,
  )
  like = state_lib.placement(
    mesh,
    tuning.shapes,
    optimizer,
    with_ema=train.ema > 0,
    shardings=places.params,
    mirrors=places.update,
    ema=places.ema,
  )
  method = dataclasses.replace(
    method,
    weights=places_lib.in_use(
      tuning.weights, model, places.frozen if tuning.has_base else places.params
    ),
    fetch=lambda tree: places_lib.to_device(tree, places.frozen),
  )
  shardings = split if tuning.has_base else places.params
  return Blueprint(model, method, tuning, optimizer, shardings, like, places)


def make_batches(
  config: ml_collections.ConfigDict,
  cache: Any,
  references: References | None = None,
) -> Batches:
  """This process's batches of the lists that are not held out.

  Args:
    config: the run's.
    cache: where the images and lists are.
    references: where the reference's errors are, if they were computed beforehand.
  """
  data = config.data
  only = None
  if data.held_out or data.held_out_users:
    only, _ = split_lists(config, cache)
  users, lost = list_users(config, cache)
  if lost.get("lists"):
    console.say(
      f"{lost['lists']} of {len(cache.lists)} lists are trained as nobody's: "
      f"{lost['people']} people have no embedding in {data.user_embeds}, and "
      f"{lost['unknown']} lists are of nobody known"
    )
  return Batches(
    cache,
    only=only,
    images_per_update=slots_of_data(config),
    seed=config.seed,
    caption_dropout=data.caption_dropout,
    source_dropout=data.source_dropout,
    both_dropout=data.both_dropout,
    flip=data.flip,
    time_ids=data.time_ids,
    draws=data.draws,
    references=references,
    users=users,
    user_dropout=data.user_dropout,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def split_lists(
  config: ml_collections.ConfigDict, cache: Any
) -> tuple[np.ndarray, np.ndarray]:
  """The lists that are trained on, and those that `data` holds out."""
  data = config.data
  return held_out.split(cache.lists, data.held_out, config.seed, data.held_out_users)


def list_users(
  config: ml_collections.ConfigDict, cache: Any
) -> tuple[ListUsers | None, dict[str, int]]:
  """Whose the lists are, and what `user_embeds.join` counts; None without embeddings."""
  data = config.data
  if data.user_embeds is None:
    return None, {}
  embeds = user_embeds.read(data.user_embeds)
  return user_embeds.join(embeds, cache.lists, data.user_missing)


def make_held_out(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  blueprint: Blueprint,
  cache: Any,
) -> held_out_lib.HeldOut | None:
  """What measures the policy on lists held out; None where `eval.held_out` is 0.

  Of the lists that `data.held_out` leaves out, `eval.held_out` are taken, the ones of
  smallest list id: always the same.
  """
  count = config.eval.held_out
  if not (count and config.eval.every):
    return None
  _, held = split_lists(config, cache)
  users, _ = list_users(config, cache)
  order = np.argsort(cache.lists.list_id[held], kind="stable")
  chosen = np.sort(held[order[:count]])

  def batches() -> Batches:
    return Batches(
      cache,
      only=chosen,
      images_per_update=config.train.images_per_update,
      seed=config.seed,
      time_ids=config.data.time_ids,
      users=users,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      prefetch=1,
    )

  return held_out_lib.HeldOut(blueprint.method, mesh, batches, len(chosen))


def _check_held_out(config: ml_collections.ConfigDict) -> None:
  """Refuses to measure on lists held out where there are none, or no reference."""
  if config.eval.held_out < 0:
    raise UserError(
      f"eval.held_out={config.eval.held_out}: expected a number of lists, or 0."
    )
  if not config.eval.held_out:
    return
  needs = objectives.get(**config.objective).needs
  data = config.data
  why = {
    "data.held_out=0 leaves no list out": not (data.held_out or data.held_out_users),
    f"objective.name={config.objective.name!r} has no reference": not needs
    & {"ref_err", "drift"},
    "`online` has samples of the policy in its lists": bool(config.online),
    "with data.reference a run has no reference's weights": config.data.reference
    is not None,
  }
  for reason, holds in why.items():
    if holds:
      raise UserError(
        f"eval.held_out={config.eval.held_out} asks for the implicit accuracy on lists "
        f"never trained on, but {reason}: expected eval.held_out=0, or that changed."
      )


def _check_users(config: ml_collections.ConfigDict) -> None:
  """Refuses embeddings of people for a UNet that cannot be told of them."""
  if config.data.user_embeds is None:
    return
  width = pretrained.read_config(config.model.path, "unet").get("user_dim")
  found = user_embeds.read(config.data.user_embeds).values.shape[-1]
  if found != width:
    raise UserError(
      f"data.user_embeds={config.data.user_embeds!r} has embeddings of width {found}, and "
      f"the UNet in {config.model.path} takes {width or 'no users'}. Make one that takes "
      f"them: --job widen --config.widen.kind=users --config.widen.user_dim={found}."
    )


def check_reference(config: ml_collections.ConfigDict) -> None:
  """Refuses to store errors where there are none, or where they are not all that counts.

  Raises:
    UserError: a method without a reference, with rollouts of its own, or whose objective
      reads more of the reference than its errors.
  """
  needs = objectives.get(**config.objective).needs
  why = {
    "reads nothing of a reference": "ref_err" not in needs,
    "reads the drift, which needs the reference's predictions": "drift" in needs,
  }
  for reason, holds in why.items():
    if holds:
      raise UserError(
        f"objective.name={config.objective.name!r} {reason}: expected data.reference="
        "None, and no --job reference."
      )
  if config.online:
    raise UserError(
      "data.reference cannot be used with `online`: the policy's own samples are not "
      "known beforehand. Expected data.reference=None."
    )


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
  mesh = config.mesh
  places_lib.check(mesh.parameters, mesh.reference, mesh.offload)
  for key, least in LEAST.items():
    if (config.train[key] or 0) < least:  # None stands for 0
      raise UserError(f"train.{key}={config.train[key]}: expected at least {least}.")
  if not 0 <= config.train.ema < 1:
    raise UserError(
      f"train.ema={config.train.ema}: expected a decay from 0 (no mean is kept) to "
      "below 1, such as 0.999."
    )
  if config.train.keep_best and not config.train.best_metric:
    raise UserError(
      f"train.keep_best={config.train.keep_best}, but train.best_metric is empty: "
      "expected the name of a metric, such as 'implicit_acc', or '-loss' where less is "
      "better."
    )
  if config.data.reference is not None:
    check_reference(config)
  _check_users(config)
  guard.check_policies(config.train)
  alarms.check_policies(config)
  _check_held_out(config)
  watchdog.check_policy(config.train.hang_minutes, config.train.on_hang)
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
  weights: str = "published",
) -> tuple[Blueprint, Any, int]:
  """Loads what a run's checkpoint would publish of what it trains.

  Args:
    config: the run's.
    workdir: the run's.
    mesh: where to put the parameters.
    step: which checkpoint; default the latest.
    weights: "published": its EMA if it has one or else its parameters; "raw": its
      parameters; "ema".

  Returns:
    The run's blueprint, the weights, and their step.

  Raises:
    UserError: an unknown kind of weights, or a run without EMA is asked for it.
  """
  if weights not in WEIGHTS:
    raise unknown_name("weights of a run", weights, WEIGHTS)
  if weights == "ema" and not config.train.ema:
    raise UserError(
      f"{workdir}: the run keeps no EMA (train.ema=0); expected its weights as 'raw', or "
      "without a choice."
    )
  config = config.copy_and_resolve_references()
  config.mesh.offload = ()  # what the run's machine had need not be here
  blueprint = make_blueprint(config, mesh)
  checkpoints = Checkpoints(workdir / "checkpoints", reading=True)
  try:
    state, _ = checkpoints.restore(blueprint.like, step)
  finally:
    checkpoints.close()
  return blueprint, WEIGHTS[weights](state), int(state.step)


def trained_params(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  step: int | None = None,
  weights: str = "published",
) -> tuple[Any, int]:
  """Loads the UNet's weights that a run's checkpoint would publish.

  Args:
    config: the run's.
    workdir: the run's.
    mesh: where to put the parameters.
    step: which checkpoint; default the latest.
    weights: see `restore_published`.

  Returns:
    Parameters as global arrays, and the step they are of.
  """
  blueprint, trainable, step = restore_published(config, workdir, mesh, step, weights)

  def load_base() -> Any:
    return pretrained.load(
      config.model.path, "unet", sharding=blueprint.shardings
    ).params

  return blueprint.tuning.publish(trainable, load_base), step


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of which a run has checkpoints, ascending."""
  checkpoints = Checkpoints(workdir / "checkpoints", reading=True)
  try:
    return checkpoints.steps
  finally:
    checkpoints.close()
