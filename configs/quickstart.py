"""The quickstart: digits, simulated people, LPO and DPO, and a report, on a CPU.

Reproduces nothing published: it shows the whole way from judgements to an aligned
diffusers pipeline on real images, in minutes.

  python -m lpo_jax.main --config configs/quickstart.py --workdir runs/quickstart

Hardware: 2 CPU cores, at most 8 minutes. Expected: LPO's win rate over base under the
taste at least 0.85 with an interval above 0.8, legibility within 2 points of the base;
DPO's win rate between 0.7 and 0.95. `:smoke` is the same in under 2 minutes, with too
few images for any claim.

Numbers without a source are unpublished; chosen on this world by trial, see
docs/quickstart.md.
"""

from lpo_jax.configs import common
from lpo_jax.errors import unknown_name
from lpo_jax.scoring import digits

SIZES = ("", "smoke")


def get_config(size: str = ""):
  """Returns the full quickstart, or the one for smoke tests."""
  if size not in SIZES:
    raise unknown_name("size of the quickstart", size, SIZES)
  config = common.get_config()
  config.job = "quickstart"
  config.model.dtype = "float32"  # bf16 gains nothing on CPUs

  with config.unlocked():
    config.quickstart = {
      "make": "report",  # report | base
      "sessions": 400,
      "images_per_session": 5,
      "judging": "compare",  # compare: two at a time, the winner stays | rank: all
      "users": 24,
      "temperature": 0.5,  # of the taste: its spread within a session, so 3 in 4 agree
      "tie_rate": 0.3,
      "publish": "lpo",  # the method whose model is exported
      # What differs between the methods; all else is shared, images above all.
      "methods": {
        "lpo": {"objective": {"name": "lpo"}},
        "dpo": {"objective": {"name": "dpo"}, "data": {"strategy": "pairs"}},
      },
    }
  config.data.resolution = digits.SIZE
  config.data.strategy = "paths"  # as the Diffusion-LPO paper builds its lists
  config.data.max_list_size = 8
  config.data.caption_dropout = 0.1
  config.objective.beta = 2000.0  # Diffusion-DPO's SD1.5 value, code units

  config.train.images_per_update = 64
  config.train.total_steps = 150
  config.train.learning_rate = 8e-5
  config.train.warmup_steps = 20
  # A mean over the last 20 or so updates: single ones scatter by several points.
  config.train.ema = 0.95
  config.train.checkpoint_every = 10
  config.train.keep_last = 15  # all: the report looks for equal drift among them

  config.eval.prompts = tuple(digits.prompts(digits.HELD_OUT_PHRASES))
  config.eval.seeds = 20
  config.eval.scorers = ("digits_taste", "digits_legibility")
  config.eval.steps = 10
  config.eval.guidance_scale = 2.0
  config.eval.batch_size = 100
  if size == "smoke":
    with config.unlocked():
      config.quickstart.sessions = 40
    config.train.total_steps = 12
    config.train.checkpoint_every = 6
    config.train.warmup_steps = 2
    config.eval.seeds = 2
    config.eval.steps = 6
    config.eval.batch_size = 40
  return config
