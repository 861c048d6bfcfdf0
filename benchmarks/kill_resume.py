"""Kills training at random moments and compares what is left with a run nobody killed.

  JAX_PLATFORMS=cpu python benchmarks/kill_resume.py --points 100 --processes 1

A chain is one run of `--steps` updates on the tests' tiny world, killed with SIGKILL
again and again (`--chain` times) and resumed by the same command, until it is let to the
end. Then weights, optimizer, EMA, data position, guard and every logged loss must be
equal, to the bit, to those of a run without a kill. A kill comes

  start  at any moment before the first step of a session: imports, restore, compiling
  step   some time after one of the next steps is logged
  save   some time after a save has begun to write

The moments are drawn from `--seed`; the machine's scheduling decides the rest. Sessions
are forked from a process that has imported everything and computed nothing. Of two
processes one is killed first, and the other up to a third of a second later.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "lpo_jax_cache")
)
# Of two processes jax keeps only what the first compiled: the other compiles in every
# session, and what it compiles need not be fast.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

KINDS = {"start": 0.2, "step": 0.4, "save": 0.4}
SESSION_TIMEOUT_S = 300
ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Point:
  """One kill.

  Attributes:
    kind: a key of `KINDS`.
    chain: which run it happened to.
    from_step: the checkpoint that the session had begun with.
    logged: the last step logged when it was killed.
    saved: the newest complete checkpoint afterwards.
    in_save: whether a half-written checkpoint was left behind.
  """

  kind: str
  chain: int
  from_step: int
  logged: int
  saved: int
  in_save: bool


class Sessions:
  """Starts, watches and kills the processes of one run after the other."""

  def __init__(self, arguments: list[str], processes: int):
    self._arguments, self._count = arguments, processes

  def start(self, workdir: pathlib.Path) -> list[int]:
    """Forks one child per process; returns their ids."""
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    workdir.mkdir(parents=True, exist_ok=True)
    return [self._fork(workdir, index, port) for index in range(self._count)]

  def _fork(self, workdir: pathlib.Path, index: int, port: int) -> int:
    child = os.fork()
    if child:
      return child
    if self._count > 1:
      os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
      os.environ["JAX_NUM_PROCESSES"] = str(self._count)
      os.environ["JAX_PROCESS_ID"] = str(index)
    log = os.open(
      workdir.parent / f"{workdir.name}-{index}.log",
      os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    from lpo_jax import main

    code = 1
    try:
      code = main.main([*self._arguments, f"--workdir={workdir}"])
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)

  def finish(self, children: list[int], workdir: pathlib.Path) -> None:
    """Waits for all of them to end well."""
    for child in children:
      code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      if code:
        log = workdir.parent / f"{workdir.name}-0.log"
        raise SystemExit(f"a session ended with {code}:\n{log.read_text()[-3000:]}")


def logged_steps(workdir: pathlib.Path) -> int:
  """The last step in metrics.jsonl."""
  try:
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
  except FileNotFoundError:
    return 0
  for line in reversed(lines):
    try:
      return json.loads(line)["step"]
    except ValueError:
      continue
  return 0


def checkpoints_in(workdir: pathlib.Path) -> tuple[list[int], list[str]]:
  """The steps of the complete checkpoints, and what is half-written."""
  try:
    names = os.listdir(workdir / "checkpoints")
  except FileNotFoundError:
    return [], []
  whole = sorted(int(name) for name in names if name.isdigit())
  return whole, [name for name in names if "tmp" in name]


def any_ended(children: list[int]) -> bool:
  """Whether a child is gone; it stays to be waited for."""
  flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
  return any(os.waitid(os.P_PID, child, flags) for child in children)


def wait_for_moment(
  kind: str,
  children: list[int],
  workdir: pathlib.Path,
  rng: random.Random,
  first_step_s: float,
) -> bool:
  """Sleeps until a session is to be killed; False if it ended before."""
  began, deadline = time.monotonic(), time.monotonic() + SESSION_TIMEOUT_S
  start, goal = max(checkpoints_in(workdir)[0], default=0), rng.randint(1, 5)
  rewound = False  # the session drops what was logged after its checkpoint
  at = rng.uniform(0, first_step_s)
  seen: set[str] = set()
  saves = rng.randint(1, 3)
  while time.monotonic() < deadline:
    if any_ended(children):
      return False
    if kind == "start" and time.monotonic() - began > at:
      return True
    logged = logged_steps(workdir)
    rewound = rewound or logged <= start
    if kind == "step" and rewound and logged >= start + goal:
      time.sleep(rng.uniform(0, 0.15))
      return True
    if kind == "save":
      seen |= {name.split(".")[0] for name in checkpoints_in(workdir)[1]}
      if len(seen) >= saves:
        time.sleep(rng.uniform(0, 0.12))
        return True
    time.sleep(0.002)
  raise SystemExit(f"no moment came in {SESSION_TIMEOUT_S} s: {workdir}")


def kill(children: list[int], rng: random.Random) -> None:
  """SIGKILL to all, one after the other."""
  rng.shuffle(children)
  for number, child in enumerate(children):
    if number:
      time.sleep(rng.uniform(0, 0.35))
    os.kill(child, signal.SIGKILL)
  for child in children:
    os.waitpid(child, 0)


def outcome_of(arguments: list[str], workdir: pathlib.Path) -> str:
  """Hashes all that a run ended with, in a process of its own."""
  read, write = os.pipe()
  child = os.fork()
  if not child:
    code = 1
    try:
      os.write(write, _outcome(arguments, workdir).encode())
      code = 0
    finally:
      os._exit(code)
  os.close(write)
  with os.fdopen(read) as pipe:
    text = pipe.read()
  os.waitpid(child, 0)
  if not text:
    raise SystemExit(f"{workdir} cannot be read")
  return text


def _outcome(arguments: list[str], workdir: pathlib.Path) -> str:
  import jax
  import numpy as np

  from lpo_jax import main, parallel, trees
  from lpo_jax.jobs import blueprint
  from lpo_jax.training import checkpoint, report

  plain = [a for a in arguments if ".mesh." not in a]
  config, *_ = main.parse([*plain, f"--workdir={workdir}"])
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", reading=True)
  like = blueprint.make_blueprint(config, parallel.make_mesh()).like
  state, meta = checkpoints.restore(like)
  del meta["config"]
  digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
  for name, x in sorted(trees.named_leaves(jax.device_get(state)).items()):
    digest.update(name.encode() + np.asarray(x).tobytes())
  timings = ("time", "images_per_second", "data_wait_share")
  for row in report.read_metrics(workdir / "metrics.jsonl"):
    row = {k: v for k, v in row.items() if k not in timings}
    digest.update(json.dumps(row, sort_keys=True).encode())
  return digest.hexdigest()


def main() -> None:
  """Runs chains until there are enough kills; exits with 1 if one left a difference."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--points", type=int, default=100)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--every", type=int, default=3, help="updates a checkpoint")
  parser.add_argument("--chain", type=int, default=10, help="kills of one run")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--minutes", type=float, default=0, help="stop after; 0: never")
  options = parser.parse_args()
  os.chdir(ROOT)
  sys.path.insert(0, str(ROOT))
  folder = pathlib.Path(tempfile.mkdtemp(prefix="kill_resume-"))
  try:
    if not run_chains(options, folder):
      sys.exit(1)
    shutil.rmtree(folder)
  except BaseException:
    print(f"what was left is in {folder}", flush=True)
    raise


def run_chains(options: argparse.Namespace, folder: pathlib.Path) -> bool:
  """Runs all of it; returns whether every run ended as the one without a kill."""
  # What a session imports, so that a fork need not. Nothing of it starts a backend.
  import grain  # noqa: F401
  import tensorboardX  # noqa: F401
  from orbax.checkpoint import v1  # noqa: F401

  import lpo_jax.jobs.train  # noqa: F401

  rng, began = random.Random(options.seed), time.monotonic()
  world = fork_world(folder)
  settings = [f"train.total_steps={options.steps}"]
  settings += [f"train.checkpoint_every={options.every}", "train.hang_minutes=0"]
  if options.processes > 1:
    settings += ["mesh.data=1", f"mesh.fsdp={options.processes}"]
  arguments = [a for a in world if not a.startswith("--workdir")]
  arguments += [f"--config.{setting}" for setting in settings]
  sessions = Sessions(arguments, options.processes)

  straight = folder / "straight"
  first_step_s = 0.0
  for again in (False, True):  # the second time with all that is compiled kept
    shutil.rmtree(straight, ignore_errors=True)
    clock = time.monotonic()
    children = sessions.start(straight)
    while again and not logged_steps(straight) and not any_ended(children):
      time.sleep(0.01)
    first_step_s = time.monotonic() - clock
    sessions.finish(children, straight)
  expected = outcome_of(arguments, straight)
  print(f"a session takes {first_step_s:.1f} s to its first step", flush=True)

  points: list[Point] = []
  chains = equal = 0
  while len(points) < options.points:
    if options.minutes and time.monotonic() - began > 60 * options.minutes:
      break
    workdir = folder / f"chain{chains}"
    wanted = min(options.chain, options.points - len(points))
    ended = False
    for _ in range(wanted):
      from_step = max(checkpoints_in(workdir)[0], default=0)
      (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
      children = sessions.start(workdir)
      if not wait_for_moment(kind, children, workdir, rng, first_step_s):
        sessions.finish(children, workdir)
        ended = True
        break
      kill(children, rng)
      whole, half = checkpoints_in(workdir)
      saved, logged = max(whole, default=0), logged_steps(workdir)
      points.append(Point(kind, chains, from_step, logged, saved, bool(half)))
    if not ended:
      sessions.finish(sessions.start(workdir), workdir)
    same = outcome_of(arguments, workdir) == expected
    chains, equal = chains + 1, equal + same
    print(
      f"run {chains}: {sum(p.chain == chains - 1 for p in points)} kills, "
      f"{'equal' if same else 'NOT EQUAL'}; {len(points)} kills after "
      f"{(time.monotonic() - began) / 60:.1f} min",
      flush=True,
    )
    if same:
      shutil.rmtree(workdir)
  print_table(points, chains, equal, options.processes)
  return equal == chains


def fork_world(folder: pathlib.Path) -> list[str]:
  """Makes the tests' tiny world and its cache in a child; returns the command line."""
  read, write = os.pipe()
  child = os.fork()
  if not child:
    code = 1
    try:
      tests = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
      world = tests["make_world"](folder)
      outcome = world.run(folder / "cache_run", job="cache")
      assert outcome.code == 0, outcome.text
      os.write(write, json.dumps(world.arguments("-")).encode())
      code = 0
    finally:
      os._exit(code)
  os.close(write)
  with os.fdopen(read) as pipe:
    text = pipe.read()
  os.waitpid(child, 0)
  return json.loads(text)


def print_table(points: list[Point], chains: int, equal: int, processes: int) -> None:
  """Prints what was hit, by kind of moment."""
  print(f"\n{processes} process(es), {len(points)} kills in {chains} runs")
  print("| moment | kills | left a half-written save | lost steps, mean | most |")
  print("|---|--:|--:|--:|--:|")
  by_kind = collections.defaultdict(list)
  for point in points:
    by_kind[point.kind].append(point)
  for kind in [*KINDS, "all"]:
    some = points if kind == "all" else by_kind[kind]
    if some:
      lost = [max(p.logged - p.saved, 0) for p in some]
      print(
        f"| {kind} | {len(some)} | {sum(p.in_save for p in some)} | "
        f"{sum(lost) / len(some):.1f} | {max(lost)} |"
      )
  print(f"\n{equal} of {chains} runs ended equal, to the bit, to the run nobody killed")


if __name__ == "__main__":
  main()
