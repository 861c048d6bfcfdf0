"""Diffusion-LPO on SDXL and Pick-a-Pic v2: ranked lists with DPO's SDXL settings.

  python -m lpo_jax.main --config configs/lpo_sdxl.py --workdir runs/lpo_sdxl \\
      --config.data.path=...   (with --job cache, then train, export)
  python -m lpo_jax.main --config configs/lpo_sdxl.py --job plan \\
      --config.plan.topology=v5p:2x2x4   (what it takes, before there is any TPU)

Hardware and hours: unpublished; not yet run by us. Diffusion-DPO's launcher says about
30 hours for 200 of these updates on 16 A100. Expected: PickScore win rate over SDXL of
72.8 % on Parti's prompts (arXiv:2510.01540, table 1).

The paper publishes how lists are made (directed paths per prompt, at most 8 images) but
neither beta, learning rate, batch nor steps. These are those of Diffusion-DPO's SDXL
launcher, at equal images per update.
"""

from lpo_jax.configs import lpo_sd15


def get_config():
  """Returns lpo_sd15 with SDXL's resolution, schedule and optimizer."""
  config = lpo_sd15.get_config()
  config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
  config.data.resolution = 1024
  config.train.images_per_update = 4096  # 2048 pairs, as its SD1.5 launcher
  config.train.microbatch = 64  # ours: any divisor gives the same update
  config.train.total_steps = 1000  # the released model; the launcher stops at 2000
  config.train.warmup_steps = 200  # its SDXL launcher
  config.train.checkpoint_every = 200
  config.train.optimizer = "adafactor"  # its train.py --use_adafactor
  with config.unlocked():
    config.train.optimizer_args = {"weight_decay": 1e-2}
  config.model.remat = "blocks"  # --gradient_checkpointing is forced for SDXL
  config.mesh.fsdp = (
    -1
  )  # ours: fp32 weights and reference do not fit beside activations
  config.mesh.data = 1
  return config
