"""Samplers against diffusers step by step, and against what is known of a Gaussian."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.diffusion import samplers, schedule, scheduler_fields
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


def ours_by_step(config, steps, name="ddim", **options):
  """Returns every input of the network and the result, from the sampler `name`."""
  seen, sampler = [], samplers.get(name)

  def denoiser(x, t):
    seen.append((t[0].item(), np.asarray(x)))
    return network(x, t.astype(jnp.float32).reshape(-1, 1, 1, 1), jnp.tanh)

  with jax.disable_jit():
    tables = schedule.from_config(config)
    last = sampler(denoiser, jnp.asarray(start()), tables, steps=steps, **options)
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
  expected = [t for t, _ in theirs]
  assert [type(t) for t, _ in ours] == [type(t) for t in expected]
  # Levels between timesteps are as far off as their fp32 tables are.
  assert [t for t, _ in ours] == pytest.approx(expected, rel=0, abs=0.05)
  if all(float(t).is_integer() for t in expected):
    assert [t for t, _ in ours] == expected
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


def their_scheduler(name, config, sigmas="schedule"):
  import diffusers

  options = {
    "ddpm": {"clip_sample": False},
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
  }
  config = {k: v for k, v in config.items() if k != "set_alpha_to_one"}
  config |= options.get(name, {})
  if sigmas == "karras":
    config["use_karras_sigmas"] = True
  return getattr(diffusers, THEIRS[name])(**config)


THEIRS = {
  "ddpm": "DDPMScheduler",
  "dpmpp_2m": "DPMSolverMultistepScheduler",
  "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
  "euler": "EulerDiscreteScheduler",
  "euler_ancestral": "EulerAncestralDiscreteScheduler",
}


def path_of(scheduler, steps, fresh=None):
  """Every input of the network and the result, from any scheduler of diffusers.

  Schedulers that draw their own noise are shown two copies of x at once. The two results
  give the deviation they draw with and the mean; the step is then taken with `fresh`.
  """
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  scheduler.set_timesteps(steps)
  x, seen = torch.from_numpy(start()) * scheduler.init_noise_sigma, []
  for i, t in enumerate(scheduler.timesteps):
    shown = scheduler.scale_model_input(x, t)
    seen.append((t.item(), shown.numpy()))
    output = network(shown, float(t), torch.tanh)
    if fresh is None:
      x = scheduler.step(output, t, x).prev_sample
      continue
    twice = (torch.stack([output] * 2), t, torch.stack([x] * 2))
    drawn = torch.randn(twice[0].shape, generator=torch.manual_seed(i))
    rows = scheduler.step(*twice, generator=torch.manual_seed(i)).prev_sample
    apart, gap = (rows[0] - rows[1]).double(), (drawn[0] - drawn[1]).double()
    deviation = (apart * gap).sum() / (gap * gap).sum()
    assert float((apart - deviation * gap).abs().max()) < 1e-5 * float(rows.abs().max())
    mean = rows[0].double() - deviation * drawn[0]
    x = (mean + deviation * torch.from_numpy(fresh[i])).float()
  return [*seen, (-1, x.numpy())]


# What SD 1.5, SD 2 and SDXL ship, and the grids that are advised for them.
SHIPPED = {
  "sd15_sdxl": {"timestep_spacing": "leading", "steps_offset": 1},
  "sd2_v": {
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "v_prediction",
  },
  "sd2_v_trailing": {
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
  },
  "sdxl_trailing": {"timestep_spacing": "trailing"},
  "linspace": {"timestep_spacing": "linspace"},
  "linspace_v": {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
}


def tolerance(name, config):
  # Their Euler carries x / a in fp32, which without terminal signal is up to 4096:
  # half an ulp of that is 2.4e-4 of what is left of it at the image.
  carried = name.startswith("euler") and config.get("rescale_betas_zero_snr")
  return 1e-3 if carried else 1e-4


@pytest.mark.parametrize("config", SHIPPED.values(), ids=SHIPPED)
@pytest.mark.parametrize("sigmas", ["schedule", "karras"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "euler"])
def test_deterministic_samplers_are_diffusers_step_by_step(name, sigmas, config):
  pytest.importorskip("torch")
  config = {**SD, **config}
  for steps in (1, 2, 7, 20):
    assert_same_path(
      ours_by_step(config, steps, name, sigmas=sigmas),
      path_of(their_scheduler(name, config, sigmas), steps),
      tolerance(name, config),
    )


@pytest.mark.parametrize("config", SHIPPED.values(), ids=SHIPPED)
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "euler_ancestral"])
def test_stochastic_samplers_are_diffusers_step_by_step(name, config):
  pytest.importorskip("torch")
  config = {**SD, **config}
  keys = jax.random.split(jax.random.key(1), SHAPE[0])
  for steps in (1, 2, 7):
    fresh = [
      np.stack([jax.random.normal(jax.random.fold_in(k, i), SHAPE[1:]) for k in keys])
      for i in range(steps)
    ]
    assert_same_path(
      ours_by_step(config, steps, name, keys=keys),
      path_of(their_scheduler(name, config), steps, fresh),
      tolerance(name, config),
    )


# To sigma = 0 the last step is of first order whatever these say.
HARMLESS = {"lower_order_final": False, "euler_at_final": True}


@pytest.mark.parametrize(("field", "value"), HARMLESS.items())
def test_fields_that_change_nothing_where_the_last_sigma_is_zero(field, value):
  pytest.importorskip("torch")
  config = {**SD, **SHIPPED["sd15_sdxl"]}
  scheduler_fields.refuse_others("dpmpp_2m", {**config, field: value})
  for steps in (2, 7):
    theirs = path_of(their_scheduler("dpmpp_2m", {**config, field: value}), steps)
    assert_same_path(ours_by_step(config, steps, "dpmpp_2m"), theirs, 1e-4)


REFUSED = [
  ("dpmpp_2m", "solver_order", 3),
  ("dpmpp_2m", "solver_order", 1),
  ("dpmpp_2m", "solver_type", "heun"),
  ("dpmpp_2m", "algorithm_type", "dpmsolver"),
  ("dpmpp_2m", "final_sigmas_type", "sigma_min"),
  ("dpmpp_2m", "use_exponential_sigmas", True),
  ("dpmpp_2m", "use_lu_lambdas", True),
  ("dpmpp_2m", "use_flow_sigmas", True),
  ("dpmpp_2m", "lambda_min_clipped", -2.0),
  ("euler", "final_sigmas_type", "sigma_min"),
  ("euler", "use_exponential_sigmas", True),
  ("euler", "use_beta_sigmas", True),
  ("euler", "interpolation_type", "log_linear"),
  ("euler", "timestep_type", "continuous"),
]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_fields_that_would_draw_something_else_are_refused_by_name(name, field, value):
  """And rightly: with this field alone changed, diffusers draws something else."""
  pytest.importorskip("torch")
  config = {**SD, "timestep_spacing": "linspace"}
  if field == "timestep_type":  # of v prediction alone
    config["prediction_type"] = "v_prediction"
  with pytest.raises(UserError, match=f"has {field}={value!r}, which sampler '{name}'"):
    scheduler_fields.refuse_others(name, {**config, field: value})
  if field == "algorithm_type":
    value = {"algorithm_type": value, "final_sigmas_type": "sigma_min"}
  else:
    value = {field: value}
  scheduler = their_scheduler(name, config)
  changed = type(scheduler).from_config(scheduler.config, **value)
  before, after = (path_of(s, 7)[-1][1] for s in (scheduler, changed))
  assert np.abs(before - after).max() > 1e-4 * np.abs(before).max()


@pytest.mark.parametrize("name", [*THEIRS, "ddim"])
def test_no_field_of_their_schedulers_is_ignored_unseen(name):
  diffusers = pytest.importorskip("diffusers")
  kind = getattr(diffusers, THEIRS.get(name, "DDIMScheduler"))
  fields = set(inspect.signature(kind.__init__).parameters) - {"self"}
  process = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "prediction_type", "timestep_spacing", "steps_offset"),
    *("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample", "thresholding"),
  }
  # These say how to do what is refused.
  details = {
    *("dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range"),
    *("flow_shift", "time_shift_type"),
  }
  seen = process | details | {"use_karras_sigmas", *HARMLESS}
  assert fields <= seen | set(scheduler_fields.EXPECTED[name])


def test_what_the_files_defaults_are_is_accepted():
  for name in samplers.SAMPLERS:
    scheduler_fields.refuse_others(name, {})
    scheduler_fields.refuse_others(name, {"variance_type": None})
  assert scheduler_fields.sigmas({"use_karras_sigmas": True}) == "karras"
  assert scheduler_fields.sigmas({"use_karras_sigmas": False}) == "schedule"
  assert scheduler_fields.sigmas({}) == "schedule"


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


def log_schedule(total):
  """A schedule whose sigmas go evenly in their logarithm from 0.1 to 10."""
  sigma = np.exp(np.linspace(np.log(0.1), np.log(10.0), total))
  abar = (1 / (1 + sigma**2)).astype(np.float32)
  return schedule.NoiseSchedule(abar, timestep_spacing="linspace")


def endpoint(sampler, steps):
  """Where the exact flow of N(MEAN, 1) ends if the last step, to 0, is the sampler's.

  That step is of first order in every sampler (x_0 = E[x_0 | x]) and of fixed size.
  """
  tables, seen = log_schedule(1 + 960), []
  x = jnp.linspace(-2.0, 2.0, 16).reshape(1, 2, 2, 4)
  exact = gaussian_denoiser(tables, MEAN, 1.0)

  def denoiser(x, t):
    jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
    return exact(x, t.astype(jnp.int32))

  last = np.asarray(sampler(denoiser, x, tables, steps=steps))
  jax.effects_barrier()
  sigma = [
    float((1 / tables.alphas_cumprod[t] - 1) ** 0.5) for t in (seen[0], seen[-1])
  ]
  first = np.asarray(x, np.float64) * (1 + sigma[0] ** 2) ** 0.5  # x / a
  if sampler is samplers.euler:
    first = np.asarray(x, np.float64) * sigma[0]
  # (x / a - MEAN) / sqrt(1 + sigma^2) stays; E[x_0 | x] = MEAN + (x / a - MEAN) / (1 + sigma^2)
  score = (first - MEAN) / (1 + sigma[0] ** 2) ** 0.5
  return last, MEAN + score / (1 + sigma[1] ** 2) ** 0.5


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_orders_of_convergence(name, order):
  errors = []
  for steps in (15, 30, 60, 120):
    last, exact = endpoint(samplers.get(name), steps)
    errors.append(np.abs(last - exact).max())
  slopes = -np.diff(np.log2(errors))
  assert np.all(np.abs(slopes - order) < 0.25), (slopes, errors)
  assert abs(slopes[-1] - order) < 0.12, (slopes, errors)


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_ancestral_samplers_have_the_variance_of_a_gaussian(name, prediction_type):
  tables = schedule.from_config(
    {**SD, "timestep_spacing": "trailing", "prediction_type": prediction_type}
  )
  count, steps = 128, 100
  denoiser = gaussian_denoiser(tables, MEAN, DEVIATION)
  last = np.asarray(
    samplers.get(name)(
      lambda x, t: denoiser(x, t.astype(jnp.int32)),
      jax.random.normal(jax.random.key(0), (count, 8, 8, 4)),
      tables,
      steps=steps,
      keys=jax.random.split(jax.random.key(1), count),
    )
  )
  grid = tables.alphas_cumprod.astype(np.float64)[tables.sampling_timesteps(steps)]
  # 100 steps forget x_T, so that Euler's s_T in its place makes no difference here.
  mean, variance = ancestral_moments(grid)
  # 32768 draws: deviations of the estimates are 0.0022 and 0.8 % of the variance.
  assert abs(last.mean() - mean) < 0.01
  assert abs(last.var() / variance - 1) < 0.03


def test_euler_is_ddim_on_the_same_grid():
  # Both are first-order steps in sigma; only the scale of the first x differs.
  tables = schedule.from_config({**SD, "timestep_spacing": "trailing"})
  abar = tables.alphas_cumprod[-1]
  denoiser = gaussian_denoiser(tables, MEAN, DEVIATION)
  x = jnp.asarray(start())
  np.testing.assert_allclose(
    samplers.euler(lambda x, t: denoiser(x, t.astype(jnp.int32)), x, tables, steps=20),
    samplers.ddim(denoiser, x * (1 - abar) ** 0.5, tables, steps=20),
    atol=2e-5,
  )


def test_ddpm_with_all_steps_is_ddim_with_eta_1():
  tables = schedule.from_config({**SD, "num_train_timesteps": 20})
  options = {"steps": 20, "keys": jax.random.split(jax.random.key(2), SHAPE[0])}
  arguments = (gaussian_denoiser(tables, MEAN, DEVIATION), jnp.asarray(start()), tables)
  np.testing.assert_allclose(
    samplers.ddpm(*arguments, **options),
    samplers.ddim(*arguments, **options, eta=1.0),
    atol=1e-5,
  )


STOCHASTIC = ["ddpm", "dpmpp_2m_sde", "euler_ancestral"]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samplers_that_draw_want_keys(name):
  tables = schedule.from_config(SD)
  arguments = (gaussian_denoiser(tables, MEAN, DEVIATION), jnp.ones(SHAPE), tables)
  with pytest.raises(UserError, match="expected keys, one per image"):
    samplers.get(name)(*arguments, steps=3)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_refuses_to_predict_noise_from_noise(name):
  config = {**SD, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
  with pytest.raises(UserError, match="timestep 999, which is pure noise"):
    ours_by_step(config, 3, name)


def test_sigmas_by_name():
  with pytest.raises(UserError, match="unknown sigmas 'karas'; did you mean 'karras'"):
    ours_by_step(SD, 3, "euler", sigmas="karas")


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


SHIFTS = (0, 13, 49)


def path_on_grids(config, shifts=SHIFTS, rows=slice(None)):
  """`dpmpp_2m_path` of the smooth network, one grid an image; 20 steps."""

  def denoiser(x, t):
    return network(x, t.astype(jnp.float32).reshape(-1, 1, 1, 1), jnp.tanh)

  tables = schedule.from_config(config)
  run = jax.jit(
    lambda x, s: samplers.dpmpp_2m_path(denoiser, x, tables, steps=20, shifts=s)
  )
  return run(jnp.asarray(start())[rows], jnp.asarray(shifts))


@pytest.mark.parametrize("prediction_type", schedule.PREDICTION_TYPES)
def test_a_grid_for_each_image_is_diffusers_on_that_grid(prediction_type):
  """Each image against a scheduler of its own, set to the timesteps of its own grid."""
  torch = pytest.importorskip("torch")
  config = {**SD, "prediction_type": prediction_type}
  clean, path = path_on_grids(config)
  assert path.timesteps.shape == (3, 20)
  assert path.noisy_latents.shape == path.outputs.shape == (3, 20, 2, 2, 4)
  for row, shift in enumerate(SHIFTS):
    scheduler = their_scheduler("dpmpp_2m", config)
    grid = list(range(950 + shift, -1, -50))
    assert path.timesteps[row].tolist() == grid
    scheduler.set_timesteps(timesteps=grid)
    x = torch.from_numpy(start()[row : row + 1])
    for i, t in enumerate(scheduler.timesteps):
      output = network(x, float(t), torch.tanh)
      ours = (path.noisy_latents[row, i], path.outputs[row, i])
      for mine, theirs in zip(ours, (x, output), strict=True):
        np.testing.assert_allclose(mine, theirs[0].numpy(), rtol=0, atol=1e-4)
      x = scheduler.step(output, t, x).prev_sample
    np.testing.assert_allclose(clean[row], x[0].numpy(), rtol=0, atol=1e-4)


def test_grids_of_neighbours_do_not_matter():
  clean, path = path_on_grids(SD)
  for row, shift in enumerate(SHIFTS):
    alone, its_path = path_on_grids(SD, (shift,), slice(row, row + 1))
    np.testing.assert_allclose(alone[0], clean[row], atol=1e-5)
    for mine, theirs in zip(*map(jax.tree.leaves, (its_path, path)), strict=True):
      np.testing.assert_allclose(mine[0], theirs[row], atol=1e-5)


def test_the_last_shift_is_the_trailing_grid():
  tables = schedule.from_config({**SD, "timestep_spacing": "trailing"})

  def denoiser(x, t):
    return network(x, t.astype(jnp.float32).reshape(-1, 1, 1, 1), jnp.tanh)

  plain = samplers.dpmpp_2m(denoiser, jnp.asarray(start()), tables, steps=20)
  np.testing.assert_allclose(
    path_on_grids(SD, (49, 49, 49))[0], plain, rtol=0, atol=1e-5
  )


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


@pytest.mark.parametrize(
  ("text_scale", "image_scale", "factor"),
  [(0, 0, 11), (0, 1, 5), (1, 1, 2), (7.5, 1.5, 11 + 1.5 * -6 + 7.5 * -3)],
)
def test_edit_guidance_goes_by_the_image_to_the_text(text_scale, image_scale, factor):
  def denoiser(x, t):  # text and image: 2 (x + t); image: 5 (x + t); none: 11 (x + t)
    by_row = jnp.repeat(jnp.asarray([2.0, 5.0, 11.0]), x.shape[0] // 3)
    return by_row[:, None, None, None] * (x + t[:, None, None, None])

  x, t = jnp.asarray(start()), jnp.asarray([10, 20, 30])
  out = samplers.guided_edit(denoiser, text_scale, image_scale)(x, t)
  np.testing.assert_allclose(
    out, factor * (x + t[:, None, None, None]), rtol=1e-5, atol=1e-4
  )


def test_samplers_by_name():
  assert samplers.get("ddim") is samplers.ddim
  with pytest.raises(UserError, match="unknown sampler 'dimm'; did you mean 'ddim'"):
    samplers.get("dimm")
