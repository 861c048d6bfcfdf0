"""Every kind of picture people have on disk, and every kind of broken one."""

import io
import struct
import tracemalloc
import zlib

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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_turned_upright(orientation):
  """As a browser shows them; the size that SDXL is told is the upright one."""
  corners = np.zeros((16, 16, 3), np.uint8)
  corners[:8, :8], corners[:8, 8:], corners[8:, :8] = 240, 160, 80
  exif = Image.Exif()
  exif[0x0112] = orientation
  # How a camera stores the upright picture under each value of the tag.
  stored = {
    1: corners,
    2: corners[:, ::-1],
    3: corners[::-1, ::-1],
    4: corners[::-1],
    5: corners.transpose(1, 0, 2),
    6: np.rot90(corners, 1),
    7: corners[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(corners, -1),
  }[orientation]
  for kind, options in (("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {})):
    data = _bytes(
      Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options
    )
    got = decoding.prepare(data, 16).pixels[[3, 3, 12, 12], [3, 12, 3, 12], 0]
    np.testing.assert_allclose(got.astype(int), [240, 160, 80, 0], atol=3)


def _png16(pixels, colour):
  """A 16-bit PNG, which Pillow cannot write; colour 0 grey, 2 RGB, 6 RGBA."""

  def chunk(name, data):
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check

  height, width = pixels.shape[:2]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_scaled_not_clipped(colour, channels):
  pixels = np.zeros((8, 8, channels), np.uint16)
  pixels[..., 0] = 0x1234
  pixels[4:, :, 0] = 0xFEDC
  if colour in (4, 6):
    pixels[..., -1] = 0xFFFF
  got = decoding.prepare(_png16(pixels, colour), 8).pixels
  assert (got[:4, :, 0] == 0x12).all() and (got[4:, :, 0] == 0xFE).all()
  np.testing.assert_array_equal(got[..., 2], got[..., 0] if channels < 3 else 0)


def test_16_bits_of_other_formats():
  grey = np.full((8, 8), 0x8000, np.uint16)
  tiff = _bytes(Image.fromarray(grey), "TIFF")
  pgm = b"P5 8 8 65535\n" + grey.astype(">u2").tobytes()
  for data in (tiff, pgm):
    np.testing.assert_array_equal(decoding.prepare(data, 8).pixels, 128)


@pytest.mark.parametrize(
  ("dtype", "reason"), [(np.int32, "32-bit"), (np.float32, "flo")]
)
def test_pixels_without_a_range_are_refused(dtype, reason):
  data = _bytes(Image.fromarray(np.full((8, 8), 1 << 20, dtype)), "TIFF")
  with pytest.raises(decoding.BadImage, match=f"{reason}.* have no known range"):
    decoding.prepare(data, 8)


def test_one_pixel():
  data = _bytes(Image.new("RGB", (1, 1), (9, 8, 7)))
  got = decoding.prepare(data, 16)
  np.testing.assert_array_equal(got.pixels, np.full((16, 16, 3), (9, 8, 7), np.uint8))
  assert (got.original_size, got.crop) == ((1, 1), (0, 0))


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "no bytes"),
    (b"<html>not found</html>", "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)), "JPEG")[:900], "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)))[:900], "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)), "WEBP")[:900], "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)), "JPEG")[:100], "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)))[:30], "cannot be decoded"),
    (_bytes(Image.fromarray(_noise(64, 64)), "WEBP")[:20], "cannot be decoded"),
  ],
  ids=[
    *("empty", "html", "cut-jpeg", "cut-png", "cut-webp"),
    *("jpeg-header", "png-header", "webp-header"),
  ],
)
def test_broken_images_say_why(data, reason):
  with pytest.raises(decoding.BadImage, match=reason) as refused:
    decoding.prepare(data, 16)
  assert " object at " not in str(refused.value)  # the same words in every run


def test_bombs_are_refused_before_decoding():
  data = _bytes(Image.new("1", (3000, 3000)))
  with pytest.raises(decoding.BadImage, match="3000 x 3000 pixels is more than"):
    decoding.prepare(data, 16, max_pixels=1_000_000)
  thin = _bytes(Image.new("1", (1, 4000)))
  with pytest.raises(decoding.BadImage, match="too long and thin"):
    decoding.prepare(thin, 64, max_pixels=1_000_000)


def test_huge_pictures_are_refused_by_their_header():
  """20,000 x 20,000 from a few bytes: nothing is allocated, and the limit is ours."""
  header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
  data = (
    b"\x89PNG\r\n\x1a\n"
    + struct.pack(">I", 13)
    + b"IHDR"
    + header
    + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    + struct.pack(">I", 9)
    + b"IDAT"
  )
  tracemalloc.start()
  with pytest.raises(decoding.BadImage, match="20000 x 20000 pixels is more than the"):
    decoding.prepare(data, 16)
  assert tracemalloc.get_traced_memory()[1] < 1e6
  tracemalloc.stop()
  # With a higher limit Pillow, which has one of its own, has no say either.
  with pytest.raises(decoding.BadImage, match=r"cannot be decoded: (?!Decompression)"):
    decoding.prepare(data, 16, max_pixels=500_000_000)
