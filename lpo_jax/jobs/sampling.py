"""Drawing images as a config's `eval` section says, in any job."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lpo_jax import parallel
from lpo_jax.data import prompts as prompt_sets
from lpo_jax.errors import UserError
from lpo_jax.generation import Generator
from lpo_jax.scoring import scorers
from lpo_jax.types import Params

PROMPTS_SHOWN, SEEDS_SHOWN = 8, 2


def make_generator(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Generator:
  """The generator that `eval` describes, with `model.path`'s VAE and text encoders."""
  ev = config.eval
  return Generator(
    config.model.path,
    mesh=mesh,
    sampler=ev.sampler,
    steps=ev.steps,
    guidance_scale=ev.guidance_scale,
    eta=ev.eta,
    sigmas=ev.sigmas,
    batch_size=ev.batch_size,
    dtype=jnp.dtype(config.model.dtype),
    clip_skip=config.model.clip_skip,
    vae_tile=config.model.vae_tile,
  )


def pipeline_identity(config: ml_collections.ConfigDict) -> str:
  """Names what decides how an image looks, besides the UNet and the `eval` section."""
  used = {key: config.model[key] for key in ("clip_skip", "vae_tile")}
  words = [f"{key}={value}" for key, value in used.items() if value]
  return " ".join([str(config.model.path), *words])


@dataclasses.dataclass(frozen=True)
class RunPoint:
  """What was drawn at a run point.

  Attributes:
    grid: [H, W, 3] uint8, one row a prompt, one column a seed.
    scores: scorer -> mean over the images.
    goodness: the same with the sign with which more is better.
  """

  grid: np.ndarray
  scores: dict[str, float]
  goodness: dict[str, float]


class RunSamples:
  """The same prompts and seeds, drawn and scored every so often while a run trains.

  Args:
    config: `eval.prompts`, how to draw them, and `eval.scorers`.
    workdir: gets `samples/step_000100.png`: one row a prompt, one column a seed.
    mesh: of the run.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
  ):
    if not config.eval.prompts:
      raise UserError(
        "eval.every asks for samples while training, but eval.prompts is empty: expected "
        "a prompt file or a tuple of texts (or eval.every=0)."
      )
    texts = prompt_sets.read(config.eval.prompts)[:PROMPTS_SHOWN]
    self._prompts = [text for text in texts for _ in range(SEEDS_SHOWN)]
    self._seeds = [s for _ in texts for s in range(SEEDS_SHOWN)]
    self._generator = make_generator(config, mesh)
    # Scores from outside are of files, and these images have none yet.
    names = [name for name in config.eval.scorers if name != "external"]
    paths = config.eval.scorer_paths
    self._scorers = scorers.chosen(names, paths, mesh=mesh) if names else []
    self._folder = workdir / "samples"

  def draw(self, params: Params, step: int) -> RunPoint:
    """Draws, writes the PNG, and scores."""
    from PIL import Image

    images = self._generator(params, self._prompts, self._seeds)
    rows = images.reshape(-1, SEEDS_SHOWN, *images.shape[1:])
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    if parallel.is_main_process():
      self._folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(grid).save(self._folder / f"step_{step:06d}.png")
    scores, goodness = {}, {}
    for scorer in self._scorers:
      mean = float(np.mean(scorer(images, self._prompts, seeds=self._seeds)))
      scores[scorer.name] = mean
      goodness[scorer.name] = mean if scorer.higher_is_better else -mean
      scorer.release()  # training needs the memory
    return RunPoint(grid, scores, goodness)
