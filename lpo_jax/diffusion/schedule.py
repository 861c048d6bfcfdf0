"""Noise schedules: the forward process' tables, from a `scheduler_config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Array

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
  """Variance-preserving forward process q(x_t | x_0) = N(a_t x_0, s_t^2 I).

  a_t = sqrt(alphas_cumprod[t]), s_t = sqrt(1 - alphas_cumprod[t]). Tables are NumPy, so
  that a jitted function holds them as constants.

  Attributes:
    alphas_cumprod: [T] fp32, the product of 1 - beta up to and including t.
    prediction_type: "epsilon" or "v_prediction": what the UNet outputs.
    timestep_spacing: "leading", "linspace" or "trailing": the sampling grid.
    steps_offset: added to the "leading" grid.
    final_alpha_cumprod: alphas_cumprod "before t = 0", where sampling ends.
  """

  alphas_cumprod: np.ndarray
  prediction_type: str = "epsilon"
  timestep_spacing: str = "leading"
  steps_offset: int = 0
  final_alpha_cumprod: float = 1.0

  @property
  def num_train_timesteps(self) -> int:
    """T, the number of forward steps."""
    return len(self.alphas_cumprod)

  def coefficients(self, timesteps: Array, ndim: int) -> tuple[Array, Array]:
    """Returns a_t and s_t, [N, 1, ...] fp32, to broadcast over arrays of `ndim` axes."""
    alpha_bar = jnp.asarray(self.alphas_cumprod)[timesteps]
    shape = (-1,) + (1,) * (ndim - 1)
    return (
      jnp.sqrt(alpha_bar).reshape(shape),
      jnp.sqrt(1.0 - alpha_bar).reshape(shape),
    )

  def add_noise(self, latents: Array, noise: Array, timesteps: Array) -> Array:
    """x_t = a_t x_0 + s_t eps; latents, noise [N, ...], timesteps [N] int."""
    signal, sigma = self.coefficients(timesteps, latents.ndim)
    return signal * latents + sigma * noise

  def target(self, latents: Array, noise: Array, timesteps: Array) -> Array:
    """What the UNet should output: eps, or v = a_t eps - s_t x_0 (Salimans & Ho 2022)."""
    if self.prediction_type == "epsilon":
      return noise
    signal, sigma = self.coefficients(timesteps, latents.ndim)
    return signal * noise - sigma * latents

  def clean_and_noise(
    self, prediction: Array, noisy_latents: Array, timesteps: Array
  ) -> tuple[Array, Array]:
    """Inverts the UNet's output into its estimates of x_0 and eps, [N, ...] fp32."""
    signal, sigma = self.coefficients(timesteps, noisy_latents.ndim)
    if self.prediction_type == "epsilon":
      return (noisy_latents - sigma * prediction) / signal, prediction
    clean = signal * noisy_latents - sigma * prediction
    return clean, signal * prediction + sigma * noisy_latents

  def sampling_timesteps(self, steps: int) -> np.ndarray:
    """Returns the [steps] int timesteps of a sampler, from noise to image.

    Raises:
      UserError: `steps` is not in 1..T, or `steps_offset` moves the grid past T.
    """
    total = self.num_train_timesteps
    if not 1 <= steps <= total:
      raise UserError(f"sampling steps={steps}: expected 1 to {total}.")
    grid = SPACINGS[self.timestep_spacing](total, steps, self.steps_offset)
    if grid[0] >= total:
      raise UserError(
        f"sampling steps={steps}: with steps_offset={self.steps_offset} the first "
        f"timestep is {grid[0]}, expected below {total}. Take fewer steps."
      )
    return grid


def _leading(total: int, steps: int, offset: int) -> np.ndarray:
  return (np.arange(steps) * (total // steps))[::-1].astype(np.int32) + offset


def _linspace(total: int, steps: int, offset: int) -> np.ndarray:
  del offset  # only the "leading" grid has one
  return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int32)


def _trailing(total: int, steps: int, offset: int) -> np.ndarray:
  del offset
  # Rounding gives some step counts (61, 103, ...) one point too many, at -1.
  grid = np.arange(total, 0, -total / steps)[:steps]
  return (np.round(grid) - 1).astype(np.int32)


SPACINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {
  "leading": _leading,
  "linspace": _linspace,
  "trailing": _trailing,
}


def _linear(start: float, end: float, total: int) -> np.ndarray:
  return np.linspace(start, end, total, dtype=np.float64)


def _scaled_linear(start: float, end: float, total: int) -> np.ndarray:
  return np.linspace(start**0.5, end**0.5, total, dtype=np.float64) ** 2


def _squaredcos_cap_v2(start: float, end: float, total: int) -> np.ndarray:
  del start, end  # the cosine schedule has no end points

  def alpha_bar(time: np.ndarray) -> np.ndarray:
    return np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2

  steps = np.arange(total, dtype=np.float64)
  return np.minimum(
    1 - alpha_bar((steps + 1) / total) / alpha_bar(steps / total), 0.999
  )


BETA_SCHEDULES: dict[str, Callable[[float, float, int], np.ndarray]] = {
  "linear": _linear,
  "scaled_linear": _scaled_linear,
  "squaredcos_cap_v2": _squaredcos_cap_v2,
}


def rescale_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(alphas_cumprod) so that the last step is pure noise.

  a'_t = (a_t - a_T) a_0 / (a_0 - a_T)

  Args:
    alphas_cumprod: [T] fp64.

  Returns:
    [T] fp64 with the first value kept and the last 0.

  Reference: Lin et al. 2024, "Common diffusion noise schedules and sample steps are
  flawed", algorithm 1.
  """
  signal = np.sqrt(alphas_cumprod)
  first, last = signal[0], signal[-1]
  return ((signal - last) * first / (first - last)) ** 2


def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
  """Builds the schedule that a diffusers `scheduler_config.json` describes.

  Args:
    config: the parsed file; absent fields mean diffusers' defaults.

  Raises:
    UserError: a schedule, prediction type or spacing we do not have, or a field that
      would change the process (`trained_betas`, `thresholding`, `clip_sample`).
  """
  name = config.get("beta_schedule", "linear")
  if name not in BETA_SCHEDULES:
    raise unknown_name("beta_schedule", name, BETA_SCHEDULES)
  prediction_type = config.get("prediction_type", "epsilon")
  if prediction_type not in PREDICTION_TYPES:
    raise unknown_name("prediction_type", prediction_type, PREDICTION_TYPES)
  spacing = config.get("timestep_spacing", "leading")
  if spacing not in TIMESTEP_SPACINGS:
    raise unknown_name("timestep_spacing", spacing, TIMESTEP_SPACINGS)
  for field in ("trained_betas", "thresholding", "clip_sample"):
    if config.get(field):
      raise UserError(
        f"scheduler_config.json has {field}={config[field]!r}, which is not supported; "
        f"expected it absent or false."
      )
  betas = BETA_SCHEDULES[name](
    config.get("beta_start", 0.0001),
    config.get("beta_end", 0.02),
    config.get("num_train_timesteps", 1000),
  )
  alphas_cumprod = np.cumprod(1.0 - betas)
  if config.get("rescale_betas_zero_snr"):
    alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
  final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
  return NoiseSchedule(
    alphas_cumprod=alphas_cumprod.astype(np.float32),
    prediction_type=prediction_type,
    timestep_spacing=spacing,
    steps_offset=config.get("steps_offset", 0),
    final_alpha_cumprod=final,
  )
