"""The wheel that the launchers install: all that a run needs, from anywhere."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow  # pip makes an environment to build in, from the index
def test_the_wheel_has_configs_and_assets_and_runs(tmp_path):
  left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__")
  shutil.copytree(ROOT, tmp_path / "clone", symlinks=True, ignore=left_out)
  words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
  words += ["--wheel-dir", str(tmp_path), str(tmp_path / "clone")]
  subprocess.run(words, check=True, timeout=600)
  (wheel,) = tmp_path.glob("lpo_jax-*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    archive.extractall(tmp_path / "installed")
  configs = {f"lpo_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
  assets = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "lpo_jax" / "assets").rglob("*")
    if path.is_file()
  }
  pages = {f"lpo_jax/pages/{path.name}" for path in ROOT.glob("lpo_jax/pages/*.j2")}
  assert configs and assets and pages
  assert names >= configs | assets | pages
  # As tpu_vm.sh starts it: a shipped config by its name, in a folder that is no clone.
  door = [sys.executable, "-m", "lpo_jax.main", "--job=doctor"]
  done = subprocess.run(
    [*door, "--config=quickstart.py:smoke", f"--workdir={tmp_path / 'run'}"],
    cwd=tmp_path,
    env={"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
