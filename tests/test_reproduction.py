"""Every config in configs/repro_*.py trains, at a size that a test has time for.

The first preset of each in CI; the others, which compile the step again for another
learning rate or warm-up, with `pytest tests/test_reproduction.py -m slow`.
"""

import importlib.util
import math
import pathlib

import jax
import pytest

from lpo_jax import main
from lpo_jax.training.report import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
# Loss before the first update, where policy and reference are the same network. MaPO has
# no reference, and of lists there are shorter and longer ones.
BEGINS_AT = {"dpo": math.log(2), "kto": 0.5, "dro": 0.001}
# What is made smaller; all else is the preset's.
SIZES = (
  "data.resolution=32",
  "train.images_per_update=8",
  "train.microbatch=0",
  "train.total_steps=2",
  "train.checkpoint_every=2",
)
ROLLOUTS = ("online.steps=2", "online.rollouts_per_update=4", "online.buffer_size=4")


def presets():
  """Every preset of every config that reproduces something."""
  for file in sorted((ROOT / "configs").glob("repro_*.py")):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for place, name in enumerate(getattr(module, "PRESETS", ("",))):
      location = f"{file.name}:{name}" if name else file.name
      yield pytest.param(location, marks=[pytest.mark.slow] * bool(place))


@pytest.fixture
def quick_compiler():
  """Less work for the compiler, which is what this test takes time for."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def experts(tiny_world, tmp_path_factory):
  """The tiny world's nine images that won most."""
  folder = tmp_path_factory.mktemp("experts")
  chosen = tiny_world.run(
    folder, "select.by=wins", "select.count=9", f"select.path={folder}/experts.parquet",
    job="select",
  )  # fmt: skip
  assert chosen.code == 0, chosen.text
  return folder / "experts.parquet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Of the caches, which the presets share."""
  return tmp_path_factory.mktemp("caches")


@pytest.mark.parametrize("preset", list(presets()))
def test_two_updates(
  preset, tiny_world, experts, folder, front_door, quick_compiler, tmp_path
):
  location = f"{ROOT}/configs/{preset}"
  objective = main.load_config(location).objective.name
  online = objective == "dro"
  overrides = [
    f"model.path={tiny_world.pipeline}",
    f"data.path={experts if online else tiny_world.parquet}",
    f"data.cache={folder / ('experts' if online else 'judgements')}",
    *SIZES,
    *(ROLLOUTS if online else ()),
  ]
  for job in ("cache", "train"):
    outcome = front_door(
      f"--config={location}",
      f"--workdir={tmp_path}",
      f"--job={job}",
      *(f"--config.{override}" for override in overrides),
    )
    assert outcome.code == 0, outcome.text
  first, last = read_metrics(tmp_path / "metrics.jsonl")
  assert last["step"] == 2
  assert math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"])
  assert last["update_norm"] > 0
  if objective in BEGINS_AT:
    assert first["loss"] == pytest.approx(BEGINS_AT[objective], rel=1e-5)
