"""What is saved comes back bit by bit, on any mesh, or is refused by name."""

import dataclasses
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import trees
from lpo_jax.errors import UserError
from lpo_jax.training import optimizer, state
from lpo_jax.training.checkpoint import Checkpoints

META = {
  "data": {"epoch": 3, "position": [1, 2], "left": [], "of": {}, "seed": None},
  "note": "ä",
  "share": 0.1,
  "random": 2**100 + 1,
  "first": True,
}


def bits(tree):
  return {
    n: (x.dtype, x.shape, np.asarray(x).tobytes())
    for n, x in trees.named_leaves(tree).items()
  }


def draw(like, seed):
  """The same structure, with every leaf random."""
  rng = np.random.default_rng(seed)

  def fill(x):
    values = rng.standard_normal(x.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      values = rng.integers(0, 2, x.shape)
    return jnp.asarray(values, x.dtype)

  return jax.tree.map(fill, like)


def make_state(world, *, step=0, seed=0, with_ema=True, params=None, **options):
  params = params or jax.tree.map(jnp.asarray, world.make_params())
  options = {"name": "adamw", "options": {"mu_dtype": "bfloat16"}, **options}
  tx = optimizer.build(params=params, learning_rate=0.1, **options)
  made = draw(state.create(params, tx, with_ema=with_ema), seed)
  return dataclasses.replace(made, step=jnp.int32(step))


@pytest.fixture
def checkpoints(tmp_path):
  opened = Checkpoints(tmp_path / "checkpoints")
  yield opened
  opened.close()


@pytest.mark.parametrize("with_ema", [True, False])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"on_nonfinite": "skip", "trainable_rules": [("text", False), (".*", True)]},
    {"name": "adafactor", "options": {"momentum": 0.9}},
  ],
  ids=["adamw", "skip and frozen", "adafactor"],
)
def test_everything_comes_back_bit_by_bit(world, checkpoints, with_ema, options):
  saved = make_state(world, step=7, seed=1, with_ema=with_ema, **options)
  like = make_state(world, step=0, seed=2, with_ema=with_ema, **options)
  checkpoints.save(saved, META)
  checkpoints.wait()
  restored, meta = checkpoints.restore(like)
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  assert bits(restored) == bits(saved)
  assert bits(restored) != bits(like)
  assert meta == META
  assert (restored.ema is None) == (not with_ema)


def test_a_shape_is_enough_to_restore_onto(world, checkpoints):
  saved = make_state(world, step=7, seed=1)
  checkpoints.save(saved, {})
  checkpoints.wait()
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), saved
  )
  restored, meta = checkpoints.restore(like)
  assert bits(restored) == bits(saved)
  assert meta == {}


def test_the_saved_values_are_those_at_the_call(world, checkpoints):
  """The next step donates the arrays while they are still being written."""
  saved = make_state(world, step=1, seed=1)
  expected = bits(saved)
  checkpoints.save(saved, META)
  for x in jax.tree.leaves(saved):
    x.delete()
  checkpoints.wait()
  restored, _ = checkpoints.restore(make_state(world, seed=2))
  assert bits(restored) == expected


def test_training_goes_on_as_if_it_had_not_stopped(world, tmp_path):
  options = {"ema_decay": 0.9, "warmup_steps": 3, "learning_rate": 0.05}
  straight = world.Run(**options)
  metrics = [straight(world.make_batch(epoch)) for epoch in range(4)]

  run = world.Run(**options)
  for epoch in range(2):
    run(world.make_batch(epoch))
  first = Checkpoints(tmp_path)
  first.save(run.state, {"next": 2})
  first.close()

  run, second = world.Run(**options), Checkpoints(tmp_path)
  run.state, meta = second.restore(run.state)
  second.close()
  assert int(run.state.step) == meta["next"] == 2
  again = [run(world.make_batch(epoch)) for epoch in range(2, 4)]
  np.testing.assert_equal(again, metrics[2:])  # NaN where a bin holds no list
  assert bits(run.state) == bits(straight.state)


def test_latest_and_how_many_are_kept(world, tmp_path):
  opened = Checkpoints(tmp_path, keep_last=2)
  assert opened.latest is None
  for step in (3, 5, 10):
    opened.save(make_state(world, step=step, seed=step), {"step": step})
    assert opened.latest == step
  opened.close()

  reopened = Checkpoints(tmp_path, keep_last=2)
  assert reopened.latest == 10
  like = make_state(world)
  for step in (10, 5):
    restored, meta = reopened.restore(like, step)
    assert bits(restored) == bits(make_state(world, step=step, seed=step))
    assert meta == {"step": step}
  assert reopened.restore(like)[1] == {"step": 10}
  reopened.close()
  folders = {p.name for p in tmp_path.iterdir() if p.is_dir()}
  assert not any(name == "3" or name.endswith("_3") for name in folders), folders


def test_the_same_step_is_kept_as_it_is(world, checkpoints):
  first = make_state(world, step=4, seed=1)
  checkpoints.save(first, {"first": True})
  checkpoints.save(make_state(world, step=4, seed=2), {"first": False})
  checkpoints.wait()
  restored, meta = checkpoints.restore(make_state(world))
  assert meta == {"first": True}
  assert bits(restored) == bits(first)


def test_nothing_to_restore_is_said(world, checkpoints):
  with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints: train first"):
    checkpoints.restore(make_state(world))


def wider(params):
  params["out"]["bias"] = jnp.zeros(5)
  return params


def another(params):
  params["zzz"] = {"kernel": jnp.zeros((2, 2))}
  return params


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (wider, r"first 'ema.out.bias' \(expected \(5,\), found \(4,\)\)"),
    (another, r"first 'ema.zzz.kernel' \(expected \(2, 2\), found None\)"),
  ],
)
def test_another_model_is_refused_by_name(world, checkpoints, change, words):
  checkpoints.save(make_state(world, step=1), {})
  checkpoints.wait()
  params = change(jax.tree.map(jnp.asarray, world.make_params()))
  with pytest.raises(UserError, match=r"checkpoint 1 .* of another model") as refusal:
    checkpoints.restore(make_state(world, params=params))
  assert refusal.match(words)
  assert refusal.match("Use the config it was made with")


def test_another_optimizer_is_refused(world, checkpoints):
  checkpoints.save(make_state(world, step=1), {})
  checkpoints.wait()
  like = make_state(world, name="adafactor", options={})
  with pytest.raises(UserError, match="of another model or optimizer"):
    checkpoints.restore(like)
  with pytest.raises(UserError, match=r"first 'ema\."):
    checkpoints.restore(make_state(world, with_ema=False))


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match=r"cannot write checkpoints to .*choose another"):
    Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_save_that_was_cut_short_is_not_a_checkpoint(world, tmp_path):
  opened = Checkpoints(tmp_path)
  opened.save(make_state(world, step=1, seed=1), {})
  opened.close()
  # What Orbax leaves when it dies in the middle of step 2.
  complete = next(p for p in tmp_path.iterdir() if p.is_dir() and "1" in p.name)
  (tmp_path / f"{complete.name.replace('1', '2')}.orbax-checkpoint-tmp").mkdir()
  reopened = Checkpoints(tmp_path)
  assert reopened.latest == 1
  assert bits(reopened.restore(make_state(world))[0]) == bits(
    make_state(world, step=1, seed=1)
  )
  reopened.close()


def test_a_reader_leaves_alone_what_is_being_written(world, tmp_path):
  """An evaluation beside a run must not take the run's half-written checkpoint away."""
  half = tmp_path / "2.orbax-checkpoint-tmp"
  half.mkdir()
  Checkpoints(tmp_path, reading=True).close()
  assert half.exists()
  Checkpoints(tmp_path).close()
  deadline = time.monotonic() + 20  # it is taken away in the background
  while half.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not half.exists()


def kept(tmp_path, world, scores, **options):
  """The steps left of checkpoints 1, 2, ... with these scores."""
  opened = Checkpoints(tmp_path, **options)
  for step, score in enumerate(scores, 1):
    metrics = None if score is None else {"score": score, "other": -score}
    opened.save(make_state(world, step=step), {}, metrics=metrics)
  opened.close()
  reopened = Checkpoints(tmp_path, reading=True)
  steps = reopened.steps
  reopened.close()
  return steps


@pytest.mark.parametrize(
  ("options", "steps"),
  [
    ({"keep_last": 1, "keep_every": 3}, [3, 6, 7]),
    ({"keep_last": 1, "keep_best": 2, "best_metric": "score"}, [2, 5, 7]),
    ({"keep_last": 1, "keep_best": 2, "best_metric": "-score"}, [1, 4, 7]),
    (
      {"keep_last": 2, "keep_every": 4, "keep_best": 1, "best_metric": "other"},
      [1, 4, 6, 7],
    ),
  ],
)
def test_what_is_kept(world, tmp_path, options, steps):
  scores = [0.1, 0.9, None, 0.2, 0.8, 0.3, 0.5]
  assert kept(tmp_path, world, scores, **options) == steps


def test_a_run_that_went_back_forgets_what_came_after(world, checkpoints):
  for step in (1, 2):
    checkpoints.save(make_state(world, step=step, seed=step), {"step": step})
  checkpoints.forget_after(1)
  assert checkpoints.steps == [1]
  checkpoints.save(make_state(world, step=2, seed=7), {"step": "again"})
  checkpoints.wait()
  restored, meta = checkpoints.restore(make_state(world))
  assert meta == {"step": "again"}
  assert bits(restored) == bits(make_state(world, step=2, seed=7))


def test_a_checkpoint_from_before_there_were_rollbacks_opens(
  world, tmp_path, monkeypatch
):
  """It has neither lr_scale, which was 1 then, nor reward_cap: there was no cap."""
  saved = make_state(world, step=3, seed=1)
  opened = Checkpoints(tmp_path)
  named = trees.named_leaves
  with monkeypatch.context() as then:
    younger = {"lr_scale", "reward_cap"}
    old = lambda tree: {n: x for n, x in named(tree).items() if n not in younger}  # noqa: E731
    then.setattr("lpo_jax.training.checkpoint.trees.named_leaves", old)
    opened.save(saved, {})
    opened.wait()
  restored, _ = opened.restore(make_state(world))
  opened.close()
  assert restored.lr_scale == 1 and restored.lr_scale.dtype == jnp.float32
  assert restored.reward_cap == np.inf and restored.reward_cap.dtype == jnp.float32
  mine, theirs = bits(restored), bits(saved)
  for name in younger:
    assert mine.pop(name) != theirs.pop(name)
  assert mine == theirs


def largest_file(folder):
  return max(
    (p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )


@pytest.mark.parametrize("damage", ["cut short", "gone", "meta"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(world, tmp_path, damage):
  folder = tmp_path / "checkpoints"
  opened = Checkpoints(folder)
  for step in (1, 2):
    opened.save(make_state(world, step=step, seed=step), {"step": step})
  opened.close()
  if damage == "gone":
    shutil.rmtree(folder / "2" / "state")
  else:
    file = largest_file(folder / "2" / ("meta" if damage == "meta" else "state"))
    file.write_bytes(file.read_bytes()[:-20])
  opened = Checkpoints(folder)
  away = tmp_path / "damaged-checkpoint-2"
  with pytest.raises(UserError) as refusal:
    opened.restore(make_state(world))
  opened.close()
  assert refusal.match(r"checkpoint 2 in .* cannot be read")
  assert refusal.match(r".*To go on from the one before, 1, move it out of the way")
  assert f"(mv '{folder / '2'}' '{away}')" in str(refusal.value)
  (folder / "2").rename(away)  # as told
  opened = Checkpoints(folder)
  restored, meta = opened.restore(make_state(world))
  opened.close()
  assert meta == {"step": 1}
  assert bits(restored) == bits(make_state(world, step=1, seed=1))


def test_a_disk_without_room_leaves_the_last_good_checkpoint_good(world, tmp_path):
  """The system refuses to write more than a few bytes to any file."""
  resource = pytest.importorskip("resource")
  opened = Checkpoints(tmp_path)
  opened.save(make_state(world, step=1, seed=1), {"step": 1})
  opened.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
  try:
    with pytest.raises(UserError, match="cannot save") as refusal:
      opened.save(make_state(world, step=2, seed=2), {"step": 2})
      opened.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  opened.close()
  assert refusal.match("room left; checkpoint 1 is whole. Make room")
  reopened = Checkpoints(tmp_path)
  assert reopened.latest == 1
  restored, meta = reopened.restore(make_state(world))
  assert meta == {"step": 1}
  assert bits(restored) == bits(make_state(world, step=1, seed=1))
  reopened.save(make_state(world, step=2, seed=2), {"step": 2})  # there is room again
  reopened.close()
  reopened = Checkpoints(tmp_path, reading=True)
  assert reopened.restore(make_state(world))[1] == {"step": 2}
  reopened.close()


EIGHT = """
  import json, runpy, sys
  import jax, numpy as np
  from lpo_jax import parallel, trees
  from lpo_jax.training.checkpoint import Checkpoints
  parallel.SMALLEST_SHARDED = 1
  world = runpy.run_path("tests/training/conftest.py")
  lists, ranks = [5, 4, 3, 4], [[0, 1, 2, 3, 4], [2, 0, 1, 1, 0], [0, 1, 1, 0, 0], [3, 1, 0, 2, 0]]
  batch = world["make_batch"](0, lists=lists, ranks=ranks)
  run = world["Run"](mesh=parallel.make_mesh(2, 4), batch=batch, ema_decay=0.9)
  fresh = run.state
  checkpoints = Checkpoints(sys.argv[1])
  run.state, meta = checkpoints.restore(fresh)
  kernel = run.state.params["out"]["kernel"]
  out = {
    "meta": meta,
    "same_placement": all(
      a.sharding == b.sharding
      for a, b in zip(jax.tree.leaves(run.state), jax.tree.leaves(fresh))
    ),
    "shard": kernel.addressable_shards[0].data.shape,
    "state": {n: np.asarray(x).tolist() for n, x in trees.named_leaves(parallel.fetch(run.state)).items()},
  }
  run(batch)
  checkpoints.save(run.state, {"from": 8})
  checkpoints.close()
  out["next"] = {n: np.asarray(x).tolist() for n, x in trees.named_leaves(parallel.fetch(run.state)).items()}
  print(json.dumps(out))
"""


def as_lists(tree):
  return {n: np.asarray(x).tolist() for n, x in trees.named_leaves(tree).items()}


def test_from_one_device_to_eight_and_back(world, on_devices, tmp_path):
  run = world.Run(ema_decay=0.9)
  run()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(run.state, META)
  checkpoints.close()
  out = json.loads(on_devices(8, EIGHT, tmp_path))
  assert out["meta"] == META
  assert out["same_placement"] and out["shard"] == [4, 1]
  # fp32 survives JSON: Python prints doubles that give the same bits back.
  assert out["state"] == as_lists(run.state)
  # And what eight devices saved is read on one.
  checkpoints = Checkpoints(tmp_path)
  restored, meta = checkpoints.restore(run.state)
  checkpoints.close()
  assert meta == {"from": 8} and int(restored.step) == 2
  assert as_lists(restored) == out["next"]
