"""How files of LoRA factors call the modules of a UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# What may stand before the name of a module.
PREFIXES = ("base_model.model.", "unet.")

# Modules outside of the stages, and inside of a resnet: diffusers -> Stability's network.
OUTSIDE = {
  "conv_in": "input_blocks.0.0",
  "conv_out": "out.2",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "add_embedding.linear_1": "label_emb.0.0",
  "add_embedding.linear_2": "label_emb.0.2",
}
IN_RESNET = {
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}

# (addition_embed_type, cross_attention_dim) -> modelspec's architecture, kohya's version.
ARCHITECTURES = {
  (None, 768): ("stable-diffusion-v1", "sd_v1"),
  (None, 1024): ("stable-diffusion-v2-512", "sd_v2"),
  ("text_time", 2048): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
  ("text_time", 1280): ("stable-diffusion-xl-v1-refiner", "sdxl_refiner_v1-0"),
}


def kohya(module: str) -> str:
  """Spells a module as kohya's scripts do.

  >>> kohya("mid_block.attentions.0.proj_in")
  'lora_unet_mid_block_attentions_0_proj_in'
  """
  return "lora_unet_" + module.replace(".", "_")


def without_prefix(module: str) -> str:
  """Strips what PEFT and diffusers put before a module's name."""
  for prefix in PREFIXES:
    module = module.removeprefix(prefix)
  return module


def to_sgm(config: Mapping[str, Any]) -> Callable[[str], str]:
  """Returns what turns diffusers' module names into those of Stability's network.

  Args:
    config: of the UNet.

  >>> to_sgm({"block_out_channels": [8, 8, 8]})("down_blocks.1.attentions.0.proj_in")
  'input_blocks.4.1.proj_in'
  """
  stages = _stages(config)

  def translate(module: str) -> str:
    if module in OUTSIDE:
      return OUTSIDE[module]
    words = module.split(".")
    for length in range(len(words), 0, -1):
      here, rest = ".".join(words[:length]), words[length:]
      if here in stages:
        inner = ".".join(rest)
        if "resnets" in words[:length]:
          inner = IN_RESNET.get(inner, inner)
        return ".".join(filter(None, [stages[here], inner]))
    return module

  return translate


def _stages(config: Mapping[str, Any]) -> dict[str, str]:
  """The layers of all stages: diffusers' names -> Stability's."""
  widths = config.get("block_out_channels", (320, 640, 1280, 1280))
  stages = len(widths)
  counts = config.get("layers_per_block", 2)
  counts = list(counts) if isinstance(counts, list | tuple) else [counts] * stages
  attends = ["CrossAttn" in kind for kind in config.get("up_block_types", ())]
  found, place = {}, 1
  for stage, count in enumerate(counts):
    for layer in range(count):
      found[f"down_blocks.{stage}.resnets.{layer}"] = f"input_blocks.{place}.0"
      found[f"down_blocks.{stage}.attentions.{layer}"] = f"input_blocks.{place}.1"
      place += 1
    if stage < stages - 1:
      found[f"down_blocks.{stage}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
      place += 1
  found |= {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
  }
  place = 0
  for stage, count in enumerate(reversed(counts)):
    for layer in range(count + 1):
      found[f"up_blocks.{stage}.resnets.{layer}"] = f"output_blocks.{place}.0"
      found[f"up_blocks.{stage}.attentions.{layer}"] = f"output_blocks.{place}.1"
      place += 1
    after = 2 if attends[stage : stage + 1] == [True] else 1
    found[f"up_blocks.{stage}.upsamplers.0.conv"] = (
      f"output_blocks.{place - 1}.{after}.conv"
    )
  return found


def architecture(config: Mapping[str, Any]) -> dict[str, str]:
  """Header entries that say what base a LoRA is for; none for an unknown base."""
  width = config.get("cross_attention_dim", 1280)
  known = ARCHITECTURES.get((config.get("addition_embed_type"), width))
  if known is None:
    return {}
  xl = config.get("addition_embed_type") == "text_time"
  return {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": f"{known[0]}/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
    if xl
    else "diffusers",
    "ss_base_model_version": known[1],
  }
