"""InstructPix2Pix on Stable Diffusion 1.5: an editor by `sft`, then LPO on ranked edits.

  python -m lpo_jax.main --config configs/lpo_edit_ip2p.py:sft --workdir runs/ip2p \\
      --job widen --config.model.path=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --config.export.path=runs/ip2p_base
  python -m lpo_jax.main --config configs/lpo_edit_ip2p.py:sft --workdir runs/ip2p \\
      --config.model.path=runs/ip2p_base --config.data.path=...  (--job cache, train, export)
  python -m lpo_jax.main --config configs/lpo_edit_ip2p.py --workdir runs/ip2p_lpo \\
      --config.model.path=runs/ip2p/export --config.data.path=...   (the same jobs)

Presets: `sft`, `lpo` (the default), `dpo` at 256 pixels; `sft_512`, `lpo_512`, `dpo_512`.
Without a run of one's own, model.path=timbrooks/instruct-pix2pix is the published editor.

Hardware and hours: InstructPix2Pix's authors used 8 A100 (40 GB) for 25.5 hours for `sft`
(arXiv:2211.09800, appendix A); LPO's and DPO's are unpublished; none was run by us.
Expected: LPO's win rates over DPO are 4.3 points higher by DINO, 3.6 by CLIP and 3.8 by L1
(arXiv:2510.01540, as secondary sources quote it); `sft`'s curves of CLIP direction against
image similarity are figures of the InstructPix2Pix paper.

`sft` has the numbers of that appendix: 10,000 updates of 1,024 edits at 256 pixels, learning
rate 1e-4 without warmup, random mirroring. Its random crops (resized to 256 to 288) are not
reproduced: images are cached once, cropped in the middle. EMA, optimizer and decay are those
of the latent diffusion code that it says to have adopted. Dropout of text, image and both is
5 % each (section 3.2.1). 512 pixels for training is unpublished: ours, for GPUs and TPUs that
can; the authors train at 256 and sample at 512.

Of LPO on edits neither the rankings, beta, learning rate, batch nor steps are published:
these are Diffusion-DPO's for SD 1.5 (configs/dpo_sd15.py), with its batch divided by 16,
chosen because rankings of edits are few (HIVE has 3.6 thousand). Sampling: 100 steps of
Euler ancestral, text 7.5, image 1.5 (edit_cli.py; the scales are diffusers' defaults too).
"""

from lpo_jax.configs import dpo_sd15
from lpo_jax.errors import unknown_name

METHODS = ("sft", "lpo", "dpo")
PRESETS = tuple(f"{method}{size}" for size in ("", "_512") for method in METHODS)


def get_config(preset: str = ""):
  """Returns one stage at one resolution; see above."""
  if preset and preset not in PRESETS:
    raise unknown_name("preset", preset, PRESETS)
  method, _, size = (preset or "lpo").partition("_")
  config = dpo_sd15.get_config()
  config.data.resolution = int(size or 256)
  config.data.flip = (
    "list"  # with the source; each image by itself would break the edit
  )
  config.data.caption_dropout = 0.05
  config.data.source_dropout = 0.05
  config.data.both_dropout = 0.05
  config.eval.sampler = "euler_ancestral"
  config.eval.steps = 100
  config.eval.guidance_scale = 7.5
  config.eval.image_guidance_scale = 1.5
  config.eval.scorers = (
    "clip_direction",
    "clip_image_source",
    "dino_source",
    "l1_source",
  )
  if method == "sft":
    config.objective = {"name": "sft"}
    config.data.strategy = "winners"
    config.train.images_per_update = 1024
    config.train.total_steps = 10_000
    config.train.learning_rate = 1e-4
    config.train.warmup_steps = 0
    config.train.clip_norm = 0.0  # latent diffusion's trainer does not clip
    config.train.ema = 0.9999
    config.train.ema_schedule = "ramp"
    return config
  config.train.images_per_update = 256  # 4096 / 16
  config.train.warmup_steps = 100
  config.train.total_steps = 500
  if method == "lpo":
    config.objective = {"name": "lpo", "beta": 5000.0}
    config.data.strategy = "levels"  # a ranking as it is
    config.data.ties = "keep"
  return config
