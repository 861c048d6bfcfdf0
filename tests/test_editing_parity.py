"""Edits are diffusers' StableDiffusionInstructPix2PixPipeline's on PyTorch.

The pipeline that ships, widened, with random weights for the source's channels: diffusers
loads the folder that is written, and both sides start from the same latents.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import generation, parallel, pretrained
from lpo_jax.diffusion import noising
from lpo_jax.errors import UserError
from lpo_jax.jobs import quickstart, sampling, widen
from lpo_jax.jobs.quickstart_people import encode_png
from lpo_jax.scoring import digits
from lpo_jax.types import Conditioning, Prompt

STEPS = 4
TEXTS, SEEDS = ["seven written by hand", "a handwritten two"], [3, 4]
SCALES = {"guidance_scale": 3.0, "image_guidance_scale": 1.4}
SCHEDULERS = {
  "ddim": "DDIMScheduler",
  "euler_ancestral": "EulerAncestralDiscreteScheduler",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """An editing pipeline whose answers depend on the source."""
  base, target = quickstart.SHIPPED_BASE, tmp_path_factory.mktemp("edits") / "pipeline"
  part = widen.widened(pretrained.load(base, "unet"), 4)
  kernel = part.params["conv_in"]["kernel"].copy()
  kernel[:, :, 4:] = 0.1 * np.random.default_rng(0).standard_normal(
    kernel[:, :, 4:].shape
  )
  params = {**part.params, "conv_in": {**part.params["conv_in"], "kernel": kernel}}
  parts = {"unet": dataclasses.replace(part, params=params)}
  parts["vae"] = pretrained.load(base, "vae")
  pretrained.save_pipeline(base, target, parts)
  return target


@pytest.fixture(scope="module")
def sources():
  return digits.real_digits()[0][[5, 17]]


@pytest.fixture(scope="module")
def pipeline(folder):
  """Loaded as a user would, by the class that model_index.json names."""
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
  assert type(loaded) is diffusers.StableDiffusionInstructPix2PixPipeline
  loaded.set_progress_bar_config(disable=True)
  return loaded


@pytest.fixture(scope="module")
def params(folder):
  return pretrained.load(folder, "unet").params


def generator_of(folder, sampler, **settings):
  return generation.Generator(
    folder,
    mesh=parallel.make_mesh(),
    sampler=sampler,
    batch_size=2,
    **{"steps": STEPS, **SCALES, **settings},
  )


@pytest.fixture(scope="module")
def guided(folder, params, sources):
  """Our guided prediction, from latents [2, ...] and a timestep."""
  generator = generator_of(folder, "ddim")
  encoded: Conditioning = generator.conditioning(["", *TEXTS])

  @jax.jit
  def predict(latents, t):
    null = jax.tree.map(lambda x: x[:1].repeat(2, 0), encoded)
    text = jax.tree.map(lambda x: x[1:], encoded)
    seen = generator._source_latents(generator._vae_params, jnp.asarray(sources))
    text = dataclasses.replace(text, source_latents=seen)
    null = dataclasses.replace(null, source_latents=0 * seen)
    rows, guide = generator._guidance(text, null)
    told = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    unet = functools.partial(generator.unet.apply, params, **told.arguments)
    return guide(unet)(latents, jnp.broadcast_to(t, (2,)))

  return predict


def theirs(pipeline, sampler, generator, sources, monkeypatch):
  """Runs their pipeline from our noise; returns images, and what each step was handed."""
  import diffusers
  import torch
  from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

  scheduler = getattr(diffusers, SCHEDULERS[sampler])
  pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
  identity = np.array(
    [[generation.zlib.crc32(t.encode()), s] for t, s in zip(TEXTS, SEEDS, strict=True)],
    np.uint32,
  )
  keys = noising.identity_keys(0, "sampler", identity)
  handed, step = [], pipeline.scheduler.step

  def drawn(shape, **_):
    fold = jax.vmap(functools.partial(jax.random.fold_in, data=len(handed) - 1))
    ours = jax.vmap(lambda key: jax.random.normal(key, generator.latent_shape))
    noise = np.array(ours(fold(keys))).transpose(0, 3, 1, 2)
    assert noise.shape == tuple(shape)
    return torch.from_numpy(np.ascontiguousarray(noise))

  def watched(output, t, latents, **options):
    shown = pipeline.scheduler.scale_model_input(latents, t)
    handed.append([x.numpy().transpose(0, 2, 3, 1) for x in (shown, output)])
    handed[-1].append(float(t))
    return step(output, t, latents, **options)

  monkeypatch.setattr(ancestral, "randn_tensor", drawn)
  monkeypatch.setattr(pipeline.scheduler, "step", watched)
  latents = generation.initial_latents(TEXTS, SEEDS, generator.latent_shape)
  pictures = torch.from_numpy(sources.astype(np.float32) / 255)
  images = pipeline(
    TEXTS,
    image=pictures.permute(0, 3, 1, 2).contiguous(),
    num_inference_steps=STEPS,
    latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
    output_type="np",
    **SCALES,
  ).images
  return np.round(images * 255).astype(np.int32), handed


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_edits_are_diffusers(
  pipeline, folder, params, sources, guided, sampler, monkeypatch
):
  """Images, and the guided prediction of every step at the very latents it was made of."""
  generator = generator_of(folder, sampler)
  ours = generator(params, TEXTS, SEEDS, sources=sources).astype(np.int32)
  wanted, handed = theirs(pipeline, sampler, generator, sources, monkeypatch)
  assert ours.shape == wanted.shape == (2, 32, 32, 3)
  assert wanted.std() > 10  # not an empty page
  assert np.abs(ours - wanted).max() <= 1
  assert len(handed) == STEPS

  for latents, output, t in handed:
    difference = np.abs(guided(latents, t) - output).max()
    assert difference < 2e-4 * np.abs(output).max()


def test_what_is_shown_matters_and_batches_do_not(folder, params, sources):
  generator = generator_of(folder, "ddim")
  both = generator(params, TEXTS, SEEDS, sources=sources).astype(int)
  other = generator(params, TEXTS, SEEDS, sources=sources[::-1]).astype(int)
  assert np.abs(both - other).max() > 20
  alone = generator(params, TEXTS[1:], SEEDS[1:], sources=sources[1:]).astype(int)
  assert np.abs(both[1:] - alone).max() <= 1
  rows = [Prompt(t, source=encode_png(s)) for t, s in zip(TEXTS, sources, strict=True)]
  np.testing.assert_array_equal(sampling.draw(generator, params, rows, SEEDS), both)


def test_sources_and_networks_that_do_not_go_together_are_refused(
  folder, params, sources, tmp_path
):
  generator = generator_of(folder, "ddim")
  with pytest.raises(UserError, match="edits images, and the prompts have none"):
    generator(params, TEXTS, SEEDS)
  with pytest.raises(UserError, match=r"expected uint8 of shape \[2, 32, 32, 3\], got"):
    generator(params, TEXTS, SEEDS, sources=sources[:1])
  plain = generator_of(quickstart.SHIPPED_BASE, "ddim")
  with pytest.raises(
    UserError, match="draws from text alone, and the prompts come with"
  ):
    plain(params, TEXTS, SEEDS, sources=sources)
  rows = [Prompt(TEXTS[0], source=encode_png(sources[0])), Prompt(TEXTS[1])]
  with pytest.raises(UserError, match=r"two'.* its source picture cannot be used"):
    sampling.draw(generator, params, rows, SEEDS)
  with pytest.raises(UserError, match=r"takes 9 channels; expected 4, .* or 8"):
    generation._takes_sources("x", 9, 4, {})
  with pytest.raises(UserError, match="CosXL Edit"):
    generation._takes_sources("x", 8, 4, {"is_cosxl_edit": True})
  index = json.loads((folder / "model_index.json").read_text("utf-8"))
  assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
