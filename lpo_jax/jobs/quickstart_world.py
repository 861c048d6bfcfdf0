"""What a quickstart's world is made of, and what all worlds do alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.errors import UserError
from lpo_jax.jobs import candidates as candidate_kinds
from lpo_jax.jobs import sampling
from lpo_jax.types import Prompt

SHIPPED_BASE = pathlib.Path(__file__).parents[1] / "assets" / "digits_base"


@dataclasses.dataclass(frozen=True)
class World:
  """What one quickstart does differently from another; the stages are the same.

  Attributes:
    base: (config, workdir, stages) -> the folder of the base pipeline. One that takes
      work announces stages of its own, after `run_identity.remember_config`.
    judge: (config, workdir) -> the file of what people said; may set keys of the config.
    candidates: (base, runs, workdir) -> name -> location, for the evaluation.
    write: writes the report; see `quickstart_report.write`.
  """

  base: Callable[[ml_collections.ConfigDict, pathlib.Path, Stages], pathlib.Path]
  judge: Callable[[ml_collections.ConfigDict, pathlib.Path], pathlib.Path]
  candidates: Callable[
    [pathlib.Path, dict[str, Any], pathlib.Path], ml_collections.ConfigDict
  ]
  write: Callable[..., None]


class Stages:
  """Times the stages and remembers the times over restarts.

  Several processes may share the file, as those of an ablation do that have a seed each.
  """

  def __init__(self, workdir: pathlib.Path):
    self._file = workdir / "timings.json"
    self.seconds: dict[str, float] = self._read()

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Announces a stage, times it, and adds to what earlier sessions spent on it."""
    console.say(f"\n== {name}")
    began = time.monotonic()
    yield
    spent = time.monotonic() - began
    self.seconds |= self._read()
    self.seconds[name] = self.seconds.get(name, 0.0) + spent
    if parallel.is_main_process():
      partial = self._file.with_suffix(f".{os.getpid()}")
      partial.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")
      partial.replace(self._file)

  def _read(self) -> dict[str, float]:
    return json.loads(self._file.read_text("utf-8")) if self._file.exists() else {}


def base_folder(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns the base pipeline: the config's, or the one that ships."""
  if config.model.path:
    return pathlib.Path(config.model.path)
  if not SHIPPED_BASE.is_dir():
    raise UserError(
      f"the base model that ships with lpo_jax is missing at {SHIPPED_BASE}; make it "
      "with: python -m lpo_jax.main --config configs/quickstart_base.py --workdir "
      "runs/quickstart_base, and give its folder as --config.model.path."
    )
  console.say(
    f"base model: the one that ships ({SHIPPED_BASE}); it was made from real digits by "
    "configs/quickstart_base.py, which can make it again (see its README.md)"
  )
  return SHIPPED_BASE


def draw_candidates(
  config: ml_collections.ConfigDict, rows: Sequence[Prompt]
) -> np.ndarray:
  """Draws what people will see with the model of `model.path`, [n, H, W, 3] uint8."""
  # Seeds far from those of the evaluation, which start at eval.first_seed.
  seeds = [1_000_000 * (1 + config.seed) + i for i in range(len(rows))]
  mesh = parallel.mesh_of(config.mesh)
  generator = sampling.make_generator(config, mesh)
  progress = console.Progress("drawing candidates", len(rows), "images")
  params, _ = candidate_kinds.load_params(config.model.path, mesh)
  return sampling.draw(generator, params, rows, seeds, on_progress=progress.update)
