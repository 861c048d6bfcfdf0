"""One train step compiled for one topology: what a plan is made of.

  python -m lpo_jax.jobs.plan_step request.json answer.json

A process of its own for each topology: how many CPU devices there are is fixed when jax
starts, and libtpu serves one process at a time. `jobs/plan.py` starts them.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import pathlib
import re
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from lpo_jax import parallel, pretrained
from lpo_jax.data import user_embeds
from lpo_jax.errors import UserError
from lpo_jax.jobs import blueprint as blueprints
from lpo_jax.jobs import plan_chips, plan_hlo
from lpo_jax.training import flops, places, state, step
from lpo_jax.training import online as online_lib
from lpo_jax.types import Batch, Conditioning, Ranking

# What the compiler may spend. The full effort takes tens of minutes for a UNet on a TPU,
# nearly all of it on the schedule within each kernel; the least changes layout, fusion
# and memory little (docs/tpu.md).
EFFORTS = {
  "quick": {
    "tpu": {"exec_time_optimization_effort": -1.0},
    "cpu": {"xla_backend_optimization_level": 0},
  },
  "full": {},
}
TOKENS = 77  # of a prompt, where no text encoder says it
# Images in the shortest and the longest list, where a strategy decides it.
LIST_SIZES = {"winners": (1, 1), "pairs": (2, 2)}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_mesh(
  config: ml_collections.ConfigDict, topology: plan_chips.Topology
) -> jax.sharding.Mesh:
  """The run's mesh of a topology's devices, which need not be there."""
  if topology.chip == plan_chips.CPU:
    devices = jax.devices("cpu")
  else:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
      topology.name, "tpu", chips_per_host_bounds=topology.host_bounds
    ).devices
  return parallel.mesh_of(config.mesh, devices)


def abstract_batch(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, slots: int
) -> Batch:
  """A batch of the run's data, as shapes with shardings, before any data is there.

  How many lists an update holds depends on the data; the most that can be is assumed.
  They are a few numbers each.

  Args:
    config: the run's.
    mesh: the run's.
    slots: images that come from the data.
  """
  unet = pretrained.read_config(config.model.path, "unet")
  vae = pretrained.read_config(config.model.path, "vae")
  side = config.data.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
  shortest, longest = LIST_SIZES.get(
    config.data.strategy, (2, max(config.data.max_list_size, 2))
  )
  rows = (slots // shortest, longest)

  def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)

  pooled = time_ids = None
  if unet.get("addition_embed_type") == "text_time":
    sizes = 6 * unet["addition_time_embed_dim"]
    width = unet["projection_class_embeddings_input_dim"] - sizes
    pooled, time_ids = shape(slots, width), shape(slots, 6)
  tokens, channels = _tokens(config.model.path), vae.get("latent_channels", 4)
  edits, people = unet["in_channels"] > channels, config.data.user_embeds
  users = None if people is None else user_embeds.read(people)
  batch = Batch(
    moments=shape(slots, side, side, 2 * channels),
    conditioning=Conditioning(
      shape(slots, tokens, unet["cross_attention_dim"]),
      pooled,
      time_ids,
      shape(slots, side, side, channels) if edits else None,
      None if users is None else shape(slots, *users.values.shape[1:]),
    ),
    identity=shape(slots, 2, dtype=np.uint32),
    item=shape(slots, dtype=np.uint32),
    slot=shape(*rows, dtype=np.int32),
    ranking=Ranking(
      rank=shape(*rows, dtype=np.int32),
      valid=shape(*rows, dtype=bool),
      score=shape(*rows),
      weight=shape(rows[0]),
    ),
    ref_err=None if config.data.reference is None else shape(slots),
  )
  return _placed(batch, parallel.batch_shardings(mesh, batch))


def _tokens(path: str) -> int:
  try:
    text = pretrained.read_config(path, "text_encoder")
  except UserError:
    return TOKENS
  return text.get("max_position_embeddings", TOKENS)


def _placed(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings,
  )


def bytes_per_chip(tree: Any, *, in_host: bool = False) -> int:
  """Bytes of a tree of ShapeDtypeStructs with shardings on the chip that holds most.

  Args:
    tree: the shapes.
    in_host: count what is kept in the host's memory instead.
  """
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if places.is_offloaded(x.sharding) == in_host
  )


class Step:
  """The train job's step of a config on a mesh, with all it is given, as shapes.

  Attributes:
    blueprint: the run's.
    mesh: the run's.
    frozen: the reference, or the frozen base.
    batch: an update.
    kept: what else lies in memory while the step runs: the replay buffer of an online
      method, and its snapshot.
  """

  def __init__(self, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh):
    train = config.train
    blueprints.check_settings(config)
    step.check_batch_arithmetic(mesh, train.images_per_update, train.microbatch)
    self.blueprint = plan = blueprints.make_blueprint(config, mesh)
    self.mesh = mesh
    base = plan.model.abstract_params
    frozen = jax.eval_shape(
      lambda tree: plan.tuning.freeze(tree, plan.method.has_reference), base
    )
    self.frozen = None if frozen is None else _placed(frozen, plan.places.frozen)
    self.batch = abstract_batch(config, mesh, blueprints.slots_of_data(config))
    self.kept: dict[str, Any] = {}
    self._ema_decay = state.ema_schedule(train.ema_schedule, train.ema)
    if config.online:
      options = online_lib.settings(train.images_per_update, **config.online)
      buffer, self.batch = online_lib.abstract_update(
        options, mesh, self.batch, config.seed
      )
      self.kept["replay buffer"] = buffer
      if options.refresh_every > 1:
        self.kept["snapshot"] = plan.like.params

  def components(self) -> dict[str, int]:
    """Bytes per chip of everything that lies in memory before the step begins."""
    like = self.blueprint.like
    frozen = "frozen base" if self.blueprint.tuning.has_base else "reference"
    trees = {
      "parameters": like.params,
      "optimizer": like.opt_state,
      "EMA": like.ema,
      frozen: self.frozen,
      "batch": self.batch,
      **self.kept,
    }
    return {name: bytes_per_chip(tree) for name, tree in trees.items()}

  def trace(self) -> jax.stages.Traced:
    """Traces the step as the train job does."""
    return step.trace_train_step(
      self.mesh,
      self.blueprint.like,
      self.frozen,
      self.batch,
      method=self.blueprint.method,
      optimizer=self.blueprint.optimizer,
      ema_decay=self._ema_decay,
      places=self.blueprint.places,
    )


def needed_flops(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> int:
  """FLOPs of an update that keeps everything and computes nothing twice."""
  plain = ml_collections.ConfigDict(config.to_dict())
  plain.model.remat, plain.model.attention, plain.train.microbatch = "none", "xla", 0
  return flops.count_flops(Step(plain, mesh).trace().jaxpr)


def measure(
  config: ml_collections.ConfigDict,
  topology: plan_chips.Topology,
  effort: str,
  needed: int | None = None,
) -> dict[str, Any]:
  """Traces and compiles a step.

  Args:
    config: the run's; `model.path` must be a folder.
    topology: to compile for.
    effort: a key of `EFFORTS`, or "none": do not compile.
    needed: `needed_flops`, where somebody knows it.

  Returns:
    What `plan.json` has of it: bytes per chip, FLOPs of all chips, seconds.
  """
  mesh, began = make_mesh(config, topology), time.monotonic()
  made = Step(config, mesh)
  traced = made.trace()
  answer = {
    "components": made.components(),
    "host_bytes": bytes_per_chip((made.blueprint.like, made.frozen), in_host=True),
    "mesh": dict(mesh.shape),
    "flops": flops.count_flops(traced.jaxpr),
    "needed_flops": needed or needed_flops(config, mesh),
    "versions": versions(),
    "trace_seconds": time.monotonic() - began,
  }
  if effort == "none":
    return answer
  lowered, began = traced.lower(), time.monotonic()
  try:
    platform = mesh.devices.flat[0].platform
    compiled = lowered.compile(compiler_options=EFFORTS[effort].get(platform))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    answer["refused"] = refusal(str(error))
  else:
    answer |= weigh(compiled, sum(answer["components"].values()))
  answer["compile_seconds"] = time.monotonic() - began
  return answer


def weigh(compiled: jax.stages.Compiled, arguments: int) -> dict[str, Any]:
  """What a compiled program occupies and moves, on one chip.

  Args:
    compiled: the step.
    arguments: bytes of what it is given, by our own count.
  """
  memory, program = compiled.memory_analysis(), plan_hlo.read(compiled.as_text())
  found = plan_hlo.collectives(program)
  return {
    "memory": {
      # Arrays are padded to whole tiles; inputs that nothing reads are dropped.
      "padding": memory.argument_size_in_bytes - arguments,
      "temporaries": memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes,
      "program": memory.generated_code_size_in_bytes,
    },
    "hbm_bytes": plan_hlo.hbm_bytes(program),
    "collectives": [
      {
        "kind": kind,
        "count": sum(each.times for each in found if each.kind == kind),
        "bytes": sum(each.times * each.bytes for each in found if each.kind == kind),
        "largest": max(each.bytes for each in found if each.kind == kind),
        "received": sum(each.received for each in found if each.kind == kind),
      }
      for kind in sorted({each.kind for each in found})
    ],
  }


def refusal(message: str) -> dict[str, Any]:
  """Reads how much memory a program would have needed from the compiler's refusal.

  What libtpu calls temporaries there is everything: a program with 1 GiB of arguments, 1
  of results and 21 between them is said to need 23.

  Args:
    message: of the error.

  Returns:
    `needs`, bytes in all, None if it does not say; `message`, its first line.

  >>> refusal("Ran out of memory in memory space hbm. Used 23.5G of 15.75G hbm.")["needs"]
  25232932864
  """
  line = next((x for x in message.splitlines() if "memory" in x), message[:300])
  found = re.search(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds)",
    message,
  )
  needs = int(float(found[1]) * UNITS[found[2]]) if found else None
  return {"needs": needs, "message": line.strip()}


def versions() -> dict[str, str]:
  """Of what compiles."""
  found = {}
  for name in ("jax", "jaxlib", "libtpu"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def main(request: str, answer: str) -> None:
  """Answers a request: what `measure` takes in, `measure`'s or an error out."""
  asked = json.loads(pathlib.Path(request).read_text("utf-8"))
  config = ml_collections.ConfigDict(asked["config"])
  jax.config.update("jax_enable_compilation_cache", False)  # seconds are to be true
  try:
    topology = plan_chips.parse(asked["topology"])
    found = measure(config, topology, asked["effort"], asked["needed_flops"])
  except UserError as error:
    found = {"error": str(error)}
  pathlib.Path(answer).write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
  main(*sys.argv[1:])
