"""Forward tables, targets and sampling grids, against diffusers and by hand."""

import math

import numpy as np
import pytest

from lpo_jax.diffusion import schedule
from lpo_jax.errors import UserError

# Stable Diffusion 1 and XL; the rest are diffusers' own defaults.
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [
  {"beta_schedule": "linear"},
  {"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195},
  SD,
  {"beta_schedule": "squaredcos_cap_v2"},
  {**SD, "num_train_timesteps": 200},
  {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
  {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
]
SPACINGS = [
  {"timestep_spacing": "leading", "steps_offset": 0},
  {"timestep_spacing": "leading", "steps_offset": 1},
  {"timestep_spacing": "linspace"},
  {"timestep_spacing": "trailing"},
]


@pytest.fixture(scope="module")
def peer():
  """Makes diffusers' DDIM scheduler of a config."""
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  from diffusers import DDIMScheduler

  return lambda config: DDIMScheduler(**{"clip_sample": False, **config})


@pytest.mark.parametrize("config", BETAS, ids=str)
def test_tables_are_diffusers(peer, config):
  ours = schedule.from_config(config)
  theirs = peer(config).alphas_cumprod.double().numpy()
  assert ours.num_train_timesteps == len(theirs)
  assert ours.alphas_cumprod.dtype == np.float32
  # Theirs is a product of up to a thousand fp32 factors.
  np.testing.assert_allclose(ours.alphas_cumprod, theirs, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("config", SPACINGS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 16, 20, 25, 30, 48, 50, 100, 333, 999])
def test_sampling_timesteps_are_diffusers(peer, config, steps):
  scheduler = peer({**SD, **config})
  scheduler.set_timesteps(steps)
  ours = schedule.from_config({**SD, **config}).sampling_timesteps(steps)
  assert ours.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("config", SPACINGS, ids=str)
@pytest.mark.parametrize("total", [1000, 200])
def test_every_grid_falls_and_stays_in_the_schedule(config, total):
  tables = schedule.from_config({**SD, **config, "num_train_timesteps": total})
  for steps in range(1, total):  # `total` itself: below
    grid = tables.sampling_timesteps(steps)
    assert len(grid) == steps
    assert grid[-1] >= 0 and grid[0] < total
    assert np.all(np.diff(grid) < 0)


def test_grids_that_do_not_exist_are_refused():
  tables = schedule.from_config({**SD, "steps_offset": 1})
  for steps in (0, -1, 1001):
    with pytest.raises(UserError, match=f"steps={steps}: expected 1 to 1000"):
      tables.sampling_timesteps(steps)
  with pytest.raises(UserError, match=r"first timestep is 1000, expected below 1000"):
    tables.sampling_timesteps(1000)
  whole = schedule.from_config(SD).sampling_timesteps(1000)
  assert whole.tolist() == list(range(999, -1, -1))


def test_tables_by_hand():
  tables = schedule.from_config(
    {"beta_start": 0.1, "beta_end": 0.3, "num_train_timesteps": 3}
  )
  np.testing.assert_allclose(
    tables.alphas_cumprod, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], rtol=1e-6
  )
  assert tables.final_alpha_cumprod == 1.0
  unset = schedule.from_config({**SD, "set_alpha_to_one": False})
  np.testing.assert_allclose(unset.final_alpha_cumprod, 1 - 0.00085, rtol=1e-12)


def test_scaled_linear_is_linear_in_the_root():
  tables = schedule.from_config({**SD, "num_train_timesteps": 3})
  middle = ((math.sqrt(0.00085) + math.sqrt(0.012)) / 2) ** 2
  expected = np.cumprod([1 - 0.00085, 1 - middle, 1 - 0.012])
  np.testing.assert_allclose(tables.alphas_cumprod, expected, rtol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start():
  before = schedule.from_config(SD).alphas_cumprod
  after = schedule.from_config({**SD, "rescale_betas_zero_snr": True}).alphas_cumprod
  assert after[-1] == 0.0
  np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
  assert np.all(np.diff(after) < 0)


@pytest.mark.parametrize("config", BETAS, ids=str)
@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_clean_and_noise_undo_target(config, prediction_type):
  tables = schedule.from_config({**config, "prediction_type": prediction_type})
  rng = np.random.default_rng(0)
  total = tables.num_train_timesteps
  # The last steps of some schedules hold next to no signal: eps cannot be undone there.
  timesteps = np.linspace(0, total * 0.9, 32).astype(np.int32)
  latents, noise = rng.standard_normal((2, 32, 3, 2, 4)).astype(np.float32)
  noisy = tables.add_noise(latents, noise, timesteps)
  target = tables.target(latents, noise, timesteps)
  clean, guess = tables.clean_and_noise(target, noisy, timesteps)
  np.testing.assert_allclose(clean, latents, rtol=0, atol=2e-5)
  np.testing.assert_allclose(guess, noise, rtol=0, atol=2e-5)


def test_target_by_hand():
  quarter = np.asarray([0.25, 0.64], np.float32)  # a = 0.5, 0.8; s = sqrt(0.75), 0.6
  latents = np.asarray([[[[2.0]]], [[[2.0]]]], np.float32)
  noise = np.asarray([[[[-1.0]]], [[[-1.0]]]], np.float32)
  timesteps = np.asarray([1, 0])
  epsilon = schedule.NoiseSchedule(quarter)
  velocity = schedule.NoiseSchedule(quarter, prediction_type="v_prediction")
  noisy = [0.8 * 2 - 0.6, 0.5 * 2 - math.sqrt(0.75)]
  v = [0.8 * -1 - 0.6 * 2, 0.5 * -1 - math.sqrt(0.75) * 2]

  def flat(x):
    return np.asarray(x).ravel()

  arguments = (latents, noise, timesteps)
  np.testing.assert_allclose(flat(epsilon.add_noise(*arguments)), noisy, rtol=1e-6)
  np.testing.assert_allclose(flat(velocity.target(*arguments)), v, rtol=1e-6)
  np.testing.assert_array_equal(epsilon.target(*arguments), noise)


@pytest.mark.parametrize("config", BETAS[:4], ids=str)
def test_noising_is_diffusers(peer, config):
  torch = pytest.importorskip("torch")
  scheduler, tables = peer(config), schedule.from_config(config)
  velocity = schedule.from_config({**config, "prediction_type": "v_prediction"})
  rng = np.random.default_rng(0)
  latents, noise = rng.standard_normal((2, 16, 2, 2, 4)).astype(np.float32)
  timesteps = np.linspace(0, tables.num_train_timesteps - 1, 16).astype(np.int64)
  arguments = [torch.from_numpy(x) for x in (latents, noise, timesteps)]
  for ours, theirs in (
    (tables.add_noise, scheduler.add_noise),
    (velocity.target, scheduler.get_velocity),
  ):
    np.testing.assert_allclose(
      ours(latents, noise, timesteps), theirs(*arguments).numpy(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
  ("config", "words"),
  [
    ({"beta_schedule": "scaled_liner"}, "did you mean 'scaled_linear'"),
    ({"prediction_type": "sample"}, "unknown prediction_type 'sample'"),
    ({"timestep_spacing": "trail"}, "did you mean 'trailing'"),
    ({"trained_betas": [0.1]}, "trained_betas=\\[0.1\\], which is not supported"),
    ({"thresholding": True}, "thresholding=True, which is not supported"),
    ({"clip_sample": True}, "clip_sample=True, which is not supported"),
  ],
)
def test_what_would_be_another_process_is_refused(config, words):
  with pytest.raises(UserError, match=words):
    schedule.from_config(config)


def test_absent_and_false_fields_are_defaults():
  plain = schedule.from_config({})
  spelled = schedule.from_config(
    {
      "_class_name": "DDIMScheduler",
      "beta_schedule": "linear",
      "beta_start": 0.0001,
      "beta_end": 0.02,
      "num_train_timesteps": 1000,
      "prediction_type": "epsilon",
      "timestep_spacing": "leading",
      "steps_offset": 0,
      "trained_betas": None,
      "thresholding": False,
      "clip_sample": False,
      "set_alpha_to_one": True,
      "rescale_betas_zero_snr": False,
    }
  )
  np.testing.assert_array_equal(plain.alphas_cumprod, spelled.alphas_cumprod)
  assert (plain.prediction_type, plain.timestep_spacing, plain.steps_offset) == (
    spelled.prediction_type,
    spelled.timestep_spacing,
    spelled.steps_offset,
  )
