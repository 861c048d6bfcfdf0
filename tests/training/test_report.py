"""What a run writes down: late by one step, never twice, and loud about a NaN."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.training import report as report_lib
from lpo_jax.training.report import NonFiniteLoss, Report, read_metrics


@pytest.fixture
def clock(monkeypatch):
  """Seconds that tests move by hand."""

  class Clock:
    now = 1000.0

    def perf_counter(self):
      return self.now

    def time(self):
      return self.now

  made = Clock()
  monkeypatch.setattr(report_lib, "time", made)
  return made


@pytest.fixture
def open_report(tmp_path):
  """Makes reports in one workdir; closes them."""
  opened = []

  def make(**options):
    options = {"total_steps": 100, "images_per_update": 8, **options}
    opened.append(Report(tmp_path, **options))
    return opened[-1]

  yield make
  for report in opened:
    report.close()


def rows(tmp_path):
  return read_metrics(tmp_path / "metrics.jsonl")


def steps(tmp_path):
  return [row["step"] for row in rows(tmp_path)]


def metrics(loss, **more):
  return {"loss": jnp.float32(loss), **{k: jnp.float32(v) for k, v in more.items()}}


def test_metrics_are_written_one_step_late(open_report, tmp_path):
  report = open_report()
  for step, seen in ((1, []), (2, [1]), (3, [1, 2])):
    report.push(step, metrics(step / 4, grad_norm=2.0))
    assert steps(tmp_path) == seen
  report.flush()
  report.flush()
  assert steps(tmp_path) == [1, 2, 3]
  assert [row["loss"] for row in rows(tmp_path)] == [0.25, 0.5, 0.75]
  assert report.last["grad_norm"] == 2.0


def test_only_what_was_asked_for_is_fetched_on_time(open_report, tmp_path, monkeypatch):
  """Nothing of step k is read before step k + 1 is there."""
  fetched = []
  real = report_lib.parallel.fetch
  monkeypatch.setattr(
    report_lib.parallel, "fetch", lambda tree: fetched.append(tree) or real(tree)
  )
  report = open_report()
  first, second = metrics(1.0), metrics(2.0)
  report.push(1, first)
  assert not fetched
  report.push(2, second)
  assert [tree is first for tree in fetched] == [True]


def test_every_so_many_steps_and_the_last(open_report, tmp_path):
  report = open_report(total_steps=11, every=4)
  for step in range(1, 12):
    report.push(step, metrics(1.0))
  report.flush()
  assert steps(tmp_path) == [4, 8, 11]


def test_images_per_second_and_waiting(open_report, tmp_path, clock):
  report = open_report(every=2)
  for step in range(1, 6):
    clock.now += 0.5
    report.data_wait(0.1)
    report.push(step, metrics(1.0))
  second, fourth = rows(tmp_path)
  # Step 2 is written at the push of 3: two steps of 8 images in 1.5 s, of which 0.3 s
  # were spent waiting.
  assert second["images_per_second"] == pytest.approx(16 / 1.5)
  assert second["data_wait_share"] == pytest.approx(0.3 / 1.5)
  assert fourth["images_per_second"] == pytest.approx(16 / 1.0)
  assert fourth["data_wait_share"] == pytest.approx(0.2 / 1.0)


def test_what_happens_between_is_not_in_the_speed(open_report, tmp_path, clock):
  report = open_report(every=2)
  for step in (1, 2, 3):
    clock.now += 1
    report.push(step, metrics(1.0))
  clock.now += 500  # an evaluation after step 3
  report.restart_clock()
  for step in (4, 5):
    clock.now += 1
    report.push(step, metrics(1.0))
  # Of steps 3 and 4 only 4 is on the new clock, two seconds until it was written.
  assert rows(tmp_path)[-1]["step"] == 4
  assert rows(tmp_path)[-1]["images_per_second"] == pytest.approx(8 / 2.0)


def test_compiling_before_a_resumed_run_is_not_in_the_speed(
  open_report, tmp_path, clock
):
  report = open_report(start_step=40)
  clock.now += 500
  report.restart_clock()
  clock.now += 1
  report.push(41, metrics(1.0))
  report.flush()
  assert rows(tmp_path)[-1]["images_per_second"] == pytest.approx(8 / 1.0)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_stops_the_run_with_its_step(open_report, tmp_path, name, value):
  report = open_report(every=10)
  report.push(6, metrics(1.0, grad_norm=1.0))
  report.push(7, {**metrics(1.0, grad_norm=1.0), name: jnp.float32(value)})
  with pytest.raises(NonFiniteLoss, match=f"{name} became .* at step 7") as stop:
    report.push(8, metrics(1.0))
  assert isinstance(stop.value, UserError)
  assert "train.learning_rate" in str(stop.value)
  # It is on record, as JSON knows no NaN.
  assert [(row["step"], row[name]) for row in rows(tmp_path)] == [(7, None)]


def test_a_nan_of_the_last_step_is_noticed_by_flush(open_report):
  report = open_report()
  report.push(1, metrics(math.nan))
  with pytest.raises(NonFiniteLoss, match="at step 1"):
    report.flush()
  report.flush()  # said once


def test_other_metrics_may_be_nan(open_report, tmp_path):
  report = open_report()
  report.push(1, metrics(1.0, margin=math.nan))
  report.flush()
  assert rows(tmp_path)[0]["margin"] is None


def test_skip_counts_and_warns(open_report, tmp_path, capsys):
  report = open_report(on_nonfinite="skip", every=10)
  for step in range(1, 31):
    report.push(step, metrics(math.nan if step % 3 == 0 else 1.0))
  report.flush()
  assert report.skipped == 10
  assert (
    "warning: step 3: loss is nan; the update is skipped" in capsys.readouterr().out
  )
  assert set(steps(tmp_path)) == {*range(3, 31, 3), 10, 20, 30}


def test_skip_gives_up_when_nothing_else_comes(open_report, tmp_path):
  report = open_report(on_nonfinite="skip")
  limit = report_lib.SKIPS_IN_A_ROW
  for step in range(1, limit + 1):
    report.push(step, metrics(math.nan))
  report.push(limit + 1, metrics(1.0))  # one good update: the count starts again
  for step in range(limit + 2, 2 * limit + 3):
    report.push(step, metrics(1.0, grad_norm=math.inf))
  with pytest.raises(NonFiniteLoss, match=f"{limit + 1} steps in a row, up to step 22"):
    report.flush()


def test_a_line_cut_short_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo')
  assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]
  path.write_text("")
  assert read_metrics(path) == []


def test_resume_forgets_later_rows(open_report, tmp_path):
  first = open_report()
  for step in range(1, 6):
    first.push(step, metrics(step))
  first.flush()
  first.close()
  second = open_report(start_step=3)
  for step in (4, 5, 6):
    second.push(step, metrics(10 * step))
  second.flush()
  written = [(row["step"], row["loss"]) for row in rows(tmp_path)]
  assert written == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 2, "loss": 0.4}'])
def test_resume_after_a_crash_in_the_middle_of_a_line(open_report, tmp_path, rest):
  """New rows start on a line of their own, whatever the crash left."""
  tmp_path.joinpath("metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n' + rest)
  kept = [1, 2] if rest.endswith("}") else [1]
  report = open_report(start_step=2)
  report.push(3, metrics(1.0))
  report.flush()
  assert steps(tmp_path) == [*kept, 3]


def test_a_new_run_in_an_old_folder_starts_over(open_report, tmp_path):
  tmp_path.joinpath("metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
  report = open_report(start_step=0)
  report.push(1, metrics(2.0))
  report.flush()
  assert [row["loss"] for row in rows(tmp_path)] == [2.0]


def test_rows_are_plain_json_of_fp32(open_report, tmp_path):
  report = open_report()
  report.push(1, metrics(0.1))
  report.flush()
  (line,) = tmp_path.joinpath("metrics.jsonl").read_text("utf-8").splitlines()
  row = json.loads(line)
  assert np.float32(row["loss"]) == np.float32(0.1)
  assert set(row) == {"step", "time", "loss", "images_per_second", "data_wait_share"}


def test_tensorboard_has_the_same_numbers(open_report, tmp_path):
  report = open_report()
  report.push(1, metrics(0.5))
  report.flush()
  report.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in file.read_bytes() and b"images_per_second" in file.read_bytes()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  report = Report(tmp_path / "run", total_steps=2, images_per_update=8)
  report.push(1, metrics(1.0))
  report.push(2, metrics(math.nan))
  assert report.last["loss"] == 1.0
  with pytest.raises(NonFiniteLoss):  # but stop together
    report.flush()
  report.close()
  assert not (tmp_path / "run").exists()


def test_a_run_that_goes_back_writes_its_steps_again(open_report, tmp_path):
  report = open_report()
  for step in range(1, 6):
    report.push(step, metrics(step))
  report.rewind(2)  # step 5 is pending: it is forgotten too
  assert steps(tmp_path) == [1, 2]
  for step in (3, 4):
    report.push(step, metrics(10 * step))
  report.flush()
  assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 30, 40]


def test_every_step_is_shown_to_who_watches_in_order(open_report):
  seen = []
  report = open_report(
    every=100,
    on_nonfinite="rollback",
    watch=lambda step, values: seen.append((step, values["loss"])),
  )
  report.push(1, metrics(1.5))
  assert seen == []  # one step late
  report.push(2, metrics(np.nan))
  report.flush()  # of a policy that is not its own it says nothing
  assert seen[0] == (1, 1.5)
  assert seen[1][0] == 2 and math.isnan(seen[1][1])


def test_the_means_are_of_what_is_finite_since_last_time(open_report):
  report = open_report(on_nonfinite="skip")
  for step, loss in enumerate([1.0, 3.0, np.nan, 5.0], 1):
    report.push(step, metrics(loss, acc=step))
  report.flush()
  assert report.take_means() == {"loss": 3.0, "acc": 2.5}
  report.push(5, metrics(7.0))
  report.flush()
  assert report.take_means() == {"loss": 7.0}
  assert report.take_means() == {}


def test_utilisation_is_of_what_an_update_needs(open_report, tmp_path, clock):
  report = open_report(every=2, needed_flops=3e12, peak=1e13)
  for step in (1, 2, 3):
    clock.now += 0.5
    report.push(step, metrics(1.0))
  # Two steps of 3 TFLOP in 1.5 s, of 10 TFLOP/s.
  assert rows(tmp_path)[0]["mfu"] == pytest.approx(2 * 3e12 / (1.5 * 1e13))


def test_memory_is_that_of_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, used, peak):
      self._stats = {"bytes_in_use": used * 2**30, "peak_bytes_in_use": peak * 2**30}

    def memory_stats(self):
      return self._stats

  devices = [Device(3, 9), Device(5, 7)]
  monkeypatch.setattr(report_lib.jax, "local_devices", lambda: devices)
  assert report_lib.device_memory() == {"hbm_gib": 5.0, "hbm_peak_gib": 9.0}
  monkeypatch.undo()
  assert report_lib.device_memory() == {}  # a CPU


def test_what_is_added_is_in_the_row_of_its_step(open_report, tmp_path):
  """Also where the step itself would not be written."""
  report = open_report(every=4)
  report.push(1, metrics(1.0))
  report.push(2, metrics(1.0))
  report.add({"score/taste": 0.5})
  report.restart_clock()
  for step in (3, 4, 5):
    report.push(step, metrics(1.0))
  assert [(row["step"], row.get("score/taste")) for row in rows(tmp_path)] == [
    (2, 0.5),
    (4, None),
  ]
  assert report.take_means()["score/taste"] == 0.5


def test_alarms_of_later_steps_are_forgotten_with_their_rows(open_report, tmp_path):
  report = open_report()
  for step in range(1, 6):
    report.push(step, metrics(1.0))
    report.alarm({"step": step, "words": f"alarm {step}"})
  report.rewind(3)
  found = read_metrics(tmp_path / "alarms.jsonl")
  assert [row["step"] for row in found] == [1, 2, 3]
