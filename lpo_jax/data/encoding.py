"""Images and prompts to records, by encoders that are given as plain functions."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lpo_jax.data import decoding, records
from lpo_jax.errors import UserError, unknown_name

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clips here when it samples the posterior
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
WHOLE = records.Share()
# Sequence of image records -> how an image is shown to the VAE for it.
VIEWS = {"moments": decoding.as_it_is, "mirrored": decoding.mirror}
BATCHES_AHEAD = 3  # being decoded while one is encoded


@dataclasses.dataclass
class Speed:
  """Where the time of encoding images went, in seconds; of this run alone.

  Attributes:
    images: images decoded.
    decoding: summed over the threads.
    threads: how many decode.
    waiting: the encoder had nothing to do, because no batch was decoded.
    total: from the first image to the last.
    encode_rate: images/s of one call of the encoder that was timed by itself.
  """

  images: int = 0
  decoding: float = 0.0
  threads: int = 1
  waiting: float = 0.0
  total: float = 0.0
  encode_rate: float = 0.0

  def as_dict(self) -> dict[str, float]:
    """Returns images/s of each part, and the share of the time spent waiting."""
    return {
      "images": self.images,
      "images_per_second": self.images / max(self.total, 1e-9),
      "decode_images_per_second": self.threads * self.images / max(self.decoding, 1e-9),
      "encode_images_per_second": self.encode_rate,
      "decode_threads": self.threads,
      "waiting_share": self.waiting / max(self.total, 1e-9),
    }


@dataclasses.dataclass(frozen=True)
class ImageJob:
  """How images become records.

  Attributes:
    read: position -> encoded bytes; called in order of position, from one thread.
    encode: [batch_size, H, W, 3] uint8 -> moments [batch_size, h, w, 2c].
    resolution: side in pixels that images are brought to.
    batch_size: images per call of `encode`; the last call is padded to it.
    max_pixels: of an image; larger ones are not decoded.
    speed: gets what the job took.
  """

  read: Callable[[int], bytes]
  encode: Callable[[np.ndarray], Any]
  resolution: int
  batch_size: int
  max_pixels: int = decoding.MAX_PIXELS
  speed: Speed = dataclasses.field(default_factory=Speed)


def write_images(
  folder: str | os.PathLike,
  uids: Sequence[str],
  job: ImageJob,
  *,
  max_bad: float,
  dtype: str = "float16",
  view: str = "moments",
  share: records.Share = WHOLE,
) -> None:
  """Encodes the images that have no record yet.

  Args:
    folder: the cache.
    uids: one per image; positions in it are what `job.read` is asked for.
    job: how to read and encode.
    max_bad: share of the images that may be unusable before the job stops.
    dtype: "float16" or "bfloat16", of the records.
    view: a name in `VIEWS`, which is also that of the sequence of records.
    share: what this process does of it.

  Raises:
    UserError: too many bad images, an unknown dtype, or the disk is full.
  """
  storage = storage_dtype(dtype)
  shards = records.write_shards(
    folder,
    view,
    uids,
    lambda positions: image_records(positions, uids, job, storage, VIEWS[view]),
    share,
  )
  bad: list[tuple[str, str]] = []
  with contextlib.closing(shards):
    for shard in shards:
      bad += shard.refused
      refuse_too_many(folder, bad, max_bad, len(uids))


def refuse_too_many(
  folder: str | os.PathLike, bad: Sequence[tuple[str, str]], max_bad: float, count: int
) -> None:
  """Stops if more than a share `max_bad` of `count` images is bad.

  Raises:
    UserError: too many; the reasons are then in bad_images.jsonl.
  """
  if len(bad) > max_bad * count:
    path = write_bad_images(folder, bad)
    shown = "; ".join(f"{uid}: {reason}" for uid, reason in bad[:3])
    raise UserError(
      f"{len(bad)} of {count} images cannot be used, more than the share that "
      f"data.max_bad_images={max_bad} allows ({shown}). All are in {path}; repair the "
      "source, or raise data.max_bad_images to go on without them."
    )


def write_bad_images(folder: str | os.PathLike, bad: Sequence[tuple[str, str]]) -> Path:
  """Writes one JSON line per bad image; returns the file."""
  path = Path(folder) / "bad_images.jsonl"
  lines = [json.dumps({"uid": u, "reason": r}, ensure_ascii=False) for u, r in bad]
  records.write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
  return path


def write_prompts(
  folder: str | os.PathLike,
  prompts: Sequence[str],
  encode: Callable[[list[str]], tuple[np.ndarray, np.ndarray | None]],
  *,
  batch_size: int = 32,
  dtype: str = "float16",
  share: records.Share = WHOLE,
) -> None:
  """Encodes the prompts that have no record yet.

  Args:
    folder: the cache.
    prompts: distinct, the empty prompt among them.
    encode: n prompts -> (prompt_embeds [n, L, D], pooled [n, P] or None).
    batch_size: most prompts per call of `encode`.
    dtype: "float16" or "bfloat16", of the records.
    share: what this process does of it.

  Raises:
    UserError: an encoder gives values that are not finite in `dtype`.
  """
  storage = storage_dtype(dtype)

  def produce(positions: Sequence[int]) -> Iterator[records.Record]:
    for start in range(0, len(positions), batch_size):
      batch = [prompts[p] for p in positions[start : start + batch_size]]
      yield from prompt_records(batch, encode, storage)

  for _ in records.write_shards(folder, "prompts", prompts, produce, share):
    pass


def prompt_records(
  prompts: list[str], encode: Callable[[list[str]], Any], storage: np.dtype
) -> Iterator[records.Record]:
  """Encodes prompts in one call: one record each, in order.

  Raises:
    UserError: values that are not finite in `storage`.
  """
  states, pooled = encode(prompts)
  states = np.asarray(states)
  about = {"prompt_embeds": list(states.shape[1:]), "pooled": None}
  if pooled is not None:
    pooled = np.asarray(pooled)
    about["pooled"] = list(pooled.shape[1:])
  for row, prompt in enumerate(prompts):
    parts = [states[row]] if pooled is None else [states[row], pooled[row]]
    flat = np.concatenate([np.ravel(part) for part in parts])
    with np.errstate(over="ignore"):
      flat = flat.astype(storage)
    if not np.isfinite(flat.astype(np.float32)).all():
      raise UserError(
        f"the text encoder gives values outside {storage.name} for the prompt "
        f"{prompt!r}; check the weights under model.path."
      )
    yield records.Record(prompt, flat.tobytes(), about)


def storage_dtype(name: str) -> np.dtype:
  """Returns the dtype of records called so.

  Raises:
    UserError: an unknown name.
  """
  if name not in DTYPES:
    raise unknown_name("data.cache_dtype", name, DTYPES)
  return DTYPES[name]


def image_records(
  positions: Sequence[int],
  uids: Sequence[str],
  job: ImageJob,
  storage: np.dtype,
  view: Callable[[decoding.PreparedImage], decoding.PreparedImage] = decoding.as_it_is,
) -> Iterator[records.Record]:
  """Reads, decodes and encodes the images at `positions`: one record each, in order."""
  began = time.perf_counter()
  calls, encoding = 0, None
  with contextlib.closing(decoded_batches(positions, uids, job, view)) as batches:
    for batch in batches:
      good = [image.pixels for _, image in batch if not isinstance(image, str)]
      moments = None
      if good:
        padding = [good[-1]] * (job.batch_size - len(good))
        images = np.stack(good + padding)
        # The first call may compile, the second is timed; from then on the device works
        # on one batch while the host prepares the next.
        moments = _timed(job, images) if calls < 2 else job.encode(images)
        calls += 1
      if encoding is not None:
        yield from _moments_records(*encoding, storage)
      encoding = batch, moments
      job.speed.total += time.perf_counter() - began
      began = time.perf_counter()
  if encoding is not None:
    yield from _moments_records(*encoding, storage)
  job.speed.total += time.perf_counter() - began


def _timed(job: ImageJob, images: np.ndarray) -> np.ndarray:
  began = time.perf_counter()
  moments = np.asarray(job.encode(images))
  job.speed.encode_rate = len(images) / max(time.perf_counter() - began, 1e-9)
  return moments


def decoded_batches(
  positions: Sequence[int],
  uids: Sequence[str],
  job: ImageJob,
  view: Callable[[decoding.PreparedImage], decoding.PreparedImage] = decoding.as_it_is,
) -> Iterator[list[tuple[str, decoding.PreparedImage | str]]]:
  """Yields lists of (uid, image or the reason against it), at most batch_size each.

  One thread reads ahead, as many as there are cores decode. Decoders and resizing let
  go of Python's lock; processes were slower, for they must copy the pixels.
  """

  def prepare(data: bytes | str) -> tuple[decoding.PreparedImage | str, float]:
    if isinstance(data, str):
      return data, 0.0
    began = time.perf_counter()
    try:
      image = view(decoding.prepare(data, job.resolution, max_pixels=job.max_pixels))
    except decoding.BadImage as error:
      image = str(error)
    return image, time.perf_counter() - began

  def read(position: int) -> bytes | str:
    try:
      return job.read(position)
    except (OSError, KeyError, ValueError) as error:
      return f"cannot be read: {type(error).__name__}: {error}"

  def batches() -> Iterator[list]:
    for start in range(0, len(positions), job.batch_size):
      batch = positions[start : start + job.batch_size]
      yield [(uids[p], pool.submit(prepare, read(p))) for p in batch]

  job.speed.threads = threads = os.cpu_count() or 1
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  with pool, contextlib.closing(_read_ahead(batches, BATCHES_AHEAD)) as ahead:
    while True:
      began = time.perf_counter()
      batch = next(ahead, None)
      if batch is None:
        return
      done = [(uid, *future.result()) for uid, future in batch]
      job.speed.waiting += time.perf_counter() - began
      job.speed.images += len(done)
      job.speed.decoding += sum(seconds for *_, seconds in done)
      yield [(uid, image) for uid, image, _ in done]


def _read_ahead(make: Callable[[], Iterable[Any]], count: int) -> Iterator[Any]:
  """Yields what `make()` does, which runs in a thread and at most `count` ahead."""
  made: queue.Queue[tuple[str, Any]] = queue.Queue()
  room = threading.Semaphore(count)
  stopped = threading.Event()

  def run() -> None:
    try:
      values = iter(make())
      while True:
        room.acquire()
        if stopped.is_set():
          return
        made.put(("value", next(values)))
    except StopIteration:
      made.put(("end", None))
    except BaseException as error:  # whatever it is, it belongs to the consumer
      made.put(("error", error))

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  try:
    while True:
      kind, value = made.get()
      if kind == "error":
        raise value
      if kind == "end":
        return
      room.release()
      yield value
  finally:
    stopped.set()
    room.release()
    thread.join()


def facts(image: decoding.PreparedImage) -> dict[str, list[int]]:
  """Returns what is written down beside the record of an image."""
  return {"original_size": list(image.original_size), "crop": list(image.crop)}


def _moments_records(batch, moments, storage) -> Iterator[records.Record]:
  moments = None if moments is None else np.asarray(moments, np.float32)
  row = 0
  for uid, image in batch:
    if isinstance(image, str):
      yield records.Record(uid, None, image)
      continue
    mean, logvar = np.split(moments[row], 2, axis=-1)
    row += 1
    clipped = np.concatenate([mean, np.clip(logvar, *LOGVAR_RANGE)], axis=-1)
    with np.errstate(over="ignore"):
      stored = clipped.astype(storage)
    if not np.isfinite(stored.astype(np.float32)).all():
      yield records.Record(uid, None, "the VAE gives values that are not finite")
      continue
    about = {"moments": list(stored.shape), **facts(image)}
    yield records.Record(uid, stored.tobytes(), about)
