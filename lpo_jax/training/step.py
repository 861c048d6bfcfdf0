"""THE train step: noising, policy and reference, objective, gradient, update.

A method is a point in noising x objective x conditioning; none of it is decided here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lpo_jax import parallel
from lpo_jax.diffusion.noising import Noised, Noising
from lpo_jax.diffusion.schedule import NoiseSchedule
from lpo_jax.diffusion.weighting import Weighting, one
from lpo_jax.errors import UserError
from lpo_jax.objectives import Objective
from lpo_jax.objectives.lists import (
  margin_quantiles,
  metrics_by_group,
  standing_metrics,
)
from lpo_jax.training.places import Places, to_device
from lpo_jax.training.state import TrainState
from lpo_jax.types import Array, Batch, Conditioning, Denoising, Metrics, Params

# (params, latents, timesteps, **Conditioning.arguments) -> output
UNet = Callable[..., Array]

# (trainable tree, frozen tree) -> the policy's weights
Weights = Callable[[Params, Params | None], Params]


def whole(trainable: Params, frozen: Params | None) -> Params:
  """The policy's weights where all of them are trained."""
  del frozen
  return trainable


# By default XLA may keep more precision than bf16 asks for, and does so differently in
# the differentiated policy and in the plain reference: `err - ref_err` is then 1e-3 off
# at step 0, which is logits of fake reward at beta = 5000. With it off they are equal.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}
# On CPUs XLA hands products to a library and, by default, the arithmetic around them too,
# where a program allows it. A value that the backward pass needs as well is computed by
# XLA itself, with another exponential and another square root. With single products in
# the library alone, each has one way to be computed, as fast (docs/sharding.md).
CPU_OPTIONS = {
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
  "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
  """What the compiler is told, so that equal networks give equal numbers."""
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return COMPILER_OPTIONS | (CPU_OPTIONS if on_cpu else {})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the compiled step takes as numbers: runs that differ in these share it.

  Attributes:
    seed: int32, of the run.
    hyper: fp32 options of the objective, by name.
  """

  seed: Array
  hyper: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Method:
  """What is trained, how it is noised and what it is told to prefer.

  Attributes:
    unet: the policy's and the reference's network.
    schedule: the forward process.
    noising: makes (x_t, t, target) of a batch.
    objective: turns scalars and rankings into a loss.
    seed: of the run; a scalar array inside the step.
    scaling_factor: of the VAE's latents.
    weighting: how much an error counts by its timestep.
    weights: makes the policy's weights of what is trained and what is frozen.
    fetch: brings the reference's weights to the devices, from where they are kept.
    stored: whether batches bring the reference's errors, and the step needs no pass of it.
    microbatch: slots that go through the networks at once; all of them if 0.
    unroll: unroll the scan over microbatches (XLA's CPU convolution gradients are
      20 to 70 times slower inside a loop).
  """

  unet: UNet
  schedule: NoiseSchedule
  noising: Noising
  objective: Objective
  seed: int | Array
  scaling_factor: float
  weighting: Weighting = one
  weights: Weights = whole
  fetch: Callable[[Params | None], Params | None] = lambda frozen: frozen
  stored: bool = False
  microbatch: int = 0
  unroll: bool = False

  @property
  def has_reference(self) -> bool:
    """Whether the objective reads anything of the reference."""
    return bool(self.objective.needs & {"ref_err", "drift"})

  @property
  def runs_reference(self) -> bool:
    """Whether the step needs the reference's weights."""
    return self.has_reference and not self.stored

  def reference(self, frozen: Params | None) -> Params | None:
    """The reference's weights, or None where the step needs none."""
    return self.fetch(frozen) if self.runs_reference else None

  @property
  def inputs(self) -> Inputs:
    """The numbers of a method that need no compilation of their own."""
    # As `jax.random.key` reads a Python int where there are no 64 bits.
    seed = np.int64(self.seed).astype(np.int32)
    hyper = {name: np.float32(x) for name, x in self.objective.inputs.items()}
    return Inputs(seed=seed, hyper=hyper)

  def with_inputs(self, inputs: Inputs) -> Method:
    """The same method with these numbers, which may be traced."""
    objective = self.objective.with_inputs(inputs.hyper)
    return dataclasses.replace(self, seed=inputs.seed, objective=objective)


def mean_square(x: Array) -> Array:
  """Mean over all axes but the first of x^2: [S, ...] -> [S], fp32."""
  return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


def denoise(
  unet: UNet,
  params: Params,
  ref_params: Params | None,
  noised: Noised,
  conditioning: Conditioning,
) -> Denoising:
  """Runs policy and reference on the slots: three scalars per image.

  Args:
    unet: the network of both.
    params: the policy's weights.
    ref_params: the reference's, or None when none are needed (`ref_err` and `drift` are
      then 0).
    noised: [S, ...] inputs and targets.
    conditioning: [S, ...].

  Returns:
    err, ref_err, drift: [S] fp32.
  """
  inputs, told = (noised.noisy_latents, noised.timesteps), conditioning.arguments
  with jax.named_scope("policy"):
    pred = unet(params, *inputs, **told).astype(jnp.float32)
  # Predictions are named, so that what computes a microbatch again keeps these small
  # arrays: of the reference it then needs no pass at all, and of a policy that computes
  # itself again (remat "full") no second one.
  pred = checkpoint_name(pred, "pred")
  # fp32 before the subtraction: half precision squares would be logits of noise.
  target = noised.target.astype(jnp.float32)
  if ref_params is None:
    err = mean_square(pred - target)
    return Denoising(err=err, ref_err=jnp.zeros_like(err), drift=jnp.zeros_like(err))
  with jax.named_scope("reference"):
    ref_params = jax.lax.stop_gradient(ref_params)
    ref_pred = unet(ref_params, *inputs, **told).astype(jnp.float32)
  ref_pred = checkpoint_name(jax.lax.stop_gradient(ref_pred), "ref_pred")
  # One reduction for all three. Apart, XLA keeps the policy's difference for the backward
  # pass but fuses the reference's into its sum, adds the same numbers in another order,
  # and err - ref_err is an ulp off 0 at step 0. (A barrier does not help: the CPU backend
  # drops it before it fuses.) The new axis leaves slots on the devices that hold them.
  differences = jnp.stack([pred - target, ref_pred - target, pred - ref_pred])
  err, ref_err, drift = jax.vmap(mean_square)(differences)
  return Denoising(err=err, ref_err=ref_err, drift=drift)


def slot_scalars(
  method: Method,
  trainable: Params,
  frozen: Params | None,
  noised: Noised,
  conditioning: Conditioning,
) -> Denoising:
  """`denoise` over all slots, one microbatch in memory at a time: [S] scalars.

  Lists may straddle microbatches: the objective sees all scalars of the update at once,
  so accumulation equals the large batch by construction.
  """

  # Inside the loop: what it adds up over microbatches is then the gradient of what is
  # trained, and not of all the weights that are made of it.
  def run(noised: Noised, conditioning: Conditioning) -> Denoising:
    params = method.weights(trainable, frozen)
    return denoise(method.unet, params, method.reference(frozen), noised, conditioning)

  slots = noised.timesteps.shape[0]
  size = method.microbatch or slots
  if size == slots:
    return run(noised, conditioning)
  count = slots // size

  # Slot i goes to microbatch i mod count: with slots split over devices in contiguous
  # blocks, every device then works on its own slots and nothing is moved.
  def split(x: Array) -> Array:
    return x.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

  def join(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(slots, *x.shape[2:])

  keep = jax.checkpoint_policies.save_only_these_names("pred", "ref_pred")
  body = jax.checkpoint(lambda _, xs: (None, run(*xs)), policy=keep)
  micro = jax.tree.map(split, (noised, conditioning))
  _, scalars = jax.lax.scan(body, None, micro, unroll=count if method.unroll else 1)
  return jax.tree.map(join, scalars)


def to_lists(scalars: Denoising, slot: Array) -> Denoising:
  """Gathers [S] scalars into [B, N] lists."""
  return jax.tree.map(lambda x: x[slot], scalars)


def measure(
  method: Method, trainable: Params, frozen: Params | None, batch: Batch
) -> tuple[Array, Denoising]:
  """Noises a batch and runs the networks on it: [S] timesteps, [S] scalars."""
  with jax.named_scope("noising"):
    noised = method.noising(
      batch, method.schedule, method.seed, scaling_factor=method.scaling_factor
    )
  scalars = slot_scalars(method, trainable, frozen, noised, batch.conditioning)
  if batch.ref_err is not None:
    unknown = jnp.full_like(batch.ref_err, jnp.nan)
    scalars = dataclasses.replace(scalars, ref_err=batch.ref_err, drift=unknown)
  return noised.timesteps, scalars


def capped(scalars: Denoising, cap: Array | float) -> Denoising:
  """Keeps implicit rewards within +- cap * ref_err: beyond it, they have no gradient.

  Args:
    scalars: of any shape.
    cap: share of the reference's error; infinite: all stay as they are, to the bit.
  """
  room = jnp.where(jnp.isinf(cap), jnp.inf, cap * scalars.ref_err)
  err = jnp.clip(scalars.err, scalars.ref_err - room, scalars.ref_err + room)
  return dataclasses.replace(scalars, err=err)


def loss_and_metrics(
  method: Method,
  trainable: Params,
  frozen: Params | None,
  batch: Batch,
  cap: Array | float = math.inf,
) -> tuple[Array, Metrics]:
  """The loss of one update and its standing metrics, scalars in fp32."""
  timesteps, scalars = measure(method, trainable, frozen, batch)
  with jax.named_scope("objective"):
    weights = method.weighting(timesteps)
    weighted = jax.tree.map(lambda x: x * weights, capped(scalars, cap))
    loss, metrics = method.objective(to_lists(weighted, batch.slot), batch.ranking)
    if method.has_reference:
      # Neither weighted nor capped, so that runs can be compared.
      denoising = jax.lax.stop_gradient(to_lists(scalars, batch.slot))
      told = denoising, batch.ranking
      place = timesteps[batch.slot[:, 0]] / method.schedule.num_train_timesteps
      metrics = {**margin_quantiles(*told), **metrics}
      metrics = {**metrics_by_group(*told, place), **metrics}
      metrics = {**standing_metrics(*told), **metrics}
  return loss, {"loss": loss, **metrics}


def train_step(
  state: TrainState,
  frozen: Params | None,
  batch: Batch,
  *,
  method: Method,
  optimizer: optax.GradientTransformation,
  ema_decay: optax.ScalarOrSchedule = 0.0,
  clip_norm: float = 0.0,
  places: Places | None = None,
) -> tuple[TrainState, Metrics]:
  """One update.

  Args:
    state: before the update.
    frozen: the reference, which is also the base of a delta; never donated.
    batch: global arrays.
    method: noising, objective, networks.
    optimizer: from `optimizer.build`.
    ema_decay: of `state.ema`, where there is one; may follow the completed updates.
    clip_norm: what the optimizer clips the gradient's norm to; 0: nothing.
    places: where things live; None: as the arguments do.

  Returns:
    The state after the update, and scalars: the loss, the standing metrics, the global
    norms of gradient (before and after clipping) and update.
  """
  grad_fn = jax.value_and_grad(
    lambda params: loss_and_metrics(method, params, frozen, batch, state.reward_cap),
    has_aux=True,
  )
  (_, metrics), grads = grad_fn(state.params)
  with jax.named_scope("optimizer"):
    before, ema = state.params, state.ema
    if places is not None:
      grads, before = (
        jax.lax.with_sharding_constraint(tree, places.update)
        for tree in (grads, before)
      )
      ema = to_device(ema, places.ema)
    updates, opt_state = optimizer.update(grads, state.opt_state, before)
    # Every optimizer here multiplies by its learning rate last.
    updates = jax.tree.map(lambda x: x * state.lr_scale, updates)
    params = optax.apply_updates(before, updates)
    if ema is not None:
      decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
      ema = optax.incremental_update(params, ema, 1.0 - decay)
  metrics["grad_norm"] = optax.tree.norm(grads)
  metrics["grad_norm_clipped"] = jnp.minimum(metrics["grad_norm"], clip_norm or jnp.inf)
  metrics["update_norm"] = optax.tree.norm(updates)
  after = dataclasses.replace(
    state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema
  )
  return after, metrics


def reference_errors(method: Method, frozen: Params, batch: Batch) -> Array:
  """`ref_err` [S] of an update as the step would compute it, fp32."""
  # The reference in the policy's place too: the compiler sees that the passes are one.
  as_policy = dataclasses.replace(
    method, weights=lambda _, frozen: method.reference(frozen)
  )
  return measure(as_policy, None, frozen, batch)[1].ref_err


def compile_reference_errors(
  mesh: Mesh, frozen: Params, batch: Batch, *, method: Method
) -> Callable[[Params, Batch], Array]:
  """Compiles `reference_errors` ahead of time; every host gets all of them."""
  run = jax.jit(
    functools.partial(reference_errors, method),
    out_shardings=parallel.replicated(mesh),
    compiler_options=compiler_options(mesh),
  )
  with jax.set_mesh(mesh):
    return run.trace(frozen, batch).lower().compile()


def check_batch_arithmetic(mesh: Mesh, images_per_update: int, microbatch: int) -> None:
  """Refuses slot counts that do not divide, before anything is compiled.

  Raises:
    UserError: naming the two numbers and the nearest ones that would do.
  """
  devices = mesh.size
  if images_per_update % devices:
    good = max(images_per_update // devices, 1) * devices
    raise UserError(
      f"train.images_per_update={images_per_update} does not divide over {devices} "
      f"devices; the nearest that does is {good}."
    )
  if microbatch and (images_per_update % microbatch or microbatch % devices):
    raise UserError(
      f"train.microbatch={microbatch}: expected a divisor of train.images_per_update="
      f"{images_per_update} and a multiple of the {devices} device(s), or 0 for no "
      "accumulation."
    )


def trace_train_step(
  mesh: Mesh,
  state: TrainState,
  frozen: Params | None,
  batch: Batch,
  *,
  method: Method,
  **step_args: Any,
) -> jax.stages.Traced:
  """Traces `train_step` for the shapes and shardings of its arguments.

  The state is donated. Arguments may be arrays or ShapeDtypeStructs with shardings. The
  traced function takes the method's `inputs` after them.
  """
  everywhere = parallel.replicated(mesh)
  out = jax.tree.map(lambda x: x.sharding, state)

  def run(state, frozen, batch, inputs):
    own = method.with_inputs(inputs)
    return train_step(state, frozen, batch, method=own, **step_args)

  step = jax.jit(
    run,
    donate_argnums=0,
    out_shardings=(out, everywhere),
    compiler_options=compiler_options(mesh),
  )
  inputs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), method.inputs
  )
  with jax.set_mesh(mesh):
    return step.trace(state, frozen, batch, inputs)


def compile_train_step(
  mesh: Mesh,
  state: TrainState,
  frozen: Params | None,
  batch: Batch,
  *,
  method: Method,
  **step_args: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Compiles `train_step` ahead of time; the arguments are `trace_train_step`'s.

  Returns:
    (state, frozen, batch) -> (state, metrics).
  """
  traced = trace_train_step(mesh, state, frozen, batch, method=method, **step_args)
  compiled = traced.lower().compile()
  inputs = jax.tree.map(
    lambda x: parallel.put(x, parallel.replicated(mesh)), method.inputs
  )
  return lambda state, frozen, batch: compiled(state, frozen, batch, inputs)
