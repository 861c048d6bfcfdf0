"""A run that hangs says where, once, and one that does not says nothing."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from lpo_jax.errors import UserError
from lpo_jax.jobs import watchdog
from lpo_jax.jobs.watchdog import Watchdog

TENTH_S = 0.1 / 60


def wait_for(file, text, seconds=20):
  """Waits until a file holds a text."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if file.exists() and text in file.read_text():
      return file.read_text()
    time.sleep(0.02)
  pytest.fail(f"no {text!r} in {file}")


def a_step_that_hangs(release):
  release.wait(60)


def test_the_host_the_step_and_the_stack_are_named(tmp_path, capfd):
  release = threading.Event()
  stuck = threading.Thread(target=a_step_that_hangs, args=(release,))
  with Watchdog(tmp_path, minutes=TENTH_S) as dog:
    dog.beat("step 7")
    stuck.start()
    text = wait_for(tmp_path / "hang-0.txt", "a_step_that_hangs")
    dog.beat("step 8")
    again = wait_for(tmp_path / "hang-0.txt", "during step 8")
  release.set()
  stuck.join()
  assert f"on host {socket.gethostname()}, process 0 of 1, during step 7" in text
  assert again.count("nothing was completed for") == 2  # once for each step
  assert "test_watchdog.py" in text
  assert "where each thread stands is in" in capfd.readouterr().err


def test_silent_while_steps_complete_and_while_paused(tmp_path):
  with Watchdog(tmp_path, minutes=2 / 60) as dog:
    for step in range(12):
      time.sleep(0.2)
      dog.beat(f"step {step}")
    with dog.paused():
      time.sleep(2.3)
  with Watchdog(tmp_path, minutes=0):
    time.sleep(0.1)
  assert list(tmp_path.iterdir()) == []


HANG = """
import pathlib, sys
import jax, numpy as np
from lpo_jax.jobs.watchdog import Watchdog

def never(x):
  while True:
    pass

with Watchdog(pathlib.Path(sys.argv[1]), minutes=0.5 / 60, on_hang="exit") as dog:
  dog.beat("step 3")
  out = jax.ShapeDtypeStruct((), np.float32)
  step = jax.jit(lambda x: jax.pure_callback(never, out, x))
  print("never reached", float(step(1.0)))
"""


def test_a_device_that_never_answers_ends_with_3_where_that_is_wanted(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", HANG, str(tmp_path)],
    env={**os.environ},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 3, done.stderr
  assert "never reached" not in done.stdout
  text = (tmp_path / "hang-0.txt").read_text()
  assert "during step 3" in text and "in never" in text and "<module>" in text
  assert "during step 3" in done.stderr


def test_settings_that_cannot_be_meant_are_refused():
  with pytest.raises(UserError, match=r"train\.hang_minutes=-1"):
    watchdog.check_policy(-1, "report")
  with pytest.raises(UserError, match=r"unknown train\.on_hang 'exi'"):
    watchdog.check_policy(1, "exi")
