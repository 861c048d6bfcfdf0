"""Factors or some weights of a network: the step of all methods, told apart by nothing."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lpo_jax import models, parallel, trees
from lpo_jax.errors import UserError
from lpo_jax.models import lora
from lpo_jax.training import optimizer, state, step, tuning

RULES = ((r"(text|out)\.kernel$", True), (".*", False))


def make_delta(base, *, rank=2, alpha=3.0):
  layout = lora.lay_out(lora.Spec(rank, RULES, alpha), base)
  rng = np.random.default_rng(0)

  def make(name, leaf, factor):
    shape = lora.shapes(name, leaf.shape, rank)[factor]
    return 0.3 * rng.standard_normal(shape).astype(np.float32)

  return lora.build(base, layout, make), layout


@pytest.mark.parametrize("objective", ["lpo", "sft"])
def test_the_gradient_is_that_of_the_merged_weights(world, objective):
  """d/dA = s dW B^T and d/dB = s A^T dW; sft reads no reference but has its base."""
  base = world.make_params(1)
  delta, layout = make_delta(base)
  batch = world.make_batch()
  whole = world.make_method(objective)
  factors = world.make_method(
    objective, weights=lambda d, b: lora.merge(b, d, layout), microbatch=6, unroll=True
  )

  def value_and_grad(method, trainable, frozen):
    fn = jax.value_and_grad(
      lambda p: step.loss_and_metrics(method, p, frozen, batch), has_aux=True
    )
    return jax.jit(fn)(trainable)

  (loss, metrics), grads = value_and_grad(factors, delta, base)
  merged = lora.merge(base, delta, layout)
  frozen = base if whole.has_reference else None
  (expected, their_metrics), dw = value_and_grad(whole, merged, frozen)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert metrics.keys() == their_metrics.keys()
  for name in ("text", "out"):
    a, b = delta[name]["kernel"]["A"], delta[name]["kernel"]["B"]
    wanted = {"A": 1.5 * dw[name]["kernel"] @ b.T, "B": 1.5 * a.T @ dw[name]["kernel"]}
    for factor, gradient in wanted.items():
      np.testing.assert_allclose(
        grads[name]["kernel"][factor], gradient, rtol=1e-4, atol=1e-6
      )


class Run:
  """A few updates of the linear network's factors on a mesh."""

  def __init__(self, world, mesh, batch, objective="lpo"):
    base = world["make_params"](1)
    delta, layout = make_delta(base)
    self.mesh, self.batch = mesh, parallel.global_batch(mesh, batch)
    self.frozen = parallel.put(base, parallel.param_shardings(base, mesh))
    self.optimizer = optimizer.build("adamw", delta, learning_rate=0.01)
    where = parallel.param_shardings(delta, mesh)
    like = state.placement(mesh, delta, self.optimizer, with_ema=True, shardings=where)
    self.state = state.place(like, parallel.put(delta, where), self.optimizer)
    self.compiled = step.compile_train_step(
      mesh,
      self.state,
      self.frozen,
      self.batch,
      method=world["make_method"](
        objective, weights=lambda d, b: lora.merge(b, d, layout)
      ),
      optimizer=self.optimizer,
      ema_decay=0.9,
    )

  def __call__(self, count):
    rows = []
    for _ in range(count):
      self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
      rows.append({name: float(x) for name, x in metrics.items()})
    return rows


def bytes_of(tree):
  return {n: np.asarray(x).tobytes() for n, x in trees.named_leaves(tree).items()}


def wide_batch(world):
  """16 slots: they divide over 8 devices."""
  ranks = ((0, 1, 2, 3, 4), (2, 0, 1, 1, 0), (0, 1, 1, 0, 0), (3, 1, 0, 2, 0))
  return world["make_batch"](0, lists=(5, 4, 3, 4), ranks=ranks)


EIGHT = """
  import json, runpy
  from lpo_jax import models, parallel, trees
  from lpo_jax.models import lora
  from lpo_jax.training import optimizer, state
  parallel.SMALLEST_SHARDED = 1
  world = runpy.run_path("tests/training/conftest.py")
  tests = runpy.run_path("tests/training/test_tuning.py")
  mesh = parallel.make_mesh(2, 4)
  run = tests["Run"](world, mesh, tests["wide_batch"](world))
  shard = run.state.params["text"]["kernel"]["B"].addressable_shards[0].data.shape
  out = {"rows": run(3), "shard": shard}

  model = models.build({"_class_name": "UNet2DConditionModel", **tests["XL"]})
  shapes = lora.abstract(
    model.abstract_params, lora.lay_out(lora.Spec(4), model.abstract_params)
  )
  where = parallel.param_shardings(shapes, mesh)
  tx = optimizer.build("adamw", shapes, learning_rate=1.0)
  like = state.placement(mesh, shapes, tx, with_ema=True, shardings=where)
  out["places"] = {n: list(x.sharding.spec) for n, x in trees.named_leaves(like).items()}
  print(json.dumps(out))
"""
XL = {
  "block_out_channels": [32],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "mid_block_type": None,
  "up_block_types": ["UpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 24,
  "norm_num_groups": 4,
  "transformer_layers_per_block": 2,
}


def test_one_device_and_eight(world, on_devices):
  world = vars(world)
  run = Run(world, parallel.make_mesh(devices=jax.devices()[:1]), wide_batch(world))
  rows = run(3)
  out = json.loads(on_devices(8, EIGHT))
  for mine, theirs in zip(out["rows"], rows, strict=True):
    assert mine.keys() == theirs.keys()
    for name in ("loss", "grad_norm", "drift"):
      np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, err_msg=name)
  assert len({row["loss"] for row in rows}) == 3
  assert out["shard"] == [2, 1]
  # Moments and mean lie where their factors lie; of a stack no block is split off.
  places = out["places"]
  factors = {n: p for n, p in places.items() if n.startswith("params.")}
  assert len(factors) == 16
  for name, spec in factors.items():
    assert spec == ([None, "fsdp"] if name.endswith(".A") else [None, None, "fsdp"])
    factor = name.removeprefix("params")
    mirrors = [n for n in places if n.endswith(factor)]
    assert len(mirrors) == 4  # and Adam's two, and the mean
    assert all(places[n] == spec for n in mirrors)


def test_the_base_does_not_move_and_is_not_kept(world):
  world = vars(world)
  run = Run(world, parallel.make_mesh(devices=jax.devices()[:1]), wide_batch(world))
  before = bytes_of(run.frozen)
  first = bytes_of(run.state.params)
  run(2)
  assert bytes_of(run.frozen) == before  # not donated, either
  after = bytes_of(run.state.params)
  assert after.keys() == first.keys()
  assert all(after[name] != first[name] for name in first)
  names = trees.named_leaves(run.state)
  arrays = [n for n, x in names.items() if x.ndim]
  assert arrays and all(n.endswith((".kernel.A", ".kernel.B")) for n in arrays)


@pytest.fixture(scope="module")
def unet():
  return models.build({"_class_name": "UNet2DConditionModel", **XL}, dtype=jnp.bfloat16)


def test_kernels_with_factors_stay_wide(unet):
  layout = lora.lay_out(lora.Spec(2), unet.abstract_params)
  factors = tuning.beside(unet, layout, dict)
  narrow = jax.eval_shape(lambda b: factors.freeze(b, False), unet.abstract_params)
  slim = trees.named_leaves(unet.narrow(unet.abstract_params))
  for name, leaf in trees.named_leaves(narrow).items():
    assert leaf.dtype == (jnp.float32 if name in layout else slim[name].dtype)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {
    "float32",
    "bfloat16",
  }
  shapes = lora.abstract(unet.abstract_params, layout)
  assert jax.tree.structure(factors.shapes) == jax.tree.structure(shapes)


def test_what_a_narrow_base_would_swallow():
  """Why they do: of Adam's first steps on SDXL next to nothing would arrive."""
  rng = np.random.default_rng(0)
  base = {"kernel": (0.02 * rng.standard_normal((640, 640))).astype(np.float32)}
  layout = lora.lay_out(lora.Spec(64, lora.KERNELS), base)
  delta = lora.init(0, base, layout)
  delta["kernel"]["B"] = 1e-5 * rng.choice([-1.0, 1.0], (64, 640)).astype(np.float32)
  product = delta["kernel"]["A"] @ delta["kernel"]["B"]

  def bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16)

  def arrives(base):
    """The share of the product that is left once the merged weights are bf16."""
    merged = lora.merge({"kernel": base}, delta, layout)["kernel"]
    moved = bf16(merged).astype(np.float32) - bf16(base).astype(np.float32)
    return float(np.vdot(moved, product) / np.vdot(product, product))

  assert abs(arrives(base["kernel"]) - 1) < 0.05
  assert arrives(bf16(base["kernel"])) < 0.1


def test_all_weights(unet):
  """Trained whole: the base is what is trained, the reference a copy of its own."""
  whole = tuning.whole(unet)
  base = {"x": jnp.ones(3)}
  assert whole.start(base, None) is base
  assert whole.freeze(base, False) is None
  assert whole.publish(base, lambda: pytest.fail("the base was asked for")) is base
  frozen = jax.eval_shape(lambda b: whole.freeze(b, True), unet.abstract_params)
  slim = unet.narrow(unet.abstract_params)
  assert jax.tree.map(lambda x: x.dtype, frozen) == jax.tree.map(
    lambda x: x.dtype, slim
  )
  # Of its own: what is trained is donated to the first step.
  trained = jax.tree.map(jnp.asarray, unet.init(0))
  frozen = whole.freeze(trained, True)
  for leaf in jax.tree.leaves(trained):
    leaf.delete()
  assert all(
    np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(frozen)
  )


@pytest.mark.parametrize("objective", ["lpo", "sft"])
def test_chosen_weights_have_the_gradient_they_have_among_all(world, objective):
  base = world.make_params(1)
  names = [n for n in trees.named_leaves(base) if n.startswith("out.")]
  part = trees.pick(base, names)
  assert list(trees.named_leaves(part)) == names
  moved = jax.tree.map(lambda x: x + 0.1, part)
  batch = world.make_batch()
  whole = world.make_method(objective)
  method = world.make_method(objective, weights=lambda p, b: trees.overlay(b, p))

  def value_and_grad(method, trainable, frozen):
    fn = jax.value_and_grad(
      lambda p: step.loss_and_metrics(method, p, frozen, batch), has_aux=True
    )
    return jax.jit(fn)(trainable)

  (loss, _), grads = value_and_grad(method, moved, base)
  full = trees.overlay(base, moved)
  frozen = base if whole.has_reference else None
  (expected, _), theirs = value_and_grad(whole, full, frozen)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  theirs = trees.named_leaves(theirs)
  for name, gradient in trees.named_leaves(grads).items():
    np.testing.assert_allclose(gradient, theirs[name], rtol=1e-5, atol=1e-7)


def test_chosen_weights_alone_are_trained_and_the_base_outlives_them(unet):
  rules = ((r"\.attn2\.", True), (".*", False))
  some = tuning.chosen(unet, rules)
  base = jax.tree.map(jnp.asarray, unet.init(0))
  values = {n: np.asarray(x) for n, x in trees.named_leaves(base).items()}
  frozen = some.freeze(base, False)  # what is frozen is needed without a reference too
  trained = some.start(base, None)
  names = trees.named_leaves(trained)
  assert names and all(".attn2." in name for name in names)
  assert jax.tree.structure(trained) == jax.tree.structure(some.shapes)
  assert some.has_base and not some.layout
  moved = jax.tree.map(lambda x: x + 1, trained)
  for leaf in names.values():  # as the step donates it
    leaf.delete()
  slim = trees.named_leaves(unet.narrow(unet.abstract_params))
  for name, leaf in trees.named_leaves(frozen).items():
    assert leaf.dtype == slim[name].dtype
    np.testing.assert_array_equal(leaf, values[name].astype(slim[name].dtype))
  wide = trees.unflatten_named(values, unet.abstract_params)
  published = trees.named_leaves(some.publish(moved, lambda: wide))
  for name, leaf in published.items():
    np.testing.assert_array_equal(leaf, values[name] + (name in names))


def test_rules_that_choose_all_or_nothing(unet):
  assert not tuning.chosen(unet, ((".*", True),)).has_base
  with pytest.raises(UserError, match="freezes every parameter"):
    tuning.chosen(unet, ((".*", False),))
  with pytest.raises(UserError, match="no trainable rule matches parameter"):
    tuning.chosen(unet, ((r"\.attn2\.", True),))
