"""The export job: a run's weights in diffusers' files, reloaded and compared."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lpo_jax import console, parallel, pretrained, trees
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import adapters, blueprint, model_card
from lpo_jax.models import lora, users
from lpo_jax.pretrained import ip_adapter, publishing
from lpo_jax.pretrained import lora as lora_files

# Largest difference to diffusers' own UNet, of the output's norm: fp32 on both sides.
TOLERANCE = 1e-4


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes `export.path` with its model card, reads it back, and pushes it if asked.

  Args:
    config: the run's config.
    workdir: the run's; the latest checkpoint is exported, its EMA if there is one.

  Returns:
    The folder, the step, and what was compared.

  Raises:
    UserError: no checkpoint, an unknown kind, an export that is not what was trained, or
      one that the Hub does not take.
  """
  kind, workdir = config.export.kind, pathlib.Path(workdir)
  if kind not in KINDS:
    raise unknown_name("export.kind", kind, KINDS)
  if config.export.push_to:
    publishing.check_id(config.export.push_to)
  model_card.evaluation_folder(config, workdir)  # refused before hours of writing
  mesh = parallel.mesh_of(config.mesh)
  done = KINDS[kind](config, workdir, mesh)
  if parallel.is_main_process():
    _describe_and_push(config, workdir, done)
  parallel.barrier("export described")
  return done


def _describe_and_push(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, done: dict[str, Any]
) -> None:
  """Writes the model card, and pushes it with what it is about to `export.push_to`."""
  path = pathlib.Path(done["path"])
  in_file = config.export.kind in ("lora", "ip_adapter")
  exported = model_card.Exported(
    folder=path.parent if in_file else path,
    kind="pipeline" if config.export.kind == "merged" else config.export.kind,
    step=done["step"],
    checked=done["checked"],
    file=path.name if in_file else "",
  )
  console.say(f"model card: {model_card.write(config, workdir, exported)}")
  if config.export.push_to:
    address = publishing.push(
      exported.folder,
      config.export.push_to,
      private=config.export.private,
      files=model_card.files_to_push(exported),
      message=f"{config.objective.name}, {exported.step} updates (lpo_jax)",
    )
    console.say(f"pushed: {address}")


def _clear(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Removes an earlier export; returns the folder for the new one."""
  target = pathlib.Path(config.export.path or workdir / "export")
  if parallel.is_main_process() and _is_our_export(target):
    shutil.rmtree(target)
  parallel.barrier("export cleared")
  return target


def _trained(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> tuple[pretrained.Part, int]:
  params, step = blueprint.trained_params(config, workdir, mesh)
  base = pretrained.load(config.model.path, "unet")
  return dataclasses.replace(base, params=params), step


def _done(target: pathlib.Path, step: int, checked: str) -> dict[str, Any]:
  console.say(f"exported step {step} to {target}: {checked}")
  return {"path": str(target), "step": step, "checked": checked}


def export_pipeline(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Writes a whole pipeline with the trained UNet, factors merged."""
  part, step = _trained(config, workdir, mesh)
  target = _clear(config, workdir)
  parts = {"unet": _plain(part), **widened_text_encoders(config.model.path)}
  pretrained.save_pipeline(config.model.path, target, parts)
  _write_adapter(target, part)
  return _done(target, step, compare(target, part))


def export_unet(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Writes the trained UNet alone, factors merged."""
  part, step = _trained(config, workdir, mesh)
  target = _clear(config, workdir)
  pretrained.save(target, _plain(part))
  _write_adapter(target, part)
  return _done(target, step, compare(target, part))


def export_lora(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Writes the trained factors, or those nearest to what a full fine-tune changed."""
  plan, trainable, step = blueprint.restore_published(config, workdir, mesh)
  base = pretrained.load(config.model.path, "unet")
  target = pathlib.Path(config.export.path or workdir / "lora")
  if plan.tuning.layout:
    adapter = lora.Adapter(trainable, plan.tuning.layout)
    file = adapters.write(config, target, adapter, step)
  else:
    if base.config.get("user_dim"):
      raise UserError(
        "export.kind='lora': factors of what training changed cannot say what a UNet has "
        "for its users. Expected export.kind='pipeline', or 'ip_adapter' where nothing "
        "else was trained."
      )
    params = plan.tuning.publish(trainable, lambda: base.params)
    found = adapters.extract(config, base.params, params)
    adapter = found.adapter
    file = adapters.write(config, target, adapter, step)
    adapters.write_kept(target, found)
  checked = compare_lora(file, adapter, base, config.model.path, config.export.dtype)
  return _done(file, step, checked)


def export_ip_adapter(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Writes what the trained UNet has for its users, for the base that it is trained on."""
  part, step = _trained(config, workdir, mesh)
  base = pretrained.load(config.model.path, "unet")
  wanted = trees.named_leaves(parallel.fetch(part.params))
  moved = [
    name
    for name, leaf in trees.named_leaves(base.params).items()
    if not (users.is_adapter(name) or np.array_equal(leaf, wanted[name]))
  ]
  if moved:
    raise UserError(
      f"export.kind='ip_adapter': training also moved {len(moved)} parameters that are no "
      f"adapter's (first {moved[0]!r}), and the base would not be what people are "
      "conditioned on. Expected export.kind='pipeline', which writes both."
    )
  target = pathlib.Path(config.export.path or workdir / "ip_adapter")
  file = _write_adapter(target, part)
  checked = compare_adapter(file, ip_adapter.detach(base), part, config.model.path)
  return _done(file, step, checked)


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
  "pipeline": export_pipeline,
  "merged": export_pipeline,
  "unet": export_unet,
  "lora": export_lora,
  "ip_adapter": export_ip_adapter,
}


def _plain(part: pretrained.Part) -> pretrained.Part:
  """The UNet as diffusers knows it; what it has for its users goes into a file."""
  return ip_adapter.detach(part) if part.config.get("user_dim") else part


def _write_adapter(target: pathlib.Path, part: pretrained.Part) -> pathlib.Path | None:
  """Writes that file, of a UNet that knows users."""
  if not part.config.get("user_dim"):
    return None
  return ip_adapter.save(target / ip_adapter.FILE_NAME, part.model, part.params)


def widened_text_encoders(path: str) -> dict[str, pretrained.Part]:
  """The text encoders that are not stored in fp32, in fp32 like the trained UNet.

  transformers keeps the precision of the file and diffusers does not: a half text encoder
  beside an fp32 UNet loads, and then fails at the first prompt.
  """
  parts = {}
  for name in ("text_encoder", "text_encoder_2"):
    if (pretrained.local_folder(path) / name).is_dir():
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
  if part.config.get("user_dim"):
    return compare_adapter(target / ip_adapter.FILE_NAME, back, part, target)
  said = _compare_tensors(target, back, part)
  return f"{said}; {ask_diffusers(back, lambda: load_diffusers(target), str(target))}"


def _compare_tensors(
  target: pathlib.Path, back: pretrained.Part, part: pretrained.Part
) -> str:
  wanted = trees.named_leaves(parallel.fetch(part.params))
  for name, leaf in trees.named_leaves(parallel.fetch(back.params)).items():
    if not np.array_equal(leaf, wanted[name]):
      raise UserError(
        f"{target}: tensor {name} read back differs from what was trained; the disk or "
        "its file system is not to be trusted. Export to another place."
      )
  return f"{len(wanted)} tensors read back, equal to the bit"


def compare_adapter(
  file: pathlib.Path, plain: pretrained.Part, part: pretrained.Part, base_folder: Any
) -> str:
  """Reads a UNet and its file of users back and compares them with what was trained.

  Where torch is installed and diffusers can load the file, it must predict the same for a
  user of two embeddings.

  Args:
    file: of the users.
    plain: the UNet without them, as it was read back.
    part: what was trained.
    base_folder: where diffusers finds the plain UNet.

  Returns:
    What was compared, in words.

  Raises:
    UserError: a tensor or a prediction differs.
  """
  back = ip_adapter.attach(plain, file)
  said = _compare_tensors(file, back, part)
  refusal = ip_adapter.refusal(part.config)
  if refusal:
    return f"{said} (diffusers itself not asked: {refusal})"
  asked = ask_diffusers(
    back, lambda: load_diffusers(base_folder, adapter=file), str(file)
  )
  return f"{said}; {asked}"


def compare_lora(
  file: pathlib.Path,
  adapter: lora.Adapter,
  base: pretrained.Part,
  base_folder: str,
  dtype: str,
) -> str:
  """Reads a LoRA file back and compares it with what was trained.

  Factors must be equal to the bit once rounded to `dtype`, ranks and alphas equal; where
  torch and PEFT are installed, diffusers adds the file to the base and must predict what
  the merged weights do.

  Returns:
    What was compared, in words.

  Raises:
    UserError: a factor, an alpha or a prediction differs.
  """
  back = lora_files.load(file, base.model).adapter
  wanted = trees.named_leaves(parallel.fetch(adapter.delta))
  for name, leaf in trees.named_leaves(back.delta).items():
    if not np.array_equal(leaf, wanted[name].astype(dtype).astype(np.float32)):
      raise UserError(
        f"{file}: factor {name} read back differs from what was trained; the disk or its "
        "file system is not to be trusted. Export to another place."
      )
  if dict(back.layout) != dict(adapter.layout):
    raise UserError(
      f"{file}: ranks or alphas read back differ from what was trained; please report "
      "this with the file."
    )
  said = f"{len(wanted)} factors read back, equal to the bit"
  if importlib.util.find_spec("peft") is None:
    return f"{said} (diffusers itself not asked: peft is not installed)"
  alphas = {alpha for site in back.layout.values() for alpha in site.alphas}
  if len(alphas) > 1 and file.name != lora_files.FILE_NAME:
    return f"{said} (diffusers itself not asked: of kohya's alphas it reads only one)"
  params = jax.jit(lambda b, d: lora.merge(b, d, back.layout))(base.params, back.delta)
  part = dataclasses.replace(base, params=params)
  said_too = ask_diffusers(part, lambda: load_diffusers(base_folder, file), str(file))
  return f"{said}; {said_too}"


def ask_diffusers(part: pretrained.Part, load: Callable[[], Any], where: str) -> str:
  """Compares a prediction with that of diffusers' own UNet, where torch is installed.

  Returns:
    What was compared, in words.

  Raises:
    UserError: the predictions differ.
  """
  if not parallel.is_main_process() or importlib.util.find_spec("torch") is None:
    return "diffusers itself not asked (torch is not installed)"
  error = difference_to_diffusers(load(), part)
  if not error <= TOLERANCE:
    raise UserError(
      f"{where}: diffusers' UNet predicts something else (relative error {error:.1e}, "
      f"expected at most {TOLERANCE:.0e}); please report this with unet/config.json."
    )
  return f"diffusers predicts the same (relative error {error:.0e})"


def load_diffusers(
  folder: Any, file: pathlib.Path | None = None, adapter: pathlib.Path | None = None
) -> Any:
  """Loads a UNet with diffusers on PyTorch, with a LoRA file or an IP-Adapter."""
  import diffusers
  import torch

  unet = diffusers.UNet2DConditionModel.from_pretrained(
    folder, subfolder="unet", low_cpu_mem_usage=False, torch_dtype=torch.float32
  )
  if file is not None:
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas, metadata = loader.lora_state_dict(
      str(file.parent),
      weight_name=file.name,
      unet_config=unet.config,
      return_lora_metadata=True,
    )
    loader.load_lora_into_unet(
      state, network_alphas=alphas, unet=unet, metadata=metadata
    )
    for parameter in unet.parameters():  # a narrow file's factors
      parameter.data = parameter.data.float()
  if adapter is not None:
    loader = diffusers.loaders.ip_adapter.IPAdapterMixin()
    loader.unet, loader.unet_name = unet, "unet"
    loader.load_ip_adapter(
      str(adapter.parent),
      subfolder="",
      weight_name=adapter.name,
      image_encoder_folder=None,
      low_cpu_mem_usage=False,
    )
  return unet


def difference_to_diffusers(theirs: Any, part: pretrained.Part) -> float:
  """Relative error, by norm, of our prediction against diffusers' on PyTorch.

  Args:
    theirs: a diffusers.UNet2DConditionModel.
    part: our UNet of the same weights.
  """
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
  if config.get("user_dim"):
    people = rng.standard_normal((1, 2, config["user_dim"]), np.float32)
    extra["user_embeds"], added["image_embeds"] = people, [torch.from_numpy(people)]
  ours = jax.jit(part.apply)(part.params, latents, timesteps, embeds, **extra)
  with torch.no_grad():
    output = theirs(
      torch.from_numpy(latents.transpose(0, 3, 1, 2)),
      torch.from_numpy(timesteps),
      torch.from_numpy(embeds),
      added_cond_kwargs=added,
    ).sample
  difference = jnp.asarray(ours) - output.numpy().transpose(0, 2, 3, 1)
  return float(jnp.linalg.norm(difference) / np.linalg.norm(output.numpy()))
