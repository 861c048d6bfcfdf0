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
  "eval.scorer_paths",
  "eval.told",
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
      "held_out": 0.0,  # share of the prompts whose lists are never trained on
      # Who judged, docs/personal.md: a file of embeddings by person (--job users makes
      # one); None: people are not told apart. Lists need group_by=prompt_user
      "user_embeds": placeholder(str),
      "user_missing": "refuse",  # people without: refuse | nobody: trained as zeros
      # Lists trained as nobody's, for guidance; IP-Adapter's 0.05, PPD's unpublished
      "user_dropout": 0.0,
      # Clear judgements of each person that are in no list: what --job users reads; PPD: 4
      "few_shot": 0,
      "held_out_users": 0.0,  # share of the people whose lists are never trained on
      "caption_dropout": 0.2,  # Diffusion-DPO train.py --proportion_empty_prompts
      # Of edits, with the image to edit withheld and with both withheld; InstructPix2Pix:
      # 0.05 each, as the caption alone
      "source_dropout": 0.0,
      "both_dropout": 0.0,
      # After so many epochs a list meets its timestep, noise and views again; 0: never
      "draws": 0,
      # The reference's errors: None: computed in the step | "": <workdir>/reference, or a
      # folder, where --job reference put them
      "reference": placeholder(str),
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
      # (regex, True | False) over names; what is not trained is in no checkpoint
      "trainable": ((".*", True),),
      "ema": 0.0,  # decay of the running mean that is exported; 0: none
      # constant | ramp: min(ema, (1 + n) / (10 + n)) after n updates, diffusers' EMAModel
      "ema_schedule": "constant",
      # What is done where a run goes wrong, docs/resume.md; the numbers are ours.
      # A loss or gradient that is NaN or infinite: stop | skip the update | rollback
      "on_nonfinite": "stop",
      # loss, err or update_norm above so many times its running median for so many steps
      # in a row: off | warn | stop | rollback
      "on_runaway": "warn",
      "runaway_factor": 5.0,
      "runaway_steps": 5,
      # rollback: the last good checkpoint, the learning rate times this, so often a run
      "rollback_factor": 0.5,
      "max_rollbacks": 3,
      # What a run with a finite loss can do wrong, docs/alarms.md. Each: off | warn |
      # lower_lr (times rollback_factor) | cap_margin (of runaway_margin) | rollback |
      # stop. Bounds are shares of the reference's error, ours.
      "alarms": ml_collections.ConfigDict(
        {
          "window": 5,  # updates whose median is judged
          "winner_worse": "warn",  # best images denoised worse than by the reference
          "winner_worse_above": 0.05,
          "runaway_margin": "warn",  # margin_p90
          "runaway_margin_above": 0.5,
          "drift": "warn",
          "drift_above": 0.2,
          # trained_scorer above its first run point's, unseen_scorer below by this share
          "reward_hacking": "warn",
          "reward_hacking_above": 0.1,
          "trained_scorer": "",  # of eval.scorers; empty: no such alarm
          "unseen_scorer": "",
        }
      ),
      "checkpoint_every": 500,
      "keep_last": 2,
      "keep_every": 0,  # keep for good the checkpoints of steps this divides; 0: none
      "keep_best": 0,  # keep besides so many of the best by best_metric
      "best_metric": "",  # a score or a metric of metrics.jsonl; "-loss": less is better
      # Say where a run hangs in which no step completes for so long; 0: no watchdog. Ours.
      "hang_minutes": 30.0,
      "on_hang": "report",  # report | exit, with 3, so that a scheduler starts it again
      "log_every": 1,
      "max_minutes": 0.0,  # stop resumably (exit 3) after this; 0: no budget
    }
  )
  # What each choice costs: docs/sharding.md.
  config.mesh = ml_collections.ConfigDict(
    {
      "data": -1,  # groups of devices that each hold a copy; -1: what is left
      "fsdp": 1,  # devices that share one: parameters, moments and EMA are split
      "slices": -1,  # with a slow network between them; -1: as TPUs say themselves
      "parameters": "sharded",  # sharded | replicated: moments and EMA alone (ZeRO-1)
      "reference": "auto",  # sharded | replicated | auto: replicated if small
      "offload": (),  # of "ema" and "reference", what is kept in the host's memory
    }
  )

  config.eval = ml_collections.ConfigDict(
    {
      # A file of prompts, a tuple of texts, or a published set: docs/evaluation.md
      "prompts": placeholder(object),
      "prompts_sha256": "",  # what the set's hash must be; empty: taken as it comes
      # Run points: draw and score `samples/` every so many updates of a run; 0: never
      "every": 0,
      "held_out": 0,  # lists of data.held_out whose order is judged there; 0: none
      "scorers": (),
      # scorer -> file, folder or Hub id of its weights ("_" for "." in its name), or
      # -> {path, tokenizer, ...}; those not here are the published ones: docs/scorers.md
      "scorer_paths": ml_collections.ConfigDict(),
      # name -> run (run@STEP, run:raw), diffusers folder, Hub id, LoRA, folder of images
      "candidates": ml_collections.ConfigDict(),
      "baseline": "base",  # whom win rates are against
      # candidate -> whom it is told of, where prompts are for people: own (each row's; the
      # default) | another (the next person in a fixed order) | nobody
      "told": ml_collections.ConfigDict(),
      "sampler": "ddim",
      "steps": 50,
      "guidance_scale": 7.5,
      # Of an editing UNet, how much more it keeps to the source; InstructPix2Pix's
      # edit_cli.py and diffusers' pipeline
      "image_guidance_scale": 1.5,
      # How much a person counts, where the UNet knows people (diffusers'
      # set_ip_adapter_scale): 1 as trained, 0 nobody
      "user_scale": 1.0,
      "eta": 0.0,
      # Noise levels of dpmpp_2m, dpmpp_2m_sde and euler: auto, as the pipeline's
      # scheduler_config.json has it | schedule | karras
      "sigmas": "auto",
      "seeds": 1,  # images per prompt, from seed 0 on
      "first_seed": 0,
      "batch_size": 16,
      # same_seed (Diffusion-DPO) | median_of_k (Diffusion-DRO), or both
      "protocols": ("same_seed",),
      "median_by": "",  # whose median; empty: each scorer its own (DRO: PickScore)
      "correction": "holm",  # of the sign tests' p values: holm | bonferroni | none
      "missing": "refuse",  # images that a folder lacks: refuse | leave_out, for all
      "gallery_mb": 28.0,  # largest gallery.html; 0: none
    }
  )
  config.export = ml_collections.ConfigDict(
    {
      # pipeline, merged: a whole diffusers folder | unet: unet/ alone | lora: a file of
      # the factors; a run without them gets the nearest ones of `rank` | ip_adapter: a
      # file of what is told people apart with; beside a pipeline or unet in any case
      "kind": "pipeline",
      "path": "",  # empty: <workdir>/export, or <workdir>/lora
      "format": "peft",  # of a LoRA file: peft (diffusers) | kohya (A1111, Forge, Comfy)
      "rank": 64,  # of all kernels, where factors are extracted; ours
      "dtype": "float32",  # of a LoRA file: float32 | float16 | bfloat16
      # Of the model card: the licence, if not the base's; the workdir of the evaluation
      # that it shows, if not the run's own.
      "licence": "",
      "evaluation": "",
      "push_to": "",  # "owner/name" on the Hub; empty: nothing leaves this machine
      "private": True,  # if that makes a repository; ours: nothing is public unasked
    }
  )
  # What --job widen makes a UNet of model.path take besides a text.
  config.widen = ml_collections.ConfigDict(
    {
      "kind": "edits",  # edits: an image to edit | users: who it is for, docs/personal.md
      "user_dim": 0,  # width of a user's embeddings
      # The projector makes so many tokens of each; IP-Adapter's number, the one diffusers
      # loads. 0: no projector, the embeddings are the tokens
      "user_tokens": 4,
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
  # --job users: people's few judgements -> data.user_embeds, docs/personal.md
  config.users = ml_collections.ConfigDict(
    {
      "encoder": "clip",  # clip: image embeddings, unit vectors | pixels: 8 x 8 grey
      # The encoder's folder or Hub id; IP-Adapter's SD1.5 encoder is the same network
      "model": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
      # means: of the preferred beside that of the others | difference: of these two means
      # | pairs: each example's two images side by side, K of them. Ours: PPD's is a VLM's
      "form": "means",
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
  config.plan = ml_collections.ConfigDict(
    {
      # What to compile for, separated by commas: v5e:2x4 (a chip and its torus), v5e-8
      # (the vendor's name), v5p, v6e, or cpu:8; docs/tpu.md
      "topology": "",
      "search": False,  # also compile other remat, microbatch, fsdp: the fastest that fits
      # quick: little of the compiler's work within kernels | full: as a run is compiled,
      # tens of minutes | none: trace only, temporaries stay unknown
      "effort": "quick",
    }
  )
  # metrics.jsonl and TensorBoard are always written.
  config.logging = ml_collections.ConfigDict(
    {
      # Project of Weights & Biases that gets the rows of metrics.jsonl as well, if its
      # package is there; empty: none. WANDB_MODE=offline is theirs.
      "wandb": "",
      "report": "report.html",  # the page of a training run, in its workdir; empty: none
    }
  )
  config.inspect = ml_collections.ConfigDict(
    {"max_images": 2000, "limits": ml_collections.ConfigDict()}
  )
  config.quickstart = (
    ml_collections.ConfigDict()
  )  # the quickstart's world, if it is one
  return config.lock()
