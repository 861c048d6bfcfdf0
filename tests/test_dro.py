"""Diffusion-DRO through the front door: experts, training, kill -9 and going on."""

import json
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from pyarrow import parquet

from lpo_jax import main, parallel, trees
from lpo_jax.data import sources
from lpo_jax.jobs import blueprint
from lpo_jax.training import checkpoint, report

CONFIG = """
import importlib.util

def get_config(arg=""):
  spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
  tiny = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tiny)
  config = tiny.get_config()
  # More than this world's random networks reach, so that every update is one.
  config.objective = {{"name": "dro", "margin": 5.0}}
  config.noising = {{"name": "trajectory"}}
  # Everything that could be lost: an old snapshot, and old trajectories.
  config.online = {{
    "steps": 4, "refresh_every": 3, "rollouts_per_update": 4, "buffer_size": 8,
  }}
  config.data.path = {experts!r}
  config.data.strategy = "winners"
  config.data.cache = {cache!r}
  config.train.images_per_update = 8
  config.train.checkpoint_every = 2
  config.train.keep_last = 50
  return config
"""


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
  """The tiny world's nine images that won most, encoded, and a config for them."""
  folder = tmp_path_factory.mktemp("dro")
  experts = folder / "experts.parquet"
  chosen = tiny_world.run(
    folder, "select.by=wins", "select.count=9", f"select.path={experts}", job="select"
  )
  assert chosen.code == 0, chosen.text
  config = folder / "dro.py"
  config.write_text(
    CONFIG.format(
      tiny=str(tiny_world.config), experts=str(experts), cache=str(folder / "cache")
    )
  )

  def arguments(workdir, *overrides, job="train"):
    overrides = [f"--config.{override}" for override in overrides]
    return [f"--config={config}", f"--workdir={workdir}", f"--job={job}", *overrides]

  return types.SimpleNamespace(tiny=tiny_world, dro=arguments, experts=experts)


@pytest.fixture(scope="module")
def cached(world, front_door, tmp_path_factory):
  outcome = front_door(*world.dro(tmp_path_factory.mktemp("cache_run"), job="cache"))
  assert outcome.code == 0, outcome.text
  return world


def checkpoints_of(arguments, workdir, step):
  """All arrays of a checkpoint by name, those of the online part among them."""
  config, *_ = main.parse(arguments)
  mesh = parallel.make_mesh()
  plan = blueprint.make_blueprint(config, mesh)
  saved = checkpoint.Checkpoints(workdir / "checkpoints", keep_last=50)
  state, meta = saved.restore(plan.like, step)
  metadata = saved._orbax.checkpointables_metadata(step).metadata["online"]
  online = saved._orbax.load_checkpointables(step, {"online": None})["online"]
  saved.close()
  assert {"snapshot", "buffer"} == {name.partition(".")[0] for name in metadata}
  arrays = {**trees.named_leaves(jax.device_get(state)), **jax.device_get(online)}
  return arrays, meta


def test_killed_in_the_middle_between_two_snapshots(cached, front_door, tmp_path):
  """kill -9, the same command again: the run that nobody killed, to the bit."""
  killed, straight = tmp_path / "killed", tmp_path / "straight"
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "lpo_jax.main",
      *cached.dro(killed, "train.total_steps=999"),
    ],
    cwd=cached.tiny.folder,
    env=cached.tiny.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  deadline = time.monotonic() + 600
  while not (killed / "checkpoints" / "2").exists():
    if process.poll() is not None or time.monotonic() > deadline:
      process.kill()
      pytest.fail(process.communicate()[0])
    time.sleep(0.02)
  process.kill()
  process.communicate()
  names = [folder.name for folder in (killed / "checkpoints").iterdir()]
  steps = sorted(int(name) for name in names if name.isdigit())
  # A multiple of 3 would take a new snapshot, and hide that the old one was lost.
  keep = next(step for step in steps if step % 3)
  for step in steps:
    if step > keep:
      subprocess.run(["rm", "-r", str(killed / "checkpoints" / str(step))], check=True)
  total = keep + 4
  for workdir in (killed, straight):
    outcome = front_door(*cached.dro(workdir, f"train.total_steps={total}"))
    assert outcome.code == 0, outcome.text
    if workdir == killed:
      assert f"resuming from step {keep} of {total}" in outcome.text
  arguments = cached.dro(straight)
  mine, theirs = (checkpoints_of(arguments, w, total) for w in (killed, straight))
  assert mine[1] == theirs[1]
  assert mine[0].keys() == theirs[0].keys()
  assert [n for n in mine[0] if not np.array_equal(mine[0][n], theirs[0][n])] == []
  rows = [report.read_metrics(w / "metrics.jsonl") for w in (killed, straight)]
  losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in r] for r in rows]
  assert losses[0] == losses[1]
  first, *_ = rows[1]
  assert first["loss"] == pytest.approx(5.0, abs=1e-5)  # the margin
  assert first["winner_gain"] == pytest.approx(0, abs=1e-6)
  assert all(row["rollout_seconds"] > 0 for row in rows[1])
  assert len({row["loss"] for row in rows[1]}) == total  # it does train


def test_the_experts_are_those_that_won_most(world):
  """A chain of n images: the first won once, as did all but the last (or tied) ones."""
  account = json.loads(world.experts.with_suffix(".json").read_text())
  assert account["candidates"] == 42 and account["chosen"] == 9
  rows = parquet.read_table(world.experts).to_pylist()
  won = {}
  columns = world.tiny.judgements
  for a, b, label in zip(
    columns["image_0_uid"], columns["image_1_uid"], columns["label_0"], strict=True
  ):
    won[a] = won.get(a, 0) + label
    won[b] = won.get(b, 0) + 1 - label
  captions = {uid: c for c, uid in zip(columns["caption"], columns["image_0_uid"])}
  captions |= {uid: c for c, uid in zip(columns["caption"], columns["image_1_uid"])}
  best = sorted(won, key=lambda uid: (-won[uid], captions[uid], uid))[:9]
  assert [row["image_uids"] for row in rows] == [[uid] for uid in best]
  assert [row["scores"] for row in rows] == [[won[uid]] for uid in best]
  assert [row["prompt"] for row in rows] == [captions[uid] for uid in best]
  equal = sum(won[uid] == won[best[-1]] for uid in won if uid not in best)
  assert account["left_out_equal_to_worst"] == equal
  source = sources.read(world.experts)
  assert source.lengths.tolist() == [1] * 9
  original = sources.read(world.tiny.parquet)
  for i, uid in enumerate(source.image_uids):
    theirs = original.images.read(original.image_uids.index(uid))
    assert source.images.read(i) == theirs


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["noising.name=forward"], "noising.name='forward' and online="),
    (["online.step=3"], "did you mean 'steps'"),
    (["online.steps=7"], "7 steps along shifted grids"),
    (["train.images_per_update=7"], "expected an even number"),
    (["data.strategy=levels"], "Run --job cache"),
  ],
)
def test_settings_that_do_not_go_together(
  cached, front_door, tmp_path, overrides, words
):
  outcome = front_door(*cached.dro(tmp_path, *overrides))
  assert outcome.code == 2
  assert words in outcome.text
  assert not (tmp_path / "config.json").exists()


def test_experts_by_a_given_list_and_by_a_score(world, tmp_path):
  names = tmp_path / "uids.txt"
  names.write_text("3-1\n\n0-0\n")
  outcome = world.tiny.run(
    tmp_path, "select.by=uids", f"select.uids={names}", job="select"
  )
  assert outcome.code == 0, outcome.text
  rows = parquet.read_table(tmp_path / "experts.parquet").to_pylist()
  assert [row["image_uids"] for row in rows] == [["0-0"], ["3-1"]]
  names.write_text("3-1\nnobody\n")
  outcome = world.tiny.run(
    tmp_path, "select.by=uids", f"select.uids={names}", job="select"
  )
  assert outcome.code == 2 and "'nobody'" in outcome.text
  outcome = world.tiny.run(
    tmp_path,
    "select.by=score",
    "select.scorer=digits_taste",
    "select.count=3",
    job="select",
  )
  assert outcome.code == 0, outcome.text
  from lpo_jax.data import decoding
  from lpo_jax.scoring import digits

  source = sources.read(world.tiny.parquet)
  pixels = [
    decoding.prepare(source.images.read(i), 32).pixels
    for i in range(len(source.image_uids))
  ]
  taste = digits.taste(np.stack(pixels), [""] * len(pixels))
  best = np.argsort(-taste)[:3]
  rows = parquet.read_table(tmp_path / "experts.parquet").to_pylist()
  assert [row["image_uids"] for row in rows] == [[source.image_uids[i]] for i in best]
  np.testing.assert_allclose([row["scores"][0] for row in rows], taste[best])


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["select.by=votes"], "unknown select.by 'votes'"),
    (["select.by=score"], "does not have. Name a scorer"),
    (["select.count=0"], "select.count=0"),
    (["select.by=uids"], "select.uids=''"),
    (["select.scorer=tast"], "unknown scorer 'tast'"),
  ],
)
def test_choices_that_cannot_be_made(world, tmp_path, overrides, words):
  outcome = world.tiny.run(tmp_path, *overrides, job="select")
  assert outcome.code == 2
  assert words in outcome.text


@pytest.mark.parametrize("name", ["dro_sd15", "dro_sdxl", "dro_quickstart"])
def test_the_configs_are_consistent(name):
  """Half of each update is generated, and the numbers go together."""
  config = main.load_config(f"configs/{name}.py")
  assert blueprint.slots_of_data(config) == config.train.images_per_update // 2
  assert config.noising.name == "trajectory" and config.objective.name == "dro"
  assert config.train.images_per_update % max(config.train.microbatch, 1) == 0


@pytest.mark.slow
def test_two_processes_train_what_one_trains(cached, front_door, tmp_path):
  """Parameters, rollouts and the buffer split over two processes."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  one, two = tmp_path / "one", tmp_path / "two"
  outcome = front_door(*cached.dro(one))
  assert outcome.code == 0, outcome.text
  command = cached.dro(two, "mesh.data=1", "mesh.fsdp=2")
  together = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "lpo_jax.main", *command],
      cwd=cached.tiny.folder,
      env=cached.tiny.environment(1, **together, JAX_PROCESS_ID=str(index)),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  texts = [process.communicate(timeout=300)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0], texts
  mine, theirs = (report.read_metrics(w / "metrics.jsonl") for w in (two, one))
  for name in ("loss", "grad_norm", "drift"):
    np.testing.assert_allclose(
      [row[name] for row in mine], [row[name] for row in theirs], rtol=1e-4, atol=1e-12
    )


@pytest.mark.slow
def test_the_quickstart_end_to_end(front_door, tmp_path):
  """Judgements, experts, rollouts, evaluation, export, report; too short for a claim."""
  config = "--config=configs/dro_quickstart.py:smoke"
  outcome = front_door(config, f"--workdir={tmp_path}", "--job=quickstart")
  assert outcome.code == 0, outcome.text
  rows = json.loads((tmp_path / "summary.json").read_text())
  assert ("dro", "digits_taste") in {(r["candidate"], r["scorer"]) for r in rows}
  metrics = report.read_metrics(tmp_path / "dro" / "metrics.jsonl")
  assert metrics[0]["loss"] == pytest.approx(0.001, abs=1e-6)  # the margin
  assert "went into its rollouts" in (tmp_path / "report.html").read_text("utf-8")
