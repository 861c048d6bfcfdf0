"""The UNet against diffusers, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import models, trees
from lpo_jax.errors import UserError

TINY = {
  "sample_size": 8,
  "block_out_channels": [16, 32],
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 24,
  "norm_num_groups": 4,
}
# What SDXL has and Stable Diffusion 1 has not.
XL = {
  **TINY,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
  "attention_head_dim": [2, 4],
  "transformer_layers_per_block": [1, 2],
  "use_linear_projection": True,
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 8,
  "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
# SDXL's refiner: five sizes, no transformer at the lowest resolution but in the middle.
REFINER = {
  **XL,
  "block_out_channels": [8, 16, 16],
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "attention_head_dim": [2, 4, 8],
  "transformer_layers_per_block": 4,
  "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
# Stable Diffusion 2: linear projections, heads per stage.
TWO = {
  **TINY,
  "attention_head_dim": [2, 4],
  "use_linear_projection": True,
  "upcast_attention": True,
}
# SSD-1B: depths that differ between layers and between ways, a mid block of one resnet.
UNEVEN = {
  **XL,
  "block_out_channels": [16, 32, 32],
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "layers_per_block": 2,
  "mid_block_type": "UNetMidBlock2D",
  "attention_head_dim": [1, 2, 4],
  "transformer_layers_per_block": [1, [2, 1], [1, 1]],
  "reverse_transformer_layers_per_block": [[1, 1, 2], [2, 1, 1], 1],
}


def build(config, **options):
  return models.build({"_class_name": "UNet2DConditionModel", **config}, **options)


def inputs(config, size, batch=2):
  """Latents, timesteps, prompt and, for XL, pooled prompt and sizes."""
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  arguments = [
    normal(batch, size, size, config.get("in_channels", 4)),
    np.asarray([7, 901][:batch]),
    normal(batch, 5, config["cross_attention_dim"]),
  ]
  if "addition_embed_type" in config:
    sizes = np.asarray([[64, 48, 0, 3, 64, 64], [512, 512, 9, 0, 512, 512]], np.float32)
    ids = (config["projection_class_embeddings_input_dim"] - 20) // 8
    arguments += [normal(batch, 20), sizes[:batch, :ids]]
  return arguments


def run_torch(peer, latents, timesteps, prompt, pooled=None, sizes=None):
  tensor = peer.torch.tensor
  extra = {}
  if pooled is not None:
    extra = {"text_embeds": tensor(pooled), "time_ids": tensor(sizes)}
  output = peer.module(
    tensor(latents.transpose(0, 3, 1, 2)),
    tensor(timesteps),
    tensor(prompt),
    added_cond_kwargs=extra,
  )
  return output.sample.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
  ("config", "size", "with_gradient"),
  [
    # Edits have the source image in four more channels; 7 does not halve and double.
    pytest.param({**TINY, "in_channels": 8}, 7, True, id="sd15-edit-odd"),
    pytest.param(XL, 8, True, id="sdxl"),
    pytest.param(UNEVEN, 8, False, id="ssd1b"),
    pytest.param(REFINER, 8, False, id="sdxl-refiner"),
    pytest.param(TWO, 4, False, id="sd21"),
  ],
)
def test_equals_diffusers(peer, relative_error, config, size, with_gradient):
  diffusers = pytest.importorskip("diffusers")
  unet = peer(diffusers.UNet2DConditionModel(**config), "unet")
  arguments = inputs(config, size)
  expected = run_torch(unet, *arguments)
  weights = np.random.default_rng(2).standard_normal(expected.shape, np.float32)

  if not with_gradient:
    actual = jax.jit(unet.part.apply)(unet.part.params, *arguments)
    assert relative_error(actual, expected.detach()) < 1e-5
    return

  def scalar(params):
    output = unet.part.apply(params, *arguments)
    return jnp.mean(output * weights), output

  gradients, actual = jax.jit(jax.grad(scalar, has_aux=True))(unet.part.params)
  assert actual.dtype == jnp.float32
  assert relative_error(actual, expected.detach()) < 1e-5
  theirs = unet.gradients((expected * unet.torch.tensor(weights)).mean())
  ours = trees.named_leaves(gradients)
  assert ours.keys() == theirs.keys()
  largest = max(np.linalg.norm(g) for g in theirs.values())
  for name, gradient in theirs.items():
    # A bias before a norm that removes it has gradient 0: only noise to compare.
    bound = max(np.linalg.norm(gradient), 1e-3 * largest)
    assert np.linalg.norm(ours[name] - gradient) < 1e-4 * bound, name


SMALLEST = {
  **TINY,
  "block_out_channels": [8],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D"],
}


def test_remat_changes_no_gradient(relative_error):
  config = {**SMALLEST, "mid_block_type": None}
  arguments = inputs(config, 4)
  results = []
  for remat in ("none", "dots"):  # the others: tests/test_stacks.py and test_clip.py
    model = build(config, remat=remat)
    params = model.init(0)

    def loss(params, model=model):
      return jnp.mean(jnp.square(model.apply(params, *arguments)))

    gradients = jax.jit(jax.grad(loss))(params)
    results.append(np.concatenate([g.ravel() for g in jax.tree.leaves(gradients)]))
  assert np.linalg.norm(results[0]) > 1e-3
  assert relative_error(results[1], results[0]) < 1e-6


def test_half_precision_is_close_and_ends_in_fp32(relative_error):
  arguments = inputs(SMALLEST, 4)
  params = build(SMALLEST).init(0)
  whole = jax.jit(build(SMALLEST).apply)(params, *arguments)
  model = build(SMALLEST, dtype=jnp.bfloat16)
  options = {"xla_allow_excess_precision": False}
  apply = jax.jit(model.apply, compiler_options=options)
  half = apply(params, *arguments)
  assert half.dtype == jnp.float32
  assert 1e-5 < relative_error(half, whole) < 0.03

  # Stored in half precision too, it says the same to the last bit.
  narrow = model.narrow(params)
  assert np.array_equal(apply(narrow, *arguments), half)
  dtypes = {name: leaf.dtype for name, leaf in trees.named_leaves(narrow).items()}
  assert dtypes["mid_block.resnets.0.conv1.kernel"] == jnp.bfloat16
  assert dtypes["mid_block.resnets.0.conv1.bias"] == jnp.float32
  assert dtypes["time_embedding.linear_1.kernel"] == jnp.float32
  assert dtypes["conv_out.kernel"] == jnp.float32
  abstract = trees.named_leaves(model.narrow(model.abstract_params))
  assert dtypes == {name: leaf.dtype for name, leaf in abstract.items()}


def test_init_follows_the_seed_and_torch_defaults():
  model = build(SMALLEST)
  first = trees.named_leaves(model.init(0))
  again = trees.named_leaves(model.init(0))
  other = trees.named_leaves(model.init(1))
  kernel = first["conv_in.kernel"]
  assert kernel.shape == (3, 3, 4, 8) and kernel.dtype == np.float32
  bound = 1 / 6  # 1 / sqrt(3 * 3 * 4)
  assert 0.9 * bound < np.abs(kernel).max() <= bound
  assert np.abs(first["conv_in.bias"]).max() <= bound
  assert np.all(first["conv_norm_out.scale"] == 1)
  assert np.all(first["conv_norm_out.bias"] == 0)
  assert all(np.array_equal(first[name], again[name]) for name in first)
  assert not np.array_equal(kernel, other["conv_in.kernel"])
  # Drawn by name: two tensors of one shape are not the same numbers.
  resnet = "mid_block.resnets.{}.conv1.kernel"
  assert not np.array_equal(first[resnet.format(0)], first[resnet.format(1)])


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("class_embed_type", "timestep"),
    ("dual_cross_attention", True),
    ("resnet_time_scale_shift", "scale_shift"),
    ("encoder_hid_dim", 4096),
    ("only_cross_attention", [True, False]),
    ("conv_in_kernel", 1),
    ("time_cond_proj_dim", 256),
    ("num_attention_heads", 8),
    ("addition_embed_type", "image"),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
    ("attention_head_dim", [1, 2, 3]),
    ("some_new_field", 3),
  ],
)
def test_refuses_what_it_does_not_implement_by_name(field, value):
  with pytest.raises(UserError, match=field):
    build({**TINY, field: value})


def test_tolerates_fields_that_are_switched_off_or_private():
  build({**TINY, "some_new_field": None, "another": False, "_diffusers_version": "0.6"})


@pytest.mark.parametrize(
  ("config", "named"),
  [
    ({"_class_name": "UNet2DConditionModl"}, "did you mean 'UNet2DConditionModel'"),
    ({"sample_size": 8}, "names no class"),
  ],
)
def test_unknown_class(config, named):
  with pytest.raises(UserError, match=named):
    models.build(config)


def test_unknown_options():
  with pytest.raises(UserError, match="unknown remat 'block'; did you mean 'blocks'"):
    build(TINY, remat="block")
  with pytest.raises(UserError, match="unknown attention 'xl'; did you mean 'xla'"):
    build(TINY, attention="xl")


def test_xl_needs_its_sizes():
  model = build(XL)
  with pytest.raises(UserError, match="time_ids"):
    model.apply(model.abstract_params, *inputs(XL, 8)[:3])
