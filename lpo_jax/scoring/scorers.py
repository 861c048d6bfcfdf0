"""Scorers by name, with one call signature.

  scorer = scorers.get("hps_v2.1", path="...", mesh=mesh)
  scorer(images, prompts, seeds=..., sources=..., ...) -> [n] fp64; `scorer.Told`
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
from lpo_jax.scoring import (
  clip_scorers,
  digit_edits,
  digit_people,
  digits,
  edit_scorers,
  external,
  image_reward,
)
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


def _digits_edit(*, mesh: jax.sharding.Mesh | None = None) -> Scorer:
  del mesh
  return Formula(
    "digits_edit",
    "1",
    "How well the ink of an edit lies where the instruction, done to that very source, "
    "would have it (Dice's overlap: 0 to 1).",
    "overlap, 0 to 1",
    "none",
    digit_edits.match,
    needs=("sources",),
  )


def _digits_kept(*, mesh: jax.sharding.Mesh | None = None) -> Scorer:
  del mesh
  return Formula(
    "digits_kept",
    "1",
    "Whether an independent reader, trained on real digits and edits of them, reads the "
    "edit as it reads the source (0 or 1; the mean is the share kept).",
    "0 or 1",
    "mean ink of 3 x 3 pixel cells",
    digit_edits.kept,
    needs=("sources",),
  )


def _digits_person(*, path: str = "", mesh: jax.sharding.Mesh | None = None) -> Scorer:
  del mesh
  return Formula(
    "digits_person",
    "1",
    "What the simulated person likes whom the image is for: bold or thin, upright or "
    "tilted strokes, or a mixture, in units of the spread among drawings of one prompt.",
    "spreads among the base's drawings of one prompt",
    "none",
    digit_people.liked_by(path),
    needs=("users",),
  )


def _of_texts(make: Callable[[Place, str, str], Scorer]) -> Callable[..., Scorer]:
  """A factory of a scorer that reads texts, from (place, path, tokenizer)."""

  def factory(
    *,
    path: str = "",
    tokenizer: str = "",
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    batch_size: int = BATCH_SIZE,
  ) -> Scorer:
    return make(Place.of(mesh, dtype, batch_size), path, tokenizer)

  return factory


def _cosine(published: clip_scorers.Published) -> Callable[..., Scorer]:
  return _of_texts(lambda *given: clip_scorers.Cosine(published, *given))


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


def _dino(other: str) -> Callable[..., Scorer]:
  def make(
    *,
    path: str = "",
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    batch_size: int = BATCH_SIZE,
  ) -> Scorer:
    return edit_scorers.Dino(Place.of(mesh, dtype, batch_size), path, other=other)

  return make


def _l1(other: str) -> Callable[..., Scorer]:
  def make(*, mesh: jax.sharding.Mesh | None = None) -> Scorer:
    del mesh
    return edit_scorers.l1(other)

  return make


def _external(*, path: str = "", mesh: jax.sharding.Mesh | None = None) -> Scorer:
  del mesh
  return external.External(path)


# Keyword-only parameters are what `eval.scorer_paths` may set, and `mesh`.
SCORERS: dict[str, Callable[..., Scorer]] = {
  "digits_taste": _digits_taste,
  "digits_legibility": _digits_legibility,
  "digits_person": _digits_person,
  "digits_edit": _digits_edit,
  "digits_kept": _digits_kept,
  **{p.name: _cosine(p) for p in clip_scorers.COSINES},
  **{p.name: _aesthetic(p) for p in clip_scorers.AESTHETICS},
  "image_reward": _of_texts(image_reward.ImageReward),
  # Of edits: what they need of a prompt set is in `Scorer.needs`.
  "clip_direction": _of_texts(
    lambda place, *paths: edit_scorers.Direction(edit_scorers.DIRECTION, place, *paths)
  ),
  "clip_caption": _of_texts(
    lambda place, *paths: edit_scorers.Caption(edit_scorers.CAPTION, place, *paths)
  ),
  "clip_image_source": _of_texts(
    lambda place, *paths: edit_scorers.ImageSimilarity(place, *paths, other="sources")
  ),
  "clip_image_target": _of_texts(
    lambda place, *paths: edit_scorers.ImageSimilarity(place, *paths, other="targets")
  ),
  "dino_source": _dino("sources"),
  "dino_target": _dino("targets"),
  "l1_source": _l1("sources"),
  "l1_target": _l1("targets"),
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
