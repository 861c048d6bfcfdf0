"""Shards and their index: written here, read here and by diffusers and transformers."""

import json

import numpy as np
import pytest

from lpo_jax import models, pretrained, trees
from lpo_jax.pretrained import files

VAE = {
  "_class_name": "AutoencoderKL",
  "block_out_channels": [8],
  "norm_num_groups": 4,
}
TEXT = {
  "architectures": ["CLIPTextModel"],
  "model_type": "clip_text_model",
  "vocab_size": 99,
  "hidden_size": 12,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "max_position_embeddings": 9,
  "bos_token_id": 97,
  "eos_token_id": 98,
}


def make(name, config):
  model = models.build(config)
  return pretrained.Part(name, config, model.init(0), model)


def test_a_tensor_larger_than_a_shard_is_alone_in_one():
  shards = files.split({"a": 3, "b": 9, "c": 1, "d": 3}, "model", "fp16", 4)
  assert shards == {
    "model.fp16-00001-of-00003.safetensors": ["a"],
    "model.fp16-00002-of-00003.safetensors": ["b"],
    "model.fp16-00003-of-00003.safetensors": ["c", "d"],
  }
  assert files.split({"a": 3, "b": 1}, "model", None, 4) == {
    "model.safetensors": ["a", "b"]
  }


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_come_back_here_and_in_diffusers(tmp_path, variant):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  part = make("vae", VAE)
  pretrained.save(tmp_path, part, variant=variant, max_shard_size=6_000)
  folder, dotted = tmp_path / "vae", f".{variant}" if variant else ""
  index = f"diffusion_pytorch_model.safetensors.index{dotted}.json"
  names = sorted(path.name for path in folder.iterdir())
  count = len(names) - 2  # config.json and the index
  assert count > 2
  assert names == sorted(
    ["config.json", index]
    + [
      f"diffusion_pytorch_model{dotted}-{i:05d}-of-{count:05d}.safetensors"
      for i in range(1, count + 1)
    ]
  )
  shards = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
  assert all(path.stat().st_size < 6_000 + 2_500 for path in shards)  # and a header
  leaves = trees.named_leaves(part.params)
  fields = json.loads((folder / index).read_text())
  bytes_ = sum(leaf.nbytes for leaf in leaves.values())
  assert fields["metadata"] == {"total_size": bytes_}
  assert len(fields["weight_map"]) == len(leaves)

  back = trees.named_leaves(pretrained.load(tmp_path, "vae", variant=variant).params)
  assert all(np.array_equal(back[name], leaf) for name, leaf in leaves.items())
  theirs = diffusers.AutoencoderKL.from_pretrained(folder, variant=variant)
  kernel = leaves["decoder.conv_in.kernel"]
  weight = theirs.decoder.conv_in.weight.detach().numpy()
  assert np.array_equal(weight.transpose(2, 3, 1, 0), kernel)
  assert sum(p.numel() for p in theirs.parameters()) * 4 == bytes_


def test_shards_come_back_in_transformers(tmp_path):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  part = make("text_encoder", TEXT)
  pretrained.save(tmp_path, part, max_shard_size=6_000)
  assert (tmp_path / "text_encoder" / "model.safetensors.index.json").is_file()
  theirs, loaded = transformers.CLIPTextModel.from_pretrained(
    tmp_path / "text_encoder", output_loading_info=True
  )
  assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
  weights = theirs.state_dict()
  (name,) = (key for key in weights if key.endswith("token_embedding.weight"))
  table = part.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
  assert np.array_equal(weights[name].numpy(), table)


def test_a_save_leaves_no_weights_of_an_earlier_one(tmp_path):
  first, second = make("vae", VAE), make("vae", {**VAE, "norm_num_groups": 2})
  folder = tmp_path / "vae"
  single = "diffusion_pytorch_model.safetensors"
  pretrained.save(tmp_path, first)
  pretrained.save(tmp_path, first, variant="fp16")
  pretrained.save(tmp_path, second, max_shard_size=6_000)
  assert not (folder / single).exists()
  assert (folder / "diffusion_pytorch_model.fp16.safetensors").exists()
  assert pretrained.load(tmp_path, "vae").config["norm_num_groups"] == 2
  pretrained.save(tmp_path, first)
  assert sorted(path.name for path in folder.iterdir()) == [
    "config.json",
    "diffusion_pytorch_model.fp16.safetensors",
    single,
  ]
