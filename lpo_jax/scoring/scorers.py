"""Scorers by name, with one call signature.

  scorer = scorers.get("hps_v2.1", path="...", mesh=mesh)
  scorer(images, prompts, seeds=None, names=None) -> [n] fp64
  scorer.name, .version, .measures, .scale, .preprocessing, .higher_is_better, .identity
  scorer.description()   all of these but `measures`, as JSON takes it
  scorer.release()       gives the weights' memory back

Nothing is read before `.identity` or the first call. `scorer.Scorer` says what each of
these is; docs/scorers.md where the weights are, and what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lpo_jax import tables
from lpo_jax.errors import unknown_name
from lpo_jax.scoring import clip_scorers, digits, external, image_reward
from lpo_jax.scoring.networks import Place
from lpo_jax.scoring.scorer import Formula, Scorer

__all__ = ["SCORERS", "Formula", "Scorer", "chosen", "get"]

BATCH_SIZE = 32  # images; the last batch is filled up


def _digits_taste(*, mesh: jax.sharding.Mesh | None = None) -> Scorer:
  del mesh
  return Formula(
    "digits_taste",
    "1",
    "What the simulated annotators like: upright strokes, and bold ones, in units of "
    "the spread among real digits.",
    "spreads among real digits of one class",
    "none",
    digits.taste,
  )


def _digits_legibility(*, mesh: jax.sharding.Mesh | None = None) -> Scorer:
  del mesh
  return Formula(
    "digits_legibility",
    "1",
    "Whether an independent reader, trained on real digits alone, recognises the "
    "prompted digit (0 or 1; the mean is the share recognised).",
    "0 or 1",
    "mean ink of 3 x 3 pixel cells",
    digits.legibility,
  )


def _cosine(published: clip_scorers.Published) -> Callable[..., Scorer]:
  def make(
    *,
    path: str = "",
    tokenizer: str = "",
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    batch_size: int = BATCH_SIZE,
  ) -> Scorer:
    place = Place.of(mesh, dtype, batch_size)
    return clip_scorers.Cosine(published, place, path, tokenizer)

  return make


def _aesthetic(published: clip_scorers.Published) -> Callable[..., Scorer]:
  def make(
    *,
    path: str = "",
    tower: str = "",
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    batch_size: int = BATCH_SIZE,
  ) -> Scorer:
    place = Place.of(mesh, dtype, batch_size)
    return clip_scorers.Aesthetic(published, place, path, tower)

  return make


def _image_reward(
  *,
  path: str = "",
  tokenizer: str = "",
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
  batch_size: int = BATCH_SIZE,
) -> Scorer:
  place = Place.of(mesh, dtype, batch_size)
  return image_reward.ImageReward(place, path, tokenizer)


def _external(*, path: str = "", mesh: jax.sharding.Mesh | None = None) -> Scorer:
  del mesh
  return external.External(path)


# Keyword-only parameters are what `eval.scorer_paths` may set, and `mesh`.
SCORERS: dict[str, Callable[..., Scorer]] = {
  "digits_taste": _digits_taste,
  "digits_legibility": _digits_legibility,
  **{p.name: _cosine(p) for p in clip_scorers.COSINES},
  **{p.name: _aesthetic(p) for p in clip_scorers.AESTHETICS},
  "image_reward": _image_reward,
  "external": _external,
}


def get(name: str, **options: Any) -> Scorer:
  """Makes a scorer, without reading its weights.

  Args:
    name: in `SCORERS`.
    options: of the scorer: `mesh` for all, `path` where there are weights (a file, a
      folder, or an id on the Hub; empty: the published one) and those of its factory.

  Raises:
    UserError: an unknown name or option, with the list and the nearest.
  """
  return tables.bind("scorer", SCORERS, name, options)()


def chosen(
  names: Sequence[str],
  paths: Mapping[str, Any],
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> list[Scorer]:
  """Makes the scorers that a config names.

  Args:
    names: `eval.scorers`.
    paths: `eval.scorer_paths`: scorer -> path, or -> several options by name. Keys of a
      config have no dots: "hps_v2_1" is "hps_v2.1".
    mesh: on which they run.

  Raises:
    UserError: an unknown scorer or option, or a path of a scorer that is unknown.
  """
  keys = {name.replace(".", "_"): name for name in SCORERS}
  for key in paths:
    if key not in keys and key not in SCORERS:
      raise unknown_name("scorer in eval.scorer_paths", key, keys)
  given = {keys.get(key, key): value for key, value in paths.items()}
  made = []
  for name in names:
    options = given.get(name, {})
    options = {"path": options} if isinstance(options, str) else dict(options)
    made.append(get(name, mesh=mesh, **options))
  return made
