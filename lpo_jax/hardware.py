"""What accelerator a machine has, by its own signs, whether jax found it or not."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping

from lpo_jax.errors import UserError

# Set on Cloud TPU VMs and by GKE, from within a container too.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
GOOGLE_PCI = "0x1ae0"
GOOGLE_NETWORK_CARD = "0x0042"  # gVNIC: on any Google Cloud machine
# Jobs that compute little, or ask the compiler only.
JOBS_FOR_ANY_MACHINE = ("doctor", "inspect", "plan")

FIXES = {
  "TPU": "pip install 'lpo_jax[tpu]' (from a clone: pip install '.[tpu]'), and see that "
  "no other process holds the chips",
  "NVIDIA GPU": "pip install 'lpo_jax[cuda]' (from a clone: pip install '.[cuda]'), and "
  "see that nvidia-smi works here",
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One that the machine shows signs of.

  Attributes:
    kind: a key of `FIXES`.
    sign: what gave it away, a device file or an environment variable.
  """

  kind: str
  sign: str

  @property
  def fix(self) -> str:
    """What makes jax find it."""
    return FIXES[self.kind]


def find_accelerator(
  environment: Mapping[str, str], root: str | os.PathLike = "/"
) -> Accelerator | None:
  """Looks for a TPU, then for an NVIDIA GPU, without asking jax.

  Args:
    environment: variables, as `os.environ`. GPUs that CUDA_VISIBLE_DEVICES hides do not
      count.
    root: the folder that holds dev/ and sys/.

  Returns:
    What is there, or None.
  """
  root = pathlib.Path(root)
  devices = _names(root / "dev")
  for name in sorted(devices):
    if re.fullmatch(r"accel\d+", name):  # TPU v2 to v4; others have a folder accel/
      return Accelerator("TPU", f"/dev/{name}")
  groups = [name for name in sorted(_names(root / "dev" / "vfio")) if name.isdigit()]
  if groups and _has_google_chip(root / "sys" / "bus" / "pci" / "devices"):
    return Accelerator("TPU", f"/dev/vfio/{groups[0]}")  # from v5e on
  for name in TPU_VARIABLES:
    if environment.get(name):
      return Accelerator("TPU", f"the variable {name}")
  hidden = environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "none")
  hidden |= environment.get("NVIDIA_VISIBLE_DEVICES", "all") in ("none", "void")
  for name in sorted(devices):
    if re.fullmatch(r"nvidia\d+", name) and not hidden:
      return Accelerator("NVIDIA GPU", f"/dev/{name}")
  return None


def _names(folder: pathlib.Path) -> list[str]:
  try:
    return [path.name for path in folder.iterdir()]
  except OSError:
    return []


def _has_google_chip(folder: pathlib.Path) -> bool:
  """Whether a PCI device is Google's and no network card."""
  for name in _names(folder):
    try:
      vendor = (folder / name / "vendor").read_text().strip()
      device = (folder / name / "device").read_text().strip()
    except OSError:
      continue
    if vendor == GOOGLE_PCI and device != GOOGLE_NETWORK_CARD:
      return True
  return False


def cpu_is_meant(platforms: str | None) -> bool:
  """Whether JAX_PLATFORMS, or jax's option of that name, asks for the CPU first.

  >>> cpu_is_meant("cpu"), cpu_is_meant("tpu,cpu"), cpu_is_meant(None)
  (True, False, False)
  """
  return (platforms or "").split(",")[0].strip() == "cpu"


def refuse_silent_cpu(
  job: str,
  *,
  backend: str,
  platforms: str | None,
  accelerator: Accelerator | None,
) -> None:
  """Refuses to compute on the CPU of a machine that has something better.

  Args:
    job: what is to run.
    backend: what jax computes on, "cpu", "tpu" or "gpu".
    platforms: what JAX_PLATFORMS says.
    accelerator: from `find_accelerator`.

  Raises:
    UserError: jax fell back to the CPU and nobody asked for it.
  """
  if backend != "cpu" or accelerator is None or job in JOBS_FOR_ANY_MACHINE:
    return
  if cpu_is_meant(platforms):
    return
  raise UserError(
    f"this machine has a {accelerator.kind} ({accelerator.sign}), but jax computes on "
    f"the CPU. To use it: {accelerator.fix}. To mean the CPU: JAX_PLATFORMS=cpu. "
    "--job doctor shows more."
  )
