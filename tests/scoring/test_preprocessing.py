"""Pictures prepared as the scorers' own stacks prepare them, from the same PNG on."""

import numpy as np
import pytest
from PIL import Image

from lpo_jax.errors import UserError
from lpo_jax.scoring import preprocessing

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def test_crop_rgb_equals_transformers(opened):
  module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
  processor = module.CLIPImageProcessorPil(
    size={"shortest_edge": 45}, crop_size={"height": 45, "width": 45}
  )
  for picture in opened:
    theirs = processor(picture)["pixel_values"][0]
    ours = preprocessing.crop_rgb(picture, 45)
    assert np.abs(ours - np.transpose(theirs, (1, 2, 0))).max() < 1e-6, picture


def torchvision_crop(picture, size):
  """`Resize(size, BICUBIC)`, `CenterCrop(size)`, RGB and `Normalize`, in other words."""
  w, h = picture.size
  short, long = min(w, h), max(w, h)
  if short != size:
    other = int(size * long / short)
    new = (size, other) if w <= h else (other, size)
    picture = picture.resize(new, Image.BICUBIC)
  w, h = picture.size
  top, left = round((h - size) / 2.0), round((w - size) / 2.0)
  pixels = np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"))
  return (pixels / 255.0 - MEAN) / STD


def test_crop_late_equals_torchvision(opened):
  for picture in opened:
    error = preprocessing.crop_late(picture, 45) - torchvision_crop(picture, 45)
    assert np.abs(error).max() < 1e-5


def test_the_two_crops_differ_where_their_libraries_do():
  # 3 columns too many: transformers leaves out 1 at the left, torchvision 2.
  columns = np.arange(43, dtype=np.uint8)
  picture = Image.fromarray(np.tile(columns[None, :, None], (40, 1, 3)))
  first = [
    round(float((way(picture, 40)[0, 0, 0] * STD[0] + MEAN[0]) * 255))
    for way in (preprocessing.crop_rgb, preprocessing.crop_late)
  ]
  assert first == [1, 2]
  # Transparent pixels have colours: resized before or after they are uncovered.
  pixels = np.zeros((64, 64, 4), np.uint8)
  pixels[::2, :, 0], pixels[1::2, :, 3] = 255, 255
  early, late = (way(Image.fromarray(pixels), 32).mean() for way in
                 (preprocessing.crop_rgb, preprocessing.crop_late))  # fmt: skip
  assert abs(early - late) > 0.1


def torch_letterbox(torch, picture, size):
  """HPS v2's `ResizeMaxSize`: on a float tensor, what torchvision hands to torch.

  In fp64: in fp32 torch rounds the filter's weights so that pixels are off by 1e-5.
  """
  pixels = np.array(picture.convert("RGB"), np.float64) / 255
  x = torch.tensor(pixels).permute(2, 0, 1)
  height, width = x.shape[1:]
  scale = size / float(max(height, width))
  new = [round(n * scale) for n in (height, width)]
  x = torch.nn.functional.interpolate(
    x[None], size=new, mode="bicubic", antialias=True, align_corners=False
  )[0]
  h, w = size - new[0], size - new[1]
  x = torch.nn.functional.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
  return (x.permute(1, 2, 0).numpy() - MEAN) / STD


@pytest.mark.parametrize("size", [45, 224])
def test_letterbox_equals_torch(torch, opened, size):
  for picture in opened:
    error = preprocessing.letterbox(picture, size) - torch_letterbox(
      torch, picture, size
    )
    assert np.abs(error).max() < 1e-6, picture
  # It overshoots beyond 0..1, and is left to.
  tall = preprocessing.letterbox(opened[1], 224) * STD + MEAN
  assert tall.min() < -1e-3 or tall.max() > 1 + 1e-3


def test_letterbox_puts_the_odd_row_last_and_leaves_the_right_size_alone():
  white = Image.fromarray(np.full((4, 9, 3), 255, np.uint8))
  page = preprocessing.letterbox(white, 9) * STD + MEAN
  assert np.allclose(page.mean(axis=(1, 2)), [0, 0, 1, 1, 1, 1, 0, 0, 0], atol=1e-6)


def test_arrays_and_pictures_are_the_same(opened):
  arrays = [np.asarray(picture) for picture in opened]
  for way in preprocessing.WAYS:
    both = [preprocessing.prepare(x, way, 32) for x in (arrays, opened)]
    assert np.array_equal(*both) and both[0].shape == (6, 32, 32, 3)


@pytest.mark.parametrize(
  "pixels",
  [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 0, 3), np.uint8)],
  ids=["floats", "channels", "empty"],
)  # fmt: skip
def test_refuses_pixels_of_another_kind(pixels):
  with pytest.raises(UserError, match="of uint8"):
    preprocessing.as_picture(pixels)
  with pytest.raises(UserError, match="did you mean 'letterbox'"):
    preprocessing.prepare([], "leterbox", 4)
