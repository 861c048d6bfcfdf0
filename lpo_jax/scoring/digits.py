"""The quickstart's world: real handwritten digits, what people in it like, who can read.

The images are scikit-learn's 1,797 handwritten digits, 8 x 8 with 17 grey levels, drawn
as dark ink in the middle of 32 x 32 white paper. The *taste* is what the simulated annotators judge
by; the *legibility* reader is an independent classifier that training never meets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from lpo_jax.errors import UserError

SIZE = 32  # pixels a side
INNER = 24  # of which the digit takes the middle: strokes have room to grow
NAMES = (
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip

# Phrasings met in preference training, and those kept for evaluation alone. The base
# model is taught all of them.
TRAIN_PHRASES = (
  "a handwritten {}",
  "the digit {} in ink",
  "a pen drawing of the number {}",
  "number {} on white paper",
)
HELD_OUT_PHRASES = ("{} written by hand", "someone wrote the digit {}")


def prompts(phrases: Sequence[str]) -> list[str]:
  """Returns every phrase with every digit's name, phrase by phrase."""
  return [phrase.format(name) for phrase in phrases for name in NAMES]


def digit_of(prompt: str) -> int:
  """Returns the digit that a prompt asks for.

  Raises:
    UserError: the prompt names no digit or several.
  """
  found = {NAMES.index(w) for w in re.findall(r"[a-z]+", prompt.lower()) if w in NAMES}
  if len(found) != 1:
    raise UserError(
      f"the digits scorers cannot tell which digit prompt {prompt!r} asks for; expected "
      f"exactly one of {', '.join(NAMES)}."
    )
  return found.pop()


def render(digits: np.ndarray) -> np.ndarray:
  """Draws [n, 8, 8] grey levels 0..16 as [n, 32, 32, 3] uint8, dark ink on white."""
  from PIL import Image

  ink = np.clip(np.asarray(digits) / 16.0, 0, 1)
  small = np.uint8(np.round(255 * (1 - ink)))
  large = [
    Image.fromarray(x).resize((INNER, INNER), Image.Resampling.BICUBIC) for x in small
  ]
  margin = (SIZE - INNER) // 2
  pad = ((0, 0), (margin, margin), (margin, margin))
  page = np.pad(np.stack([np.asarray(x) for x in large]), pad, constant_values=255)
  return np.repeat(page[..., None], 3, axis=-1)


@functools.cache
def real_digits() -> tuple[np.ndarray, np.ndarray]:
  """Returns the real images [1797, 32, 32, 3] uint8 and their labels [1797] int.

  Raises:
    UserError: scikit-learn is not installed.
  """
  try:
    from sklearn.datasets import load_digits
  except ImportError as e:
    raise UserError(
      "the quickstart's digits come from scikit-learn, which is not installed: "
      "pip install 'lpo_jax[quickstart]'."
    ) from e
  data = load_digits()
  return render(data.images), data.target


def ink(images: np.ndarray) -> np.ndarray:
  """Returns how much ink lies where: [n, 32, 32] in 0 (paper) to 1 (black)."""
  return 1.0 - np.asarray(images, np.float64).mean(axis=-1) / 255.0


def boldness(images: np.ndarray) -> np.ndarray:
  """Mean ink over the image, [n] in 0..1."""
  return ink(images).mean(axis=(1, 2))


def slant(images: np.ndarray) -> np.ndarray:
  """Tilt of the strokes to the right, [n]: columns moved per row climbed.

  slant = -sum w (x - mx)(y - my) / sum w (y - my)^2 over pixels weighted by ink w: the
  regression of the column on the height. 0 is upright, about 0.3 is italic.
  """
  weight = ink(images) + 1e-9
  total = weight.sum(axis=(1, 2))
  y, x = np.mgrid[0 : weight.shape[1], 0 : weight.shape[2]].astype(np.float64)
  mean_x = (weight * x).sum(axis=(1, 2)) / total
  mean_y = (weight * y).sum(axis=(1, 2)) / total
  dx, dy = x - mean_x[:, None, None], y - mean_y[:, None, None]
  return -(weight * dx * dy).sum(axis=(1, 2)) / (weight * dy * dy).sum(axis=(1, 2))


# Spread of boldness and slant among the real digits of one class: the natural units.
BOLDNESS_UNIT = 0.018
SLANT_UNIT = 0.085
BOLDNESS_WEIGHT = 0.2


def taste(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
  """What the simulated annotators like: upright strokes, and bold ones. [n], more is better.

  taste = 0.2 boldness / 0.018 - |slant| / 0.085

  Both in units of their spread among real digits of one class. Boldness alone would be
  no test: a model that inks everything a little more wins every same-seed comparison,
  while straightening what leans left *and* what leans right takes a different change
  for every image.

  Args:
    images: [n, 32, 32, 3] uint8.
    prompts: n texts; not looked at.
  """
  del prompts
  bold, tilt = boldness(images) / BOLDNESS_UNIT, np.abs(slant(images)) / SLANT_UNIT
  return BOLDNESS_WEIGHT * bold - tilt


@functools.cache
def _reader():
  from sklearn.svm import SVC

  images, labels = real_digits()
  return SVC(C=10.0, gamma=0.02).fit(cells(images), labels)


def cells(images: np.ndarray) -> np.ndarray:
  """What readers see: mean ink of 3 x 3 pixel cells, [n, 64], the digits' own resolution."""
  margin, cell = (SIZE - INNER) // 2, INNER // 8
  middle = ink(images)[:, margin:-margin, margin:-margin]
  means = middle.reshape(-1, 8, cell, 8, cell).mean(axis=(2, 4))
  return means.reshape(-1, 64) * 4


def legibility(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
  """Whether an independent reader recognises the prompted digit: [n] of 0 or 1.

  The reader is a support vector machine trained on the real digits alone; its mean over
  images is the share recognised.

  Args:
    images: [n, 32, 32, 3] uint8.
    prompts: n texts, each naming one digit.
  """
  wanted = np.array([digit_of(prompt) for prompt in prompts])
  return (_reader().predict(cells(images)) == wanted).astype(np.float64)
