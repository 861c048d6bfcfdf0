"""Reverse integrators: a denoiser and noise in, latents out, one `lax.scan` each."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.diffusion.schedule import NoiseSchedule
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Array

# (noisy latents [N, h, w, c], timesteps [N]) -> the UNet's output [N, h, w, c]
Denoiser = Callable[[Array, Array], Array]


def guided(denoiser: Denoiser, guidance_scale: float) -> Denoiser:
  """Classifier-free guidance: e = e_null + w (e_text - e_null).

  Args:
    denoiser: runs on [2N, ...] rows, the first N unconditional, the rest conditional.
    guidance_scale: w; 1 is the conditional output alone.

  Returns:
    A denoiser on [N, ...] rows.

  Reference: Ho & Salimans 2022, eq. 6 with w counted from 0.
  """

  def denoise(noisy_latents: Array, timesteps: Array) -> Array:
    twice = denoiser(
      jnp.concatenate([noisy_latents, noisy_latents]),
      jnp.concatenate([timesteps, timesteps]),
    )
    null, text = jnp.split(twice, 2)
    return null + guidance_scale * (text - null)

  return denoise


def ddim(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  *,
  steps: int,
  eta: float = 0.0,
  keys: Array | None = None,
) -> Array:
  """DDIM: x_s = a_s x_0(x_t) + sqrt(s_s^2 - sigma^2) eps(x_t) + sigma n.

  sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s).

  Args:
    denoiser: the UNet, usually `guided`.
    latents: [N, h, w, c] standard normal x_T.
    schedule: tables; its spacing picks the grid.
    steps: number of network evaluations.
    eta: 0 is deterministic, 1 has DDPM's variance.
    keys: [N] typed keys, needed when eta > 0: one stream per image, so that an image
      does not depend on its neighbours.

  Returns:
    [N, h, w, c] fp32 scaled latents x_0.

  Raises:
    UserError: eps is predicted where x_t holds no signal to find x_0 by.

  Reference: Song et al. 2021, eq. 12 and 16.
  """
  timesteps = schedule.sampling_timesteps(steps)
  stride = schedule.num_train_timesteps // steps
  previous = timesteps - stride
  abar = schedule.alphas_cumprod.astype(np.float64)
  abar_t = abar[timesteps]
  if schedule.prediction_type == "epsilon" and np.any(abar_t == 0):
    raise UserError(
      f"sampling starts at timestep {timesteps[0]}, which is pure noise "
      "(rescale_betas_zero_snr), but prediction_type is 'epsilon'. Expected "
      "'v_prediction', or timestep_spacing='leading', which leaves that step out."
    )
  abar_s = np.where(
    previous >= 0, abar[np.maximum(previous, 0)], schedule.final_alpha_cumprod
  )
  # A zero-terminal-SNR schedule has abar_t = 0 at its first step: 1 - 0 / abar_s = 1.
  sigma = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(1 - abar_t / abar_s)
  direction = np.sqrt(np.maximum(1 - abar_s - sigma**2, 0.0))
  table = {
    "t": timesteps,
    "signal": np.sqrt(abar_s).astype(np.float32),
    "direction": direction.astype(np.float32),
    "sigma": sigma.astype(np.float32),
    "index": np.arange(steps, dtype=np.int32),
  }

  def step(x: Array, row: dict[str, Array]) -> tuple[Array, None]:
    t = jnp.full((x.shape[0],), row["t"], jnp.int32)
    clean, noise = schedule.clean_and_noise(denoiser(x, t), x, t)
    x = row["signal"] * clean + row["direction"] * noise
    if eta > 0:
      fresh = jax.vmap(
        lambda key: jax.random.normal(
          jax.random.fold_in(key, row["index"]), x.shape[1:], jnp.float32
        )
      )(keys)
      x = x + row["sigma"] * fresh
    return x, None

  return jax.lax.scan(step, latents.astype(jnp.float32), table)[0]


SAMPLERS: dict[str, Callable[..., Array]] = {"ddim": ddim}


def get(name: str) -> Callable[..., Array]:
  """Returns the sampler called `name`; an unknown name is refused with the list."""
  if name not in SAMPLERS:
    raise unknown_name("sampler", name, SAMPLERS)
  return SAMPLERS[name]
