"""While a run trains: held-out lists, scores, alarms, and a run made to collapse."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lpo_jax.training.report import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
POINTS = (
  "data.held_out=0.3",
  "eval.held_out=3",
  "eval.every=2",
  "eval.prompts=('a handwritten three','a handwritten seven')",
  "eval.steps=2",
  "eval.batch_size=4",
  "eval.scorers=('digits_taste','digits_legibility')",
  "train.total_steps=6",
  "train.checkpoint_every=2",
  "train.keep_last=1",
  "train.keep_best=1",
  # All runs here, so that they share what is compiled: a hundred times the tiny world's.
  "train.learning_rate=1e-2",
  "train.alarms.window=3",
  "train.on_runaway=off",
)
# Drift is 0 at step 1 alone: alarms at the ends of two windows, steps 3 and 6.
LOWERING = (
  "train.alarms.drift=lower_lr",
  "train.alarms.drift_above=1e-9",
  "train.alarms.runaway_margin=cap_margin",
  "train.alarms.runaway_margin_above=1e-9",
)


def rows_of(workdir, name="metrics.jsonl"):
  return read_metrics(workdir / name)


@pytest.fixture(scope="module")
def run_with_points(tiny_cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("points")
  best = "train.best_metric=held_out/margin"
  outcome = tiny_cache.run(workdir, *POINTS, *LOWERING, best)
  assert outcome.code == 0, outcome.text
  return workdir, outcome


def test_run_points_are_in_the_rows_of_their_steps(run_with_points):
  workdir, outcome = run_with_points
  assert "lists, by prompt; never trained on" in outcome.text
  rows = rows_of(workdir)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  told = {"held_out/implicit_acc", "held_out/margin"}
  told |= {"score/digits_taste", "score/digits_legibility"}
  for row in rows:
    assert told <= row.keys() if row["step"] % 2 == 0 else not told & row.keys()
  for row in rows[1::2]:
    assert 0 <= row["held_out/implicit_acc"] <= 1
    assert row["held_out/margin"] != 0
    assert 0 <= row["score/digits_legibility"] <= 1
  assert (workdir / "samples" / "step_000006.png").exists()


def test_the_best_checkpoint_is_kept_by_a_held_out_metric(run_with_points):
  workdir, _ = run_with_points
  margins = {row["step"]: row.get("held_out/margin") for row in rows_of(workdir)}
  best = max((2, 4, 6), key=lambda step: margins[step])
  kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.is_dir()}
  assert kept == {best, 6}


def test_a_resumed_run_measures_and_lowers_the_same(
  run_with_points, tiny_cache, tmp_path
):
  """To the bit, though the first part's last save notices the alarm of step 3 early."""
  workdir, outcome = run_with_points
  for total in (3, 6):
    again = tiny_cache.run(
      tmp_path,
      *POINTS,
      *LOWERING,
      "train.best_metric=held_out/margin",
      f"train.total_steps={total}",
    )
    assert again.code == 0, again.text
  whole, parts = rows_of(workdir), rows_of(tmp_path)
  for one, other in zip(whole, parts, strict=True):
    assert one.keys() == other.keys()
    for name in one.keys() - {"time", "images_per_second", "data_wait_share"}:
      assert one[name] == other[name], (one["step"], name)
  # What step 3 shows is known when update 4 is on its way: 5 is the first to be lowered.
  scales = [row.get("lr_scale", 1.0) for row in whole]
  assert scales == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
  alarms, again = (
    [(row["step"], row["alarm"]) for row in rows_of(folder, "alarms.jsonl")]
    for folder in (workdir, tmp_path)
  )
  assert alarms == again and (3, "drift") in alarms and (6, "drift") in alarms
  assert "the learning rate is times 0.5 from step 5 on" in outcome.text
  # Every reward is beyond a cap of half of 1e-9, so that from then on none has a gradient.
  assert "from step 5 on, implicit rewards beyond 5e-10 of" in outcome.text
  assert [row["grad_norm"] > 0 for row in whole] == [True] * 4 + [False] * 2


def test_an_empty_group_is_null_and_never_zero(run_with_points):
  workdir, _ = run_with_points
  text = (workdir / "metrics.jsonl").read_text("utf-8")
  assert "NaN" not in text
  for row in rows_of(workdir):
    groups = [row[f"drift/t{i}"] for i in range(4)]
    assert any(x is not None for x in groups)
    for i in range(4):  # a bin is there for all metrics or for none
      names = ("implicit_acc", "margin", "winner_gain", "loser_gain", "drift")
      assert len({row[f"{name}/t{i}"] is None for name in names}) == 1
    assert row["margin_p10"] <= row["margin_p50"] <= row["margin_p90"]
    assert row["grad_norm_clipped"] == min(row["grad_norm"], 1.0)


def test_lists_held_out_are_never_drawn(tiny_cache):
  from lpo_jax.data import held_out
  from lpo_jax.data.cache import open_cache
  from lpo_jax.data.pipeline import Batches

  cache = open_cache(tiny_cache.cache)
  trained, held = held_out.split(cache.lists, 0.3, seed=0)
  batches = Batches(cache, images_per_update=16, seed=0, only=trained, prefetch=0)
  seen = set()
  for _ in range(12):
    seen |= {int(x) for x in next(batches).identity[:, 0]}
  assert seen == {int(x) for x in cache.lists.list_id[trained]}
  assert len(held) and not seen & {int(x) for x in cache.lists.list_id[held]}
  batches.close()
  cache.close()


@pytest.mark.parametrize(
  "override,said",
  [
    ("data.held_out=0.0", "data.held_out=0 leaves no list out"),
    ("objective.name=mapo", "'mapo' has no reference"),
    ("data.reference=errors", "with data.reference a run has no reference's weights"),
  ],
)
def test_held_out_lists_that_cannot_be_are_refused(
  tiny_cache, tmp_path, override, said
):
  outcome = tiny_cache.run(tmp_path, *POINTS, "train.keep_best=0", override)
  assert outcome.code == 2 and said in " ".join(outcome.text.split()), outcome.text


def test_a_run_made_to_collapse_is_stopped_by_an_alarm(tiny_cache, tmp_path):
  """Before the error of the policy is twice the reference's, and with words."""
  outcome = tiny_cache.run(
    tmp_path,
    *POINTS,
    "eval.every=0",
    "train.keep_best=0",
    "train.total_steps=40",
    "train.alarms.drift=stop",
  )
  assert outcome.code == 2, outcome.text
  (alarm,) = [
    row for row in rows_of(tmp_path, "alarms.jsonl") if row["alarm"] == "drift"
  ]
  assert alarm["policy"] == "stop" and alarm["words"] in " ".join(outcome.text.split())
  rows = rows_of(tmp_path)
  shares = [row["drift"] / row["ref_err"] for row in rows]
  window = shares[alarm["first"] - 1 : alarm["step"]]
  assert np.median(window) > 0.2 >= np.median(shares[alarm["first"] - 2 : -1])
  assert rows[-1]["step"] == alarm["step"] < 40
  assert rows[-1]["err"] < 2 * rows[-1]["ref_err"]


@pytest.mark.slow
def test_a_collapse_on_the_digits_is_caught_while_they_can_be_read(tmp_path):
  """Learning rate x 100 on the quickstart: two minutes on two cores."""

  def collapse(policy):
    command = [sys.executable, ROOT / "benchmarks" / "collapse.py"]
    options = ["--factors=100", "--updates=14", f"--policy={policy}"]
    done = subprocess.run(
      [*command, f"--workdir={tmp_path}", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / f"{policy}_x100"
    legible = [row["score/digits_legibility"] for row in rows_of(folder)]
    return legible, rows_of(folder, "alarms.jsonl"), done.stdout

  legible, _, _ = collapse("warn")
  assert legible[0] > 0.8 > 0.4 > min(legible)  # left alone, nobody can read them
  stopped, alarms, text = collapse("stop")
  assert alarms[-1]["alarm"] == "winner_worse" and alarms[-1]["policy"] == "stop"
  assert "stopped: alarm winner_worse" in text
  assert len(stopped) == alarms[-1]["step"] < 14
  assert min(stopped) > 0.5 * stopped[0]
  assert stopped == legible[: len(stopped)]
