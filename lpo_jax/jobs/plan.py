"""The plan job: the run's own step compiled for chips that are not here.

Writes plan.json, in which finished topologies are kept, and plan.md, which it prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

import lpo_jax
from lpo_jax import console
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import plan_chips, plan_estimate, plan_models, plan_page, plan_step
from lpo_jax.jobs.plan_chips import Topology

EFFORTS = (*plan_step.EFFORTS, "none")
# What the compiler is given instead of a TPU VM's environment.
TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server that is not there
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside a job that holds this machine's chips
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "3",
}
# Keys that do not reach the compiled step.
UNSEEN = (
  *("path", "cache", "images", "source", "split", "total_steps", "checkpoint_every"),
  *("keep_last", "log_every", "max_minutes", "clip_skip", "vae_tile"),
)
SEEN = (
  *("seed", "model", "data", "objective", "noising", "online", "weighting", "train"),
  "mesh",
)
MAX_TRIES = 8  # compilations of a search for one topology
# A step that by estimate needs so much more than there is, is not compiled to see.
HOPELESS = 1.5

Config = ml_collections.ConfigDict
Measure = Callable[[Config], dict[str, Any]]


def run(config: Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Plans a run for each topology, and prints what was found.

  Args:
    config: the resolved config.
    workdir: gets plan.json and plan.md.

  Returns:
    The plans, as in plan.json.

  Raises:
    UserError: a topology or effort that does not exist, no libtpu, or a config that does
      not go with a topology; the plans of the others are kept.
  """
  workdir = pathlib.Path(workdir)
  topologies = plan_chips.parse_list(config.plan.topology)
  effort = config.plan.effort
  if effort not in EFFORTS:
    raise unknown_name("plan.effort", effort, EFFORTS)
  require_libtpu(topologies)
  file = workdir / "plan.json"
  with tempfile.TemporaryDirectory() as scratch:
    folder, model = plan_models.config_folder(
      config.model.path, pathlib.Path(scratch) / "model"
    )
    console.say(f"model: {model}")
    asker = Asker(
      folder, file, effort, len(topologies) if not config.plan.search else 0
    )
    plans = []
    for topology in topologies:
      measure = asker.about(topology)
      if config.plan.search:
        plans.append(search(config, topology, model, measure))
      else:
        plans.append(judge(config, topology, model, measure(config)))
      plan_page.show(plans[-1])
  (workdir / "plan.md").write_text(plan_page.table(plans), "utf-8")
  console.say(f"wrote {file} and {workdir / 'plan.md'}")
  failed = [plan for plan in plans if "error" in plan["answer"]]
  if failed:
    raise UserError(f"{failed[0]['topology']}: {failed[0]['answer']['error']}")
  return plans


def require_libtpu(topologies: list[Topology]) -> None:
  """Refuses TPU topologies where their compiler is not installed.

  Raises:
    UserError: says how to install it.
  """
  wanted = [t.name for t in topologies if t.chip != plan_chips.CPU]
  if wanted and importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"plan.topology={wanted[0]} needs the TPU's compiler, libtpu, which is not "
      "installed here: pip install 'lpo_jax[tpu]' (from a clone: pip install '.[tpu]'). "
      "No TPU is needed. Without it: --config.plan.topology=cpu:8."
    )


def judge(
  config: Config, topology: Topology, model: str, answer: dict[str, Any]
) -> dict[str, Any]:
  """Makes a plan of what was measured: what fits, how long it takes, what to change."""
  train = config.train
  plan = {
    "topology": topology.name,
    "chips": topology.chips,
    "model": model,
    "trained": "factors" if config.model.lora.rank or config.model.lora.path else "all",
    "images_per_update": train.images_per_update,
    "microbatch": train.microbatch,
    "total_steps": train.total_steps,
    "remat": config.model.remat,
    "optimizer": train.optimizer,
    "resolution": config.data.resolution,
    "answer": answer,
  }
  if "error" in answer:
    return plan
  found = plan_estimate.estimate(
    answer,
    topology.limits,
    chips=topology.chips,
    images=train.images_per_update,
    updates=train.total_steps,
  )
  plan["estimate"] = dataclasses.asdict(found)
  if found.fits is False:
    full = plan_estimate.room(config, topology, answer, found.has)
    edits, needs = plan_estimate.suggest(config, topology, full)
    plan["edits"] = [
      {"flag": edit.flag, "saves": edit.saves, "costs": edit.costs} for edit in edits
    ]
    plan["needs_after_edits"] = needs
  return plan


def search(
  config: Config, topology: Topology, model: str, measure: Measure
) -> dict[str, Any]:
  """Tries other ways to compute the run; the plan of the fastest that fits.

  Args:
    config: the run's; measured first.
    topology: to plan for.
    model: words that say which model it is.
    measure: compiles a config.

  Returns:
    A plan with what was `tried`, or that of the config itself if nothing fits.
  """
  train, fsdp = config.train, config.mesh.fsdp
  own = {
    "model.remat": config.model.remat,
    "train.microbatch": train.microbatch % train.images_per_update,  # all of them: 0
    "mesh.fsdp": fsdp if fsdp > 0 else topology.chips // max(config.mesh.data, 1),
    "mesh.data": -1,
  }
  tried: list[dict[str, Any]] = []
  refused: list[dict[str, Any]] = []
  best: dict[str, Any] | None = None

  def attempt(keys: dict[str, Any]) -> dict[str, Any]:
    changed = overridden(config, keys)
    plan = judge(changed, topology, model, measure(changed))
    fits = plan.get("estimate", {}).get("fits")
    tried.append({"set": keys, "fits": fits, **_verdict(plan)})
    console.say(plan_page.tried_line(tried[-1]))
    if not fits:
      refused.append(keys)
    return {**plan, "set": keys}

  first = attempt(own)
  if "error" in first["answer"]:
    return first
  if first["estimate"]["fits"]:
    best = first
  last = first
  for keys in plan_estimate.untried(config, topology, refused):
    if len(tried) >= MAX_TRIES:
      break
    if best is not None:
      if "train.optimizer_args.mu_dtype" in keys:
        break  # it changes the result, and is not needed
      share = plan_estimate.passes(keys) / plan_estimate.passes(best["set"])
      if best["estimate"]["compute"] * share >= best["estimate"]["seconds"]:
        continue
    if keys == own or hopeless(config, topology, last, keys):
      continue
    last = plan = attempt(keys)
    if "error" in plan["answer"] or not plan["estimate"]["fits"]:
      continue
    if best is None or plan["estimate"]["seconds"] < best["estimate"]["seconds"]:
      best = plan
  return {**(best or first), "tried": tried}


def _verdict(plan: Mapping[str, Any]) -> dict[str, Any]:
  if "error" in plan["answer"]:
    return {"error": plan["answer"]["error"]}
  return {key: plan["estimate"][key] for key in ("needs", "seconds")}


def hopeless(
  config: Config, topology: Topology, last: Mapping[str, Any], keys: Mapping[str, Any]
) -> bool:
  """Whether by the last measurement a candidate is far too large to be worth compiling."""
  if "error" in last["answer"] or topology.limits is None:
    return False
  was = last["set"]
  full = plan_estimate.room(
    overridden(config, was), topology, last["answer"], topology.limits.hbm
  )
  images = config.train.images_per_update
  keeps = plan_estimate.KEEPS
  shares = dict.fromkeys(plan_estimate.SPLIT, was["mesh.fsdp"] / keys["mesh.fsdp"])
  shares["temporaries"] = (
    keeps[keys["model.remat"]] / keeps[was["model.remat"]]
    * (keys["train.microbatch"] or images) / (was["train.microbatch"] or images)
  )  # fmt: skip
  needs = full.after([plan_estimate.Edit("", None, shares, "")]).needs
  return needs > HOPELESS * full.has


def overridden(config: Config, keys: Mapping[str, Any]) -> Config:
  """A copy of the config with other values."""
  copy = Config(json.loads(config.to_json_best_effort()))
  for name, value in keys.items():
    section, _, key = name.rpartition(".")
    target = copy
    for part in section.split("."):
      target = target[part]
    target[key] = value
  return copy


class Asker:
  """Has steps measured by processes of their own; remembers what they answered.

  Args:
    folder: with the model's config.json files.
    file: plan.json.
    effort: of the compiler.
    total: number of compilations to come, 0 if nobody knows.
  """

  def __init__(self, folder: str, file: pathlib.Path, effort: str, total: int):
    self._folder, self._file, self._effort = folder, file, effort
    self._total, self._asked, self._last = total, 0, 0.0
    self._known: dict[str, Any] = {}
    self._needed: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
      self._known = json.loads(file.read_text("utf-8"))

  def about(self, topology: Topology) -> Measure:
    """The measure of configs on a topology."""
    return lambda config: self._ask(config, topology)

  def _ask(self, config: Config, topology: Topology) -> dict[str, Any]:
    request = json.loads(config.to_json_best_effort())
    key = self._key(request, topology)
    self._asked += 1
    if key in self._known:
      console.say(f"{topology.name}: compiled before, taken from {self._file}")
      return self._known[key]
    request["model"]["path"] = self._folder
    work = json.dumps([_work(request), self._folder])
    count = f" ({self._asked} of {self._total})" if self._total > 1 else ""
    label = (
      f"{'compiling' if self._effort != 'none' else 'tracing'} for {topology.name}"
    )
    last = f"; the last one took {console.clock(self._last)}" if self._last else ""
    began = time.monotonic()
    with one_at_a_time(topology), waiting(f"{label}{count}{last}"):
      needed = self._needed.get(work)
      answer = measure_apart(request, topology, self._effort, needed)
    self._last = time.monotonic() - began
    if "error" not in answer:
      self._needed[work] = answer["needed_flops"]
      self._known[key] = answer
      partial = self._file.with_suffix(".partial")
      partial.write_text(json.dumps(self._known, indent=1) + "\n", "utf-8")
      os.replace(partial, self._file)
    return answer

  def _key(self, request: Mapping[str, Any], topology: Topology) -> str:
    """Names a measurement by all that it depends on."""
    seen = {
      section: {k: v for k, v in request[section].items() if k not in UNSEEN}
      if isinstance(request[section], dict)
      else request[section]
      for section in SEEN
    }
    files = sorted(pathlib.Path(self._folder).glob("*/*config.json"))
    texts = [file.read_text("utf-8") for file in files]
    facts = [seen, texts, self._effort, plan_step.versions(), _source()]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{topology.name} {digest[:16]}"


@functools.cache  # what a process began with: its plans are to agree
def _source() -> str:
  """A hash of all code that a step may be made of."""
  digest, root = hashlib.sha256(), pathlib.Path(lpo_jax.__file__).resolve().parent
  for room in ("diffusion", "models", "objectives", "training", "jobs"):
    for file in sorted((root / room).glob("*.py")):
      if room != "jobs" or file.stem in (
        "blueprint",
        "adapters",
        "plan_step",
        "plan_hlo",
      ):
        digest.update(file.read_bytes())
  return digest.hexdigest()


def _work(request: Mapping[str, Any]) -> list[Any]:
  """What decides how much must be computed, however and wherever it is."""
  names = ("model.lora", "data.resolution", "data.strategy", "objective", "noising")
  names += ("online", "train.images_per_update")
  found = []
  for name in names:
    value: Any = request
    for part in name.split("."):
      value = value[part]
    found.append(value)
  return found


def measure_apart(
  request: Mapping[str, Any], topology: Topology, effort: str, needed: int | None
) -> dict[str, Any]:
  """Runs `plan_step` in a process of its own.

  Returns:
    Its answer; {"error": ...} if it has none.
  """
  with tempfile.TemporaryDirectory() as scratch:
    asked, answered = (pathlib.Path(scratch) / n for n in ("request", "answer"))
    facts = {"topology": topology.name, "effort": effort, "needed_flops": needed}
    asked.write_text(json.dumps({"config": request, **facts}), "utf-8")
    command = [
      sys.executable,
      "-m",
      "lpo_jax.jobs.plan_step",
      str(asked),
      str(answered),
    ]
    done = subprocess.run(
      command, env=environment(topology), stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if answered.exists():
      return json.loads(answered.read_text("utf-8"))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = " ".join(" ".join(lines[-3:]).split())[-1000:] or "it said nothing"
    return {
      "error": f"the step could not be compiled (exit {done.returncode}): {reason}"
    }


def environment(topology: Topology) -> dict[str, str]:
  """The environment of a process that compiles for a topology."""
  env = {k: v for k, v in os.environ.items() if k != "JAX_COORDINATOR_ADDRESS"}
  here = str(pathlib.Path(lpo_jax.__file__).resolve().parents[1])
  env["PYTHONPATH"] = os.pathsep.join(filter(None, (here, env.get("PYTHONPATH"))))
  env["JAX_PLATFORMS"] = "cpu"
  if topology.chip != plan_chips.CPU:
    return {**env, **TPU_ENVIRONMENT}
  count = "--xla_force_host_platform_device_count"
  flags = re.sub(rf"{count}=\d+", "", env.get("XLA_FLAGS", ""))
  env["XLA_FLAGS"] = f"{flags} {count}={topology.chips}".strip()
  return env


@contextlib.contextmanager
def one_at_a_time(topology: Topology) -> Iterator[None]:
  """Holds this machine's libtpu; waits for other plans that do."""
  if topology.chip == plan_chips.CPU:
    yield
    return
  place = pathlib.Path(tempfile.gettempdir()) / f"lpo_jax_libtpu_{os.getuid()}.lock"
  with place.open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      console.say(f"waiting for another plan on this machine ({place})")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def waiting(label: str) -> Iterator[None]:
  """Says what is waited for, and afterwards how long it was."""
  console.say(label)
  began = time.monotonic()
  yield
  console.say(f"  {console.clock(time.monotonic() - began)}")
