"""Meshes, placements by name, and what lives where on eight devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lpo_jax import parallel, trees
from lpo_jax.errors import UserError


def devices(count):
  """Stands in for devices where only their number matters."""
  return [f"device {i}" for i in range(count)]


@pytest.mark.parametrize(
  ("data", "fsdp", "count"),
  [(3, -1, 8), (-1, 3, 8), (2, 2, 8), (16, 1, 8), (-1, 16, 8), (1, 1, 8)],
)
def test_mesh_refuses_what_does_not_cover_the_devices(data, fsdp, count):
  with pytest.raises(UserError, match=f"does not cover the {count} device"):
    parallel.make_mesh(data, fsdp, devices=devices(count))


@pytest.mark.parametrize(("data", "fsdp"), [(-1, -1), (0, 1), (1, -2), (-1, 0)])
def test_mesh_refuses_sizes_that_are_none(data, fsdp):
  with pytest.raises(UserError, match=f"mesh.data={data}, mesh.fsdp={fsdp}"):
    parallel.make_mesh(data, fsdp, devices=devices(8))


@pytest.mark.parametrize("sizes", [(-1, 1), (1, -1), (1, 1)])
def test_mesh_of_one_device(sizes):
  mesh = parallel.make_mesh(*sizes, devices=jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
  """Stands in for a device of a machine that is not here."""

  id: int
  process_index: int
  slice_index: int | None
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def two_slices():
  """Two slices of 2 x 2 chips, two hosts each; the second slice comes first."""
  return [
    Chip(10 * s + i, 2 * s + i // 2, s, coords=(i % 2, i // 2, 0))
    for s in (1, 0)
    for i in range(4)
  ]


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (2, 4)])
def test_slices_are_the_outer_part_of_data(data, fsdp):
  groups = parallel.group_slices(two_slices())
  assert [{chip.slice_index for chip in group} for group in groups] == [{0}, {1}]
  mesh = parallel.arrange(groups, data, fsdp)
  assert mesh.shape == (data, fsdp)
  slices = [[chip.slice_index for chip in row] for row in mesh]
  half = data // 2
  assert slices == [[0] * fsdp] * half + [[1] * fsdp] * half
  assert sorted(chip.id for chip in mesh.flat) == [0, 1, 2, 3, 10, 11, 12, 13]


def test_parameters_are_not_split_over_slices():
  with pytest.raises(
    UserError, match=r"mesh.fsdp=8 .* 2 slices of 4 devices.* divisor of 4"
  ):
    parallel.make_mesh(1, 8, devices=two_slices())
  with pytest.raises(UserError, match=r"mesh.fsdp=4 .* 4 slices of 2 devices"):
    parallel.make_mesh(-1, 4, slices=4, devices=two_slices())
  config = {"data": -1, "fsdp": 4, "slices": 4, "parameters": "sharded"}
  with pytest.raises(UserError, match=r"mesh.fsdp=4 .* 4 slices of 2 devices"):
    parallel.mesh_of(config, two_slices())


def test_slices_that_devices_do_not_know_of_are_processes_in_a_row():
  here = [Chip(7 - i, (7 - i) // 2, None, platform="gpu") for i in range(8)]
  assert parallel.group_slices(here) == [here]
  first, second = parallel.group_slices(here, 2)
  assert [chip.process_index for chip in first] == [0, 0, 1, 1]
  assert [chip.process_index for chip in second] == [2, 2, 3, 3]
  # Where hosts say that each of them is a slice, that binds nobody but TPUs.
  hosts = [dataclasses.replace(chip, slice_index=chip.process_index) for chip in here]
  assert parallel.group_slices(hosts) == [hosts]
  assert len(parallel.group_slices(hosts, 4)) == 4


@pytest.mark.parametrize(
  ("slices", "words"),
  [(0, "mesh.slices=0"), (-2, "mesh.slices=-2"), (3, "does not divide the 8 device")],
)
def test_slices_that_cannot_be_are_refused(slices, words):
  with pytest.raises(UserError, match=words):
    parallel.group_slices(two_slices(), slices)
  if slices == 0:
    with pytest.raises(UserError, match=r"slices of \[3, 4\] devices"):
      parallel.group_slices(two_slices()[:7])


def test_an_axis_may_be_longer_than_the_grid():
  """As 8 of the 16 chips of a v5e that lie 4 x 4."""
  chips = [Chip(i, i // 4, 0, coords=(i % 4, i // 4, 0)) for i in range(16)]
  mesh = parallel.arrange([chips], 2, 8)
  assert sorted(chip.id for chip in mesh.flat) == list(range(16))


def test_slots_lie_where_the_devices_of_their_readers_are():
  class Grid:
    devices = np.asarray([Chip(i, p, 0) for i, p in enumerate([0, 1, 1, 0])])
    size = 4

  # Slots 0 to 3 are read by process 0, whose devices are the first and the last.
  assert parallel.slot_places(Grid, 8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.mark.parametrize(
  ("shape", "size", "spec"),
  [
    ((64, 128), 4, PartitionSpec(None, "fsdp")),  # the largest dimension
    ((128, 64), 4, PartitionSpec("fsdp")),
    ((64, 64), 4, PartitionSpec(None, "fsdp")),  # equal: the last, of outputs
    ((3, 3, 64, 48), 4, PartitionSpec(None, None, "fsdp")),
    ((64, 130), 4, PartitionSpec("fsdp")),  # 130 does not divide
    ((33, 65), 4, PartitionSpec()),  # nothing divides
    ((16, 32), 4, PartitionSpec()),  # too small to be worth it
    ((32, 32), 4, PartitionSpec(None, "fsdp")),  # exactly large enough
    ((64, 128), 1, PartitionSpec()),
    ((), 4, PartitionSpec()),
  ],
)
def test_fsdp_splits_the_largest_dimension_that_divides(shape, size, spec):
  assert parallel._fsdp_spec(shape, size) == spec


def test_unknown_placement_is_refused_by_name():
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = {"a": {"kernel": jnp.zeros((4, 4))}}
  with pytest.raises(UserError, match=r"'a\.kernel' says 'fspd'"):
    parallel.param_shardings(params, mesh, [(".*", "fspd")])
  with pytest.raises(UserError, match=r"no partition rule matches parameter 'a\."):
    parallel.param_shardings(params, mesh, [("bias", "replicate")])


def test_put_and_fetch_keep_every_bit():
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  tree = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "b": jnp.asarray([1.1, -0.0], jnp.bfloat16),
    "c": np.uint32(7),
  }
  back = parallel.fetch(parallel.put(tree, parallel.param_shardings(tree, mesh)))
  for name, x in tree.items():
    assert back[name].dtype == x.dtype
    assert back[name].tobytes() == np.asarray(x).tobytes()


@pytest.mark.parametrize("missing", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_half_a_description_of_a_run_is_refused(monkeypatch, missing):
  names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
  for name in names:
    monkeypatch.setenv(name, "1")
  monkeypatch.delenv(missing)
  with pytest.raises(UserError, match=f"{missing} is not: set all three"):
    parallel.initialize_distributed()


def test_a_single_process_needs_no_description(monkeypatch):
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
  monkeypatch.delenv("LPO_JAX_DISTRIBUTED", raising=False)

  def refuse(*args, **kwargs):
    raise AssertionError("should not have been called")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  parallel.initialize_distributed()


EIGHT = """
  import json
  import jax, jax.numpy as jnp, numpy as np
  from lpo_jax import parallel, trees
  from lpo_jax.training import optimizer, state
  from lpo_jax.types import Batch, Conditioning, Ranking

  out = {}
  meshes = {"-1,1": (-1, 1), "1,-1": (1, -1), "-1,2": (-1, 2), "2,4": (2, 4)}
  for name, sizes in meshes.items():
    out[name] = dict(parallel.make_mesh(*sizes).shape)

  mesh = parallel.make_mesh(2, 4)
  spec = lambda x: [list(a) if isinstance(a, tuple) else a for a in x.sharding.spec]
  params = {
    "big": {"kernel": np.arange(64 * 48, dtype=np.float32).reshape(64, 48),
            "bias": np.ones(2048, np.float32)},
    "kernel": np.ones((64, 48), np.float32) * 2,  # a name that ends the other's
    "small": {"kernel": np.ones((4, 4), np.float32)},
  }
  shardings = parallel.param_shardings(params, mesh)
  placed = parallel.put(params, shardings)
  out["params"] = {n: spec(x) for n, x in trees.named_leaves(placed).items()}
  out["shards"] = sorted({s.data.shape for s in placed["big"]["kernel"].addressable_shards})
  back = parallel.fetch(placed)
  out["same"] = bool(np.array_equal(back["big"]["kernel"], params["big"]["kernel"]))

  tx = optimizer.build(
    "adamw", params, learning_rate=0.1, trainable_rules=[("small", False), (".*", True)]
  )
  like = state.placement(mesh, params, tx, with_ema=True, shardings=shardings)
  s = state.place(like, placed, tx)
  out["state"] = {n: spec(x) for n, x in trees.named_leaves(s).items()}
  fact = optimizer.build("adafactor", params, learning_rate=0.1)
  like = state.placement(mesh, params, fact, with_ema=False, shardings=shardings)
  s = state.place(like, placed, fact)
  out["adafactor"] = {n: spec(x) for n, x in trees.named_leaves(s.opt_state).items()}

  S = 16
  batch = Batch(
    moments=np.arange(S * 8, dtype=np.float32).reshape(S, 1, 1, 8),
    conditioning=Conditioning(np.zeros((S, 2, 3), np.float32)),
    identity=np.zeros((S, 2), np.uint32),
    item=np.arange(S, dtype=np.uint32),
    slot=np.arange(S, dtype=np.int32).reshape(4, 4),
    ranking=Ranking(*(np.zeros((4, 4), d) for d in (np.int32, bool, np.float32)),
                    np.ones(4, np.float32)),
  )
  there = parallel.global_batch(mesh, batch)
  out["batch"] = {n: spec(x) for n, x in trees.named_leaves(there).items()}
  order = mesh.devices.flatten().tolist()
  items = {s.device: np.asarray(s.data).tolist() for s in there.item.addressable_shards}
  out["items"] = [items[d] for d in order]
  out["absent"] = there.conditioning.time_ids is None

  x = np.arange(128, dtype=np.float32).reshape(16, 8) % 4
  kernel = 1 + np.arange(8 * 48, dtype=np.float32).reshape(8, 48) % 48
  at = parallel.param_shardings({"kernel": np.ones((64, 48))}, mesh)["kernel"]
  given = jax.device_put(x, parallel.by_slot(mesh)), jax.device_put(kernel, at)
  def loss(x, kernel):
    return (parallel.gathered_product(jnp.matmul, x, kernel, jnp.bfloat16) ** 2).sum()
  with jax.set_mesh(mesh):
    of_x, of_kernel = jax.jit(jax.grad(loss, (0, 1)))(*given)
    out["gathered"] = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*given))
  of_y = 2 * (x @ kernel)
  out["of x"] = bool(np.array_equal(of_x, of_y @ kernel.T))
  error = np.abs(of_kernel - x.T @ of_y).max() / np.abs(x.T @ of_y).max()
  out["of kernel"] = [str(of_kernel.dtype), float(error)]
  print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight(on_devices):
  return json.loads(on_devices(8, EIGHT))


def test_minus_one_is_filled_with_the_rest(eight):
  assert eight["-1,1"] == {"data": 8, "fsdp": 1}
  assert eight["1,-1"] == {"data": 1, "fsdp": 8}
  assert eight["-1,2"] == {"data": 4, "fsdp": 2}
  assert eight["2,4"] == {"data": 2, "fsdp": 4}


def test_large_matrices_are_split_and_vectors_are_not(eight):
  assert eight["params"] == {
    "big.bias": [],
    "big.kernel": ["fsdp"],
    "kernel": ["fsdp"],
    "small.kernel": [],
  }
  assert eight["shards"] == [[16, 48]]
  assert eight["same"]


def test_moments_and_ema_live_beside_their_parameters(eight):
  where = eight["state"]
  for kind in ("mu", "nu"):
    slots = {n: s for n, s in where.items() if f".{kind}." in n}
    assert len(slots) == 3  # the frozen parameter has none
    for name, spec in slots.items():
      assert spec == (["fsdp"] if name.endswith("kernel") else [])
  for tree in ("params", "ema"):
    assert {n: s for n, s in where.items() if n.startswith(tree)} == {
      f"{tree}.{n}": s for n, s in eight["params"].items()
    }
  counters = [s for n, s in where.items() if n.endswith("count") or n == "step"]
  assert len(counters) >= 2 and not any(counters)


def test_factored_moments_are_replicated_and_whole_ones_are_not(eight):
  # 64 x 48 is below adafactor's size for factoring, so `v` is whole.
  v = {n: s for n, s in eight["adafactor"].items() if ".v." in n}
  assert [s for n, s in v.items() if n.endswith("big.kernel")] == [["fsdp"]]
  assert not any(s for n, s in eight["adafactor"].items() if ".v_row." in n)


def test_slots_are_split_over_all_devices_in_order_and_rankings_are_everywhere(eight):
  both = [["data", "fsdp"]]
  assert eight["batch"] == {
    "moments": both,
    "conditioning.prompt_embeds": both,
    "identity": both,
    "item": both,
    "slot": [],
    "ranking.rank": [],
    "ranking.valid": [],
    "ranking.score": [],
    "ranking.weight": [],
  }
  assert eight["items"] == [[2 * i, 2 * i + 1] for i in range(8)]
  assert eight["absent"]


def test_a_kernel_is_gathered_for_the_product_and_again_for_its_gradient(eight):
  # Numbers small enough for exact products; partial sums of the gradient are bfloat16.
  assert eight["of x"]
  dtype, error = eight["of kernel"]
  assert dtype == "float32"
  assert error < 2**-7
  assert eight["gathered"].count("sharding_constraint[") == 2
  assert eight["gathered"].count("optimization_barrier") == 1
  # One product and two for its gradient; what is counted as FLOPs is what is written here.
  assert eight["gathered"].count("dot_general[") == 3


def test_names_of_state_end_in_names_of_parameters():
  """A parameter whose name ends another's does not take its place."""
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = {"a": {"kernel": jnp.zeros((2, 3))}, "kernel": jnp.zeros((2, 3))}
  homes = {"a": {"kernel": "home of a"}, "kernel": "home of kernel"}
  state = {"mu": params, "row": {"a": {"kernel": jnp.zeros(2)}}, "count": jnp.zeros(())}
  placed = trees.named_leaves(parallel.state_shardings(state, params, mesh, homes))
  assert placed["mu.a.kernel"] == "home of a"
  assert placed["mu.kernel"] == "home of kernel"
  assert placed["row.a.kernel"] == placed["count"] == parallel.replicated(mesh)
