"""Which parts of a run are split over devices, whole on each, or in the host's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lpo_jax import parallel, trees
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import Model
from lpo_jax.types import Params

WHERE = ("sharded", "replicated")
OFFLOADED = ("ema", "reference")
# Host memory that a device reads and writes by itself.
HOST = "pinned_host"
# "auto" keeps a whole reference on every device up to this size, where parameters are
# split over no more devices than these: a host's worth. Both numbers are our judgement.
SMALL_MESH = 8
SMALL_REFERENCE = 2 * 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
  """Where the trees of a run live, as shardings.

  Attributes:
    params: of what is trained.
    update: of its gradient and of the optimizer's moments.
    ema: of its running mean.
    frozen: of the reference, or of a delta's base; None where there is neither.
  """

  params: Any
  update: Any
  ema: Any
  frozen: Any


def check(parameters: str, reference: str, offload: Sequence[str]) -> None:
  """Refuses words that the section `mesh` does not know.

  Raises:
    UserError: with the known ones.
  """
  if parameters not in WHERE:
    raise unknown_name("mesh.parameters", parameters, WHERE)
  if reference not in ("auto", *WHERE):
    raise unknown_name("mesh.reference", reference, ("auto", *WHERE))
  if isinstance(offload, str):
    raise UserError(
      f"mesh.offload={offload!r}: expected a tuple of names, such as ({offload!r},)."
    )
  for part in offload:
    if part not in OFFLOADED:
      raise unknown_name("mesh.offload", part, OFFLOADED)


def settle(
  mesh: Mesh,
  trained: Params,
  frozen: Params | None,
  *,
  parameters: str = "sharded",
  reference: str = "auto",
  offload: Sequence[str] = (),
  is_base: bool = False,
) -> Places:
  """Decides where everything lives.

  Moments and the running mean are always split over "fsdp"; with mesh.fsdp = 1 nothing is.

  Args:
    mesh: from `parallel.make_mesh`.
    trained: shapes of what is trained.
    frozen: shapes of what is not, if there is anything.
    parameters: "sharded", as the moments | "replicated": ZeRO-1.
    reference: of the frozen tree: "sharded" | "replicated" | "auto", see `SMALL_MESH`.
    offload: of "ema" and "reference", what is kept in the memory of the host.
    is_base: whether the frozen tree is what a delta is added to.

  Raises:
    UserError: an unknown word, a platform that cannot, or nothing to offload.
  """
  check(parameters, reference, offload)
  split = parallel.param_shardings(trained, mesh)
  whole = jax.tree.map(lambda _: parallel.replicated(mesh), trained)
  if offload:
    _check_host_memory(mesh, offload)
  at = None
  if frozen is not None:
    at = parallel.param_shardings(frozen, mesh)
    if reference == "auto":
      reference = "replicated" if _is_small(mesh, frozen) else "sharded"
    if reference == "replicated":
      at = jax.tree.map(lambda _: parallel.replicated(mesh), frozen)
  if "reference" in offload:
    if at is None or is_base:
      because = (
        "it is the base that the policy needs as well"
        if is_base
        else ("the objective reads nothing of it")
      )
      raise UserError(
        f"mesh.offload={tuple(offload)}: the reference cannot be kept in the host's "
        f"memory, {because}; expected mesh.offload without 'reference'."
      )
    at = _to_memory(at, HOST)
  return Places(
    params=split if parameters == "sharded" else whole,
    update=split,
    ema=_to_memory(split, HOST) if "ema" in offload else split,
    frozen=at,
  )


def _is_small(mesh: Mesh, frozen: Params) -> bool:
  size = sum(x.size * x.dtype.itemsize for x in trees.named_leaves(frozen).values())
  return mesh.shape["fsdp"] <= SMALL_MESH and size <= SMALL_REFERENCE


def _check_host_memory(mesh: Mesh, offload: Sequence[str]) -> None:
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if HOST not in kinds:
    raise UserError(
      f"mesh.offload={tuple(offload)}: {device.platform} devices here have no memory of "
      f"the kind {HOST!r}, only {', '.join(kinds)}; expected mesh.offload=()."
    )


def _to_memory(shardings: Any, kind: str) -> Any:
  return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)


def is_offloaded(shardings: Any) -> bool:
  """Whether a tree of shardings is in the memory of the host."""
  return any(each.memory_kind == HOST for each in jax.tree.leaves(shardings))


def to_device(tree: Any, shardings: Any) -> Any:
  """Brings what lives in the memory of the host to the devices; inside of a step too.

  Args:
    tree: arrays, traced or not.
    shardings: where they live.
  """
  if not is_offloaded(shardings):
    return tree
  return jax.device_put(tree, _to_memory(shardings, "device"))


def in_use(
  weights: Callable[[Params, Params | None], Params], model: Model, shardings: Any
) -> Callable[[Params, Params | None], Params]:
  """Rounds the policy's weights before they are sent around, not afterwards.

  Args:
    weights: makes them, see `step.Method`.
    model: knows in which dtype it uses them.
    shardings: of the tree that they are made of.
  """
  if all(each.is_fully_replicated for each in jax.tree.leaves(shardings)):
    return weights

  def run(trained: Params, frozen: Params | None) -> Params:
    narrow = model.narrow(weights(trained, frozen))
    return jax.lax.with_sharding_constraint(narrow, shardings)

  return run
