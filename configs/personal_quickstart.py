"""The personal quickstart: one model for people of opposed tastes, on a CPU.

Reproduces nothing published: it shows the whole way from judgements by people to a model
that is told who it draws for, on real images, in minutes.

  python -m lpo_jax.main --config configs/personal_quickstart.py --workdir runs/personal

Hardware: 2 CPU cores, at most 6 minutes. Expected, for people never trained on: win rate
over the model told of nobody 0.79 to 0.84, over itself told of another person 0.71 to
0.80, each with an interval above 0.6 (three seeds: docs/personal.md). `:smoke` is the same
in about a minute, with too few people for any claim.

Numbers without a source are unpublished; chosen on this world by trial, see
docs/personal.md.
"""

from lpo_jax.configs import quickstart
from lpo_jax.models import users

SIZES = quickstart.SIZES


def get_config(size: str = ""):
  """Returns the full quickstart, or the one for smoke tests."""
  config = quickstart.get_config(size)
  with config.unlocked():
    config.quickstart = {
      "make": "report",
      "world": "personal",
      "users": 600,
      "sessions": 16,  # of each person, under other prompts
      "images_per_prompt": 30,  # the pool that all choose from; 40 prompts
      "images_per_session": 5,
      "temperature": 0.3,  # a third of a spread of the taste among drawings of one prompt
      "tie_rate": 0.3,
      "shown_held_in": 12,  # people that are drawn for in the evaluation, at most
      "shown_held_out": 60,
      "publish": "personal",
      # The same judgements, updates and images. `personal` trains what a UNet has for
      # people and leaves the base; `common` is told of nobody, and trains all the rest as
      # configs/quickstart.py does.
      "methods": {
        "personal": {
          "train": {
            "trainable": ((users.ADAPTER, True), (r".*", False)),
            "learning_rate": 3e-3,
          }
        },
        "common": {
          "data": {"user_embeds": None, "user_dropout": 0.0},
          "train": {"trainable": ((users.ADAPTER, False), (r".*", True))},
        },
      },
    }
  config.widen.kind = "users"
  config.widen.user_dim = 64  # 8 x 8 grey levels
  config.users.encoder = "pixels"
  config.users.form = "difference"
  config.data.few_shot = 24
  config.data.held_out_users = 0.25
  config.data.user_dropout = 0.1
  config.data.group_by = "prompt_user"
  config.data.strategy = "levels"

  config.train.total_steps = 360
  config.train.checkpoint_every = 60
  config.train.keep_last = 1

  config.eval.prompts = None  # the world's: for whom what is drawn
  config.eval.seeds = 1
  config.eval.scorers = ("digits_person", "digits_legibility")
  config.eval.baseline = "common"
  with config.unlocked():
    config.eval.told = {
      "another": "another",
      "common": "nobody",
      "base": "nobody",
    }
  if size == "smoke":
    with config.unlocked():
      config.quickstart.update(
        {"users": 24, "sessions": 6, "images_per_prompt": 6, "shown_held_out": 6}
      )
      config.quickstart.shown_held_in = 3
    config.data.few_shot = 6
    config.train.total_steps = 12
    config.train.checkpoint_every = 6
  return config
