"""Diffusion-NPO on Stable Diffusion 1.5: what a model is to avoid, learnt from flipped ranks.

The training half of the method: the objective and the step are Diffusion-DPO's, only the
order of every list is reversed. The other half is not here: the authors draw with
base + a (policy - base) + b (negative - base) as the unconditional branch of
classifier-free guidance, and our generator has one network for both branches. Export the
LoRA and combine it elsewhere.

  python -m lpo_jax.main --config configs/npo_sd15.py --workdir runs/npo_sd15 \\
      --config.model.path=... --config.data.path=...   (then --job cache, train, export)

Hardware and hours: unpublished as far as we know; not yet run by us. Expected, by
our reasoning and not by any source: drawn alone it loses to the base under PickScore.

From the released code (ICLR 2025): rank 8, learning rate 5e-6, beta 500, batches of 64
pairs, 5000 updates, Pick-a-Pic v1. What else Diffusion-DPO's launcher has is taken from
there (configs/dpo_sd15.py); the warm-up is ours.
"""

from lpo_jax.configs import dpo_sd15


def get_config():
  """Returns the resolved settings."""
  config = dpo_sd15.get_config()
  config.data.ranks = "reversed"
  config.objective = {"name": "dpo", "beta": 500.0}
  config.model.lora.rank = 8
  config.train.images_per_update = 128  # 64 pairs
  config.train.microbatch = 0
  config.train.total_steps = 5000
  config.train.learning_rate = 5e-6
  config.train.warmup_steps = 0
  config.export.kind = "lora"
  return config
