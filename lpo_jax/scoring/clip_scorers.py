"""Scorers made of CLIP: cosines of texts and images, and heads on images alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.models import clip_pair
from lpo_jax.pretrained import checkpoints
from lpo_jax.scoring import preprocessing, tokens
from lpo_jax.scoring.networks import Network, NetworkScorer, Place

LAION_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
OPENAI_L14 = "openai/clip-vit-large-patch14"
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# What a cosine is multiplied with.
PERCENT = 100.0
LEARNED = "logit_scale"  # exp of this parameter


@dataclasses.dataclass(frozen=True)
class Published:
  """One published scorer.

  Attributes:
    name: here.
    version: the authors' words for the checkpoint.
    measures: one sentence for reports.
    scale: unit and usual range.
    way: of preparing images, a name of `preprocessing.WAYS`.
    clean: of prompts.
    path: the id on the Hub; empty where the file is on none.
    files: of the weights, the best first.
    architecture: a name of `checkpoints.OPEN_CLIP`.
    factor: a number, or `LEARNED`.
    tokenizer: the id on the Hub.
    fetch: where the file is, if not on the Hub.
  """

  name: str
  version: str
  measures: str
  scale: str
  way: str
  path: str
  files: tuple[str, ...]
  architecture: str
  clean: tokens.Clean = tokens.as_it_is
  factor: float | str = PERCENT
  tokenizer: str = LAION_H14
  fetch: str = ""


PICKSCORE = Published(
  "pickscore",
  "PickScore_v1",
  "What people of Pick-a-Pic chose: PickScore, scaled cosine of prompt and image; "
  "SD 1.5 gets about 20.7, SDXL about 22.5.",
  "exp(logit_scale) x cosine, about 17 to 25; some authors give the cosine alone",
  "crop_rgb",
  "yuvalkirstain/PickScore_v1",
  TRANSFORMERS,
  "ViT-H-14",
  factor=LEARNED,
)
HPS_V2 = Published(
  "hps_v2",
  "HPS v2.0",
  "What people of HPD v2 chose: HPS v2.0, cosine x 100; SD 1.5 gets about 27.",
  "cosine x 100, about 20 to 32; hpsv2.score gives it without the 100",
  "letterbox",
  "xswu/HPSv2",
  ("HPS_v2_compressed.pt",),
  "ViT-H-14",
  clean=tokens.as_open_clip,
)
HPS_V21 = dataclasses.replace(
  HPS_V2,
  name="hps_v2.1",
  version="HPS v2.1",
  measures="What people of HPD v2 chose: HPS v2.1, cosine x 100; SD 1.5 gets about 24, "
  "SDXL about 29.",
  scale="cosine x 100, about 15 to 35; not comparable with v2.0",
  files=("HPS_v2.1_compressed.pt",),
)
CLIP_L14 = Published(
  "clip_score",
  "OpenAI ViT-L/14",
  "How well the image fits the prompt: CLIP ViT-L/14, cosine x 100.",
  "cosine x 100, about 15 to 35",
  "crop_rgb",
  OPENAI_L14,
  TRANSFORMERS,
  "ViT-L-14-quickgelu",
  tokenizer=OPENAI_L14,
)
CLIP_H14 = Published(
  "clip_score_h14",
  "laion2B-s32B-b79K ViT-H/14",
  "How well the image fits the prompt: CLIP ViT-H/14, cosine x 100; SD 1.5 gets about "
  "34.",
  "cosine x 100, about 20 to 45; the repositories of Diffusion-DPO and -DRO give it "
  "without the 100",
  "letterbox",
  LAION_H14,
  (TRANSFORMERS[0], *OPEN_CLIP, TRANSFORMERS[1]),
  "ViT-H-14",
  clean=tokens.as_open_clip,
)
AESTHETIC_V1 = Published(
  "aesthetic_v1",
  "sa_0_4_vit_l_14_linear",
  "How good the image looks, whatever the prompt: LAION's aesthetic score v1, about 1 "
  "to 10.",
  "points of 10, usually 4 to 7; not comparable with v2",
  "crop_late",
  "",
  ("sa_0_4_vit_l_14_linear.pth",),
  "ViT-L-14-quickgelu",
  fetch="https://github.com/LAION-AI/aesthetic-predictor",
)
AESTHETIC_V2 = dataclasses.replace(
  AESTHETIC_V1,
  name="aesthetic_v2",
  version="sac+logos+ava1-l14-linearMSE",
  measures="How good the image looks, whatever the prompt: LAION's aesthetic score v2, "
  "about 1 to 10; SD 1.5 gets about 5.4, SDXL about 6.1.",
  scale="points of 10, usually 4 to 7; not comparable with v1",
  files=("sac+logos+ava1-l14-linearMSE.pth",),
  fetch="https://github.com/christophschuhmann/improved-aesthetic-predictor",
)
COSINES = (PICKSCORE, HPS_V2, HPS_V21, CLIP_L14, CLIP_H14)
AESTHETICS = (AESTHETIC_V1, AESTHETIC_V2)


class _Towers(NetworkScorer):
  """Both towers of a CLIP, and the words of what is published."""

  def __init__(self, published: Published, place: Place):
    super().__init__(place)
    self.published = published
    self.name, self.version = published.name, published.version
    self.measures, self.scale = published.measures, published.scale
    self.preprocessing = preprocessing.describe(published.way, 224)

  def prepare(self, network: Network) -> None:
    model = network.model
    self._size = clip_pair.vision_config(model.config).get("image_size", 224)
    self._images = network.jit(lambda params, x: _unit(model.embed_images(params, x)))
    self._texts = network.jit(lambda params, ids: _unit(model.embed_texts(params, ids)))

  def embed_images(self, images: Sequence[Any]) -> np.ndarray:
    """Returns unit vectors [n, P] fp32 of pictures of any sizes."""
    network, way = self.network, self.published.way
    return network.run(
      self._images,
      len(images),
      lambda rows: (preprocessing.prepare(images[rows], way, self._size),),
      f"scoring with {self.name}",
      "images",
    )


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Cosine(_Towers):
  """factor x cos(text, image).

  Args:
    published: which.
    place: where it runs.
    path: a file, a folder or an id on the Hub; empty: the published id.
    tokenizer: a folder or an id; empty: beside the weights, or else the published id.
  """

  def __init__(self, published: Published, place: Place, path: str, tokenizer: str):
    super().__init__(published, place)
    self._path, self._tokenizer = path or published.path, tokenizer
    self._vectors: dict[str, np.ndarray] = {}

  def find(self) -> checkpoints.Checkpoint:
    published = self.published
    return checkpoints.clip(self._path, published.files, published.architecture)

  def prepare(self, network: Network) -> None:
    super().prepare(network)
    folder = tokens.find(
      self._tokenizer,
      self.checkpoint.file,
      self.published.tokenizer,
      tokens.CLIP_FILES,
    )
    fields = clip_pair.text_config(network.model.config)
    places = fields.get("max_position_embeddings", 77)
    self._tokens = tokens.ClipTokens(folder, places, self.published.clean)
    self._factor = self.published.factor
    if self._factor == LEARNED:
      self._factor = float(np.exp(np.asarray(network.params[LEARNED])))

  def embed_texts(self, prompts: Sequence[str]) -> np.ndarray:
    """Returns unit vectors [n, P] fp32; each prompt is read once."""
    network = self.network
    fresh = [p for p in dict.fromkeys(prompts) if p not in self._vectors]
    if fresh:
      ids = self._tokens(fresh)
      vectors = network.run(
        self._texts,
        len(fresh),
        lambda rows: (ids[rows],),
        f"reading for {self.name}",
        "prompts",
      )
      self._vectors |= dict(zip(fresh, vectors, strict=True))
    return np.stack([self._vectors[prompt] for prompt in prompts])

  def score(self, images, prompts, told):
    vectors = self.embed_texts(prompts) * self.embed_images(images)
    return self._factor * vectors.sum(axis=-1, dtype=np.float64)

  def release(self) -> None:
    super().release()
    self._vectors = {}


class Aesthetic(_Towers):
  """w . image + b, w and b being all the layers of a head at once.

  Args:
    published: which.
    place: where it runs.
    path: of the head: a file, a folder or an id on the Hub.
    tower: of CLIP; empty: the published id.
  """

  def __init__(self, published: Published, place: Place, path: str, tower: str):
    super().__init__(published, place)
    self._path, self._tower = path, tower or OPENAI_L14
    self._head: checkpoints.LinearHead | None = None

  def find(self) -> checkpoints.Checkpoint:
    self.head()  # small, and the more likely to be missing
    files = (*TRANSFORMERS, *OPEN_CLIP)
    return checkpoints.clip(self._tower, files, self.published.architecture)

  def head(self) -> checkpoints.LinearHead:
    """Reads the head.

    Raises:
      UserError: no path is given, or there is no such head.
    """
    if self._head is None:
      files = self.published.files
      if not self._path:
        raise UserError(
          f"scorer {self.name!r} needs the file {files[0]!r}, which is on no hub: fetch "
          f"it from {self.published.fetch}, and set eval.scorer_paths.{self.name} to it."
        )
      self._head = checkpoints.linear_head(self._path, files)
    return self._head

  def fingerprint(self) -> str:
    return f"{self.checkpoint.fingerprint()}+{self.head().identity}"

  def score(self, images, prompts, told):
    vectors, head = self.embed_images(images).astype(np.float64), self.head()
    if vectors.shape[-1] != len(head.weight):
      raise UserError(
        f"scorer {self.name!r}: the head takes {len(head.weight)} numbers, and the tower "
        f"gives {vectors.shape[-1]}. Do they belong together?"
      )
    return vectors @ head.weight + head.bias
