"""A run that was interrupted gives what the uninterrupted one gives, to the bit."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lpo_jax import main, parallel, trees
from lpo_jax.configs import common
from lpo_jax.errors import UserError
from lpo_jax.jobs import blueprint, run_identity
from lpo_jax.training import checkpoint, report

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
  assert my_meta == their_meta
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


def test_many_small_budgets(tiny_cache, straight, tmp_path):
  command = (tmp_path, f"train.total_steps={TOTAL}", "train.max_minutes=1e-9")
  outcomes = [tiny_cache.run(*command) for _ in range(TOTAL)]
  assert [outcome.code for outcome in outcomes] == [3] * (TOTAL - 1) + [0]
  for step, outcome in enumerate(outcomes[:-1], 1):
    assert f"max_minutes is over: saved step {step} of {TOTAL}" in outcome.text
  assert_same_run(tiny_cache, tmp_path, straight)


def test_more_steps_than_first_asked_for(tiny_cache, straight, tmp_path):
  for total in (2, TOTAL):
    outcome = tiny_cache.run(tmp_path, f"train.total_steps={total}")
    assert outcome.code == 0, outcome.text
  assert_same_run(tiny_cache, tmp_path, straight)


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
