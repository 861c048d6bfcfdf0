"""The doctor job: what this machine has, what the config asks for, and how to mend it."""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from lpo_jax import console, hardware, parallel
from lpo_jax.errors import UserError

OK, WARNING, ERROR = "OK", "warning", "error"
GIB = 2**30
MIN_FREE = 5 * GIB  # where nothing better is known
MIN_MEMORY = 4 * GIB

# What a run is made with, and what jax finds accelerators by.
PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record"),
  *("transformers", "diffusers", "huggingface_hub", "tensorflow-datasets"),
)
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")

ADC_FILE = pathlib.Path(".config", "gcloud", "application_default_credentials.json")
BUCKET_FIX = (
  "gcloud auth application-default login on your own machine; on Google Cloud give the "
  "service account roles/storage.objectUser on the bucket"
)


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the table.

  Attributes:
    name: what was looked at.
    value: what was found; no secrets.
    level: OK, warning or error.
    fix: what to do about it; empty when OK.
  """

  name: str
  value: str
  level: str = OK
  fix: str = ""


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Finding]:
  """Prints the findings as a table and writes workdir/doctor.json.

  Args:
    config: the paths in it are tried.
    workdir: gets doctor.json.

  Returns:
    All findings.

  Raises:
    UserError: at least one of them is an error.
  """
  workdir = pathlib.Path(workdir)
  findings = []
  for check in CHECKS:
    findings += check(config, workdir)
  errors = [finding for finding in findings if finding.level == ERROR]
  if parallel.is_main_process():
    print(table(findings), flush=True)
    rows = [dataclasses.asdict(finding) for finding in findings]
    text = json.dumps({"errors": len(errors), "findings": rows}, indent=2)
    (workdir / "doctor.json").write_text(text + "\n", encoding="utf-8")
  warnings = sum(finding.level == WARNING for finding in findings)
  if errors:
    raise UserError(
      f"the doctor found {len(errors)} error(s) and {warnings} warning(s). First: "
      f"{errors[0].name}: {errors[0].value}. Fix: {errors[0].fix}. The rest is above and "
      f"in {workdir / 'doctor.json'}."
    )
  console.say(f"no error, {warnings} warning(s): {workdir / 'doctor.json'}")
  return findings


def table(findings: list[Finding]) -> str:
  """Lays the findings out for a terminal, each fix below what it mends."""
  wide = max(len(finding.name) for finding in findings)
  lines = []
  for finding in findings:
    lines.append(f"{finding.level:<8} {finding.name:<{wide}}  {finding.value}")
    if finding.fix:
      lines.append(f"{'':<8} {'':<{wide}}  -> {finding.fix}")
  return "\n".join(lines)


def size(count: float) -> str:
  """Formats bytes: 5 * 2**30 -> '5.0 GiB'.

  >>> size(5 * 2**30), size(300)
  ('5.0 GiB', '0.0 GiB')
  """
  return f"{count / GIB:.1f} GiB"


def check_versions(config: Any, workdir: pathlib.Path) -> list[Finding]:
  """Python, this package, and what it needs, against what setup.py asks for."""
  del config, workdir
  from packaging.requirements import Requirement

  python = ".".join(map(str, sys.version_info[:3]))
  fine = (3, 11) <= sys.version_info < (3, 14)
  findings = [
    Finding("python", python)
    if fine
    else Finding(
      "python", python, ERROR, "make an environment with Python 3.11 to 3.13"
    )
  ]
  own, wanted = version("lpo_jax"), {}
  if own is None:
    fix = "pip install it, or in a clone: pip install --editable ."
    findings.append(Finding("lpo_jax", "not installed", WARNING, fix))
  else:
    findings.append(Finding("lpo_jax", own))
    for line in importlib.metadata.requires("lpo_jax") or ():
      requirement = Requirement(line)
      if requirement.marker is None:
        wanted[requirement.name.lower()] = requirement.specifier
  for name in PACKAGES:
    found, specifier = version(name), wanted.get(name.lower())
    if found is None:
      findings.append(Finding(name, "missing", ERROR, f"pip install '{name}'"))
    elif specifier is not None and not specifier.contains(found, prereleases=True):
      fix = f"pip install '{name}{specifier}'"
      findings.append(Finding(name, f"{found}, not {specifier}", ERROR, fix))
    else:
      findings.append(Finding(name, found))
  plugins = {name: found for name in PLUGINS if (found := version(name))}
  said = ", ".join(f"{name} {found}" for name, found in plugins.items())
  findings.append(Finding("accelerator plugins", said or "none"))
  if "libtpu" in plugins and version("tensorflow"):
    fix = "pip uninstall tensorflow (tensorflow-cpu does no harm)"
    findings.append(Finding("tensorflow", "beside libtpu: they fight", WARNING, fix))
  return findings


def version(name: str) -> str | None:
  """The installed version of a distribution, or None."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def check_devices(config: Any, workdir: pathlib.Path) -> list[Finding]:
  """What jax computes on, and whether that is all the machine has."""
  del workdir
  import jax

  accelerator = hardware.find_accelerator(os.environ)
  try:
    devices = jax.devices()
  except RuntimeError as e:
    fix = accelerator.fix if accelerator else "set JAX_PLATFORMS to what is here"
    return [Finding("devices", str(e).splitlines()[0], ERROR, fix)]
  kind, backend = devices[0].device_kind, jax.default_backend()
  value = f"{len(devices)} x {kind} ({backend})"
  try:
    hardware.refuse_silent_cpu(
      "train",
      backend=backend,
      platforms=jax.config.jax_platforms,
      accelerator=accelerator,
    )
    findings = [Finding("devices", value)]
  except UserError:
    value += f", but there is a {accelerator.kind} ({accelerator.sign})"
    fix = f"{accelerator.fix}; or JAX_PLATFORMS=cpu to mean the CPU"
    findings = [Finding("devices", value, ERROR, fix)]
  memory = (
    (devices[0].memory_stats() or {}).get("bytes_limit") if backend != "cpu" else 0
  )
  if memory:
    findings.append(Finding("memory of each device", size(memory)))
  count = f"{jax.process_count()}, this is number {jax.process_index()}"
  findings.append(Finding("processes", count))
  try:
    parallel.mesh_of(config.mesh)
  except UserError as e:
    fix = "set mesh.data=-1 and an mesh.fsdp that divides the devices"
    findings.append(Finding("mesh", str(e), ERROR, fix))
  return findings


def check_host(config: Any, workdir: pathlib.Path) -> list[Finding]:
  """Memory, and room where the run and its cache go."""
  findings = []
  memory = host_memory()
  if memory:
    total, free = memory
    value = f"{size(free)} free of {size(total)}"
    fix = "end what else runs here, or take a larger machine"
    findings.append(_judged("memory of the host", value, free >= MIN_MEMORY, fix))
  needed = checkpoint_bytes(config)
  cache = config.data.cache
  places = {"disk at the workdir": (workdir, max(needed, MIN_FREE))}
  if cache:
    places["disk at data.cache"] = (pathlib.Path(cache), MIN_FREE)
  for name, (place, least) in places.items():
    if is_remote(place):
      continue
    free = shutil.disk_usage(nearest_folder(place)).free
    value = f"{size(free)} free, about {size(least)} wanted"
    fix = "make room, choose another place, or lower train.keep_last"
    findings.append(_judged(name, value, free >= least, fix))
  return findings


def _judged(name: str, value: str, fine: bool, fix: str) -> Finding:
  return Finding(name, value) if fine else Finding(name, value, WARNING, fix)


def host_memory(file: str | os.PathLike = "/proc/meminfo") -> tuple[int, int] | None:
  """Returns (all, available) memory in bytes; None where Linux does not say."""
  try:
    lines = pathlib.Path(file).read_text().splitlines()
  except OSError:
    return None
  values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
  return values["MemTotal"], values.get("MemAvailable", 0)


def checkpoint_bytes(config: Any) -> int:
  """About how much disk a run's checkpoints take; 0 where the model is not here.

  Parameters, two moments and the running mean in fp32, for each checkpoint that is kept
  and the one being written. A file is taken to hold fp32.
  """
  folder = pathlib.Path(config.model.path or ".") / "unet"
  weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
  if config.model.lora.rank:
    return 0
  copies = 3 + (config.train.ema > 0)
  return weights * copies * (config.train.keep_last + 1)


def nearest_folder(path: pathlib.Path) -> pathlib.Path:
  """The deepest folder of a path that exists."""
  path = path.absolute()
  return next(p for p in (path, *path.parents) if p.is_dir())


def check_compilations(config: Any, workdir: pathlib.Path) -> list[Finding]:
  """Where compiled steps are kept, so that the second start is quick."""
  del config, workdir
  import jax

  place = jax.config.jax_compilation_cache_dir
  if not place:
    fix = "set JAX_COMPILATION_CACHE_DIR to a folder"
    return [Finding("compilation cache", "off", WARNING, fix)]
  if is_remote(place):
    return [Finding("compilation cache", str(place))]
  files = [f for f in pathlib.Path(place).rglob("*") if f.is_file()]
  held = sum(f.stat().st_size for f in files)
  value = f"{place}: {len(files)} files, {size(held)}"
  fine = os.access(nearest_folder(pathlib.Path(place)), os.W_OK)
  fix = "set JAX_COMPILATION_CACHE_DIR to a folder that can be written to"
  return [_judged("compilation cache", value, fine, fix)]


def check_credentials(config: Any, workdir: pathlib.Path) -> list[Finding]:
  """Whether there are credentials, never which; missed only where they are needed."""
  del workdir
  import huggingface_hub

  used = [str(value) for value in paths(config).values()]
  token = huggingface_hub.get_token() is not None
  hub = any(path.startswith("hf://") for path in used) or on_hub(config.model.path)
  fix = "if a model is gated or private: hf auth login, or set HF_TOKEN"
  value = "present" if token else "none"
  findings = [_judged("Hugging Face token", value, token or not hub, fix)]
  google = google_credentials(os.environ, pathlib.Path.home())
  bucket = any(path.startswith("gs://") for path in used)
  fine = google is not None or not bucket
  findings.append(_judged("Google credentials", google or "none", fine, BUCKET_FIX))
  return findings


def google_credentials(
  environment: Mapping[str, str], home: pathlib.Path, root: str = "/"
) -> str | None:
  """Where application-default credentials would come from, or None."""
  named = environment.get("GOOGLE_APPLICATION_CREDENTIALS")
  if named:
    return "GOOGLE_APPLICATION_CREDENTIALS" if pathlib.Path(named).is_file() else None
  if (home / ADC_FILE).is_file():
    return "application-default login"
  product = pathlib.Path(root, "sys/class/dmi/id/product_name")
  try:
    on_google = "Google" in product.read_text()
  except OSError:
    on_google = False
  return "service account of this Google Cloud machine" if on_google else None


def on_hub(path: str) -> bool:
  """Whether a model path is an id on the Hugging Face Hub."""
  from lpo_jax.pretrained import hub

  return bool(path) and not pathlib.Path(path).exists() and bool(hub.ID.fullmatch(path))


def paths(config: Any) -> dict[str, str]:
  """The paths of a config by their keys, those of a mixture's sources as well."""
  found = {"data.path": config.data.path, "data.images": config.data.images}
  for name, source in config.data.mixture.items():
    for key in ("path", "images"):
      if source.get(key):
        found[f"data.mixture.{name}.{key}"] = source[key]
  found["model.path"] = config.model.path
  if isinstance(config.eval.prompts, str):
    found["eval.prompts"] = config.eval.prompts
  return found


def check_paths(config: Any, workdir: pathlib.Path) -> list[Finding]:
  """Whether what the config names is there and can be read, and written to."""
  findings = []
  for name, path in paths(config).items():
    if not path:
      findings.append(Finding(name, "not set"))
    elif name == "model.path":
      findings.append(model_finding(path))
    else:
      findings.append(path_finding(name, path))
  writable = os.access(nearest_folder(workdir), os.W_OK)
  fix = "choose another --workdir, or change its permissions"
  value = f"{workdir}: {'can be written to' if writable else 'is read-only'}"
  findings.append(
    Finding("workdir", value) if writable else Finding("workdir", value, ERROR, fix)
  )
  return findings


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is not a place in the file system."""
  return "://" in os.fspath(path)


def path_finding(name: str, path: str) -> Finding:
  """Looks at a file, folder or pattern, here or in a bucket or on the Hub."""
  missing = Finding(name, f"{path}: not there", ERROR, f"correct --config.{name}")
  if not is_remote(path):
    if not glob.glob(path):
      return missing
    if not os.access(glob.glob(path)[0], os.R_OK):
      return Finding(name, f"{path}: cannot be read", ERROR, "change its permissions")
    return Finding(name, f"{path}: there")
  import fsspec

  scheme = path.partition("://")[0]
  try:
    system, inner = fsspec.core.url_to_fs(path)
    there = bool(system.glob(inner)) if "*" in path else system.exists(inner)
  except ImportError as e:
    package = {"gs": "gcsfs", "s3": "s3fs"}.get(scheme, scheme)
    return Finding(name, f"{path}: {e}", ERROR, f"pip install {package}")
  except Exception as e:  # whatever a cloud's client has to say
    fix = BUCKET_FIX if scheme == "gs" else f"see that {scheme}:// can be reached"
    said = (str(e).strip().splitlines() or [""])[0]
    return Finding(name, f"{path}: {type(e).__name__}: {said}", ERROR, fix)
  return Finding(name, f"{path}: there") if there else missing


def model_finding(path: str) -> Finding:
  """Looks for a pipeline: a folder here, or an id on the Hub."""
  from lpo_jax import pretrained
  from lpo_jax.pretrained import hub

  if on_hub(path):
    id_, revision = hub.ID.fullmatch(path).groups()
    if hub.find_cached(id_, revision or "main"):
      return Finding("model.path", f"{path}: on the Hub, and in the cache here")
    value = f"{path}: on the Hub, fetched when it is needed"
    if os.environ.get("HF_HUB_OFFLINE", "") in ("", "0"):
      return Finding("model.path", value)
    fix = "unset HF_HUB_OFFLINE, or copy the model here and give its folder"
    return Finding(
      "model.path", f"{path}: not here, and HF_HUB_OFFLINE is set", ERROR, fix
    )
  try:
    pretrained.read_config(path, "unet")
  except UserError as e:
    return Finding("model.path", str(e), ERROR, "correct --config.model.path")
  return Finding("model.path", f"{path}: a pipeline")


Check = Callable[[Any, pathlib.Path], list[Finding]]
CHECKS: tuple[Check, ...] = (
  check_versions,
  check_devices,
  check_host,
  check_compilations,
  check_credentials,
  check_paths,
)
