"""Every kind of picture people have on disk, and every kind of broken one."""

import io

import numpy as np
import pytest
from PIL import Image

from lpo_jax.data import decoding


def _bytes(image, kind="PNG", **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def _noise(height, width, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, channels), np.uint8)


def test_right_size_is_left_untouched():
  pixels = _noise(16, 16)
  got = decoding.prepare(_bytes(Image.fromarray(pixels)), 16)
  np.testing.assert_array_equal(got.pixels, pixels)
  assert (got.original_size, got.crop) == ((16, 16), (0, 0))


def test_jpeg_decodes_as_pillow_does():
  data = _bytes(Image.fromarray(_noise(24, 24)), "JPEG", quality=90)
  expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  np.testing.assert_array_equal(decoding.prepare(data, 24).pixels, expected)


def test_shorter_side_and_centre_crop():
  # Three bands of 16: the middle one is what a centre crop keeps.
  pixels = np.zeros((16, 48, 3), np.uint8)
  pixels[:, 16:32] = 200
  got = decoding.prepare(_bytes(Image.fromarray(pixels)), 16)
  assert (got.original_size, got.crop) == ((16, 48), (0, 16))
  assert (got.pixels == 200).all()
  tall = decoding.prepare(_bytes(Image.fromarray(pixels.transpose(1, 0, 2))), 8)
  assert (tall.original_size, tall.crop) == ((48, 16), (8, 0))
  assert tall.pixels.shape == (8, 8, 3)
  # Lanczos rings at the edges of the band, its middle is flat.
  assert (tall.pixels[3:5] == 200).all()


def test_odd_sizes_and_enlarging():
  for height, width in ((31, 17), (17, 31), (3, 5), (16, 17)):
    got = decoding.prepare(_bytes(Image.fromarray(_noise(height, width))), 16)
    assert got.pixels.shape == (16, 16, 3)


@pytest.mark.parametrize(
  ("image", "expected"),
  [
    (Image.new("L", (8, 8), 77), (77, 77, 77)),
    (Image.new("1", (8, 8), 1), (255, 255, 255)),
    (Image.new("LA", (8, 8), (10, 255)), (10, 10, 10)),
    (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (255, 255, 255)),
    (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), (10, 20, 30)),
    (Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), (128, 128, 128)),
  ],
  ids=["grey", "bilevel", "grey-alpha", "transparent", "opaque", "16-bit"],
)
def test_modes_become_rgb(image, expected):
  got = decoding.prepare(_bytes(image), 8)
  np.testing.assert_array_equal(got.pixels, np.full((8, 8, 3), expected, np.uint8))


def test_palette_with_transparency_is_laid_on_white():
  image = Image.new("P", (8, 8), 1)
  image.putpalette([0, 0, 0, 9, 8, 7])
  got = decoding.prepare(_bytes(image, "PNG", transparency=1), 8)
  np.testing.assert_array_equal(got.pixels, 255)


def test_cmyk_and_grey_jpeg():
  cmyk = _bytes(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG")
  np.testing.assert_array_equal(decoding.prepare(cmyk, 8).pixels, 0)
  grey = _bytes(Image.new("L", (8, 8), 90), "JPEG")
  np.testing.assert_array_equal(decoding.prepare(grey, 8).pixels, 90)


def test_exif_orientation_is_applied():
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, :8] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # shown turned by 90 degrees clockwise
  data = _bytes(Image.fromarray(pixels), "JPEG", quality=100, exif=exif)
  got = decoding.prepare(data, 8)
  assert got.original_size == (16, 8)
  assert got.pixels[0].mean() > 250 and got.pixels[-1].mean() < 5


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "no bytes"),
    (b"<html>not found</html>", "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)), "JPEG")[:900], "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)))[:900], "cannot be decoded"),
  ],
  ids=["empty", "html", "cut-jpeg", "cut-png"],
)
def test_broken_images_say_why(data, reason):
  with pytest.raises(decoding.BadImage, match=reason):
    decoding.prepare(data, 16)


def test_bombs_are_refused_before_decoding():
  data = _bytes(Image.new("1", (3000, 3000)))
  with pytest.raises(decoding.BadImage, match="3000 x 3000 pixels is more than"):
    decoding.prepare(data, 16, max_pixels=1_000_000)
  thin = _bytes(Image.new("1", (1, 4000)))
  with pytest.raises(decoding.BadImage, match="too long and thin"):
    decoding.prepare(thin, 64, max_pixels=1_000_000)
