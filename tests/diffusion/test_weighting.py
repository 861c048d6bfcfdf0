"""Timestep weightings by hand, and what they do to a step."""

import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.diffusion import schedule, weighting
from lpo_jax.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def table(name, prediction_type="epsilon", config=SD, **options):
  forward = schedule.from_config({**config, "prediction_type": prediction_type})
  weights = weighting.get(name, forward, **options)(jnp.arange(1000))
  assert weights.dtype == jnp.float32
  return np.asarray(weights, np.float64)


def snr():
  signal = schedule.from_config(SD).alphas_cumprod.astype(np.float64)
  return signal / (1 - signal)


def test_uniform_is_one():
  assert (table("uniform") == 1).all()
  assert (np.asarray(weighting.one(jnp.arange(3))) == 1).all()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_by_its_formula(gamma):
  # Stable Diffusion's SNR falls from 1175 to 0.0047 and is 5 at t = 188.
  np.testing.assert_allclose(snr()[[0, -1]], [1175.5, 0.004682], rtol=2e-3)
  least = np.minimum(snr(), gamma)
  np.testing.assert_allclose(table("min_snr", gamma=gamma), least / snr(), rtol=1e-5)
  v = table("min_snr", "v_prediction", gamma=gamma)
  np.testing.assert_allclose(v, least / (snr() + 1), rtol=1e-5)


def test_min_snr_without_any_signal_at_the_end():
  weights = table("min_snr", config={**SD, "rescale_betas_zero_snr": True})
  assert weights[-1] == 1 and np.isfinite(weights).all()


def test_decay_by_hand():
  weights = table("decay", rate=0.9)
  np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-6)
  # A fiftieth of the chain is 20 timesteps.
  np.testing.assert_allclose(weights[20:] / weights[:-20], 1 / 0.9, rtol=1e-5)
  assert (table("decay", rate=1.0) == 1).all()


def test_sigmoid_by_its_formula():
  expected = 1 / (1 + np.exp(np.log(snr()) - 2.0))
  np.testing.assert_allclose(table("sigmoid", bias=2.0), expected, rtol=1e-5)
  end = table("sigmoid", config={**SD, "rescale_betas_zero_snr": True})[-1]
  assert end == 1


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("min-snr", {}, "min_snr"),
    ("min_snr", {"gama": 5.0}, "gamma"),
    ("min_snr", {"gamma": 0.0}, "positive"),
    ("decay", {"rate": 1.5}, "at most 1"),
  ],
)
def test_what_cannot_be_is_refused(name, options, words):
  with pytest.raises(UserError, match=words):
    table(name, **options)
