"""Compiles attention, forward and gradient, for TPUs that need not be here.

  pip install "jax[tpu]"
  JAX_PLATFORMS=cpu python benchmarks/attention.py

Prints one Markdown table, that of docs/performance.md; `--json` prints a line for each
row instead. Nothing is run: bytes are what the compiler reserves and counts, times are
its estimates. Of a kernel it counts nothing, so the kernel's own time is read off its
schedule: instruction bundles of its inner loop x how often that runs / the clock.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

SHAPES = ("8x4096x8x40", "8x1024x8x80", "8x256x8x160", "8x4096x10x64", "8x1024x20x64")


@dataclasses.dataclass(frozen=True)
class Chip:
  """What turns bundles into seconds.

  Attributes:
    clock: in Hz; the published peak is cores x clock x products in a cycle.
    cores: that share a kernel's grid.
  """

  clock: float
  cores: int


CHIPS = {"v5e": Chip(1.5e9, 1), "v5p": Chip(1.75e9, 2)}


@dataclasses.dataclass(frozen=True)
class Row:
  """What the compiler says about one implementation on one chip; N images a chip.

  Attributes:
    topology: as the compiler names it.
    shape: N x L x H x D.
    name: of the implementation.
    block: the largest block of "flash".
    chosen: what "auto" would be.
    temp_mib: temporary memory, MiB.
    gb: bytes moved outside of kernels, and in and out of them, in 10^9.
    gflop: outside of kernels.
    xla_ms: the compiler's estimate of all but kernels; None where it has none.
    kernel_ms: of the kernels, from their schedules.
  """

  topology: str
  shape: str
  name: str
  block: int
  chosen: str
  temp_mib: float
  gb: float
  gflop: float
  xla_ms: float | None
  kernel_ms: float


def inner_loop(schedule: pathlib.Path) -> tuple[int, int]:
  """Returns the bundles of a kernel's longest innermost region, and of all of it."""
  address, open_regions, outer, longest = 0, {}, set(), 0
  for line in schedule.read_text("utf-8").splitlines():
    if at := re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", line):
      address = int(at[1], 16)
    for kind, region in re.findall(r"(Start|End) region (\d+)", line):
      if kind == "Start":
        outer |= open_regions.keys()
        open_regions[region] = address
      else:
        start = open_regions.pop(region, address)
        if region not in outer:
          longest = max(longest, address - start + 1)
  return longest, address + 1


def kernel_seconds(folder: pathlib.Path, chip: Chip, shape, limit: int) -> float:
  """Adds up the kernels whose schedules the compiler left in `folder`."""
  from lpo_jax.models import attention

  images, length, heads, _ = shape
  block, padded = attention.blocks(length, limit)
  count = padded // block
  bundles = 0.0
  for schedule in folder.glob("*-final_bundles.txt"):
    if "splash" in schedule.name and "schedule-analysis" not in schedule.name:
      inner, whole = inner_loop(schedule)
      # The rest starts and ends a row of blocks.
      bundles += images * heads * count * (count * inner + whole - inner)
  return bundles / chip.cores / chip.clock


def compile_row(topology: str, shape_name: str, name: str, block: int, folder) -> Row:
  """Compiles one implementation for one topology, its batch split over all chips."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from lpo_jax.models import attention
  from lpo_jax.parallel import by_slot, make_mesh

  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  shape = tuple(int(n) for n in shape_name.split("x"))
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = make_mesh(-1, 1, devices=devices)
  images, length, heads, width = shape
  # As projections give and take it.
  x = jax.ShapeDtypeStruct(
    (images * mesh.size, length, heads * width), jnp.bfloat16, sharding=by_slot(mesh)
  )
  chosen = []

  def gradients(q, k, v, cotangent):
    def layer(q, k, v):
      q, k, v = (y.reshape(*y.shape[:2], heads, width) for y in (q, k, v))
      chosen.append(attention.choose(attention.call_of(q.shape, k.shape, q.dtype)))
      return attention.attend(q, k, v, implementation=name).reshape(x.shape)

    y, pull = jax.vjp(layer, q, k, v)
    return y, pull(cotangent)

  attention.FLASH_BLOCK = block
  options = {"xla_allow_excess_precision": False}
  with jax.set_mesh(mesh):
    lowered = jax.jit(gradients, compiler_options=options).lower(x, x, x, x)
    compiled = lowered.compile()
  cost = compiled.cost_analysis()
  estimate = cost.get("optimal_seconds", -1.0)
  seconds = kernel_seconds(folder, CHIPS[topology.split(":")[0]], shape, block)
  return Row(
    topology=topology,
    shape=shape_name,
    name=name,
    block=block if name == "flash" else 0,
    chosen=chosen[0],
    temp_mib=round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
    gb=round(cost["bytes accessed"] / 1e9, 2),
    gflop=round(cost["flops"] / 1e9, 1),
    xla_ms=round(estimate * 1e3, 2) if estimate >= 0 else None,
    kernel_ms=round(seconds * 1e3, 2),
  )


def rows(flags: argparse.Namespace, folder: pathlib.Path) -> Iterator[Row]:
  """Compiles all that is asked for."""
  for topology in flags.topologies:
    for shape in flags.shapes:
      yield compile_row(topology, shape, "xla", max(flags.blocks), folder)
      length = int(shape.split("x")[1])
      for block in flags.blocks:
        if block <= length or block == min(flags.blocks):
          yield compile_row(topology, shape, "flash", block, folder)


def markdown(row: Row) -> str:
  """Writes one row of the table."""
  name = f"flash, blocks of {row.block}" if row.block else row.name
  estimate = "" if row.xla_ms is None else f"{row.xla_ms:.2f}"
  kernel = f"{row.kernel_ms:.2f}" if row.kernel_ms else ""
  mark = " (auto)" if row.name == row.chosen else ""
  return (
    f"| {row.topology.split(':')[0]} | {row.shape} | {name}{mark} | "
    f"{row.temp_mib:,.0f} | {row.gb:.2f} | {row.gflop:,.0f} | {estimate} | {kernel} |"
  )


HEADER = """\
| chip | N x L x H x D | | temporary MiB | GB moved | GFLOP, no kernels | \
estimate ms, no kernels | kernels ms |
|---|---|---|--:|--:|--:|--:|--:|"""


def main() -> None:
  """Compiles and prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--topologies", nargs="+", default=["v5p:2x2x1", "v5e:2x2"])
  parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
  parser.add_argument("--blocks", type=int, nargs="+", default=[1024, 512, 256])
  parser.add_argument("--json", action="store_true")
  flags = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  # A cached program would leave no schedules.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch) / "schedules"
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}"
    if not flags.json:
      print(HEADER, flush=True)
    for row in rows(flags, folder):
      print(json.dumps(dataclasses.asdict(row)) if flags.json else markdown(row))


if __name__ == "__main__":
  main()
