#!/usr/bin/env python3
"""Runs a sweep: one after another here, or each through a launcher; then compares.

  python launch/sweep.py configs/sweep_beta.py[:arg] --workdir DIR [--on local]
      [--only NAME,...] [--part all] [--dry-run]
      [flags of the launcher ...] [--config.path.to.key=value ...]

--on: local, or tpu_vm, xpk, gke, slurm, multi_gpu. Flags that are not the sweep's go to
the launcher; {run} in them becomes the name of the run, as in --name lpo-{run}.
--part: shared (what the runs have in common), runs, table, or all of these. Through a
launcher shared comes first, by a call of its own, and must have ended before runs.

Here the sweep can be stopped and gone on with: what is done is not run again. A run that
fails does not end the others. In the end comparison.md, .json and .png are in DIR.
Exit codes are those of lpo_jax.main: 0 done, 2 a run failed, 3 stopped early.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lpo_jax import main as door  # noqa: E402
from lpo_jax.errors import UserError, unknown_name  # noqa: E402

LAUNCHERS = {
  "tpu_vm": "launch/tpu_vm.sh",
  "xpk": "launch/xpk.sh",
  "gke": "launch/gke.sh",
  "slurm": "launch/slurm.sbatch",
  "multi_gpu": "launch/multi_gpu.sh",
}
PARTS = ("all", "shared", "runs", "table")


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A config, and the runs that are made of it.

  Attributes:
    location: "path.py" or "path.py:arg", as --config takes it.
    shared: jobs that are run once, first.
    each: jobs of every run, in order.
    runs: name -> keys that differ and their values.
    base: the config that the runs have in common.
  """

  location: str
  shared: tuple[str, ...]
  each: tuple[str, ...]
  runs: Mapping[str, Mapping[str, Any]]
  base: Any


@dataclasses.dataclass(frozen=True)
class Command:
  """One call of lpo_jax.main or of a launcher.

  Attributes:
    run: the run's name; "shared" for what comes first.
    words: the command line.
  """

  run: str
  words: tuple[str, ...]

  def __str__(self) -> str:
    return shlex.join(self.words)


def read_sweep(location: str) -> Sweep:
  """Reads a sweep file.

  Raises:
    UserError: it is no sweep, or a run sets a key that there is not.
  """
  base = door.load_config(location)
  path, _, argument = location.partition(":")
  file = pathlib.Path(path)
  if not file.is_file():
    file = ROOT / "configs" / file.name
  spec = importlib.util.spec_from_file_location("lpo_jax_sweep", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_sweep"):
    raise UserError(
      f"{path} has no get_sweep(arg=''); expected a sweep as in configs/sweep_beta.py."
    )
  found = module.get_sweep(argument)
  sweep = Sweep(
    location, tuple(found["shared"]), tuple(found["each"]), found["runs"], base
  )
  for name, changes in sweep.runs.items():
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name) or name == "shared":
      raise UserError(
        f"{path}: run {name!r}: expected small letters, digits, '-' and '.': clusters "
        "call their jobs so."
      )
    own = base.copy_and_resolve_references()
    for key, value in changes.items():
      door.override(own, key, str(value))
  return sweep


def expand(
  sweep: Sweep,
  workdir: str,
  *,
  on: str,
  part: str,
  only: Sequence[str],
  rest: Sequence[str],
) -> list[Command]:
  """Lists the commands of a sweep, in order.

  Args:
    sweep: what to run.
    workdir: of the sweep, as whoever runs the command sees it.
    on: "local" or a key of `LAUNCHERS`.
    part: one of `PARTS`.
    only: names of runs; empty for all.
    rest: what else was on the command line.

  Raises:
    UserError: an unknown run, or shared jobs and runs at once through a launcher.
  """
  for name in only:
    if name not in sweep.runs:
      raise unknown_name("run of the sweep", name, sweep.runs)
  if on != "local" and part == "all" and sweep.shared:
    raise UserError(
      f"{', '.join(sweep.shared)} must have ended before the runs begin: call this with "
      "--part shared first, and with --part runs when that is done."
    )
  common = list(rest)
  if "cache" in (*sweep.shared, *sweep.each) and sweep.base.data.cache == "":
    common.append(f"--config.data.cache={workdir}/cache")

  def words(run: str, jobs: Sequence[str], changes: Mapping[str, Any]) -> list[Command]:
    place = ["--config", sweep.location, "--workdir", f"{workdir}/{run}"]
    more = [word.replace("{run}", run) for word in common]
    more += [f"--config.{key}={value}" for key, value in changes.items()]
    if on == "local":
      front = ("python", "-m", "lpo_jax.main")
      return [Command(run, (*front, *place, "--job", job, *more)) for job in jobs]
    launcher = ("bash", LAUNCHERS[on])
    return [Command(run, (*launcher, *place, "--jobs", ",".join(jobs), *more))]

  made = []
  if sweep.shared and part in ("all", "shared"):
    made += words("shared", sweep.shared, {})
  if part in ("all", "runs"):
    for name, changes in sweep.runs.items():
      if not only or name in only:
        made += words(name, sweep.each, changes)
  return made


class Child:
  """Runs commands here; signals are passed on, so that a run can save itself."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    self.stopped = False
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._note)

  def _note(self, number: int, frame: Any) -> None:
    del number, frame
    self.stopped = True
    if self._process is not None:
      self._process.terminate()

  def run(self, words: Sequence[str]) -> int:
    """Runs one command to its end; returns its exit code."""
    above = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([above] if above else [])])
    self._process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})
    code = self._process.wait()
    self._process = None
    return code


def run_here(commands: Sequence[Command], workdir: pathlib.Path) -> int:
  """Runs what is not done yet, one after another; returns the exit code."""
  workdir.mkdir(parents=True, exist_ok=True)
  file = workdir / "sweep.json"
  done = json.loads(file.read_text("utf-8")) if file.exists() else []
  child, failed = Child(), {}
  for count, command in enumerate(commands, 1):
    if str(command) in done:
      print(f"== {count} of {len(commands)}: {command.run} is done already", flush=True)
      continue
    if command.run in failed:
      continue
    print(f"\n== {count} of {len(commands)}: {command}", flush=True)
    code = child.run([sys.executable, *command.words[1:]])
    if code == door.EXIT_STOPPED_EARLY or child.stopped:
      print("sweep.py: stopped early; the same command goes on", file=sys.stderr)
      return door.EXIT_STOPPED_EARLY
    if code == door.EXIT_DONE:
      done.append(str(command))
      file.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
      continue
    failed[command.run] = code
    if command.run == "shared":
      break
  for run, code in failed.items():
    print(f"sweep.py: {run} failed with exit code {code}", file=sys.stderr)
  return door.EXIT_USER_ERROR if failed else door.EXIT_DONE


def compare(sweep: Sweep, workdir: pathlib.Path) -> None:
  """Writes the comparison and prints its table."""
  from lpo_jax.jobs import sweep_report

  rows = sweep_report.write(workdir, sweep.runs)
  if not rows:
    print(f"sweep.py: no run in {workdir} has trained yet", file=sys.stderr)
    return
  print(f"\n{sweep_report.markdown(rows)}\n\nplot: {workdir / 'comparison.png'}")


def main(argv: Sequence[str] | None = None) -> int:
  """Reads the command line and does what it says; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("sweep", help="configs/sweep_X.py or configs/sweep_X.py:arg")
  parser.add_argument("--workdir", required=True, help="gets a folder for each run")
  parser.add_argument("--on", default="local", help="local or a launcher")
  parser.add_argument("--only", default="", help="names of runs, with commas")
  parser.add_argument("--part", default="all", help=", ".join(PARTS))
  parser.add_argument("--dry-run", action="store_true", help="print the commands")
  flags, rest = parser.parse_known_args(argv)
  try:
    if flags.on not in ("local", *LAUNCHERS):
      raise unknown_name("--on", flags.on, ("local", *LAUNCHERS))
    if flags.part not in PARTS:
      raise unknown_name("--part", flags.part, PARTS)
    sweep = read_sweep(flags.sweep)
    commands = expand(
      sweep,
      flags.workdir,
      on=flags.on,
      part=flags.part,
      only=[name for name in flags.only.split(",") if name],
      rest=rest,
    )
  except UserError as e:
    print(f"\nsweep.py: {e}", file=sys.stderr)
    return door.EXIT_USER_ERROR
  if flags.dry_run:
    print("\n".join(map(str, commands)))
    return door.EXIT_DONE
  code = door.EXIT_DONE
  if flags.on == "local":
    code = run_here(commands, pathlib.Path(flags.workdir))
    if code != door.EXIT_STOPPED_EARLY and flags.part in ("all", "table"):
      compare(sweep, pathlib.Path(flags.workdir))
    return code
  for command in commands:
    print(f"== {command.run}: {command}", flush=True)
    code = subprocess.run(command.words, cwd=ROOT).returncode
    if code:
      return code
  if flags.part == "table":
    compare(sweep, pathlib.Path(flags.workdir))
  return code


if __name__ == "__main__":
  sys.exit(main())
