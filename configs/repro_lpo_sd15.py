"""Diffusion-LPO on SD 1.5, to be held against its published rows; it has no weights.

  python -m lpo_jax.main --config configs/repro_lpo_sd15.py --workdir runs/eval_lpo \\
      --job evaluate   (its baseline's weights, before anything is trained)
  python -m lpo_jax.main --config configs/repro_lpo_sd15.py:beta5000 \\
      --workdir runs/lpo --config.data.path=...   (--job cache, then train)
  python -m lpo_jax.main --config configs/repro_lpo_sd15.py --workdir runs/eval_lpo \\
      --job evaluate --config.eval.candidates.ours=runs/lpo

Hardware and hours: unpublished; not yet run by us. Expected: PickScore win rates over SD
1.5 of 80.4 % on Pick-a-Pic's test prompts and 82.9 % on HPDv2's, where Diffusion-DPO's
public weights have 68.2 % and 69.5 % (arXiv:2510.01540, table 1, as secondary sources
quote it).

Beta, learning rate, batch and steps are unpublished; presets are the two sets that
Diffusion-DPO has for it: `beta5000`, its launcher's (configs/lpo_sd15.py), and
`beta2000`, its text's beta at the launcher's learning rate, since the text's own does
next to nothing (configs/repro_dpo_sd15.py).
"""

from lpo_jax.configs import _protocols, lpo_sd15

PRESETS = {"beta5000": 5000.0, "beta2000": 2000.0}


def get_config(preset: str = ""):
  """Returns lpo_sd15 at one of Diffusion-DPO's betas."""
  config = lpo_sd15.get_config()
  config.objective.beta = _protocols.preset(preset, PRESETS)
  return _protocols.head_to_head(
    config,
    base=_protocols.SD15,
    checkpoint="mhdang/dpo-sd1.5-text2image-v1",
    guidance=7.5,  # unpublished; Diffusion-DPO's
  )
