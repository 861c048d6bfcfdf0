"""The evaluate job: the same prompts and seeds through every candidate, then scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from lpo_jax import console, parallel, pretrained
from lpo_jax.data import prompts as prompt_sets
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.generation import Generator
from lpo_jax.jobs import adapters, blueprint, run_identity, sampling
from lpo_jax.pretrained import lora as lora_files
from lpo_jax.scoring import scorers, win_rate

# What decides the pixels besides the weights; a change draws everything again.
DRAWING_KEYS = (
  *("sampler", "steps", "guidance_scale", "eta", "sigmas", "seeds", "first_seed"),
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What came out, in the order of the (prompt, seed) pairs.

  Attributes:
    prompts: [n] texts.
    seeds: [n] ints.
    images: candidate -> [n, H, W, 3] uint8.
    scores: candidate -> scorer -> [n].
    rows: of summary.json.
  """

  prompts: list[str]
  seeds: list[int]
  images: Mapping[str, np.ndarray]
  scores: Mapping[str, Mapping[str, np.ndarray]]
  rows: list[dict[str, Any]]


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Evaluation:
  """Draws, scores and compares; writes workdir/evaluation/ and summary.json.

  Args:
    config: `eval` and `model` are read. Without candidates: the base model against
      this workdir's own run.
    workdir: gets evaluation/<candidate>/*.png, per_image.parquet, summary.json and
      summary.md.

  Raises:
    UserError: unknown scorer, sampler or candidate, no prompts, nothing to compare.
  """
  workdir, ev = pathlib.Path(workdir), config.eval
  judges = [scorers.get(name) for name in ev.scorers]
  if not judges:
    raise UserError(
      f"eval.scorers is empty: expected some of {', '.join(scorers.SCORERS)}."
    )
  candidates = dict(ev.candidates) or {
    "base": config.model.path,
    config.objective.name: str(workdir),
  }
  if ev.baseline not in candidates:
    raise unknown_name("eval.baseline", ev.baseline, candidates)
  if not ev.prompts:
    raise UserError(
      "eval.prompts is empty: expected a prompt file or a tuple of texts."
    )
  texts = prompt_sets.read(ev.prompts)
  prompts = [text for text in texts for _ in range(ev.seeds)]
  seeds = [ev.first_seed + s for _ in texts for s in range(ev.seeds)]

  mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
  generator = sampling.make_generator(config, mesh)
  images = {}
  for name, location in candidates.items():
    folder = workdir / "evaluation" / name
    images[name] = draw(config, generator, mesh, name, location, folder, prompts, seeds)
  scores = {
    name: {judge.name: judge(drawn, prompts) for judge in judges}
    for name, drawn in images.items()
  }
  rows = win_rate.rows(scores, comparisons(list(candidates), ev.baseline), prompts,
                       seeds=seeds)  # fmt: skip
  if parallel.is_main_process():
    write_results(workdir, prompts, seeds, scores, rows)
    console.say(win_rate.markdown_table(rows))
  return Evaluation(prompts, seeds, images, scores, rows)


def comparisons(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
  """Everyone against the baseline, then the others head to head, later against earlier.

  >>> comparisons(["base", "dpo", "lpo"], "base")
  [('dpo', 'base'), ('lpo', 'base'), ('lpo', 'dpo')]
  """
  others = [name for name in names if name != baseline]
  head_to_head = [(b, a) for i, a in enumerate(others) for b in others[i + 1 :]]
  return [(name, baseline) for name in others] + head_to_head


def candidate_params(
  location: str, mesh: jax.sharding.Mesh, base_folder: str = ""
) -> tuple[Any, str]:
  """Loads a candidate's UNet: a run's workdir, a diffusers folder, or a LoRA file.

  Args:
    location: a folder or file; of a run, `folder@STEP` picks a checkpoint, else the
      latest.
    mesh: where to put the parameters.
    base_folder: the pipeline that a LoRA file is added to.

  Returns:
    The parameters as global arrays, and words that identify them.
  """
  folder, at, wanted = location.rpartition("@")
  step = int(wanted) if at and wanted.isdigit() else None
  folder = pathlib.Path(location if step is None else folder)
  if (folder / "checkpoints").is_dir():
    own = run_identity.recorded(folder)
    params, step = blueprint.trained_params(own, folder, mesh, step)
    return params, f"{folder.resolve()}@{step}"
  networks = (folder / "config.json", folder / "unet" / "config.json")
  if not any(file.is_file() for file in networks) and lora_files.find(folder):
    return adapters.merged(folder, base_folder, mesh)
  part = pretrained.load(location, "unet")
  shardings = parallel.param_shardings(part.params, mesh)
  identity = pretrained.fingerprint(location, "unet")
  return parallel.put(part.params, shardings), identity


def draw(
  config: Any,
  generator: Generator,
  mesh: jax.sharding.Mesh,
  name: str,
  location: str,
  folder: pathlib.Path,
  prompts: Sequence[str],
  seeds: Sequence[int],
) -> np.ndarray:
  """Draws a candidate's images, or reads those that an earlier session drew.

  Returns:
    [n, H, W, 3] uint8.
  """
  from PIL import Image

  params, identity = candidate_params(location, mesh, config.model.path)
  settings = {key: config.eval[key] for key in DRAWING_KEYS}
  settings |= {"weights": identity, "pipeline": sampling.pipeline_identity(config)}
  settings["prompts"] = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]
  file = folder / "drawing.json"
  if parallel.is_main_process():
    if folder.exists() and _read(file) != settings:
      shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
  parallel.barrier("drawing begins")
  paths = [folder / f"{i:05d}.png" for i in range(len(prompts))]
  todo = [i for i, path in enumerate(paths) if not path.exists()]
  parallel.barrier("drawing planned")
  images = {
    i: np.asarray(Image.open(path).convert("RGB"))
    for i, path in enumerate(paths)
    if i not in set(todo)
  }
  progress = console.Progress(
    f"drawing {name}", len(prompts), "images", start=len(images)
  )
  found = len(images)
  # One batch at a time, written before the next: nothing is lost when it dies.
  for start in range(0, len(todo), generator.batch_size):
    rows = todo[start : start + generator.batch_size]
    drawn = generator(params, [prompts[i] for i in rows], [seeds[i] for i in rows])
    for i, image in zip(rows, drawn, strict=True):
      images[i] = image
      if parallel.is_main_process():
        _write_png(paths[i], image)
    progress.update(found + min(start + len(rows), len(todo)))
  return np.stack([images[i] for i in range(len(prompts))])


def _write_png(path: pathlib.Path, image: np.ndarray) -> None:
  """Writes atomically: a PNG that is there is whole."""
  from PIL import Image

  partial = path.with_suffix(".partial")
  Image.fromarray(image).save(partial, format="PNG")
  partial.replace(path)


def _read(file: pathlib.Path) -> Any:
  try:
    return json.loads(file.read_text("utf-8"))
  except (OSError, ValueError):
    return None


def write_results(
  workdir: pathlib.Path,
  prompts: Sequence[str],
  seeds: Sequence[int],
  scores: Mapping[str, Mapping[str, np.ndarray]],
  rows: Sequence[Mapping[str, Any]],
) -> None:
  """Writes per_image.parquet, summary.json and summary.md."""
  import pyarrow as pa
  from pyarrow import parquet

  columns: dict[str, Any] = {"candidate": [], "prompt": [], "seed": []}
  for name, by_scorer in scores.items():
    columns["candidate"] += [name] * len(prompts)
    columns["prompt"] += prompts
    columns["seed"] += seeds
    for scorer, values in by_scorer.items():
      columns.setdefault(scorer, []).extend(float(v) for v in values)
  parquet.write_table(pa.table(columns), workdir / "evaluation" / "per_image.parquet")
  (workdir / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
  (workdir / "evaluation" / "summary.md").write_text(
    win_rate.markdown_table(rows) + "\n", encoding="utf-8"
  )
