"""Before the first update policy and reference are one: margins are 0, not nearly 0.

Half an ulp of an error is 1e-4 logits at beta 5000. What threatens it: XLA rounding or
summing differently in the network that is differentiated and in the one that is not.
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpo_jax
from lpo_jax import models, objectives, parallel, pretrained
from lpo_jax.diffusion import noising, schedule
from lpo_jax.models import layers, lora
from lpo_jax.training import optimizer, state, step, tuning
from lpo_jax.types import Batch, Conditioning, Ranking

UNET = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": 8,
  "block_out_channels": [32, 64],
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 32,
  "norm_num_groups": 8,
}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make_batch(slots, size, list_size):
  """Full lists without ties, one after the other."""
  rng = np.random.default_rng(0)
  count = slots // list_size
  shape = (count, list_size)
  return Batch(
    moments=rng.standard_normal((slots, size, size, 8)).astype(np.float32),
    conditioning=Conditioning(rng.standard_normal((slots, 7, 32)).astype(np.float32)),
    identity=np.stack(
      [np.repeat(np.arange(count), list_size), np.zeros(slots)], 1
    ).astype(np.uint32),
    item=np.tile(np.arange(list_size), count).astype(np.uint32),
    slot=np.arange(slots).reshape(shape).astype(np.int32),
    ranking=Ranking(
      rank=np.tile(np.arange(list_size, dtype=np.int32), (count, 1)),
      valid=np.ones(shape, bool),
      score=np.zeros(shape, np.float32),
      weight=np.ones(count, np.float32),
    ),
  )


def first_step(
  apply, params, batch, *, microbatch=0, narrow=lambda params: params, **method_fields
):
  """The metrics of the first update of LPO, reference = policy."""
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  shardings = parallel.param_shardings(params, mesh)
  tx = optimizer.build("adamw", params, learning_rate=1e-4)
  placed = parallel.put(params, shardings)
  method = step.Method(
    unet=apply,
    schedule=schedule.from_config(SD),
    noising=noising.get("forward"),
    objective=objectives.get("lpo", beta=5000.0),
    seed=0,
    scaling_factor=0.18215,
    microbatch=microbatch,
    **method_fields,
  )
  arguments = (
    state.place(
      state.placement(mesh, params, tx, with_ema=False, shardings=shardings), placed, tx
    ),
    narrow(parallel.put(params, shardings)),
    parallel.global_batch(mesh, batch),
  )
  compiled = step.compile_train_step(mesh, *arguments, method=method, optimizer=tx)
  _, metrics = compiled(*arguments)
  return {name: float(x) for name, x in metrics.items()}


def assert_nothing_has_moved(metrics, list_size):
  exact = ("margin", "drift", "winner_gain", "loser_gain")
  assert {name: metrics[name] for name in exact} == dict.fromkeys(exact, 0.0)
  assert metrics["implicit_acc"] == 0.5
  assert metrics["err"] == metrics["ref_err"]
  expected = math.log(math.factorial(list_size))
  assert abs(metrics["loss"] - expected) <= 1e-6 * expected
  assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


slow = pytest.mark.slow


@pytest.mark.parametrize(
  ("dtype", "microbatch"),
  [("float32", 0), ("bfloat16", 0), pytest.param("bfloat16", 8, marks=slow)],
)
def test_a_unet(dtype, microbatch):
  """With the reference stored in the dtype its kernels are used in."""
  model = models.build(UNET, dtype=jnp.dtype(dtype))
  metrics = first_step(
    model.apply,
    model.init(0),
    make_batch(16, 8, 4),
    microbatch=microbatch,
    narrow=model.narrow,
  )
  assert_nothing_has_moved(metrics, 4)


# The least that has a stack in it.
SMALL_STACK = {
  **UNET,
  "block_out_channels": [32],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "mid_block_type": None,
  "up_block_types": ["UpBlock2D"],
  "transformer_layers_per_block": 3,
}


@pytest.mark.parametrize(
  ("dtype", "remat", "microbatch", "scan"),
  [
    ("bfloat16", "blocks", 8, "stacks"),
    *(
      pytest.param(dtype, remat, microbatch, scan, marks=slow)
      for dtype in ("bfloat16", "float32")
      for remat in ("none", "dots", "blocks", "full")
      for microbatch in (0, 8)
      for scan in ("stacks", "none")
    ),
  ],
)
def test_what_is_looped_over_and_computed_again(dtype, remat, microbatch, scan):
  model = models.build(SMALL_STACK, dtype=jnp.dtype(dtype), remat=remat, scan=scan)
  metrics = first_step(
    model.apply,
    model.init(0),
    make_batch(16, 8, 4),
    microbatch=microbatch,
    narrow=model.narrow,
  )
  assert_nothing_has_moved(metrics, 4)


@pytest.mark.parametrize(
  ("targets", "microbatch"),
  [
    (lora.ATTENTION, 8),
    pytest.param(lora.KERNELS, 0, marks=slow),
    pytest.param(lora.KERNELS, 8, marks=slow),
  ],
)
def test_factors_of_which_one_is_zero(targets, microbatch):
  """Kernels with factors stay fp32 in the frozen base, which is the reference."""
  model = models.build(SMALL_STACK, dtype=jnp.bfloat16)
  layout = lora.lay_out(lora.Spec(4, targets, 3.0), model.abstract_params)
  base = model.init(0)
  factors = tuning.beside(model, layout, lambda: lora.init(0, base, layout))
  metrics = first_step(
    model.apply,
    lora.init(0, base, layout),
    make_batch(16, 8, 4),
    microbatch=microbatch,
    narrow=lambda _: factors.freeze(base, True),
    weights=factors.weights,
  )
  assert_nothing_has_moved(metrics, 4)


def convolve(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@dataclasses.dataclass(frozen=True)
class Convolutions:
  """Two convolutions with a norm between: enough for XLA to fuse what it likes."""

  dtype: str

  def apply(self, params, x, t, prompt_embeds, pooled=None, time_ids=None):
    del pooled, time_ids
    x = convolve(x.astype(self.dtype), params["conv_in"].astype(self.dtype))
    x = x + params["bias"].astype(self.dtype)
    x = x + (prompt_embeds.mean(1) @ params["text"]).astype(self.dtype)[:, None, None]
    x = (x + jnp.sin(t / 100.0)[:, None, None, None]).astype(jnp.float32)
    mean = x.mean((1, 2, 3), keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
    return convolve(jax.nn.silu(x), params["conv_out"]) + params["bias_out"]

  @staticmethod
  def init():
    rng = np.random.default_rng(0)
    shapes = {
      "conv_in": (3, 3, 4, 32),
      "bias": (32,),
      "text": (32, 32),
      "conv_out": (3, 3, 32, 4),
      "bias_out": (4,),
    }
    return {
      name: (0.1 * rng.standard_normal(shape)).astype(np.float32)
      for name, shape in shapes.items()
    }


# Sizes at which three separate means differed by an ulp.
@pytest.mark.parametrize(
  ("slots", "size", "dtype", "microbatch"),
  [
    (6, 16, "float32", 0),
    (8, 32, "float32", 0),
    (16, 8, "float32", 0),
    (32, 16, "bfloat16", 0),
    (32, 16, "bfloat16", 16),
  ],
)
def test_sums_are_taken_in_one_order(slots, size, dtype, microbatch):
  metrics = first_step(
    Convolutions(dtype).apply,
    Convolutions.init(),
    make_batch(slots, size, 2),
    microbatch=microbatch,
  )
  assert_nothing_has_moved(metrics, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_of_the_shipped_base(dtype):
  """At its size, XLA and the library it gives products to once shared the work unequally
  where the backward pass keeps values and where it does not."""
  dtype = jnp.dtype(dtype)

  def make():
    return layers.ResnetBlock(32, 64, embedding=128, groups=8, eps=1e-5, dtype=dtype)

  model = models.Model.of(make, {}, models.Settings(dtype=dtype))
  policy, reference = model.init(0), model.narrow(model.init(0))
  rng = np.random.default_rng(0)
  x, embedding, target = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((64, 8, 8, 32), (64, 128), (64, 8, 8, 64))
  )

  def errors(policy, reference, x, embedding, target):
    def run(params, *_, **__):
      return model.bind(params)(x.astype(dtype), embedding.astype(dtype))

    noised = step.Noised(noisy_latents=x, timesteps=x, target=target)
    scalars = step.denoise(run, policy, reference, noised, Conditioning(x))
    return scalars.err.mean(), scalars

  options = step.compiler_options(parallel.make_mesh(devices=jax.devices()[:1]))
  both = jax.jit(jax.value_and_grad(errors, has_aux=True), compiler_options=options)
  (_, scalars), _ = both(policy, reference, x, embedding, target)
  np.testing.assert_array_equal(scalars.err, scalars.ref_err)
  assert not scalars.drift.any()


@pytest.mark.slow
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("microbatch", [0, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_base(dtype, microbatch, factors):
  """At the quickstart's 64 images, where XLA once computed two square roots."""
  pipeline = pathlib.Path(lpo_jax.__file__).parent / "assets" / "digits_base"
  model = models.build(pretrained.read_config(pipeline, "unet"), dtype=jnp.dtype(dtype))
  base = pretrained.load(pipeline, "unet").params
  batch = make_batch(64, 8, 4)
  rng = np.random.default_rng(1)
  text = rng.standard_normal((64, 7, model.config["cross_attention_dim"]))
  batch = dataclasses.replace(batch, conditioning=Conditioning(text.astype(np.float32)))
  how, params, fields = tuning.whole(model), base, {}
  if factors:
    layout = lora.lay_out(lora.Spec(4, lora.KERNELS), model.abstract_params)
    params = lora.init(0, base, layout)
    how = tuning.beside(model, layout, lambda: params)
    fields = {"weights": how.weights}
  metrics = first_step(
    model.apply,
    params,
    batch,
    microbatch=microbatch,
    narrow=lambda _: how.freeze(base, True),
    **fields,
  )
  assert_nothing_has_moved(metrics, 4)
