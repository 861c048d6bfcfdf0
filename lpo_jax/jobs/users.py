"""The users job: a few judgements of every person -> an embedding of that person.

The judgements are those that `data.few_shot` keeps out of all lists. No gradient is
taken: a person who was never trained on gets an embedding in the same way.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.data import decoding, few_shot, records, sources, user_embeds
from lpo_jax.data.judgements import Judgements
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import clip_pair
from lpo_jax.pretrained import checkpoints
from lpo_jax.scoring import clip_scorers, networks, preprocessing

# (pictures [n] of [H, W, 3] uint8) -> [n, D]
Encoder = Callable[[Sequence[np.ndarray]], np.ndarray]
SIDE = 8  # pixels a side that the encoder "pixels" sees
AT_ONCE = 16


def clip(model: str) -> Encoder:
  """CLIP's projected image embeddings as unit vectors."""
  files = (*clip_scorers.TRANSFORMERS, *clip_scorers.OPEN_CLIP)
  checkpoint = checkpoints.clip(model, files, "ViT-H-14")
  mesh = parallel.make_mesh(devices=jax.local_devices())
  network = networks.Network.load(
    checkpoint, networks.Place.of(mesh, "float32", AT_ONCE)
  )
  size = clip_pair.vision_config(network.model.config).get("image_size", 224)

  def embed(params: Any, images: jax.Array) -> jax.Array:
    x = network.model.embed_images(params, images)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  run = network.jit(embed)

  def encode(pictures: Sequence[np.ndarray]) -> np.ndarray:
    def rows(part: slice) -> tuple[np.ndarray, ...]:
      return (preprocessing.prepare(pictures[part], "crop_rgb", size),)

    return network.run(run, len(pictures), rows, "encoding images of people", "images")

  return encode


def pixels(model: str) -> Encoder:
  """8 x 8 grey levels, 0 black to 1 white: for worlds as small as that."""
  del model
  from PIL import Image

  def one(picture: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(picture).convert("L")
    small = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / 255

  return lambda pictures: np.stack([one(picture) for picture in pictures])


# users.encoder -> (users.model) -> Encoder
ENCODERS: dict[str, Callable[[str], Encoder]] = {"clip": clip, "pixels": pixels}


def _means(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
  return np.concatenate([better.mean(0), worse.mean(0)])[None]


def _difference(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
  return (better.mean(0) - worse.mean(0))[None]


def _pairs(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
  # Who said less than others is shown again from the first.
  rows = np.arange(count) % len(better)
  return np.concatenate([better, worse], axis=-1)[rows]


# users.form -> (preferred [n, D], the others [n, D], how many) -> [K, D']
FORMS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
  "means": _means,
  "difference": _difference,
  "pairs": _pairs,
}


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Writes the file that `data.user_embeds` names, and which judgements it is made of.

  Args:
    config: `data`, as the cache job reads it, and `users`.
    workdir: gets user_embeds.npz where `data.user_embeds` is None.

  Returns:
    The file.

  Raises:
    UserError: an unknown encoder or form, a source without judgements by people with
      names, or data.few_shot=0.
  """
  data, how = config.data, config.users
  for key, known in (("encoder", ENCODERS), ("form", FORMS)):
    if how[key] not in known:
      raise unknown_name(f"users.{key}", how[key], known)
  path = pathlib.Path(data.user_embeds or pathlib.Path(workdir) / "user_embeds.npz")
  source = sources.open(
    data.path, data.source, split=data.get("split"), images=data.get("images")
  ).read()
  named = isinstance(source, Judgements) and (source.user >= 0).any()
  if not named or source.images is None or data.few_shot < 1:
    raise UserError(
      f"data.few_shot={data.few_shot}, data.path={data.path!r}: expected at least 1, and "
      "judgements of two images, with the images, by people with names (user_id)."
    )
  known = few_shot.choose(source, data.few_shot)
  better, worse = {}, {}
  for user, rows in known.examples.items():
    better[user], worse[user] = few_shot.winner_and_loser(source, rows)
  vectors, bad = _encode(source, [*better.values(), *worse.values()], how)
  found = {}
  for user in known.examples:
    pair = np.stack([better[user], worse[user]], axis=1)
    pair = pair[~np.isin(pair, bad).any(axis=1)]
    if len(pair):
      left, right = (np.stack([vectors[i] for i in side]) for side in pair.T)
      found[user] = FORMS[how.form](left, right, data.few_shot)
  if not found:
    raise UserError(
      f"{data.path}: nobody has a clear judgement whose images are there."
    )
  values = np.stack(list(found.values())).astype(np.float32)
  # One number for all: a projector starts with weights for inputs of size 1.
  scale = max(float(np.sqrt(np.mean(np.square(values)))), 1e-12)
  embeds = user_embeds.UserEmbeds(tuple(found), values / scale, str(path))
  parallel.barrier("people encoded")
  if parallel.is_main_process():
    user_embeds.write(path, embeds)
    facts = {"encoder": how.encoder, "form": how.form, "scale": scale}
    about = {"few_shot": data.few_shot, **facts, "bad_images": len(bad)}
    rows = _in_words(source, known.examples)
    records.write_json(path.with_suffix(".json"), {**about, "examples": rows})
  parallel.barrier("people written")
  few = sum(len(rows) < data.few_shot for rows in known.examples.values())
  silent = len({int(u) for u in source.user if u >= 0}) - len(found)
  console.say(
    f"{len(found)} people, {values.shape[1]} embeddings of width {values.shape[2]} each, "
    f"from {data.few_shot} judgements that are in no list ({few} people have fewer, "
    f"{silent} none, {len(bad)} images are bad; {int(known.held.sum())} of {len(source)} "
    f"judgements kept out): {path}"
  )
  return path


class _Pictures(Sequence[np.ndarray]):
  """Pictures by place, decoded when they are asked for: all of them may not fit.

  Attributes:
    bad: places of those that are no images; grey stands in for them.
  """

  def __init__(self, images: Any, order: np.ndarray):
    self._images, self._order = images, order
    self.bad: set[int] = set()

  def __len__(self) -> int:
    return len(self._order)

  def __getitem__(self, places: Any) -> Any:
    if isinstance(places, slice):
      return [self[place] for place in range(len(self))[places]]
    try:
      return decoding.decode(self._images.read(int(self._order[places])))
    except decoding.BadImage:
      self.bad.add(places)
      return np.full((SIDE, SIDE, 3), 128, np.uint8)


def _encode(
  source: Judgements, images: Sequence[np.ndarray], how: Any
) -> tuple[dict[int, np.ndarray], list[int]]:
  """Embeds images, each once: by index; and the indices of those that are no images."""
  wanted = np.unique(np.concatenate(images))
  order = source.images.file_order(wanted)
  pictures = _Pictures(source.images, order)
  vectors = ENCODERS[how.encoder](how.model)(pictures) if len(order) else []
  found = {
    index: vector
    for place, (index, vector) in enumerate(zip(order.tolist(), vectors, strict=True))
    if place not in pictures.bad
  }
  return found, np.setdiff1d(wanted, list(found)).tolist()


def _in_words(
  source: Judgements, examples: Mapping[str, np.ndarray]
) -> dict[str, list[dict[str, str]]]:
  """What each person is known by: prompt, image preferred, image that was not."""
  said = {}
  for user, rows in examples.items():
    better, worse = few_shot.winner_and_loser(source, rows)
    said[user] = [
      {
        "prompt": source.prompts[source.prompt[row]],
        "preferred": source.image_uids[a],
        "other": source.image_uids[b],
      }
      for row, a, b in zip(rows, better, worse, strict=True)
    ]
  return said
