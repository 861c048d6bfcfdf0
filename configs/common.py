"""Defaults that every config starts from, with their sources.

A config is a Python file with `get_config(arg="")` that returns this tree with its own
values. Keys that are not here are refused, with the nearest one that is.
"""

import ml_collections
from ml_collections.config_dict import placeholder

# Sections whose keys are a function's options: the function refuses the unknown ones.
OPEN_SECTIONS = (
  "objective",
  "noising",
  "online",
  "weighting",
  "quickstart",
  "data.mixture",
  "train.optimizer_args",
  "eval.candidates",
  "inspect.limits",
)


def get_config() -> ml_collections.ConfigDict:
  """Returns a fresh, locked tree: Diffusion-DPO's released settings where it has any."""
  config = ml_collections.ConfigDict()
  config.job = "train"  # what main does when --job is not given
  config.seed = 0

  config.model = ml_collections.ConfigDict(
    {
      # A diffusers pipeline, as a folder or an id on the Hub ("owner/name@revision"):
      # policy, reference, VAE, text encoders, scheduler.
      "path": "",
      "dtype": "bfloat16",  # of activations; parameters and losses are fp32
      "remat": "none",  # none | dots | blocks | full: what is computed again, not kept
      "scan": "stacks",  # stacks: equal blocks in a row are one loop | none: unrolled
      "attention": "auto",  # auto | xla | chunked | cudnn | flash: models/attention.py
      # Last layers of the text encoders that are left out; diffusers' word and meaning.
      "clip_skip": 0,
      # Encode and decode larger images in tiles of so many pixels, for memory; 0: never.
      "vae_tile": 0,
      # Train A and B of W + (alpha / rank) A B instead of W; docs/lora.md.
      "lora": ml_collections.ConfigDict(
        {
          "rank": 0,  # 0: train all weights
          "alpha": placeholder(float),  # None: the rank, as diffusers' scripts
          # (regex, True | False | a rank of its own) over names; diffusers' four matrices
          "targets": (
            (r"\.attn[12]\.to_(q|k|v|out\.0)\.kernel$", True),
            (r".*", False),
          ),
          "init": "kaiming",  # of A; PEFT's default | gaussian: as diffusers' scripts
          "path": "",  # go on from this LoRA file; its ranks, alphas and targets count
        }
      ),
    }
  )
  config.data = ml_collections.ConfigDict(
    {
      "path": "",  # file or folder with what people judged; also gs://, s3://, hf://
      "images": "",  # parquet, archives or folder with the images, if not in the former
      "source": "auto",  # auto, by the columns, or a name in docs/data.md
      "split": placeholder(str),
      "cache": "",  # folder of encoded images; empty: <workdir>/cache; None: no cache
      "cache_dtype": "float16",  # of the records: float16 (8 times finer) | bfloat16
      "strategy": "levels",  # paths | levels | choice | pairs | scores; docs/data.md
      "max_list_size": 8,  # Diffusion-LPO: 95 % of Pick-a-Pic's lists are no longer
      "group_by": "prompt",  # prompt | prompt_user
      "ties": "keep",  # keep | drop
      "weight": "uniform",  # uniform | num_example_per_prompt
      "tie_tolerance": 0.0,  # scores, or shares of a win, this close are a tie
      "ranks": "given",  # given | reversed (NPO) | shuffled (a control)
      "resolution": 512,
      "max_pixels": 100_000_000,  # larger ones are bad images; ours: 300 MB decoded
      "max_bad_images": 0.01,  # stop when more than this share cannot be decoded
      "caption_dropout": 0.2,  # Diffusion-DPO train.py --proportion_empty_prompts
      # Mirrored with probability 1/2. off, ours | list: all images of a list or none |
      # independent: each by itself, as Diffusion-DPO's script within a pair
      "flip": "off",
      # What SDXL is told of sizes. resolution: [res, res, 0, 0, res, res], as Diffusion-
      # DPO's train.py | original: true size and crop, as diffusers' SDXL DPO, MaPO, DRO
      "time_ids": "resolution",
      # name -> share and what differs from the keys above: several sources in one run
      "mixture": ml_collections.ConfigDict(),
    }
  )
  # `beta` in code units; the objective's own options go beside it.
  config.objective = ml_collections.ConfigDict({"name": "lpo", "beta": 5000.0})
  config.noising = ml_collections.ConfigDict({"name": "forward"})
  # The policy's own samples beside experts (Diffusion-DRO): steps, refresh_every,
  # buffer_size, rollouts_per_update; empty for methods that learn from data alone.
  config.online = ml_collections.ConfigDict()
  # uniform | decay | min_snr | sigmoid: how much a timestep counts, for any objective
  config.weighting = ml_collections.ConfigDict({"name": "uniform"})

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
      # constant | ramp: min(ema, (1 + n) / (10 + n)) after n updates, diffusers' EMAModel
      "ema_schedule": "constant",
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
      "candidates": ml_collections.ConfigDict(),  # name -> run, diffusers folder, LoRA
      "baseline": "base",  # whom win rates are against
      "sampler": "ddim",
      "steps": 50,
      "guidance_scale": 7.5,
      "eta": 0.0,
      # Noise levels of dpmpp_2m, dpmpp_2m_sde and euler: auto, as the pipeline's
      # scheduler_config.json has it | schedule | karras
      "sigmas": "auto",
      "seeds": 1,  # images per prompt, from seed 0 on
      "first_seed": 0,
      "batch_size": 16,
    }
  )
  config.export = ml_collections.ConfigDict(
    {
      # pipeline, merged: a whole diffusers folder | unet: unet/ alone | lora: a file of
      # the factors; a run without them gets the nearest ones of `rank`
      "kind": "pipeline",
      "path": "",  # empty: <workdir>/export, or <workdir>/lora
      "format": "peft",  # of a LoRA file: peft (diffusers) | kohya (A1111, Forge, Comfy)
      "rank": 64,  # of all kernels, where factors are extracted; ours
      "dtype": "float32",  # of a LoRA file: float32 | float16 | bfloat16
    }
  )
  config.select = ml_collections.ConfigDict(
    {
      "by": "score",  # score | wins | uids: which images of data.path are experts
      "count": 500,  # Diffusion-DRO, section 5: the best 500 of Pick-a-Pic v2
      "scorer": "",  # who scores; empty: the source's own scores
      "uids": "",  # a text file of image uids, one a line
      "path": "",  # empty: <workdir>/experts.parquet
    }
  )
  # Drawn as `eval` says.
  config.generate = ml_collections.ConfigDict(
    {
      "prompts": placeholder(object),  # a file of prompts, or a tuple of texts
      "policy": "",  # diffusers or run folder whose UNet draws; empty: model.path
      "images_per_prompt": 4,  # as RankDPO's Syn-Pic, there of four models
      "first_seed": 0,
      "scorers": (),  # who ranks; several: by the share of the others that they beat
      "tie_tolerance": 0.0,  # scores this close are a tie
      "path": "",  # empty: <workdir>/lists.parquet
    }
  )
  config.inspect = ml_collections.ConfigDict(
    {"max_images": 2000, "limits": ml_collections.ConfigDict()}
  )
  config.quickstart = (
    ml_collections.ConfigDict()
  )  # the quickstart's world, if it is one
  return config.lock()
