"""Diffusion-DRO on SD 1.5, to be held against its released weights and published rows.

  python -m lpo_jax.main --config configs/repro_dro_sd15.py --workdir runs/eval_dro \\
      --job evaluate   (the released weights, before anything is trained)
  python -m lpo_jax.main --config configs/repro_dro_sd15.py --workdir runs/dro_experts \\
      --job select --config.data.path=...
  python -m lpo_jax.main --config configs/repro_dro_sd15.py:code --workdir runs/dro \\
      --config.data.path=runs/dro_experts/experts.parquet   (--job cache, then train)

Hardware and hours: the authors used 4 RTX 3090 for 20 to 25 hours; not yet run by us.
Expected: win rates over SD 1.5 on Pick-a-Pic v2's 500 test prompts of 87.8 % (PickScore),
85.2 % (aesthetics v1), 48.4 % (CLIP) and 88.6 % (ImageReward); means 21.52 (PickScore),
28.49 (HPS v2.0), 0.8511 (ImageReward) with experts by HPS v2, and 21.76, 28.38, 0.8636
with experts by PickScore (arXiv:2510.18353, tables 1 and appendix B).

Presets: `paper`, configs/dro_sd15.py with experts by HPS v2 and the gradient clipped as
the flag says. `pickscore`: the same with experts by PickScore. `code`: as `paper`, but
nothing clipped, which is what the released script does (docs/papers.md).
"""

from lpo_jax.configs import _protocols, dro_sd15

PRESETS = {
  "paper": {},
  "pickscore": {"scorer": "pickscore"},
  "code": {"clip_norm": 0.0},
}


def get_config(preset: str = ""):
  """Returns dro_sd15 with its experts' scorer, and the evaluation of the paper."""
  chosen = _protocols.preset(preset, PRESETS)
  config = dro_sd15.get_config()
  config.select.scorer = chosen.get("scorer", "hps_v2")
  config.train.clip_norm = chosen.get("clip_norm", config.train.clip_norm)
  return _protocols.median_of_five(config, checkpoint="ylwu/diffusion-dro-sd1.5")
