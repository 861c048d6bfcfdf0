"""Images and prompts to records, by encoders that are given as plain functions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lpo_jax.data import decoding, records
from lpo_jax.errors import UserError, unknown_name

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clips here when it samples the posterior
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
WHOLE = records.Share()


@dataclasses.dataclass(frozen=True)
class ImageJob:
  """How images become records.

  Attributes:
    read: position -> encoded bytes; called in order of position, from one thread.
    encode: [batch_size, H, W, 3] uint8 -> moments [batch_size, h, w, 2c].
    resolution: side in pixels that images are brought to.
    batch_size: images per call of `encode`; the last call is padded to it.
  """

  read: Callable[[int], bytes]
  encode: Callable[[np.ndarray], Any]
  resolution: int
  batch_size: int


def write_images(
  folder: str | os.PathLike,
  uids: Sequence[str],
  job: ImageJob,
  *,
  max_bad: float,
  dtype: str = "float16",
  share: records.Share = WHOLE,
) -> None:
  """Encodes the images that have no record yet.

  Args:
    folder: the cache.
    uids: one per image; positions in it are what `job.read` is asked for.
    job: how to read and encode.
    max_bad: share of the images that may be unusable before the job stops.
    dtype: "float16" or "bfloat16", of the records.
    share: what this process does of it.

  Raises:
    UserError: too many bad images, or an unknown dtype.
  """
  storage = _dtype(dtype)
  shards = records.write_shards(
    folder,
    "moments",
    uids,
    lambda positions: _image_records(positions, uids, job, storage),
    share,
  )
  bad: list[tuple[str, str]] = []
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
  storage = _dtype(dtype)

  def produce(positions: range) -> Iterator[records.Record]:
    for start in range(positions.start, positions.stop, batch_size):
      batch = list(prompts[start : min(start + batch_size, positions.stop)])
      states, pooled = encode(batch)
      states = np.asarray(states)
      about = {"prompt_embeds": list(states.shape[1:]), "pooled": None}
      if pooled is not None:
        pooled = np.asarray(pooled)
        about["pooled"] = list(pooled.shape[1:])
      for row, prompt in enumerate(batch):
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

  for _ in records.write_shards(folder, "prompts", prompts, produce, share):
    pass


def _dtype(name: str) -> np.dtype:
  if name not in DTYPES:
    raise unknown_name("cache dtype", name, DTYPES)
  return DTYPES[name]


def _image_records(positions, uids, job, storage) -> Iterator[records.Record]:
  """Reads, decodes and encodes the images at `positions`: one record each, in order."""
  # The device works on one batch while the host decodes the next.
  encoding: tuple[list, Any] | None = None
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for batch in _decoded_batches(positions, uids, job, pool):
      good = [image.pixels for _, image in batch if not isinstance(image, str)]
      moments = None
      if good:
        padding = [good[-1]] * (job.batch_size - len(good))
        moments = job.encode(np.stack(good + padding))
      if encoding is not None:
        yield from _moments_records(*encoding, storage)
      encoding = batch, moments
  if encoding is not None:
    yield from _moments_records(*encoding, storage)


def _decoded_batches(positions, uids, job, pool):
  """Yields lists of (uid, PreparedImage or reason), at most batch_size each."""

  def prepare(data: bytes | str) -> decoding.PreparedImage | str:
    if isinstance(data, str):
      return data
    try:
      return decoding.prepare(data, job.resolution)
    except decoding.BadImage as error:
      return str(error)

  def read(position: int) -> bytes | str:
    try:
      return job.read(position)
    except (OSError, KeyError, ValueError) as error:
      return f"cannot be read: {type(error).__name__}: {error}"

  ahead: list[list] = []
  for start in range(positions.start, positions.stop, job.batch_size):
    batch = range(start, min(start + job.batch_size, positions.stop))
    ahead.append([(uids[p], pool.submit(prepare, read(p))) for p in batch])
    if len(ahead) > 1:
      yield [(uid, future.result()) for uid, future in ahead.pop(0)]
  for batch in ahead:
    yield [(uid, future.result()) for uid, future in batch]


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
    about = {
      "moments": list(stored.shape),
      "original_size": list(image.original_size),
      "crop": list(image.crop),
    }
    yield records.Record(uid, stored.tobytes(), about)
