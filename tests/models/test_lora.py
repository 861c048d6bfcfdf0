"""Factors as arithmetic: by hand, against convolutions, against singular values."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lpo_jax import models, trees
from lpo_jax.errors import UserError
from lpo_jax.models import lora
from lpo_jax.models.lora import Site, Spec


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def base():
  return {
    "conv": {"kernel": draw(3, 3, 4, 8), "bias": draw(8)},
    "blocks": {"each": {"to_q": {"kernel": draw(2, 6, 5)}}},
    "out": {0: {"kernel": draw(4, 3), "bias": draw(3)}},
  }


def test_merge_by_hand():
  base = {"a": {"kernel": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "bias": 7.0}}
  delta = {
    "a": {"kernel": {"A": np.array([[1.0], [2.0]]), "B": np.array([[10.0, 0.5]])}}
  }
  merged = lora.merge(base, delta, {"a.kernel": Site((1,), (3.0,))})
  np.testing.assert_array_equal(merged["a"]["kernel"], [[31.0, 3.5], [63.0, 7.0]])
  assert merged["a"]["bias"] == 7.0


def test_blocks_of_a_stack_have_their_own_rank_and_alpha(base):
  name = "blocks.each.to_q.kernel"
  layout = {name: Site((0, 2), (0.0, 8.0))}
  delta = lora.build(
    base, layout, lambda n, leaf, f: draw(*lora.shapes(n, leaf.shape, 2)[f])
  )
  factors = trees.named_leaves(delta)
  merged = np.asarray(
    lora.merge(base, delta, layout)["blocks"]["each"]["to_q"]["kernel"]
  )
  kernel = base["blocks"]["each"]["to_q"]["kernel"]
  np.testing.assert_array_equal(merged[0], kernel[0])
  wanted = kernel[1] + 4 * factors[f"{name}.A"][1] @ factors[f"{name}.B"][1]
  np.testing.assert_allclose(merged[1], wanted, rtol=1e-5, atol=1e-5)


def test_a_merged_convolution_is_two_convolutions_beside_it(base):
  layout = {"conv.kernel": Site((2,), (3.0,))}
  delta = lora.build(
    base, layout, lambda n, leaf, f: draw(*lora.shapes(n, leaf.shape, 2)[f])
  )
  a, b = delta["conv"]["kernel"]["A"], delta["conv"]["kernel"]["B"]
  x = draw(1, 5, 5, 4, seed=1)

  def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )

  merged = convolve(x, lora.merge(base, delta, layout)["conv"]["kernel"])
  beside = convolve(x, base["conv"]["kernel"]) + 1.5 * convolve(x, a) @ b
  np.testing.assert_allclose(merged, beside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_before_training_the_merged_weights_are_the_base(base, dtype):
  base = jax.tree.map(lambda x: jnp.asarray(x, dtype), base)
  layout = lora.lay_out(Spec(2, lora.KERNELS, 5.0), base)
  merged = lora.merge(base, lora.init(0, base, layout), layout)
  for name, leaf in trees.named_leaves(merged).items():
    assert leaf.dtype == (np.float32 if name in layout else dtype)
    np.testing.assert_array_equal(
      leaf, trees.named_leaves(base)[name].astype(leaf.dtype)
    )


def test_targets_are_rules_in_order(base):
  rules = ((r"^conv\.", 3), (r"each.*kernel$", True), (".*", False))
  with pytest.raises(UserError, match=r"choose 'conv\.bias', which is no kernel"):
    lora.lay_out(Spec(2, rules), base)
  rules = ((r"conv\.kernel", 3), *rules[1:])
  assert lora.lay_out(Spec(2, rules), base) == {
    "blocks.each.to_q.kernel": Site((2, 2), (2.0, 2.0)),
    "conv.kernel": Site((3,), (3.0,)),
  }
  assert lora.lay_out(Spec(2, rules, 6.0), base)["conv.kernel"] == Site((3,), (6.0,))


@pytest.mark.parametrize(
  ("targets", "words"),
  [
    (((".*", False),), "choose nothing"),
    ((("kernel", True),), r"no LoRA target rule matches parameter '.*bias'"),
    (
      ((r"kernel$", "all"), (".*", False)),
      r"says 'all'; expected True \(the rank, 2\)",
    ),
    (((r"kernel$", -1), (".*", False)), "says -1"),
  ],
)
def test_rules_that_cannot_be_used(base, targets, words):
  with pytest.raises(UserError, match=words):
    lora.lay_out(Spec(2, targets), base)


def test_the_default_targets_of_sdxl():
  """70 blocks of two attentions of four matrices: as diffusers' scripts."""
  unet = models.build(
    {
      "_class_name": "UNet2DConditionModel",
      "block_out_channels": [320, 640, 1280],
      "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
      "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
      "attention_head_dim": [5, 10, 20],
      "cross_attention_dim": 2048,
      "transformer_layers_per_block": [1, 2, 10],
      "use_linear_projection": True,
    }
  )
  layout = lora.lay_out(Spec(64), unet.abstract_params)
  assert sum(len(site.ranks) for site in layout.values()) == 70 * 8
  # A block of width w has six matrices w x w and two 2048 x w (from the text).
  layout = lora.lay_out(Spec(4), unet.abstract_params)
  of_width = {w: 4 * (6 * 2 * w + 2 * (w + 2048)) for w in (640, 1280)}
  count = lora.count(lora.abstract(unet.abstract_params, layout))
  assert count == 60 * of_width[1280] + 10 * of_width[640] == 5_806_080


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero(base):
  layout = lora.lay_out(Spec(64, lora.KERNELS), base)
  delta = trees.named_leaves(lora.init(0, base, layout))
  assert all(not leaf.any() for name, leaf in delta.items() if name.endswith(".B"))
  # torch's kaiming_uniform_(a=sqrt(5)): uniform in +-1/sqrt(fan_in).
  for name, fan_in in (("conv.kernel", 36), ("blocks.each.to_q.kernel", 6)):
    a = delta[f"{name}.A"]
    assert abs(a).max() <= fan_in**-0.5
    np.testing.assert_allclose(a.std(), (3 * fan_in) ** -0.5, rtol=0.05)
  a = trees.named_leaves(lora.init(0, base, layout, "gaussian"))["conv.kernel.A"]
  np.testing.assert_allclose(a.std(), 1 / 64, rtol=0.05)
  with pytest.raises(UserError, match="unknown LoRA init 'gausian'; did you mean"):
    lora.init(0, base, layout, "gausian")


def test_a_draw_depends_on_seed_and_name_alone(base):
  layout = lora.lay_out(Spec(2, lora.KERNELS), base)
  delta = lora.init(3, base, layout)
  stack = delta["blocks"]["each"]["to_q"]["kernel"]["A"]
  alone = {"blocks": {1: {"to_q": {"kernel": draw(6, 5)}}}}
  of_one = lora.init(3, alone, lora.lay_out(Spec(2, lora.KERNELS), alone))
  np.testing.assert_array_equal(stack[1], of_one["blocks"][1]["to_q"]["kernel"]["A"])
  assert not np.array_equal(stack[0], stack[1])
  other = lora.init(4, base, layout)["blocks"]["each"]["to_q"]["kernel"]["A"]
  assert not np.array_equal(stack, other)


def test_extraction_finds_a_difference_of_that_rank(base):
  layout = lora.lay_out(Spec(2, lora.KERNELS), base)
  delta = lora.build(
    base, layout, lambda n, leaf, f: draw(*lora.shapes(n, leaf.shape, 2)[f])
  )
  tuned = lora.merge(base, delta, layout)
  found = lora.extract(base, tuned, Spec(2, lora.KERNELS, 5.0))
  again = lora.merge(base, found.adapter.delta, found.adapter.layout)
  for name, leaf in trees.named_leaves(tuned).items():
    np.testing.assert_allclose(
      trees.named_leaves(again)[name], leaf, rtol=1e-5, atol=2e-5, err_msg=name
    )
  assert min(found.kept.values()) > 1 - 1e-6
  assert found.kept_overall == pytest.approx(1, abs=1e-6)
  # A larger rank than there is adds nothing, and no NaN.
  wide = lora.extract(base, tuned, Spec(32, lora.KERNELS))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(wide.adapter.delta))


def test_extraction_keeps_the_largest_singular_values():
  base = {
    "a": {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4, np.float32)}
  }
  kernel = np.zeros((3, 4), np.float32)
  kernel[[0, 1, 2], [2, 0, 3]] = 1.0, -4.0, 2.0
  bias = np.array([2, 0, 0, 0], np.float32)
  found = lora.extract(
    base, {"a": {"kernel": kernel, "bias": bias}}, Spec(1, lora.KERNELS)
  )
  merged = lora.merge(base, found.adapter.delta, found.adapter.layout)["a"]["kernel"]
  np.testing.assert_allclose(merged, np.where(kernel == -4, kernel, 0), atol=1e-6)
  assert found.kept == {"a.kernel": pytest.approx(16 / 21)}
  assert found.kept_overall == pytest.approx(16 / 25)


def test_nothing_changed_is_all_kept(base):
  found = lora.extract(base, base, Spec(2, lora.KERNELS))
  assert set(found.kept.values()) == {1.0} and found.kept_overall == 1.0
  assert not any(x.any() for x in jax.tree.leaves(found.adapter.delta))
