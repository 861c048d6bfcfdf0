"""Diffusion-LPO on SDXL, to be held against its published rows; it has no weights.

  python -m lpo_jax.main --config configs/repro_lpo_sdxl.py --workdir runs/eval_lpo_sdxl \\
      --job evaluate   (its baseline's weights, before anything is trained)
  python -m lpo_jax.main --config configs/repro_lpo_sdxl.py --workdir runs/lpo_sdxl \\
      --config.data.path=...   (--job cache, then train)

Hardware and hours: unpublished; not yet run by us. Expected: win rates over SDXL of 72.8 %
(PickScore, Parti's prompts), 85.0 % (HPS, HPDv2's) and 73.7 % (ImageReward, Pick-a-Pic's),
where Diffusion-DPO's public weights have 66.8 %, 80.0 % and 66.4 % (arXiv:2510.01540, table
1, as secondary sources quote it).

Training is configs/lpo_sdxl.py, whose numbers are Diffusion-DPO's.
"""

from lpo_jax.configs import _protocols, lpo_sdxl


def get_config():
  """Returns lpo_sdxl with the evaluation of its first row."""
  config = _protocols.head_to_head(
    lpo_sdxl.get_config(),
    base=_protocols.SDXL,
    checkpoint="mhdang/dpo-sdxl-text2image-v1",
    guidance=5.0,  # unpublished; Diffusion-DPO's
  )
  config.eval.prompts = "partiprompts"
  return config
