"""What a generator refuses, and prompts encoded as diffusers' pipelines do."""

import json
import shutil
from importlib import resources

import numpy as np
import pytest

from lpo_jax import parallel
from lpo_jax.errors import UserError
from lpo_jax.generation import Generator, TextConditioner


def test_eta_is_refused_by_samplers_without_one():
  with pytest.raises(
    UserError, match=r"eval\.eta=0\.5: sampler 'euler'.*among: ddim\."
  ):
    Generator("nowhere", mesh=None, sampler="euler", eta=0.5)
  with pytest.raises(UserError, match="unknown sampler 'eular'"):
    Generator("nowhere", mesh=None, sampler="eular")


def test_sigmas_are_refused_by_samplers_without_a_choice():
  with pytest.raises(
    UserError, match=r"eval\.sigmas=karras: sampler 'ddim'.*among: dpmpp_2m, .*euler"
  ):
    Generator("nowhere", mesh=None, sampler="ddim", sigmas="karras")
  with pytest.raises(
    UserError, match=r"unknown eval\.sigmas 'karas'; did you mean 'ka"
  ):
    Generator("nowhere", mesh=None, sampler="euler", sigmas="karas")


def test_sigmas_and_refusals_are_the_pipelines_own(tmp_path):
  """Of the base that ships, with its scheduler's file changed."""
  folder = tmp_path / "pipeline"
  shutil.copytree(resources.files("lpo_jax") / "assets" / "digits_base", folder)
  file = folder / "scheduler" / "scheduler_config.json"
  fields = json.loads(file.read_text("utf-8"))

  def drawn(sampler, sigmas="auto", **changes):
    file.write_text(json.dumps({**fields, **changes}), "utf-8")
    generator = Generator(
      folder, mesh=parallel.make_mesh(), sampler=sampler, steps=3, sigmas=sigmas
    )
    return generator._sampler.keywords

  assert drawn("euler")["sigmas"] == "schedule"
  assert drawn("euler", use_karras_sigmas=True)["sigmas"] == "karras"
  assert drawn("euler", "schedule", use_karras_sigmas=True)["sigmas"] == "schedule"
  assert drawn("dpmpp_2m_sde", "karras")["sigmas"] == "karras"
  assert "sigmas" not in drawn("ddim", use_karras_sigmas=True)
  with pytest.raises(UserError, match="solver_order=3, which sampler 'dpmpp_2m' does"):
    drawn("dpmpp_2m", solver_order=3)
  drawn("ddim", solver_order=3)  # DDIM has no such field


TOKENIZER = resources.files("lpo_jax") / "assets" / "digits_base" / "tokenizer"
PROMPTS = ["a red three", "", "seven " * 40]


@pytest.fixture
def text_pipeline(tmp_path):
  """Writes tokenizers and random text encoders; text_pipeline(count) -> folder."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
  ends = {"bos_token_id": "<|startoftext|>", "eos_token_id": "<|endoftext|>"}

  def make(count):
    torch.manual_seed(0)
    for number in range(count):
      suffix = f"_{number + 1}" if number else ""
      config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16 + 8 * number,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=12,
        max_position_embeddings=json.loads(
          (TOKENIZER / "tokenizer_config.json").read_text()
        )["model_max_length"],
        **{name: vocabulary[token] for name, token in ends.items()},
      )
      projects = "WithProjection" if number else ""
      encoder = getattr(transformers, f"CLIPTextModel{projects}")(config)
      with torch.no_grad():
        for p in encoder.parameters():
          scale = 0.2 if p.ndim == 1 else p.shape[-1] ** -0.5
          p.normal_(0.0, scale)
          p += p.ndim == 1
      encoder.save_pretrained(tmp_path / f"text_encoder{suffix}")
      shutil.copytree(TOKENIZER, tmp_path / f"tokenizer{suffix}")
    return tmp_path

  return make


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_are_encoded_as_in_diffusers_pipelines(text_pipeline, count):
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = text_pipeline(count)
  parts = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
  if count == 2:
    parts["text_encoder_2"] = "CLIPTextModelWithProjection"
    parts["tokenizer_2"] = "CLIPTokenizer"
  parts = {
    name: getattr(transformers, kind).from_pretrained(folder / name)
    for name, kind in parts.items()
  }
  rest = dict.fromkeys(["vae", "unet", "scheduler", "feature_extractor"])
  if count == 1:
    pipeline = diffusers.StableDiffusionPipeline(
      **parts, **rest, safety_checker=None, requires_safety_checker=False
    )
    # Where diffusers 0.42 looks for the final norm, and transformers 5 has it no more.
    object.__setattr__(parts["text_encoder"], "text_model", parts["text_encoder"])
  else:
    pipeline = diffusers.StableDiffusionXLPipeline(**parts, **rest)
  for clip_skip in (0, 2):
    with torch.no_grad():
      encoded = pipeline.encode_prompt(
        prompt=PROMPTS,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip or None,
      )
    conditioner = TextConditioner(folder, batch_size=3, clip_skip=clip_skip)
    states, pooled = conditioner.encode(PROMPTS)
    pairs = [(states, encoded[0])]
    if count == 2:
      pairs.append((pooled, encoded[2]))
    for ours, theirs in pairs:
      difference = np.linalg.norm(ours - theirs.numpy())
      assert difference < 1e-5 * np.linalg.norm(theirs.numpy())
    assert (pooled is None) == (count == 1)


def test_no_more_layers_than_there_are_can_be_left_out(text_pipeline):
  folder = text_pipeline(2)
  with pytest.raises(UserError, match=r"clip_skip=3: expected 0 to 2"):
    TextConditioner(folder, clip_skip=3)
  with pytest.raises(UserError, match=r"clip_skip=-1: expected 0 to 2"):
    TextConditioner(folder, clip_skip=-1)
