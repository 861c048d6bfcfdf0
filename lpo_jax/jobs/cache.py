"""The cache job: encode every image and prompt once, and index them by lists."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import console, generation, parallel, pretrained
from lpo_jax.data import (
  cache,
  decoding,
  encoding,
  fingerprints,
  lists,
  records,
  sources,
)
from lpo_jax.errors import UserError

PIXELS_PER_CALL = 8 * 512 * 512  # per device: what fits beside the VAE in 16 GB
PROMPTS_PER_CALL = 32
DTYPE = "float16"  # of the records; 8 times finer than bfloat16, and wide enough
# The settings in `data` that lists depend on -> the parameters of `lists.build`.
LIST_SETTINGS = {
  "strategy": "strategy",
  "max_list_size": "max_size",
  "group_by": "group_by",
  "ties": "ties",
  "weight": "weight",
}
NETWORKS = ("vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


def run(config: Any, workdir: str) -> None:
  """Brings the cache up to date with the config; does nothing if it is.

  Args:
    config: the resolved config; `data` and `model.path` are read.
    workdir: where the cache goes unless `data.cache` says otherwise.

  Raises:
    UserError: the source cannot be used, or the folder has another cache.
  """
  folder = cache_dir(config, workdir)
  expected = expectation(config)
  settings = list_settings(config)
  key = cache.lists_key(settings)
  manifest = cache.read_manifest(folder)
  if manifest is not None:
    cache.refuse_differences(folder, "cache", manifest, expected)
  up_to_date = key in cache.known_lists(folder)
  parallel.barrier("cache looked at")  # before anyone writes what others look for
  if up_to_date:
    console.say(f"cache is up to date: {folder}")
    _summarise(folder, key)
    return
  source = _read_source(config)
  built, report = lists.build(
    source, **{LIST_SETTINGS[name]: value for name, value in settings.items()}
  )
  lists.refuse_empty(report)  # before hours of encoding
  with records.only_writer(folder, jax.process_index()):
    if manifest is None:
      _encode(config, folder, source, expected)
    if parallel.is_main_process():
      cache.write_lists(folder, built, settings, report.as_dict())
    parallel.barrier("cache lists")
  _summarise(folder, key)


def open_for(config: Any, workdir: str) -> cache.Cache:
  """Opens the cache that `run` made for this config, and checks that it fits.

  Raises:
    UserError: no cache, no such lists, or another model, size or source.
  """
  key = cache.lists_key(list_settings(config))
  folder = cache_dir(config, workdir)
  return cache.open_cache(folder, key, expect=expectation(config))


def cache_dir(config: Any, workdir: str) -> Path:
  """Where the cache is: `data.cache`, or `cache` in the workdir if that is empty."""
  return Path(config.data.cache or Path(workdir) / "cache")


def list_settings(config: Any) -> dict[str, Any]:
  """The settings that lists depend on, and records do not."""
  return {name: config.data[name] for name in LIST_SETTINGS if name in config.data}


def expectation(config: Any) -> dict[str, Any]:
  """What a cache must have been made from to serve this config, as its manifest says.

  The source is compared by its files where they are at hand, else by its name: a
  training machine need not hold the images.
  """
  path = Path(config.model.path)
  networks = [name for name in NETWORKS if name == "vae" or (path / name).is_dir()]
  prints = {name: pretrained.fingerprint(path, name) for name in networks}
  for name in TOKENIZERS:
    if (path / name).is_dir():
      prints[name] = fingerprints.of_contents(path / name)
  files = fingerprints.of_source(config.data.path)
  named = {"files": files} if files else {"path": str(config.data.path)}
  return {
    "format": cache.FORMAT,
    "fingerprints": prints,
    "preprocessing": {
      "resolution": config.data.resolution,
      **decoding.PREPROCESSING,
    },
    "source": {**named, "split": config.data.get("split")},
  }


def _read_source(config: Any):
  data = config.data
  source = sources.read(data.path, source=data.source, split=data.get("split"))
  if source.images is None:
    raise UserError(
      f"{data.path} holds judgements but no images; data.path must name a source with "
      "both, or with the files its image paths point to."
    )
  return source


def _encode(
  config: Any, folder: Path, source: Any, expected: Mapping[str, Any]
) -> None:
  """Writes the record store, this process its share of the shards."""
  encode, batch_size = _image_encoder(config)
  uses = (
    [source.image] if hasattr(source, "image") else [source.image_a, source.image_b]
  )
  used = source.images.file_order(np.unique(np.concatenate(uses)))
  uids = [source.image_uids[i] for i in used]
  texts = [source.prompts[i] for i in np.unique(source.prompt)]
  prompts = list(dict.fromkeys(["", *texts]))
  path = str(config.data.path)
  expected = {**expected, "dtype": DTYPE}
  names = {"path": path, "files": fingerprints.of_source(path)}
  identity = {**expected, "source": {**expected["source"], **names}}
  if parallel.is_main_process():
    cache.begin(folder, identity, expect=expected)
  parallel.barrier("cache begun")

  job = encoding.ImageJob(
    read=lambda position: source.images.read(int(used[position])),
    encode=encode,
    resolution=config.data.resolution,
    batch_size=batch_size,
  )
  max_bad = config.data.max_bad_images
  share = _share("encoding images", "images", len(uids))
  encoding.write_images(folder, uids, job, max_bad=max_bad, dtype=DTYPE, share=share)
  encoding.write_prompts(
    folder,
    prompts,
    _prompt_encoder(config),
    batch_size=PROMPTS_PER_CALL,
    dtype=DTYPE,
    share=_share("encoding prompts", "prompts", len(prompts)),
  )
  parallel.barrier("cache records")
  if parallel.is_main_process():
    count = {"moments": len(uids), "prompts": len(prompts)}
    shards = {k: records.shard_count(n, share.shard_size) for k, n in count.items()}
    notes = {"source": config.data.source, "dropped_rows": dict(source.dropped)}
    cache.finish(folder, identity, shards=shards, max_bad=max_bad, notes=notes)


def _image_encoder(config: Any) -> tuple[Callable[[np.ndarray], jax.Array], int]:
  """Returns uint8 images -> moments on all local devices, and its batch size.

  fp32 throughout: the records outlive the run, and SDXL's VAE overflows in fp16.
  """
  vae = pretrained.load(config.model.path, "vae", dtype=jnp.float32)
  resolution = config.data.resolution
  factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
  if resolution % factor:
    raise UserError(
      f"data.resolution={resolution} must be a multiple of {factor}, the number of "
      "pixels per latent of this VAE."
    )
  mesh = parallel.make_mesh(devices=jax.local_devices())
  params = jax.device_put(vae.params, parallel.replicated(mesh))
  by_image = parallel.by_slot(mesh)

  @jax.jit
  def moments(params, images):
    return vae.encode(params, images.astype(jnp.float32) / 127.5 - 1.0)

  def encode(images: np.ndarray) -> jax.Array:
    return moments(params, jax.device_put(images, by_image))

  per_device = max(PIXELS_PER_CALL // resolution**2, 1)
  per_device = min(per_device, 4) if jax.default_backend() == "cpu" else per_device
  return encode, per_device * len(jax.local_devices())


def _prompt_encoder(config: Any) -> Callable[[list[str]], tuple[np.ndarray, Any]]:
  """Returns prompts -> (prompt_embeds, pooled or None), in fp32 for the same reason."""
  conditioner = generation.TextConditioner(
    config.model.path, dtype=jnp.float32, batch_size=PROMPTS_PER_CALL
  )
  return conditioner.encode


def _share(label: str, unit: str, total: int) -> records.Share:
  """This process's part of the shards, with a progress line."""
  share = records.Share(
    process_index=jax.process_index(), process_count=jax.process_count()
  )
  mine = sum(len(positions) for positions in share.ranges(total).values())
  return dataclasses.replace(share, progress=_Meter(label, mine, unit))


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
  manifest = cache.read_manifest(folder)
  described = records.read_json(folder / f"lists-{key}.json")
  counts, report = manifest["counts"], described["report"]
  size = sum(p.stat().st_size for p in folder.glob("*.array_record")) / 1e6
  shape = "x".join(map(str, manifest["moments"]["shape"]))
  bad = f", {counts['bad_images']} bad (bad_images.jsonl)" * bool(counts["bad_images"])
  console.say(
    f"records: {counts['images']} images{bad}, {counts['prompts']} prompts; moments "
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
