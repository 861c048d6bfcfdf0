"""A run that was interrupted gives what the uninterrupted one gives, to the bit."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lpo_jax import main, parallel, pretrained, trees
from lpo_jax.configs import common
from lpo_jax.errors import UserError
from lpo_jax.jobs import blueprint, run_identity
from lpo_jax.training import checkpoint, guard, report

TOTAL = 4


def last_checkpoint(world, workdir):
  """All arrays of a run's newest checkpoint, by name, and where its data stood."""
  config, *_ = main.parse(world.arguments(workdir))
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  like = blueprint.make_blueprint(config, parallel.make_mesh()).like
  state, meta = checkpoints.restore(like)
  checkpoints.close()
  return trees.named_leaves(jax.device_get(state)), meta


def assert_same_run(world, workdir, straight):
  """Weights, optimizer, EMA, data position and the logged losses are equal."""
  mine, my_meta = last_checkpoint(world, workdir)
  theirs, their_meta = last_checkpoint(world, straight)
  # What may differ between the sessions of a run is in the resolved config alone.
  for meta in (my_meta, their_meta):
    config = meta.pop("config")
    assert (config["objective"], config["train"]["ema"]) == (
      {"beta": 500.0, "name": "lpo"},
      0.9,
    )
  assert my_meta == their_meta
  assert my_meta["seed"] == 0 and "data.lists" in my_meta["fingerprint"]
  assert mine.keys() == theirs.keys()
  differing = [name for name in mine if not np.array_equal(mine[name], theirs[name])]
  assert differing == []
  logged = [report.read_metrics(w / "metrics.jsonl") for w in (workdir, straight)]
  steps = [[row["step"] for row in rows] for rows in logged]
  assert steps[0] == steps[1] == list(range(1, len(steps[1]) + 1))
  losses = [[(row["loss"], row["grad_norm"]) for row in rows] for rows in logged]
  assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def straight(tiny_cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  outcome = tiny_cache.run(workdir, f"train.total_steps={TOTAL}")
  assert outcome.code == 0, outcome.text
  return workdir


def test_nothing_to_do_the_second_time(tiny_cache, straight):
  before = (straight / "metrics.jsonl").read_text()
  outcome = tiny_cache.run(straight, f"train.total_steps={TOTAL}")
  assert outcome.code == 0
  assert f"already trained to step {TOTAL}" in outcome.text
  assert "compiling" not in outcome.text
  assert (straight / "metrics.jsonl").read_text() == before


def test_a_stop_file_and_going_on(tiny_cache, straight, tmp_path):
  (tmp_path / "STOP").touch()
  outcome = tiny_cache.run(tmp_path, f"train.total_steps={TOTAL}")
  assert outcome.code == 3
  assert f"STOP: saved step 1 of {TOTAL}" in outcome.text
  assert not (tmp_path / "STOP").exists()
  outcome = tiny_cache.run(tmp_path, f"train.total_steps={TOTAL}")
  assert outcome.code == 0, outcome.text
  assert f"resuming from step 1 of {TOTAL}" in outcome.text
  assert_same_run(tiny_cache, tmp_path, straight)


@pytest.mark.slow
def test_many_small_budgets(tiny_cache, straight, tmp_path):
  command = (tmp_path, f"train.total_steps={TOTAL}", "train.max_minutes=1e-9")
  outcomes = [tiny_cache.run(*command) for _ in range(TOTAL)]
  assert [outcome.code for outcome in outcomes] == [3] * (TOTAL - 1) + [0]
  for step, outcome in enumerate(outcomes[:-1], 1):
    assert f"max_minutes is over: saved step {step} of {TOTAL}" in outcome.text
  assert_same_run(tiny_cache, tmp_path, straight)


def test_more_steps_than_first_asked_for(tiny_cache, straight, tmp_path):
  """A config.json cut short in between is written again: checkpoints have their own."""
  for total in (2, TOTAL):
    outcome = tiny_cache.run(tmp_path, f"train.total_steps={total}")
    assert outcome.code == 0, outcome.text
    if total == 2:
      whole = (tmp_path / "config.json").read_text()
      (tmp_path / "config.json").write_text(whole[:100])
      other = tiny_cache.run(tmp_path, "objective.beta=7.0")
      assert (
        other.code == 2 and "holds another run: objective.beta differ" in other.text
      )
  assert_same_run(tiny_cache, tmp_path, straight)
  assert json.loads((tmp_path / "config.json").read_text())["train"]["total_steps"] == 4


def test_another_base_model_in_the_same_place_is_refused(tiny_cache, straight):
  file = tiny_cache.pipeline / "unet" / "diffusion_pytorch_model.safetensors"
  before = file.read_bytes()
  try:
    part = pretrained.load(tiny_cache.pipeline, "unet")
    part.params["conv_in"]["bias"] = part.params["conv_in"]["bias"] + 1
    pretrained.save(tiny_cache.pipeline, part)
    outcome = tiny_cache.run(straight, f"train.total_steps={TOTAL + 1}")
  finally:
    file.write_bytes(before)
  assert outcome.code == 2
  assert "what it names has changed since: model.unet. Put back" in outcome.text
  assert "compiling" not in outcome.text


def test_one_workdir_has_one_run_at_a_time(tiny_cache, tmp_path):
  with run_identity.only_session(tmp_path):
    outcome = tiny_cache.run(tmp_path)
  assert outcome.code == 2
  assert f"another process is training in {tmp_path}" in outcome.text


# So high that the second update's loss is none; so much lower after the rollback that it
# is the tiny world's own.
BLOWS_UP = (
  "train.learning_rate=1e30",
  "train.rollback_factor=1e-34",
  "train.on_nonfinite=rollback",
  "train.checkpoint_every=2",
  "train.total_steps=3",
)


def test_a_nan_goes_back_with_a_lower_rate_and_a_resume_keeps_it(tiny_cache, tmp_path):
  outcome = tiny_cache.run(tmp_path / "straight", *BLOWS_UP)
  assert outcome.code == 0, outcome.text
  said = "at step 2: back to step 0 with the learning rate times 1e-34 (rollback 1 of"
  assert said in outcome.text and "the data goes on after step 2" in outcome.text
  rows = report.read_metrics(tmp_path / "straight" / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert all((row["lr_scale"], row["rollbacks"]) == (1e-34, 1) for row in rows)
  assert all(0 < row["update_norm"] < 1 for row in rows)
  (note,) = map(
    json.loads, (tmp_path / "straight" / "rollbacks.jsonl").read_text().splitlines()
  )
  assert (note["first"], note["to_step"], note["lr_scale"]) == (2, 0, 1e-34)
  state, meta = last_checkpoint(tiny_cache, tmp_path / "straight")
  assert state["lr_scale"] == np.float32(1e-34)
  assert (meta["guard"]["rollbacks"], meta["guard"]["scale"]) == (1, 1e-34)
  assert meta["data"]["updates"] == 5  # those of the two bad steps were left out

  # Stopped with the poisoned weights of step 1 saved: those are not what it goes back to.
  (tmp_path / "stopped").mkdir()
  (tmp_path / "stopped" / "STOP").touch()
  assert tiny_cache.run(tmp_path / "stopped", *BLOWS_UP).code == 3
  outcome = tiny_cache.run(tmp_path / "stopped", *BLOWS_UP)
  assert outcome.code == 0, outcome.text
  assert "resuming from step 1" in outcome.text and said in outcome.text
  assert_same_run(tiny_cache, tmp_path / "stopped", tmp_path / "straight")


def test_a_runaway_stops_where_that_is_the_policy(tiny_cache, tmp_path, monkeypatch):
  monkeypatch.setattr(guard, "FEWEST", 1)
  outcome = tiny_cache.run(
    tmp_path,
    "train.learning_rate=10.0",
    "train.on_runaway=stop",
    "train.runaway_steps=1",
    "train.checkpoint_every=1",
  )
  assert outcome.code == 2, outcome.text
  assert "times its running median" in outcome.text
  assert "The last checkpoint from before step 2 is good" in outcome.text
  assert [row["step"] for row in report.read_metrics(tmp_path / "metrics.jsonl")] == [
    1,
    2,
  ]


def test_with_and_without_a_cache(tiny_cache, straight, tmp_path):
  """Half the run from the cache, the other half straight from the images."""
  assert tiny_cache.run(tmp_path, "train.total_steps=2").code == 0
  outcome = tiny_cache.run(tmp_path, f"train.total_steps={TOTAL}", "data.cache=None")
  assert outcome.code == 0, outcome.text
  assert "data.cache=None: 42 images are kept in memory" in outcome.text
  assert_same_run(tiny_cache, tmp_path, straight)


def start(world, workdir, *overrides):
  """Starts training in a process of its own; returns when it has checkpoint 2."""
  overrides = ("train.checkpoint_every=2", *overrides)
  process = subprocess.Popen(
    [sys.executable, "-m", "lpo_jax.main", *world.arguments(workdir, *overrides)],
    cwd=world.folder,
    env=world.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  deadline = time.monotonic() + 180
  while not (workdir / "checkpoints" / "2").exists():
    if process.poll() is not None or time.monotonic() > deadline:
      process.kill()
      pytest.fail(process.communicate()[0])
    time.sleep(0.02)
  return process


def test_killed_in_the_middle(tiny_cache, tmp_path):
  process = start(tiny_cache, tmp_path / "killed", "train.total_steps=100000")
  process.kill()
  process.communicate()
  rows = report.read_metrics(tmp_path / "killed" / "metrics.jsonl")
  checkpoints = checkpoint.Checkpoints(tmp_path / "killed" / "checkpoints")
  saved = checkpoints.latest
  checkpoints.close()
  assert saved >= 2 and len(rows) >= saved
  total = f"train.total_steps={len(rows) + 3}"
  for workdir in (tmp_path / "killed", tmp_path / "straight"):
    outcome = tiny_cache.run(workdir, total)
    assert outcome.code == 0, outcome.text
  assert_same_run(tiny_cache, tmp_path / "killed", tmp_path / "straight")


def test_sigterm_saves_and_the_same_command_finishes(tiny_cache, tmp_path):
  total = "train.total_steps=150"
  process = start(tiny_cache, tmp_path, total)
  process.send_signal(signal.SIGTERM)
  text = process.communicate(timeout=120)[0]
  assert process.returncode == 3, text
  assert "received SIGTERM: saved step" in text
  saved = len(report.read_metrics(tmp_path / "metrics.jsonl"))
  assert 2 <= saved < 150
  outcome = tiny_cache.run(tmp_path, total, "train.checkpoint_every=500")
  assert outcome.code == 0, outcome.text
  assert f"resuming from step {saved} of 150" in outcome.text
  rows = report.read_metrics(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, 151))
  assert json.loads((tmp_path / "config.json").read_text())["train"]["ema"] == 0.9


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(processes):
  """A few of the moments that benchmarks/kill_resume.py has many of."""
  script = pathlib.Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"
  command = [sys.executable, str(script), "--points=3", f"--processes={processes}"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "1 of 1 runs ended equal, to the bit" in done.stdout


def test_sigterm_before_anything_is_trained(tiny_cache, tmp_path):
  """While a file of prompts is waited for; every job has this from the front door."""
  pipe = tmp_path / "prompts.txt"
  os.mkfifo(pipe)
  arguments = tiny_cache.arguments(
    tmp_path / "run", "eval.every=1", f"eval.prompts={pipe}"
  )
  process = subprocess.Popen(
    [sys.executable, "-m", "lpo_jax.main", *arguments],
    cwd=tiny_cache.folder,
    env=tiny_cache.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  with pipe.open("w"):  # returns when the run has come to read it
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
  assert process.returncode == 3, text
  assert "lpo_jax: received SIGTERM: stopped, with nothing half-written" in text
  assert "Traceback" not in text


def test_a_preempted_host_stops_all_at_one_step_and_one_host_goes_on(
  tiny_cache, straight, tmp_path
):
  """SIGTERM to one of two processes; then a single process finishes their run."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  arguments = tiny_cache.arguments(
    tmp_path,
    "mesh.data=1",
    "mesh.fsdp=2",
    "train.checkpoint_every=2",
    "train.total_steps=100000",
  )
  together = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "lpo_jax.main", *arguments],
      cwd=tiny_cache.folder,
      env=tiny_cache.environment(**together, JAX_PROCESS_ID=str(index)),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    deadline = time.monotonic() + 600
    while not (tmp_path / "checkpoints" / "2").exists():
      assert time.monotonic() < deadline
      assert all(process.poll() is None for process in processes)
      time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=240)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [3, 3], texts
  saved = len(report.read_metrics(tmp_path / "metrics.jsonl"))
  for text in texts:
    assert "one of the hosts received SIGTERM or is to be preempted: saved step" in text
    assert f"saved step {saved} of 100000" in text
  outcome = tiny_cache.run(tmp_path, f"train.total_steps={max(saved + 1, TOTAL)}")
  assert outcome.code == 0, outcome.text
  assert f"resuming from step {saved} of" in outcome.text
  mine, theirs = (
    report.read_metrics(w / "metrics.jsonl") for w in (tmp_path, straight)
  )
  np.testing.assert_allclose(
    [row["loss"] for row in mine[:TOTAL]],
    [row["loss"] for row in theirs],
    rtol=1e-4,
  )


def test_a_run_from_before_a_key_was_there(tmp_path):
  """Its config reads with the default of the key; options of a method are not added."""
  config = common.get_config()
  with config.unlocked():
    config.objective = {"name": "sft"}
  then = json.loads(config.to_json_best_effort())
  del then["model"]["lora"], then["train"]["ema_schedule"], then["weighting"]
  (tmp_path / "config.json").write_text(json.dumps(then))
  found = run_identity.recorded(tmp_path)
  assert found.model.lora.rank == 0 and found.train.ema_schedule == "constant"
  assert found.objective.to_dict() == {"name": "sft"}
  run_identity.refuse_other_run(config, tmp_path)
  config.model.lora.rank = 4
  with pytest.raises(UserError, match=r"model\.lora\.rank differ"):
    run_identity.refuse_other_run(config, tmp_path)
