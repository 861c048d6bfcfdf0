"""One compilation cache for the whole suite, no accelerator, quiet libraries, and the
tiny world that the end-to-end tests train in."""

import contextlib
import dataclasses
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "lpo_jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

CONFIG = """
from lpo_jax.configs import common


def get_config(arg=""):
  config = common.get_config()
  config.model.path = {pipeline!r}
  config.model.dtype = "float32"
  config.data.path = {parquet!r}
  config.data.resolution = 32
  config.objective.beta = 500.0
  config.train.images_per_update = 16
  config.train.total_steps = 5
  config.train.learning_rate = 1e-4
  config.train.warmup_steps = 2
  config.train.ema = 0.9
  config.train.checkpoint_every = 5
  config.logging.report = ""  # drawn where it is looked at: tests/jobs/test_run_report.py
  return config
"""
# Compiling is what these tests take time for.
SMALLEST_UNET = {
  "block_out_channels": (32,),
  "down_block_types": ("CrossAttnDownBlock2D",),
  "mid_block_type": "UNetMidBlock2D",
  "up_block_types": ("UpBlock2D",),
  "cross_attention_dim": 16,
}
LIST_SIZES = (2, 3, 4, 5) * 3


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a command gave.

  Attributes:
    code: its exit code.
    text: what it printed, to stdout and then to stderr.
  """

  code: int
  text: str


@dataclasses.dataclass(frozen=True)
class World:
  """A tiny pipeline, tiny judgements, and the commands that train on them.

  Attributes:
    folder: where everything is.
    pipeline: a diffusers folder with random weights.
    parquet: judgements in Pick-a-Pic's columns, on 42 random images in 12 lists.
    config: the config file.
    judgements: the columns in that file, as `sources.write_pickapic` takes them.
  """

  folder: pathlib.Path
  pipeline: pathlib.Path
  parquet: pathlib.Path
  config: pathlib.Path
  judgements: dict[str, list]

  @property
  def cache(self) -> pathlib.Path:
    """The encoded images; made by the fixture `tiny_cache`."""
    return self.folder / "cache"

  def arguments(self, workdir, *overrides: str, job: str = "train") -> list[str]:
    """The command line behind `python -m lpo_jax.main`; data.cache is the shared one."""
    return [
      f"--config={self.config}",
      f"--workdir={workdir}",
      f"--job={job}",
      f"--config.data.cache={self.cache}",
      *(f"--config.{override}" for override in overrides),
    ]

  def environment(self, devices: int = 1, **more: str) -> dict[str, str]:
    """What a process of its own is started with: so many pretended devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, **more}

  def run(self, workdir, *overrides: str, job: str = "train") -> Outcome:
    """Runs a job through the front door, in this process."""
    return call_main(*self.arguments(workdir, *overrides, job=job))


def call_main(*arguments: str) -> Outcome:
  """Calls `main` in this process; argparse' own exit counts as an exit code."""
  from lpo_jax import main

  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      code = main.main(arguments)
    except SystemExit as e:
      code = e.code
  return Outcome(code, out.getvalue() + err.getvalue())


def noise_png(seed: int, size: int = 32) -> bytes:
  """A random picture, encoded."""
  import numpy as np
  from PIL import Image

  pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "PNG")
  return stream.getvalue()


def judgements(sizes=LIST_SIZES) -> dict[str, list]:
  """Columns of one chain of wins per prompt; every third chain ends in a tie."""
  rows = {"caption": [], "image_0_uid": [], "image_1_uid": [], "label_0": []}
  for prompt, size in enumerate(sizes):
    for place in range(size - 1):
      rows["caption"].append(f"picture number {prompt}")
      rows["image_0_uid"].append(f"{prompt}-{place}")
      rows["image_1_uid"].append(f"{prompt}-{place + 1}")
      tie = prompt % 3 == 2 and place and place == size - 2
      rows["label_0"].append(0.5 if tie else 1.0)
  uids = sorted({*rows["image_0_uid"], *rows["image_1_uid"]})
  images = {uid: noise_png(i) for i, uid in enumerate(uids)}
  for side in (0, 1):
    rows[f"jpg_{side}"] = [images[uid] for uid in rows[f"image_{side}_uid"]]
  return rows


@pytest.fixture(scope="session")
def front_door():
  """Calls `main` in this process with a whole command line."""
  return call_main


def make_world(folder: pathlib.Path) -> World:
  """Writes a tiny pipeline, judgements and a config; nothing is encoded yet."""
  from lpo_jax.configs import quickstart_base
  from lpo_jax.data import sources
  from lpo_jax.jobs import quickstart_base as base_job

  world = World(
    folder=folder,
    pipeline=folder / "pipeline",
    parquet=folder / "judgements.parquet",
    config=folder / "tiny.py",
    judgements=judgements(),
  )
  networks = {name: dict(fields) for name, fields in quickstart_base.NETWORKS.items()}
  networks["unet"] |= SMALLEST_UNET
  networks["vae"]["block_out_channels"] = (8, 16, 16)
  networks["text_encoder"] |= {"hidden_size": 16, "intermediate_size": 32}
  base_job.write_blank_pipeline(world.pipeline, networks, seed=0)
  sources.write_pickapic(world.parquet, **world.judgements)
  world.config.write_text(
    CONFIG.format(pipeline=str(world.pipeline), parquet=str(world.parquet)), "utf-8"
  )
  return world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> World:
  """The tiny world, with nothing encoded yet."""
  return make_world(tmp_path_factory.mktemp("tiny_world"))


@pytest.fixture(scope="session")
def tiny_cache(tiny_world) -> World:
  """The tiny world with its images and prompts encoded."""
  outcome = tiny_world.run(tiny_world.folder / "cache_run", job="cache")
  assert outcome.code == 0, outcome.text
  return tiny_world


@pytest.fixture(scope="session")
def on_devices():
  """Runs Python source in a process that sees several devices.

  on_devices(8, source, *arguments) -> what it printed; fails with what it complained of.
  """

  def run(count, source, *arguments):
    flags = f"--xla_force_host_platform_device_count={count}"
    done = subprocess.run(
      [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
      cwd=pathlib.Path(__file__).resolve().parents[1],
      env={**os.environ, "XLA_FLAGS": flags},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout

  return run
