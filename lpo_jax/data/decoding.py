"""Encoded bytes to the square uint8 picture that the VAE is shown."""

from __future__ import annotations

import dataclasses
import io
import re

import numpy as np

PREPROCESSING = {
  "orientation": "upright, as EXIF says",
  "transparency": "on white",
  "resize": "shorter side, PIL lanczos",
  "crop": "centre",
}
MAX_PIXELS = 100_000_000  # a header may promise more memory than the machine has
# What Pillow calls an image without a file name: another text in every run.
_ADDRESS = re.compile(r" ?<[^<>]* object at 0x[0-9a-f]+>")
_ORIENTATION = 0x0112  # the EXIF tag; 1 (or none) means "as stored"


class BadImage(Exception):
  """One image cannot be used; the message is the reason to write down."""


@dataclasses.dataclass(frozen=True)
class PreparedImage:
  """A picture at training size, and where it was cut from.

  Attributes:
    pixels: [resolution, resolution, 3] uint8 RGB.
    original_size: (height, width) in pixels before resizing.
    crop: (top, left) of the crop in the resized picture, in pixels.
  """

  pixels: np.ndarray
  original_size: tuple[int, int]
  crop: tuple[int, int]


def as_it_is(image: PreparedImage) -> PreparedImage:
  """Returns the picture unchanged."""
  return image


def mirror(image: PreparedImage) -> PreparedImage:
  """Returns the picture as if it had been mirrored left to right before the crop."""
  height, width = image.original_size
  side = image.pixels.shape[0]
  _, resized_width = _resized(height, width, side)
  top, left = image.crop
  return PreparedImage(
    np.ascontiguousarray(image.pixels[:, ::-1]),
    image.original_size,
    (top, resized_width - left - side),
  )


def prepare(
  data: bytes, resolution: int, *, max_pixels: int = MAX_PIXELS
) -> PreparedImage:
  """Decodes, converts to RGB, resizes the shorter side and crops the centre.

  Grey, palette and CMYK become RGB; 16 bits become the upper 8; transparency is laid on
  white and EXIF orientation is applied, as a browser does for the people who judge. A
  picture that already has the right size keeps its pixels untouched.

  Args:
    data: an encoded image (JPEG, PNG, WebP, ... whatever Pillow reads).
    resolution: side of the result in pixels.
    max_pixels: largest width * height that is decoded, or resized to, at all.

  Returns:
    The prepared image.

  Raises:
    BadImage: the bytes are no image, are cut short, have pixels without a known range,
      or are larger than `max_pixels`; that is seen in the header, before any decoding.
  """
  pixels = decode(data, max_pixels=max_pixels)
  height, width = pixels.shape[:2]
  if (height, width) == (resolution, resolution):
    return PreparedImage(pixels, (height, width), (0, 0))
  shorter, longer = sorted((height, width))
  if resolution * resolution * longer / shorter > max_pixels:
    raise BadImage(f"{width} x {height} pixels is too long and thin to be resized")
  resized, crop = _resize_and_crop(pixels, resolution)
  return PreparedImage(resized, (height, width), crop)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes and converts to RGB, as `prepare` does, at the picture's own size.

  Returns:
    [height, width, 3] uint8.

  Raises:
    BadImage: see `prepare`.
  """
  try:
    return _decode(data, max_pixels)
  except BadImage:
    raise
  except Exception as error:  # decoders raise anything from SyntaxError to struct.error
    said = _ADDRESS.sub("", f"{type(error).__name__}: {error}")
    raise BadImage(f"cannot be decoded: {said}") from error


def _decode(data: bytes, max_pixels: int) -> np.ndarray:
  """Returns [height, width, 3] uint8."""
  from PIL import Image, ImageOps

  Image.MAX_IMAGE_PIXELS = None  # the limit is ours: Pillow's own cannot be raised
  if not data:
    raise BadImage("no bytes")
  image = Image.open(io.BytesIO(data))  # reads the header only
  width, height = image.size
  if width * height > max_pixels:
    raise BadImage(f"{width} x {height} pixels is more than the limit {max_pixels}")
  upright = image.getexif().get(_ORIENTATION, 1) in (0, 1)
  if image.format == "JPEG" and image.mode in ("RGB", "L") and upright:
    import simplejpeg

    try:  # about 1.5 times as fast as Pillow, and releases the lock for threads
      return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
      pass  # unusual JPEGs are Pillow's business; broken ones fail there again
  return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def _to_rgb(image):
  """Converts any Pillow mode to RGB, on white where it is transparent."""
  from PIL import Image

  if image.mode.startswith("I"):  # Pillow would clip 16-bit grey instead of scaling
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 0xFFFF:
      raise BadImage("32-bit pixels have no known range")
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
  if image.mode == "F":
    raise BadImage("floating-point pixels have no known range")
  if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def _resized(height: int, width: int, resolution: int) -> tuple[int, int]:
  """Returns the (height, width) at which the shorter side is `resolution`."""
  shorter = min(height, width)
  return (
    max(resolution, round(height * resolution / shorter)),
    max(resolution, round(width * resolution / shorter)),
  )


def _resize_and_crop(
  pixels: np.ndarray, resolution: int
) -> tuple[np.ndarray, tuple[int, int]]:
  """Returns the cropped picture and the crop's (top, left)."""
  from PIL import Image

  height, width = pixels.shape[:2]
  new_height, new_width = _resized(height, width, resolution)
  if (new_height, new_width) != (height, width):
    image = Image.fromarray(pixels)
    image = image.resize((new_width, new_height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
  top, left = (new_height - resolution) // 2, (new_width - resolution) // 2
  cropped = pixels[top : top + resolution, left : left + resolution]
  return np.ascontiguousarray(cropped), (top, left)
