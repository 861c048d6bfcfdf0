"""What TPUs would send each other and keep on the host, by their compiler."""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lpo_jax import parallel

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not here"
  ),
]
WIDTH, LAYERS = 1280, 3


def compile_layers(mesh, **memory):
  """Three layers of parameters split over "fsdp", one step of gradient descent."""
  split = NamedSharding(mesh, PartitionSpec(None, "fsdp"), **memory)
  on_device = split.with_memory_kind("device")
  slots = NamedSharding(mesh, PartitionSpec(parallel.AXES))
  shape = (WIDTH, WIDTH)
  params = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)] * LAYERS
  x = jax.ShapeDtypeStruct((1024, WIDTH), jnp.bfloat16, sharding=slots)

  def loss(params, x):
    narrow = [p.astype(jnp.bfloat16) for p in params]
    narrow = jax.lax.with_sharding_constraint(narrow, on_device)
    y = x
    for kernel in narrow:
      y = jnp.sin(parallel.gathered_product(jnp.matmul, y, kernel, jnp.bfloat16))
    return jnp.square(y.astype(jnp.float32)).sum()

  def step(params, x):
    params = jax.device_put(params, on_device)
    gradient = jax.lax.with_sharding_constraint(jax.grad(loss)(params, x), on_device)
    return jax.tree.map(lambda p, g: p - g, params, gradient)

  with jax.set_mesh(mesh):
    jitted = jax.jit(step, out_shardings=split, donate_argnums=0)
    return jitted.lower(params, x).compile()


@pytest.fixture(scope="module")
def topology():
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  return lambda name, **more: topologies.get_topology_desc(name, "tpu", **more).devices


def test_one_gather_a_use_and_one_reduce_scatter_a_gradient(topology):
  mesh = parallel.make_mesh(1, 8, devices=topology("v5e:2x4"))
  text = compile_layers(mesh).as_text()
  found = re.findall(r"= (\w+\[[\d,]+\])\S* all-gather\(.*?channel_id=(\d+)", text)
  # One that is carried on within fusions is written in each of them.
  gathers = {channel: array for array, channel in found}
  # Forward all, backward all but the first: nobody asks for the gradient of x. In bf16.
  assert [*gathers.values()] == [f"bf16[{WIDTH},{WIDTH}]"] * (2 * LAYERS - 1)
  # libtpu's reduce-scatter: a fusion that gives an eighth of what it sums.
  (scatter,) = re.findall(r"%all-reduce-scatter\S* \((.*)\) -> \((.*)\) {", text)
  assert [part.count("bf16[") for part in scatter] == [LAYERS] * 2
  assert scatter[1].count(f"bf16[{WIDTH},{WIDTH // 8}]") == LAYERS
  assert text.count(" all-reduce(") == 1 and " all-to-all(" not in text


def test_only_sums_of_parts_go_between_slices(topology):
  devices = topology("v5e:2x4", num_slices=2)
  mesh = parallel.make_mesh(-1, 8, devices=devices)
  assert [{d.slice_index for d in row} for row in mesh.devices] == [{0}, {1}]
  with pytest.raises(parallel.UserError, match="over 2 slices of 8 devices"):
    parallel.make_mesh(1, 16, devices=devices)


def test_what_is_on_the_host_is_fetched_and_put_back(topology):
  mesh = parallel.make_mesh(2, 4, devices=topology("v5e:2x4"))
  memory = compile_layers(mesh, memory_kind="pinned_host").memory_analysis()
  size = LAYERS * 4 * WIDTH * WIDTH // 4
  assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == size
  assert memory.argument_size_in_bytes < size


def test_neighbours_in_the_mesh_may_belong_to_different_hosts(topology):
  mesh = parallel.make_mesh(devices=topology("v5e:4x4"))
  owners = [device.process_index for device in mesh.devices.flat]
  assert owners != sorted(owners)
  places = parallel.slot_places(mesh, 32)
  assert sorted(places) == list(range(32))
  for process in range(4):
    read = places[8 * process : 8 * process + 8]
    assert {owners[place // 2] for place in read} == {process}
    assert list(read) == sorted(read)
