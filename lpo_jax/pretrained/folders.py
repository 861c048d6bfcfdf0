"""Whole networks and pipelines, in and out of folders."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import models, parallel, trees
from lpo_jax.errors import UserError, nearest
from lpo_jax.pretrained import files, hub, names, tensors
from lpo_jax.types import Params

Path = str | os.PathLike
Sharding = jax.sharding.Sharding
Placement = Callable[[str, tuple[int, ...]], Sharding] | Mapping[Any, Any] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """One network of a pipeline.

  Attributes:
    name: its folder: "unet", "vae", "text_encoder" ...
    config: the fields of its `config.json`.
    params: nested dict of arrays in the shape of `model.abstract_params`.
    model: its structure.
  """

  name: str
  config: Mapping[str, Any]
  params: Params
  model: models.Model

  def apply(self, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Runs a UNet or one tower of CLIP; see `models.unet`, `clip`, `clip_vision`."""
    return self.model.apply(params, *args, **kwargs)

  def encode(self, params: Params, images: jax.Array, *, tile: int = 0) -> jax.Array:
    """Images to moments; see `models.vae.VAE.encode`."""
    return self.model.encode(params, images, tile=tile)

  def decode(self, params: Params, latents: jax.Array, *, tile: int = 0) -> jax.Array:
    """Latents to images; see `models.vae.VAE.decode`."""
    return self.model.decode(params, latents, tile=tile)


def _component(folder: Path, name: str, variant: str | None = None) -> pathlib.Path:
  """Finds the folder of one network; `folder` may itself be it, or be on the Hub."""
  root = hub.local_folder(folder, [name], variant=variant)
  if (root / name / "config.json").is_file():
    return root / name
  if (root / "config.json").is_file():
    return root
  inside = sorted(path.name for path in root.iterdir())
  close = nearest(name, inside)
  hint = f" Did you mean {close!r}?" if close and close != name else ""
  raise UserError(
    f"no {name}/config.json in {str(root)!r}, which holds: "
    f"{', '.join(inside[:12]) or 'nothing'}.{hint}"
  )


@contextlib.contextmanager
def _open(
  folder: Path, name: str, variant: str | None
) -> Iterator[tuple[dict[str, Any], tensors.Weights]]:
  component = _component(folder, name, variant)
  config = files.read_json(component / "config.json")
  kind = models.class_name(config)
  with contextlib.ExitStack() as stack:
    found = files.find(component, config, variant)
    yield config, tensors.Weights(found, kind, stack)


def _check(weights: tensors.Weights, model: models.Model, where: str) -> None:
  """Refuses weights that are not exactly those of the model."""
  shapes = {
    tensor: stored.shape
    for name, leaf in model.named_shapes().items()
    for stored in (names.stored(name, leaf.shape),)
    for tensor in stored.names
  }
  here = set(weights.names())
  missing = sorted(shapes.keys() - here)
  unexpected = sorted(here - shapes.keys())

  def with_match(name: str, known: Any) -> str:
    close = nearest(name, known)
    return f"{name!r} (closest: {close!r})" if close else f"{name!r}"

  if missing:
    raise UserError(
      f"{where}: {len(missing)} of {len(shapes)} tensors are missing, first "
      f"{with_match(missing[0], unexpected or here)}. Do config.json and the weights "
      "belong together?"
    )
  if unexpected:
    raise UserError(
      f"{where}: {len(unexpected)} tensors that the model does not have, first "
      f"{with_match(unexpected[0], shapes)}. Do config.json and the weights belong "
      "together?"
    )
  for name, shape in shapes.items():
    if weights.shape(name) != shape:
      raise UserError(
        f"{where}: tensor {name!r} has shape {weights.shape(name)}, and config.json asks "
        f"for {shape}. Do they belong together?"
      )


def _read(
  weights: tensors.Weights, name: str, shape: tuple[int, ...], dtype: Any, place: Any
) -> jax.Array:
  """Reads one parameter: whole, or only the slices that this process's devices hold."""
  stored = names.stored(name, shape)

  def ours(arrays: list[np.ndarray]) -> np.ndarray:
    arrays = [stored.from_file(array) for array in arrays]
    array = np.stack(arrays) if stored.is_stacked else arrays[0]
    return array if dtype is None else array.astype(dtype, copy=False)

  if place is None:
    return jnp.asarray(ours([weights.array(tensor) for tensor in stored.names]))

  pieces: dict[tuple, np.ndarray] = {}  # devices often hold the same piece

  def piece(index: tuple[slice, ...]) -> np.ndarray:
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
    if bounds not in pieces:
      blocks, inner = slice(None), bounds
      if stored.is_stacked:
        blocks, inner = slice(*bounds[0]), bounds[1:]
      wanted = tuple(slice(*inner[axis]) for axis in np.argsort(stored.axes))
      pieces[bounds] = ours(
        [weights.slices(tensor)[wanted] for tensor in stored.names[blocks]]
      )
    return pieces[bounds]

  return jax.make_array_from_callback(shape, place, piece)


def load(
  folder: Path,
  name: str,
  *,
  dtype: Any = jnp.float32,
  sharding: Placement = None,
  variant: str | None = None,
  compute_dtype: Any = jnp.float32,
  attention: str = "auto",
  remat: str = "none",
) -> Part:
  """Reads one network of a pipeline folder, without torch.

  Args:
    folder: a pipeline folder in diffusers' layout, the network's own folder, or the id
      of one of them on the Hub ("owner/name" or "owner/name@revision").
    name: "unet", "vae", "text_encoder", "text_encoder_2" ...
    dtype: of the parameters, whatever the file holds; None keeps the file's.
    sharding: where parameters go: None (the default device, whole), a function of a
      parameter's dotted name and shape, or a tree of shardings. With one, each process
      reads only what its devices hold.
    variant: which weights where there are several, e.g. "fp16".
    compute_dtype: of the activations.
    attention: see `models.build`.
    remat: see `models.build`.

  Returns:
    The network with its parameters.

  Raises:
    UserError: a folder or file that is not there, only pickled weights, a class or
      config field that is not implemented, or a tensor that is missing, unexpected or of
      another shape, by name.
  """
  with _open(folder, name, variant) as (config, weights):
    model = models.build(config, dtype=compute_dtype, attention=attention, remat=remat)
    where = f"{name} in {str(folder)!r}"
    params = read_params(weights, model, where, dtype=dtype, sharding=sharding)
  return Part(name, config, params, model)


def read_params(
  weights: tensors.Weights,
  model: models.Model,
  where: str,
  *,
  dtype: Any = jnp.float32,
  sharding: Placement = None,
) -> Params:
  """Reads a model's parameters out of weights by today's names.

  Args:
    weights: exactly those of the model.
    model: whose structure is filled.
    where: what the weights are, for the error.
    dtype: see `load`.
    sharding: see `load`.

  Raises:
    UserError: a tensor that is missing, unexpected or of another shape, by name.
  """
  _check(weights, model, where)
  place = _placement(sharding)
  return trees.map_named(
    lambda name, leaf: _read(weights, name, leaf.shape, dtype, place(name, leaf.shape)),
    model.abstract_params,
  )


def _placement(sharding: Placement) -> Callable[[str, tuple[int, ...]], Any]:
  if sharding is None:
    return lambda name, shape: None
  if callable(sharding):
    return sharding
  named = trees.named_leaves(sharding)
  return lambda name, shape: named[name]


def save(
  folder: Path,
  part: Part,
  *,
  dtype: Any = None,
  variant: str | None = None,
  max_shard_size: int = files.MAX_SHARD_SIZE,
) -> None:
  """Writes a network as diffusers or transformers would: config.json and safetensors.

  The files appear under their names only when they are complete. In a run of several
  processes all must call it, and the first one writes.

  Args:
    folder: the pipeline folder; the network goes into its folder `part.name`.
    part: what to write.
    dtype: of the tensors in the file; None keeps that of the parameters.
    variant: put into the file names, e.g. "fp16".
    max_shard_size: bytes that a file may have before there are several and an index.
  """
  target = pathlib.Path(folder) / part.name
  leaves = trees.named_leaves(part.params)
  kinds = {name: jnp.dtype(dtype or leaf.dtype).name for name, leaf in leaves.items()}
  homes = {
    tensor: (name, block, stored)
    for name, leaf in leaves.items()
    for stored in (names.stored(name, leaf.shape),)
    for block, tensor in enumerate(stored.names)
  }

  def read(tensor: str) -> np.ndarray:
    name, block, stored = homes[tensor]
    leaf = _take_block(leaves[name], block) if stored.is_stacked else leaves[name]
    return stored.to_file(parallel.fetch(leaf).astype(jnp.dtype(kinds[name])))

  entries = {
    tensor: (kinds[name], stored.shape) for tensor, (name, _, stored) in homes.items()
  }
  _write_weights(target, part, entries, read, variant, max_shard_size)
  config = dict(part.config)
  for field in ("dtype", "torch_dtype"):
    # transformers reads weights in the dtype that the config says.
    if field in config and len(set(kinds.values())) == 1:
      config[field] = next(iter(kinds.values()))
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  if parallel.is_main_process():
    with tensors.replacing(target / "config.json") as path:
      path.write_text(text)
  parallel.barrier(f"saved {part.name}")


def _write_weights(
  target: pathlib.Path,
  part: Part,
  entries: Mapping[str, tuple[str, tuple[int, ...]]],
  read: Callable[[str], np.ndarray],
  variant: str | None,
  max_shard_size: int,
) -> None:
  """Writes one file, or shards and their index, and removes those of an earlier save."""
  stem = files.STEMS["_class_name" in part.config]
  sizes = {name: tensors.size(*entries[name]) for name in tensors.order(entries)}
  shards = files.split(sizes, stem, variant, max_shard_size)
  for file, members in shards.items():
    tensors.write(target / file, {name: entries[name] for name in members}, read)
  if not parallel.is_main_process():
    return
  keep = set(shards)
  if len(shards) > 1:
    index = files.index_name(stem, variant)
    keep.add(index)
    with tensors.replacing(target / index) as path:
      path.write_text(files.index_text(shards, sum(sizes.values())), "utf-8")
  files.remove_others(target, stem, variant, keep)


def _take_block(leaf: Any, block: int) -> Any:
  """Takes one block of a stack, on the devices that hold it."""
  if isinstance(leaf, np.ndarray):
    return leaf[block]
  return _index(leaf, block)


_index = jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False))


def save_pipeline(
  source: Path,
  target: Path,
  parts: Mapping[str, Part],
  *,
  dtype: Any = None,
  max_shard_size: int = files.MAX_SHARD_SIZE,
) -> None:
  """Writes a pipeline folder in which some networks are new.

  With a UNet that takes twice the channels of the VAE's latents it is one of diffusers'
  InstructPix2Pix pipelines, whatever `source` was.

  Args:
    source: the pipeline folder, or its id on the Hub, that the others are copied from;
      files at its top other than `model_index.json`, such as one-file checkpoints, stay
      behind.
    target: the new folder; it appears only when it is complete.
    parts: the new networks by the name of their folder.
    dtype: of the new networks' tensors; None keeps that of their parameters.
    max_shard_size: see `save`.

  Raises:
    UserError: `source` is no pipeline, has no such network, or `target` is not empty.
  """
  source, target = hub.local_folder(source, None), pathlib.Path(target)
  index = files.read_json(source / "model_index.json")
  components = {
    name: value
    for name, value in index.items()
    if isinstance(value, list) and any(value)
  }
  for name in parts:
    if name not in components:
      raise UserError(
        f"{source / 'model_index.json'} has no component {name!r}; it has: "
        f"{', '.join(components)}."
      )
  if target.is_dir() and any(target.iterdir()):
    raise UserError(
      f"{str(target)!r} is not empty: remove it or export to another path."
    )

  target.parent.mkdir(parents=True, exist_ok=True)
  staging = target.with_name(f".{target.name}.partial")
  if parallel.is_main_process():
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    _write_index(index, parts, source, staging)
    for name in components.keys() - parts.keys():
      if (source / name).is_dir():
        shutil.copytree(source / name, staging / name)
  for name, part in parts.items():
    part = dataclasses.replace(part, name=name)
    save(staging, part, dtype=dtype, max_shard_size=max_shard_size)
  if parallel.is_main_process():
    if target.is_dir():
      target.rmdir()
    os.replace(staging, target)
  parallel.barrier("saved pipeline")


# diffusers' pipelines -> those of the same networks whose UNet sees an image to edit.
EDITING_CLASSES = {
  "StableDiffusionPipeline": "StableDiffusionInstructPix2PixPipeline",
  "StableDiffusionXLPipeline": "StableDiffusionXLInstructPix2PixPipeline",
}


def _write_index(
  index: Mapping[str, Any],
  parts: Mapping[str, Part],
  source: pathlib.Path,
  target: pathlib.Path,
) -> None:
  """Writes model_index.json, naming the class that runs the new UNet."""
  kind, unet = index.get("_class_name"), parts.get("unet")
  if unet is None or kind not in EDITING_CLASSES:
    shutil.copy(source / "model_index.json", target)
    return
  channels = read_config(source, "vae").get("latent_channels", 4)
  edits = unet.config.get("in_channels", 4) == 2 * channels
  written = {**index, "_class_name": EDITING_CLASSES[kind] if edits else kind}
  text = json.dumps(written, indent=2) + "\n"
  (target / "model_index.json").write_text(text, encoding="utf-8")


def fingerprint(
  folder: Path, name: str, *, variant: str | None = None, sampled: bool = False
) -> str:
  """Identifies a network by its config and its tensors.

  Not by its files: sharding them differently or saving them again changes nothing.

  Args:
    folder: a pipeline folder, or the network's own.
    name: "vae", "text_encoder" ...
    variant: which weights where there are several.
    sampled: read only the first row of every tensor: enough to tell one training from
      another, and no wait where the network has gigabytes.

  Returns:
    16 hex digits of a SHA-256.
  """
  digest = hashlib.sha256()
  with _open(folder, name, variant) as (config, weights):
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    fields["class"] = models.class_name(config)
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for tensor in weights.names():
      shape = weights.shape(tensor)
      whole = not (sampled and shape)
      array = weights.array(tensor) if whole else weights.slices(tensor)[:1]
      digest.update(f"{tensor} {array.dtype.name} {shape}".encode())
      digest.update(np.ascontiguousarray(array).view(np.uint8).data)
  return digest.hexdigest()[:16]


def read_config(folder: Path, name: str) -> dict[str, Any]:
  """Returns the fields of one network's `config.json`.

  Args:
    folder: of the pipeline, or of the network itself.
    name: "unet", "vae", "text_encoder" ...

  Raises:
    UserError: there is no such file.
  """
  return files.read_json(_component(folder, name) / "config.json")


def scheduler_config(folder: Path) -> dict[str, Any]:
  """Returns the fields of a pipeline's `scheduler/scheduler_config.json`.

  Raises:
    UserError: there is no such file.
  """
  root = hub.local_folder(folder, ["scheduler"])
  return files.read_json(root / "scheduler" / "scheduler_config.json")
