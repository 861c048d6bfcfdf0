"""Diffusion-DPO on SD 1.5, to be held against its released weights and published rows.

  python -m lpo_jax.main --config configs/repro_dpo_sd15.py --workdir runs/eval_dpo \\
      --job evaluate   (the released weights, before anything is trained)
  python -m lpo_jax.main --config configs/repro_dpo_sd15.py:code \\
      --workdir runs/dpo_code --config.data.path=...   (--job cache, then train)
  python -m lpo_jax.main --config configs/repro_dpo_sd15.py --workdir runs/eval_dpo \\
      --job evaluate --config.eval.candidates.ours=runs/dpo_code

Hardware and hours: the authors used 16 A100 for about 24 hours; not yet run by us.
Expected: PickScore win rate over SD 1.5 of 68.2 % on Pick-a-Pic's test prompts and 69.5 %
on HPDv2's (arXiv:2510.01540, table 1, this checkpoint among its baselines); its sampler
and number of images are unpublished.

Presets: `code`, the launcher (configs/dpo_sd15.py): beta 5000, learning rate 1e-8 times
the 2048 pairs of an update, 2.048e-5. `paper`, the text (section 5): beta 2000, learning
rate 2000/beta * 2.048e-8 with a quarter of the updates as warm-up. They differ a
thousandfold, and with Adam the text's cannot move a weight by more than 4e-5 in 2000
updates: issue 12 of the authors' repository asks which, without an answer.
"""

from lpo_jax.configs import _protocols, dpo_sd15

PRESETS = {
  "code": {},
  "paper": {"beta": 2000.0, "learning_rate": 2.048e-8, "warmup_steps": 500},
}


def get_config(preset: str = ""):
  """Returns the launcher's settings or the text's."""
  chosen = _protocols.preset(preset, PRESETS)
  config = dpo_sd15.get_config()
  config.data.flip = "independent"  # the script's; unlike configs/dpo_sd15.py
  config.objective.beta = chosen.get("beta", config.objective.beta)
  for key in ("learning_rate", "warmup_steps"):
    config.train[key] = chosen.get(key, config.train[key])
  return _protocols.head_to_head(
    config,
    base=_protocols.SD15,
    checkpoint="mhdang/dpo-sd1.5-text2image-v1",
    guidance=7.5,  # the authors' notebook
  )
