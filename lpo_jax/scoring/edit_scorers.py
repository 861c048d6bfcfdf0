"""Scorers of edits: what changed, what stayed, and how far it is from the right edit.

Pictures that a scorer compares with, the source or the right edit, come at the size of
the edit (`scorer.Told`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models import vit
from lpo_jax.pretrained import checkpoints
from lpo_jax.scoring import clip_scorers, preprocessing
from lpo_jax.scoring.clip_scorers import OPENAI_L14, TRANSFORMERS
from lpo_jax.scoring.networks import Network, NetworkScorer, Place
from lpo_jax.scoring.scorer import Formula

OPENAI_B32 = "openai/clip-vit-base-patch32"
DINO_S16 = "facebook/dino-vits16"
DINO_WAY = "crop_imagenet"

_IP2P = clip_scorers.Published(
  "clip_direction",
  "OpenAI ViT-L/14",
  "Whether the image changed as the captions did: CLIP text-image direction similarity, "
  "cosine; InstructPix2Pix's samples have 0.1 to 0.2.",
  "cosine, -1 to 1, usually 0 to 0.3",
  "stretch",
  OPENAI_L14,
  TRANSFORMERS,
  "ViT-L-14-quickgelu",
  factor=1.0,
  tokenizer=OPENAI_L14,
)
_CLIP_I = dataclasses.replace(
  _IP2P,
  name="clip_image_target",
  version="OpenAI ViT-B/32",
  measures="How much the edit looks like the right one: CLIP-I, cosine.",
  scale="cosine, usually 0.6 to 1",
  way="crop_late",
  path=OPENAI_B32,
  architecture="ViT-B-32-quickgelu",
  tokenizer=OPENAI_B32,
)
DIRECTION = _IP2P
IMAGES = {
  "sources": dataclasses.replace(
    _IP2P,
    name="clip_image_source",
    measures="How much of the source is left: CLIP image similarity, cosine.",
    scale="cosine, usually 0.6 to 1",
  ),
  "targets": _CLIP_I,
}
CAPTION = dataclasses.replace(
  _CLIP_I,
  name="clip_caption",
  measures="How well the edit fits its caption: CLIP-T, cosine.",
  scale="cosine, usually 0.15 to 0.35",
)
_SAID = {"sources": "the source", "targets": "the right edit"}


class Direction(clip_scorers.Cosine):
  """cos(v_edit - v_source, t_after - t_before), all of unit length before.

  Reference: Gal et al. 2022 (StyleGAN-NADA); Brooks et al. 2023, section 4.1.
  """

  needs = ("sources", "source_captions", "target_captions")

  def score(self, images, prompts, told):
    moved = self.embed_images(images) - self.embed_images(_stack(told.sources))
    meant = self.embed_texts(told.target_captions) - self.embed_texts(
      told.source_captions
    )
    return _cosine(moved, meant)


class ImageSimilarity(clip_scorers.Cosine):
  """cos(v_edit, v_other) of the source or of the right edit.

  Args:
    other: a field of `Told`.
  """

  def __init__(self, place: Place, path: str, tokenizer: str, *, other: str):
    super().__init__(IMAGES[other], place, path, tokenizer)
    self.needs = (other,)

  def score(self, images, prompts, told):
    others = getattr(told, self.needs[0])
    return _cosine(self.embed_images(images), self.embed_images(_stack(others)))


class Caption(clip_scorers.Cosine):
  """cos(v_edit, t_after)."""

  needs = ("target_captions",)

  def score(self, images, prompts, told):
    return super().score(images, told.target_captions, told)


class Dino(NetworkScorer):
  """cos of DINO's class tokens of the edit and of the source or the right edit.

  Args:
    place: where it runs.
    path: a folder or an id on the Hub, in transformers' layout; empty: the published id.
    other: a field of `Told`.

  Reference: Caron et al. 2021; the metric of Ruiz et al. 2023 (DreamBooth), section 5.2.
  """

  version = "DINO ViT-S/16"
  scale = "cosine, usually 0.3 to 1"
  preprocessing = preprocessing.describe(DINO_WAY, 224)

  def __init__(self, place: Place, path: str, *, other: str):
    super().__init__(place)
    self._path, self.needs = path or DINO_S16, (other,)
    self.name = f"dino_{other.removesuffix('s')}"
    self.measures = (
      f"How much the edit looks like {_SAID[other]}, subject and layout: DINO, cosine."
    )

  def find(self) -> checkpoints.Checkpoint:
    return checkpoints.vit(self._path, TRANSFORMERS)

  def prepare(self, network: Network) -> None:
    model = network.model
    self._size = {**vit.DEFAULTS, **model.config}["image_size"]
    self._states = network.jit(lambda params, x: model.apply(params, x)[:, 0])

  def embed_images(self, images: Sequence[Any]) -> np.ndarray:
    """Returns class tokens [n, D] fp32 of pictures of any sizes."""
    network = self.network
    return network.run(
      self._states,
      len(images),
      lambda rows: (preprocessing.prepare(images[rows], DINO_WAY, self._size),),
      f"scoring with {self.name}",
      "images",
    )

  def score(self, images, prompts, told):
    others = getattr(told, self.needs[0])
    return _cosine(self.embed_images(images), self.embed_images(_stack(others)))


def l1(other: str) -> Formula:
  """Mean |edit - other| over pixels and colours, in 0..1; less is better.

  Args:
    other: a field of `Told`.
  """

  def distance(images, prompts, others):
    del prompts
    others = _stack(others)
    if images.shape != others.shape:
      raise UserError(
        f"L1 compares pixels: the edits are {images.shape[1:3]}, and what they are "
        f"compared with {others.shape[1:3]}. Square edits are needed."
      )
    return np.abs(images / 255.0 - others / 255.0).mean(axis=(1, 2, 3))

  return Formula(
    f"l1_{other.removesuffix('s')}",
    "1",
    f"How far the pixels are from {_SAID[other]}: mean absolute difference, 0 to 1; less "
    "is better.",
    "0 to 1",
    "none",
    distance,
    needs=(other,),
    higher_is_better=False,
  )


def _stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
  return np.stack([np.asarray(picture) for picture in pictures])


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Cosines of rows, fp64; 0 where one of the two is nothing."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return (a * b).sum(axis=-1) / np.maximum(lengths, np.finfo(np.float32).tiny)
