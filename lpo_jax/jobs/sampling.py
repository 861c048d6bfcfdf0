"""Drawing images as a config's `eval` section says, in any job."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lpo_jax import parallel
from lpo_jax.data import decoding, user_embeds
from lpo_jax.data import prompts as prompt_sets
from lpo_jax.data.user_embeds import UserEmbeds
from lpo_jax.errors import UserError
from lpo_jax.generation import Generator
from lpo_jax.scoring import scorers
from lpo_jax.scoring.scorer import COLUMNS, Scorer
from lpo_jax.types import Params, Prompt

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
    image_guidance_scale=ev.image_guidance_scale,
    eta=ev.eta,
    sigmas=ev.sigmas,
    batch_size=ev.batch_size,
    dtype=jnp.dtype(config.model.dtype),
    clip_skip=config.model.clip_skip,
    vae_tile=config.model.vae_tile,
    user_scale=ev.user_scale,
  )


def people_of(config: ml_collections.ConfigDict) -> UserEmbeds | None:
  """Who the people of a prompt set are; None without `data.user_embeds`."""
  path = config.data.user_embeds
  return None if path is None else user_embeds.read(path)


def pipeline_identity(config: ml_collections.ConfigDict) -> str:
  """Names what decides how an image looks, besides the UNet and the `eval` section."""
  used = {key: config.model[key] for key in ("clip_skip", "vae_tile")}
  words = [f"{key}={value}" for key, value in used.items() if value]
  return " ".join([str(config.model.path), *words])


def draw(
  generator: Generator,
  params: Params,
  rows: Sequence[Prompt],
  seeds: Sequence[int],
  *,
  people: UserEmbeds | None = None,
  on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
  """Draws one image for each row of a prompt set, by all that the row holds.

  Args:
    generator: how.
    params: of which UNet.
    rows: n of them; `source` is shown to an editing UNet.
    seeds: n non-negative ints.
    people: who the rows' `user` are, for a UNet that knows users; others draw the same
      for everybody.
    on_progress: called with the number of images done.

  Returns:
    [n, H, W, 3] uint8.

  Raises:
    UserError: rows of which only some have a source, a picture that is none, somebody
      who is not among the people, or as `Generator` does.
  """
  texts, sources = [row.text for row in rows], None
  if any(row.source for row in rows):
    # Each picture is decoded once, however many seeds it has.
    pictures = {row.source: row for row in rows}
    pixels = {d: picture(row, generator.pixels) for d, row in pictures.items()}
    sources = np.stack([pixels[row.source] for row in rows])
  embeds = None
  if generator.knows_users:
    embeds = _embeds(rows, people)
  return generator(
    params, texts, seeds, sources=sources, user_embeds=embeds, on_progress=on_progress
  )


def _embeds(rows: Sequence[Prompt], people: UserEmbeds | None) -> np.ndarray | None:
  """[n, K, D] of the rows' users."""
  if people is not None:
    return people.of([row.user for row in rows])
  named = next((row.user for row in rows if row.user), "")
  if named:
    raise UserError(
      f"the prompts are for people (first {named!r}), and data.user_embeds does not say "
      "who they are: set it to their file."
    )
  return None


def picture(row: Prompt, side: int, field: str = "source") -> np.ndarray:
  """Decodes a picture of a row as training sees it: [side, side, 3] uint8.

  Raises:
    UserError: there is none, or it cannot be used.
  """
  try:
    return decoding.prepare(getattr(row, field), side).pixels
  except decoding.BadImage as error:
    raise UserError(
      f"prompt {row.text!r}: its {field} picture cannot be used ({error}). Either all rows "
      "of a prompt set have one or none has; correct the file that eval.prompts (or "
      "generate.prompts) names."
    ) from None


# What a prompt set's row tells scorers: field of `Told` -> (row, side in pixels) -> value,
# None where the row has none.
TOLD: dict[str, Callable[[Prompt, int], Any]] = {
  "sources": lambda row, side: picture(row, side) if row.source else None,
  "targets": lambda row, side: picture(row, side, "target") if row.target else None,
  "source_captions": lambda row, side: row.source_caption or None,
  "target_captions": lambda row, side: row.target_caption or None,
  "users": lambda row, side: row.user or None,
}


def told(scorer: Scorer, rows: Sequence[Prompt], side: int) -> dict[str, list]:
  """What a scorer asks for that these rows all have.

  Args:
    scorer: its `needs` and `reads`.
    rows: one for each image.
    side: pixels to bring pictures to.
  """
  found = {}
  for field in TOLD.keys() & {*scorer.needs, *scorer.reads}:
    values = [TOLD[field](row, side) for row in rows]
    if all(value is not None for value in values):
      found[field] = values
  return found


def refuse_unmet(judges: Sequence[Scorer], rows: Sequence[Prompt]) -> None:
  """Refuses scorers that need what a prompt set does not have, before anything is drawn.

  Raises:
    UserError: naming the scorer and the column.
  """
  has = {
    "sources": lambda row: row.source,
    "targets": lambda row: row.target,
    "source_captions": lambda row: row.source_caption,
    "target_captions": lambda row: row.target_caption,
    "users": lambda row: row.user,
  }
  for judge in judges:
    for field in judge.needs:
      lacking = sum(not has[field](row) for row in rows) if field in has else 0
      if lacking:
        raise UserError(
          f"scorer {judge.name!r} needs {COLUMNS[field]}, and {lacking} of {len(rows)} "
          "prompts have none: complete the file that eval.prompts names, or leave the "
          "scorer out of eval.scorers."
        )


def decided_by(
  config: ml_collections.ConfigDict, rows: Sequence[Prompt]
) -> dict[str, Any]:
  """What decides the pixels of these rows besides texts, seeds, weights and `eval`'s
  common keys; empty where nothing is edited and nobody is named.
  """
  found: dict[str, Any] = {}
  if any(row.source for row in rows):
    keys = "\n".join(dict.fromkeys(row.key for row in rows))
    found["image_guidance_scale"] = config.eval.image_guidance_scale
    found["sources"] = _digest(keys)
  if any(row.user for row in rows):
    people = people_of(config)
    found["user_scale"] = config.eval.user_scale
    found["users"] = _digest("\n".join(row.user for row in rows))
    found["user_embeds"] = None if people is None else people.fingerprint()
  return found


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class RunPoint:
  """What was drawn at a run point.

  Attributes:
    grid: [H, W, 3] uint8, as in the PNG.
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
    workdir: gets `samples/step_000100.png`: one row a prompt, one column a seed, and of
      edits a first column with what was edited.
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
    rows = prompt_sets.load(config.eval.prompts).rows[:PROMPTS_SHOWN]
    self._rows = [row for row in rows for _ in range(SEEDS_SHOWN)]
    self._seeds = [s for _ in rows for s in range(SEEDS_SHOWN)]
    self._generator = make_generator(config, mesh)
    self._people = people_of(config)
    # Scores from outside are of files, and these images have none yet.
    names = [name for name in config.eval.scorers if name != "external"]
    paths = config.eval.scorer_paths
    self._scorers = scorers.chosen(names, paths, mesh=mesh) if names else []
    refuse_unmet(self._scorers, rows)
    self._folder = workdir / "samples"

  def draw(self, params: Params, step: int) -> RunPoint:
    """Draws, writes the PNG, and scores."""
    from PIL import Image

    images = draw(self._generator, params, self._rows, self._seeds, people=self._people)
    rows = images.reshape(-1, SEEDS_SHOWN, *images.shape[1:])
    if self._generator.edits:  # each row begins with what was edited
      shown = [picture(row, images.shape[1]) for row in self._rows[::SEEDS_SHOWN]]
      rows = np.concatenate([np.stack(shown)[:, None], rows], axis=1)
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    if parallel.is_main_process():
      self._folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(grid).save(self._folder / f"step_{step:06d}.png")
    scores, goodness = {}, {}
    for scorer in self._scorers:
      given = told(scorer, self._rows, images.shape[1]) | {"seeds": self._seeds}
      mean = float(np.mean(scorer(images, [row.text for row in self._rows], **given)))
      scores[scorer.name] = mean
      goodness[scorer.name] = mean if scorer.higher_is_better else -mean
      scorer.release()  # training needs the memory
    return RunPoint(grid, scores, goodness)
