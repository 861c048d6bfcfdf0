"""A widened UNet predicts what it did, whatever the source; others are refused."""

import json

import jax
import numpy as np
import pytest

from lpo_jax import pretrained
from lpo_jax.errors import UserError
from lpo_jax.jobs import widen


def test_a_widened_unet_predicts_the_same(tiny_world, tmp_path):
  outcome = tiny_world.run(tmp_path, job="widen")
  assert outcome.code == 0, outcome.text
  folder = tmp_path / "editing_base"
  before = pretrained.load(tiny_world.pipeline, "unet")
  after = pretrained.load(folder, "unet")
  index = json.loads((folder / "model_index.json").read_text("utf-8"))
  assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
  channels = before.config["in_channels"]
  assert after.config["in_channels"] == 2 * channels
  rng = np.random.default_rng(0)
  size = before.config["sample_size"]
  latents, source = rng.standard_normal((2, 2, size, size, channels), np.float32)
  embeds = rng.standard_normal((2, 4, before.config["cross_attention_dim"]), np.float32)
  times = np.array([10, 900])
  plain = jax.jit(before.apply)(before.params, latents, times, embeds)
  edits = jax.jit(after.apply)
  np.testing.assert_allclose(
    edits(after.params, latents, times, embeds, source_latents=source), plain, atol=2e-6
  )
  # diffusers' way of giving both: one array.
  joined = np.concatenate([latents, source], -1)
  np.testing.assert_array_equal(
    edits(after.params, joined, times, embeds),
    edits(after.params, latents, times, embeds, source_latents=source),
  )
  # And with weights that see it, the source matters.
  seeing = {**after.params, "conv_in": dict(after.params["conv_in"])}
  seeing["conv_in"]["kernel"] = seeing["conv_in"]["kernel"] + 0.1
  assert np.abs(edits(seeing, joined, times, embeds) - plain).max() > 1e-2
  with pytest.raises(UserError, match=f"takes {2 * channels} channels; expected"):
    widen.widened(after, channels)
