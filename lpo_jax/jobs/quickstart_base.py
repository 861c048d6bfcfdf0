"""Makes the quickstart's base model: a small SD-shaped pipeline, from real digits.

Everything is a diffusers folder from the first moment: random weights first, then the
autoencoder trained on the digits, then the UNet by the ordinary cache and train jobs with
the `sft` objective. The text encoder stays random: ten words need no learning.
"""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from lpo_jax import console, models, parallel, pretrained, trees
from lpo_jax.jobs import cache, candidates, export, sampling, train
from lpo_jax.jobs.quickstart_people import encode_png
from lpo_jax.scoring import digits
from lpo_jax.types import Params


def write_tokenizer(folder: pathlib.Path, *, max_length: int) -> int:
  """Trains a CLIP-style byte-pair tokenizer on the digits' prompts; returns its size."""
  from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

  tokenizer = Tokenizer(
    models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>")
  )
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(r"\s+"), "removed"),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=2048,
    end_of_word_suffix="</w>",
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|startoftext|>", "<|endoftext|>"],
    show_progress=False,
  )
  phrases = (*digits.TRAIN_PHRASES, *digits.HELD_OUT_PHRASES)
  tokenizer.train_from_iterator(digits.prompts(phrases), trainer)
  learned = json.loads(tokenizer.to_str())["model"]
  # CLIP's order: every byte, every byte as a word's end, merges, then the two specials.
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [
    pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]
  ]
  words = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
  words += [merge.replace(" ", "") for merge in merges]
  words += ["<|startoftext|>", "<|endoftext|>"]
  vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
  (folder / "merges.txt").write_text(
    "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
  )
  end = "<|endoftext|>"
  settings = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": max_length,
    "bos_token": "<|startoftext|>",
    "eos_token": end,
    "pad_token": end,
    "unk_token": end,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
  return len(vocab)


def write_blank_pipeline(
  folder: pathlib.Path, configs: dict[str, dict[str, Any]], *, seed: int
) -> None:
  """Writes a diffusers folder with random weights.

  Args:
    folder: created; files of the same names are replaced.
    configs: "unet", "vae", "text_encoder" and "scheduler" in their files' fields.
    seed: of the random weights.
  """
  text = dict(configs["text_encoder"])
  length = text["max_position_embeddings"]
  size = write_tokenizer(folder / "tokenizer", max_length=length)
  text |= {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
  text["pad_token_id"] = size - 1
  for name, config in {**configs, "text_encoder": text}.items():
    if name == "scheduler":
      continue
    model = models.build(config)
    params = model.init(seed)
    if name == "text_encoder":
      # A random encoder mostly says *where* a word stands; the UNet needs *which*.
      params = trees.map_named(
        lambda leaf, x: 10 * x if "token_embedding" in leaf else x, params
      )
    pretrained.save(folder, pretrained.Part(name, config, params, model))
  (folder / "scheduler").mkdir(parents=True, exist_ok=True)
  (folder / "scheduler" / "scheduler_config.json").write_text(
    json.dumps(configs["scheduler"], indent=2) + "\n", encoding="utf-8"
  )
  index = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
  (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def train_autoencoder(
  vae: pretrained.Part, images: np.ndarray, config: ml_collections.ConfigDict
) -> tuple[pretrained.Part, float]:
  """Fits the autoencoder: mean squared error plus a little KL, as latent diffusion does.

  Args:
    vae: random weights.
    images: [n, H, W, 3] uint8.
    config: {seed, steps, batch_size, learning_rate, kl_weight}.

  Returns:
    The trained part, with the `scaling_factor` that gives its latents unit variance
    (Rombach et al. 2022, appendix G), and its last reconstruction error.
  """
  pixels = images.astype(np.float32) / 127.5 - 1.0
  optimizer = optax.adam(
    optax.cosine_decay_schedule(config.learning_rate, config.steps)
  )

  def loss(params: Params, x: jax.Array, key: jax.Array):
    mean, logvar = jnp.split(vae.encode(params, x), 2, axis=-1)
    logvar = jnp.clip(logvar, -30.0, 20.0)
    noise = jax.random.normal(key, mean.shape)
    drawn = vae.decode(params, mean + jnp.exp(0.5 * logvar) * noise)
    error = jnp.mean(jnp.square(drawn - x))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return error + config.kl_weight * kl, error

  @jax.jit
  def step(params, opt_state, x, key):
    (_, error), grads = jax.value_and_grad(loss, has_aux=True)(params, x, key)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, error

  rows = np.random.default_rng(config.seed)
  params, opt_state, error = vae.params, optimizer.init(vae.params), jnp.nan
  progress = console.Progress("autoencoder", config.steps, "steps")
  for i in range(config.steps):
    x = pixels[rows.integers(0, len(pixels), config.batch_size)]
    params, opt_state, error = step(
      params, opt_state, x, jax.random.fold_in(jax.random.key(config.seed), i)
    )
    progress.update(i + 1, mse=float(error))
  encode = jax.jit(lambda x: jnp.split(vae.encode(params, x), 2, axis=-1)[0])
  means = np.concatenate([encode(pixels[i : i + 64]) for i in range(0, 512, 64)])
  new_config = {**vae.config, "scaling_factor": round(float(1.0 / means.std()), 5)}
  params = jax.tree.map(np.asarray, params)
  model = models.build(new_config)
  return pretrained.Part(vae.name, new_config, params, model), float(error)


def write_images(path: pathlib.Path, *, seed: int) -> None:
  """Writes the real digits as canonical lists of one image, each with a prompt."""
  import pyarrow as pa
  from pyarrow import parquet

  images, labels = digits.real_digits()
  phrases = (*digits.TRAIN_PHRASES, *digits.HELD_OUT_PHRASES)
  chosen = np.random.default_rng(seed).integers(len(phrases), size=len(images))
  rows = {
    "prompt": [
      phrases[p].format(digits.NAMES[label])
      for p, label in zip(chosen, labels, strict=True)
    ],
    "images": [[encode_png(image)] for image in images],
    "image_uids": [[f"digit-{i:04d}"] for i in range(len(images))],
    "ranks": [[0]] * len(images),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pa.table(rows), path)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Makes the base in `workdir/digits_base`; what is done already is kept.

  Args:
    config: `quickstart.base` holds the networks' configs and the autoencoder's
      training, `train` that of the UNet.
    workdir: gets the intermediate folders and the result.

  Returns:
    The folder of the finished pipeline, UNet and VAE in fp16.
  """
  base, blank = config.quickstart.base, workdir / "blank"
  images, _ = digits.real_digits()
  done = workdir / "autoencoder.json"
  if not done.exists():
    networks = json.loads(base.networks.to_json_best_effort())
    write_blank_pipeline(blank, networks, seed=config.seed)
    vae, error = train_autoencoder(
      pretrained.load(blank, "vae"), images, base.autoencoder
    )
    pretrained.save(blank, vae)
    done.write_text(json.dumps({"mse": error}) + "\n", encoding="utf-8")
  write_images(workdir / "digits.parquet", seed=config.seed)
  own = copy.deepcopy(config)
  own.job, own.model.path = "train", str(blank)
  own.data.path, own.data.source = str(workdir / "digits.parquet"), "lists"
  cache.run(own, str(workdir))
  train.run(own, workdir)
  exported = export.run(own, workdir)
  target = workdir / "digits_base"
  shutil.rmtree(target, ignore_errors=True)
  names = ("unet", "vae")  # transformers would keep a text encoder in half precision
  parts = {name: pretrained.load(exported["path"], name) for name in names}
  pretrained.save_pipeline(exported["path"], target, parts, dtype=jnp.float16)
  legible = share_legible(own, target)
  (target / "README.md").write_text(model_card(config, legible), encoding="utf-8")
  size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6
  console.say(
    f"base model: {target}, {size:.1f} MB; an independent reader recognises "
    f"{100 * legible:.1f} % of its digits"
  )
  return target


def share_legible(config: ml_collections.ConfigDict, folder: pathlib.Path) -> float:
  """Draws every held-out prompt and returns the share that the reader recognises."""
  config.model.path = str(folder)
  mesh = parallel.mesh_of(config.mesh)
  generator = sampling.make_generator(config, mesh)
  params, _ = candidates.load_params(str(folder), mesh)
  prompts = [p for p in config.eval.prompts for _ in range(config.eval.seeds)]
  seeds = [s for _ in config.eval.prompts for s in range(config.eval.seeds)]
  drawn = generator(params, prompts, seeds)
  return float(digits.legibility(drawn, prompts).mean())


def model_card(config: ml_collections.ConfigDict, legible: float) -> str:
  """Says what the base is, how it was made, and how well it reads."""
  ev, train_config = config.eval, config.train
  steps = config.quickstart.base.autoencoder.steps
  return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# digits_base: the quickstart's base model

A small Stable-Diffusion-shaped pipeline (UNet2DConditionModel, AutoencoderKL, CLIP text
encoder) that draws handwritten digits at {digits.SIZE} x {digits.SIZE} from prompts such as
"{config.eval.prompts[7]}". UNet and VAE are stored in fp16.

Made from the 1,797 real digits that come with scikit-learn (UCI ML hand-written digits,
CC BY 4.0; Alpaydin and Kaynak 1998) by

    python -m lpo_jax.main --config configs/quickstart_base.py --workdir runs/quickstart_base

- seed: {config.seed}
- autoencoder: {steps} steps of {config.quickstart.base.autoencoder.batch_size} images
- UNet: {train_config.total_steps} `sft` updates of {train_config.images_per_update} images,
  EMA {train_config.ema}
- text encoder: random

An independent reader (a support vector machine trained on the real digits) recognises
{100 * legible:.1f} % of {len(ev.prompts) * ev.seeds} samples ({ev.sampler}, {ev.steps} steps,
guidance {ev.guidance_scale}, seeds 0 to {ev.seeds - 1}).
"""
