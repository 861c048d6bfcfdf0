"""The export job: a run's weights as a diffusers folder, reloaded and compared."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lpo_jax import console, parallel, pretrained, trees
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import train as train_job

KINDS = ("pipeline", "unet")

# Largest difference to diffusers' own UNet, of the output's norm: fp32 on both sides.
TOLERANCE = 1e-4


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes `export.path`, reads it back, and only then says done.

  Args:
    config: the run's config.
    workdir: the run's; the latest checkpoint is exported, its EMA if there is one.

  Returns:
    The folder, the step, and what was compared.

  Raises:
    UserError: no checkpoint, an unknown kind, or an export that is not what was trained.
  """
  if config.export.kind not in KINDS:
    raise unknown_name("export.kind", config.export.kind, KINDS)
  workdir = pathlib.Path(workdir)
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
  params, step = train_job.trained_params(config, workdir, mesh)
  base = pretrained.load(config.model.path, "unet")
  part = dataclasses.replace(base, params=params)
  target = pathlib.Path(config.export.path or workdir / "export")
  if parallel.is_main_process() and _is_our_export(target):
    shutil.rmtree(target)
  parallel.barrier("export cleared")
  if config.export.kind == "pipeline":
    parts = {"unet": part, **widened_text_encoders(config.model.path)}
    pretrained.save_pipeline(config.model.path, target, parts)
  else:
    pretrained.save(target, part)
  checked = compare(target, part)
  console.say(f"exported step {step} to {target}: {checked}")
  return {"path": str(target), "step": step, "checked": checked}


def widened_text_encoders(path: str) -> dict[str, pretrained.Part]:
  """The text encoders that are not stored in fp32, in fp32 like the trained UNet.

  transformers keeps the precision of the file and diffusers does not: a half text encoder
  beside an fp32 UNet loads, and then fails at the first prompt.
  """
  parts = {}
  for name in ("text_encoder", "text_encoder_2"):
    if (pathlib.Path(path) / name).is_dir():
      part = pretrained.load(path, name, dtype=None)
      if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(part.params)):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), part.params)
        parts[name] = dataclasses.replace(part, params=wide)
  return parts


def _is_our_export(target: pathlib.Path) -> bool:
  """An earlier export may be replaced; anything else in the way is not touched."""
  return (target / "unet" / "config.json").is_file()


def compare(target: pathlib.Path, part: pretrained.Part) -> str:
  """Reads an exported UNet back and compares it with what was trained.

  Every tensor must be equal to the bit; where torch is installed, diffusers loads the
  folder as well and must predict the same.

  Returns:
    What was compared, in words.

  Raises:
    UserError: a tensor or a prediction differs.
  """
  back = pretrained.load(target, "unet")
  wanted = trees.named_leaves(parallel.fetch(part.params))
  for name, leaf in trees.named_leaves(parallel.fetch(back.params)).items():
    if not np.array_equal(leaf, wanted[name]):
      raise UserError(
        f"{target}: tensor {name} read back differs from what was trained; the disk or "
        "its file system is not to be trusted. Export to another place."
      )
  said = f"{len(wanted)} tensors read back, equal to the bit"
  if not parallel.is_main_process() or importlib.util.find_spec("torch") is None:
    return said + " (diffusers itself not asked: torch is not installed)"
  error = difference_to_diffusers(target, back)
  if not error <= TOLERANCE:
    raise UserError(
      f"{target}: diffusers' UNet predicts something else (relative error {error:.1e}, "
      f"expected at most {TOLERANCE:.0e}); please report this with unet/config.json."
    )
  return said + f"; diffusers predicts the same (relative error {error:.0e})"


def difference_to_diffusers(target: pathlib.Path, part: pretrained.Part) -> float:
  """Relative error, by norm, of our prediction against diffusers' on PyTorch."""
  import diffusers
  import torch

  config = part.config
  rng = np.random.default_rng(0)
  size = min(config["sample_size"], 16)
  latents = rng.standard_normal((1, size, size, config["in_channels"]), np.float32)
  width = config["cross_attention_dim"]
  embeds = rng.standard_normal((1, 8, width), np.float32)
  timesteps = np.array([500], np.int32)
  extra, added = {}, {}
  if config.get("addition_embed_type") == "text_time":
    time_ids = np.array([[size * 8, size * 8, 0, 0, size * 8, size * 8]], np.float32)
    pooled_width = config["projection_class_embeddings_input_dim"] - 6 * config.get(
      "addition_time_embed_dim", 256
    )
    pooled = rng.standard_normal((1, pooled_width), np.float32)
    extra = {"pooled_prompt_embeds": pooled, "time_ids": time_ids}
    added = {
      "text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)
    }  # fmt: skip
  ours = jax.jit(part.apply)(part.params, latents, timesteps, embeds, **extra)
  theirs = diffusers.UNet2DConditionModel.from_pretrained(
    target, subfolder="unet", low_cpu_mem_usage=False
  )
  with torch.no_grad():
    output = theirs(
      torch.from_numpy(latents.transpose(0, 3, 1, 2)),
      torch.from_numpy(timesteps),
      torch.from_numpy(embeds),
      added_cond_kwargs=added,
    ).sample
  difference = jnp.asarray(ours) - output.numpy().transpose(0, 2, 3, 1)
  return float(jnp.linalg.norm(difference) / np.linalg.norm(output.numpy()))
