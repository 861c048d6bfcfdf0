"""Diffusion-LPO on Stable Diffusion 1.5 and Pick-a-Pic v1, at DPO's number of images.

  python -m lpo_jax.main --config configs/lpo_sd15.py --workdir runs/lpo_sd15 \\
      --config.model.path=... --config.data.path=...   (then --job cache, train, export)

Hardware and hours: unpublished; not yet run by us. Expected: PickScore win rate over
SD1.5 of 80.4 % on Pick-a-Pic's test prompts (arXiv:2510.01540, table 1).

The paper publishes how lists are made (directed paths per prompt, at most 8 images) but
neither beta, learning rate, batch nor steps. These are Diffusion-DPO's, at equal images
per update, so that the two configs differ in the objective and the lists alone.
"""

from lpo_jax.configs import dpo_sd15


def get_config():
  """Returns dpo_sd15 with ranked lists and their likelihood."""
  config = dpo_sd15.get_config()
  config.data.strategy = "paths"  # the paper's list construction
  config.data.max_list_size = (
    8  # 95 % of lists are no longer; 4 / 8 / 12: 68.2/69.1/69.3
  )
  config.objective = {"name": "lpo", "beta": 5000.0}  # unpublished; DPO's
  return config
