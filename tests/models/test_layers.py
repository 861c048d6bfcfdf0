"""Layers against the formulas, in float64."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import models, trees
from lpo_jax.models import base, layers


def module(make, **values):
  model = base.Model.of(make, {}, base.Settings())
  assert trees.named_leaves(model.abstract_params).keys() == values.keys()
  return model.bind({name: jnp.asarray(value) for name, value in values.items()})


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_norm_survives_a_mean_far_from_zero(mean):
  rng = np.random.default_rng(0)
  x = (rng.standard_normal((2, 3, 5, 8)) + mean).astype(np.float32)
  scale, bias = rng.standard_normal((2, 8), np.float32)
  norm = module(
    lambda: layers.GroupNorm(8, groups=2, eps=1e-5, dtype=jnp.float32),
    scale=scale,
    bias=bias,
  )
  wide = x.astype(np.float64).reshape(2, 15, 2, 4)
  normal = wide - wide.mean((1, 3), keepdims=True)
  normal /= np.sqrt(wide.var((1, 3), keepdims=True) + 1e-5)
  expected = normal.reshape(x.shape) * scale + bias
  np.testing.assert_allclose(norm(x), expected, rtol=0, atol=1e-4 if mean else 2e-6)


def test_gelu_is_exact():
  from scipy.special import erf

  x = np.linspace(-8, 8, 1001)
  expected = x * 0.5 * (1 + erf(x / np.sqrt(2)))
  ours = layers.gelu(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
  slopes = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x, jnp.float32))
  expected = 0.5 * (1 + erf(x / np.sqrt(2))) + x * np.exp(-(x**2) / 2) / np.sqrt(
    2 * np.pi
  )
  np.testing.assert_allclose(slopes, expected, rtol=0, atol=2e-6)


def test_sinusoidal_embedding_by_hand():
  ours = layers.sinusoidal_embedding(
    jnp.asarray([0, 3]), 5, flip_sin_to_cos=True, freq_shift=0
  )
  low = 3 * 10000 ** (-1 / 2)
  expected = [
    [1, 1, 0, 0, 0],
    [np.cos(3), np.cos(low), np.sin(3), np.sin(low), 0],
  ]
  np.testing.assert_allclose(ours, expected, atol=1e-6)
  unflipped = layers.sinusoidal_embedding(
    jnp.asarray([3]), 4, flip_sin_to_cos=False, freq_shift=1
  )
  low = 3 * 10000 ** (-1 / (2 - 1))
  expected = [[np.sin(3), np.sin(low), np.cos(3), np.cos(low)]]
  np.testing.assert_allclose(unflipped, expected, atol=1e-6)


def test_upsampling_repeats_and_crops():
  x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  doubled = layers.upsample_nearest(x, 3, 4)[0, :, :, 0]
  assert doubled.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]


def test_models_import_without_torch_or_hugging_face():
  code = (
    "import sys, lpo_jax.models.unet, lpo_jax.models.vae, lpo_jax.models.clip;"
    "bad = {'torch', 'diffusers', 'transformers', 'safetensors'} & set(sys.modules);"
    "assert not bad, bad"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
  assert set(models.CLASSES) >= {"UNet2DConditionModel", "AutoencoderKL"}
