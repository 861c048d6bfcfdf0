"""Diffusion-LPO's objective on SDXL, trained as LoRA factors beside the frozen base.

  python -m lpo_jax.main --config configs/lpo_sdxl_lora.py --workdir runs/lpo_sdxl_lora \\
      --config.model.path=... --config.data.path=...   (then --job cache, train; then
      --job export --config.export.kind=lora, or merged)

Hardware and hours: unpublished; not yet run by us. Expected: unpublished; no paper trains
this objective on factors.

Rank, learning rate, batch, steps and beta are those of the one published recipe for
factors on SDXL with a DPO loss, diffusers' research_projects/diffusion_dpo (its README
calls it experimental and tested on little data). SPO trains rank 64 at the same learning
rate. Lists and their likelihood are Diffusion-LPO's.
"""

from lpo_jax.configs import common


def get_config():
  """Returns diffusers' SDXL recipe with ranked lists."""
  config = common.get_config()
  config.model.lora.rank = 8  # README --rank=8; alpha is the rank, as in its script
  config.model.lora.init = "gaussian"  # the script's init_lora_weights
  config.model.remat = "blocks"  # --gradient_checkpointing
  config.data.strategy = "paths"  # Diffusion-LPO's list construction
  config.data.max_list_size = 8
  config.data.resolution = 1024  # the script's default
  config.data.time_ids = "original"  # the script tells true size and crop
  config.data.flip = "list"  # the script mirrors both images of a pair or none
  config.data.caption_dropout = 0.0  # the script drops none
  # The script's --beta_dpo 2500, which it does not halve (docs/papers.md).
  config.objective = {"name": "lpo", "beta": 5000.0}
  config.train.images_per_update = 32  # 8 pairs * 2 accumulation steps
  config.train.microbatch = 8  # ours: any divisor gives the same update
  config.train.total_steps = 2000  # --max_train_steps
  config.train.learning_rate = 1e-5
  config.train.warmup_steps = 0  # --lr_warmup_steps=0
  config.train.checkpoint_every = 500  # --checkpointing_steps
  config.export.kind = "lora"
  return config
