"""Diffusion-LPO's objective on PPD's conditioning: one SD 1.5 that is told whom it is for.

  python -m lpo_jax.main --config configs/lpo_personal_sd15.py --workdir runs/personal \\
      --config.model.path=runs/personal/personal_base --config.data.path=PICKAPIC
      (first --job widen with the original pipeline as model.path; then --job users with
      --config.data.user_embeds=runs/personal/user_embeds.npz, which the others get too;
      then --job cache, train, evaluate, and --job export)

Hardware and hours: unpublished; not yet run by us. Expected: unpublished for this
encoder. With PPD's (LLaVA-OneVision) the paper reports win rates of 72.3 % for people
trained on and 80.2 % for others, where the pairwise loss has 71.1 % and 70.3 %
(arXiv:2510.01540, as secondary sources quote it; judged by a vision-language model).

What is known of PPD (arXiv:2501.06655): keys and values of a decoupled cross-attention
and a projector are trained alone, four past judgements of a person make the embedding,
AdamW at 1e-5, 768 pairs an update, one epoch of Pick-a-Pic v2, people withheld for
guidance; there on Stable Cascade. On SD 1.5 its user embedding, its share of withheld
people and its beta are unpublished.
"""

from lpo_jax.configs import lpo_sd15
from lpo_jax.models import users


def get_config():
  """Returns lpo_sd15 with people, an adapter for them, and a frozen base."""
  config = lpo_sd15.get_config()
  config.widen.kind = "users"
  config.widen.user_dim = 2048  # two means of ViT-H/14's 1024, side by side
  config.widen.user_tokens = 4  # IP-Adapter's, which diffusers loads; PPD's unpublished
  config.users.encoder = "clip"
  config.users.form = "means"  # ours: PPD's encoder is a vision-language model
  config.data.few_shot = 4  # PPD: N = 4
  config.data.group_by = "prompt_user"  # PPD: both images of a pair are one person's
  config.data.user_dropout = 0.05  # IP-Adapter's for images; PPD's unpublished
  config.data.held_out_users = 0.05  # unpublished; ours
  config.train.trainable = ((users.ADAPTER, True), (r".*", False))  # PPD
  config.train.images_per_update = 1536  # PPD: 768 pairs
  config.train.microbatch = 64  # ours: any divisor gives the same update
  config.train.total_steps = 1100  # PPD: one epoch, 0.85 million pairs
  config.train.learning_rate = 1e-5  # PPD
  config.train.warmup_steps = 0  # unpublished; ours
  config.eval.scorers = ("pickscore", "hps_v2.1")  # of the image, not of the person
  return config
