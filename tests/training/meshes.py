"""The same ten updates on any mesh: a convolutional network and every objective family.

Run as `python tests/training/meshes.py CASES FILE` in one or several processes; CASES is
JSON, a list of keyword arguments of `run_case`. What came out is pickled in FILE.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lpo_jax import models, objectives, parallel, trees
from lpo_jax.diffusion import noising
from lpo_jax.models import layers, lora
from lpo_jax.training import optimizer, places, state, step, tuning
from lpo_jax.types import Conditioning

_spec = importlib.util.spec_from_file_location(
  "world", pathlib.Path(__file__).with_name("conftest.py")
)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)

STEPS = 10
FAMILIES = ("sft", "kto", "dpo", "lpo", "rankdpo", "lair", "dro")
# 16 slots on 8 devices: every list but the fourth straddles two devices or more, and with
# microbatches of 8 (every other slot) all lists straddle both.
LISTS = (5, 4, 3, 4)
RANKS = ((0, 1, 2, 3, 4), (2, 0, 1, 1, 0), (0, 1, 1, 0, 0), (3, 1, 0, 2, 0))
SIDE = 8


class Network(nnx.Module):
  """What a UNet is made of, once each; no two kernels, or parts of them, of one shape."""

  def __init__(self, dtype):
    self.conv_in = layers.Conv(4, 32, dtype=dtype)
    self.text = layers.Linear(40, 32, dtype=dtype)
    self.norm = layers.GroupNorm(32, groups=8, eps=1e-5, dtype=dtype)
    self.conv = layers.Conv(32, 32, dtype=dtype)
    self.layer_norm = layers.LayerNorm(32, dtype=dtype)
    self.project = layers.Linear(32, 96, dtype=dtype)
    self.back = layers.Linear(96, 32, dtype=dtype)
    self.norm_out = layers.GroupNorm(32, groups=8, eps=1e-5, dtype=dtype)
    self.conv_out = layers.Conv(32, 4, dtype=jnp.float32)

  def __call__(self, x, timesteps, prompt_embeds, **_):
    row = self.text(prompt_embeds.mean(1)) + jnp.sin(timesteps / 100.0)[:, None]
    x = self.conv_in(x)
    x = self.conv(layers.silu(self.norm(x + row[:, None, None].astype(x.dtype))))
    x = x + self.back(layers.gelu(self.project(self.layer_norm(x))))
    return self.conv_out(layers.silu(self.norm_out(x)))


def make_model(dtype):
  make = functools.partial(Network, jnp.dtype(dtype))
  return models.Model.of(make, {}, models.Settings(dtype=jnp.dtype(dtype)))


def one_of_all():
  """An objective that is any of `FAMILIES`, by number: one compilation for all."""

  def choose(denoising, ranking, *, beta):
    members = [objectives.get(name, **world.HYPER[name]) for name in FAMILIES]
    losses = jnp.stack([member(denoising, ranking)[0] for member in members])
    return jnp.where(jnp.arange(len(FAMILIES)) == beta, losses, 0.0).sum(), {}

  needs = frozenset({"err", "ref_err", "drift"})
  return objectives.Objective("any", needs, {"beta": 0.0}, choose)


def make_batch(epoch):
  """Four lists in 16 slots, larger latents than the linear world's."""
  batch = world.make_batch(epoch, lists=LISTS, ranks=RANKS)
  rng = np.random.default_rng(epoch)
  return dataclasses.replace(
    batch,
    moments=rng.standard_normal((16, SIDE, SIDE, 8)).astype(np.float32),
    conditioning=Conditioning(rng.standard_normal((16, 3, 40)).astype(np.float32)),
  )


def my_slots(batch):
  """What this process would read of a batch."""
  size = 16 // jax.process_count()
  mine = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
  moments, conditioning, identity, item = jax.tree.map(
    lambda x: x[mine], (batch.moments, batch.conditioning, batch.identity, batch.item)
  )
  return dataclasses.replace(
    batch, moments=moments, conditioning=conditioning, identity=identity, item=item
  )


def order_of(devices, order):
  """Devices as they come, or dealt out so that no process has two in a row."""
  if order == "interleaved":
    return sorted(devices, key=lambda d: (d.id % jax.local_device_count(), d.id))
  return devices


def compile_case(
  *,
  data=-1,
  fsdp=1,
  devices=0,
  microbatch=0,
  dtype="float32",
  order="plain",
  factors=False,
  **where,
):
  """The step of one mesh, with its state before the first update."""
  mesh = parallel.make_mesh(
    data, fsdp, devices=order_of(jax.devices()[: devices or None], order)
  )
  model = make_model(dtype)
  base = model.init(0)
  how = tuning.whole(model)
  if factors:
    layout = lora.lay_out(lora.Spec(4, lora.KERNELS, 3.0), model.abstract_params)
    how = tuning.beside(model, layout, lambda: lora.init(0, base, layout))
  frozen = jax.eval_shape(lambda b: how.freeze(b, True), model.abstract_params)
  at = places.settle(mesh, how.shapes, frozen, is_base=factors, **where)
  method = dataclasses.replace(
    world.make_method(),
    unet=lambda params, *x, **told: model.bind(params)(*x, **told),
    objective=one_of_all(),
    noising=noising.get("forward"),
    weights=places.in_use(how.weights, model, at.frozen if factors else at.params),
    fetch=lambda tree: places.to_device(tree, at.frozen),
    microbatch=microbatch,
    unroll=True,
  )
  tx = optimizer.build("adamw", how.shapes, learning_rate=1e-3)
  like = state.placement(
    mesh,
    how.shapes,
    tx,
    with_ema=True,
    shardings=at.params,
    mirrors=at.update,
    ema=at.ema,
  )
  split = parallel.param_shardings(base, mesh)
  first = how.start(parallel.put(base, split), mesh)
  begin = functools.partial(state.place, like, optimizer=tx)
  frozen = jax.jit(lambda b: how.freeze(b, True), out_shardings=at.frozen)(
    parallel.put(base, split)
  )
  batch = parallel.global_batch(mesh, my_slots(make_batch(0)))
  traced = step.trace_train_step(
    mesh, like, frozen, batch, method=method, optimizer=tx, ema_decay=0.9, places=at
  )
  compiled = traced.lower().compile()
  return mesh, compiled, first, begin, frozen, at, method, like


def program(compiled, like):
  """What the compiler made: its text, and what of the state it updates in place."""
  leaves = jax.tree.leaves(like)
  shards = [x.sharding.shard_shape(x.shape) for x in leaves]
  memory = compiled.memory_analysis()
  return {
    "text": compiled.as_text(),
    "leaves": len(leaves),
    "bytes": sum(
      math.prod(shape) * x.dtype.itemsize
      for shape, x in zip(shards, leaves, strict=True)
    ),
    "in_place": memory.alias_size_in_bytes + memory.host_alias_size_in_bytes,
    "split": [
      x.shape
      for x in jax.tree.leaves(like.params)
      if not x.sharding.is_fully_replicated
    ],
  }


def run_case(*, families=FAMILIES, steps=STEPS, **case):
  """Updates by each family from the same start."""
  mesh, compiled, first, begin, frozen, at, method, like = compile_case(**case)
  # What the run starts from must outlive the donated state.
  start = parallel.fetch(first)
  batches = [parallel.global_batch(mesh, my_slots(make_batch(e))) for e in range(steps)]
  out = {}
  for number, name in enumerate(FAMILIES):
    if name not in families:
      continue
    inputs = dataclasses.replace(method.inputs, hyper={"beta": np.float32(number)})
    inputs = jax.tree.map(lambda x: parallel.put(x, parallel.replicated(mesh)), inputs)
    current = begin(jax.device_put(parallel.put(start, at.update), at.params))
    rows = []
    for batch in batches:
      with jax.transfer_guard("disallow"):
        current, metrics = compiled(current, frozen, batch, inputs)
      rows.append(jax.tree.map(float, parallel.fetch(metrics)))
    params, ema = parallel.fetch((current.params, current.published))
    out[name] = {
      "rows": rows,
      "params": trees.named_leaves(params),
      "ema": trees.named_leaves(ema),
    }
  return {
    "start": trees.named_leaves(start),
    "families": out,
    "program": program(compiled, like),
  }


def norm(tree):
  return math.sqrt(sum(np.square(np.float64(x)).sum() for x in tree.values()))


def difference(a, b):
  return {name: np.float64(a[name]) - np.float64(b[name]) for name in a}


def main(cases, file):
  """Runs the cases; the main process writes what came out."""
  parallel.SMALLEST_SHARDED = 1
  parallel.initialize_distributed()
  out = [run_case(**case) for case in json.loads(cases)]
  if parallel.is_main_process():
    pathlib.Path(file).write_bytes(pickle.dumps(out))


if __name__ == "__main__":
  main(*sys.argv[1:])
