"""The autoencoder against diffusers."""

import functools

import jax
import numpy as np
import pytest

from lpo_jax import models
from lpo_jax.errors import UserError

TINY = {
  "block_out_channels": [8, 16],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
  "layers_per_block": 2,
  "norm_num_groups": 4,
}
FULL = {
  **TINY,
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
  "norm_num_groups": 32,
}


def build(config):
  return models.build({"_class_name": "AutoencoderKL", **config})


@pytest.mark.parametrize(
  "config",
  [
    pytest.param(TINY, id="sd"),
    pytest.param(
      {
        **TINY,
        "latent_channels": 6,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
      },
      id="bare",
    ),
  ],
)
def test_equals_diffusers(peer, relative_error, config):
  diffusers = pytest.importorskip("diffusers")
  vae = peer(diffusers.AutoencoderKL(**config), "vae")
  torch, rng = vae.torch, np.random.default_rng(1)
  images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
  channels = config.get("latent_channels", 4)
  latents = rng.standard_normal((2, 5, 6, channels), np.float32)
  with torch.no_grad():
    posterior = vae.module.encode(torch.tensor(images.transpose(0, 3, 1, 2)))
    moments = torch.cat([posterior.latent_dist.mean, posterior.latent_dist.logvar], 1)
    decoded = vae.module.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample

  ours = jax.jit(vae.part.encode)(vae.part.params, images)
  assert ours.shape == (2, 8, 12, 2 * channels)
  assert relative_error(ours, moments.permute(0, 2, 3, 1)) < 1e-5
  ours = jax.jit(vae.part.decode)(vae.part.params, latents)
  assert ours.shape == (2, 10, 12, 3)
  assert relative_error(ours, decoded.permute(0, 2, 3, 1)) < 1e-5


def test_tiles_equal_diffusers(peer, relative_error):
  diffusers = pytest.importorskip("diffusers")
  config = {**TINY, "layers_per_block": 1}
  vae, rng = peer(diffusers.AutoencoderKL(**config), "vae"), np.random.default_rng(1)
  torch, module = vae.torch, vae.module
  # They begin every 24 pixels: two are cut at the lower edge, one at the right.
  images = rng.uniform(-1, 1, (2, 76, 56, 3)).astype(np.float32)
  latents = rng.standard_normal((2, 38, 28, 4), np.float32)
  module.tile_sample_min_size, module.tile_latent_min_size = 32, 16
  module.enable_tiling()
  with torch.no_grad():
    moments = module.encode(torch.tensor(images.transpose(0, 3, 1, 2)))
    moments = moments.latent_dist.parameters.permute(0, 2, 3, 1)
    decoded = module.decode(torch.tensor(latents.transpose(0, 3, 1, 2)))
    decoded = decoded.sample.permute(0, 2, 3, 1)

  for run, x, expected in (
    (vae.part.encode, images, moments),
    (vae.part.decode, latents, decoded),
  ):
    run = jax.jit(run, static_argnames="tile")
    assert relative_error(run(vae.part.params, x, tile=32), expected) < 1e-5
    # Tiles are not the whole: their norms see less of the image.
    whole = run(vae.part.params, x, tile=80)
    assert relative_error(whole, expected) > 1e-3


def test_refuses_tiles_that_cannot_be():
  model = build(TINY)
  image = np.zeros((1, 33, 16, 3), np.float32)
  with pytest.raises(UserError, match=r"vae_tile.* multiple of 8"):
    model.encode(model.abstract_params, image, tile=12)
  with pytest.raises(UserError, match=r"33x16 pixels .* multiples of 2"):
    model.encode(model.abstract_params, image, tile=16)


def test_memory_is_that_of_one_tile():
  fields = {"block_out_channels": [32], "mid_block_add_attention": False}
  model = build({**fields, "norm_num_groups": 4})
  latents = jax.ShapeDtypeStruct((1, 416, 24, 4), np.float32)  # 13 tiles of 32

  def temporary(tile):
    decode = jax.jit(functools.partial(model.decode, tile=tile))
    compiled = decode.lower(model.abstract_params, latents).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(32) < 0.25 * temporary(0)


def test_full_size_parameter_count():
  shapes = build(FULL).named_shapes().values()
  assert sum(np.prod(shape.shape, dtype=np.int64) for shape in shapes) == 83_653_863


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("shift_factor", 0.1),
    ("latents_mean", [0.0] * 4),
    ("act_fn", "relu"),
    ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
  ],
)
def test_refuses_what_it_does_not_implement_by_name(field, value):
  with pytest.raises(UserError, match=field):
    build({**TINY, field: value})
