"""The real networks, as shapes: lpo_jax/assets/architectures holds their config.json."""

import json
import math
import pathlib

import pytest

from lpo_jax import models

FOLDER = pathlib.Path(__file__).parents[2] / "lpo_jax" / "assets" / "architectures"
# Equal to torch's (see the slow test), and the first to what is published.
PARAMETERS = {
  "sd15_unet": 859_520_964,
  "sd21_unet": 865_910_724,
  "sdxl_unet": 2_567_463_684,
  "sdxl_refiner_unet": 2_259_526_660,
  "ssd1b_unet": 1_331_334_404,
  "ip2p_unet": 859_532_484,
  "sd_vae": 83_653_863,
  "sdxl_vae": 83_653_863,
  "clip_vit_l_text": 123_060_480,
  "openclip_h_text": 340_387_840,
  "openclip_bigg_text": 694_659_840,
  "clip_vit_l_vision": 303_966_208,
  "openclip_h_vision": 632_076_800,
}


def test_every_architecture_is_counted():
  assert {file.stem for file in FOLDER.glob("*.json")} == PARAMETERS.keys()


def read(name):
  return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_has_as_many_parameters_as_the_real_one(name):
  shapes = models.build(read(name)).named_shapes().values()
  assert sum(math.prod(leaf.shape) for leaf in shapes) == PARAMETERS[name]


def test_runs_of_equal_blocks_are_stacked():
  """SDXL's 70 transformer blocks lie in 11 stacks, 10 in a row in 6 of them."""
  name = "attn1.to_q.kernel"
  shapes = models.build(read("sdxl_unet")).named_shapes()
  depths = [leaf.shape[0] for key, leaf in shapes.items() if key.endswith(name)]
  assert sorted(depths) == [2] * 5 + [10] * 6
  # Stable Diffusion 1 has no two in a row.
  assert not any(
    "each" in key for key in models.build(read("sd15_unet")).named_shapes()
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_torch_counts_the_same(name):
  torch = pytest.importorskip("torch")
  config = read(name)
  with torch.device("meta"):
    if "_class_name" in config:
      diffusers = pytest.importorskip("diffusers")
      module = getattr(diffusers, config["_class_name"]).from_config(config)
    else:
      transformers = pytest.importorskip("transformers")
      kind = config["architectures"][0]
      fields = "CLIPVisionConfig" if "Vision" in kind else "CLIPTextConfig"
      module = getattr(transformers, kind)(getattr(transformers, fields)(**config))
  assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]
