"""The same training on one device, on eight, and on two processes: the same losses."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from lpo_jax import pretrained
from lpo_jax.training.report import read_metrics

STEPS = 5
TIMEOUT_S = 240

# Runs jobs one after the other; argv[1] is a JSON list of [expected exit code, command].
JOBS = """
import json, sys
from lpo_jax import main
for expected, command in json.loads(sys.argv[1]):
  code = main.main(command)
  assert code == expected, f"exit {code}, expected {expected}: {command}"
"""


def run_jobs(world, jobs, *, devices=1, processes=1):
  """Runs [expected exit code, command] pairs; returns what each process printed."""
  together = {}
  if processes > 1:
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    together["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    together["JAX_NUM_PROCESSES"] = str(processes)
  started = [
    subprocess.Popen(
      [sys.executable, "-c", JOBS, json.dumps(jobs)],
      cwd=world.folder,
      env=world.environment(devices, **together, JAX_PROCESS_ID=str(index)),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(processes)
  ]
  try:
    texts = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
  finally:
    for process in started:
      process.kill()
  for process, text in zip(started, texts, strict=True):
    assert process.returncode == 0, text
  return texts


def exported(workdir):
  """The tensors of a run's export."""
  return load_file(workdir / "export" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def one_device(tiny_cache, tmp_path_factory):
  """Trained and exported in this process."""
  workdir = tmp_path_factory.mktemp("one_device")
  for job in ("train", "export"):
    outcome = tiny_cache.run(workdir, job=job)
    assert outcome.code == 0, outcome.text
  return workdir


@pytest.fixture(scope="module")
def accumulated(tiny_cache, tmp_path_factory):
  """One device, two microbatches an update."""
  workdir = tmp_path_factory.mktemp("accumulated")
  for job in ("train", "export"):
    outcome = tiny_cache.run(workdir, "train.microbatch=8", job=job)
    assert outcome.code == 0, outcome.text
  return workdir


@pytest.fixture(scope="module")
def eight_devices(tiny_cache, tmp_path_factory):
  """Parameters split over 2 devices, 4 such pairs, two microbatches; a number of images
  that does not divide is refused first."""
  workdir = tmp_path_factory.mktemp("eight_devices")
  mesh = ("mesh.data=4", "mesh.fsdp=2", "train.microbatch=8")
  refused = (*mesh, "train.images_per_update=12")
  jobs = [
    [2, tiny_cache.arguments(workdir, *refused)],
    [0, tiny_cache.arguments(workdir, *mesh)],
    [0, tiny_cache.arguments(workdir, *mesh, job="export")],
  ]
  (text,) = run_jobs(tiny_cache, jobs, devices=8)
  assert "images_per_update=12 does not divide over 8 devices" in text
  assert "the nearest that does is 8" in text
  assert "16 images an update = 8 device(s) x 2 microbatch(es) x 1 images" in text
  return workdir


@pytest.mark.slow  # a minute of compiling: pytest -m slow tests/test_multi_device.py
def test_stored_references_on_a_mesh(tiny_cache, eight_devices, tmp_path):
  """To the bit where the same mesh computed them; those of one device, within rounding."""
  of_one, steps = tmp_path / "of_one", "train.total_steps=3"
  outcome = tiny_cache.run(of_one, steps, job="reference")
  assert outcome.code == 0, outcome.text
  mesh = ("mesh.data=4", "mesh.fsdp=2", "train.microbatch=8", steps)
  same, other = tmp_path / "same", f"data.reference={of_one / 'reference'}"
  jobs = [
    [0, tiny_cache.arguments(same, *mesh, job="reference")],
    [0, tiny_cache.arguments(same, *mesh, "data.reference=")],
    [0, tiny_cache.arguments(of_one, *mesh, other)],
  ]
  run_jobs(tiny_cache, jobs, devices=8)
  computed, same, moved = (
    read_metrics(workdir / "metrics.jsonl")[:3]
    for workdir in (eight_devices, same, of_one)
  )
  for name in ("loss", "ref_err", "grad_norm"):
    expected = [row[name] for row in computed]
    assert [row[name] for row in same] == expected, name
    np.testing.assert_allclose([row[name] for row in moved], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def two_processes(tiny_world, tmp_path_factory):
  """Parameters split over two processes; the cache is theirs too."""
  workdir = tmp_path_factory.mktemp("two_processes")
  settings = (
    "mesh.data=1",
    "mesh.fsdp=2",
    f"data.cache={workdir / 'cache'}",
  )
  jobs = [
    [0, tiny_world.arguments(workdir, *settings, job=job)]
    for job in ("cache", "train", "export")
  ]
  main, other = run_jobs(tiny_world, jobs, processes=2)
  assert "16 images an update = 2 device(s) x 1 microbatch(es) x 8 images" in main
  assert "images an update" not in other  # one voice
  return workdir


@pytest.fixture(scope="module")
def moved(tiny_cache, tmp_path_factory):
  """Two updates on one device, two on eight with the reference in the host's memory, the
  last on two processes, which export."""
  workdir = tmp_path_factory.mktemp("moved")
  outcome = tiny_cache.run(workdir, "train.total_steps=2")
  assert outcome.code == 0, outcome.text
  eight = (
    "mesh.data=4",
    "mesh.fsdp=2",
    "mesh.reference=sharded",
    "mesh.offload=('reference',)",
    "train.total_steps=4",
  )
  (text,) = run_jobs(
    tiny_cache, [[0, tiny_cache.arguments(workdir, *eight)]], devices=8
  )
  assert "resuming" in text, text
  two = ("mesh.data=1", "mesh.fsdp=2")
  jobs = [[0, tiny_cache.arguments(workdir, *two, job=j)] for j in ("train", "export")]
  run_jobs(tiny_cache, jobs, processes=2)
  return workdir


@pytest.fixture(
  params=[
    pytest.param("accumulated", marks=pytest.mark.slow),  # so are the eight devices
    "eight_devices",
    "two_processes",
    pytest.param("moved", marks=pytest.mark.slow),
  ]
)
def other(request):
  return request.getfixturevalue(request.param)


def test_losses_are_those_of_one_device(one_device, other):
  mine, theirs = (read_metrics(w / "metrics.jsonl") for w in (other, one_device))
  assert [row["step"] for row in mine] == list(range(1, STEPS + 1))
  for name in ("loss", "grad_norm", "drift", "err", "ref_err"):
    np.testing.assert_allclose(
      [row[name] for row in mine],
      [row[name] for row in theirs],
      rtol=1e-4,
      err_msg=name,
    )
  losses = [row["loss"] for row in theirs]
  assert len(set(losses)) == STEPS  # it does train


def test_margins_begin_at_exactly_zero(one_device, other):
  for workdir in (one_device, other):
    first, second, *_ = read_metrics(workdir / "metrics.jsonl")
    assert first["margin"] == first["drift"] == 0
    assert first["winner_gain"] == first["loser_gain"] == 0
    assert first["implicit_acc"] == 0.5
    assert second["drift"] > 0


def test_the_first_loss_is_the_logarithm_of_the_choices(tiny_cache, one_device):
  # At step 0 every choice is uniform: a list without ties costs log m!. Ties cost less.
  first, *_ = read_metrics(one_device / "metrics.jsonl")
  assert 0 < first["loss"] < np.log(120)


def test_exported_weights_agree(tiny_world, one_device, other):
  base = load_file(tiny_world.pipeline / "unet" / "diffusion_pytorch_model.safetensors")
  mine, theirs = exported(other), exported(one_device)
  assert mine.keys() == theirs.keys() == base.keys()

  def norm(a, b):
    return np.sqrt(sum(np.sum(np.square(a[n] - b[n], dtype=np.float64)) for n in base))

  assert norm(mine, theirs) < 1e-3 * norm(theirs, base)


def test_a_checkpoint_of_many_devices_opens_on_one(tiny_cache, eight_devices):
  outcome = tiny_cache.run(
    eight_devices, f"export.path={eight_devices / 'again'}", job="export"
  )
  assert outcome.code == 0, outcome.text
  again = pretrained.load(eight_devices / "again", "unet")
  assert again.config["block_out_channels"] == [32]
  first = exported(eight_devices)
  second = load_file(
    eight_devices / "again" / "unet" / "diffusion_pytorch_model.safetensors"
  )
  assert all(np.array_equal(first[name], second[name]) for name in first)
