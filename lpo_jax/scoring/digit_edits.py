"""The editing quickstart's world: digits to edit, instructions, what people think of an edit.

A source is one of scikit-learn's real digits (`scoring.digits`). An instruction names a
change of its ink, and an edit is as good as it matches that change done to that very
source: that it follows the instruction and that it keeps the digit are one number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from lpo_jax.errors import unknown_name
from lpo_jax.scoring import digits

TILT = 0.4  # columns per row: what "tilt it" asks for; italics have about 0.3
THINNING = 0.6


def thicken(ink: np.ndarray) -> np.ndarray:
  """Each pixel gets the most ink of itself and its eight neighbours. [n, H, W]."""
  from scipy import ndimage

  return ndimage.grey_dilation(ink, size=(1, 3, 3))


def thin(ink: np.ndarray) -> np.ndarray:
  """Each pixel goes most of the way to the least ink among its neighbours. [n, H, W].

  All of the way would leave nothing of many a stroke.
  """
  from scipy import ndimage

  return ink + THINNING * (ndimage.grey_erosion(ink, size=(1, 3, 3)) - ink)


def tilt(ink: np.ndarray, by: float) -> np.ndarray:
  """Moves each row by `by` columns per row above the middle, to the right. [n, H, W]."""
  from scipy import ndimage

  middle = (ink.shape[1] - 1) / 2
  matrix, offset = [[1, 0, 0], [0, 1, 0], [0, by, 1]], (0, 0, -by * middle)
  return ndimage.affine_transform(ink, matrix, offset, order=1)


# Instruction -> (ink [n, H, W], how far [n, 1, 1]: 0 not at all, 1 as asked) -> ink.
EDITS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "make it bold": lambda ink, by: ink + by * (thicken(ink) - ink),
  "make it thin": lambda ink, by: ink + by * (thin(ink) - ink),
  "tilt it right": lambda ink, by: _tilt_each(ink, TILT * by),
  "tilt it left": lambda ink, by: _tilt_each(ink, -TILT * by),
}


def _tilt_each(ink: np.ndarray, by: np.ndarray) -> np.ndarray:
  pairs = zip(ink, by.ravel(), strict=True)
  return np.stack([tilt(one[None], float(angle))[0] for one, angle in pairs])


def edit(
  images: np.ndarray, instructions: Sequence[str], by: np.ndarray | float = 1.0
) -> np.ndarray:
  """Does what is asked.

  Args:
    images: [n, H, W, 3] uint8 sources.
    instructions: n of `EDITS`.
    by: [n] or one: 1 as asked, less or more for those who do too little or too much.

  Returns:
    [n, H, W, 3] uint8.

  Raises:
    UserError: an instruction that this world does not know.
  """
  ink = digits.ink(images)
  by = np.broadcast_to(np.asarray(by, np.float64), len(ink))
  done = np.empty_like(ink)
  for text in dict.fromkeys(instructions):
    if text not in EDITS:
      raise unknown_name("instruction of the digits' editing world", text, EDITS)
    rows = [i for i, other in enumerate(instructions) if other == text]
    done[rows] = EDITS[text](ink[rows], by[rows, None, None])
  grey = np.uint8(np.round(255 * (1 - np.clip(done, 0, 1))))
  return np.repeat(grey[..., None], 3, axis=-1)


def match(
  images: np.ndarray, prompts: Sequence[str], sources: Sequence[np.ndarray]
) -> np.ndarray:
  """How well an edit's ink lies where the instruction would have it. [n] in 0..1.

  match = 2 sum min(e, t) / (sum e + sum t)

  e is the edit's ink and t that of the source as the instruction changes it: Dice's
  overlap, for grey values.

  Args:
    images: [n, H, W, 3] uint8 edits.
    prompts: n instructions.
    sources: [n] pictures [H, W, 3] uint8 that were edited.
  """
  wanted = digits.ink(edit(np.stack(list(sources)), prompts))
  mine = digits.ink(images)
  shared = np.minimum(mine, wanted).sum(axis=(1, 2))
  total = mine.sum(axis=(1, 2)) + wanted.sum(axis=(1, 2))
  return 2 * shared / np.maximum(total, 1e-9)


@functools.cache
def _reader():
  """Reads digits that were edited as asked, or not at all."""
  from sklearn.svm import SVC

  images, labels = digits.real_digits()
  seen = [images, *(edit(images, [text] * len(images)) for text in EDITS)]
  features = np.concatenate([digits.cells(one) for one in seen])
  return SVC(C=10.0, gamma=0.02).fit(features, np.tile(labels, len(seen)))


def kept(
  images: np.ndarray, prompts: Sequence[str], sources: Sequence[np.ndarray]
) -> np.ndarray:
  """Whether an independent reader reads an edit as it reads the source: [n] of 0 or 1.

  The reader is a support vector machine trained on the real digits, plain and edited.

  Args:
    images: [n, 32, 32, 3] uint8 edits.
    prompts: n instructions; not looked at.
    sources: [n] pictures [32, 32, 3] uint8 that were edited.
  """
  del prompts
  reader = _reader()
  before = reader.predict(digits.cells(np.stack(list(sources))))
  return (reader.predict(digits.cells(images)) == before).astype(np.float64)
