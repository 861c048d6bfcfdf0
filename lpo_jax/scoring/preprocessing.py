"""Pictures of any size to what a network sees, each as its scorer was published with.

The way belongs to the scorer, not to the network: the same picture resized in another
way has another score.

| way | resize | then | order |
|---|---|---|---|
| `crop_rgb` | shortest side, PIL's bicubic on bytes | centre crop, odd rest to the end | RGB first |
| `crop_late` | the same | centre crop, half a pixel rounded to even | RGB last |
| `letterbox` | longest side, bicubic on floats, not clipped | black bars, odd rest to the end | RGB first |
| `stretch` | both sides, bicubic on floats, four taps, not clipped | nothing | RGB first |
| `crop_imagenet` | shortest side to 8/7, PIL's bicubic on bytes | centre crop, half a pixel rounded to even | RGB first |

`crop_rgb` is transformers' `CLIPImageProcessor`; `crop_late` torchvision's `Resize` and
`CenterCrop` as OpenAI's CLIP, open_clip and ImageReward chain them; `letterbox` HPS v2's
own; `stretch` that of InstructPix2Pix's metrics; `crop_imagenet` torchvision's for DINO.
All end with (x - mean) / std, of ImageNet in the last, of OpenAI's CLIP in the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lpo_jax.errors import UserError, unknown_name

MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)


def as_picture(image: Any) -> Any:
  """Turns pixels into a PIL image; one that is one already stays as it is.

  Args:
    image: PIL image, or [H, W], [H, W, 3] or [H, W, 4] uint8.

  Raises:
    UserError: anything else, such as floats, whose range nobody knows.
  """
  from PIL import Image

  if isinstance(image, Image.Image):
    return image
  pixels = np.asarray(image)
  shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))
  if pixels.dtype != np.uint8 or not shaped or 0 in pixels.shape:
    raise UserError(
      "scorers take PIL images, or arrays [H, W], [H, W, 3] or [H, W, 4] of uint8; came "
      f"{pixels.dtype} {pixels.shape}. Round floats to 0..255 as for a PNG first: scores "
      "are those of pictures as they are saved."
    )
  return Image.fromarray(pixels)


def _shortest_to(picture: Any, size: int) -> Any:
  from PIL import Image

  width, height = picture.size
  if width <= height:
    target = (size, int(size * height / width))
  else:
    target = (int(size * width / height), size)
  if target == picture.size:
    return picture
  return picture.resize(target, Image.Resampling.BICUBIC)


def _normalise(picture: Any) -> np.ndarray:
  return (np.asarray(picture, np.float32) / 255 - MEAN) / STD


def _on_white(picture: Any) -> Any:
  from PIL import Image

  if "A" not in picture.getbands() and picture.info.get("transparency") is None:
    return picture.convert("RGB")
  picture = picture.convert("RGBA")
  page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
  return Image.alpha_composite(page, picture).convert("RGB")


def crop_rgb(picture: Any, size: int) -> np.ndarray:
  """Resizes the shortest side and cuts the middle out, as transformers does.

  What is transparent is white, as in transformers 5; before, the colours below showed.

  Args:
    picture: PIL image.
    size: pixels a side.

  Returns:
    [size, size, 3] fp32, normalised.
  """
  picture = _shortest_to(_on_white(picture), size)
  left, top = (picture.width - size) // 2, (picture.height - size) // 2
  return _normalise(picture.crop((left, top, left + size, top + size)))


def crop_late(picture: Any, size: int) -> np.ndarray:
  """Resizes the shortest side and cuts the middle out, as torchvision does.

  Transparency and grey are turned to RGB last, and half a pixel goes where Python's
  `round` puts it.

  Args:
    picture: PIL image.
    size: pixels a side.

  Returns:
    [size, size, 3] fp32, normalised.
  """
  picture = _shortest_to(picture, size)
  left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
  picture = picture.crop((left, top, left + size, top + size))
  return _normalise(picture.convert("RGB"))


def letterbox(picture: Any, size: int) -> np.ndarray:
  """Resizes the longest side and fills up with black, as HPS v2 does.

  The resize is of floats and antialiased, which torchvision does from 0.17 on; its
  overshoots at edges stay. Pictures already of the right size are not touched.

  Args:
    picture: PIL image.
    size: pixels a side.

  Returns:
    [size, size, 3] fp32, normalised.
  """
  from PIL import Image

  pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
  scale = size / max(pixels.shape[:2])
  height, width = (max(round(n * scale), 1) for n in pixels.shape[:2])
  if (height, width) != pixels.shape[:2]:
    planes = (Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(3))
    planes = [p.resize((width, height), Image.Resampling.BICUBIC) for p in planes]
    pixels = np.stack([np.asarray(plane) for plane in planes], axis=-1)
  page = np.zeros((size, size, 3), np.float32)
  top, left = (size - height) // 2, (size - width) // 2
  page[top : top + height, left : left + width] = pixels
  return (page - MEAN) / STD


def stretch(picture: Any, size: int) -> np.ndarray:
  """Resizes both sides, floats, without antialiasing, as InstructPix2Pix's metrics do.

  torch's `F.interpolate(mode="bicubic", align_corners=False)`: four taps of Keys' kernel
  with a = -0.75 around each new pixel, whatever the scale; overshoots stay.

  Args:
    picture: PIL image.
    size: pixels a side.

  Returns:
    [size, size, 3] fp32, normalised.
  """
  pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
  rows, columns = (_cubic_taps(n, size) for n in pixels.shape[:2])
  resized = np.einsum("yh,hwc->ywc", rows, pixels, optimize=True)
  resized = np.einsum("xw,ywc->yxc", columns, resized, optimize=True)
  return ((resized - MEAN) / STD).astype(np.float32)


@functools.lru_cache(maxsize=16)
def _cubic_taps(old: int, new: int) -> np.ndarray:
  """[new, old] weights of each old pixel in each new one."""
  a = -0.75
  at = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(at).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    x = np.abs(at - (first + tap))
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    place = np.clip(first + tap, 0, old - 1)
    np.add.at(weights, (np.arange(new), place), np.where(x <= 1, near, far))
  return weights.astype(np.float32)


def crop_imagenet(picture: Any, size: int) -> np.ndarray:
  """Resizes the shortest side to 8/7 of `size` and cuts the middle out, as for DINO.

  Args:
    picture: PIL image.
    size: pixels a side; 224 of 256 in DINO's own evaluation.

  Returns:
    [size, size, 3] fp32, normalised by ImageNet's mean and std.
  """
  picture = _shortest_to(picture.convert("RGB"), size * 8 // 7)
  left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
  pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32)
  return (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD


WAYS: dict[str, Callable[[Any, int], np.ndarray]] = {
  "crop_rgb": crop_rgb,
  "crop_late": crop_late,
  "letterbox": letterbox,
  "stretch": stretch,
  "crop_imagenet": crop_imagenet,
}
WORDS = {
  "crop_rgb": "RGB, PIL bicubic to shortest side {size}, centre crop "
  "(transformers' CLIPImageProcessor), mean and std of CLIP",
  "crop_late": "PIL bicubic to shortest side {size}, centre crop, RGB (torchvision's "
  "Resize and CenterCrop), mean and std of CLIP",
  "letterbox": "RGB, floats, antialiased bicubic to longest side {size}, black bars "
  "(HPS v2 on torchvision 0.17 or later), mean and std of CLIP",
  "stretch": "RGB, floats, bicubic without antialiasing to {size} x {size} (torch's "
  "interpolate, as InstructPix2Pix), mean and std of CLIP",
  "crop_imagenet": "RGB, PIL bicubic to shortest side 8/7 of {size}, centre crop, mean and "
  "std of ImageNet",
}


def describe(way: str, size: int) -> str:
  """Says in words what a way does."""
  return WORDS[way].format(size=size)


def prepare(images: Sequence[Any], way: str, size: int) -> np.ndarray:
  """Prepares pictures for a network.

  Args:
    images: n PIL images or arrays of uint8, of any sizes.
    way: a name of `WAYS`.
    size: pixels a side.

  Returns:
    [n, size, size, 3] fp32.

  Raises:
    UserError: an unknown way, or pixels of another kind.
  """
  if way not in WAYS:
    raise unknown_name("preprocessing", way, WAYS)
  return np.stack([WAYS[way](as_picture(image), size) for image in images])
