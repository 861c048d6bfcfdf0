"""Diffusion-DRO on SDXL: what the released code has for it, without published results.

  python -m lpo_jax.main --config configs/dro_sdxl.py --workdir runs/dro_sdxl \\
      --config.model.path=... --config.data.path=runs/dro_experts/experts.parquet
  (experts as for configs/dro_sd15.py; with --job cache, then train, export)

Hardware and hours: unpublished; not yet run by us. Expected: nothing is published; the
released train.py has an SDXL path (`--sdxl`) and no launcher for it.

The path shares all numbers with SD 1.5. Ours: the resolution that SDXL was made for. Its
VAE should be one that is at home in half precision (madebyollin/sdxl-vae-fp16-fix, as in
the script); here the VAE runs in fp32, and any will do.
"""

from lpo_jax.configs import dro_sd15


def get_config():
  """Returns dro_sd15 at 1024 pixels, with the true sizes of the images."""
  config = dro_sd15.get_config()
  config.data.resolution = 1024  # unpublished; the script's default is SD 1.5's 512
  config.data.time_ids = "original"  # the script tells true size and crop
  config.train.microbatch = 16  # ours: any divisor gives the same update
  config.eval.guidance_scale = 7.5  # --validation_guidance_scale
  config.model.remat = "full"  # ours: memory for time
  return config
