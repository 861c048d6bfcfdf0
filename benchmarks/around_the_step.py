"""Everything around the train step, on the digits: starts, jitter, saves, memory, drawing.

  JAX_PLATFORMS=cpu python benchmarks/around_the_step.py --workdir runs/around

Trains the quickstart's LPO run with few images an update, in processes of its own: once to
see the first step with nothing compiled, once with all of it kept, and once for
`--updates` steps, of which times and memory are taken. What is in WORKDIR is used again,
but for what is compiled.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

from lpo_jax.training.report import read_metrics

EVERY = 100
SIDES = ("world", "first", "long", "draw")


def settings(workdir: pathlib.Path, images: int):
  """The run, and the world that it is trained on."""
  from lpo_jax.configs import quickstart as world
  from lpo_jax.jobs import quickstart

  config = world.get_config("smoke")
  config.model.path = str(quickstart.base_folder(config))
  config.data.path = str(quickstart.make_judgements(config, workdir))
  own = quickstart.method_config(config, workdir, "lpo")
  own.train.images_per_update, own.train.checkpoint_every = images, EVERY
  own.train.learning_rate, own.train.on_runaway = 1e-6, "off"
  own.eval.every = 0
  return own


def train(workdir: pathlib.Path, images: int, name: str, updates: int) -> None:
  """A child: trains so many updates in WORKDIR/name."""
  from lpo_jax.jobs import cache
  from lpo_jax.jobs import train as job

  own = settings(workdir, images)
  cache.run(own, str(workdir))
  own.train.total_steps = updates
  job.run(own, workdir / name)


def draw(workdir: pathlib.Path, images: int) -> None:
  """A child: images/s of drawing with guidance, decoding included."""
  from lpo_jax import parallel
  from lpo_jax.jobs import candidates, sampling

  own = settings(workdir, images)
  mesh = parallel.mesh_of(own.mesh)
  generator = sampling.make_generator(own, mesh)
  params, _ = candidates.load_params(own.model.path, mesh)
  count = 4 * generator.batch_size
  prompts = ["a handwritten three"] * count
  generator(params, prompts[: generator.batch_size], range(generator.batch_size))
  began = time.perf_counter()
  generator(params, prompts, range(count))
  seconds = time.perf_counter() - began
  steps = own.eval.steps
  print(f"{count / seconds:.1f} images/s, {steps} steps, batches of {count // 4}")


class Child:
  """A process of this file, with a place of its own for what is compiled."""

  def __init__(self, workdir: pathlib.Path, *arguments: object):
    self.began = time.time()
    environment = {
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    self._log = workdir / "log.txt"
    command = [sys.executable, __file__, *sys.argv[1:], *map(str, arguments)]
    with self._log.open("w") as log:
      self._process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT
      )

  def wait(self) -> list[float]:
    """Waits for its end; returns GiB of resident memory, twice a second."""
    memory = []
    while self._process.poll() is None:
      memory.append(resident(self._process.pid))
      time.sleep(0.5)
    if self._process.returncode:
      raise SystemExit(f"a child failed:\n{self._log.read_text()[-3000:]}")
    return memory

  @property
  def said(self) -> str:
    """Its last line."""
    return self._log.read_text().splitlines()[-1]


def resident(pid: int) -> float:
  """GiB that a process holds; 0 once it has ended."""
  try:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return 0.0
  lines = [line for line in text.splitlines() if line.startswith("VmRSS")]
  return int(lines[0].split()[1]) / 2**20 if lines else 0.0


def first_step(workdir: pathlib.Path, name: str) -> float:
  """Seconds from starting Python to the end of the first update."""
  shutil.rmtree(workdir / name, ignore_errors=True)
  child = Child(workdir, "--side=first", "--name", name)
  child.wait()
  return read_metrics(workdir / name / "metrics.jsonl")[0]["time"] - child.began


def help_seconds() -> float:
  """Seconds of the command's --help."""
  began = time.perf_counter()
  command = [sys.executable, "-m", "lpo_jax.main", "--help"]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  return time.perf_counter() - began


def long_run(workdir: pathlib.Path, updates: int) -> list[tuple[str, str]]:
  """Times and memory of many updates."""
  shutil.rmtree(workdir / "long", ignore_errors=True)
  memory = Child(workdir, "--side=long").wait()
  rows = read_metrics(workdir / "long" / "metrics.jsonl")[1:]
  # A row is written once the next step is on its way, and before a save: the time of a
  # save is in the row after it.
  seconds = {b["step"]: b["time"] - a["time"] for a, b in itertools.pairwise(rows)}
  quiet = [s for step, s in seconds.items() if step % EVERY > 2]
  median = statistics.median(quiet)
  cuts = statistics.quantiles(quiet, n=100)
  around = [
    sum(seconds.get(step + i, median) - median for i in (0, 1, 2))
    for step in range(EVERY, updates, EVERY)
  ]
  waits = statistics.fmean(row["data_wait_share"] for row in rows)
  tenth = len(memory) // 10
  parts = [max(memory[i * tenth : (i + 1) * tenth]) for i in (1, 4, 8)]
  return [
    ("a step, median", f"{1e3 * median:.0f} ms"),
    ("5 % and 95 % of the steps", f"{1e3 * cuts[4]:.0f} to {1e3 * cuts[94]:.0f} ms"),
    ("waiting for data", f"{100 * waits:.2f} % of the time"),
    (
      f"a save, every {EVERY} steps",
      f"{1e3 * statistics.median(around):.0f} ms more, "
      f"{100 * statistics.median(around) / (EVERY * median):.2f} % of the time",
    ),
    (
      f"memory of the host after 10, 40, 80 % of {updates} steps",
      ", ".join(f"{x:.3f}" for x in parts) + " GiB",
    ),
  ]


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--updates", type=int, default=2000)
  parser.add_argument("--images", type=int, default=16, help="an update")
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument("--name", help=argparse.SUPPRESS)
  options = parser.parse_args()
  workdir = options.workdir.absolute()
  children = {
    "world": lambda: settings(workdir, options.images),
    "first": lambda: train(workdir, options.images, options.name, 2),
    "long": lambda: train(workdir, options.images, "long", options.updates),
    "draw": lambda: draw(workdir, options.images),
  }
  if options.side:
    children[options.side]()
    return
  workdir.mkdir(parents=True, exist_ok=True)
  Child(workdir, "--side=world").wait()
  shutil.rmtree(workdir / "compiled", ignore_errors=True)
  rows = [
    (
      "`--help`, median of 5",
      f"{statistics.median(help_seconds() for _ in '12345'):.2f} s",
    ),
    ("to the first step, nothing compiled", f"{first_step(workdir, 'cold'):.1f} s"),
    ("to the first step, all of it kept", f"{first_step(workdir, 'warm'):.1f} s"),
    *long_run(workdir, options.updates),
  ]
  drawing = Child(workdir, "--side=draw")
  drawing.wait()
  rows.append(("drawing with guidance", drawing.said))
  print("| what | on this machine |\n|---|---|")
  print("\n".join(f"| {name} | {value} |" for name, value in rows))


if __name__ == "__main__":
  main()
