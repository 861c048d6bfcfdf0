"""Host memory while SDXL's UNet is read onto its devices, above what the devices hold.

  python benchmarks/load_memory.py                        one process, 8 devices
  python benchmarks/load_memory.py --processes 2          two, of 4 devices each
  python benchmarks/load_memory.py --dtype float16        a 5 GB file, widened to 10 GB
  python benchmarks/load_memory.py --dtype float16 --as-stored      and not widened

Writes a file of random weights under --folder (10.3 GB; removed at the end), in one
process, and reads it in others with fsdp over all devices. On CPU the devices' memory is
the host's. So what counts is anonymous memory (RssAnon of /proc/self/status, sampled
every 5 ms): it has the devices' arrays and every copy that is made on the way, and not
the pages of the mapped file, which the kernel may drop at any time. Their part of the
resident memory is printed beside it.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ARCHITECTURES = HERE.parent / "lpo_jax" / "assets" / "architectures"
GIB = 2**30


def resident() -> tuple[int, int]:
  """Anonymous and file-backed resident bytes of this process."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  sizes = {line.split(":")[0]: line.split()[1] for line in lines if "kB" in line}
  return int(sizes["RssAnon"]) * 1024, int(sizes["RssFile"]) * 1024


class Peak:
  """The largest resident memory while the block runs, sampled by a thread."""

  def __enter__(self):
    self.anonymous = self.mapped = 0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._sample, daemon=True)
    self._thread.start()
    return self

  def _sample(self):
    while True:
      anonymous, mapped = resident()
      self.anonymous = max(self.anonymous, anonymous)
      self.mapped = max(self.mapped, mapped)
      if self._done.wait(0.005):
        return

  def __exit__(self, *_):
    self._done.set()
    self._thread.join()


def write(folder: pathlib.Path, config: dict, dtype: str) -> None:
  """Writes a UNet of random weights, one tensor at a time."""
  from lpo_jax import models
  from lpo_jax.pretrained import names, tensors

  shapes = models.build(config).named_shapes()
  stored = [names.stored(name, leaf.shape) for name, leaf in shapes.items()]
  entries = {each: (dtype, one.shape) for one in stored for each in one.names}
  some = np.random.default_rng(0).standard_normal(2**24, np.float32).astype(dtype)
  path = folder / "unet" / "diffusion_pytorch_model.safetensors"
  path.parent.mkdir(parents=True)
  (path.parent / "config.json").write_text(json.dumps(config))
  tensors.write(path, entries, lambda name: np.resize(some, entries[name][1]))


def read(folder: str, dtype: str | None) -> dict:
  """Loads the UNet onto all devices; returns what it took this process, in bytes."""
  import jax

  from lpo_jax import models, parallel, pretrained

  parallel.initialize_distributed()
  mesh = parallel.make_mesh(1, -1)
  model = models.build(pretrained.read_config(folder, "unet"))
  sharding = parallel.param_shardings(model.abstract_params, mesh)
  before, _ = resident()
  began = time.monotonic()
  with Peak() as peak:
    part = pretrained.load(folder, "unet", sharding=sharding, dtype=dtype)
    params = part.params
    jax.block_until_ready(params)
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(params)
    for shard in leaf.addressable_shards
  )
  return {
    "process": jax.process_index(),
    "devices": jax.local_device_count(),
    "before": before,
    "held": held,
    "peak": peak.anonymous,
    "mapped": peak.mapped,
    "above": peak.anonymous - before - held,
    "seconds": time.monotonic() - began,
  }


def measure(folder: str, processes: int, devices: int, more: list[str]) -> list[dict]:
  """Runs the readers; one result per process."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  started = []
  for process in range(processes):
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env["PYTHONPATH"] = str(HERE.parent)
    if processes > 1:
      env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
      env["JAX_NUM_PROCESSES"], env["JAX_PROCESS_ID"] = str(processes), str(process)
    command = [sys.executable, __file__, "--read", folder, *more]
    started.append(
      subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    )
  return [json.loads(one.communicate()[0].splitlines()[-1]) for one in started]


def main() -> None:
  """Writes, measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", type=pathlib.Path,
                      default=ARCHITECTURES / "sdxl_unet.json")  # fmt: skip
  parser.add_argument("--dtype", default="float32", choices=["float32", "float16"])
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument("--folder", help="where the file goes; default a temporary one")
  parser.add_argument("--as-stored", action="store_true", help="do not widen to fp32")
  parser.add_argument("--read", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.read:
    dtype = None if arguments.as_stored else "float32"
    print(json.dumps(read(arguments.read, dtype)))
    return
  folder = pathlib.Path(tempfile.mkdtemp(dir=arguments.folder))
  try:
    os.environ["JAX_PLATFORMS"] = "cpu"
    write(folder, json.loads(arguments.config.read_text()), arguments.dtype)
    more = ["--as-stored"] * arguments.as_stored
    rows = measure(str(folder), arguments.processes, arguments.devices, more)
  finally:
    shutil.rmtree(folder)
  for row in rows:
    sizes = {k: row[k] / GIB for k in ("held", "peak", "before", "above", "mapped")}
    print(
      f"process {row['process']} with {row['devices']} devices, {row['seconds']:.0f} s: "
      f"devices hold {sizes['held']:.2f} GiB, peak {sizes['peak']:.2f} GiB of which "
      f"{sizes['before']:.2f} before; above what the devices hold: "
      f"{sizes['above']:.2f} GiB (mapped file pages besides: {sizes['mapped']:.2f} GiB)"
    )
  print(f"worst: {max(row['above'] for row in rows) / GIB:.3f} GiB")


if __name__ == "__main__":
  main()
