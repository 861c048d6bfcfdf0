"""How published rows were measured, for configs/repro_*.py; docs/reproduction.md."""

from lpo_jax.errors import unknown_name

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def preset(name: str, known):
  """Returns the preset of this name; without one the first.

  Raises:
    UserError: an unknown name.
  """
  if name and name not in known:
    raise unknown_name("preset", name, known)
  return known[name or next(iter(known))]


def head_to_head(config, *, base: str, checkpoint: str, guidance: float):
  """Each image against the base's of the same prompt and seed.

  Diffusion-DPO's: one image a prompt, 50 steps, its notebook's guidance. The sampler is
  the pipeline's own there (PNDM of SD 1.5, Euler of SDXL); DDIM is the nearest to PNDM
  that is here.
  """
  config.model.path = base
  with config.unlocked():
    config.eval.candidates = {"base": base}
    if checkpoint:
      config.eval.candidates["published"] = checkpoint
  config.eval.sampler = "euler" if base == SDXL else "ddim"
  config.eval.steps = 50
  config.eval.guidance_scale = guidance
  config.eval.seeds = 1
  config.eval.protocols = ("same_seed",)
  # HPS v2.0, CLIP H/14, aesthetics v2 and PickScore are those of its repository.
  config.eval.scorers = ("pickscore", "hps_v2", "clip_score_h14", "image_reward")
  config.eval.prompts = "pickapic_v2_test_unique"
  return config


def median_of_five(config, *, checkpoint: str):
  """Of five images the one with the median PickScore (Diffusion-DRO, section 5.1).

  DDPM, 50 steps, guidance 7.5, HPS v2.0, CLIP H/14; the aesthetics are v1, whose head is
  in no repository of the Hub: docs/scorers.md says how to give it.
  """
  config = head_to_head(config, base=SD15, checkpoint=checkpoint, guidance=7.5)
  config.eval.sampler = "ddpm"
  config.eval.seeds = 5
  config.eval.protocols = ("median_of_k",)
  config.eval.median_by = "pickscore"
  return config
