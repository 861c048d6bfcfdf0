"""Noticing that this is one host of several, on which a run of its own would only wait.

A TPU slice, a SLURM allocation and MPI say in the environment how many they are. jax then
waits for the others, in silence, as soon as it is asked for devices.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence

from lpo_jax import hardware
from lpo_jax.errors import UserError, unknown_name

DISTRIBUTED = "LPO_JAX_DISTRIBUTED"
MODES = ("auto", "off")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
METADATA_TIMEOUT_S = 2.0


@dataclasses.dataclass(frozen=True)
class Pod:
  """Several processes of which this is one.

  Attributes:
    kind: "tpu" | "gke" | "slurm" | "srun" | "mpi": how they are started together.
    count: of processes or hosts.
    sign: what said so.
  """

  kind: str
  count: int
  sign: str


def find_pod(
  environment: Mapping[str, str], endpoints: Callable[[], str] = lambda: ""
) -> Pod | None:
  """Looks for signs that there are more hosts than this one.

  Args:
    environment: variables, as `os.environ`.
    endpoints: asks the TPU VM it runs on for the addresses of its slice, with commas
      between them; empty where nobody answers.

  Returns:
    What is there, or None: a laptop, Colab, Kaggle, a TPU VM of one host.
  """

  def number(name: str) -> int:
    text = environment.get(name, "").strip()
    return int(text) if text.isdigit() else 1

  def product(name: str) -> int:
    sizes = environment.get(name, "").split(",")
    return math.prod(int(s) if s.strip().isdigit() else 1 for s in sizes)

  tpu = "gke" if "KUBERNETES_SERVICE_HOST" in environment else "tpu"
  names = environment.get("TPU_WORKER_HOSTNAMES", "")
  # With srun a task knows the size of its step; before it, only what was asked for.
  step = "SLURM_STEP_NUM_TASKS"
  slurm = ("srun", number(step), step)
  if step not in environment:
    slurm = ("slurm", number("SLURM_NTASKS"), "SLURM_NTASKS")
  signs = [
    (tpu, len([n for n in names.split(",") if n.strip()]), "TPU_WORKER_HOSTNAMES"),
    (tpu, number("MEGASCALE_NUM_SLICES"), "MEGASCALE_NUM_SLICES"),
    (tpu, product("TPU_PROCESS_BOUNDS"), "TPU_PROCESS_BOUNDS"),
    (tpu, product("TPU_HOST_BOUNDS"), "TPU_HOST_BOUNDS"),
    slurm,
    ("mpi", number("OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE"),
    ("mpi", number("PMI_SIZE"), "PMI_SIZE"),
  ]
  for kind, count, sign in signs:
    if count > 1:
      return Pod(kind, count, f"{sign}={environment[sign]}")
  if not names:
    count = len([e for e in endpoints().split(",") if e.strip()])
    if count > 1:
      return Pod(tpu, count, "the TPU VM's metadata")
  return None


def ask_metadata(environment: Mapping[str, str]) -> str:
  """Asks a TPU VM for the addresses of its slice; empty elsewhere, without a wait."""
  found = hardware.find_accelerator(environment)
  skip = environment.get("TPU_SKIP_MDS_QUERY")
  if skip or found is None or found.kind != "TPU" or not found.sign.startswith("/dev/"):
    return ""
  request = urllib.request.Request(
    METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=METADATA_TIMEOUT_S) as answer:
      return answer.read().decode()
  except OSError:  # of which URLError is one: no such server, or it does not know
    return ""


def refuse_one_host(
  environment: Mapping[str, str],
  command: Sequence[str],
  *,
  endpoints: Callable[[], str] | None = None,
) -> None:
  """Refuses to start alone where others have to be started too.

  Args:
    environment: variables, as `os.environ`.
    command: this process's command line, program first.
    endpoints: as for `find_pod`; default the VM's metadata.

  Raises:
    UserError: with the command that starts all of them, or an unknown value of
      LPO_JAX_DISTRIBUTED.
  """
  mode = environment.get(DISTRIBUTED)
  if mode is not None and mode not in MODES:
    raise unknown_name(DISTRIBUTED, mode, MODES)
  if mode is not None or "JAX_COORDINATOR_ADDRESS" in environment:
    return
  pod = find_pod(environment, endpoints or (lambda: ask_metadata(environment)))
  if pod is not None:
    raise UserError(
      f"this is one of {pod.count} processes or hosts ({pod.sign}), and nothing says "
      f"that the others run this too: alone it would wait for them for ever. "
      f"{_how_to_start(pod, environment, command)} To run here alone and on purpose, set "
      f"{DISTRIBUTED}=off."
    )


def _how_to_start(
  pod: Pod, environment: Mapping[str, str], command: Sequence[str]
) -> str:
  """The exact command, where it can be known."""
  ours = shlex.join([sys.executable, *command[1:]])
  if pod.kind == "srun":
    return f"Before the same srun: export {DISTRIBUTED}=auto"
  if pod.kind == "slurm":
    return f"Start all of them: srun env {DISTRIBUTED}=auto {ours}"
  if pod.kind == "mpi":
    return f"Start all of them with mpirun -x {DISTRIBUTED}=auto ... {ours}"
  if pod.kind == "gke":
    return f"Set {DISTRIBUTED}=auto in the env of every pod, as launch/gke.yaml does."
  there = f"cd {shlex.quote(os.getcwd())} && {DISTRIBUTED}=auto {ours}"
  name = environment.get("TPU_NAME") or "NAME"
  return (
    f"Start all of them, from a machine with gcloud: gcloud compute tpus tpu-vm ssh "
    f"{name} --zone=ZONE --worker=all --command={shlex.quote(there)}"
    " (launch/tpu_vm.sh does so)."
  )
