"""The live line: what it says, and when."""

import sys

import pytest

from lpo_jax import console


@pytest.fixture
def time(monkeypatch):
  """A clock that tests move by hand."""

  class Clock:
    now = 100.0

    def monotonic(self):
      return self.now

  clock = Clock()
  monkeypatch.setattr(console, "time", clock)
  return clock


@pytest.mark.parametrize(
  ("seconds", "shown"),
  [
    (0, "0:00"),
    (-3, "0:00"),
    (59.6, "1:00"),
    (75, "1:15"),
    (3599, "59:59"),
    (3600, "1:00:00"),
    (3675, "1:01:15"),
    (360000, "100:00:00"),
  ],
)
def test_clock(seconds, shown):
  assert console.clock(seconds) == shown


def test_line_says_what_is_left_from_this_sessions_speed(time):
  progress = console.Progress("training", 100, "steps", start=50)
  time.now += 20
  progress.update(60)  # 10 steps in 20 s, 40 to go
  line = progress.line(loss=0.693147, note="warm")
  assert line == "training  60/100 steps  ·  ETA 1:20  ·  loss 0.6931  ·  note warm"


def test_line_has_no_estimate_before_anything_is_known(time):
  progress = console.Progress("training", 100, "steps", start=50)
  assert progress.line() == "training  50/100 steps"
  progress.update(51)  # done within one tick of the clock
  assert progress.line() == "training  51/100 steps"


def test_line_at_the_end(time):
  progress = console.Progress("sampling", 4, "images")
  time.now += 65
  progress.update(4)
  assert progress.line() == "sampling  4/4 images  ·  done in 1:05"


def test_a_log_gets_a_line_now_and_then_and_the_last_one(time, capsys):
  progress = console.Progress("sampling", 100, "images")
  for done in range(1, 101):
    time.now += 1
    progress.update(done)
  lines = capsys.readouterr().out.splitlines()
  counts = [int(line.split()[1].split("/")[0]) for line in lines]
  assert counts == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_a_terminal_gets_one_line_that_is_overwritten(time, capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  progress = console.Progress("s", 3, "x")
  for done, note in ((1, "long" * 5), (2, ""), (3, "")):
    time.now += 1
    progress.update(done, note=note)
  written = capsys.readouterr().err
  first, second, last = written.split("\r")[1:]
  assert len(second) == len(first)  # the leftovers of a longer line are blanked
  assert last.endswith("\n") and "done in 0:03" in last
  assert written.count("\n") == 1


def test_what_is_said_stands_above_the_live_line(time, capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  progress = console.Progress("s", 3, "x")
  time.now += 1
  progress.update(1)
  drawn = capsys.readouterr().err
  console.warn("mind")
  captured = capsys.readouterr()
  assert captured.err == "\r" + " " * (len(drawn) - 1) + "\r"  # the line is taken away
  assert captured.out == "warning: mind\n"
  console.say("twice")  # there is nothing left to take away
  assert capsys.readouterr().err == ""
  time.now += 1
  progress.update(2)
  assert capsys.readouterr().err.startswith("\rs  2/3 x")
  time.now += 1
  progress.update(3)  # ends its line itself
  capsys.readouterr()
  console.say("after")
  assert capsys.readouterr().err == ""


def test_other_processes_are_quiet(time, capsys, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  progress = console.Progress("s", 1, "x")
  progress.update(1)
  progress.interrupt()
  console.say("hello")
  console.warn("mind")
  captured = capsys.readouterr()
  assert captured.out == captured.err == ""


def test_say_and_warn(capsys):
  console.say("hello")
  console.warn("mind")
  assert capsys.readouterr().out == "hello\nwarning: mind\n"


def test_a_pause_counts_for_neither_speed_nor_duration(time):
  progress = console.Progress("training", 4, "steps")
  time.now += 30  # compiling
  progress.skip_pause()
  time.now += 2
  progress.update(1)
  assert progress.line() == "training  1/4 steps  ·  ETA 0:06"
  time.now += 50  # drawing samples
  progress.skip_pause()
  time.now += 6
  progress.update(4)
  assert progress.line() == "training  4/4 steps  ·  done in 0:08"


def test_control_characters_are_shown_and_not_sent(time, capsys, monkeypatch):
  console.say("a\x1b[2J\x07b\u202ec\td\ne")
  progress = console.Progress("drawing \x1b]0;x\x07", 1, "images")
  progress.update(1, note="\x08")
  shown = capsys.readouterr().out
  assert shown.startswith("a\ufffd[2J\ufffdb\ufffdc\td\ne\n")
  assert "drawing \ufffd]0;x\ufffd  1/1 images" in shown and "\x08" not in shown
