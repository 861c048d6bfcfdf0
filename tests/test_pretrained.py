"""Folders: round trips, diffusers and transformers as readers, and refusals."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from lpo_jax import models, pretrained, trees
from lpo_jax.errors import UserError

UNET = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.30.0",
  "sample_size": 4,
  "block_out_channels": [8],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 12,
  "norm_num_groups": 4,
}
VAE = {
  "_class_name": "AutoencoderKL",
  "block_out_channels": [8],
  "norm_num_groups": 4,
  "scaling_factor": 0.18215,
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
CONFIGS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
WEIGHTS = {
  "unet": "diffusion_pytorch_model.safetensors",
  "vae": "diffusion_pytorch_model.safetensors",
  "text_encoder": "model.safetensors",
}


def make(name, seed=0):
  model = models.build(CONFIGS[name])
  return pretrained.Part(name, CONFIGS[name], model.init(seed), model)


@pytest.fixture
def folder(tmp_path):
  """A pipeline of three tiny networks."""
  root = tmp_path / "pipeline"
  for name in CONFIGS:
    pretrained.save(root, make(name))
  (root / "model_index.json").write_text(
    json.dumps(
      {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
      }
    )
  )
  (root / "scheduler").mkdir()
  (root / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.00085}')
  return root


def rewrite(path, change):
  """Replaces the tensors in a file by `change` of them."""
  save_file(change(load_file(path)), path, metadata={"format": "pt"})


def assert_same(a, b):
  a, b = trees.named_leaves(a), trees.named_leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    assert np.array_equal(a[name], b[name]), name


# --- round trips -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_load_gives_what_save_took_and_saves_the_same_bytes(folder, tmp_path, name):
  part = pretrained.load(folder, name)
  assert part.name == name and part.config == CONFIGS[name]
  assert_same(part.params, make(name).params)
  pretrained.save(tmp_path / "again", part)
  first = (folder / name / WEIGHTS[name]).read_bytes()
  assert (tmp_path / "again" / name / WEIGHTS[name]).read_bytes() == first
  header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
  assert header.pop("__metadata__") == {"format": "pt"}
  assert list(header) == sorted(header)
  assert not list((tmp_path / "again" / name).glob(".*"))


def test_a_file_of_torch_comes_back_byte_for_byte(tmp_path):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  fields = {k: v for k, v in UNET.items() if not k.startswith("_")}
  diffusers.UNet2DConditionModel(**fields).save_pretrained(tmp_path / "a" / "unet")
  pretrained.save(tmp_path / "b", pretrained.load(tmp_path / "a", "unet"))
  for name in (WEIGHTS["unet"], "config.json"):
    ours, theirs = ((tmp_path / x / "unet" / name).read_bytes() for x in "ba")
    assert ours == theirs, name


def test_diffusers_and_transformers_read_what_we_save(folder):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(1)
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((1, 4, 4, 4), np.float32)
  prompt = rng.standard_normal((1, 5, 12), np.float32)
  ids = np.asarray([[97, 5, 6, 98, 98, 98, 98, 98, 98]], np.int32)
  planes = torch.tensor(latents.transpose(0, 3, 1, 2))

  unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
  vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
  text, loaded = transformers.CLIPTextModel.from_pretrained(
    folder / "text_encoder", output_loading_info=True
  )
  assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
  with torch.no_grad():
    theirs = [
      unet(planes, torch.tensor([3]), torch.tensor(prompt)).sample.permute(0, 2, 3, 1),
      vae.decode(planes).sample.permute(0, 2, 3, 1),
      text(torch.tensor(ids.astype(np.int64))).pooler_output,
    ]
  part = {name: pretrained.load(folder, name) for name in CONFIGS}
  ours = [
    part["unet"].apply(part["unet"].params, latents, np.asarray([3]), prompt),
    part["vae"].decode(part["vae"].params, latents),
    part["text_encoder"].apply(part["text_encoder"].params, ids).pooled,
  ]
  for mine, expected in zip(ours, theirs):
    error = np.linalg.norm(mine - expected.numpy()) / np.linalg.norm(expected)
    assert error < 1e-5


def test_stable_diffusions_own_names_of_the_text_encoder(folder):
  names = load_file(folder / "text_encoder" / "model.safetensors").keys()
  assert "text_model.embeddings.token_embedding.weight" in names
  assert "text_model.encoder.layers.1.self_attn.q_proj.bias" in names
  assert "text_model.final_layer_norm.weight" in names


def test_text_encoder_without_prefix_and_with_position_ids(folder):
  expected = pretrained.load(folder, "text_encoder").params

  def as_written_elsewhere(tensors):
    tensors = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    return {**tensors, "embeddings.position_ids": np.arange(9)[None]}

  rewrite(folder / "text_encoder" / "model.safetensors", as_written_elsewhere)
  assert_same(pretrained.load(folder, "text_encoder").params, expected)


def test_old_names_of_the_autoencoders_attention(folder):
  expected = pretrained.load(folder, "vae").params
  before = pretrained.fingerprint(folder, "vae")
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

  def rename(name):
    for new, word in old.items():
      name = name.replace(f".{new}.", f".{word}.")
    return name

  path = folder / "vae" / WEIGHTS["vae"]
  rewrite(path, lambda tensors: {rename(k): v for k, v in tensors.items()})
  assert "encoder.mid_block.attentions.0.query.weight" in load_file(path)
  assert_same(pretrained.load(folder, "vae").params, expected)
  assert pretrained.fingerprint(folder, "vae") == before


# --- dtypes, variants, shards, shardings -----------------------------------------------


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_files_widen_and_come_back(folder, tmp_path, stored):
  part = make("unet")
  pretrained.save(tmp_path / "half", part, dtype=stored)
  wide = pretrained.load(tmp_path / "half", "unet").params
  leaves = trees.named_leaves(wide)
  kernel = part.params["conv_in"]["kernel"]
  assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
  assert np.array_equal(
    leaves["conv_in.kernel"], kernel.astype(stored).astype(np.float32)
  )
  same = pretrained.load(tmp_path / "half", "unet", dtype=None)
  assert same.params["conv_in"]["kernel"].dtype == stored
  pretrained.save(tmp_path / "again", same)
  first, again = (
    (tmp_path / x / "unet" / WEIGHTS["unet"]).read_bytes() for x in ("half", "again")
  )
  assert first == again


def test_config_of_transformers_says_the_dtype_that_is_saved(tmp_path):
  part = make("text_encoder")
  config = {**TEXT, "torch_dtype": "float16"}
  part = pretrained.Part(part.name, config, part.params, part.model)
  pretrained.save(tmp_path, part)
  assert pretrained.load(tmp_path, "text_encoder").config["torch_dtype"] == "float32"


def test_variants(folder):
  expected = pretrained.load(folder, "unet").params
  path = folder / "unet" / WEIGHTS["unet"]
  path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
  assert_same(pretrained.load(folder, "unet", variant="fp16").params, expected)
  with pytest.raises(UserError, match=r"variants \['fp16'\]: pass variant"):
    pretrained.load(folder, "unet")
  with pytest.raises(UserError, match=r"diffusion_pytorch_model\.ema\.safetensors"):
    pretrained.load(folder, "unet", variant="ema")


def test_sharded_files(folder):
  expected = pretrained.load(folder, "unet").params
  before = pretrained.fingerprint(folder, "unet")
  path = folder / "unet" / WEIGHTS["unet"]
  tensors = load_file(path)
  path.unlink()
  names = list(tensors)
  where = {}
  for i, shard in enumerate((names[::2], names[1::2]), 1):
    file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
    save_file({name: tensors[name] for name in shard}, path.with_name(file))
    where |= dict.fromkeys(shard, file)
  index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": where}))
  assert_same(pretrained.load(folder, "unet").params, expected)
  assert pretrained.fingerprint(folder, "unet") == before
  path.with_name(file).unlink()
  with pytest.raises(UserError, match="00002-of-00002"):
    pretrained.load(folder, "unet")


def test_shardings_as_function_and_as_tree(folder):
  expected = pretrained.load(folder, "unet").params
  mesh = Mesh(np.asarray(jax.devices()[:1]), ("fsdp",))
  asked = {}

  def place(name, shape):
    asked[name] = shape
    spec = PartitionSpec(*[None] * (len(shape) - 1), "fsdp")
    return NamedSharding(mesh, spec)

  by_function = pretrained.load(folder, "unet", sharding=place).params
  assert_same(by_function, expected)
  assert asked["conv_in.kernel"] == (3, 3, 4, 8)
  kernel = by_function["conv_in"]["kernel"]
  assert kernel.sharding.spec == PartitionSpec(None, None, None, "fsdp")
  tree = jax.tree.map(lambda leaf: leaf.sharding, by_function)
  by_tree = pretrained.load(folder, "unet", sharding=tree).params
  assert_same(by_tree, expected)
  assert by_tree["conv_in"]["kernel"].sharding == kernel.sharding


def test_four_devices_each_read_their_slice(folder, tmp_path):
  script = tmp_path / "sliced.py"
  script.write_text(
    """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lpo_jax import parallel, pretrained, trees
mesh = parallel.make_mesh(2, 2)
whole = trees.named_leaves(pretrained.load(sys.argv[1], "unet").params)
abstract = pretrained.load(sys.argv[1], "unet").model.abstract_params
tree = parallel.param_shardings(abstract, mesh)
split = trees.named_leaves(pretrained.load(sys.argv[1], "unet", sharding=tree).params)
for name, leaf in split.items():
  for shard in leaf.addressable_shards:
    assert np.array_equal(shard.data, np.asarray(whole[name])[shard.index]), name
assert any(not leaf.is_fully_replicated for leaf in split.values())
"""
  )
  env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  env["PYTHONPATH"] = str(pathlib.Path(pretrained.__file__).parents[2])
  subprocess.run([sys.executable, script, folder], check=True, env=env, timeout=120)


# --- fingerprints, pipelines, schedulers -----------------------------------------------


def test_fingerprint_follows_config_and_tensors_only(folder, tmp_path):
  first = pretrained.fingerprint(folder, "vae")
  assert len(first) == 16 and int(first, 16) >= 0
  pretrained.save(tmp_path / "copy", pretrained.load(folder, "vae"))
  assert pretrained.fingerprint(tmp_path / "copy", "vae") == first

  config = folder / "vae" / "config.json"
  fields = json.loads(config.read_text())
  config.write_text(json.dumps({**fields, "_diffusers_version": "9"}))
  assert pretrained.fingerprint(folder, "vae") == first
  config.write_text(json.dumps({**fields, "scaling_factor": 0.13}))
  assert pretrained.fingerprint(folder, "vae") != first
  config.write_text(json.dumps(fields))
  assert pretrained.fingerprint(folder, "vae") == first

  def nudge(tensors):
    name = sorted(tensors)[-1]
    tensors[name] = np.nextafter(tensors[name], np.float32(np.inf))
    return tensors

  rewrite(folder / "vae" / WEIGHTS["vae"], nudge)
  assert pretrained.fingerprint(folder, "vae") != first


def test_save_pipeline_replaces_one_network_and_copies_the_others(folder, tmp_path):
  (folder / "v1-5-pruned.safetensors").write_bytes(b"stale")
  (folder / "unet" / "stale.bin").write_bytes(b"stale")
  target = tmp_path / "exports" / "new"
  new = make("unet", seed=5)
  pretrained.save_pipeline(folder, target, {"unet": new})
  assert_same(pretrained.load(target, "unet").params, new.params)
  assert_same(pretrained.load(target, "vae").params, make("vae").params)
  assert pretrained.scheduler_config(target) == {"beta_start": 0.00085}
  assert sorted(path.name for path in target.iterdir()) == [
    "model_index.json",
    "scheduler",
    "text_encoder",
    "unet",
    "vae",
  ]
  assert not (target / "unet" / "stale.bin").exists()
  assert [path.name for path in target.parent.iterdir()] == ["new"]

  with pytest.raises(UserError, match="is not empty"):
    pretrained.save_pipeline(folder, target, {"unet": new})
  with pytest.raises(UserError, match="no component 'unet_2'; it has: unet, vae"):
    pretrained.save_pipeline(folder, tmp_path / "other", {"unet_2": new})


def test_no_scheduler(tmp_path):
  with pytest.raises(UserError, match=r"scheduler_config\.json"):
    pretrained.scheduler_config(tmp_path)


# --- refusals --------------------------------------------------------------------------


def refused(folder, name, *words):
  with pytest.raises(UserError) as error:
    pretrained.load(folder, name)
  for word in words:
    assert word in str(error.value)


def test_missing_tensor_is_named_with_its_closest(folder):
  def misspell(tensors):
    tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")
    return tensors

  rewrite(folder / "unet" / WEIGHTS["unet"], misspell)
  refused(folder, "unet", "1 of", "missing", "'conv_in.weight'", "'conv_inn.weight'")


def test_unexpected_tensor_is_named_with_its_closest(folder):
  extra = {"conv_out.weights": np.zeros(3, np.float32)}
  rewrite(folder / "unet" / WEIGHTS["unet"], lambda tensors: {**tensors, **extra})
  refused(folder, "unet", "does not have", "'conv_out.weights'", "'conv_out.weight'")


def test_wrong_shape_is_named(folder):
  extra = {"conv_in.weight": np.zeros((8, 5, 3, 3), np.float32)}
  rewrite(folder / "unet" / WEIGHTS["unet"], lambda tensors: {**tensors, **extra})
  refused(folder, "unet", "'conv_in.weight'", "(8, 5, 3, 3)", "(8, 4, 3, 3)")


def test_unknown_class_is_named(folder):
  path = folder / "unet" / "config.json"
  path.write_text(json.dumps({**UNET, "_class_name": "UNet3DConditionModel"}))
  refused(folder, "unet", "'UNet3DConditionModel'", "mean 'UNet2DConditionModel'")


def test_pickles_are_refused_with_the_reason(folder):
  path = folder / "text_encoder" / WEIGHTS["text_encoder"]
  path.rename(path.with_name("pytorch_model.bin"))
  refused(folder, "text_encoder", "model.safetensors", "pickle", "code")


def test_what_was_looked_for_is_said(folder, tmp_path):
  refused(tmp_path / "nowhere", "unet", "nowhere", "does not exist")
  refused(folder, "text_encoder_2", "text_encoder_2/config.json", "'text_encoder'")
  (folder / "vae" / WEIGHTS["vae"]).unlink()
  refused(folder, "vae", WEIGHTS["vae"], "index.json")


def test_unreadable_files(folder):
  path = folder / "unet" / WEIGHTS["unet"]
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
  refused(folder, "unet", str(path), "git-lfs")
  (folder / "unet" / "config.json").write_text("{")
  refused(folder, "unet", "is not JSON")


def test_a_networks_own_folder_will_do(folder):
  expected = pretrained.load(folder, "vae").params
  assert_same(pretrained.load(folder / "vae", "vae").params, expected)


# --- tokenizer -------------------------------------------------------------------------


def write_tokenizer(path, pad):
  """CLIP's byte vocabulary, one merge, and the two special tokens."""
  path.mkdir(parents=True)
  letters = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
  letters += [chr(256 + i) for i in range(68)]
  words = [*letters, *(f"{c}</w>" for c in letters), "at</w>"]
  words += ["<|startoftext|>", "<|endoftext|>"]
  vocabulary = {word: i for i, word in enumerate(words)}
  (path / "vocab.json").write_text(json.dumps(vocabulary))
  (path / "merges.txt").write_text("#version: 0.2\na t</w>\n")
  special = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": pad,
  }
  (path / "special_tokens_map.json").write_text(json.dumps(special))
  (path / "tokenizer_config.json").write_text(
    json.dumps({**special, "model_max_length": 8, "tokenizer_class": "CLIPTokenizer"})
  )
  return vocabulary


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokenizer_pads_with_its_own_token_and_counts_what_it_cuts(tmp_path, pad):
  pytest.importorskip("transformers")
  ids = write_tokenizer(tmp_path / "tokenizer", pad)
  tokenizer = pretrained.load_tokenizer(tmp_path)
  assert tokenizer.max_length == 8 and tokenizer.pad_token_id == ids[pad]
  start, end, fill = ids["<|startoftext|>"], ids["<|endoftext|>"], ids[pad]
  tokens = tokenizer.tokenize(["A cat", ""])
  assert tokens.dtype == np.int32
  assert tokens.tolist() == [
    [start, ids["a</w>"], ids["c"], ids["at</w>"], end, fill, fill, fill],
    [start, end, fill, fill, fill, fill, fill, fill],
  ]
  assert tokenizer.truncated == 0
  exact, cut = tokenizer.tokenize(["a a a a a a", "a a a a a a a"])
  assert exact.tolist() == cut.tolist() == [start] + [ids["a</w>"]] * 6 + [end]
  assert tokenizer.truncated == 1
  assert tokenizer.tokenize([]).shape == (0, 8)


def test_tokenizer_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match=r"vocab\.json and merges\.txt"):
    pretrained.load_tokenizer(tmp_path)
