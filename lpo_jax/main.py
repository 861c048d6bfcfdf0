"""The front door: flags -> config -> distributed start -> one job -> exit code.

  python -m lpo_jax.main --config configs/X.py[:arg] --workdir DIR [--job JOB]
      [--config.path.to.key=value ...]

Exit codes: 0 done · 2 bad usage, config or data · 3 stopped early but resumable.
"""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from lpo_jax import console
from lpo_jax.errors import StoppedEarly, UserError, nearest, unknown_name

EXIT_DONE, EXIT_USER_ERROR, EXIT_STOPPED_EARLY = 0, 2, 3
# What a full disk, a quota or a file system that cannot be written to says.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Where a plan is written that belongs to no run yet.
PLANS = "runs/plan"
JOBS = (
  "inspect",
  "select",
  "widen",
  "users",
  "cache",
  "reference",
  "train",
  "evaluate",
  "export",
  "generate",
  "quickstart",
  "ablation",
  "plan",
  "doctor",
)


def load_config(location: str) -> ml_collections.ConfigDict:
  """Runs `get_config` of a config file.

  Args:
    location: `path.py` or `path.py:arg`; a path that does not exist is also looked for
      among the configs that come with the package. Or the config.json of a run.

  Raises:
    UserError: no such file, or a file that is not a config.
  """
  path, _, argument = location.partition(":")
  file = pathlib.Path(path)
  shipped = pathlib.Path(__file__).parent / "configs"
  if not file.is_file() and (shipped / file.name).is_file():
    file = shipped / file.name
  if not file.is_file():
    known = sorted(p.name for p in shipped.glob("*.py") if p.name[0] != "_")
    match = nearest(file.name, known)
    raise UserError(
      f"no config file {path!r}"
      + (f"; did you mean configs/{match}?" if match else ".")
      + f" Shipped configs: {', '.join(known)}."
    )
  if file.name == "config.json":
    return _load_recorded(file)
  spec = importlib.util.spec_from_file_location("lpo_jax_run_config", file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    get_config = module.get_config
    config = get_config(argument) if argument else get_config()
  except UserError:
    raise
  except Exception as e:
    raise UserError(
      f"config {file} cannot be used: {type(e).__name__}: {e}. Expected a Python file "
      "with get_config(arg='') that fills common.get_config()."
    ) from e
  check_keys(config)
  return config


def _load_recorded(file: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the config that a run has left in its workdir."""
  from lpo_jax.jobs import run_identity

  config = _unwritten(run_identity.recorded(file.parent).to_dict())
  config = ml_collections.ConfigDict(config)
  check_keys(config)
  return config.lock()


def _unwritten(value: Any) -> Any:
  """Turns JSON's lists into the tuples that they were, and null into what may be set."""
  if isinstance(value, dict):
    return {key: _unwritten(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return tuple(map(_unwritten, value))
  return ml_collections.config_dict.placeholder(object) if value is None else value


def check_keys(config: ml_collections.ConfigDict) -> None:
  """Refuses keys that no job reads.

  Raises:
    UserError: names the first unknown key and the nearest known one.
  """
  from lpo_jax.configs import common

  def compare(given: Mapping, known: Mapping, prefix: str) -> None:
    for key in given:
      name = f"{prefix}{key}"
      if key not in known:
        raise unknown_name("config key", name, [f"{prefix}{k}" for k in known])
      section = name in common.OPEN_SECTIONS
      if isinstance(known[key], ml_collections.ConfigDict) and not section:
        compare(given[key], known[key], name + ".")
    missing = [f"{prefix}{key}" for key in known if key not in given]
    if missing:
      raise UserError(
        f"config key {missing[0]} is missing; start from common.get_config(), which "
        "has every key."
      )

  compare(config, common.get_config(), "")


def override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
  """Sets one key from the command line, by the type of what it replaces.

  Args:
    config: changed in place.
    name: "train.total_steps".
    text: the value as typed; numbers, tuples, True and None as in Python, all else text.

  Raises:
    UserError: no such key, or a value of another type.
  """
  from lpo_jax.configs import common

  *parents, key = name.split(".")
  section, prefix = config, ""
  for part in [*parents, key]:
    path = prefix + part
    if not isinstance(section, ml_collections.ConfigDict):
      raise UserError(f"config key {prefix[:-1]} is a value, it has no key {part!r}.")
    new_option = part == key and prefix[:-1] in common.OPEN_SECTIONS
    if part not in section and not new_option:
      raise unknown_name("config key", path, [prefix + k for k in section])
    if part != key or path != name:
      section, prefix = section[part], path + "."
  value = _typed(name, text, section.get_ref(key).get() if key in section else None)
  with section.unlocked():
    section[key] = value


def _typed(name: str, text: str, old: Any) -> Any:
  """Reads `text` as the type of `old`."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = {"true": True, "false": False}.get(text.lower(), text)
  if isinstance(old, str):
    return value if value is None or isinstance(value, tuple | list) else text
  if isinstance(old, bool) and value in (0, 1):
    return bool(value)
  if isinstance(old, float) and isinstance(value, int) and value is not True:
    return float(value)
  if isinstance(old, tuple) and not isinstance(value, tuple):
    return tuple(value) if isinstance(value, list) else (value,)
  if isinstance(old, ml_collections.ConfigDict):
    raise UserError(
      f"config key {name} is a section; set one of its keys: {list(old)}."
    )
  if old is not None and value is not None and not isinstance(value, type(old)):
    raise UserError(
      f"--config.{name}={text}: expected {type(old).__name__} (now {old!r}), came "
      f"{type(value).__name__}."
    )
  return value


def parse(
  argv: Sequence[str],
) -> tuple[ml_collections.ConfigDict, pathlib.Path, str]:
  """Reads the command line.

  Returns:
    The resolved config, the workdir and the job's name.

  Raises:
    UserError: anything on it that cannot be used.
  """
  parser = argparse.ArgumentParser(
    prog="python -m lpo_jax.main",
    description="Preference optimisation for diffusion models on ranked lists.",
    epilog="--config.path.to.key=value changes one key of the config. Exit codes: 0 "
    "done, 2 bad usage, config or data, 3 stopped early but resumable.",
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config", required=True, help="configs/X.py or configs/X.py:arg"
  )
  parser.add_argument(
    "--workdir", help=f"where the run lives; the job plan may go without: {PLANS}"
  )
  parser.add_argument("--job", help=f"one of {', '.join(JOBS)}; default config.job")
  flags, rest = parser.parse_known_args(list(argv))
  config = load_config(flags.config)
  overrides = iter(rest)
  for argument in overrides:
    if not argument.startswith("--config."):
      flag = argument.partition("=")[0]
      raise unknown_name("flag", flag, ["--config", "--workdir", "--job"])
    name, equals, text = argument.removeprefix("--config.").partition("=")
    if not equals:
      text = next(overrides, None)
      if text is None:
        raise UserError(f"{argument} has no value; write {argument}=VALUE.")
    override(config, name, text)
  job = flags.job or config.job
  if job not in JOBS:
    raise unknown_name("job", job, JOBS)
  if flags.workdir is None and job != "plan":
    parser.error("the following arguments are required: --workdir")
  return config, pathlib.Path(flags.workdir or PLANS), job


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON-able dictionaries, lists and scalars."""
  return json.loads(config.to_json_best_effort())


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one job; returns the exit code."""
  logging.basicConfig(
    level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
  )
  # Orbax warns of small checkpoints that need no merging, at every save.
  logging.getLogger("absl").setLevel(logging.ERROR)
  workdir = None
  try:
    config, workdir, job = parse(sys.argv[1:] if argv is None else argv)
    run = importlib.import_module(f"lpo_jax.jobs.{job}").run
    _prepare(workdir, job)
    from lpo_jax.jobs import closing, stops

    with stops.sigterm_interrupts(job), closing.words(job, workdir):
      run(config, workdir)
  except UserError as e:
    print(console.printable(f"\nlpo_jax: {e}"), file=sys.stderr)
    return EXIT_USER_ERROR
  except StoppedEarly as e:
    print(console.printable(f"\nlpo_jax: {e}"), file=sys.stderr)
    return EXIT_STOPPED_EARLY
  except KeyboardInterrupt as e:  # Ctrl-C, or SIGTERM: see `stops`
    message = (
      f"received {str(e) or 'SIGINT'}: stopped, with nothing half-written. What was "
      f"finished before is kept in {workdir}; the same command goes on from there."
    )
    print(console.printable(f"\nlpo_jax: {message}"), file=sys.stderr)
    return EXIT_STOPPED_EARLY
  except OSError as e:
    if e.errno not in NO_ROOM:
      raise
    message = (
      f"cannot write {e.filename or f'to {workdir}'}: {e.strerror}. Expected a place "
      "that can be written to, with room left. What was finished before is whole: make "
      "room and give the same command again."
    )
    print(console.printable(f"\nlpo_jax: {message}"), file=sys.stderr)
    return EXIT_USER_ERROR
  return EXIT_DONE


def _prepare(workdir: pathlib.Path, job: str) -> None:
  """Joins the other processes, makes the workdir, remembers compilations.

  Raises:
    UserError: the workdir cannot be made, or jax fell back to the CPU.
  """
  if job == "plan":  # compiles elsewhere; looking for chips here is slow and loud
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from lpo_jax import hardware, parallel, pods

  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  # transformers regrets at every start that there is no torch; tokenizers need none.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  if ":/" in str(workdir):  # what pathlib leaves of a URL
    raise UserError(
      f"--workdir {workdir} is no folder but a URL; expected a path. Mount the bucket "
      "(gcsfuse BUCKET /mnt/BUCKET, which launch/tpu_vm.sh --bucket does on every "
      "worker) and give a folder in it."
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f"cannot make --workdir {workdir}: {e}. Expected a place that can be written to."
    ) from e
  if job not in hardware.JOBS_FOR_ANY_MACHINE:
    pods.refuse_one_host(os.environ, sys.orig_argv)
  parallel.initialize_distributed()
  import jax

  accelerator = hardware.find_accelerator(os.environ)
  if accelerator:
    hardware.refuse_silent_cpu(
      job,
      backend=jax.default_backend(),
      platforms=jax.config.jax_platforms,
      accelerator=accelerator,
    )
  if not jax.config.jax_compilation_cache_dir:
    cache = pathlib.Path.home() / ".cache" / "lpo_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
  sys.exit(main())
