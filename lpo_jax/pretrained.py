"""Folders of diffusers and transformers <-> parameter trees: the one name table."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import models, parallel, trees
from lpo_jax.errors import UserError, nearest
from lpo_jax.types import Params

Path = str | os.PathLike
Sharding = jax.sharding.Sharding
Placement = Callable[[str, tuple[int, ...]], Sharding] | Mapping[Any, Any] | None

# The last word of a name, here -> in the file. All other words are the same.
SUFFIXES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
}

# Which axis of the file each of our axes is, by rank: torch holds OIHW and [out, in].
KERNEL_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}

# Names that older files have -> the names of today, by class.
OLD_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
  "AutoencoderKL": (
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
  ),
  "CLIPTextModel": ((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
  "CLIPTextModelWithProjection": (),
}
# Constants that older versions of transformers stored.
IGNORED = re.compile(r"(^|\.)position_ids$")

# Stem of the weights' file, by whether the config is one of diffusers.
STEMS = {True: "diffusion_pytorch_model", False: "model"}

DTYPES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
}


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
    """Runs a UNet or a text encoder; see `models.unet.UNet`, `models.clip.TextEncoder`."""
    return self.model.apply(params, *args, **kwargs)

  def encode(self, params: Params, images: jax.Array) -> jax.Array:
    """Images to moments; see `models.vae.VAE.encode`."""
    return self.model.encode(params, images)

  def decode(self, params: Params, latents: jax.Array) -> jax.Array:
    """Latents to images; see `models.vae.VAE.decode`."""
    return self.model.decode(params, latents)


def file_name(name: str) -> str:
  """Returns the tensor's name in a file, for a parameter's dotted name.

  >>> file_name("down_blocks.0.resnets.1.conv1.kernel")
  'down_blocks.0.resnets.1.conv1.weight'
  """
  parent, _, kind = name.rpartition(".")
  return f"{parent}.{SUFFIXES[kind]}"


def _axes(name: str, rank: int) -> tuple[int, ...]:
  """Which axis of the file each axis of the parameter is."""
  if name.endswith(".kernel"):
    return KERNEL_AXES[rank]
  return tuple(range(rank))


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  axes = _axes(name, len(shape))
  return tuple(shape[axes.index(axis)] for axis in range(len(shape)))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(f"expected a file {path}, and there is none.") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}). Fetch it again.") from None


def _component(folder: Path, name: str) -> pathlib.Path:
  """Finds the folder of one network; `folder` may itself be it."""
  root = pathlib.Path(folder)
  if (root / name / "config.json").is_file():
    return root / name
  if (root / "config.json").is_file():
    return root
  if not root.is_dir():
    raise UserError(
      f"model folder {str(root)!r} does not exist. Give the local path of a pipeline "
      f"folder in diffusers' layout, with {name}/config.json in it."
    )
  inside = sorted(path.name for path in root.iterdir())
  close = nearest(name, inside)
  hint = f" Did you mean {close!r}?" if close and close != name else ""
  raise UserError(
    f"no {name}/config.json in {str(root)!r}, which holds: "
    f"{', '.join(inside[:12]) or 'nothing'}.{hint}"
  )


def _weight_files(
  folder: pathlib.Path, config: Mapping[str, Any], variant: str | None
) -> list[pathlib.Path]:
  """Finds the file of the weights, or the shards that an index names."""
  stem = STEMS["_class_name" in config]
  dotted = f".{variant}" if variant else ""
  single = folder / f"{stem}{dotted}.safetensors"
  index = folder / f"{stem}.safetensors.index{dotted}.json"
  if single.is_file():
    return [single]
  if index.is_file():
    shards = sorted(set(_read_json(index)["weight_map"].values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
      raise UserError(
        f"{index} names {len(shards)} files and {len(missing)} of them are not there, "
        f"first {missing[0]!r}. Fetch the folder again."
      )
    return [folder / shard for shard in shards]

  looked = f"looked for {single.name} and {index.name} in {str(folder)!r}"
  pattern = re.compile(rf"{stem}\.(?:safetensors\.index\.)?(\w+)\.(?:safetensors|json)")
  matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
  variants = sorted({match[1] for match in matches if match} - {"index", variant})
  if variants:
    raise UserError(f"{looked}; there are the variants {variants}: pass variant=...")
  if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
    raise UserError(
      f"{looked}; there is only a pickle (.bin), which is refused because reading one "
      "runs whatever code is in it. Save the model with safe_serialization=True, or "
      "fetch the .safetensors of the same repository."
    )
  raise UserError(f"{looked}; neither is there.")


class _Weights:
  """The tensors of one network by today's names, read only when asked for."""

  def __init__(self, files: list[pathlib.Path], kind: str, stack: contextlib.ExitStack):
    from safetensors import SafetensorError, safe_open

    self.sources: dict[str, tuple[Any, str]] = {}
    for path in files:
      try:
        handle = stack.enter_context(safe_open(path, framework="numpy"))
      except SafetensorError as error:
        raise UserError(
          f"{path} is not a readable safetensors file ({error}). It may be cut short, "
          "or a git-lfs pointer: fetch it again."
        ) from None
      for old in handle.keys():  # noqa: SIM118 (not a dict)
        if not IGNORED.search(old):
          self.sources[_todays_name(old, kind)] = (handle, old)

  def names(self) -> list[str]:
    return sorted(self.sources)

  def slices(self, name: str) -> Any:
    handle, old = self.sources[name]
    return handle.get_slice(old)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self.slices(name).get_shape())

  def array(self, name: str) -> np.ndarray:
    handle, old = self.sources[name]
    return handle.get_tensor(old)


def _todays_name(old: str, kind: str) -> str:
  for pattern, replacement in OLD_NAMES.get(kind, ()):
    old = re.sub(pattern, replacement, old)
  return old


@contextlib.contextmanager
def _open(
  folder: Path, name: str, variant: str | None
) -> Iterator[tuple[dict[str, Any], _Weights]]:
  component = _component(folder, name)
  config = _read_json(component / "config.json")
  kind = models.class_name(config)
  with contextlib.ExitStack() as stack:
    files = _weight_files(component, config, variant)
    yield config, _Weights(files, kind, stack)


def _check(weights: _Weights, model: models.Model, where: str) -> None:
  """Refuses weights that are not exactly those of the model."""
  shapes = {
    file_name(name): _file_shape(name, leaf.shape)
    for name, leaf in model.named_shapes().items()
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
  weights: _Weights, name: str, shape: tuple[int, ...], dtype: Any, place: Any
) -> jax.Array:
  """Reads one parameter: whole, or only the slices that this process's devices hold."""
  source = file_name(name)
  axes = _axes(name, len(shape))

  def ours(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array.transpose(axes))
    return array if dtype is None else array.astype(dtype)

  if place is None:
    return jnp.asarray(ours(weights.array(source)))

  pieces: dict[tuple, np.ndarray] = {}  # devices often hold the same piece

  def piece(index: tuple[slice, ...]) -> np.ndarray:
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
    if bounds not in pieces:
      wanted = [slice(*bounds[axes.index(axis)]) for axis in range(len(shape))]
      pieces[bounds] = ours(weights.slices(source)[tuple(wanted)])
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
    folder: a pipeline folder in diffusers' layout, or the network's own folder.
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
    _check(weights, model, f"{name} in {str(folder)!r}")
    place = _placement(sharding)
    params = trees.map_named(
      lambda name, leaf: _read(
        weights, name, leaf.shape, dtype, place(name, leaf.shape)
      ),
      model.abstract_params,
    )
  return Part(name, config, params, model)


def _placement(sharding: Placement) -> Callable[[str, tuple[int, ...]], Any]:
  if sharding is None:
    return lambda name, shape: None
  if callable(sharding):
    return sharding
  named = trees.named_leaves(sharding)
  return lambda name, shape: named[name]


def save(folder: Path, part: Part, *, dtype: Any = None) -> None:
  """Writes a network as diffusers or transformers would: config.json and safetensors.

  The files appear under their names only when they are complete. In a run of several
  processes all must call it, and the first one writes.

  Args:
    folder: the pipeline folder; the network goes into its folder `part.name`.
    part: what to write.
    dtype: of the tensors in the file; None keeps that of the parameters.
  """
  target = pathlib.Path(folder) / part.name
  leaves = trees.named_leaves(part.params)
  names = {file_name(name): name for name in leaves}
  kinds = {name: jnp.dtype(dtype or leaf.dtype).name for name, leaf in leaves.items()}
  _write_safetensors(
    target / f"{STEMS['_class_name' in part.config]}.safetensors",
    {
      there: (kinds[here], _file_shape(here, leaves[here].shape))
      for there, here in names.items()
    },
    lambda there: _to_file(names[there], leaves[names[there]], kinds[names[there]]),
  )
  config = dict(part.config)
  for field in ("dtype", "torch_dtype"):
    # transformers reads weights in the dtype that the config says.
    if field in config and len(set(kinds.values())) == 1:
      config[field] = next(iter(kinds.values()))
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  if parallel.is_main_process():
    with _replacing(target / "config.json") as path:
      path.write_text(text)
  parallel.barrier(f"saved {part.name}")


def _to_file(name: str, leaf: Any, dtype: str) -> np.ndarray:
  """Brings one parameter to this host, in the file's layout."""
  array = parallel.fetch(leaf)
  axes = _axes(name, array.ndim)
  array = array.transpose([axes.index(axis) for axis in range(array.ndim)])
  return np.ascontiguousarray(array.astype(jnp.dtype(dtype)))


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a file to write that takes `path`'s place when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _write_safetensors(
  path: pathlib.Path,
  entries: Mapping[str, tuple[str, tuple[int, ...]]],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes tensors one at a time, so that no second copy of the model is in memory.

  The order is that of the safetensors library: wide types first, then by name.

  Args:
    path: the file.
    entries: (dtype, shape) by tensor name.
    read: gives a tensor when its turn has come.
  """

  def size(name: str) -> int:
    return jnp.dtype(entries[name][0]).itemsize

  order = sorted(entries, key=lambda name: (-size(name), name))
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name in order:
    dtype, shape = entries[name]
    end = offset + size(name) * math.prod(shape)
    header[name] = {
      "dtype": DTYPES[dtype],
      "shape": list(shape),
      "data_offsets": [offset, end],
    }
    offset = end
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)

  if not parallel.is_main_process():
    for name in order:
      read(name)  # takes part in the gathering
    return
  with _replacing(path) as partial, open(partial, "wb") as file:
    file.write(len(head).to_bytes(8, "little"))
    file.write(head)
    for name in order:
      file.write(read(name).tobytes())


def save_pipeline(
  source: Path, target: Path, parts: Mapping[str, Part], *, dtype: Any = None
) -> None:
  """Writes a pipeline folder in which some networks are new.

  Args:
    source: the pipeline folder that the others are copied from; files at its top other
      than `model_index.json`, such as one-file checkpoints, stay behind.
    target: the new folder; it appears only when it is complete.
    parts: the new networks by the name of their folder.
    dtype: of the new networks' tensors; None keeps that of their parameters.

  Raises:
    UserError: `source` is no pipeline, has no such network, or `target` is not empty.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  index = _read_json(source / "model_index.json")
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
    shutil.copy(source / "model_index.json", staging)
    for name in components.keys() - parts.keys():
      if (source / name).is_dir():
        shutil.copytree(source / name, staging / name)
  for name, part in parts.items():
    save(staging, dataclasses.replace(part, name=name), dtype=dtype)
  if parallel.is_main_process():
    if target.is_dir():
      target.rmdir()
    os.replace(staging, target)
  parallel.barrier("saved pipeline")


def fingerprint(folder: Path, name: str, *, variant: str | None = None) -> str:
  """Identifies a network by its config and its tensors.

  Not by its files: sharding them differently or saving them again changes nothing.

  Args:
    folder: a pipeline folder, or the network's own.
    name: "vae", "text_encoder" ...
    variant: which weights where there are several.

  Returns:
    16 hex digits of a SHA-256.
  """
  digest = hashlib.sha256()
  with _open(folder, name, variant) as (config, weights):
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    fields["class"] = models.class_name(config)
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for tensor in weights.names():
      array = weights.array(tensor)
      digest.update(f"{tensor} {array.dtype.name} {array.shape}".encode())
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
  return _read_json(_component(folder, name) / "config.json")


def scheduler_config(folder: Path) -> dict[str, Any]:
  """Returns the fields of a pipeline's `scheduler/scheduler_config.json`.

  Raises:
    UserError: there is no such file.
  """
  return _read_json(pathlib.Path(folder) / "scheduler" / "scheduler_config.json")


class Tokenizer:
  """Turns prompts into token ids, padded and cut as the model was trained.

  Attributes:
    max_length: tokens per prompt, start and end included.
    pad_token_id: what prompts are padded with; not the same for all models.
    truncated: how many prompts so far were longer and lost their end.
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self.max_length: int = tokenizer.model_max_length
    self.pad_token_id: int = tokenizer.pad_token_id
    self.truncated = 0

  def tokenize(self, prompts: list[str]) -> np.ndarray:
    """Returns the ids of prompts.

    Args:
      prompts: N texts.

    Returns:
      [N, max_length] int32.
    """
    if not prompts:
      return np.zeros((0, self.max_length), np.int32)
    encoded = self._tokenizer(
      prompts, padding="max_length", truncation=True, max_length=self.max_length
    )
    for prompt, mask in zip(prompts, encoded["attention_mask"]):
      if all(mask):  # full, so perhaps cut
        whole = self._tokenizer(prompt, verbose=False)["input_ids"]
        self.truncated += len(whole) > self.max_length
    return np.asarray(encoded["input_ids"], np.int32)


def load_tokenizer(folder: Path, subfolder: str = "tokenizer") -> Tokenizer:
  """Reads a pipeline's CLIP tokenizer from its own files, without torch.

  Args:
    folder: a pipeline folder.
    subfolder: "tokenizer" or "tokenizer_2".

  Raises:
    UserError: the folder or its files are not there, or they give no length.
  """
  path = pathlib.Path(folder) / subfolder
  raw = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
  if not raw and not (path / "tokenizer.json").is_file():
    raise UserError(
      f"no tokenizer in {str(path)!r}: expected vocab.json and merges.txt, or "
      "tokenizer.json."
    )
  from transformers import CLIPTokenizer

  tokenizer = CLIPTokenizer.from_pretrained(str(path))
  # What transformers gives when the files say nothing is about 1e30.
  if tokenizer.model_max_length > 1_000_000:
    raise UserError(
      f"{path / 'tokenizer_config.json'} gives no model_max_length: add the number of "
      "places of the text encoder (77 for CLIP)."
    )
  return Tokenizer(tokenizer)
