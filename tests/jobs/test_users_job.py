"""Encoders and forms of the users job."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from lpo_jax.jobs import users
from lpo_jax.scoring import preprocessing


def test_forms_by_hand():
  better = np.array([[1.0, 2.0], [3.0, 6.0]])
  worse = np.array([[0.0, 2.0], [1.0, 0.0]])
  np.testing.assert_array_equal(
    users.FORMS["difference"](better, worse, 3), [[1.5, 3.0]]
  )
  np.testing.assert_array_equal(
    users.FORMS["means"](better, worse, 3), [[2.0, 4.0, 0.5, 1.0]]
  )
  first, second = [1.0, 2.0, 0.0, 2.0], [3.0, 6.0, 1.0, 0.0]
  # Two examples where three were asked for: the first is shown again.
  np.testing.assert_array_equal(
    users.FORMS["pairs"](better, worse, 3), [first, second, first]
  )


def test_pixels_are_mean_grey_levels():
  picture = np.full((32, 32, 3), 255, np.uint8)
  picture[:4, 4:8] = 0
  (found,) = users.ENCODERS["pixels"]("")([picture])
  expected = np.ones((8, 8))
  expected[0, 1] = 0
  np.testing.assert_allclose(found.reshape(8, 8), expected)


def test_clip_gives_transformers_image_embeddings(tmp_path):
  torch = pytest.importorskip("torch")
  import transformers

  torch.set_num_threads(1)
  tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
  tower |= {"num_attention_heads": 2, "projection_dim": 6}
  config = transformers.CLIPConfig(
    text_config={**tower, "vocab_size": 20, "max_position_embeddings": 8},
    vision_config={**tower, "image_size": 16, "patch_size": 8},
    projection_dim=6,
  )
  torch.manual_seed(0)
  model = transformers.CLIPModel(config).eval()
  model.save_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  sizes = [(16, 16), (20, 33), (40, 18)]
  pictures = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
  found = users.ENCODERS["clip"](str(tmp_path))(pictures)
  pixels = preprocessing.prepare(pictures, "crop_rgb", 16)
  with torch.no_grad():
    pooled = model.vision_model(torch.tensor(pixels).permute(0, 3, 1, 2)).pooler_output
    wanted = model.visual_projection(pooled).numpy()
  wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
  assert found.shape == (3, 6)
  np.testing.assert_allclose(found, wanted, atol=1e-5)


class Stored:
  """Image bytes as a source has them, read in an order of its own; 3 is not there."""

  def __init__(self, found):
    self.found = found

  def file_order(self, wanted):
    return np.array([i for i in self.found if i in wanted])

  def read(self, index):
    return self.found[index]


def test_images_that_are_none_describe_nobody():
  def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (grey,) * 3).save(file, "png")
    return file.getvalue()

  source = types.SimpleNamespace(
    images=Stored({2: png(51), 0: b"no image", 1: png(255), 4: png(0)})
  )
  how = types.SimpleNamespace(encoder="pixels", model="")
  found, bad = users._encode(source, [np.array([1, 0]), np.array([2, 3, 1])], how)
  assert bad == [0, 3] and found.keys() == {1, 2}
  np.testing.assert_allclose(found[1], 1.0)
  np.testing.assert_allclose(found[2], 0.2)
