"""The reference job: the reference's errors, once for all runs that share them.

`ref_err` depends on the reference, the lists, the seed and the noising, and not on the
objective, its options or the optimizer: a sweep over those computes it once, and none of
its runs holds the reference's weights or runs its forward pass.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import ml_collections

from lpo_jax import console, parallel, pretrained
from lpo_jax.data import fingerprints, references, user_embeds
from lpo_jax.data.pipeline import Batches
from lpo_jax.errors import StoppedEarly, UserError
from lpo_jax.jobs import blueprint as blueprints
from lpo_jax.jobs import cache as cache_job
from lpo_jax.jobs.stops import StopRequests
from lpo_jax.training import step as step_lib

SAVE_EVERY_S = 60.0
# What of `data` decides how an item is shown, besides its list.
DRAWN_BY = (
  *("caption_dropout", "source_dropout", "both_dropout", "flip", "time_ids", "draws"),
)


def folder_of(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Where the errors are: `data.reference`, or `reference` in the workdir."""
  return pathlib.Path(config.data.reference or pathlib.Path(workdir) / "reference")


def about(config: ml_collections.ConfigDict, lists: Any) -> dict[str, Any]:
  """Everything that the reference's errors depend on."""
  path, data = config.model.path, config.data
  users: dict[str, Any] = {}
  if data.user_embeds is not None:
    users = {key: data[key] for key in ("user_dropout", "user_missing")}
    users["user_embeds"] = user_embeds.read(data.user_embeds).fingerprint()
    users["users"] = fingerprints.of_users(lists)
  return {
    **users,
    "reference": pretrained.fingerprint(path, "unet"),
    "schedule": dict(pretrained.scheduler_config(path)),
    "dtype": config.model.dtype,
    "noising": config.noising.to_dict(),
    "seed": config.seed,
    "lists": fingerprints.of_lists(lists),
    "cache": cache_job.expectation(config),
    **{key: data[key] for key in DRAWN_BY},
  }


def order(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What decides which lists an update holds, besides the lists and the seed."""
  slots, people = blueprints.slots_of_data(config), config.data.held_out_users
  decided = {"images_per_update": slots, "held_out": config.data.held_out}
  return decided | ({"held_out_users": people} if people else {})


def open_for(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, cache: Any
) -> references.References | None:
  """Opens what the job stored for this config; None if the step computes the errors.

  Raises:
    UserError: it was not run, not for as many updates, or for something else.
  """
  if config.data.reference is None:
    return None
  folder = folder_of(config, workdir)
  found = references.read(folder, cache.lists, about(config, cache.lists))
  found = found and found.in_order(order(config))
  if not found or not found.covers(config.train.total_steps, config.data.draws):
    raise UserError(
      f"data.reference: {folder} has {'only some of' if found else 'none of'} the "
      "reference's errors. Run the same command with --job reference first, or set "
      "data.reference=None to compute them in the step."
    )
  return found


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Computes the errors that training will ask for; goes on where it was stopped.

  Args:
    config: the run's; `data.reference` is where they go.
    workdir: gets reference/ where that is empty or None.

  Raises:
    UserError: a method without a reference or with rollouts of its own, a cache or model
      that cannot be used.
    StoppedEarly: a signal or a STOP file; what was computed is kept.
  """
  workdir = pathlib.Path(workdir)
  mesh = parallel.mesh_of(config.mesh)
  blueprints.check_settings(config)
  blueprints.check_reference(config)
  cache = cache_job.open_for(config, workdir)
  batches = blueprints.make_batches(config, cache)
  minutes = config.train.max_minutes
  stop = StopRequests(workdir, max_minutes=minutes, began=time.monotonic())
  try:
    with stop:
      _compute(config, workdir, mesh, cache, batches, stop)
  finally:
    batches.close()
    cache.close()


def _compute(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  cache: Any,
  batches: Batches,
  stop: StopRequests,
) -> None:
  """Runs the reference over the updates that training will see, until all is known."""
  folder, facts = folder_of(config, workdir), about(config, cache.lists)
  updates, repeat = config.train.total_steps, config.data.draws
  store = references.read(folder, cache.lists, facts)
  store = references.References.empty(cache.lists) if store is None else store
  store = store.in_order(order(config))
  if store.covers(updates, repeat):
    console.say(f"the reference's errors are all there: {folder}")
    return
  if store.position:
    batches.set_state(store.position)
  inside = config.copy_and_resolve_references()
  with inside.unlocked():
    inside.data.reference = None  # here the step's own pass is what is wanted
  blueprint = blueprints.make_blueprint(inside, mesh)
  _, frozen = blueprint.begin(
    pretrained.load(config.model.path, "unet", sharding=blueprint.shardings).params,
    mesh,
  )
  batch = parallel.global_batch(mesh, next(batches))
  console.say("compiling the reference's pass")
  compiled = step_lib.compile_reference_errors(
    mesh, frozen, batch, method=blueprint.method
  )
  progress = console.Progress("reference", updates, "updates", start=store.updates)
  saved = time.monotonic()
  while True:
    told = batch.identity, batch.slot, batch.ranking.valid
    store.add(*parallel.fetch((*told, compiled(frozen, batch))))
    store.position = batches.get_state()
    progress.update(store.updates)
    finished, reason = store.covers(updates, repeat), stop.reason(store.updates)
    if finished or reason or time.monotonic() - saved > SAVE_EVERY_S:
      # No barrier: the processes' clocks do not agree on when.
      if parallel.is_main_process():
        references.save(folder, store, facts)
      saved = time.monotonic()
    if finished:
      break
    if reason:
      stop.forget()
      raise StoppedEarly(
        f"{reason}: the errors of {store.updates} of {updates} updates are in {folder}. "
        "The same command goes on from there."
      )
    batch = parallel.global_batch(mesh, next(batches))
  parallel.barrier("errors saved")
  console.say(f"train with --config.data.reference={folder}")
