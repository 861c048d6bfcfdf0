"""Drawing a candidate's images into a folder: sharded, resumable image by image."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lpo_jax import console, parallel
from lpo_jax.data import decoding
from lpo_jax.data.image_folders import Case
from lpo_jax.data.user_embeds import UserEmbeds
from lpo_jax.errors import StoppedEarly, UserError
from lpo_jax.generation import Generator
from lpo_jax.jobs import sampling
from lpo_jax.jobs.stops import StopRequests
from lpo_jax.types import Params

THREADS = 4
SETTINGS, SPEED = "drawing.json", "speed.json"


class ImageFiles:
  """Images that are read when they are asked for.

  Args:
    paths: [n] one file each.
  """

  def __init__(self, paths: Sequence[pathlib.Path]):
    self.paths = list(paths)

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    """Reads images of one size: index [...] -> [..., H, W, 3] uint8."""
    index = np.asarray(index)
    images = np.stack([read(self.paths[i]) for i in index.ravel()])
    return images.reshape(*index.shape, *images.shape[1:])

  def batches(self, size: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields places in order and their images [m, H, W, 3], m <= size, one size each."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      for start in range(0, len(self), size):
        places = list(range(start, min(start + size, len(self))))
        images = list(pool.map(read, [self.paths[i] for i in places]))
        for shape in dict.fromkeys(image.shape for image in images):
          alike = [k for k, image in enumerate(images) if image.shape == shape]
          yield [places[k] for k in alike], np.stack([images[k] for k in alike])


def read(path: pathlib.Path) -> np.ndarray:
  """Reads an image, [H, W, 3] uint8.

  Raises:
    UserError: it cannot be read.
  """
  try:
    return decoding.decode(path.read_bytes())
  except (decoding.BadImage, OSError) as error:
    raise UserError(
      f"{path} cannot be read ({error}). Delete it, and the same command draws it again."
    ) from error


@dataclasses.dataclass(frozen=True)
class Speed:
  """How fast images were drawn, all sessions together.

  Attributes:
    images: drawn while the clock ran: all but each session's first batch, which compiles.
    seconds: what they took: text encoders, sampler, VAE, and writing the files.
    batch_size: images drawn at once.
    devices: how many, and of what kind.
  """

  images: int = 0
  seconds: float = 0.0
  batch_size: int = 0
  devices: str = ""

  @property
  def images_per_second(self) -> float | None:
    """None where nothing was drawn but a first batch."""
    return self.images / self.seconds if self.images else None


def read_speed(folder: pathlib.Path) -> Speed:
  """Returns the speed that `draw` wrote down; nothing where it wrote none."""
  found = _read_json(folder / SPEED)
  return Speed(**found) if found else Speed()


def draw(
  generator: Generator,
  params: Params,
  folder: pathlib.Path,
  cases: Sequence[Case],
  *,
  label: str,
  settings: dict[str, Any],
  stop: StopRequests,
  people: UserEmbeds | None = None,
) -> ImageFiles:
  """Draws the images that are not there yet.

  Args:
    generator: how.
    params: of which UNet.
    folder: gets `00012.png` for the case of index 12, and what they were drawn by;
      images drawn by anything else are removed.
    cases: what.
    label: what the progress calls it.
    settings: all that decides the pixels, as JSON.
    stop: asked between two batches.
    people: see `sampling.draw`.

  Raises:
    StoppedEarly: it was asked to; what is drawn stays.
    UserError: a process cannot see the folder that the main one writes.
  """
  begin(folder, settings)
  paths = [folder / f"{case.index:05d}.png" for case in cases]
  there = _agreed([path.exists() for path in paths])
  todo = [i for i, found in enumerate(there) if not found]
  done, total = len(paths) - len(todo), len(paths)
  progress = console.Progress(f"drawing {label}", total, "images", start=done)
  began, timed, writing = time.monotonic(), 0, []
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    # The same for several cases, such as of people whom the model is not told of: once.
    alike: dict[tuple, list[int]] = {}
    for i in todo:
      alike.setdefault((cases[i].asked.key, cases[i].seed), []).append(i)
    groups = list(alike.values())
    for count, start in enumerate(range(0, len(groups), generator.batch_size)):
      reason = stop.reason(count)
      if reason:
        break
      batch = groups[start : start + generator.batch_size]
      rows = [group[0] for group in batch]
      asked, seeds = [cases[i].asked for i in rows], [cases[i].seed for i in rows]
      drawn = sampling.draw(generator, params, asked, seeds, people=people)
      # Encoding PNGs can take as long as drawing: the last batch's beside this one.
      _finish(writing)
      if parallel.is_main_process():
        writing = [
          pool.submit(_write_png, paths[i], image)
          for group, image in zip(batch, drawn, strict=True)
          for i in group
        ]
      if count == 0:
        _finish(writing)
        began = time.monotonic()
      else:
        timed += len(rows)
      done += sum(map(len, batch))
      progress.update(done)
    _finish(writing)
  if todo:
    _add_speed(folder, Speed(timed, time.monotonic() - began, generator.batch_size))
  if done < total:
    stop.forget()
    raise StoppedEarly(
      f"{reason}: {done} of {total} images of {label} are drawn. The same command goes "
      "on from there."
    )
  parallel.barrier("images drawn")
  if not all(_agreed([path.exists() for path in paths], everywhere=True)):
    raise UserError(
      f"not every process sees the images in {folder}: the evaluate job on several hosts "
      "needs a --workdir that all of them share."
    )
  return ImageFiles(paths)


def _finish(writing: Sequence[concurrent.futures.Future]) -> None:
  """Waits for files; what went wrong with one is raised here."""
  for future in writing:
    future.result()


def begin(folder: pathlib.Path, settings: dict[str, Any]) -> None:
  """Makes the folder; throws away images of other settings."""
  if parallel.is_main_process():
    if folder.exists() and _read_json(folder / SETTINGS) != settings:
      shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
  parallel.barrier("drawing begins")


def _agreed(here: Sequence[bool], *, everywhere: bool = False) -> list[bool]:
  """What the main process finds, or what all find, the same on every process."""
  if jax.process_count() == 1:
    return list(here)
  found = multihost_utils.process_allgather(np.asarray(here, bool))
  return list(found.all(axis=0) if everywhere else found[0])


def _add_speed(folder: pathlib.Path, speed: Speed) -> None:
  """Adds a session to what is written down."""
  before = read_speed(folder)
  kinds = sorted({device.device_kind for device in jax.devices()})
  devices = f"{jax.device_count()} x {', '.join(kinds)}"
  if (before.devices, before.batch_size) not in (("", 0), (devices, speed.batch_size)):
    before = Speed()  # another machine
  if not speed.images:
    speed = dataclasses.replace(speed, seconds=0.0)
  total = Speed(
    before.images + speed.images,
    before.seconds + speed.seconds,
    speed.batch_size,
    devices,
  )
  if parallel.is_main_process():
    text = json.dumps(dataclasses.asdict(total)) + "\n"
    (folder / SPEED).write_text(text, encoding="utf-8")


def _write_png(path: pathlib.Path, image: np.ndarray) -> None:
  """Writes atomically: a PNG that is there is whole."""
  from PIL import Image

  partial = path.with_suffix(".partial")
  Image.fromarray(image).save(partial, format="PNG")
  partial.replace(path)


def _read_json(file: pathlib.Path) -> Any:
  with contextlib.suppress(OSError, ValueError):
    return json.loads(file.read_text("utf-8"))
  return None
