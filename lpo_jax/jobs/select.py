"""The select job: the best images of a collection, as experts to imitate."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.data import decoding, experts, list_files, sources
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.scoring import scorers

IMAGES_PER_CALL = 64


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes lists of one image each, and says how they were chosen.

  Args:
    config: `select`, and `data` for the source. `select.by` is "score" (the source's
      own, or that of `select.scorer`), "wins", or "uids" for those named in the file
      `select.uids`, one a line.
    workdir: gets `experts.parquet` unless `select.path` says otherwise, and beside it
      the account as JSON.

  Returns:
    The account.

  Raises:
    UserError: an unknown choice, or a source that has nothing for it.
  """
  wanted, workdir = config.select, pathlib.Path(workdir)
  ways = (*experts.CRITERIA, "uids")
  if wanted.by not in ways:
    raise unknown_name("select.by", wanted.by, ways)
  if wanted.count < 1:
    raise UserError(f"select.count={wanted.count}: expected at least 1.")
  data = config.data
  opened = sources.open(data.path, data.source, split=data.split, images=data.images)
  sources.refuse_training(opened)
  source = opened.read()
  if getattr(source, "source_image", None) is not None:
    raise UserError(
      f"{data.path} holds edits, and chosen images would lose what they are edits of. "
      "Train on the source itself: data.strategy='winners' takes the best edit of a list."
    )
  found = experts.candidates(source)
  if not len(found):
    raise UserError(f"{config.data.path} holds no image to choose.")
  usable = np.ones(len(found), bool)
  if wanted.by == "uids":
    chosen, equal = experts.named(source, found, read_names(wanted.uids)), 0
    values = found.wins
  else:
    if wanted.by == "score" and wanted.scorer:
      values, usable = score(config, source, found)
    else:
      values = experts.CRITERIA[wanted.by](found)
    places = np.flatnonzero(usable)
    chosen, equal = experts.top(values[places], wanted.count)
    chosen = places[chosen]
  account = {
    "by": wanted.by,
    "scorer": wanted.scorer,
    "candidates": len(found),
    "bad_images": int(np.sum(~usable)),
    "chosen": len(chosen),
    "prompts": len({int(i) for i in found.prompt[chosen]}),
    "best": float(values[chosen].max()),
    "worst": float(values[chosen].min()),
    "left_out_equal_to_worst": equal,
  }
  path = pathlib.Path(wanted.path or workdir / "experts.parquet")
  if parallel.is_main_process():
    write(path, source, found, chosen, values)
    text = json.dumps(account, indent=2) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
  parallel.barrier("experts written")
  console.say(
    f"{account['chosen']} experts of {account['candidates']} images by {wanted.by}, "
    f"from {account['best']:g} to {account['worst']:g}; {equal} more are as good as the "
    f"last; {account['prompts']} prompts: {path}"
  )
  return account


def read_names(path: str) -> list[str]:
  """Reads image uids, one a line.

  Raises:
    UserError: no such file, or nothing in it.
  """
  file = pathlib.Path(path)
  if not path or not file.is_file():
    raise UserError(
      f"select.uids={path!r}: expected a text file of image uids, one a line."
    )
  names = [line.strip() for line in file.read_text("utf-8").splitlines()]
  names = [name for name in names if name]
  if not names:
    raise UserError(f"select.uids={path!r} is empty; expected image uids, one a line.")
  return names


def score(
  config: Any, source: Any, found: experts.Candidates
) -> tuple[np.ndarray, np.ndarray]:
  """Scores every candidate as training would see it: at `data.resolution`.

  Returns:
    [C] scores, and [C] bool which images could be decoded.
  """
  paths = config.eval.get("scorer_paths", {})
  (judge,) = scorers.chosen([config.select.scorer], paths)
  values, usable = np.full(len(found), -np.inf), np.ones(len(found), bool)
  rank = np.empty(source.images.count, np.int64)
  rank[source.images.file_order()] = np.arange(source.images.count)
  order = np.argsort(rank[found.image], kind="stable")  # every block is read once
  progress = console.Progress(f"scoring with {judge.name}", len(order), "images")
  for start in range(0, len(order), IMAGES_PER_CALL):
    pixels, places = [], []
    for place in order[start : start + IMAGES_PER_CALL]:
      try:
        data = source.images.read(int(found.image[place]))
        image = decoding.prepare(data, config.data.resolution)
      except decoding.BadImage:
        usable[place] = False
        continue
      pixels.append(image.pixels)
      places.append(place)
    if places:
      prompts = [source.prompts[found.prompt[place]] for place in places]
      values[places] = judge(np.stack(pixels), prompts)
    progress.update(min(start + IMAGES_PER_CALL, len(order)))
  if not usable.any():
    raise UserError(f"none of {len(usable)} images of {config.data.path} is readable.")
  return values, usable


def write(
  path: pathlib.Path,
  source: Any,
  found: experts.Candidates,
  chosen: np.ndarray,
  values: np.ndarray,
) -> None:
  """Writes the chosen as canonical lists of one, with the values they were chosen by."""
  images = {int(i): source.images.read(int(i)) for i in found.image[chosen]}
  list_files.write(
    path,
    prompts=[source.prompts[i] for i in found.prompt[chosen]],
    images=[[images[int(i)]] for i in found.image[chosen]],
    image_uids=[[source.image_uids[i]] for i in found.image[chosen]],
    ranks=[[0]] * len(chosen),
    scores=[[float(value)] for value in values[chosen]],
  )
