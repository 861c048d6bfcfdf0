"""Diffusion-KTO on SD 1.5, to be held against its released weights and published rows.

  python -m lpo_jax.main --config configs/repro_kto_sd15.py --workdir runs/eval_kto \\
      --job evaluate   (the released weights, before anything is trained)
  python -m lpo_jax.main --config configs/repro_kto_sd15.py:paper \\
      --workdir runs/kto --config.data.path=...   (--job cache, then train)

Hardware and hours: 4 A6000, hours unpublished; not yet run by us. Expected: win rates over
SD 1.5 on Pick-a-Pic v2's test prompts of 86.0 % (aesthetics), 85.2 % (PickScore), 87.2 %
(ImageReward), 62.0 % (CLIP), 62.0 % (HPS) (arXiv:2404.04465). Its tables' column labels
look permuted, so that raw means are not held against anything here; Diffusion-DRO's means
of the same checkpoint are in docs/reproduction.md.

Presets: `paper`, the text: beta 5000, 10,000 updates, 1000 of warm-up. `code`, the
released example.sh: 20,000 updates, 200 of warm-up, and the script's beta 1000, since the
example sets none. KTO's beta has no 1/2: its 5000 is the 10,000 of `dpo`.

Not as published: the script draws one image at a time, a desirable one with probability
0.8, and its own timestep; here both images of a pair come together, which is one in two,
at one timestep. The script's 8-bit Adam is Adam here.
"""

from lpo_jax.configs import _protocols, dpo_sd15

PRESETS = {
  "paper": {"beta": 5000.0, "total_steps": 10_000, "warmup_steps": 1000},
  "code": {"beta": 1000.0, "total_steps": 20_000, "warmup_steps": 200},
}


def get_config(preset: str = ""):
  """Returns the text's settings or those of the released example."""
  chosen = _protocols.preset(preset, PRESETS)
  config = dpo_sd15.get_config()
  config.objective = {"name": "kto", "beta": chosen["beta"]}
  config.data.caption_dropout = 0.0  # neither the example nor its losses drop any
  config.data.flip = "independent"  # the script's default
  config.noising = {"name": "forward", "independent_noise": True}  # the script's
  # 2 an accelerator * 4 * 256 accumulated: the example; unpublished in the text
  config.train.images_per_update = 2048
  config.train.total_steps = chosen["total_steps"]
  config.train.warmup_steps = chosen["warmup_steps"]
  config.train.learning_rate = 1e-7
  config.train.checkpoint_every = 1000  # ours
  return _protocols.head_to_head(
    config,
    base=_protocols.SD15,
    checkpoint="jacklishufan/diffusion-kto",
    guidance=7.5,  # unpublished; the pipeline's default
  )
