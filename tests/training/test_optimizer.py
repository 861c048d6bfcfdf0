"""A stack of blocks is updated as its blocks would be, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpo_jax import trees
from lpo_jax.training import optimizer

# Large enough to be factored; norms and biases of a block are vectors.
SHAPES = {"kernel": (128, 144), "bias": (144,)}
BLOCKS = 3


def draw(seed, scale):
  """Tensors of three blocks; where `scale` is not 1, another is largest in each draw."""
  rng = np.random.default_rng(seed)
  return {
    name: np.stack(
      [
        scale ** ((i + seed) % BLOCKS) * rng.standard_normal(shape, np.float32)
        for i in range(BLOCKS)
      ]
    )
    for name, shape in SHAPES.items()
  }


def stacked(tensors):
  return {"layers": {trees.EACH: tensors}, "head": {"bias": tensors["bias"][0]}}


def apart(tensors):
  blocks = {i: {n: x[i] for n, x in tensors.items()} for i in range(BLOCKS)}
  return {"layers": blocks, "head": {"bias": tensors["bias"][0]}}


def train(arrange, name, options):
  """Three updates; the weights by name, of a stack block by block."""
  params = jax.tree.map(jnp.asarray, arrange(draw(0, 1.0)))
  tx = optimizer.build(
    name,
    params,
    learning_rate=0.1,
    clip_norm=50.0,
    decay_rules=[("bias", False), (".*", True)],
    trainable_rules=[("head", False), (".*", True)],
    options=options,
  )
  state = tx.init(params)
  for seed in (1, 2, 3):
    gradients = arrange(draw(seed, 30.0))
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return {
    block: leaf[i] if trees.is_stacked(leaf_name) else leaf
    for leaf_name, leaf in trees.named_leaves(params).items()
    for i, block in enumerate(trees.block_names(leaf_name, leaf.shape))
  }


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("adamw", {"weight_decay": 0.1}),
    ("adafactor", {"weight_decay": 0.1, "momentum": 0.9}),
    ("adafactor", {}),
  ],
)
def test_a_stack_is_updated_block_by_block(name, options):
  ours, expected = train(stacked, name, options), train(apart, name, options)
  assert ours.keys() == expected.keys() and len(ours) == 2 * BLOCKS + 1
  for key, value in expected.items():
    np.testing.assert_allclose(ours[key], value, rtol=2e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_of_tensors_that_are_no_stack_is_optax(momentum):
  params = jax.tree.map(jnp.asarray, apart(draw(0, 1.0)))
  ours = optimizer.build(
    "adafactor",
    params,
    learning_rate=0.1,
    clip_norm=None,
    options={"momentum": momentum},
  )
  theirs = optax.chain(
    optax.adafactor(None, multiply_by_parameter_scale=False, momentum=momentum),
    optax.scale(0.1),
  )
  mine, state = ours.init(params), theirs.init(params)
  for seed in (1, 2):
    gradients = apart(draw(seed, 30.0 / seed))
    updates, mine = ours.update(gradients, mine, params)
    expected, state = theirs.update(gradients, state, params)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)


def test_first_moments_in_bfloat16_are_half_the_memory_and_nearly_the_same():
  """Moments of the gradient are rounded, those of its square are not."""

  def train_adamw(**options):
    params = {"kernel": jnp.asarray(draw(0, 1.0)["kernel"])}
    tx = optimizer.build("adamw", params, learning_rate=0.1, options=options)
    state = tx.init(params)
    for seed in (1, 2):
      gradient = {"kernel": draw(seed, 1.0)["kernel"]}
      updates, state = tx.update(gradient, state, params)
      params = optax.apply_updates(params, updates)
    named = trees.named_leaves(state)
    (mu,) = (x for name, x in named.items() if ".mu." in name)
    (nu,) = (x for name, x in named.items() if ".nu." in name)
    return params["kernel"], mu, nu

  kernel, mu, nu = train_adamw()
  rounded, short, square = train_adamw(mu_dtype="bfloat16")
  assert (mu.dtype, short.dtype, square.dtype) == (
    jnp.float32,
    jnp.bfloat16,
    jnp.float32,
  )
  np.testing.assert_array_equal(square, nu)
  np.testing.assert_allclose(short.astype(jnp.float32), mu, rtol=2**-6, atol=1e-3)
  # Rounded to 8 bits: an update of 0.1 is at most some 0.4 % off.
  off = np.abs(rounded - kernel)
  assert 0 < off.max() < 0.1 * 2**-6
