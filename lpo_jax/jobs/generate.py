"""The generate job: a model's own images, scored and ranked, as lists to train on.

What Syn-Pic and other AI feedback is, and the half of a round of iterated training that
is not training: draw with the last round's model, rank, train, again.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.data import list_files
from lpo_jax.data import prompts as prompt_sets
from lpo_jax.errors import StoppedEarly, UserError
from lpo_jax.jobs import candidates, sampling
from lpo_jax.jobs.quickstart_people import encode_png
from lpo_jax.jobs.stops import StopRequests
from lpo_jax.scoring import scorers
from lpo_jax.types import Prompt

# What decides the pixels besides weights, prompts and seeds.
DRAWING_KEYS = ("sampler", "steps", "guidance_scale", "eta", "sigmas")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Draws K images for each prompt and writes one ranked list per prompt.

  Args:
    config: `generate` says what is drawn and who ranks it, `eval` how it is drawn.
    workdir: gets `lists.parquet` unless `generate.path` says otherwise.

  Returns:
    The parquet file, a source `lists`.

  Raises:
    UserError: no prompts, an unknown scorer or policy, a file of other settings.
    StoppedEarly: a signal or a STOP file; prompts that are done are kept.
  """
  wanted, workdir = config.generate, pathlib.Path(workdir)
  mesh = parallel.mesh_of(config.mesh)
  paths = config.eval.get("scorer_paths", {})
  judges = scorers.chosen(wanted.scorers, paths, mesh=mesh)
  if not judges or not wanted.prompts:
    raise UserError(
      f"generate.prompts={wanted.prompts!r}, generate.scorers={wanted.scorers!r}: "
      "expected a prompt file or a tuple of texts, and some of the scorers "
      f"{', '.join(scorers.SCORERS)}."
    )
  if wanted.images_per_prompt < 1 or wanted.tie_tolerance < 0:
    raise UserError(
      f"generate.images_per_prompt={wanted.images_per_prompt}, generate.tie_tolerance="
      f"{wanted.tie_tolerance}: expected at least 1 image and 0."
    )
  rows = prompt_sets.load(wanted.prompts).rows
  prompts = list({row.key: row for row in rows}.values())
  sampling.refuse_unmet(judges, prompts)
  location = wanted.policy or config.model.path
  params, weights = candidates.load_params(location, mesh)
  settings = {key: config.eval[key] for key in DRAWING_KEYS}
  settings |= {"weights": weights, "pipeline": sampling.pipeline_identity(config)}
  settings |= {
    "images_per_prompt": wanted.images_per_prompt,
    "first_seed": wanted.first_seed,
    "tie_tolerance": wanted.tie_tolerance,
    "scorers": list(wanted.scorers),
    "prompts": hashlib.sha256("\0".join(p.text for p in prompts).encode()).hexdigest()[
      :16
    ],
  }
  settings |= sampling.decided_by(config, prompts)
  read = {j.name: j.identity for j in judges if not isinstance(j, scorers.Formula)}
  if read:
    settings["scorer_weights"] = read
  path = pathlib.Path(wanted.path or workdir / "lists.parquet")
  if is_done(path, settings):
    console.say(f"lists are there: {path}")
    return path
  generator = sampling.make_generator(config, mesh)
  people = sampling.people_of(config)
  size = max(generator.batch_size // wanted.images_per_prompt, 1)
  parts = {
    start: path.with_suffix(".parts") / f"{start:08d}.parquet"
    for start in range(0, len(prompts), size)
  }
  begin(path, settings, size)
  todo = [start for start, part in parts.items() if not part.exists()]
  parallel.barrier("lists planned")
  done = len(prompts) - sum(len(prompts[start : start + size]) for start in todo)
  progress = console.Progress("drawing lists", len(prompts), "prompts", start=done)
  stop = StopRequests(workdir, max_minutes=0, began=time.monotonic())
  with stop:
    for count, start in enumerate(todo):
      reason = stop.reason(count)
      if reason:
        stop.forget()
        raise StoppedEarly(
          f"{reason}: {done} of {len(prompts)} prompts are done. The same command goes "
          "on from there."
        )
      chosen = prompts[start : start + size]
      seeds = range(wanted.first_seed, wanted.first_seed + wanted.images_per_prompt)
      asked = [row for row in chosen for _ in seeds]
      texts = [row.text for row in asked]
      images = sampling.draw(
        generator,
        params,
        asked,
        [*seeds] * len(chosen),
        people=people,
      )
      scores = {
        judge.name: judge(images, texts, **sampling.told(judge, asked, images.shape[1]))
        for judge in judges
      }
      if parallel.is_main_process():
        write_part(parts[start], config, settings, chosen, seeds, images, scores)
      done += len(chosen)
      progress.update(done)
  parallel.barrier("lists drawn")
  if parallel.is_main_process():
    list_files.join(list(parts.values()), path)
    _settings_file(path).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    shutil.rmtree(path.with_suffix(".parts"))
  parallel.barrier("lists written")
  console.say(
    f"{len(prompts)} lists of {wanted.images_per_prompt} images by {location}, ranked by "
    f"{', '.join(wanted.scorers)}: {path}\ntrain on them with --config.data.path={path}"
  )
  return path


def _settings_file(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".json")


def is_done(path: pathlib.Path, settings: Mapping[str, Any]) -> bool:
  """Whether the lists are there already.

  Raises:
    UserError: there are lists that something else was asked for.
  """
  if not path.exists():
    return False
  file = _settings_file(path)
  found = json.loads(file.read_text("utf-8")) if file.exists() else {}
  unlike = [key for key in settings if found.get(key) != settings[key]]
  if unlike:
    key = unlike[0]
    raise UserError(
      f"{path} holds lists made differently ({', '.join(unlike)} differ; first: {key} was "
      f"{found.get(key)!r}, is {settings[key]!r}). Set generate.path to another file."
    )
  return True


def begin(path: pathlib.Path, settings: Mapping[str, Any], size: int) -> None:
  """Makes the folder of finished prompts; throws away those of other settings."""
  folder = path.with_suffix(".parts")
  text = json.dumps({**settings, "prompts_per_part": size}, indent=2) + "\n"
  file = folder / "settings.json"
  if parallel.is_main_process():
    if folder.exists() and (not file.exists() or file.read_text("utf-8") != text):
      shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
  parallel.barrier("lists begun")


def write_part(
  path: pathlib.Path,
  config: Any,
  settings: Mapping[str, Any],
  prompts: Sequence[Prompt],
  seeds: Sequence[int],
  images: np.ndarray,
  scores: Mapping[str, np.ndarray],
) -> None:
  """Ranks the images of some prompts and writes their lists."""
  tolerance, many = config.generate.tie_tolerance, len(seeds)
  by_list = {name: values.reshape(-1, many) for name, values in scores.items()}
  joined = [
    combine({name: values[row] for name, values in by_list.items()}, tolerance)
    for row in range(len(prompts))
  ]
  # Of several scorers the sum of shares is compared, which has no tolerance of its own.
  tolerance = tolerance if len(scores) == 1 else 0.0
  origin = config.generate.policy or config.model.path
  names = [[image_uid(settings, row.key, seed) for seed in seeds] for row in prompts]
  edits = any(row.source for row in prompts)
  encoded = [encode_png(image) for image in images]
  list_files.write(
    path,
    prompts=[row.text for row in prompts],
    sources=[row.source for row in prompts] if edits else None,
    images=[encoded[row * many : (row + 1) * many] for row in range(len(prompts))],
    image_uids=names,
    ranks=[ranks_of(values, tolerance) for values in joined],
    scores=[values.tolist() for values in joined],
    models=[[str(origin)] * many] * len(prompts),
    more={f"score_{name}": values.tolist() for name, values in by_list.items()},
  )


def image_uid(settings: Mapping[str, Any], prompt: str, seed: int) -> str:
  """Names an image by all that made it, so that rounds can be mixed."""
  drawn = {k: settings[k] for k in (*DRAWING_KEYS, "weights", "pipeline")}
  drawn |= {k: settings[k] for k in ("image_guidance_scale",) if k in settings}
  text = json.dumps([drawn, prompt, seed], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:24]


def combine(scores: Mapping[str, np.ndarray], tolerance: float) -> np.ndarray:
  """One score per image of a list, [K].

  Of one scorer its own score. Of several, whose scales have nothing in common, the mean
  over scorers of the share of the other images that it beats, ties counted half: the
  probability that a scorer drawn at random prefers it to another image drawn at random.

  Reference: Karthik et al. 2024 (RankDPO): how Syn-Pic joins five models' votes.
  """
  if len(scores) == 1:
    return np.asarray(next(iter(scores.values())), np.float64)
  shares = []
  for values in scores.values():
    gap = values[:, None] - values[None]
    beats = (gap > tolerance) + 0.5 * (np.abs(gap) <= tolerance)
    np.fill_diagonal(beats, 0.0)
    shares.append(beats.sum(axis=1) / max(len(values) - 1, 1))
  return np.mean(shares, axis=0)


def ranks_of(scores: np.ndarray, tolerance: float) -> list[int]:
  """Ranks, 0 = best; images within `tolerance` of the best of their group are tied.

  >>> ranks_of(np.array([0.1, 0.9, 0.85, 0.5]), 0.1)
  [2, 0, 0, 1]
  """
  ranks, rank, best = [0] * len(scores), -1, np.inf
  for place in np.argsort(-np.asarray(scores), kind="stable"):
    if rank < 0 or best - scores[place] > tolerance:
      rank, best = rank + 1, scores[place]
    ranks[place] = rank
  return ranks
