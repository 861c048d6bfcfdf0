"""LoRA files: diffusers on PyTorch is asked what they mean, both ways."""

import dataclasses
import hashlib
import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpo_jax import models, pretrained, trees
from lpo_jax.errors import UserError
from lpo_jax.models import lora
from lpo_jax.models.lora import Site, Spec
from lpo_jax.pretrained import lora as files
from lpo_jax.pretrained import lora_names

# Two transformer blocks each, which are one stack here and two modules in files.
SD15 = {
  "sample_size": 8,
  "block_out_channels": [16, 32],
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 24,
  "norm_num_groups": 4,
  "transformer_layers_per_block": 2,
}
SDXL = {
  **SD15,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
  "attention_head_dim": [2, 4],
  "transformer_layers_per_block": [1, 2],
  "use_linear_projection": True,
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 8,
  "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
CONFIGS = {"sd15": SD15, "sdxl": SDXL}
KERNEL = "mid_block.attentions.0.transformer_blocks.each.attn1.to_q.kernel"
MODULE = "mid_block.attentions.0.transformer_blocks"


@dataclasses.dataclass(frozen=True, eq=False)
class Both:
  """A folder with one UNet, and the two ways to run it."""

  kind: str
  folder: object
  part: pretrained.Part
  arguments: tuple

  @property
  def model(self):
    return self.part.model

  def ours(self, params):
    return np.asarray(self._apply(params, *self.arguments))

  def __post_init__(self):
    object.__setattr__(self, "_apply", jax.jit(self.part.apply))

  def merged(self, adapter):
    """Our output with factors added."""
    merge = jax.jit(lambda base, delta: lora.merge(base, delta, adapter.layout))
    return self.ours(merge(self.part.params, adapter.delta))

  def pipeline(self):
    """diffusers' pipeline with this UNet, and without what needs none."""
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(
      self.folder / "unet", low_cpu_mem_usage=False
    )
    if self.kind == "sdxl":
      pipeline, extra = diffusers.StableDiffusionXLPipeline, ("_2",)
    else:
      pipeline, extra = diffusers.StableDiffusionPipeline, ()
    parts = [
      f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", *extra)
    ]
    if not extra:
      parts += ["safety_checker", "feature_extractor"]
    nothing = dict.fromkeys(["vae", *parts])
    options = {} if extra else {"requires_safety_checker": False}
    return pipeline(
      unet=unet, scheduler=diffusers.DDIMScheduler(), **nothing, **options
    )

  def theirs(self, unet):
    import torch

    latents, timesteps, prompt, *more = map(torch.from_numpy, self.arguments)
    added = dict(zip(("text_embeds", "time_ids"), more))
    with torch.no_grad():
      latents = latents.permute(0, 3, 1, 2)
      output = unet(latents, timesteps, prompt, added_cond_kwargs=added).sample
    return output.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
  torch = pytest.importorskip("torch")
  pytest.importorskip("peft")
  import diffusers

  torch.set_num_threads(1)
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp(request.param)
  diffusers.UNet2DConditionModel(**CONFIGS[request.param]).save_pretrained(
    folder / "unet"
  )
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  more = ()
  if request.param == "sdxl":
    sizes = [[64, 48, 0, 3, 64, 64], [512, 512, 9, 0, 512, 512]]
    more = (normal(2, 20), np.asarray(sizes, np.float32))
  arguments = (normal(2, 8, 8, 4), np.asarray([7, 901]), normal(2, 5, 24), *more)
  return Both(request.param, folder, pretrained.load(folder, "unet"), arguments)


@pytest.fixture(scope="module")
def tiny():
  """The structure of an SDXL, without weights."""
  return models.build({"_class_name": "UNet2DConditionModel", **SDXL})


def draw(model, spec, seed=0):
  """An adapter in which no factor is 0."""
  rng = np.random.default_rng(seed)
  layout = lora.lay_out(spec, model.abstract_params)

  def make(name, leaf, factor):
    shape = lora.shapes(name, leaf.shape, layout[name].rank)[factor]
    return 0.1 * rng.standard_normal(shape, np.float32)

  return lora.Adapter(lora.build(model.abstract_params, layout, make), layout)


def assert_equal(a, b):
  assert dict(a.layout) == dict(b.layout)
  assert jax.tree.structure(a.delta) == jax.tree.structure(b.delta)
  assert jax.tree.all(jax.tree.map(np.array_equal, a.delta, b.delta))


def relative_error(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
  ("style", "spec"),
  [
    pytest.param("peft", Spec(4, lora.ATTENTION, 8.0), marks=pytest.mark.slow),
    pytest.param("kohya", Spec(4, lora.ATTENTION, 8.0), marks=pytest.mark.slow),
    # Every kernel, convolutions too, with two ranks; kohya's with one alpha of its own.
    ("peft", Spec(3, ((r"attn1.*kernel$", 5), *lora.KERNELS))),
    ("kohya", Spec(3, ((r"attn1.*kernel$", 5), *lora.KERNELS), 2.0)),
  ],
)
def test_diffusers_loads_our_files(both, tmp_path, style, spec):
  adapter = draw(both.model, spec)
  file = tmp_path / (files.FILE_NAME if style == "peft" else "mine.safetensors")
  files.save(file, adapter, both.part.config, style=style)
  merged = both.merged(adapter)
  pipe = both.pipeline()
  assert relative_error(both.ours(both.part.params), both.theirs(pipe.unet)) < 1e-5
  pipe.load_lora_weights(str(tmp_path))
  assert relative_error(merged, both.theirs(pipe.unet)) < 1e-5
  assert relative_error(merged, both.ours(both.part.params)) > 0.1
  back = files.load(tmp_path, both.model)
  assert_equal(back.adapter, adapter)
  assert back.text_keys == ()


PATTERNS = {
  "r": 4,
  "lora_alpha": 2,
  "rank_pattern": {"conv1": 6},
  "alpha_pattern": {"to_k": 5, f"^{MODULE}.0.attn2.to_v": 7},
}


@pytest.mark.parametrize(
  "options",
  [
    pytest.param(PATTERNS, id="patterns"),
    pytest.param(
      {"r": 4, "lora_alpha": 3, "use_rslora": True},
      id="rank-stabilised",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_we_read_what_diffusers_and_peft_write(both, tmp_path, options):
  import peft
  import torch

  pipe = both.pipeline()
  targets = ["to_k", "to_q", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj"]
  config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
  torch.manual_seed(1)
  pipe.unet.add_adapter(config)
  pipe.save_lora_weights(
    tmp_path / "pipeline",
    unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet),
    unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
  )
  pipe.unet.save_lora_adapter(tmp_path / "unet")
  expected = both.theirs(pipe.unet)
  assert relative_error(both.ours(both.part.params), expected) > 0.02
  for folder in ("pipeline", "unet"):
    adapter = files.load(tmp_path / folder, both.model).adapter
    assert relative_error(both.merged(adapter), expected) < 1e-5


@pytest.mark.parametrize("style", files.STYLES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_files(tiny, tmp_path, style, dtype):
  adapter = draw(tiny, Spec(2, lora.KERNELS, 0.1))
  file = files.save(tmp_path / "x.safetensors", adapter, SDXL, style=style, dtype=dtype)
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), adapter.delta)
  back = files.load(file, tiny).adapter
  assert_equal(back, lora.Adapter(rounded, adapter.layout))


def test_a_file_may_cover_some_blocks_with_ranks_of_their_own(tiny, tmp_path):
  rng = np.random.default_rng(0)
  tensors, wanted = {}, {}
  for block, rank, alpha in ((0, 3, 1.5), (1, 2, 8.0)):
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rank, 32), (32, rank)))
    key = f"lora_unet_middle_block_1_transformer_blocks_{block}_attn1_to_q"
    tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    tensors[f"{key}.alpha"] = np.asarray(alpha, np.float32)
    wanted[block] = alpha / rank * (b @ a).T
  save_file(tensors, tmp_path / "two.safetensors")
  adapter = files.load(tmp_path, tiny).adapter
  assert adapter.layout == {KERNEL: Site((3, 2), (1.5, 8.0))}
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), tiny.abstract_params)
  merged = trees.named_leaves(lora.merge(zeros, adapter.delta, adapter.layout))
  np.testing.assert_allclose(
    merged[KERNEL], [wanted[0], wanted[1]], rtol=1e-5, atol=1e-5
  )

  # And a file of the second block alone.
  save_file(
    {k: v for k, v in tensors.items() if "blocks_1" in k}, tmp_path / "two.safetensors"
  )
  adapter = files.load(tmp_path, tiny).adapter
  assert adapter.layout == {KERNEL: Site((0, 2), (0.0, 8.0))}
  merged = trees.named_leaves(lora.merge(zeros, adapter.delta, adapter.layout))
  np.testing.assert_allclose(
    merged[KERNEL], [0 * wanted[0], wanted[1]], rtol=1e-5, atol=1e-5
  )
  # Written again it says nothing of the first block.
  for style in files.STYLES:
    again = files.save(
      tmp_path / "out" / f"{style}.safetensors", adapter, SDXL, style=style
    )
    assert not any("blocks_0" in k or "blocks.0" in k for k in load_file(again))
    assert_equal(files.load(again, tiny).adapter, adapter)


def test_spellings_of_one_key(tiny, tmp_path):
  """What scripts of five kinds call one matrix."""
  a, b = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
  spellings = {
    f"unet.{MODULE}.1.attn1.to_out.0.lora_A.weight": "lora_B",
    f"base_model.model.{MODULE}.1.attn1.to_out.0.lora_A.weight": "lora_B",
    f"unet.{MODULE}.1.attn1.to_out.0.lora.down.weight": "lora.up",
    f"unet.{MODULE}.1.attn1.processor.to_out_lora.down.weight": "to_out_lora.up",
    f"lora_unet_{MODULE.replace('.', '_')}_1_attn1_to_out_0.lora_down.weight": "lora_up",
    "lora_unet_middle_block_1_transformer_blocks_1_attn1_to_out_0.lora_down.weight": "lora_up",
  }
  text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": np.ones((), np.float32)}
  for key, other in spellings.items():
    down = other.replace("up", "down").replace("lora_B", "lora_A")
    save_file({key: a, key.replace(down, other): b, **text}, tmp_path / "x.safetensors")
    loaded = files.load(tmp_path / "x.safetensors", tiny)
    name = KERNEL.replace("to_q", "to_out.0")
    assert loaded.adapter.layout == {name: Site((0, 2), (0.0, 2.0))}, key
    assert loaded.text_keys == tuple(text)


def test_stabilitys_names_of_sdxl():
  """Keys of LoRAs that kohya's scripts trained on SDXL."""
  config = {
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  }
  spell = lora_names.to_sgm(config)
  for module, expected in {
    "conv_in": "input_blocks_0_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": (
      "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0": (
      "middle_block_1_transformer_blocks_3_attn2_to_out_0"
    ),
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.attentions.2.proj_out": "output_blocks_2_1_proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.2.resnets.2.time_emb_proj": "output_blocks_8_0_emb_layers_1",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_out": "out_2",
  }.items():
    assert lora_names.kohya(spell(module)) == f"lora_unet_{expected}"


def test_headers(tiny, tmp_path):
  adapter = draw(tiny, Spec(2, ((r"attn1.*kernel$", 4), *lora.ATTENTION), 0.5))
  config = {**SDXL, "cross_attention_dim": 2048}
  facts = {"ss_seed": "7", "modelspec.title": "mine"}

  def header(style):
    file = files.save(
      tmp_path / "x.safetensors", adapter, config, style=style, facts=facts
    )
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    data = hashlib.sha256(raw[8 + length :]).hexdigest()
    return json.loads(raw[8 : 8 + length])["__metadata__"], data

  found, data = header("kohya")
  assert found == {
    "format": "pt",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "0.5",
    "ss_base_model_version": "sdxl_base_v1-0",
    "sshs_model_hash": data,
    "modelspec.hash_sha256": f"0x{data}",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    **facts,
  }
  found, _ = header("peft")
  described = json.loads(found["lora_adapter_metadata"])
  assert described["unet.r"] == 4 and described["unet.lora_alpha"] == 0.5
  modules = described["unet.target_modules"]
  assert f"{MODULE}.1.attn2.to_q" in modules and len(modules) == 2 * 8 * 4
  assert described["unet.rank_pattern"] == {
    f"^{module}": 2 for module in modules if "attn2" in module
  }
  assert found["modelspec.title"] == "mine"
  assert lora_names.architecture(SDXL) == {}  # of no model that people know


def save(path, **changes):
  """A good file of one kernel, changed."""
  key = f"unet.{MODULE}.0.attn1.to_q"
  good = {
    f"{key}.lora_A.weight": np.ones((2, 32), np.float32),
    f"{key}.lora_B.weight": np.ones((32, 2), np.float32),
  }
  for old, new in changes.pop("rename", {}).items():
    good = {k.replace(old, new): v for k, v in good.items()}
  good |= changes.pop("more", {})
  save_file({k: v for k, v in good.items() if v is not None}, path, **changes)
  return key


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"rename": {"mid_block": "mid_bloc"}},
      rf"2 of 2 tensors are for modules .* first 'mid_bloc\..*closest: '{MODULE}",
    ),
    ({"rename": {"lora_B": "lora_C"}}, "is no key of a LoRA; expected one that ends"),
    ({"more": {"x.dora_scale": np.ones(3)}}, "'x.dora_scale' is of DoRA"),
    ({"more": {"x.hada_w1_a": np.ones(3)}}, "is of LoHa"),
    ({"rename": {"to_q": "to_k_x"}}, "closest"),
    (
      {"metadata": {"lora_adapter_metadata": '{"unet.use_dora": true}'}},
      "is of DoRA, which is not implemented",
    ),
  ],
)
def test_files_that_are_refused(tiny, tmp_path, changes, words):
  save(tmp_path / "x.safetensors", **changes)
  with pytest.raises(UserError, match=words):
    files.load(tmp_path / "x.safetensors", tiny)


def test_shapes_and_halves_that_are_refused(tiny, tmp_path):
  file = tmp_path / "x.safetensors"
  key = save(file)
  save(file, more={f"{key}.lora_B.weight": None})
  with pytest.raises(UserError, match=r"'mid_block.*to_q' has \['A'\]; expected both"):
    files.load(file, tiny)
  save(file, more={f"{key}.lora_A.weight": np.ones((2, 31), np.float32)})
  with pytest.raises(UserError, match=r"\(2, 31\) and \(32, 2\); expected \(2, 32\)"):
    files.load(file, tiny)
  save_file({"lora_te_x.alpha": np.ones(1)}, file)
  with pytest.raises(UserError, match="1 tensors for text encoders"):
    files.load(file, tiny)
  file.write_bytes(b"version https://git-lfs")
  with pytest.raises(UserError, match="not a readable safetensors file"):
    files.load(file, tiny)
  (tmp_path / "y.safetensors").touch()
  with pytest.raises(UserError, match=r"no LoRA file at .*one other \.safetensors"):
    files.load(tmp_path, tiny)
  with pytest.raises(
    UserError, match="unknown LoRA file format 'koya'; did you mean 'kohya'"
  ):
    files.save(file, draw(tiny, Spec(2)), SDXL, style="koya")
