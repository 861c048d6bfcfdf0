"""The cache job: encode every image and prompt once, and index them by lists."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lpo_jax import console, parallel, pretrained
from lpo_jax.data import (
  cache,
  encoding,
  lists,
  live,
  pipeline,
  records,
  sources,
)
from lpo_jax.data import manifest as manifests
from lpo_jax.data.mixture import Mixture
from lpo_jax.errors import StoppedEarly, UserError, unknown_name
from lpo_jax.jobs import cache_places, encoders
from lpo_jax.jobs.cache_places import LIST_SETTINGS, expectation, list_settings, places
from lpo_jax.jobs.stops import StopRequests

LOOK_EVERY_S = 0.5  # for requests to stop


def run(config: Any, workdir: str | os.PathLike) -> None:
  """Brings the caches up to date with the config; does nothing if they are.

  Args:
    config: the resolved config; `data` and `model.path` are read.
    workdir: where a cache goes unless `data.cache` says otherwise.

  Raises:
    UserError: a source cannot be used, or a folder has another cache.
    StoppedEarly: a signal or a STOP file; finished shards are kept.
  """
  stop = StopRequests(Path(workdir), max_minutes=0, began=time.monotonic())
  with stop:
    for place in places(config, workdir):
      if place.name:
        console.say(f"source {place.name}: {place.config.data.path}")
      if place.folder is None:
        console.say("data.cache=None: nothing is stored; --job train encodes by itself")
      else:
        _bring_up_to_date(place.config, place.folder, stop)


def _bring_up_to_date(config: Any, folder: Path, stop: StopRequests) -> None:
  expected, settings = expectation(config), list_settings(config)
  key = cache.lists_key(settings)
  manifest = manifests.read(folder)
  if manifest is not None:
    manifests.refuse_differences(folder, "cache", manifest, expected)
  up_to_date = key in cache.known_lists(folder) and not _missing_views(config, manifest)
  parallel.barrier("cache looked at")  # before anyone writes what others look for
  if up_to_date:
    console.say(f"cache is up to date: {folder}")
    _summarise(folder, key)
    return
  source = _read_source(config)
  built, report = _build_lists(source, settings)  # before hours of encoding
  with records.only_writer(folder, jax.process_index()):
    manifest = manifests.read(folder)  # another job may have finished it just now
    parallel.barrier("cache looked at again")
    if manifest is None:
      _encode(config, folder, source, expected, stop)
    else:
      manifests.refuse_differences(folder, "cache", manifest, expected)
    for view in _missing_views(config, manifests.read(folder)):
      _encode_view(config, folder, source, view, stop)
    if parallel.is_main_process():
      cache.write_lists(folder, built, settings, report.as_dict())
    parallel.barrier("cache lists")
  _summarise(folder, key)


def open_for(config: Any, workdir: str | os.PathLike) -> cache.Cache | Mixture:
  """Opens the caches that `run` made for this config, and checks that they fit.

  Without a cache (`data.cache=None`) the source is read, and encoded when needed.

  Raises:
    UserError: no cache, no such lists, or another model, size or source.
  """
  opened, shares = {}, {}
  for place in places(config, workdir):
    shares[place.name] = place.share
    if place.folder is None:
      opened[place.name] = _open_source(place.config, Path(workdir))
    else:
      opened[place.name] = cache.open_cache(
        place.folder,
        cache.lists_key(list_settings(place.config)),
        expect=expectation(place.config),
        mirrored=bool(_views(place.config)),
      )
  return opened[""] if "" in opened else Mixture(opened, shares)


def _read_source(config: Any):
  data = config.data
  opened = sources.open(
    data.path, data.source, split=data.get("split"), images=data.get("images")
  )
  sources.refuse_training(opened)
  source = opened.read()
  _refuse_other_task(config, getattr(source, "source_image", None) is not None)
  if source.images is None:
    raise UserError(
      f"{data.path} holds judgements but no images. Set data.images to where they are "
      "(parquet files, archives or a folder), or data.path to a source with both."
    )
  return source


def _refuse_other_task(config: Any, edits: bool) -> None:
  """Checks that a UNet which edits meets edits, and another one images.

  Raises:
    UserError: it does not.
  """
  if not (pretrained.local_folder(config.model.path) / "unet").is_dir():
    return  # encoding needs none; training asks for it
  takes = pretrained.read_config(config.model.path, "unet").get("in_channels", 4)
  latent = pretrained.read_config(config.model.path, "vae").get("latent_channels", 4)
  if takes == (1 + edits) * latent:
    return
  what = "edits of images" if edits else "images without a source to edit"
  raise UserError(
    f"{config.data.path} holds {what}, and the UNet in {config.model.path} takes {takes} "
    f"channels; expected {(1 + edits) * latent}. "
    + (
      "Make an editing UNet of it first: --job widen writes one with zeros for the new "
      "channels."
      if edits
      else "Use a UNet that draws, or a source of edits."
    )
  )


def _build_lists(source: Any, settings: Mapping[str, Any]):
  """Builds lists of the images that are there.

  Raises:
    UserError: no list came out, or none with images.
  """
  built, report = lists.build(
    source, **{LIST_SETTINGS[name]: value for name, value in settings.items()}
  )
  lists.refuse_empty(report)
  absent = int(np.sum(~source.images.present))
  if absent:
    kept, lost = cache.drop_missing(built, np.where(source.images.present, 0, -1))
    console.say(
      f"{absent} of {source.images.count} images are not in data.images; of "
      f"{len(built)} lists {len(kept)} are left ({lost})"
    )
    if not len(kept):
      raise UserError(
        f"{absent} of {source.images.count} images are not in data.images, and no list "
        "has two of the others. Check that it has the images of these labels, by name."
      )
    built = kept
  return built, report


def _views(config: Any) -> list[str]:
  """The views of the images that are needed besides the plain one.

  Raises:
    UserError: an unknown policy.
  """
  flip = config.data.flip
  if flip not in pipeline.FLIPS:
    raise unknown_name("data.flip", flip, pipeline.FLIPS)
  return ["mirrored"] if pipeline.FLIPS[flip] else []


def _missing_views(config: Any, manifest: Mapping[str, Any] | None) -> list[str]:
  shards = manifest["shards"] if manifest else {}
  return [view for view in _views(config) if view not in shards]


def _contents(source: Any) -> tuple[np.ndarray, list[str]]:
  """What is encoded of a source.

  Returns:
    Indices of the images, in file order; the prompts, the empty one first.
  """
  uses = (
    [source.image] if hasattr(source, "image") else [source.image_a, source.image_b]
  )
  if getattr(source, "source_image", None) is not None:
    uses.append(source.source_image[source.source_image >= 0])
  used = source.images.file_order(np.unique(np.concatenate(uses)))
  texts = [source.prompts[i] for i in np.unique(source.prompt)]
  return used, list(dict.fromkeys(["", *texts]))


def _encode(
  config: Any,
  folder: Path,
  source: Any,
  expected: Mapping[str, Any],
  stop: StopRequests,
) -> None:
  """Writes the record store, this process its share of the shards."""
  data = config.data
  encoding.storage_dtype(data.cache_dtype)  # refused before anything is loaded
  used, prompts = _contents(source)
  uids = [source.image_uids[i] for i in used]
  job = encoders.image_job(config, source, used)
  names = cache_places.named(config, both=True)
  identity = {**expected, "source": {**expected["source"], **names}}
  if parallel.is_main_process():
    manifests.begin(folder, identity, expect=expected)
  parallel.barrier("cache begun")

  share = _share("encoding images", "images", len(uids), folder, stop)
  encoding.write_images(
    folder,
    uids,
    job,
    max_bad=data.max_bad_images,
    dtype=data.cache_dtype,
    share=share,
  )
  _say_speed(job.speed)
  encoding.write_prompts(
    folder,
    prompts,
    encoders.prompt_encoder(config),
    batch_size=encoders.PROMPTS_PER_CALL,
    dtype=data.cache_dtype,
    share=_share("encoding prompts", "prompts", len(prompts), folder, stop),
  )
  parallel.barrier("cache records")
  if parallel.is_main_process():
    count = {"moments": len(uids), "prompts": len(prompts)}
    shards = {k: records.shard_count(n, share.shard_size) for k, n in count.items()}
    notes = {
      "source": data.source,
      "dropped_rows": dict(source.dropped),
      "moments": job.speed.as_dict(),
    }
    manifests.finish(
      folder, identity, shards=shards, max_bad=data.max_bad_images, notes=notes
    )
  parallel.barrier("cache manifest")


def _encode_view(
  config: Any, folder: Path, source: Any, view: str, stop: StopRequests
) -> None:
  """Adds another view of the images that the finished cache has."""
  data = config.data
  shards = manifests.read(folder)["shards"]["moments"]
  uids = records.Records(folder, "moments", shards).keys
  index = {uid: i for i, uid in enumerate(source.image_uids)}
  job = encoders.image_job(config, source, [index[uid] for uid in uids])
  share = _share(f"encoding {view} images", "images", len(uids), folder, stop)
  encoding.write_images(
    folder,
    uids,
    job,
    max_bad=data.max_bad_images,
    dtype=data.cache_dtype,
    view=view,
    share=share,
  )
  _say_speed(job.speed)
  parallel.barrier(f"cache {view}")
  if parallel.is_main_process():
    count = records.shard_count(len(uids), share.shard_size)
    manifests.add_view(folder, view, shards=count, notes=job.speed.as_dict())
  parallel.barrier(f"cache {view} noted")


def _open_source(config: Any, workdir: Path) -> cache.Cache:
  """Reads a source that is encoded when it is needed, and says what that means."""
  data = config.data
  source = _read_source(config)
  settings = list_settings(config)
  built, _ = _build_lists(source, settings)
  used, prompts = _contents(source)
  console.say(
    f"data.cache=None: {len(used)} images are kept in memory and encoded here"
  )
  return live.open_images(
    built,
    [source.image_uids[i] for i in used],
    prompts,
    encoders.image_job(config, source, used),
    encoders.prompt_encoder(config),
    folder=workdir,
    max_bad=data.max_bad_images,
    dtype=data.cache_dtype,
  )


def _share(
  label: str, unit: str, total: int, folder: Path, stop: StopRequests
) -> records.Share:
  """This process's part of the shards, with a progress line that listens for a stop."""
  share = records.Share(
    process_index=jax.process_index(), process_count=jax.process_count()
  )
  mine = sum(len(positions) for positions in share.ranges(total).values())
  meter = _Meter(label, mine, unit)
  looked = time.monotonic()

  def progress(count: int, fresh: bool) -> None:
    nonlocal looked
    meter(count, fresh)
    if time.monotonic() - looked < LOOK_EVERY_S:
      return
    looked = time.monotonic()
    reason = stop.reason_here()
    if reason:
      if jax.process_count() == 1:
        stop.forget()
      raise StoppedEarly(
        f"{reason} while {label}: finished shards are kept in {folder}. The same "
        "command goes on from there."
      )

  return dataclasses.replace(share, progress=progress)


def _say_speed(speed: encoding.Speed) -> None:
  """Says what was done in a second, and who waited for whom."""
  if not speed.images:
    return
  values = speed.as_dict()
  console.say(
    f"images: {values['images_per_second']:.1f}/s; decoding could do "
    f"{values['decode_images_per_second']:.0f}/s with {speed.threads} thread(s), encoding "
    f"{values['encode_images_per_second']:.1f}/s with {len(jax.local_devices())} "
    f"device(s); encoding waited for decoding {values['waiting_share']:.1%} of the time"
  )


class _Meter:
  """A progress line whose speed and remaining time count only what this run does."""

  def __init__(self, label: str, total: int, unit: str):
    self._label, self._total, self._unit = label, total, unit
    self._done = 0
    self._restart()

  def __call__(self, count: int, fresh: bool) -> None:
    self._done += count
    if not fresh:
      self._restart()
      return
    elapsed = max(time.monotonic() - self._began, 1e-6)
    speed = (self._done - self._found) / elapsed
    self._line.update(self._done, **{f"{self._unit}/s": round(speed, 1)})

  def _restart(self) -> None:
    self._began, self._found = time.monotonic(), self._done
    self._line = console.Progress(
      self._label, self._total, self._unit, start=self._found
    )


def _summarise(folder: Path, key: str) -> None:
  """Says what the cache holds and what its lists cost."""
  manifest = manifests.read(folder)
  described = cache.lists_manifest(folder, key)
  counts, report = manifest["counts"], described["report"]
  size = sum(p.stat().st_size for p in folder.glob("*.array_record")) / 1e6
  shape = "x".join(map(str, manifest["moments"]["shape"]))
  bad = f", {counts['bad_images']} bad (bad_images.jsonl)" * bool(counts["bad_images"])
  views = "".join(f" and {v}" for v in encoding.VIEWS if f"not_{v}" in counts)
  console.say(
    f"records: {counts['images']} images{bad}, {counts['prompts']} prompts; moments{views} "
    f"{shape} {manifest['dtype']}, {size:.1f} MB in {folder}"
  )
  lost = described["lost"]
  gone = lost["lists_too_short"] + lost["lists_all_tied"]
  mean = described["items"] / described["lists"]
  console.say(
    f"lists: {described['lists']} of {mean:.2f} images on average "
    f"(strategy {described['settings']['strategy']}, key {key}); "
    f"{report['judgements_used']} of {report['judgements_total']} judgements used"
    + (f"; {gone} lists lost to bad images" if gone else "")
  )
  if report["dropped"]:
    reasons = ", ".join(f"{n} {why}" for why, n in report["dropped"].items())
    console.say(f"judgements not used: {reasons}")
