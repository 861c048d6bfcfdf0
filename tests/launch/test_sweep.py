"""Sweeps: expanded for launchers, run here one after another, compared."""

import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lpo_jax.jobs import sweep_report

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "launch"
WRITE = "LPO_JAX_WRITE_GOLDENS"


@pytest.fixture(scope="module")
def sweep():
  """launch/sweep.py as a module."""
  spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules["sweep"] = module  # dataclasses look themselves up
  spec.loader.exec_module(module)
  return module


DRY_RUNS = {
  "sweep": ("--workdir", "runs/sweep", "--config.data.path=judged"),
  "sweep_slurm": (
    *("--workdir", "runs/sweep", "--on", "slurm", "--part", "runs"),
    *("--only", "beta500,beta8000", "--gpus", "4", "--name", "lpo-{run}"),
  ),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_says_what_would_run(sweep, capsys, monkeypatch, name):
  monkeypatch.chdir(ROOT)
  assert sweep.main(["configs/sweep_beta.py", *DRY_RUNS[name], "--dry-run"]) == 0
  said, file = capsys.readouterr().out, GOLDENS / f"{name}.txt"
  if os.environ.get(WRITE) == "1":
    file.write_text(said, "utf-8")
  assert file.exists() and said == file.read_text("utf-8"), (
    f"{name} no longer is {file.relative_to(ROOT)}. If this was meant:\n  {WRITE}=1 "
    "python -m pytest tests/launch"
  )


def test_a_launcher_takes_what_the_sweep_gives_it(sweep, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = ["configs/sweep_beta.py", *DRY_RUNS["sweep_slurm"], "--dry-run"]
  assert sweep.main(words) == 0
  for line in capsys.readouterr().out.splitlines():
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
      f"{line} --dry-run",
      shell=True,
      cwd=ROOT,
      env=clean,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--job-name=lpo-beta" in done.stdout and "--config.objective.beta=" in (
      done.stdout
    )


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("--on", "slrum"), "unknown --on 'slrum'; did you mean 'slurm'?"),
    (("--on", "slurm"), "call this with --part shared first"),
    (("--part", "run"), "did you mean 'runs'?"),
    (
      ("--only", "beta50"),
      "unknown run of the sweep 'beta50'; did you mean 'beta500'?",
    ),
  ],
)
def test_command_lines_that_cannot_be_used(sweep, capsys, monkeypatch, words, said):
  monkeypatch.chdir(ROOT)
  assert sweep.main(["configs/sweep_beta.py", "--workdir", "x", *words]) == 2
  assert said in capsys.readouterr().err


def test_files_that_are_no_sweep(sweep, capsys, tmp_path):
  start = "from lpo_jax.configs import common\nget_config = lambda a='': common.get_config()\n"
  runs = "get_sweep = lambda a='': {{'shared': (), 'each': ('train',), 'runs': {}}}\n"
  for text, said in (
    (start, "has no get_sweep"),
    (start + runs.format("{'a': {'objective.betaa': 1.0}, 'b': {'sed': 1}}"), "'sed'"),
    (start + runs.format("{'Beta_1': {'seed': 1}}"), "run 'Beta_1': expected small"),
  ):
    (tmp_path / "sweep.py").write_text(text)
    assert sweep.main([str(tmp_path / "sweep.py"), "--workdir", "x"]) == 2
    assert said in capsys.readouterr().err


# Here, with a stand-in for lpo_jax.main that says how each call ends: what is tested is
# the order, what is left out, and the exit code.

FAKE = """
import pathlib, sys, time
folder = pathlib.Path(__file__).parent
run = sys.argv[sys.argv.index("--workdir") + 1].rsplit("/")[-1]
(folder / "calls").open("a").write(run + "\\n")
answer = (folder / run).read_text() if (folder / run).exists() else "0"
if answer == "wait":
  import signal
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
  (folder / "waiting").touch()
  time.sleep(60)
sys.exit(int(answer))
"""
COMMANDS = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("sweep", sys.argv[1])
sweep = importlib.util.module_from_spec(spec)
sys.modules["sweep"] = sweep
spec.loader.exec_module(sweep)
folder = pathlib.Path(sys.argv[2])
fake = str(folder / "fake.py")
commands = [
  sweep.Command(run, ("python", fake, "--workdir", f"x/{run}")) for run in sys.argv[3:]
]
sys.exit(sweep.run_here(commands, folder / "workdir"))
"""


def here(folder, *runs):
  (folder / "fake.py").write_text(FAKE)
  words = [sys.executable, "-c", COMMANDS, str(ROOT / "launch" / "sweep.py"), folder]
  return subprocess.Popen([*map(str, words), *runs], stderr=subprocess.PIPE, text=True)


def calls(folder):
  return (folder / "calls").read_text().split()


def test_a_run_that_fails_does_not_end_the_others(tmp_path):
  (tmp_path / "b").write_text("2")
  process = here(tmp_path, "shared", "a", "b", "c")
  assert process.wait(60) == 2 and "b failed with exit code 2" in process.stderr.read()
  assert calls(tmp_path) == ["shared", "a", "b", "c"]
  (tmp_path / "b").write_text("0")  # mended: the rest is not done again
  assert here(tmp_path, "shared", "a", "b", "c").wait(60) == 0
  assert calls(tmp_path) == ["shared", "a", "b", "c", "b"]


def test_nothing_runs_without_what_the_runs_share(tmp_path):
  (tmp_path / "shared").write_text("2")
  assert here(tmp_path, "shared", "a").wait(60) == 2
  assert calls(tmp_path) == ["shared"]


def test_a_signal_stops_the_sweep_and_it_goes_on(tmp_path):
  (tmp_path / "b").write_text("wait")
  process = here(tmp_path, "a", "b", "c")
  deadline = time.monotonic() + 60
  while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 3 and calls(tmp_path) == ["a", "b"]
  (tmp_path / "b").write_text("0")
  assert here(tmp_path, "a", "b", "c").wait(60) == 0
  assert calls(tmp_path) == ["a", "b", "b", "c"]


# The comparison.


def write_run(folder, *, acc, rate=None):
  folder.mkdir(parents=True)
  rows = [
    {
      "step": step,
      "loss": 0.7,
      "implicit_acc": value,
      "margin": (value or 0.0) / 2,
      "drift": 1e-3,
    }
    for step, value in enumerate(acc, 1)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "metrics.jsonl").write_text(text)
  if rate is not None:
    row = {"candidate": "lpo", "baseline": "base", "scorer": "taste", "n": 4, "ties": 0}
    row |= {"win_rate": rate, "ci_low": rate - 0.1, "ci_high": rate + 0.1}
    (folder / "summary.json").write_text(json.dumps([row]))


def test_the_table_and_the_plot(tmp_path):
  write_run(tmp_path / "low", acc=[0.5] * 18 + [0.6, 0.8], rate=0.75)
  write_run(tmp_path / "high", acc=[0.5, None])
  (tmp_path / "failed").mkdir()
  settings = {
    "low": {"objective.beta": 1.0},
    "high": {"objective.beta": 9.0},
    "failed": {"objective.beta": 99.0},
  }
  rows = sweep_report.write(tmp_path, settings)
  assert [row["run"] for row in rows] == ["low", "high"]
  assert json.loads((tmp_path / "comparison.json").read_text()) == rows
  low, high = rows
  # The last tenth of 20 updates is two.
  assert math.isclose(low["implicit_acc"], 0.7) and math.isclose(low["margin"], 0.35)
  assert low["step"] == 20 and high["implicit_acc"] == 0.5
  assert low["taste, win rate over base"]["win_rate"] == 0.75
  table = (tmp_path / "comparison.md").read_text().splitlines()
  assert table[4].startswith("| run | objective.beta | step | loss | implicit_acc |")
  assert table[6].startswith("| low | 1 | 20 | 0.7 | 0.7 | 0.35 | 0.001 | – |")
  assert table[6].endswith("| 0.750 (0.650 to 0.850) |") and table[7].endswith("| – |")
  assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_several_methods_is_several_lines(tmp_path):
  write_run(tmp_path / "a" / "lpo", acc=[0.5])
  write_run(tmp_path / "a" / "dpo", acc=[0.6])
  summary = [{"candidate": "dpo", "scorer": "taste", "baseline": "base"}]
  (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
  dpo, lpo = sweep_report.read_runs(tmp_path, ["a"])
  assert (dpo.name, lpo.name) == ("a dpo", "a lpo")
  assert dpo.comparisons == summary and not lpo.comparisons


def test_no_run_no_table(tmp_path):
  assert sweep_report.write(tmp_path, {"a": {}}) == []
  assert not list(tmp_path.iterdir())


@pytest.mark.slow  # two processes that compile
def test_a_sweep_from_end_to_end(sweep, tiny_cache, tmp_path):
  """Two short runs in the tiny world, then their table; done again, nothing runs."""
  text = tiny_cache.config.read_text("utf-8")
  text += (
    "\n\ndef get_sweep(arg=''):\n  runs = {'weak': {'objective.beta': 1.0}, "
    "'strong': {'objective.beta': 2000.0}}\n"
    "  return {'shared': (), 'each': ('train',), 'runs': runs}\n"
  )
  (tmp_path / "tiny_sweep.py").write_text(text)
  words = [sys.executable, str(ROOT / "launch" / "sweep.py")]
  words += [str(tmp_path / "tiny_sweep.py"), "--workdir", str(tmp_path / "out")]
  words += [f"--config.data.cache={tiny_cache.cache}", "--config.train.total_steps=2"]
  done = subprocess.run(words, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
  assert [(row["run"], row["objective.beta"], row["step"]) for row in rows] == [
    ("weak", 1.0, 2),
    ("strong", 2000.0, 2),
  ]
  assert str(tmp_path / "out" / "comparison.png") in done.stdout
  again = subprocess.run(words, capture_output=True, text=True, timeout=300)
  assert again.returncode == 0 and again.stdout.count("is done already") == 2
