"""DDIM against diffusers step by step, and against what is known of a Gaussian."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.diffusion import samplers, schedule
from lpo_jax.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (3, 2, 2, 4)
GRIDS = [
  {"timestep_spacing": "leading", "steps_offset": 0},
  {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
  {"timestep_spacing": "linspace"},
  {"timestep_spacing": "trailing"},
  {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
  {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
]


def network(x, t, tanh):
  """Any smooth function of x and t, for NumPy, torch and jax alike."""
  return 0.8 * tanh(1.3 * x + 0.001 * t)


def start():
  return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def ours_by_step(config, steps, **options):
  """Returns every input of the network and the result, from `samplers.ddim`."""
  seen = []

  def denoiser(x, t):
    seen.append((int(t[0]), np.asarray(x)))
    return network(x, t.astype(jnp.float32).reshape(-1, 1, 1, 1), jnp.tanh)

  with jax.disable_jit():
    tables = schedule.from_config(config)
    last = samplers.ddim(denoiser, jnp.asarray(start()), tables, steps=steps, **options)
  return [*seen, (-1, np.asarray(last))]


def theirs_by_step(config, steps, *, eta=0.0, fresh=None):
  """The same from diffusers."""
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  from diffusers import DDIMScheduler

  scheduler = DDIMScheduler(clip_sample=False, **config)
  scheduler.set_timesteps(steps)
  x, seen = torch.from_numpy(start()), []
  for i, t in enumerate(scheduler.timesteps):
    seen.append((int(t), x.numpy()))
    noise = None if fresh is None else torch.from_numpy(fresh[i])
    output = network(x, float(t), torch.tanh)
    x = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
  return [*seen, (-1, x.numpy())]


def assert_same_path(ours, theirs, tolerance):
  assert [t for t, _ in ours] == [t for t, _ in theirs]
  for (t, a), (_, b) in zip(ours, theirs, strict=True):
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error < tolerance, (t, error)


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 7, 20])
def test_ddim_is_diffusers_step_by_step(grid, prediction_type, steps):
  config = {**SD, **grid, "prediction_type": prediction_type}
  if prediction_type == "epsilon" and config.get("rescale_betas_zero_snr"):
    with pytest.raises(
      UserError, match=r"timestep 999, which is pure noise.*'epsilon'"
    ):
      ours_by_step(config, steps)  # diffusers divides by zero
    return
  # Their tables are fp32 products: the cosine's last ones are 1e-5 off, so is 1 / a_t.
  tolerance = 5e-4 if "squaredcos_cap_v2" in config.values() else 1e-5
  assert_same_path(
    ours_by_step(config, steps), theirs_by_step(config, steps), tolerance
  )


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("grid", GRIDS[1:4:2], ids=str)
def test_stochastic_ddim_is_diffusers_step_by_step(grid, eta):
  steps, config = 6, {**SD, **grid}
  keys = jax.random.split(jax.random.key(1), SHAPE[0])
  fresh = [
    np.stack([jax.random.normal(jax.random.fold_in(k, i), SHAPE[1:]) for k in keys])
    for i in range(steps)
  ]
  assert_same_path(
    ours_by_step(config, steps, eta=eta, keys=keys),
    theirs_by_step(config, steps, eta=eta, fresh=fresh),
    1e-5,
  )


def gaussian_denoiser(tables, mean, deviation):
  """The exact network for x_0 ~ N(mean, deviation^2): E[output | x_t]."""

  def denoiser(x, t):
    a, s = tables.coefficients(t, x.ndim)
    noise = s * (x - a * mean) / (a**2 * deviation**2 + s**2)
    clean = mean + a * deviation**2 * (x - a * mean) / (a**2 * deviation**2 + s**2)
    return tables.target(clean, noise, t)

  return denoiser


MEAN, DEVIATION = 0.7, 0.4


@functools.cache
def flow(prediction_type, steps, deviation=DEVIATION):
  """Largest error of DDIM against the exact flow of a Gaussian."""
  tables = schedule.from_config(
    {**SD, "timestep_spacing": "trailing", "prediction_type": prediction_type}
  )
  x = jnp.linspace(-2.0, 2.0, 16).reshape(1, 2, 2, 4)
  last = samplers.ddim(
    gaussian_denoiser(tables, MEAN, deviation), x, tables, steps=steps
  )
  # The flow keeps the standard score: (x_t - a mean) / sqrt(a^2 dev^2 + s^2).
  abar = float(tables.alphas_cumprod[-1])
  score = (x - abar**0.5 * MEAN) / (abar * deviation**2 + 1 - abar) ** 0.5
  return float(jnp.abs(last - (MEAN + deviation * score)).max())


def test_ddim_converges_in_first_order():
  errors = [flow("epsilon", steps, 1.0) for steps in (25, 50, 100, 200)]
  # A little below 2: near the image s_t grows with the root of t.
  for coarse, fine in itertools.pairwise(errors):
    assert 1.85 < coarse / fine < 2.05, errors
  assert errors[-1] < 0.02


def test_prediction_types_integrate_the_same_flow():
  np.testing.assert_allclose(
    flow("v_prediction", 50), flow("epsilon", 50), rtol=0, atol=2e-6
  )


def ancestral_moments(abar):
  """Mean and variance that DDPM ends with on the Gaussian, and where it should end.

  Ho et al. 2020, eq. 7: x_s ~ N(c_0 E[x_0 | x_t] + c_t x_t, sigma^2), from x_T ~ N(0, 1).
  """
  mean, variance = 0.0, 1.0
  for now, then in itertools.pairwise([*abar, 1.0]):
    alpha = now / then
    c_0 = then**0.5 * (1 - alpha) / (1 - now)
    c_t = alpha**0.5 * (1 - then) / (1 - now)
    # E[x_0 | x_t] = MEAN + gain (x_t - a_t MEAN)
    gain = now**0.5 * DEVIATION**2 / (now * DEVIATION**2 + 1 - now)
    mean = (c_0 * gain + c_t) * mean + c_0 * MEAN * (1 - gain * now**0.5)
    variance = (c_0 * gain + c_t) ** 2 * variance + (1 - then) / (1 - now) * (1 - alpha)
  return mean, variance


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_stochastic_ddim_is_ancestral_sampling_of_a_gaussian(prediction_type):
  tables = schedule.from_config(
    {**SD, "timestep_spacing": "trailing", "prediction_type": prediction_type}
  )
  count, steps = 128, 100
  x = jax.random.normal(jax.random.key(0), (count, 8, 8, 4))
  last = np.asarray(
    samplers.ddim(
      gaussian_denoiser(tables, MEAN, DEVIATION),
      x,
      tables,
      steps=steps,
      eta=1.0,
      keys=jax.random.split(jax.random.key(1), count),
    )
  )
  grid = tables.alphas_cumprod.astype(np.float64)
  mean, variance = ancestral_moments(grid[tables.sampling_timesteps(steps)])
  # 32768 draws: deviations of the estimates are 0.0022 and 0.8 % of the variance.
  assert abs(last.mean() - mean) < 0.01
  assert abs(last.var() / variance - 1) < 0.03
  # And with all steps that is the Gaussian itself.
  mean, variance = ancestral_moments(grid[::-1])
  assert abs(mean - MEAN) < 0.01
  assert abs(variance / DEVIATION**2 - 1) < 0.03


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_certain_image_is_found_in_any_number_of_steps(eta):
  tables = schedule.from_config(SD)
  image = jnp.linspace(-1.0, 1.0, 4).reshape(1, 1, 1, 4)
  keys = jax.random.split(jax.random.key(0), 2)
  for steps in (1, 5):
    last = samplers.ddim(
      gaussian_denoiser(tables, image, 0.0),
      jnp.ones((2, 2, 2, 4)),
      tables,
      steps=steps,
      eta=eta,
      keys=keys,
    )
    np.testing.assert_allclose(last, jnp.broadcast_to(image, last.shape), atol=1e-5)


def test_an_image_does_not_depend_on_its_neighbours():
  tables = schedule.from_config(SD)
  keys = jax.random.split(jax.random.key(5), 3)

  def sample(rows):
    return samplers.ddim(
      gaussian_denoiser(tables, MEAN, DEVIATION),
      jnp.asarray(start())[rows],
      tables,
      steps=4,
      eta=1.0,
      keys=keys[rows],
    )

  together = sample(np.asarray([0, 1, 2]))
  np.testing.assert_allclose(sample(np.asarray([1])), together[1:2], atol=1e-6)
  np.testing.assert_allclose(
    sample(np.asarray([2, 0])), together[np.asarray([2, 0])], atol=1e-6
  )
  assert not np.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize(("scale", "factor"), [(0, 2), (1, 5), (7.5, 24.5), (-1, -1)])
def test_guidance_goes_from_the_unconditional_to_the_conditional(scale, factor):
  def denoiser(x, t):  # 2 (x + t) for the first half, 5 (x + t) for the second
    count = x.shape[0] // 2
    by_row = jnp.repeat(jnp.asarray([2.0, 5.0]), count)[:, None, None, None]
    return by_row * (x + t[:, None, None, None])

  x, t = jnp.asarray(start()), jnp.asarray([10, 20, 30])
  out = samplers.guided(denoiser, scale)(x, t)
  np.testing.assert_allclose(
    out, factor * (x + t[:, None, None, None]), rtol=1e-5, atol=1e-5
  )


def test_samplers_by_name():
  assert samplers.get("ddim") is samplers.ddim
  with pytest.raises(UserError, match="unknown sampler 'dimm'; did you mean 'ddim'"):
    samplers.get("dimm")
