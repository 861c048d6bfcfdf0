"""Rows of several images in order to ranked lists."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lpo_jax.data import files as files_lib
from lpo_jax.data import orders
from lpo_jax.data.ranked import RankedLists, list_ids
from lpo_jax.data.sources.pictures import Pictures
from lpo_jax.data.stores import Block, ImageStore

Place = tuple[int, int, int, int]  # block, column, row, item of the bytes of an image


@dataclasses.dataclass(frozen=True)
class Row:
  """One list as its source has it; anything may be missing or wrong.

  Attributes:
    prompt: text, or None.
    uids: names of the images.
    ranks: lower is better, equal is a tie.
    scores: higher is better; rank the images where there are no ranks.
    weight: of the list.
    user: annotator.
    models: generators.
    places: where the images' bytes are, for `load`.
    source: name of the image that the others edit.
    source_place: where that one's bytes are.
  """

  prompt: str | None
  uids: Sequence[str | None]
  ranks: Sequence[float] | None = None
  scores: Sequence[float] | None = None
  weight: float | None = None
  user: str | None = None
  models: Sequence[str | None] | None = None
  places: Sequence[Place] | None = None
  source: str | None = None
  source_place: Place | None = None


def rank(
  rows: Iterable[Row],
  pictures: Pictures | None,
  load: Callable[[int, int], Block] | None = None,
) -> RankedLists:
  """Turns rows into ranked lists; refuses rows by one reason each.

  Args:
    rows: the lists.
    pictures: the images by name; they go before those beside the rows.
    load: reads a block of the rows' own images; None if they have none.

  Returns:
    The lists.
  """
  import pyarrow as pa

  dropped: collections.Counter[str] = collections.Counter()
  kept: list[Row] = []
  uids, ranks, scores, models = [], [], [], []
  for row in rows:
    order = _order(row)
    if isinstance(order, str):
      dropped[order] += 1
      continue
    made = row.models if row.models and len(row.models) == len(row.uids) else None
    worse = row.ranks or [-score for score in row.scores]
    uids += [row.uids[i] for i in order]
    ranks += orders.dense([worse[i] for i in order])
    scores += [row.scores[i] for i in order] if row.scores else [0.0] * len(order)
    models += [made[i] for i in order] if made else [None] * len(order)
    places = [row.places[i] for i in order] if row.places else None
    kept.append(dataclasses.replace(row, places=places))

  def vocabulary(*texts: list) -> tuple[list[str], list[np.ndarray]]:
    columns = [pa.chunked_array([text], pa.large_string()) for text in texts]
    return files_lib.vocabulary(*columns)

  offsets = np.cumsum([0, *(len(row.uids) for row in kept)], dtype=np.int64)
  prompts, (prompt,) = vocabulary([row.prompt for row in kept])
  words, (image, source) = vocabulary(uids, [row.source for row in kept])
  users, (user,) = vocabulary([row.user for row in kept])
  generators, (model,) = vocabulary(models)
  image_model = np.full(len(words), -1, np.int32)
  np.maximum.at(image_model, image, model)
  images = None
  if pictures is not None:
    images = pictures.store(words)
  elif load is not None:
    images = _store(kept, image, source, load, len(words))
  weights = [1.0 if row.weight is None else row.weight for row in kept]
  return RankedLists(
    prompt=prompt,
    list_id=list_ids(
      [row.prompt for row in kept], uids, offsets, [row.user or "" for row in kept]
    ),
    weight=np.asarray(weights, np.float32),
    offsets=offsets,
    image=image,
    rank=np.asarray(ranks, np.int32),
    score=np.asarray(scores, np.float32),
    prompts=prompts,
    image_uids=words,
    user=user,
    users=users,
    images=images,
    models=generators,
    image_model=image_model,
    source_image=source if np.any(source >= 0) else None,
    dropped=dict(dropped),
  )


def _store(
  rows: Sequence[Row],
  image: np.ndarray,
  source: np.ndarray,
  load: Callable[[int, int], Block],
  count: int,
) -> ImageStore:
  """The images beside the rows: those in the lists, then those that they edit."""
  places = [place for row in rows for place in row.places or ()]
  edited = [i for i, row in enumerate(rows) if row.source_place is not None]
  places += [rows[i].source_place for i in edited]
  block, column, at, item = np.asarray(places, np.int64).reshape(-1, 4).T
  return ImageStore(
    load,
    image=np.concatenate([image, source[edited]]).astype(np.int64),
    block=block,
    column=column,
    row=at,
    item=item,
    count=count,
  )


def _order(row: Row) -> list[int] | str:
  """Returns the places of a row's images, best first, or why the row is refused."""
  uids, ranks, scores = row.uids, row.ranks, row.scores
  if row.prompt is None:
    return "no_prompt"
  if not uids or any(uid is None for uid in uids):
    return "no_image"
  if not ranks and not scores:
    return "unlabelled"
  for given in (ranks, scores):
    if given and (len(given) != len(uids) or any(g is None for g in given)):
      return "bad_label"
    if given and not np.all(np.isfinite(given)):
      return "unlabelled"
  if len(set(uids)) < len(uids):
    return "same_image"
  worse = ranks or [-score for score in scores]
  return sorted(range(len(uids)), key=lambda i: (worse[i], uids[i]))


def best_of(uids: Sequence[str], best: str | None) -> list[int] | None:
  """Ranks where only the best is known: [0, 1, 1, ...]; None if it is none of them."""
  return [int(uid != best) for uid in uids] if best in uids else None
