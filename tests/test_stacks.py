"""Equal blocks in a row: stacked arrays and one loop, and nothing else is different."""

import functools
import json
import zlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lpo_jax import models, parallel, pretrained, trees
from lpo_jax.models import base
from lpo_jax.models.transformer import Context, Transformer

# What is special about SDXL, in one stage: three transformer blocks in a row.
XL = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": 4,
  "block_out_channels": [8],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "mid_block_type": None,
  "up_block_types": ["UpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 16,
  "norm_num_groups": 4,
  "transformer_layers_per_block": 3,
  "use_linear_projection": True,
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 8,
  "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
TEXT = {
  "architectures": ["CLIPTextModel"],
  "vocab_size": 99,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "max_position_embeddings": 9,
  "eos_token_id": 98,
}
BLOCKS = "down_blocks.0.attentions.0.transformer_blocks"


@pytest.fixture(scope="module")
def arguments():
  """Latents, timesteps, prompt, pooled prompt and sizes."""
  rng = np.random.default_rng(0)
  shapes = ((2, 4, 4, 4), (2, 5, 16), (2, 20))
  latents, prompt, pooled = (rng.standard_normal(s, np.float32) for s in shapes)
  sizes = np.asarray([[64, 48, 0, 3, 64, 64], [512, 512, 9, 0, 512, 512]], np.float32)
  return latents, np.asarray([7, 901]), prompt, pooled, sizes


def value_and_grad(arguments, **settings):
  """Mean square of a UNet's output, and its gradient, of the weights."""
  model = models.build(XL, **settings)

  def loss(params):
    return jnp.mean(jnp.square(model.apply(params, *arguments)))

  return jax.value_and_grad(loss), model.init(0)


def value_and_grad_of_blocks(arguments, **settings):
  """The same of what is between two resnets, which compiles in less time."""
  settings = base.Settings(**settings)
  model = base.Model.of(
    lambda: Transformer(8, 16, 2, 3, groups=4, linear=True, settings=settings),
    {},
    settings,
  )
  x = np.tile(arguments[0], 2)

  def loss(params):
    return jnp.mean(jnp.square(model.bind(params)(x, Context(arguments[2]))))

  return jax.value_and_grad(loss), model.init(0)


@pytest.fixture(scope="module")
def plain(arguments):
  """Nothing looped over and nothing computed again; of each of the two functions."""

  @functools.cache
  def run(make):
    function, params = make(arguments, scan="none", remat="none")
    return jax.jit(function)(params)

  return run


@pytest.mark.parametrize(
  ("make", "scan", "remat"),
  [
    # "full" wraps the whole network: it does not know of loops.
    pytest.param(value_and_grad, "stacks", "full", marks=pytest.mark.slow),
    pytest.param(value_and_grad, "stacks", "dots", marks=pytest.mark.slow),
    pytest.param(value_and_grad, "none", "blocks", marks=pytest.mark.slow),
    (value_and_grad_of_blocks, "stacks", "none"),
    (value_and_grad_of_blocks, "stacks", "dots"),
    (value_and_grad_of_blocks, "stacks", "blocks"),
    (value_and_grad_of_blocks, "none", "dots"),
    (value_and_grad_of_blocks, "none", "blocks"),
  ],
)
def test_loops_and_remat_change_no_gradient(arguments, plain, make, scan, remat):
  function, params = make(arguments, scan=scan, remat=remat)
  value, gradient = jax.jit(function)(params)
  expected_value, expected = plain(make)
  np.testing.assert_allclose(value, expected_value, rtol=1e-6)
  ours, expected = trees.named_leaves(gradient), trees.named_leaves(expected)
  assert ours.keys() == expected.keys()
  largest = max(np.linalg.norm(g) for g in expected.values())
  for name, g in expected.items():
    # A bias before a norm that removes it has gradient 0: only noise to compare.
    bound = max(np.linalg.norm(g), 1e-3 * largest)
    assert np.linalg.norm(ours[name] - g) <= 2e-6 * bound, name


def products(jaxpr):
  """How many products, of a loop as often as it runs: matrices, attention, convolutions.

  Only attention's products have a batch, the heads.
  """
  counts = np.zeros(3, int)
  for equation in jaxpr.eqns:
    if equation.primitive is jax.lax.dot_general_p:
      counts[int(len(equation.params["dimension_numbers"][1][0]) > 0)] += 1
    counts[2] += equation.primitive is jax.lax.conv_general_dilated_p
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      counts += times * products(inner)
  return counts


def test_what_is_computed_again(arguments):
  def count(scan, remat):
    function, params = value_and_grad(arguments, scan=scan, remat=remat)
    return products(jax.make_jaxpr(function)(params).jaxpr)

  policies = ("none", "dots", "blocks", "full")
  none, dots, blocks, full = (count("stacks", remat) for remat in policies)
  # A loop is as much work as its blocks one after the other.
  np.testing.assert_array_equal(blocks, count("none", "blocks"))
  # Two attentions of two products in each of three blocks; "dots" keeps all others,
  # and recomputes what the backward pass of these four reads: the logits.
  matrices, attention, convolutions = dots - none
  assert matrices == 0 and convolutions == 0
  assert 2 * 3 <= attention <= 4 * 3
  assert np.all(blocks > none) and np.all(full >= blocks) and full[0] > blocks[0]


def test_names_of_blocks():
  assert trees.block_names("a.each.b.kernel", (3, 4, 5)) == [
    "a.0.b.kernel",
    "a.1.b.kernel",
    "a.2.b.kernel",
  ]
  assert trees.block_names("each.0", (1, 2)) == ["0.0"]
  # A word that holds it is not it.
  assert trees.block_names("reach.kernel", (3, 4)) == ["reach.kernel"]
  assert not trees.is_stacked("a.each_other.kernel")


def test_every_block_is_drawn_as_if_it_stood_alone():
  stacked = trees.named_leaves(models.build(XL).init(7))
  alone = {**XL, "transformer_layers_per_block": 1}
  alone = trees.named_leaves(models.build(alone).init(7))
  for name, leaf in alone.items():
    inside = name.removeprefix(f"{BLOCKS}.0.")
    drawn = stacked[name if inside == name else f"{BLOCKS}.each.{inside}"]
    assert np.array_equal(drawn if inside == name else drawn[0], leaf), name
  # Uniform in 1 / sqrt(fan in = 4 x 8), from the seed and the block's own name.
  name = f"{BLOCKS}.2.ff.net.2.kernel"
  draw = np.random.default_rng([7, zlib.crc32(name.encode())]).random(
    (32, 8), np.float32
  )
  kernel = stacked[f"{BLOCKS}.each.ff.net.2.kernel"]
  assert kernel.shape == (3, 32, 8)
  np.testing.assert_allclose(kernel[2], (2 * draw - 1) / np.sqrt(32), atol=1e-7)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((8, 64, 48), PartitionSpec(None, "fsdp")),
    ((64, 8, 16), PartitionSpec(None, None, "fsdp")),  # the stack is the largest
    ((8, 63, 17), PartitionSpec()),  # only the stack divides
  ],
)
def test_the_axis_of_blocks_is_never_split(shape, spec):
  assert parallel._fsdp_spec(shape, 8, first=1) == spec
  assert parallel._fsdp_spec(shape, 8) != spec or shape[0] == 8


def test_a_stack_is_a_file_of_blocks(tmp_path):
  """Names and values in the file are those of blocks that lie one by one."""
  from safetensors.numpy import load_file

  model = models.build(XL)
  params = model.init(3)
  pretrained.save(tmp_path, pretrained.Part("unet", XL, params, model))
  tensors = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
  assert not any(trees.is_stacked(name) for name in tensors)
  leaves = trees.named_leaves(params)
  for block in range(3):
    kernel = leaves[f"{BLOCKS}.each.attn2.to_k.kernel"][block]
    assert np.array_equal(tensors[f"{BLOCKS}.{block}.attn2.to_k.weight"], kernel.T)
    scale = leaves[f"{BLOCKS}.each.norm3.scale"][block]
    assert np.array_equal(tensors[f"{BLOCKS}.{block}.norm3.weight"], scale)


EIGHT = """
  import json, pathlib, sys
  import jax, numpy as np
  from lpo_jax import models, parallel, pretrained, trees

  parallel.SMALLEST_SHARDED = 1
  folder, configs = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
  mesh = parallel.make_mesh(2, 4)
  for name, config in configs.items():
    model = models.build(config)
    params = model.init(0)
    pretrained.save(folder / "host", pretrained.Part(name, config, params, model))
    tree = parallel.param_shardings(model.abstract_params, mesh)
    part = pretrained.load(folder / "host", name, sharding=tree)
    whole, split = trees.named_leaves(params), trees.named_leaves(part.params)
    stacked = 0
    for leaf_name, leaf in split.items():
      for shard in leaf.addressable_shards:
        assert np.array_equal(shard.data, whole[leaf_name][shard.index]), leaf_name
      if trees.is_stacked(leaf_name):
        assert leaf.shape[0] == 4 and leaf.sharding.shard_shape(leaf.shape)[0] == 4
        stacked += not leaf.is_fully_replicated
    assert stacked >= 6, stacked
    pretrained.save(folder / "split", part)
    first, second = (
      next((folder / x / name).glob("*.safetensors")).read_bytes()
      for x in ("host", "split")
    )
    assert first == second, name
    # A caller may place a stack block by block: each device then reads only its own.
    def by_block(leaf_name, shape):
      spec = jax.P("fsdp") if trees.is_stacked(leaf_name) else jax.P()
      return jax.sharding.NamedSharding(mesh, spec)
    part = pretrained.load(folder / "host", name, sharding=by_block)
    for leaf_name, leaf in trees.named_leaves(part.params).items():
      for shard in leaf.addressable_shards:
        assert np.array_equal(shard.data, whole[leaf_name][shard.index]), leaf_name
    print(name, stacked)
"""


def test_eight_devices_read_and_write_their_slices_of_a_stack(on_devices, tmp_path):
  # Four blocks: a number that the four devices of an axis could split.
  configs = {
    "unet": {**XL, "transformer_layers_per_block": 4},
    "text_encoder": {**TEXT, "num_hidden_layers": 4},
  }
  printed = on_devices(8, EIGHT, tmp_path, json.dumps(configs))
  assert [line.split()[0] for line in printed.splitlines()] == list(configs)
