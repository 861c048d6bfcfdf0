"""How (x_t, t, target) is made for each slot, with randomness keyed by identity.

Every draw hangs on (seed, purpose, list key, epoch[, item]) and on nothing else: not on
the slot's place in the batch, the mesh, the packing or a resume.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpo_jax import tables
from lpo_jax.diffusion.schedule import NoiseSchedule
from lpo_jax.errors import UserError
from lpo_jax.types import Array, Batch

# What a draw is for. Numbers are part of every run's identity: append, never renumber.
PURPOSES = {
  "timestep": 0,
  "noise": 1,
  "posterior": 2,
  "sample": 3,
  "sampler": 4,
  "rollout": 5,
  "shift": 6,
  "replay": 7,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noised:
  """What the UNet is shown, and what it should answer.

  Attributes:
    noisy_latents: [S, h, w, c] fp32 x_t.
    timesteps: [S] int32.
    target: [S, h, w, c] fp32.
  """

  noisy_latents: Array
  timesteps: Array
  target: Array


Noising = Callable[..., Noised]


def identity_keys(
  seed: int | Array, purpose: str, identity: Array, item: Array | None = None
) -> Array:
  """Derives one key per row from who the row is.

  Args:
    seed: the run's seed.
    purpose: a name in `PURPOSES`, so that two uses never share a stream.
    identity: [S, 2] uint32 (list key, epoch).
    item: [S] uint32 to tell the items of a list apart, or None to give them one key.

  Returns:
    [S] typed PRNG keys.
  """
  root = jax.random.fold_in(jax.random.key(seed), PURPOSES[purpose])

  def fold(words: Array) -> Array:
    key = root
    for i in range(words.shape[0]):
      key = jax.random.fold_in(key, words[i])
    return key

  words = identity if item is None else jnp.concatenate([identity, item[:, None]], 1)
  return jax.vmap(fold)(words)


def sample_posterior(moments: Array, noise: Array, scaling_factor: float) -> Array:
  """x_0 = scaling_factor (mu + exp(logvar / 2) n): a draw from the VAE's posterior.

  Args:
    moments: [S, h, w, 2c] mean and log-variance, unscaled.
    noise: [S, h, w, c] standard normal n.
    scaling_factor: the VAE config's.

  Returns:
    [S, h, w, c] fp32 scaled latents.
  """
  mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  return scaling_factor * (mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise)


def forward(
  batch: Batch,
  schedule: NoiseSchedule,
  seed: int | Array,
  *,
  scaling_factor: float,
  independent_noise: bool = False,
  min_timestep: int = 0,
  max_timestep: int | None = None,
) -> Noised:
  """The forward process: x_t = a_t x_0 + s_t eps, one t per list.

  Args:
    batch: moments, identity and item are read.
    schedule: tables of the forward process.
    seed: the run's seed.
    scaling_factor: of the VAE's latents.
    independent_noise: draw eps per image instead of once per list. Diffusion-DPO's code
      shares t and eps within a pair, its text does not; sharing keeps parity with the
      code and lowers the variance of differences.
    min_timestep: smallest t.
    max_timestep: one more than the largest t; None for all of the schedule's.

  Returns:
    The noised slots.

  Raises:
    UserError: the range of timesteps is empty or leaves the schedule.

  Reference: Wallace et al. 2023 (Diffusion-DPO), eq. 14 and its released code.
  """
  total = schedule.num_train_timesteps
  top = total if max_timestep is None else max_timestep
  if not 0 <= min_timestep < top <= total:
    raise UserError(
      f"noising.min_timestep={min_timestep}, noising.max_timestep={max_timestep}: "
      f"expected 0 <= min_timestep < max_timestep <= {total}, the schedule's length."
    )
  keys = identity_keys(seed, "timestep", batch.identity)
  draw = jax.vmap(lambda key: jax.random.randint(key, (), min_timestep, top))
  return _noise_at(
    draw(keys),
    batch,
    schedule,
    seed,
    scaling_factor=scaling_factor,
    independent_noise=independent_noise,
  )


def _noise_at(
  timesteps: Array,
  batch: Batch,
  schedule: NoiseSchedule,
  seed: int | Array,
  *,
  scaling_factor: float,
  independent_noise: bool,
) -> Noised:
  """The forward process at the given timesteps [S]."""
  shape = (*batch.moments.shape[1:-1], batch.moments.shape[-1] // 2)
  normal = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
  keys = functools.partial(identity_keys, seed)
  latents = sample_posterior(
    batch.moments,
    normal(keys("posterior", batch.identity, batch.item)),
    scaling_factor,
  )
  item = batch.item if independent_noise else None
  noise = normal(keys("noise", batch.identity, item))
  return Noised(
    noisy_latents=schedule.add_noise(latents, noise, timesteps),
    timesteps=timesteps,
    target=schedule.target(latents, noise, timesteps),
  )


def trajectory(
  batch: Batch,
  schedule: NoiseSchedule,
  seed: int | Array,
  *,
  scaling_factor: float,
) -> Noised:
  """Stored steps for the policy's samples, the forward process for what they meet.

  A stored step is (x_t, t, what the UNet answered), as it was when the policy drew; the
  other images of its list are noised to the same t, with noise of their own.

  Args:
    batch: with a `trajectory`.
    schedule: tables of the forward process.
    seed: the run's seed.
    scaling_factor: of the VAE's latents.

  Returns:
    The noised slots.

  Raises:
    UserError: the batch has no trajectory.

  Reference: Diffusion-DRO (arXiv:2510.18353) and its released code.
  """
  steps = batch.trajectory
  if steps is None:
    raise UserError(
      "noising.name='trajectory' needs the policy's own samples, which come with the "
      "section `online` of the config (as in configs/dro_sd15.py). Set it, or "
      "noising.name='forward'."
    )
  drawn = _noise_at(
    steps.timesteps,
    batch,
    schedule,
    seed,
    scaling_factor=scaling_factor,
    independent_noise=False,
  )
  stored = steps.stored[:, None, None, None]
  return Noised(
    noisy_latents=jnp.where(stored, steps.noisy_latents, drawn.noisy_latents),
    timesteps=steps.timesteps,
    target=jnp.where(stored, steps.target, drawn.target),
  )


NOISINGS: dict[str, Noising] = {"forward": forward, "trajectory": trajectory}


def get(name: str, **options) -> Noising:
  """Returns the noising called `name` with its options bound.

  Args:
    name: a name in `NOISINGS`.
    **options: the noising's keyword-only parameters, but for `scaling_factor`, which
      belongs to the VAE and is given at the call.

  Raises:
    UserError: unknown name or option, or an empty range of timesteps.
  """
  bound = tables.bind("noising", NOISINGS, name, {"scaling_factor": 1.0, **options})
  low, high = options.get("min_timestep", 0), options.get("max_timestep")
  if low < 0 or (high is not None and high <= low):
    raise UserError(
      f"noising.min_timestep={low}, noising.max_timestep={high}: expected "
      "0 <= min_timestep < max_timestep."
    )
  return bound
