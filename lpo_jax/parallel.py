"""Where arrays live: the mesh, who holds which part of what, and host agreement.

Models know nothing of this. Parameters are placed by regex rules over their names,
batches by slot; the compiler derives the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lpo_jax import trees
from lpo_jax.errors import UserError
from lpo_jax.types import Batch

AXES = ("data", "fsdp")

# Parameters: shard what is large, replicate what is small; the rule's value is how.
PARTITION_RULES: tuple[tuple[str, str], ...] = (
  (r"(^|\.)(bias|scale)$", "replicate"),
  (r".*", "fsdp"),
)
# Below this many elements the all-gather costs more than the memory it saves.
SMALLEST_SHARDED = 1024


def initialize_distributed() -> None:
  """Joins the other processes of this run, when the environment names them.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe a run by hand
  (several processes on one machine); Cloud TPU, GKE and SLURM are recognised by jax when
  LPO_JAX_DISTRIBUTED=auto is set. A single process needs none of it.
  """
  env = os.environ
  if jax.distributed.is_initialized():  # by an earlier job of this process
    return
  if "JAX_COORDINATOR_ADDRESS" in env:
    missing = [k for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if k not in env]
    if missing:
      raise UserError(
        f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} is not: set all "
        "three on every process (ids 0 to N-1), or none."
      )
    jax.distributed.initialize(
      env["JAX_COORDINATOR_ADDRESS"],
      num_processes=int(env["JAX_NUM_PROCESSES"]),
      process_id=int(env["JAX_PROCESS_ID"]),
    )
  elif env.get("LPO_JAX_DISTRIBUTED") == "auto":
    jax.distributed.initialize()


def make_mesh(
  data: int = -1, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Lays the devices out as ("data", "fsdp"); -1 is filled with what is left.

  Args:
    data: number of groups that each hold all parameters.
    fsdp: number of devices among which one copy of the parameters is split.
    devices: default all devices of all processes.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes, count = [data, fsdp], len(devices)
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise UserError(
      f"mesh.data={data}, mesh.fsdp={fsdp}: expected positive sizes, at most one of "
      "them -1 (filled with the devices that are left)."
    )
  if -1 in sizes:
    known = -int(np.prod(sizes))
    sizes[sizes.index(-1)] = max(count // known, 1)
  if int(np.prod(sizes)) != count:
    raise UserError(
      f"mesh.data={data} x mesh.fsdp={fsdp} does not cover the {count} device(s) here; "
      "set mesh.data=-1 and an mesh.fsdp that divides the device count."
    )
  # Auto axes: the compiler propagates shardings. Explicit axes would refuse the gathers
  # that turn slots into lists.
  return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def by_slot(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays whose first axis is the slot: split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def _fsdp_spec(shape: Sequence[int], size: int, first: int = 0) -> PartitionSpec:
  """Splits the largest dimension from `first` on that `size` divides, if there is one."""
  if size == 1 or int(np.prod(shape)) < SMALLEST_SHARDED:
    return PartitionSpec()
  candidates = [i for i, n in enumerate(shape) if i >= first and n % size == 0]
  if not candidates:
    return PartitionSpec()
  axis = max(candidates, key=lambda i: (shape[i], i))
  return PartitionSpec(*(None,) * axis, "fsdp")


def param_shardings(
  params: Any, mesh: Mesh, rules: Sequence[tuple[str, str]] = PARTITION_RULES
) -> Any:
  """Decides by name where each parameter lives.

  Args:
    params: nested dict of arrays or ShapeDtypeStructs.
    mesh: from `make_mesh`.
    rules: (regex, "fsdp" | "replicate"), first match wins, no match is an error.

  Returns:
    A tree of NamedShardings in the structure of `params`.
  """
  how = trees.match_rules(rules, params, what="partition")

  def place(name: str, leaf: Any, rule: str) -> NamedSharding:
    if rule == "replicate":
      return replicated(mesh)
    if rule != "fsdp":
      raise UserError(
        f"partition rule for {name!r} says {rule!r}; expected 'fsdp' or 'replicate'."
      )
    # A stack is looped over: every turn needs one block of it on all devices.
    first = int(trees.is_stacked(name))
    return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape["fsdp"], first))

  return trees.map_named(place, params, how)


def state_shardings(state: Any, params: Any, mesh: Mesh, shardings: Any) -> Any:
  """Places everything that mirrors a parameter (moments, EMA) where the parameter is.

  A leaf belongs to the parameter whose dotted name ends its own and whose shape it has;
  the rest (counters, factored moments) is replicated. Without this a jit'd initialiser
  replicates the optimizer state on every device.

  Args:
    state: abstract train state, of any structure.
    params: abstract parameters.
    mesh: from `make_mesh`.
    shardings: `param_shardings(params, mesh)`.
  """
  home = trees.named_leaves(shardings)
  shapes = {name: leaf.shape for name, leaf in trees.named_leaves(params).items()}

  def place(name: str, leaf: Any) -> NamedSharding:
    parts = name.split(".")
    for start in range(len(parts)):
      suffix = ".".join(parts[start:])
      if suffix in home and shapes[suffix] == leaf.shape:
        return home[suffix]
    return replicated(mesh)

  return trees.map_named(place, state)


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
  """Slots are split over all devices; the ranking, a few scalars, is everywhere."""
  slots, everywhere = by_slot(mesh), replicated(mesh)
  where = jax.tree.map(lambda _: slots, batch)
  return Batch(
    moments=where.moments,
    conditioning=where.conditioning,
    identity=where.identity,
    item=where.item,
    slot=everywhere,
    ranking=jax.tree.map(lambda _: everywhere, batch.ranking),
    trajectory=where.trajectory,
  )


def global_batch(mesh: Mesh, batch: Batch) -> Batch:
  """Makes global arrays of the slots this process read and the ranking all know."""
  return jax.tree.map(
    lambda sharding, x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch_shardings(mesh, batch),
    batch,
  )


def put(tree: Any, shardings: Any) -> Any:
  """Places host arrays, equal on all processes, as global arrays."""

  def place(x: Any, sharding: NamedSharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(place, tree, shardings)


def fetch(tree: Any) -> Any:
  """Brings arrays to this host as NumPy, gathering what other processes hold."""

  def gather(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

  return jax.tree.map(gather, tree)


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def is_main_process() -> bool:
  """Whether this process writes what must be written once."""
  return jax.process_index() == 0
