"""All ways to compute attention against the formula, and which one is taken where."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.models import attention
from lpo_jax.models.attention import Call

ROOT = pathlib.Path(__file__).resolve().parents[2]
BF16, FP32 = jnp.bfloat16, jnp.float32
INTERPRETED = functools.partial(attention.flash, interpret=True)


def attend(q, k, v, causal):
  """softmax(q k^T / sqrt(D)) v with loops, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  output = np.zeros(q.shape)
  for n, h in np.ndindex(q.shape[0], q.shape[2]):
    scores = q[n, :, h] @ k[n, :, h].T / np.sqrt(q.shape[-1])
    if causal:
      scores = np.where(np.tri(*scores.shape) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    output[n, :, h] = weights / weights.sum(-1, keepdims=True) @ v[n, :, h]
  return output


def arrays(queries, keys, width, batch=1, heads=2, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [queries, keys, keys, queries]
  return [
    jnp.asarray(rng.standard_normal((batch, n, heads, width), np.float32))
    for n in shapes
  ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(run, causal, q, k, v, cotangent):
  """Returns y and the gradients of <y, cotangent>."""
  y, pull = jax.vjp(lambda q, k, v: run(q, k, v, causal), q, k, v)
  return (y, *pull(cotangent.astype(y.dtype)))


def far(ours, truth):
  truth = np.asarray(truth, np.float64)
  return np.linalg.norm(np.asarray(ours, np.float64) - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("name", ["auto", "xla", "chunked"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_formula(name, causal, monkeypatch):
  monkeypatch.setattr(attention, "CPU_BLOCK", 15)  # 2 or 3 queries in a block
  q, k, v, _ = arrays(7, 7 if causal else 5, 4, batch=2, heads=3)
  if not causal:
    q = q * 30  # a softmax near its corners
  run = functools.partial(attention.attend, implementation=name, is_causal=causal)
  np.testing.assert_allclose(run(q, k, v), attend(q, k, v, causal), rtol=0, atol=1e-5)
  assert run(*(x.astype(jnp.bfloat16) for x in (q, k, v))).dtype == jnp.bfloat16


@pytest.mark.parametrize("run", [attention.xla, attention.chunked, INTERPRETED])
def test_scores_are_fp32(run):
  # 16 x 16 and 16 x 16 + 1 x 1, halved: bfloat16 has no 257, and would call it a draw.
  q = jnp.asarray([16, 1, 0, 0], BF16).reshape(1, 1, 1, 4)
  k = jnp.asarray([[16, 0, 0, 0], [16, 1, 0, 0]], BF16).reshape(1, 2, 1, 4)
  v = jnp.asarray([[0] * 4, [1] * 4], BF16).reshape(1, 2, 1, 4)
  expected = 1 / (1 + np.exp(-0.5))
  np.testing.assert_allclose(np.float32(run(q, k, v, False)), expected, rtol=2**-8)


# (queries, keys, width, causal): a prompt's keys, a padded block, a whole one, text.
SHAPES = [
  (256, 77, 40, False),
  (300, 300, 80, False),
  (256, 256, 160, False),
  (77, 77, 64, True),
]


@pytest.mark.parametrize(("queries", "keys", "width", "causal"), SHAPES)
def test_flash_is_xla(queries, keys, width, causal):
  args = arrays(queries, keys, width)
  truth = with_gradients(attention.xla, causal, *args)
  for ours, expected in zip(with_gradients(INTERPRETED, causal, *args), truth):
    assert ours.dtype == jnp.float32
    assert far(ours, expected) < 1e-5
  half = [x.astype(jnp.bfloat16) for x in args]
  # The same rounded inputs: what is left is what the computation rounds.
  truth = with_gradients(attention.xla, causal, *(x.astype(jnp.float32) for x in half))
  ours = with_gradients(INTERPRETED, causal, *half)
  theirs = with_gradients(attention.xla, causal, *half)
  for a, b, expected in zip(ours, theirs, truth):
    assert a.dtype == jnp.bfloat16
    assert far(a, expected) <= 2 * far(b, expected)


def test_many_blocks_are_one(monkeypatch):
  # The running maximum and sum of several blocks, and the masked end of the last.
  args = arrays(300, 290, 40)
  args[0] = args[0] * 5
  monkeypatch.setattr(attention, "FLASH_BLOCK", 256)  # halved for fp32
  ours = with_gradients(functools.partial(INTERPRETED), False, *args)
  for a, b in zip(ours, with_gradients(attention.xla, False, *args)):
    assert far(a, b) < 1e-5


# How "chunked" cuts the scores on a CPU, and on every other platform.
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_scores_are_xla(platform, causal, monkeypatch):
  args = arrays(70, 70 if causal else 33, 8, batch=3)
  call = attention.call_of(args[0].shape, args[1].shape, FP32)
  call = dataclasses.replace(call, platform=platform)
  monkeypatch.setattr(attention, "CPU_BLOCK", 70 * 20)
  monkeypatch.setattr(attention, "CHUNK_ROWS", 32)

  def run(q, k, v, causal):
    return attention._blockwise(call, causal, q, k, v)

  ours = with_gradients(run, causal, *args)
  for a, b in zip(ours, with_gradients(attention.xla, causal, *args)):
    assert far(a, b) < 2e-6
  half = [x.astype(BF16) for x in args]
  truth = with_gradients(attention.xla, causal, *(x.astype(FP32) for x in half))
  ours = with_gradients(run, causal, *half)
  for a, b, c in zip(ours, with_gradients(attention.xla, causal, *half), truth):
    assert a.dtype == BF16
    assert far(a, c) <= 2 * far(b, c)


def test_chunked_is_xla_with_less_memory():
  args = arrays(2200, 1200, 16, heads=1)
  ours = with_gradients(attention.chunked, False, *args)
  for a, b in zip(ours, with_gradients(attention.xla, False, *args)):
    assert far(a, b) < 2e-6
  memory = {
    run.__name__: with_gradients.lower(run, False, *args)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for run in (attention.xla, attention.chunked)
  }
  assert memory["chunked"] < 0.75 * memory["xla"]


def test_values_are_those_that_gradients_are_taken_of():
  q, k, v, _ = arrays(256, 256, 40)
  half = [x.astype(jnp.bfloat16) for x in (q, k, v)]

  def run(*args):
    return INTERPRETED(*args, False)

  # Apart: a reference's forward pass and the policy's, of equal weights.
  plain = jax.jit(run)(*half)
  value, _ = jax.jit(lambda *args: jax.vjp(run, *args))(*half)
  np.testing.assert_array_equal(np.asarray(plain), np.asarray(value))
  # Splash alone would run another kernel when nothing is differentiated.
  assert kernels(run, half) == {"splash_mha_fwd_residuals"}


def kernels(run, args):
  text = str(jax.make_jaxpr(run)(*args))
  return {
    name
    for name in ("splash_mha_fwd_residuals", "splash_mha_fwd_no_residuals")
    if name in text
  }


ON_A_MESH = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lpo_jax.models import attention
from lpo_jax.parallel import by_slot, make_mesh

mesh = make_mesh(2, 2)
rng = np.random.default_rng(0)
args = [rng.standard_normal((4, 200, 2, 40), np.float32) for _ in range(4)]

def gradients(run, q, k, v, cotangent):
  y, pull = jax.vjp(lambda q, k, v: run(q, k, v, False), q, k, v)
  return (y, *pull(cotangent))

truth = jax.jit(functools.partial(gradients, attention.xla))(*args)
flash = functools.partial(attention.flash, interpret=True)
split = [jax.device_put(x, by_slot(mesh)) for x in args]
for run in (flash, attention.chunked):
  with jax.set_mesh(mesh):
    step = jax.jit(functools.partial(gradients, run))
    ours = step(*split)
    text = step.lower(*split).compile().as_text()
  for a, b in zip(ours, truth):
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error < 1e-5, error
    assert a.sharding.is_equivalent_to(by_slot(mesh), a.ndim), a.sharding
  # Every device works on its own images: nothing is gathered.
  for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert collective not in text, collective
# A batch that does not divide is computed all the same.
odd = [x[:3] for x in args]
with jax.set_mesh(mesh):
  ours = jax.jit(functools.partial(gradients, attention.chunked))(*odd)
for a, b in zip(ours, truth):
  assert np.linalg.norm(a - b[:3]) / np.linalg.norm(b) < 1e-5
call = None
with jax.set_mesh(mesh):
  call = jax.eval_shape(lambda: print(attention.call_of((4, 9, 2, 8), (4, 9, 2, 8), "f4")))
"""


def test_flash_and_chunked_on_a_mesh(on_devices):
  printed = on_devices(4, ON_A_MESH)
  assert "platform='cpu', batch=4" in printed and "devices=4" in printed


@pytest.mark.parametrize(
  ("call", "name"),
  [
    # SD 1.5 and SDXL on TPUs: long to themselves, short, and to the prompt.
    (Call("tpu", 8, 4096, 4096, 8, 40, BF16), "flash"),
    (Call("tpu", 32, 1024, 1024, 8, 80, BF16, devices=4), "flash"),
    (Call("tpu", 8, 1024, 1024, 20, 64, BF16), "flash"),
    (Call("tpu", 8, 256, 256, 8, 160, BF16), "xla"),
    (Call("tpu", 8, 4096, 77, 8, 40, BF16), "xla"),
    (Call("tpu", 8, 77, 77, 12, 64, BF16), "xla"),
    # fp32, and a batch that does not divide.
    (Call("tpu", 8, 4096, 4096, 8, 40, FP32), "chunked"),
    (Call("tpu", 1, 1024, 1024, 8, 80, FP32), "xla"),
    (Call("tpu", 6, 4096, 4096, 8, 40, BF16, devices=4), "chunked"),
    (Call("gpu", 8, 4096, 4096, 8, 40, BF16), "cudnn"),
    (Call("gpu", 8, 4096, 4096, 8, 40, jnp.float16), "cudnn"),
    (Call("gpu", 8, 4096, 4096, 8, 40, FP32), "chunked"),
    (Call("gpu", 8, 4096, 4096, 8, 36, BF16), "chunked"),
    (Call("gpu", 1, 1024, 1024, 8, 160, BF16), "xla"),
    (Call("gpu", 8, 4096, 77, 8, 40, BF16), "xla"),
    (Call("cpu", 1, 256, 1024, 16, 80, FP32), "xla"),  # 16 MiB fit into the cache
    (Call("cpu", 1, 257, 1024, 16, 80, FP32), "chunked"),
    (Call("cpu", 4, 257, 1024, 16, 80, FP32, devices=4), "chunked"),
    (Call("cpu", 2, 4096, 4096, 8, 40, BF16), "chunked"),
    (Call("cpu", 16, 16, 16, 2, 32, FP32), "xla"),
  ],
)
def test_the_choice(call, name):
  assert attention.choose(call) == name
  assert attention.ATTENTION[name].obstacle(call) is None


@pytest.mark.parametrize(
  ("name", "call", "reason"),
  [
    ("flash", Call("cpu", 4, 9, 9, 1, 8, BF16), "compiled for 'cpu'"),
    ("flash", Call("tpu", 6, 9, 9, 1, 8, BF16, devices=4), "6 does not divide over 4"),
    ("flash", Call("tpu", 4, 9, 9, 1, 8, jnp.float16), "not float16"),
    ("cudnn", Call("tpu", 4, 9, 9, 1, 8, BF16), "compiled for 'tpu'"),
    ("cudnn", Call("gpu", 4, 10, 10, 1, 8, FP32), "not float32"),
    ("cudnn", Call("gpu", 4, 10, 10, 1, 12, BF16), "multiple of 8"),
    ("cudnn", Call("gpu", 4, 10, 10, 1, 512, BF16), "up to 256"),
    ("cudnn", Call("gpu", 4, 4096, 77, 8, 40, BF16), "77 keys"),
    ("flash", Call("tpu", 4, 4096, 77, 8, 40, FP32), None),
    ("cudnn", Call("gpu", 4, 256, 256, 8, 160, BF16), None),
    ("xla", Call("tpu", 5, 9, 7, 1, 3, jnp.float16, devices=4), None),
  ],
)
def test_what_cannot_run(name, call, reason):
  obstacle = attention.ATTENTION[name].obstacle(call)
  assert obstacle is None if reason is None else reason in obstacle


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_refusals_say_what_to_do(name):
  q = jnp.ones((1, 4, 2, 8))
  with pytest.raises(UserError, match=rf"{name}.*'cpu'\. Choose 'auto'.*'xla' here"):
    attention.attend(q, q, q, implementation=name)
  with pytest.raises(UserError, match="did you mean 'flash'"):
    attention.attend(q, q, q, implementation="flahs")


def test_cudnn_without_cudnn_is_refused():
  q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
  with pytest.raises(UserError, match="cuDNN is not detected"):
    attention.cudnn(q, q, q, False)


@pytest.mark.parametrize("width", [40, 64])
def test_cudnn_lowers_for_cuda(width, monkeypatch):
  # Only the question for the library's version is answered for it; nothing is run.
  stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91500)
  q = jax.ShapeDtypeStruct((2, 1024, 4, width), jnp.bfloat16)

  def lowered(run, *args):
    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

  def forward(q, k, v):
    return attention.cudnn(q, k, v, False)

  plain = lowered(forward, q, q, q)
  value = lowered(lambda *args: jax.vjp(forward, *args), q, q, q)
  assert "__cudnn$fmhaSoftmax" in plain
  # A forward pass without residuals would be another program than the policy's.
  assert calls(plain) == calls(value)
  back = lowered(lambda q, k, v, g: jax.vjp(forward, q, k, v)[1](g), q, q, q, q)
  assert "__cudnn$fmhaSoftmaxBackward" in back


def calls(text):
  return [line.split("(")[0] for line in text.splitlines() if "custom_call" in line]


def test_the_platform_is_that_of_the_mesh():
  from jax._src.mesh import AbstractDevice  # what a topology's mesh describes itself by

  assert attention.compiled_for() == "cpu"
  chips = AbstractDevice("TPU v5 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"), abstract_device=chips)
  long = (8, 1024, 2, 64)
  with jax.sharding.use_abstract_mesh(mesh):
    call = attention.call_of(long, long, BF16)
    assert call == Call("tpu", 8, 1024, 1024, 2, 64, BF16, devices=8)
    # Traced with nothing but that mesh set, as for a plan: "auto" takes the kernel.
    x = jax.ShapeDtypeStruct(long, BF16)
    traced = str(jax.make_jaxpr(attention.attend)(x, x, x))
  assert "splash_mha_fwd_residuals" in traced and "shard_map" in traced
  assert "splash" not in str(jax.make_jaxpr(attention.attend)(x, x, x))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not here")
def test_compiles_for_tpus():
  command = [sys.executable, ROOT / "benchmarks" / "attention.py", "--json"]
  command += ["--topologies", "v5e:2x2", "--shapes", "8x1024x20x64", "8x1024x8x160"]
  done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
  assert done.returncode == 0, done.stderr[-4000:]
  rows = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
  memory = {(row["shape"], row["name"]): row["temp_mib"] for row in rows}
  chosen = {row["shape"]: row["chosen"] for row in rows}
  assert set(chosen.values()) == {"flash"}  # on a machine whose own backend is a CPU
  for shape in chosen:
    assert memory[shape, "flash"] < 0.5 * memory[shape, "xla"]
