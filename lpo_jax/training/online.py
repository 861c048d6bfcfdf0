"""Experts against the policy's own rollouts: Diffusion-DRO's half that is generated.

Before update k the snapshot (the policy as it was at the last multiple of
`refresh_every`) draws a trajectory for each of the next experts; the trajectories replace
the oldest of the replay buffer; the update's lists are drawn from the buffer, one step of
each trajectory. A list is [expert, policy_sample], and the step is the one all methods
share: it meets the sample through `Batch.trajectory`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lpo_jax import parallel, tables
from lpo_jax.diffusion import noising, samplers
from lpo_jax.diffusion.samplers import Path
from lpo_jax.errors import UserError
from lpo_jax.training.step import Method, compiler_options
from lpo_jax.types import (
  Array,
  Batch,
  Conditioning,
  Params,
  Ranking,
  Trajectory,
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the policy's samples are made and kept.

  Attributes:
    lists: lists [expert, policy_sample] in an update.
    rollouts: trajectories drawn before each update.
    generations: how many times `rollouts` the buffer holds.
    steps: of the sampler, all of them kept.
    refresh_every: updates between two snapshots of the policy.
  """

  lists: int
  rollouts: int
  generations: int
  steps: int
  refresh_every: int


def _settings(
  images_per_update: int,
  *,
  steps: int = 20,
  refresh_every: int = 1,
  buffer_size: int = 0,
  rollouts_per_update: int = 0,
) -> Settings:
  lists = images_per_update // 2
  rollouts = rollouts_per_update or lists
  size = buffer_size or max(lists, rollouts)
  if images_per_update % 2:
    raise UserError(
      f"train.images_per_update={images_per_update}: with `online` an update is pairs of "
      "an expert and a policy sample; expected an even number."
    )
  if steps < 1 or refresh_every < 1 or rollouts < 1:
    raise UserError(
      f"online.steps={steps}, online.refresh_every={refresh_every}, "
      f"online.rollouts_per_update={rollouts}: expected at least 1."
    )
  if size % rollouts or size < lists:
    good = max(-(-lists // rollouts), round(size / rollouts), 1) * rollouts
    raise UserError(
      f"online.buffer_size={size}: expected a multiple of the {rollouts} rollouts per "
      f"update and at least the {lists} lists of one, such as {good}."
    )
  return Settings(lists, rollouts, size // rollouts, steps, refresh_every)


def settings(images_per_update: int, **options: Any) -> Settings:
  """Checks the config's section `online`.

  Args:
    images_per_update: train.images_per_update; half of them are experts.
    **options: `steps` of the sampler (20), `refresh_every` updates a new snapshot (1),
      `buffer_size` trajectories (0: an update's lists), `rollouts_per_update` (0: an
      update's lists).

  Raises:
    UserError: an unknown option, or numbers that do not go together.
  """
  return tables.bind("online", {"online": _settings}, "online", options)(
    images_per_update
  )


def check_devices(s: Settings, mesh: Mesh) -> None:
  """Refuses numbers of lists that do not divide over the devices.

  Raises:
    UserError: naming the number and one that would do.
  """
  for name, count in (
    ("train.images_per_update / 2", s.lists),
    ("online.rollouts_per_update", s.rollouts),
  ):
    if count % mesh.size:
      raise UserError(
        f"{name} = {count} does not divide over {mesh.size} devices; the nearest that "
        f"does is {max(round(count / mesh.size), 1) * mesh.size}."
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
  """The replay buffer: G generations of R trajectories, with the experts they met.

  Rows lie on the devices that drew them: a push replaces one generation in place.

  Attributes:
    pushed: [] int32 generations ever pushed; the next goes to `pushed` mod G.
    moments: [G, R, h, w, 2c] of the experts.
    conditioning: [G, R, ...].
    identity: [G, R, 2] uint32 (list key, epoch).
    weight: [G, R] of the lists.
    path: [G, R, steps, ...] what the snapshot saw and answered.
  """

  pushed: Array
  moments: Array
  conditioning: Conditioning
  identity: Array
  weight: Array
  path: Path


def roll_out(
  method: Method, params: Params, frozen: Params | None, experts: Batch, steps: int
) -> Path:
  """Draws one image for each slot's prompt, without guidance, and keeps the way there.

  What the UNet answered is stored as it is, eps or v: it is the target that this very
  policy meets exactly.

  Args:
    method: networks, schedule and seed; rows go through the UNet by `microbatch`.
    params: what is trained, as the snapshot has it.
    frozen: what is not.
    experts: identity and conditioning are read, [R, ...].
    steps: of DPM-Solver++(2M), on grids shifted by identity.

  Returns:
    [R, steps, ...].
  """
  keys = functools.partial(noising.identity_keys, method.seed)
  rows, shape = len(experts.identity), experts.moments.shape[1:]
  shape = (*shape[:-1], shape[-1] // 2)
  stride = max(method.schedule.num_train_timesteps // steps, 1)
  shifts = jax.vmap(lambda key: jax.random.randint(key, (), 0, stride))(
    keys("shift", experts.identity)
  )
  latents = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(
    keys("rollout", experts.identity)
  )

  weights = method.weights(params, frozen)

  def run(start: tuple[Array, Array, Conditioning]) -> Path:
    noise, shift, text = start

    def denoiser(noisy_latents: Array, timesteps: Array) -> Array:
      return method.unet(weights, noisy_latents, timesteps, **text.arguments)

    return samplers.dpmpp_2m_path(
      denoiser, noise, method.schedule, steps=steps, shifts=shift
    )[1]

  start = (latents, shifts, experts.conditioning)
  # As many rows at once as the step has, and as there, each device's own.
  size = math.gcd(rows, method.microbatch or rows)
  if size == rows:
    return run(start)
  split = jax.tree.map(
    lambda x: x.reshape(size, rows // size, *x.shape[1:]).swapaxes(0, 1), start
  )
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:]), jax.lax.map(run, split)
  )


def push(
  buffer: Buffer,
  experts: Batch,
  params: Params,
  frozen: Params | None,
  *,
  method: Method,
  steps: int,
) -> Buffer:
  """Rolls out, and writes the trajectories over the oldest generation."""
  generations = buffer.weight.shape[0]
  new = Buffer(
    pushed=buffer.pushed + 1,
    moments=experts.moments,
    conditioning=experts.conditioning,
    identity=experts.identity,
    # Of the list in each slot; lists need not be in the order of their slots.
    weight=experts.ranking.weight[jnp.argsort(experts.slot[:, 0])],
    path=roll_out(method, params, frozen, experts, steps),
  )
  oldest = buffer.pushed % generations
  return jax.tree.map(
    lambda kept, rows: kept.at[oldest].set(rows) if kept.ndim else rows, buffer, new
  )


def draw_lists(buffer: Buffer, step: Array, *, lists: int, seed: int) -> Batch:
  """Draws an update's lists [expert, policy_sample] from the buffer.

  Without replacement; a function of the seed, the update and what the buffer holds. The
  step of each trajectory, and with it t, is uniform; the expert's noise is new at every
  draw.

  Args:
    buffer: full.
    step: [] int32 completed updates.
    lists: B, at most G x R.
    seed: of the run.

  Returns:
    S = 2B slots: slot 2b is expert b, slot 2b + 1 the policy's sample that it meets.
  """
  generations, rows = buffer.weight.shape
  steps = buffer.path.timesteps.shape[-1]
  keys = functools.partial(noising.identity_keys, seed, "replay")
  when = jnp.asarray(step, jnp.uint32)
  (key,) = keys(jnp.stack([when, jnp.zeros_like(when)])[None])
  # In order, so that rows stay where they are as far as can be.
  picked = jnp.sort(jax.random.permutation(key, generations * rows)[:lists])
  place = (picked // rows, picked % rows)
  identity = buffer.identity[place]
  # Whoever is drawn again in a later update is somebody else to all randomness.
  again = jax.vmap(jax.random.bits)(keys(identity, jnp.full((lists,), when)))
  identity = jnp.stack([identity[:, 0], again], axis=1)
  at = jax.vmap(lambda key: jax.random.randint(key, (), 0, steps))(
    noising.identity_keys(seed, "timestep", identity)
  )

  def pair(expert: Array, sample: Array) -> Array:
    return jnp.stack([expert, sample], 1).reshape(2 * lists, *expert.shape[1:])

  def both(x: Array) -> Array:
    return jnp.repeat(x, 2, axis=0)

  noisy, target = (
    x[(*place, at)] for x in (buffer.path.noisy_latents, buffer.path.outputs)
  )
  stored = jnp.ones((lists,), bool)
  return Batch(
    moments=both(buffer.moments[place]),
    conditioning=jax.tree.map(lambda x: both(x[place]), buffer.conditioning),
    identity=both(identity),
    item=jnp.tile(jnp.arange(2, dtype=jnp.uint32), lists),
    slot=jnp.arange(2 * lists, dtype=jnp.int32).reshape(lists, 2),
    ranking=Ranking(
      rank=jnp.tile(jnp.arange(2, dtype=jnp.int32), (lists, 1)),
      valid=jnp.ones((lists, 2), bool),
      score=jnp.zeros((lists, 2), jnp.float32),
      weight=buffer.weight[place],
    ),
    trajectory=Trajectory(
      noisy_latents=pair(jnp.zeros_like(noisy), noisy),
      timesteps=both(buffer.path.timesteps[(*place, at)]),
      target=pair(jnp.zeros_like(target), target),
      stored=pair(~stored, stored),
    ),
  )


class Offline:
  """Batches as they come from the data: every method but the online ones.

  Attributes:
    like: what of it a checkpoint holds, as ShapeDtypeStructs; nothing.
    saved: the same with values.
    metrics: of the update last completed.
    seconds: that rollouts took, of all updates.
  """

  def __init__(self):
    self.like: dict[str, Any] = {}
    self.saved: dict[str, Any] = {}
    self.metrics: dict[str, float] = {}
    self.seconds = 0.0

  def restore(self, saved: dict[str, Any]) -> None:
    """Takes what a checkpoint had."""

  def completed(self, batch: Batch) -> Batch:
    """Says what `complete` makes of such a batch: arrays or ShapeDtypeStructs."""
    return batch

  def complete(self, batch: Batch, params: Params, step: int) -> Batch:
    """Returns the batch."""
    del params, step
    return batch


class Online:
  """Completes experts with samples of the policy; owns the snapshot and the buffer.

  Args:
    options: from `settings`.
    method: of the run.
    mesh: of the run.
    params: what is trained, as ShapeDtypeStructs with shardings.
    frozen: what is not, as arrays, if there is anything.
    experts: what the data gives, as a `Batch` of ShapeDtypeStructs: lists of one.
    more: gives the next experts as global arrays; called to fill the buffer.

  Attributes:
    like: the snapshot and the buffer, as ShapeDtypeStructs with shardings.
    saved: the same with values.
    metrics: `rollout_seconds` of the update last completed.
    seconds: that rollouts took, of all updates of this session.

  Raises:
    UserError: lists of more than one image, or counts that do not divide.
  """

  def __init__(
    self,
    options: Settings,
    *,
    method: Method,
    mesh: Mesh,
    params: Params,
    frozen: Params | None,
    experts: Batch,
    more: Callable[[], Batch],
  ):
    longest = experts.ranking.rank.shape[1]
    if longest != 1:
      raise UserError(
        f"`online` completes lists of one expert each, but the longest list has "
        f"{longest} images. Choose experts with --job select and set data.path to its "
        "file, with data.strategy='winners'."
      )
    check_devices(options, mesh)
    self._options, self._mesh, self._more = options, mesh, more
    self._frozen = frozen
    self.metrics: dict[str, float] = {}
    self.seconds = 0.0
    experts = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      experts,
      parallel.batch_shardings(mesh, experts),
    )
    buffer, self._batch_like = abstract_update(options, mesh, experts, method.seed)
    self.like = {"buffer": buffer}
    # With a snapshot for every update the policy itself is the snapshot.
    if options.refresh_every > 1:
      self.like["snapshot"] = params
    self._compile(method, params, experts)
    shardings = jax.tree.map(lambda x: x.sharding, self.like)
    zeros = jax.jit(
      lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.like),
      out_shardings=shardings,
    )
    self.saved: dict[str, Any] = zeros()

  def _compile(self, method: Method, params: Params, experts: Batch) -> None:
    """Ahead of time, so that `rollout_seconds` is what rollouts cost."""
    o, buffer = self._options, self.like["buffer"]

    def compiled(fn: Callable, out: Any, *arguments: Any, **options: Any) -> Any:
      with jax.set_mesh(self._mesh):
        jitted = jax.jit(
          fn,
          out_shardings=out,
          compiler_options=compiler_options(self._mesh),
          **options,
        )
        return jitted.lower(*arguments).compile()

    fn = functools.partial(push, method=method, steps=o.steps)
    where = jax.tree.map(lambda x: x.sharding, buffer)
    self._push = compiled(
      fn, where, buffer, experts, params, self._frozen, donate_argnums=0
    )
    fn = functools.partial(draw_lists, lists=o.lists, seed=method.seed)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(self._mesh))
    where = jax.tree.map(lambda x: x.sharding, self._batch_like)
    self._draw = compiled(fn, where, buffer, step)
    # Of its own memory: the policy's is donated to the next step.
    copy = functools.partial(jax.tree.map, jnp.copy)
    where = jax.tree.map(lambda x: x.sharding, params)
    self._copy = jax.jit(copy, out_shardings=where)

  def restore(self, saved: dict[str, Any]) -> None:
    """Takes the snapshot and the buffer that a checkpoint had."""
    self.saved = saved

  def completed(self, batch: Batch) -> Batch:
    """Says what `complete` makes of such a batch, as ShapeDtypeStructs."""
    del batch
    return self._batch_like

  def complete(self, experts: Batch, params: Params, step: int) -> Batch:
    """Rolls out for these experts and draws the lists of one update.

    Args:
      experts: global arrays, lists of one.
      params: the policy after `step` updates.
      step: completed updates.

    Returns:
      S slots of [expert, policy_sample].
    """
    jax.block_until_ready(params)  # the update before is not the rollouts' time
    began = time.perf_counter()
    o, buffer = self._options, self.saved["buffer"]
    policy = params
    if "snapshot" in self.like:
      if step % o.refresh_every == 0:
        self.saved = {**self.saved, "snapshot": self._copy(params)}
      policy = self.saved["snapshot"]
    for _ in range(o.generations - 1 - int(buffer.pushed)):  # only before update 0
      buffer = self._push(buffer, experts, policy, self._frozen)
      experts = self._more()
    buffer = self._push(buffer, experts, policy, self._frozen)
    self.saved = {**self.saved, "buffer": buffer}
    when = parallel.put(jnp.int32(step), parallel.replicated(self._mesh))
    batch = jax.block_until_ready(self._draw(buffer, when))
    self.metrics = {"rollout_seconds": time.perf_counter() - began}
    self.seconds += self.metrics["rollout_seconds"]
    return batch


def abstract_update(
  options: Settings, mesh: Mesh, experts: Batch, seed: int
) -> tuple[Buffer, Batch]:
  """Describes the replay buffer, and an update whose lists are drawn from it.

  Args:
    options: from `settings`.
    mesh: of the run.
    experts: what the data gives, as ShapeDtypeStructs.
    seed: of the run.

  Returns:
    ShapeDtypeStructs with shardings.
  """
  buffer = _buffer_like(options, mesh, experts)
  fn = functools.partial(draw_lists, lists=options.lists, seed=seed)
  batch = jax.eval_shape(fn, buffer, jax.ShapeDtypeStruct((), jnp.int32))
  where = parallel.batch_shardings(mesh, batch)
  return buffer, jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, where
  )


def _buffer_like(options: Settings, mesh: Mesh, experts: Batch) -> Buffer:
  """Shapes and places of the replay buffer."""
  whole = parallel.replicated(mesh)
  by_row = NamedSharding(mesh, PartitionSpec(None, parallel.AXES))

  def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    shape = (options.generations, *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)

  h, w, twice = experts.moments.shape[1:]
  rows = (options.rollouts, options.steps)
  return Buffer(
    pushed=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    moments=spec(experts.moments.shape, experts.moments.dtype),
    conditioning=jax.tree.map(lambda x: spec(x.shape, x.dtype), experts.conditioning),
    identity=spec(experts.identity.shape, experts.identity.dtype),
    weight=spec((options.rollouts,), jnp.float32),
    path=Path(
      timesteps=spec(rows, jnp.int32),
      noisy_latents=spec((*rows, h, w, twice // 2), jnp.float32),
      outputs=spec((*rows, h, w, twice // 2), jnp.float32),
    ),
  )
