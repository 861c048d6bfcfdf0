"""One host of several is told how to start them all; whoever is alone is left alone."""

import pytest

from lpo_jax import pods
from lpo_jax.errors import UserError
from lpo_jax.pods import Pod, find_pod

COMMAND = ["python", "-m", "lpo_jax.main", "--config", "a b.py"]


@pytest.mark.parametrize(
  "environment",
  [
    {},
    {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},  # Colab, GKE of one
    {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,4,1"},  # Kaggle
    {"TPU_HOST_BOUNDS": "1,1,1", "MEGASCALE_NUM_SLICES": "1"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},
    {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n1 in a large job
    {"OMPI_COMM_WORLD_SIZE": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
  ],
)
def test_one_alone(environment):
  assert find_pod(environment, lambda: "0:a:10.0.0.2") is None
  pods.refuse_one_host(environment, COMMAND, endpoints=lambda: "")


@pytest.mark.parametrize(
  ("environment", "pod"),
  [
    (
      {"TPU_WORKER_HOSTNAMES": "a,b, c"},
      Pod("tpu", 3, "TPU_WORKER_HOSTNAMES=a,b, c"),
    ),
    (
      {"TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
      Pod("gke", 2, "TPU_WORKER_HOSTNAMES=a,b"),
    ),
    (
      {"MEGASCALE_NUM_SLICES": "4", "TPU_WORKER_HOSTNAMES": "a"},
      Pod("tpu", 4, "MEGASCALE_NUM_SLICES=4"),
    ),
    ({"TPU_PROCESS_BOUNDS": "2,2,1"}, Pod("tpu", 4, "TPU_PROCESS_BOUNDS=2,2,1")),
    ({"TPU_HOST_BOUNDS": "1,1,2"}, Pod("tpu", 2, "TPU_HOST_BOUNDS=1,1,2")),
    ({"SLURM_NTASKS": "2"}, Pod("slurm", 2, "SLURM_NTASKS=2")),
    (
      {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "16"},
      Pod("srun", 16, "SLURM_STEP_NUM_TASKS=16"),
    ),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, Pod("mpi", 2, "OMPI_COMM_WORLD_SIZE=2")),
  ],
)
def test_one_of_several(environment, pod):
  assert find_pod(environment) == pod
  with pytest.raises(
    UserError, match=rf"this is one of {pod.count} .*{pods.DISTRIBUTED}"
  ):
    pods.refuse_one_host(environment, COMMAND)
  for said in ({pods.DISTRIBUTED: "auto"}, {pods.DISTRIBUTED: "off"}):
    pods.refuse_one_host({**environment, **said}, COMMAND)
  by_hand = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234"}
  pods.refuse_one_host({**environment, **by_hand}, COMMAND)


def test_a_tpu_vm_says_so_by_its_metadata():
  with pytest.raises(UserError) as refusal:
    pods.refuse_one_host(
      {"TPU_NAME": "mine"}, COMMAND, endpoints=lambda: "0:a:10.0.0.2,1:b:10.0.0.3"
    )
  text = str(refusal.value)
  assert "one of 2 processes or hosts (the TPU VM's metadata)" in text
  assert (
    "gcloud compute tpus tpu-vm ssh mine --zone=ZONE --worker=all --command='cd "
    in (text)
  )
  # Quoted once for the shell here and once for the shell there.
  assert "LPO_JAX_DISTRIBUTED=auto" in text
  assert "-m lpo_jax.main --config '\"'\"'a b.py'\"'\"''" in text


def test_slurm_gets_its_own_command():
  with pytest.raises(
    UserError, match=r"srun env LPO_JAX_DISTRIBUTED=auto .*-m lpo_jax"
  ):
    pods.refuse_one_host({"SLURM_NTASKS": "4"}, COMMAND)
  with pytest.raises(UserError, match=r"unknown LPO_JAX_DISTRIBUTED 'yes'"):
    pods.refuse_one_host({"LPO_JAX_DISTRIBUTED": "yes"}, COMMAND)


def test_no_metadata_is_asked_for_where_there_is_no_chip(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("should not have been called")

  monkeypatch.setattr(pods.urllib.request, "urlopen", refuse)
  assert pods.ask_metadata({}) == ""
  assert pods.ask_metadata({"TPU_WORKER_HOSTNAMES": "localhost"}) == ""
