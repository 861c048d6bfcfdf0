"""Editing quickstart: an editor by `sft`, its edits ranked, `lpo` and `dpo`, on a CPU.

Reproduces nothing published: it shows the whole way of an InstructPix2Pix editor, from a
model that draws to a preference-tuned editor, on real handwritten digits.

  python -m lpo_jax.main --config configs/edit_quickstart.py --workdir runs/edit_quickstart

Hardware: 2 CPU cores, at most 6 minutes. Expected: LPO wins 85 to 93 % against the SFT
editor under the edit scorer, with an interval above 75 %, and keeps as many digits but for
a point. `:smoke` is the same in under 2 minutes, with too few images for any claim.

Dropout of text, image and both by 5 % each is InstructPix2Pix's (section 3.2.1). Numbers
without a source are unpublished; chosen on this world by trial, see docs/editing.md.
"""

from lpo_jax.configs import quickstart


def get_config(size: str = ""):
  """Returns the full editing quickstart, or the one for smoke tests."""
  config = quickstart.get_config(size)
  with config.unlocked():
    config.quickstart = {
      "make": "report",
      "world": "edits",
      "crowd_edits": 2000,
      "crowd_does": (
        0.0,
        1.4,
      ),  # of what is asked, evenly between: too little, too much
      "held_out_sources": 50,  # each is evaluated with every instruction
      "sessions": 300,
      "images_per_session": 5,
      "temperature": 0.02,  # of the edit scorer: its spread within a session
      "publish": "lpo",
      # The run that makes the editor.
      "sft": {
        "train": {
          "total_steps": 350,
          "learning_rate": 1e-3,
          "ema": 0.99,
          "checkpoint_every": 350,
          "keep_last": 1,
        },
      },
      "methods": {
        "lpo": {"objective": {"name": "lpo"}},
        "dpo": {"objective": {"name": "dpo"}, "data": {"strategy": "pairs"}},
      },
    }
  config.data.source = "lists"
  config.data.strategy = "levels"  # a ranking as it is
  config.data.caption_dropout = 0.05
  config.data.source_dropout = 0.05
  config.data.both_dropout = 0.05
  config.eval.baseline = "sft"
  config.eval.prompts = None  # the held-out digits; the quickstart writes them
  config.eval.seeds = 1
  config.eval.scorers = ("digits_edit", "digits_kept", "l1_target")
  config.eval.guidance_scale = 2.0
  config.eval.image_guidance_scale = 1.5
  if size == "smoke":
    with config.unlocked():
      config.quickstart.crowd_edits = 64
      config.quickstart.held_out_sources = 4
      config.quickstart.sessions = 16
      config.quickstart.sft.train.total_steps = 12
      config.quickstart.sft.train.checkpoint_every = 12
  return config
