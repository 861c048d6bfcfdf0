"""Reverse integrators: a denoiser and noise in, latents out, one `lax.scan` each.

Every sampler here is linear in what it knows, so that each is a table of numbers, made
in fp64 before anything is traced, and `_integrate` is all that runs:

  x_s = keep x_t + clean x_0(x_t) + before x_0(x_r) + fresh n

with t the present noise level, s the next one, r the one before, and n new noise.
Samplers published for y = x / a = x_0 + sigma eps, sigma = s_t / a_t, are brought here
by x = y / sqrt(sigma^2 + 1), which is what they show the network anyway.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.diffusion.schedule import NoiseSchedule
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.types import Array

# (noisy latents [N, h, w, c], timesteps [N]) -> the UNet's output [N, h, w, c]
Denoiser = Callable[[Array, Array], Array]
# timesteps [steps] and sigmas [steps] (or [steps + 1], with the 0 at the end)
Grid = tuple[np.ndarray, np.ndarray]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
  """All that a sampler showed the network, and what it answered; images first.

  Attributes:
    timesteps: [N, steps] int32 or fp32, as the network was told.
    noisy_latents: [N, steps, h, w, c] fp32 x_t before each step.
    outputs: [N, steps, h, w, c] fp32 the denoiser's output there.
  """

  timesteps: Array
  noisy_latents: Array
  outputs: Array


# Stands for abar = 0 where a sampler needs sigma finite; diffusers' choice.
LEAST_ABAR = 2.0**-24


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


def guided_edit(denoiser: Denoiser, text_scale: float, image_scale: float) -> Denoiser:
  """Two-way guidance: e = e_0 + w_I (e_I - e_0) + w_T (e_TI - e_I).

  Args:
    denoiser: runs on [3N, ...] rows: the first N given text and image, the next N the
      image alone, the last N neither. Diffusers' InstructPix2Pix has this order.
    text_scale: w_T.
    image_scale: w_I; with both 1 the fully conditional output alone.

  Returns:
    A denoiser on [N, ...] rows.

  Reference: Brooks et al. 2023 (InstructPix2Pix), eq. 3.
  """

  def denoise(noisy_latents: Array, timesteps: Array) -> Array:
    rows = [jnp.concatenate([rows] * 3) for rows in (noisy_latents, timesteps)]
    both, image, none = jnp.split(denoiser(*rows), 3)
    return none + image_scale * (image - none) + text_scale * (both - image)

  return denoise


def _nothing(*_: Array) -> None:
  """Keeps nothing of a step."""


def _integrate(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  timesteps: np.ndarray,
  abar: np.ndarray,
  table: Mapping[str, np.ndarray],
  keys: Array | None = None,
) -> Array:
  """Runs a table (module docstring) to its end; the arguments are `_scan`'s."""
  return _scan(denoiser, latents, schedule, timesteps, abar, table, keys)[0]


def _scan(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  timesteps: np.ndarray,
  abar: np.ndarray,
  table: Mapping[str, np.ndarray],
  keys: Array | None = None,
  *,
  grids: Array | None = None,
  record: Callable[[Array, Array, Array], Any] = _nothing,
) -> tuple[Array, Any]:
  """Runs a table (module docstring); absent columns are zero.

  Args:
    denoiser, latents, schedule, keys: as for `ddim`.
    timesteps: [steps] int32 or fp32, as the network is told; [G, steps] of G grids.
    abar: [steps] or [G, steps] fp64 a_t^2.
    table: "keep", "clean" and perhaps "before", "fresh": [steps] or [G, steps] fp64.
    grids: [N] int32 which of G grids each image is on; None where there is one.
    record: (timesteps [N], x_t, network's output) -> what to keep of a step.

  Returns:
    The last x, and what was recorded, steps first.
  """
  first = np.max(timesteps)
  at_start = schedule.alphas_cumprod[int(np.ceil(first))]
  if schedule.prediction_type == "epsilon" and at_start == 0:
    raise UserError(
      f"sampling starts at timestep {first:g}, which is pure noise "
      "(rescale_betas_zero_snr), but prediction_type is 'epsilon'. Expected "
      "'v_prediction', or timestep_spacing='leading', which leaves that step out."
    )
  if "fresh" in table and keys is None:
    raise UserError("this sampler draws noise: expected keys, one per image; got None.")
  table = {**table, "signal": np.sqrt(abar), "sigma": np.sqrt(1 - abar)}
  rows = {name: jnp.asarray(column, jnp.float32) for name, column in table.items()}
  rows["t"] = jnp.asarray(timesteps)
  if grids is not None:  # [G, steps] -> [steps, N], and to multiply images by
    rows = {name: column[grids].T for name, column in rows.items()}
    rows = {n: x if n == "t" else x[..., None, None, None] for n, x in rows.items()}
  rows["index"] = jnp.arange(timesteps.shape[-1], dtype=jnp.int32)

  def step(carry: tuple[Array, Array], row: dict[str, Array]) -> tuple:
    x, before = carry
    told = jnp.broadcast_to(row["t"], (x.shape[0],))
    output = denoiser(x, told)
    kept = record(told, x, output)
    if schedule.prediction_type == "epsilon":
      clean = (x - row["sigma"] * output) / row["signal"]
    else:
      clean = row["signal"] * x - row["sigma"] * output
    x = row["keep"] * x + row["clean"] * clean
    if "before" in row:
      x = x + row["before"] * before
    if "fresh" in row:
      folded = jax.vmap(jax.random.fold_in, (0, None))(keys, row["index"])
      draw = functools.partial(jax.random.normal, shape=x.shape[1:], dtype=jnp.float32)
      x = x + row["fresh"] * jax.vmap(draw)(folded)
    return (x, clean), kept

  x = latents.astype(jnp.float32)
  (x, _), kept = jax.lax.scan(step, (x, jnp.zeros_like(x)), rows)
  return x, kept


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
    UserError: no keys to draw by, or eps is predicted where x_t holds no signal.

  Reference: Song et al. 2021, eq. 12 and 16.
  """
  timesteps = schedule.sampling_timesteps(steps)
  previous = timesteps - schedule.num_train_timesteps // steps
  abar = schedule.alphas_cumprod.astype(np.float64)
  abar_t = abar[timesteps]
  abar_s = np.where(
    previous >= 0, abar[np.maximum(previous, 0)], schedule.final_alpha_cumprod
  )
  # A zero-terminal-SNR schedule has abar_t = 0 at its first step: 1 - 0 / abar_s = 1.
  sigma = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(1 - abar_t / abar_s)
  # eps(x_t) = (x_t - a_t x_0(x_t)) / s_t
  keep = np.sqrt(np.maximum(1 - abar_s - sigma**2, 0.0) / (1 - abar_t))
  table = {"keep": keep, "clean": np.sqrt(abar_s) - np.sqrt(abar_t) * keep}
  if eta > 0:
    table["fresh"] = sigma
  return _integrate(denoiser, latents, schedule, timesteps, abar_t, table, keys)


def ddpm(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  *,
  steps: int,
  keys: Array | None = None,
) -> Array:
  """DDPM: x_s is drawn from q(x_s | x_t, x_0(x_t)), the forward process' posterior.

  The smaller variance of the paper's two ("fixed_small"). Unlike DDIM with eta 1 it goes
  on to the grid's next point, not by T // steps.

  Args:
    denoiser, latents, schedule, steps: as for `ddim`.
    keys: [N] typed keys, one stream per image; required.

  Returns:
    [N, h, w, c] fp32 scaled latents x_0.

  Raises:
    UserError: no keys, or eps is predicted where x_t holds no signal.

  Reference: Ho et al. 2020, eq. 6 and 7.
  """
  timesteps = schedule.sampling_timesteps(steps)
  abar = schedule.alphas_cumprod.astype(np.float64)[timesteps]
  abar_s = np.append(abar[1:], 1.0)
  alpha = abar / abar_s
  table = {
    "keep": np.sqrt(alpha) * (1 - abar_s) / (1 - abar),
    "clean": np.sqrt(abar_s) * (1 - alpha) / (1 - abar),
    "fresh": np.sqrt((1 - abar_s) / (1 - abar) * (1 - alpha)),
  }
  return _integrate(denoiser, latents, schedule, timesteps, abar, table, keys)


def _levels(schedule: NoiseSchedule) -> np.ndarray:
  """Returns sigma = s_t / a_t of every timestep, [T] fp64, all finite."""
  abar = schedule.alphas_cumprod.astype(np.float64)
  abar = np.where(abar == 0, LEAST_ABAR, abar)
  return np.sqrt((1 - abar) / abar)


def _schedule_sigmas(
  levels: np.ndarray, timesteps: np.ndarray, first: float, last: float
) -> Grid:
  """The noise levels of the grid, interpolated between timesteps."""
  del first, last  # the grid has its own
  return timesteps, np.interp(timesteps, np.arange(len(levels)), levels)


def _karras_sigmas(
  levels: np.ndarray, timesteps: np.ndarray, first: float, last: float
) -> Grid:
  """sigma^(1/7) falls evenly (Karras et al. 2022, eq. 5); t by log sigma."""
  ends = np.interp([first, last], np.arange(len(levels)), levels) ** (1 / 7)
  sigmas = np.linspace(ends[0], ends[1], len(timesteps)) ** 7
  return np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels))), sigmas


# (levels [T], timesteps [steps], first and last timestep) -> timesteps, sigmas [steps]
SIGMAS: dict[str, Callable[..., Grid]] = {
  "schedule": _schedule_sigmas,
  "karras": _karras_sigmas,
}


def _spread(sigmas: str) -> Callable[..., Grid]:
  if sigmas not in SIGMAS:
    raise unknown_name("sigmas", sigmas, SIGMAS)
  return SIGMAS[sigmas]


def _dpmpp_grid(schedule: NoiseSchedule, steps: int, sigmas: str) -> Grid:
  """Returns DPM-Solver's timesteps [steps] int32 and sigmas [steps + 1], the last 0."""
  # Diffusers leaves out this grid's end at the image, except from "trailing".
  extra = 0 if schedule.timestep_spacing == "trailing" else 1
  grid = schedule.sampling_timesteps(steps + extra)[:steps]
  last = schedule.num_train_timesteps - 1
  timesteps, sigma = _spread(sigmas)(_levels(schedule), grid, last, 0)
  return np.round(timesteps).astype(np.int32), np.append(sigma, 0.0)


def _second_order(
  clean: np.ndarray, ratio: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Splits x_0's weight over the two last estimates: x_0 + h / (2 h_r) (x_0 - x_0_r).

  First order where there is no estimate before, and where h is infinite: to sigma = 0.
  """
  gain, h = np.zeros_like(clean), -np.log(ratio[:-1])
  gain[1:-1] = h[1:] / h[:-1] / 2
  return clean * (1 + gain), -clean * gain


def dpmpp_2m(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  *,
  steps: int,
  sigmas: str = "schedule",
) -> Array:
  """DPM-Solver++(2M): x_s = (s_s / s_t) x_t + a_s (1 - e^-h) (x_0 extrapolated by h / 2).

  h = log(sigma_t / sigma_s). The midpoint form, ending at sigma = 0.

  Args:
    denoiser: the UNet, usually `guided`.
    latents: [N, h, w, c] standard normal x_T.
    schedule: tables; its spacing picks the grid.
    steps: number of network evaluations.
    sigmas: "schedule" for the grid's noise levels, "karras" for levels even in
      sigma^(1/7) from the schedule's largest to its smallest.

  Returns:
    [N, h, w, c] fp32 scaled latents x_0.

  Raises:
    UserError: an unknown `sigmas`, or eps is predicted where x_t holds no signal.

  Reference: Lu et al. 2022 (DPM-Solver++), algorithm 2.
  """
  timesteps, sigma = _dpmpp_grid(schedule, steps, sigmas)
  abar, table = _dpmpp_2m_table(sigma)
  return _integrate(denoiser, latents, schedule, timesteps, abar, table)


def _dpmpp_2m_table(sigma: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns abar [steps] and DPM-Solver++(2M)'s columns for levels [steps + 1]."""
  a = 1 / np.sqrt(sigma**2 + 1)
  ratio = sigma[1:] / sigma[:-1]  # e^-h
  clean, before = _second_order(a[1:] * (1 - ratio), ratio)
  table = {"keep": a[1:] / a[:-1] * ratio, "clean": clean, "before": before}
  return a[:-1] ** 2, table


def dpmpp_2m_path(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  *,
  steps: int,
  shifts: Array,
) -> tuple[Array, Path]:
  """`dpmpp_2m` along a grid of each image's own, and all that it showed the network.

  The grid of shift j is T/steps (steps - 1) + j, ..., T/steps + j, j. With i uniform on
  the steps and j uniform on 0 to T/steps - 1, timestep i of grid j is uniform on all T.

  Args:
    denoiser, latents, schedule: as for `dpmpp_2m`; the schedule's own spacing is not
      looked at.
    steps: number of network evaluations; divides T, so that every timestep is met.
    shifts: [N] int32 in 0 to T/steps - 1.

  Returns:
    [N, h, w, c] fp32 scaled latents x_0, and the path there.

  Raises:
    UserError: steps that do not divide T, or eps is predicted where x_t holds no signal.

  Reference: Lu et al. 2022 (DPM-Solver++), algorithm 2; the shifts are Diffusion-DRO's
  (arXiv:2510.18353, released code).
  """
  total = schedule.num_train_timesteps
  if not 1 <= steps <= total or total % steps:
    near = [n for n in range(1, total + 1) if total % n == 0]
    raise UserError(
      f"{steps} steps along shifted grids: expected a divisor of the schedule's {total} "
      f"timesteps, such as {min(near, key=lambda n: abs(n - steps))}."
    )
  stride = total // steps
  grid = np.arange(steps)[::-1] * stride + np.arange(stride)[:, None]  # [stride, steps]
  levels = _levels(schedule)[grid]
  columns = [_dpmpp_2m_table(np.append(row, 0.0)) for row in levels]
  abar = np.stack([row for row, _ in columns])
  table = {n: np.stack([t[n] for _, t in columns]) for n in columns[0][1]}
  clean, (told, noisy, outputs) = _scan(
    denoiser, latents, schedule, grid.astype(np.int32), abar, table,
    grids=shifts, record=lambda t, x, output: (t, x, output.astype(jnp.float32)),
  )  # fmt: skip
  images_first = functools.partial(jnp.swapaxes, axis1=0, axis2=1)
  return clean, jax.tree.map(images_first, Path(told, noisy, outputs))


def dpmpp_2m_sde(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  *,
  steps: int,
  sigmas: str = "schedule",
  keys: Array | None = None,
) -> Array:
  """SDE-DPM-Solver++(2M): `dpmpp_2m` for the reverse SDE.

  x_s = (s_s / s_t) e^-h x_t + a_s (1 - e^-2h) (x_0 extrapolated) + s_s sqrt(1 - e^-2h) n

  Args:
    denoiser, latents, schedule, steps, sigmas: as for `dpmpp_2m`.
    keys: [N] typed keys, one stream per image; required.

  Returns:
    [N, h, w, c] fp32 scaled latents x_0.

  Raises:
    UserError: as for `dpmpp_2m`, or no keys.

  Reference: Lu et al. 2022 (DPM-Solver++), eq. 19.
  """
  timesteps, sigma = _dpmpp_grid(schedule, steps, sigmas)
  a = 1 / np.sqrt(sigma**2 + 1)
  ratio = sigma[1:] / sigma[:-1]  # e^-h
  clean, before = _second_order(a[1:] * (1 - ratio**2), ratio)
  table = {
    "keep": a[1:] / a[:-1] * ratio**2,
    "clean": clean,
    "before": before,
    "fresh": a[1:] * sigma[1:] * np.sqrt(1 - ratio**2),
  }
  return _integrate(denoiser, latents, schedule, timesteps, a[:-1] ** 2, table, keys)


def _euler_grid(
  schedule: NoiseSchedule, latents: Array, steps: int, sigmas: str
) -> tuple[np.ndarray, np.ndarray, Array]:
  """Returns Euler's timesteps [steps] fp32, sigmas [steps + 1] and first x."""
  grid = schedule.sampling_timesteps(steps).astype(np.float64)
  if schedule.timestep_spacing == "linspace":  # not rounded, unlike DDIM's
    grid = np.linspace(0, schedule.num_train_timesteps - 1, steps)[::-1]
  timesteps, sigma = _spread(sigmas)(_levels(schedule), grid, grid[0], grid[-1])
  # From the schedule's end y is sigma n; "leading" counts an x_0 of variance 1 in.
  if schedule.timestep_spacing != "leading":
    latents = latents * (sigma[0] / np.sqrt(sigma[0] ** 2 + 1))
  return timesteps.astype(np.float32), np.append(sigma, 0.0), latents


def euler(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  *,
  steps: int,
  sigmas: str = "schedule",
) -> Array:
  """Euler's rule in sigma, for y = x / a: y_s = y_t + (sigma_s - sigma_t) eps(y_t).

  Args:
    denoiser: the UNet, usually `guided`; told fp32 timesteps, which "linspace" and
      "karras" put between the integers.
    latents: [N, h, w, c] standard normal; scaled to the first noise level here.
    schedule: tables; its spacing picks the grid.
    steps: number of network evaluations.
    sigmas: "schedule" for the grid's noise levels, "karras" for levels even in
      sigma^(1/7) between the grid's ends.

  Returns:
    [N, h, w, c] fp32 scaled latents x_0.

  Raises:
    UserError: an unknown `sigmas`, or eps is predicted where x_t holds no signal.

  Reference: Karras et al. 2022, algorithm 2 without churn.
  """
  timesteps, sigma, x = _euler_grid(schedule, latents, steps, sigmas)
  a = 1 / np.sqrt(sigma**2 + 1)
  ratio = sigma[1:] / sigma[:-1]
  # eps(y_t) = (y_t - x_0(y_t)) / sigma_t
  table = {"keep": a[1:] / a[:-1] * ratio, "clean": a[1:] * (1 - ratio)}
  return _integrate(denoiser, x, schedule, timesteps, a[:-1] ** 2, table)


def euler_ancestral(
  denoiser: Denoiser,
  latents: Array,
  schedule: NoiseSchedule,
  *,
  steps: int,
  keys: Array | None = None,
) -> Array:
  """Euler's rule down to sigma_down, then noise up to sigma_s, for y = x / a.

  y_s = y_t + (sigma_down - sigma_t) eps(y_t) + sigma_up n, with
  sigma_up^2 = sigma_s^2 (1 - sigma_s^2 / sigma_t^2), sigma_down = sigma_s^2 / sigma_t.

  Args:
    denoiser, latents, schedule, steps: as for `euler`.
    keys: [N] typed keys, one stream per image; required.

  Returns:
    [N, h, w, c] fp32 scaled latents x_0.

  Raises:
    UserError: no keys, or eps is predicted where x_t holds no signal.

  Reference: k-diffusion's sample_euler_ancestral (Crowson 2022).
  """
  timesteps, sigma, x = _euler_grid(schedule, latents, steps, "schedule")
  a = 1 / np.sqrt(sigma**2 + 1)
  down = sigma[1:] ** 2 / sigma[:-1]
  up = sigma[1:] * np.sqrt(1 - (sigma[1:] / sigma[:-1]) ** 2)
  table = {
    "keep": a[1:] / a[:-1] * down / sigma[:-1],
    "clean": a[1:] * (1 - down / sigma[:-1]),
    "fresh": a[1:] * up,
  }
  return _integrate(denoiser, x, schedule, timesteps, a[:-1] ** 2, table, keys)


SAMPLERS: dict[str, Callable[..., Array]] = {
  "ddim": ddim,
  "ddpm": ddpm,
  "dpmpp_2m": dpmpp_2m,
  "dpmpp_2m_sde": dpmpp_2m_sde,
  "euler": euler,
  "euler_ancestral": euler_ancestral,
}


def get(name: str) -> Callable[..., Array]:
  """Returns the sampler called `name`; an unknown name is refused with the list."""
  if name not in SAMPLERS:
    raise unknown_name("sampler", name, SAMPLERS)
  return SAMPLERS[name]
