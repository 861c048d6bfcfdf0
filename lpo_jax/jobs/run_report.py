"""report.html of a training run, read from what lies in its workdir."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import pathlib
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lpo_jax import __version__, console, parallel
from lpo_jax.data import cache, manifest
from lpo_jax.data import prompts as prompt_sets
from lpo_jax.errors import StoppedEarly
from lpo_jax.jobs import cache_places, run_identity
from lpo_jax.jobs.sampling import PROMPTS_SHOWN
from lpo_jax.pages import Headline, RunReport, Sample, duration, number
from lpo_jax.pages import write_run_report as write_page
from lpo_jax.training.report import read_metrics

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SAMPLES_SHOWN, ALARMS_SHOWN = 8, 10
THUMBNAIL = (320, 1600)  # at most so wide and high; a column of samples is high
PIXELS = 96  # images this narrow are shown as squares
MEGABYTE = 1_000_000
# What a plain evaluation needs, where a config names nothing.
EVALUATION = ("eval.prompts=partiprompts", "eval.scorers=pickscore")


@contextlib.contextmanager
def afterwards(workdir: pathlib.Path) -> Iterator[None]:
  """Writes the report when what is inside is done, or has stopped resumably."""
  try:
    yield
  except StoppedEarly:
    refresh(workdir)
    raise
  refresh(workdir)


def refresh(workdir: pathlib.Path) -> None:
  """Writes the report if the workdir is a training run's that asks for one.

  A page that cannot be made is no reason for a run to fail: it is warned of.
  """
  workdir = pathlib.Path(workdir)
  if not parallel.is_main_process() or not (workdir / "metrics.jsonl").exists():
    return
  try:
    if run_identity.recorded(workdir).logging.report:
      write(workdir)
  except Exception as e:  # whatever it is, the run itself is done and saved
    console.warn(f"no report of {workdir}: {type(e).__name__}: {e}")


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Writes the page of the run in `workdir`; returns its path.

  Raises:
    UserError: the workdir holds no run.
  """
  workdir = pathlib.Path(workdir)
  page = workdir / run_identity.recorded(workdir).logging.report
  write_page(page, describe(workdir))
  return page


def describe(workdir: pathlib.Path) -> RunReport:
  """Collects what the page shows; what is not there is left out."""
  from lpo_jax.configs import common

  config = run_identity.recorded(workdir)
  rows = read_metrics(workdir / "metrics.jsonl")
  name = config.objective.name
  saved = saved_steps(workdir)
  step = max([*saved, 0])
  images = samples(workdir)
  comparisons = evaluation(workdir)
  figures, lengths = data_account(config, workdir)
  files = {path: what for path, what in FILES.items() if (workdir / path).exists()}
  return RunReport(
    title=f"{name} on {pathlib.PurePath(config.data.path).name or 'a mixture'}",
    summary=summary(config, rows, step),
    headlines=headlines(config, rows, step),
    samples=images,
    samples_of=sample_prompts(config) if images else (),
    win_rates=comparisons,
    scorers=measures(comparisons),
    training={name: rows},
    data=figures,
    list_lengths=lengths,
    checkpoints=checkpoints(config, workdir, saved),
    notes=notes(workdir, comparisons),
    commands=commands(config, workdir, step),
    config=run_identity.plain(config),
    defaults=run_identity.plain(common.get_config()),
    versions=versions(),
    files=files,
    links=[path for path in files if path.endswith((".html", ".json", ".jsonl"))],
  )


FILES = {
  "checkpoints/": "weights, optimizer, place in the data",
  "metrics.jsonl": "every row of the curves",
  "tensorboard/": "the same for TensorBoard",
  "samples/": "what was drawn while it trained, full size",
  "config.json": "the resolved config; --config takes it too",
  "rollbacks.jsonl": "when and why the run went back",
  "alarms.jsonl": "what looked wrong, and when",
  "evaluation/gallery.html": "every image of the evaluation, side by side",
  "summary.json": "every figure of the evaluation",
  "export/": "the trained pipeline, a diffusers folder",
  "lora/": "the trained factors",
}


def mean_of_last(
  rows: Sequence[Mapping[str, Any]], metric: str, share: float = 0.1
) -> float | None:
  """The mean of a metric over the last part of the rows that have it.

  >>> mean_of_last([{"loss": 4.0}, {"loss": 2.0}, {"loss": 1.0}], "loss", share=0.67)
  1.5
  """
  values = [row[metric] for row in rows if row.get(metric) is not None]
  count = max(1, round(share * len(values)))
  return float(np.mean(values[-count:])) if values else None


def summary(config: Any, rows: Sequence[Mapping[str, Any]], step: int) -> str:
  """What the run is and how far it came, in plain words."""
  train = config.train
  state = "finished" if step >= train.total_steps else "stopped, and can go on"
  said = (
    f"{config.model.path} fine-tuned by {config.objective.name}: {number(step)} of "
    f"{number(train.total_steps)} updates of {train.images_per_update} images, {state}."
  )
  clock = [row["time"] for row in rows if row.get("time")]
  if len(clock) > 1:
    said += f" From the first row to the last {duration(clock[-1] - clock[0])} passed."
  return said


def headlines(
  config: Any, rows: Sequence[Mapping[str, Any]], step: int
) -> list[Headline]:
  """The few figures to see first."""
  total = config.train.total_steps
  shown = [Headline("Updates", number(step), f"of {number(total)}")]
  words = {"loss": "Loss", "implicit_acc": "Implicit accuracy", "drift": "Drift"}
  for metric, label in words.items():
    value, first = mean_of_last(rows, metric), mean_of_last(rows[:1], metric)
    if value is not None:
      began = f"; began at {number(first)}" if first is not None else ""
      shown.append(Headline(label, value, f"mean of the last tenth{began}"))
  return shown


def samples(workdir: pathlib.Path) -> list[Sample]:
  """Some of samples/, evenly over the run with the first and the last, as thumbnails."""
  files = sorted((workdir / "samples").glob("step_*.png"))
  if len(files) > SAMPLES_SHOWN:
    chosen = np.linspace(0, len(files) - 1, SAMPLES_SHOWN).round().astype(int)
    files = [files[i] for i in chosen]
  return [_thumbnail(file) for file in files]


def _thumbnail(file: pathlib.Path) -> Sample:
  from PIL import Image

  label = f"step {number(int(file.stem.removeprefix('step_')))}"
  with Image.open(file) as opened:
    if opened.width <= PIXELS:
      return Sample(label, file.read_bytes(), pixelated=True)
    image = opened.convert("RGB")
  image.thumbnail(THUMBNAIL)
  stream = io.BytesIO()
  image.save(stream, "JPEG", quality=82, optimize=True)
  return Sample(label, stream.getvalue())


def sample_prompts(config: Any) -> list[str]:
  """The prompts of samples/, where they can be read without asking anyone."""
  given = config.eval.prompts
  if not isinstance(given, list | tuple) and not pathlib.Path(str(given)).is_file():
    return []
  return list(prompt_sets.read(given))[:PROMPTS_SHOWN]


def evaluation(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of summary.json; protocols beyond the first are named with the scorer."""
  file = workdir / "summary.json"
  rows = json.loads(file.read_text("utf-8")) if file.exists() else []
  protocols = list(dict.fromkeys(row.get("protocol", "") for row in rows))
  for row in rows:
    if row.get("protocol", "") != protocols[0]:
      row["scorer"] = f"{row['scorer']}, {row['protocol']}"
  return rows


def measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """scorer -> what its numbers are."""
  return {row["scorer"]: f"{row.get('scorer_scale', '')}" for row in rows}


def data_account(
  config: Any, workdir: pathlib.Path
) -> tuple[dict[str, Any], dict[int, int]]:
  """What the caches say of the lists: name -> value, and length -> lists."""
  figures: dict[str, Any] = {}
  lengths: dict[int, int] = {}
  for place in cache_places.places(config, workdir):
    if place.folder is None or manifest.read(place.folder) is None:
      continue
    key = cache.lists_key(cache_places.list_settings(place.config))
    if key not in cache.known_lists(place.folder):
      continue
    described = cache.lists_manifest(place.folder, key)
    before = f"{place.name}: " if place.name else ""
    counts = manifest.read(place.folder)["counts"]
    for name, value in _account(described, counts).items():
      figures[before + name] = value
    for size, count in described["report"]["lengths"].items():
      lengths[int(size)] = lengths.get(int(size), 0) + count
  return figures, lengths


def _account(described: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
  """One cache in words; what was not lost is not mentioned."""
  report, lost = described["report"], described["lost"]
  figures = {
    "judgements": report["judgements_total"],
    "of them in lists": report["judgements_used"],
    "ties": report["ties"],
    "lists": described["lists"],
    "images in them": described["items"],
    "strategy": described["settings"]["strategy"],
    "images encoded": counts["images"],
    "prompts encoded": counts["prompts"],
  }
  gone = {f"judgements not used: {why}": n for why, n in report["dropped"].items()}
  gone |= {f"lists not used: {why}": n for why, n in report["lists_dropped"].items()}
  gone = {what.replace("_", " "): n for what, n in gone.items()}
  gone["bad images"] = counts["bad_images"]
  for what, n in lost.items():
    gone[f"lost to bad images: {what.replace('_', ' ')}"] = n
  return figures | {what: n for what, n in gone.items() if n}


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of which there are checkpoints, ascending.

  Their names are read: Orbax itself waits for the other hosts, which are gone by now.
  """
  found = (workdir / "checkpoints").glob("*/_CHECKPOINT_METADATA")
  return sorted(int(one.parent.name) for one in found if one.parent.name.isdigit())


def checkpoints(
  config: Any, workdir: pathlib.Path, steps: Sequence[int]
) -> list[dict[str, Any]]:
  """Every saved step with its size, the newest first."""
  every = config.train.keep_every
  rows = []
  for step in sorted(steps, reverse=True):
    files = (workdir / "checkpoints" / str(step)).rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    what = "the newest" if step == max(steps) else ""
    if every and step % every == 0:
      what = f"{what}, kept for good".lstrip(", ")
    rows.append({"step": step, "megabytes": size / MEGABYTE, "what": what})
  return rows


def notes(workdir: pathlib.Path, comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
  """What a careful reader should know."""
  said = [
    "Curves are of training batches: each point is another batch, at other timesteps. "
    "Win rates over held-out prompts say whether images got better; these do not."
  ]
  if not comparisons:
    said.append("There is no evaluation in this workdir yet.")
  file = workdir / "rollbacks.jsonl"
  for row in read_metrics(file) if file.exists() else ():
    said.append(
      f"Rollback {row['rollback']}: {row['words']}; back to step {row['to_step']}, the "
      f"learning rate times {row['lr_scale']:g}."
    )
  file = workdir / "alarms.jsonl"
  alarms = read_metrics(file) if file.exists() else []
  said += [f"Alarm: {row['words']}" for row in alarms[:ALARMS_SHOWN]]
  if len(alarms) > ALARMS_SHOWN:
    said.append(f"{len(alarms) - ALARMS_SHOWN} more alarms are in alarms.jsonl.")
  return said


def commands(config: Any, workdir: pathlib.Path, step: int) -> dict[str, str]:
  """what for -> a command that can be pasted."""

  def job(*more: str) -> str:
    at = str(workdir)
    front = ("python", "-m", "lpo_jax.main", "--config", f"{at}/config.json")
    return shlex.join([*front, "--workdir", at, *more])

  total = config.train.total_steps
  if step < total:
    found = {f"Go on to step {number(total)}": job("--job", "train")}
  else:
    longer = f"--config.train.total_steps={2 * total}"
    found = {"Train for longer": job("--job", "train", longer)}
  ev = config.eval
  missing = [
    f"--config.{key}"
    for key in EVALUATION
    if not ev[key.partition("=")[0].partition(".")[2]]
  ]
  found["Compare with the base model"] = job("--job", "evaluate", *missing)
  found["Export for diffusers"] = job("--job", "export")
  found["Curves in TensorBoard"] = shlex.join(
    ["tensorboard", "--logdir", str(workdir / "tensorboard")]
  )
  return found


def versions() -> dict[str, str]:
  """What is installed now."""
  found = {"lpo_jax": __version__, "python": platform.python_version()}
  return found | {name: importlib.metadata.version(name) for name in PACKAGES}
