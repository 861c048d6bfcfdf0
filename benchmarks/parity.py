"""Full-size parity with diffusers and transformers: the table of docs/models.md.

  python benchmarks/parity.py --workdir runs/parity
  python benchmarks/parity.py --workdir runs/parity --models sd15_unet --gradients

Needs the `test` extra (torch), 24 GB of memory and 25 GB of disk. Every model has the
fields of the real config.json (lpo_jax/assets/architectures/) and random weights on which nothing
saturates. torch builds, saves and runs it in one process; lpo_jax reads the folder and
runs it in another. Results that are there are not computed again.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ARCHITECTURES = HERE.parent / "lpo_jax" / "assets" / "architectures"
MODELS = (
  "sd15_unet",
  "sd21_unet",
  "sdxl_unet",
  "sd_vae",
  "sdxl_vae",
  "clip_vit_l_text",
  "openclip_h_text",
  "openclip_bigg_text",
  "clip_vit_l_vision",
  "openclip_h_vision",
)
# torch's gradients of a whole UNet of SDXL do not fit beside the rest in 24 GB.
WITH_GRADIENTS = ("sd15_unet", "clip_vit_l_text")


def config_of(name: str) -> dict:
  """The fields of the real config.json."""
  return json.loads((ARCHITECTURES / f"{name}.json").read_text("utf-8"))


def class_of(config: dict) -> str:
  return config.get("_class_name") or config["architectures"][0]


def inputs_of(config: dict) -> dict[str, np.ndarray]:
  """Small inputs of the right widths, as numpy and NHWC."""
  rng = np.random.default_rng(1)
  kind = class_of(config)

  def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)

  if kind == "AutoencoderKL":
    images = np.tanh(normal(1, 64, 64, 3))
    return {"images": images, "latents": normal(1, 8, 8, config["latent_channels"])}
  if kind.startswith("CLIPText"):
    ids = rng.integers(1, 49000, (2, 77)).astype(np.int32)
    ids[:, 0], ids[0, 20:], ids[1, 60:] = 49406, 49407, 49407
    return {"input_ids": ids}
  if kind.startswith("CLIPVision"):
    size = config["image_size"]
    return {"images": normal(2, size, size, 3)}
  inputs = {
    "latents": normal(2, 16, 16, config["in_channels"]),
    "timesteps": np.asarray([7, 901], np.int32),
    "prompt_embeds": normal(2, 77, config["cross_attention_dim"]),
  }
  if config.get("addition_embed_type") == "text_time":
    ids = [[1024, 768, 0, 128, 1024, 1024], [640, 512, 8, 0, 1024, 1024]]
    sizes = len(ids[0]) * config["addition_time_embed_dim"]
    width = config["projection_class_embeddings_input_dim"] - sizes
    inputs["pooled_prompt_embeds"] = normal(2, width)
    inputs["time_ids"] = np.asarray(ids, np.float32)
  return inputs


# --- torch's side ------------------------------------------------------------------


def torch_model(config: dict):
  """The peer, with random weights: kernels of deviation 1/sqrt(fan in)."""
  import torch

  kind = class_of(config)
  with torch.device("meta"):
    if "_class_name" in config:
      import diffusers

      module = getattr(diffusers, kind).from_config(config)
    else:
      import transformers

      fields = transformers.CLIPVisionConfig if "Vision" in kind else None
      fields = fields or transformers.CLIPTextConfig
      module = getattr(transformers, kind)(fields(**config))
  if module.dtype != torch.float32:  # the config of bigG says float16
    module = module.to(torch.float32)
  module = module.to_empty(device="cpu").eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, buffer in module.named_buffers():
      if not name.endswith("position_ids"):
        raise ValueError(f"{kind} has a buffer {name!r} that is not filled here")
      buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape))
    for name, p in module.named_parameters():
      p.normal_(generator=generator)
      if p.ndim == 1:
        p.mul_(0.2)
        p.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
      elif "embedding.weight" in name:
        p.mul_(0.5)
      else:
        p.mul_(p[0].numel() ** -0.5)
  return module


def torch_outputs(module, kind: str, inputs: dict[str, np.ndarray]) -> dict:
  """Runs the peer; torch tensors, NHWC, by the name of what they are."""
  import torch

  x = {name: torch.tensor(value) for name, value in inputs.items()}

  def first(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 3, 1, 2)

  def last(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1)

  if kind == "AutoencoderKL":
    moments = module.encode(first(x["images"])).latent_dist.parameters
    return {
      "moments": last(moments),
      "images": last(module.decode(first(x["latents"])).sample),
    }
  if kind.startswith("CLIPText"):
    out = module(x["input_ids"].long(), output_hidden_states=True)
    pooled = out.text_embeds if "Projection" in kind else out.pooler_output
    return {
      "last_hidden_state": out.last_hidden_state,
      "hidden_states[-2]": out.hidden_states[-2],
      "pooled": pooled,
    }
  if kind.startswith("CLIPVision"):
    out = module(first(x["images"]))
    return {"pooled": out.image_embeds if "Projection" in kind else out.pooler_output}
  extra = {}
  if "time_ids" in x:
    extra = {"text_embeds": x["pooled_prompt_embeds"], "time_ids": x["time_ids"]}
  out = module(
    first(x["latents"]), x["timesteps"], x["prompt_embeds"], added_cond_kwargs=extra
  )
  return {"prediction": last(out.sample)}


def run_torch(name: str, folder: pathlib.Path, gradients: bool) -> None:
  """Writes the peer's folder, its outputs and, if asked for, its gradients."""
  import torch

  config = config_of(name)
  module = torch_model(config)
  module.save_pretrained(folder / "model")
  inputs = inputs_of(config)
  with torch.set_grad_enabled(gradients):
    outputs = torch_outputs(module, class_of(config), inputs)
  np.savez(
    folder / "torch.npz",
    **{key: value.detach().numpy() for key, value in outputs.items()},
  )
  if gradients:
    scalar_of({k: v.double() for k, v in outputs.items()}, torch.tensor).backward()
    with torch.no_grad():
      for p in module.parameters():
        p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        p.grad = None
    module.save_pretrained(folder / "gradients")


def scalar_of(outputs: dict, array) -> object:
  """sum_i w_i y_i / sqrt(n) with fixed weights: what gradients are taken of."""
  rng = np.random.default_rng(2)
  total = 0.0
  for key in sorted(outputs):
    y = outputs[key]
    weights = array(rng.standard_normal(y.shape))
    total = total + (y * weights).sum() / float(np.prod(y.shape)) ** 0.5
  return total


# --- our side ----------------------------------------------------------------------


def our_outputs(part, params, inputs: dict) -> dict:
  """Runs the model of lpo_jax on the same inputs, under the same names."""
  kind = class_of(part.config)
  if kind == "AutoencoderKL":
    return {
      "moments": part.encode(params, inputs["images"]),
      "images": part.decode(params, inputs["latents"]),
    }
  if kind.startswith("CLIPText"):
    out = part.apply(params, inputs["input_ids"])
    return {
      "last_hidden_state": out.last_hidden_state,
      "hidden_states[-2]": out.hidden_states[-2],
      "pooled": out.pooled,
    }
  if kind.startswith("CLIPVision"):
    return {"pooled": part.apply(params, inputs["images"]).pooled}
  return {"prediction": part.apply(params, **inputs)}


def distance(ours, theirs) -> float:
  """|ours - theirs| / |theirs| over the whole array."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def run_ours(name: str, folder: pathlib.Path, gradients: bool) -> dict:
  """Compares, in fp32 and in bf16; returns the row of the table."""
  import jax
  import jax.numpy as jnp

  from lpo_jax import models, pretrained, trees

  config = config_of(name)
  inputs = inputs_of(config)
  theirs = dict(np.load(folder / "torch.npz"))
  part = pretrained.load(folder / "model", name)
  count = sum(leaf.size for leaf in jax.tree.leaves(part.params))
  row = {"model": name, "parameters": count}
  began = time.monotonic()
  ours = jax.jit(lambda p: our_outputs(part, p, inputs))(part.params)
  ours = {key: np.asarray(value) for key, value in ours.items()}
  row["seconds"] = time.monotonic() - began
  row["fp32"] = max(distance(ours[key], theirs[key]) for key in theirs)
  half = models.build(part.config, dtype=jnp.bfloat16)
  coarse = pretrained.Part(name, part.config, part.params, half)
  rounded = jax.jit(lambda p: our_outputs(coarse, p, inputs))(part.params)
  row["bf16"] = max(distance(rounded[key], theirs[key]) for key in theirs)
  if "prediction" in ours:
    target = np.random.default_rng(3).standard_normal(ours["prediction"].shape)

    def err(prediction) -> np.ndarray:
      return np.square(np.asarray(prediction, np.float64) - target).mean((1, 2, 3))

    exact = err(ours["prediction"])
    row["err"] = float(exact.mean())
    row["err_bf16"] = float(np.abs(err(rounded["prediction"]) / exact - 1).max())
  if gradients:

    def scalar(params):
      return scalar_of(our_outputs(part, params, inputs), jnp.asarray)

    mine = trees.named_leaves(jax.jit(jax.grad(scalar))(part.params))
    expected = trees.named_leaves(pretrained.load(folder / "gradients", name).params)
    norms = {key: float(jnp.linalg.norm(value)) for key, value in expected.items()}
    # What a norm removes has a gradient of 0, and only noise to compare.
    floor = 1e-3 * max(norms.values())
    row["gradient"] = max(
      float(jnp.linalg.norm(mine[key] - expected[key])) / max(norms[key], floor)
      for key in expected
    )
  return row


# --- both --------------------------------------------------------------------------


def child(side: str, name: str, folder: pathlib.Path, gradients: bool) -> None:
  """Runs one side in a process of its own, so that only one model is in memory."""
  command = [sys.executable, __file__, f"--side={side}", f"--models={name}"]
  command += [f"--workdir={folder.parent}", *(["--gradients"] if gradients else [])]
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  subprocess.run(command, check=True, env=env)


def table(rows: list[dict]) -> str:
  """The rows as Markdown."""

  def figure(row: dict, key: str) -> str:
    return f"{row[key]:.1e}" if key in row else ""

  lines = [
    "| model | parameters | fp32 | bf16 | `err` in bf16 | gradient, fp32 |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    figures = [figure(row, key) for key in ("fp32", "bf16", "err_bf16", "gradient")]
    lines.append(f"| {row['model']} | {row['parameters']:,} | {' | '.join(figures)} |")
  return "\n".join(lines)


def main() -> None:
  """Runs what is asked for, then prints the table of all that is there."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--models", nargs="*", default=MODELS)
  parser.add_argument("--gradients", action="store_true", help="of all that have them")
  parser.add_argument("--side", choices=("torch", "ours"), help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  for name in arguments.models:
    folder = arguments.workdir.resolve() / name
    gradients = arguments.gradients and name in WITH_GRADIENTS
    if arguments.side == "torch":
      run_torch(name, folder, gradients)
    elif arguments.side == "ours":
      row = run_ours(name, folder, gradients)
      (folder.parent / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n")
    elif not (folder.parent / f"{name}.json").exists():
      print(f"{name} ...", file=sys.stderr, flush=True)
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(parents=True)
      child("torch", name, folder, gradients)
      child("ours", name, folder, gradients)
      shutil.rmtree(folder)
  if arguments.side is None:
    files = [arguments.workdir / f"{name}.json" for name in MODELS]
    print(table([json.loads(file.read_text()) for file in files if file.exists()]))


if __name__ == "__main__":
  main()
