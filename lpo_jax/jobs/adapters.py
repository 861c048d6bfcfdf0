"""LoRA in the jobs: what a config trains, and files that a job reads and writes."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any

import jax
import ml_collections

from lpo_jax import console, models, parallel, pretrained
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import lora
from lpo_jax.pretrained import lora as lora_files
from lpo_jax.pretrained import tensors
from lpo_jax.training import tuning
from lpo_jax.types import Params


def make_tuning(
  config: ml_collections.ConfigDict, model: models.Model
) -> tuning.Tuning:
  """What is trained: the factors of `model.lora`, or without a rank what `train` says.

  Raises:
    UserError: a rank below 0, targets or rules that choose nothing, an unknown init.
  """
  wanted = config.model.lora
  if wanted.path:
    adapter = read(wanted.path, model)
    return tuning.beside(model, adapter.layout, lambda: adapter.delta)
  if wanted.rank < 0:
    raise UserError(
      f"model.lora.rank={wanted.rank}: expected 0 (all weights are trained) or more."
    )
  if not wanted.rank:
    return tuning.chosen(model, config.train.trainable)
  if wanted.init not in lora.INITS:
    raise unknown_name("model.lora.init", wanted.init, lora.INITS)
  shapes = model.abstract_params
  layout = lora.lay_out(
    lora.Spec(wanted.rank, config.model.lora.targets, wanted.alpha), shapes
  )
  return tuning.beside(
    model, layout, lambda: lora.init(config.seed, shapes, layout, wanted.init)
  )


def read(path: str | pathlib.Path, model: models.Model) -> lora.Adapter:
  """Reads a LoRA file, and says what of it is not used."""
  loaded = lora_files.load(path, model)
  if loaded.text_keys:
    console.say(
      f"{path}: {len(loaded.text_keys)} tensors are for text encoders (first "
      f"{loaded.text_keys[0]!r}) and are not used: only the UNet's are."
    )
  return loaded.adapter


def merged(
  location: str | pathlib.Path, base_folder: str, mesh: jax.sharding.Mesh
) -> tuple[Params, str]:
  """Loads base and LoRA file as one UNet.

  Args:
    location: the file, or a folder with one.
    base_folder: a pipeline, or the UNet's own folder.
    mesh: where to put the parameters.

  Returns:
    The parameters as global arrays, and words that identify them.
  """
  model = models.build(pretrained.read_config(base_folder, "unet"))
  adapter = read(location, model)
  shardings = parallel.param_shardings(model.abstract_params, mesh)
  base = pretrained.load(base_folder, "unet", sharding=shardings).params
  where = parallel.param_shardings(adapter.delta, mesh)
  delta = parallel.put(adapter.delta, where)
  params = jax.jit(lambda b, d: lora.merge(b, d, adapter.layout))(base, delta)
  identity = pretrained.fingerprint(base_folder, "unet")
  return params, f"{identity}+{lora_files.fingerprint(location)}"


def write(
  config: ml_collections.ConfigDict,
  target: pathlib.Path,
  adapter: lora.Adapter,
  step: int,
) -> pathlib.Path:
  """Writes a run's factors under `target`, in the format that `export` says."""
  export, unet = config.export, pretrained.read_config(config.model.path, "unet")
  style = export.format
  if style not in lora_files.STYLES:
    raise unknown_name("export.format", style, lora_files.STYLES)
  if export.dtype not in tensors.DTYPES:
    raise unknown_name("export.dtype", export.dtype, tensors.DTYPES)
  # diffusers takes the file of its own name first, where a folder has both.
  name = lora_files.FILE_NAME if style == "peft" else f"{config.objective.name}.{style}"
  file = target / f"{name.removesuffix('.safetensors')}.safetensors"
  return lora_files.save(
    file, adapter, unet, style=style, dtype=export.dtype, facts=facts(config, step)
  )


def facts(config: ml_collections.ConfigDict, step: int) -> dict[str, str]:
  """What a LoRA file's header says of the run, in the words that others look for."""
  train = config.train
  scheduler = pretrained.scheduler_config(config.model.path)
  kind = scheduler.get("prediction_type", "epsilon")
  size = config.data.resolution
  return {
    "modelspec.title": f"{config.objective.name} on {pathlib.Path(config.model.path).name}",
    "modelspec.date": datetime.date.today().isoformat(),
    "modelspec.resolution": f"{size}x{size}",
    "modelspec.prediction_type": {"v_prediction": "v"}.get(kind, kind),
    "ss_output_name": config.objective.name,
    "ss_sd_model_name": pathlib.Path(config.model.path).name,
    "ss_learning_rate": str(train.learning_rate),
    "ss_optimizer": train.optimizer,
    "ss_max_train_steps": str(train.total_steps),
    "ss_steps": str(step),
    "ss_total_batch_size": str(train.images_per_update),
    "ss_seed": str(config.seed),
    "lpo_jax.objective": json.dumps(config.objective.to_dict(), sort_keys=True),
  }


def extract(
  config: ml_collections.ConfigDict, base: Params, params: Params
) -> lora.Extraction:
  """The nearest factors of `export.rank` to what a full fine-tune changed."""
  rank = config.export.rank
  if rank < 1:
    raise UserError(f"export.rank={rank}: expected at least 1.")
  spec = lora.Spec(rank, lora.KERNELS)
  found = lora.extract(parallel.fetch(base), parallel.fetch(params), spec)
  least = min(found.kept, key=found.kept.get)
  console.say(
    f"factors of rank {rank} keep {100 * found.kept_overall:.1f} % of what training "
    f"changed (squared, biases and norms included); least in {least}: "
    f"{100 * found.kept[least]:.1f} %"
  )
  return found


def write_kept(target: pathlib.Path, found: lora.Extraction) -> None:
  """Writes kept.json: which share of the change each kernel's factors express."""
  if parallel.is_main_process():
    rows: dict[str, Any] = {"overall": found.kept_overall, "by_kernel": found.kept}
    (target / "kept.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
