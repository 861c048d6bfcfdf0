"""Defaults that every config starts from, with their sources.

A config is a Python file with `get_config(arg="")` that returns this tree with its own
values. Keys that are not here are refused, with the nearest one that is.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
  """Returns a fresh, locked tree: Diffusion-DPO's released settings where it has any."""
  config = ml_collections.ConfigDict()
  config.job = "train"  # what main does when --job is not given
  config.seed = 0

  config.model = ml_collections.ConfigDict(
    {
      "path": "",  # a diffusers pipeline folder: policy, reference, VAE, text, scheduler
      "dtype": "bfloat16",  # of activations; parameters and losses are fp32
      "remat": "none",  # none | blocks | full
      "attention": "auto",
    }
  )
  config.data = ml_collections.ConfigDict(
    {
      "path": "",  # parquet file or folder with what people judged
      "source": "auto",  # auto | pickapic | lists | tfds
      "split": placeholder(str),
      "cache": "",  # folder of encoded images; empty: <workdir>/cache
      "strategy": "levels",  # paths | levels | choice | pairs
      "max_list_size": 8,  # Diffusion-LPO: 95 % of Pick-a-Pic's lists are no longer
      "group_by": "prompt",  # prompt | prompt_user
      "ties": "keep",  # keep | drop
      "weight": "uniform",  # uniform | num_example_per_prompt
      "resolution": 512,
      "max_bad_images": 0.01,  # stop when more than this share cannot be decoded
      "caption_dropout": 0.2,  # Diffusion-DPO train.py --proportion_empty_prompts
    }
  )
  # `beta` in code units; the objective's own options go beside it.
  config.objective = ml_collections.ConfigDict({"name": "lpo", "beta": 5000.0})
  config.noising = ml_collections.ConfigDict({"name": "forward"})

  config.train = ml_collections.ConfigDict(
    {
      "images_per_update": 256,  # S: methods are compared at equal images, not lists
      "microbatch": 0,  # slots that go through the UNet at once; 0: all
      "total_steps": 2000,
      "optimizer": "adamw",
      "optimizer_args": ml_collections.ConfigDict(),
      "learning_rate": 2e-5,  # effective: nothing multiplies it (papers.md pitfall P2)
      "warmup_steps": 500,  # Diffusion-DPO's SD1.5 launcher
      "clip_norm": 1.0,
      "decay": ((".*", True),),  # torch's AdamW decays everything
      "trainable": ((".*", True),),
      "ema": 0.0,  # decay of the running mean that is exported; 0: none
      "on_nonfinite": "stop",  # stop | skip
      "checkpoint_every": 500,
      "keep_last": 2,
      "log_every": 1,
      "max_minutes": 0.0,  # stop resumably (exit 3) after this; 0: no budget
    }
  )
  config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1})

  config.eval = ml_collections.ConfigDict(
    {
      "prompts": placeholder(object),  # a file of prompts, or a tuple of texts
      "every": 0,  # draw `samples/` every so many updates while training; 0: never
      "scorers": (),
      "candidates": ml_collections.ConfigDict(),  # name -> diffusers or run folder
      "baseline": "base",  # whom win rates are against
      "sampler": "ddim",
      "steps": 50,
      "guidance_scale": 7.5,
      "eta": 0.0,
      "seeds": 1,  # images per prompt, from seed 0 on
      "first_seed": 0,
      "batch_size": 16,
    }
  )
  config.export = ml_collections.ConfigDict(
    {
      "kind": "pipeline",  # pipeline: a whole diffusers folder | unet: unet/ alone
      "path": "",  # empty: <workdir>/export
    }
  )
  config.inspect = ml_collections.ConfigDict(
    {"max_images": 2000, "limits": ml_collections.ConfigDict()}
  )
  config.quickstart = (
    ml_collections.ConfigDict()
  )  # the quickstart's world, if it is one
  return config.lock()
