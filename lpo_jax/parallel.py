"""Where arrays live: the mesh, who holds which part of what, and host agreement.

Models know nothing of this. Parameters are placed by regex rules over their names,
batches by slot; the compiler derives the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
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
    try:
      jax.distributed.initialize()
    except (RuntimeError, ValueError) as e:
      raise UserError(
        f"LPO_JAX_DISTRIBUTED=auto, but the other processes were not found: {e}. "
        "Expected a Cloud TPU slice, GKE, SLURM or MPI, and the same command on every "
        "host; unset it to run here alone."
      ) from e


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  *,
  slices: int = -1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Lays the devices out as ("data", "fsdp"); -1 is filled with what is left.

  Where devices come in slices, with a fast network within (ICI) and a slow one between
  them (DCN), parameters are split within a slice: of "data", slices are the outer part.

  Args:
    data: number of groups that each hold all parameters.
    fsdp: number of devices among which one copy of the parameters is split.
    slices: how many slices there are; -1: as TPUs say themselves, else one.
    devices: default all devices of all processes.

  Raises:
    UserError: the axes do not multiply to the number of devices, or parameters would be
      split over slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes, count = [data, fsdp], len(devices)
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise UserError(
      f"mesh.data={data}, mesh.fsdp={fsdp}: expected positive sizes, at most one of "
      "them -1 (filled with the devices that are left)."
    )
  groups = group_slices(devices, slices)
  if -1 in sizes:
    known = -int(np.prod(sizes))
    sizes[sizes.index(-1)] = max(count // known, 1)
  if int(np.prod(sizes)) != count:
    raise UserError(
      f"mesh.data={data} x mesh.fsdp={fsdp} does not cover the {count} device(s) here; "
      "set mesh.data=-1 and an mesh.fsdp that divides the device count."
    )
  if sizes[0] % len(groups):
    raise UserError(
      f"mesh.fsdp={sizes[1]} would split parameters over {len(groups)} slices of "
      f"{len(groups[0])} devices, and send them through the slow network between; "
      f"expected a divisor of {len(groups[0])}, with mesh.data=-1."
    )
  # Auto axes: the compiler propagates shardings. Explicit axes would refuse the gathers
  # that turn slots into lists.
  return Mesh(arrange(groups, *sizes), AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_of(
  settings: Mapping[str, Any], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns the mesh that `config.mesh` asks for; see `make_mesh`."""
  sizes = {name: settings[name] for name in ("data", "fsdp", "slices")}
  return make_mesh(**sizes, devices=devices)


def group_slices(devices: Sequence[Any], slices: int = -1) -> list[list[Any]]:
  """Groups devices by the slice in which they are.

  Args:
    devices: of all processes.
    slices: see `make_mesh`. Devices that do not say in which slice they are, or in one of
      so many, are dealt out by process: as many processes in a row to each.

  Raises:
    UserError: slices of different sizes, or a number of them that cannot be.
  """
  if slices == 0 or slices < -1:
    raise UserError(
      f"mesh.slices={slices}: expected a positive number, or -1 for what TPUs say."
    )
  said = defaultdict(list)
  for device in devices:
    said[getattr(device, "slice_index", None) or 0].append(device)
  groups = [said[index] for index in sorted(said)]
  if slices == -1:
    on_tpu = getattr(devices[0], "platform", "") == "tpu"
    groups = groups if on_tpu else [list(devices)]
  elif len(groups) != slices:
    if len(devices) % slices:
      raise UserError(
        f"mesh.slices={slices} does not divide the {len(devices)} device(s) here."
      )
    ordered = list(devices)
    if slices > 1:
      ordered.sort(key=lambda device: (device.process_index, device.id))
    size = len(devices) // slices
    groups = [ordered[i : i + size] for i in range(0, len(devices), size)]
  sizes = sorted({len(group) for group in groups})
  if len(sizes) > 1:
    raise UserError(
      f"slices of {sizes} devices cannot be one mesh; expected equal slices."
    )
  return groups


def arrange(groups: Sequence[Sequence[Any]], data: int, fsdp: int) -> np.ndarray:
  """Orders slices one after the other along "data", each as its own network likes it.

  Args:
    groups: equal slices of devices.
    data: a multiple of the number of slices.
    fsdp: what is left.

  Returns:
    [data, fsdp] devices.
  """
  shape = (data // len(groups), fsdp)

  def within(group: Sequence[Any]) -> np.ndarray:
    try:
      return mesh_utils.create_device_mesh(shape, list(group))
    except NotImplementedError:  # an axis of 8 on chips that lie 4 x 4
      return mesh_utils.create_device_mesh(
        shape, list(group), allow_split_physical_axes=True
      )

  return np.concatenate([within(group) for group in groups])


def slot_places(mesh: Mesh, slots: int) -> np.ndarray:
  """Says where in the mesh the slots that processes read come to lie.

  A process reads S/P slots in a row, but its devices need not be in a row: where chips
  lie in a grid, neighbours in the mesh may belong to different hosts, such as
  0 0 1 1 1 1 0 2 ... on a v5e of 4 x 4.

  Args:
    mesh: from `make_mesh`.
    slots: S, a multiple of the number of devices.

  Returns:
    [S] the place of each slot, in the order of the processes that read them.
  """
  owners = [device.process_index for device in mesh.devices.flat]
  return np.argsort(np.repeat(owners, slots // mesh.size), kind="stable")


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


def gather(x: jax.Array) -> jax.Array:
  """Brings all of a parameter to every device, where it is about to be computed with.

  Left to itself the compiler may split what a layer makes instead, and then sends
  activations around. The gradient is not gathered: it goes back as the parameter is split.
  Does nothing where no mesh is set, or one of a single device.
  """
  return _gather(x) if _is_split() else x


def _is_split() -> bool:
  mesh = jax.sharding.get_abstract_mesh()
  return not (mesh.empty or mesh.size == 1 or mesh.manual_axes)


# The gradient of a plain constraint is the same constraint: all of it, everywhere.
@jax.custom_vjp
def _gather(x: jax.Array) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


_gather.defvjp(lambda x: (_gather(x), None), lambda _, cotangent: (cotangent,))

Product = Callable[[jax.Array, jax.Array], jax.Array]


def gathered_product(
  product: Product, x: jax.Array, kernel: jax.Array, dtype: Any
) -> jax.Array:
  """product(x, kernel), with all of the kernel on every device while it is computed.

  The backward pass gathers the kernel again: kept, they would be the whole model on
  every device. (`jax.checkpoint` would do so as well, but what it keeps it holds on to:
  on a TPU twice the memory, where XLA computes anew inside of the kernels that read it.)

  Args:
    product: linear in both.
    x: activations.
    kernel: a parameter, as it is split.
    dtype: that the kernel is cast to before it travels.
  """
  if not _is_split():
    return product(x, kernel.astype(dtype))
  # Cast first: what is kept until the backward pass is the narrow shard.
  return _gathered_product(product, x, kernel.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered_product(product: Product, x: jax.Array, kernel: jax.Array) -> jax.Array:
  return product(x, _gather(kernel))


def _gathered_product_forward(
  product: Product, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _gathered_product(product, x, kernel), (x, kernel)


def _gathered_product_backward(
  product: Product, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = kept
  # Or the compiler finds the same gather twice, and keeps its result after all.
  whole = _gather(jax.lax.optimization_barrier(kernel))
  # Transposed, not differentiated: jax.vjp would write down the product itself once more.
  of_x = jax.linear_transpose(lambda x: product(x, whole), x)
  of_kernel = jax.linear_transpose(lambda k: product(x, k), kernel)
  return *of_x(cotangent), *of_kernel(cotangent)


_gathered_product.defvjp(_gathered_product_forward, _gathered_product_backward)


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
    ref_err=where.ref_err,
  )


def global_batch(mesh: Mesh, batch: Batch) -> Batch:
  """Makes global arrays of the slots this process read and the ranking all know."""
  read = len(batch.item) * len({device.process_index for device in mesh.devices.flat})
  slot = slot_places(mesh, read)[batch.slot].astype(np.int32)
  batch = dataclasses.replace(batch, slot=slot)
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
