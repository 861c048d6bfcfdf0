"""How much an error counts by its timestep: an option beside every objective.

A weighting multiplies the three scalars of an image. Differences of errors, and with
them implicit rewards, are weighted alike, so for an objective with a beta it is a beta
of t: the omega(lambda_t) of the papers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from lpo_jax import tables
from lpo_jax.diffusion.schedule import NoiseSchedule
from lpo_jax.errors import UserError
from lpo_jax.types import Array

# Timesteps [S] int -> weights [S] fp32.
Weighting = Callable[[Array], Array]


def one(timesteps: Array) -> Array:
  """The weighting of a method that has none."""
  return jnp.ones(timesteps.shape, jnp.float32)


def uniform(schedule: NoiseSchedule) -> np.ndarray:
  """w_t = 1: what every released preference code does."""
  return np.ones(schedule.num_train_timesteps)


def decay(schedule: NoiseSchedule, *, rate: float = 0.9) -> np.ndarray:
  """w_t ~ rate^(50 (T - 1 - t) / T): a discount along the way to the image.

  The first steps of sampling, from pure noise, count most; the mean over t is 1, so
  that a beta keeps its meaning.

  Args:
    schedule: for T.
    rate: of a fiftieth of the chain, so that it means the same for any T.

  Raises:
    UserError: a rate outside of (0, 1].

  Reference: Yang et al. 2024, "A dense reward view on aligning text-to-image diffusion
  with preference" (the discount; its chain has 50 steps).
  """
  if not 0 < rate <= 1:
    raise UserError(f"weighting.rate={rate}: expected above 0 and at most 1.")
  total = schedule.num_train_timesteps
  weights = rate ** (np.arange(total)[::-1] * 50 / total)
  return weights / weights.mean()


def min_snr(schedule: NoiseSchedule, *, gamma: float = 5.0) -> np.ndarray:
  """w_t = min(SNR_t, gamma) / SNR_t for noise, / (SNR_t + 1) for v.

  SNR_t = a_t^2 / s_t^2. In terms of x_0's error both are min(SNR_t, gamma).

  Args:
    schedule: for SNR_t and for what the UNet predicts.
    gamma: where the weight of clean images stops to grow.

  Raises:
    UserError: a gamma that is not positive.

  Reference: Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting
  strategy", section 3.4 (gamma = 5).
  """
  if gamma <= 0:
    raise UserError(f"weighting.gamma={gamma}: expected a positive number.")
  signal = np.asarray(schedule.alphas_cumprod, np.float64)
  snr = signal / (1 - signal)
  if schedule.prediction_type == "v_prediction":
    return np.minimum(snr, gamma) / (snr + 1)
  # min(SNR, gamma) / SNR where SNR may be 0: at the end of zero terminal SNR schedules.
  return gamma / np.maximum(snr, gamma)


def sigmoid(schedule: NoiseSchedule, *, bias: float = 0.0) -> np.ndarray:
  """w_t = sigmoid(bias - lambda_t), lambda_t = log SNR_t: falls as images get clean.

  Args:
    schedule: for lambda_t.
    bias: the log SNR at which the weight is one half.

  Reference: CaPO (arXiv:2502.02588), after Kingma and Gao 2023.
  """
  signal = np.asarray(schedule.alphas_cumprod, np.float64)
  # 1 / (1 + e^-bias SNR), without a logarithm of 0.
  return (1 - signal) / (1 - signal + np.exp(-bias) * signal)


WEIGHTINGS: dict[str, Callable[..., np.ndarray]] = {
  "uniform": uniform,
  "decay": decay,
  "min_snr": min_snr,
  "sigmoid": sigmoid,
}


def get(name: str, schedule: NoiseSchedule, **options) -> Weighting:
  """Returns the weighting called `name` for a schedule.

  Args:
    name: a name in `WEIGHTINGS`.
    schedule: the forward process.
    **options: the weighting's keyword-only parameters.

  Returns:
    A function of timesteps [S] that gives weights [S] fp32.

  Raises:
    UserError: unknown name or option, or an option out of range.
  """
  bound = tables.bind("weighting", WEIGHTINGS, name, options)
  weights = bound(schedule).astype(np.float32)
  return lambda timesteps: jnp.asarray(weights)[timesteps]
