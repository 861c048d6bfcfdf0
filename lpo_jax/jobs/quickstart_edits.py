"""The editing quickstart's world: an editor made by `sft`, its edits ranked by people.

A crowd edits digits as instructed, each person doing too little or too much; the shipped
base, widened, learns to edit from them (InstructPix2Pix's way). Then it makes several
edits of one digit for one instruction, simulated people rank these, and that is what
`lpo` and `dpo` learn from.
"""

from __future__ import annotations

import copy
import pathlib

import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.data import list_files
from lpo_jax.jobs import (
  cache,
  export,
  quickstart_people,
  quickstart_report,
  run_identity,
  train,
  widen,
)
from lpo_jax.jobs.quickstart_people import encode_png
from lpo_jax.jobs.quickstart_world import Stages, base_folder, draw_candidates
from lpo_jax.scoring import digit_edits, digits
from lpo_jax.types import Prompt

SPLIT_SEED = 0  # of which digits are held out: the same ones for every seed of a run
CROWD, PROMPTS = "crowd.parquet", "edits_to_make.parquet"
WIDENED, RUN, EDITOR = "editing_base", "sft", "editor"

WORDS = quickstart_report.Words(
  title="lpo_jax: teaching an editor which edits people like",
  story="A small Stable-Diffusion-shaped model that drew handwritten digits was widened to "
  "see a picture, and learnt by SFT to edit it from a crowd who did what was asked too "
  "little or too much. It then made five edits of a digit for each instruction; simulated "
  "people ranked them, best what does the instruction to that very digit. The editor was "
  "fine-tuned on these rankings, and edited digits that no training ever met. An "
  "independent reader reads {baseline} of the SFT editor's edits as the digit they were.",
  baseline="sft",
  called="the SFT editor",
  taste="digits_edit",
  second="digits_kept",
  second_said="the reader reads {share} of its edits as the digit they were",
  second_short="keeps the digit",
  judgements={
    CROWD: "the crowd's edits, which made the editor",
    "judgements/rankings.parquet": "the editor's edits as the simulated people ranked "
    "them",
    PROMPTS: "the digits and instructions of the evaluation",
  },
  notes=(
    "The edit scorer is the simulated people's own taste without their noise: it says "
    "whether the rankings were learnt. The reader, and the L1 distance to the edit done "
    "exactly, were not used in training.",
  ),
)


def make_base(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, stages: Stages
) -> pathlib.Path:
  """Makes an editor of a model that draws: widen, cache, train by `sft`, export.

  Args:
    config: `quickstart.sft` is what differs from it in that run; `eval.prompts` is set.
    workdir: gets crowd.parquet, edits_to_make.parquet, editing_base/, sft/ and editor/.
    stages: of the quickstart.

  Returns:
    The editor's folder, a diffusers InstructPix2Pix pipeline.
  """
  run_identity.remember_config(config, workdir)
  with stages.stage("crowd and widened base"):
    write_crowd(workdir / CROWD, config)
    write_prompts(workdir / PROMPTS, config)
    if not (workdir / WIDENED).exists():
      own = copy.deepcopy(config)
      own.model.path, own.export.path = str(base_folder(config)), str(workdir / WIDENED)
      widen.run(own, workdir)
  config.eval.prompts = str(workdir / PROMPTS)
  own = sft_config(config, workdir)
  with stages.stage("cache of the crowd's edits"):
    cache.run(own, str(workdir / RUN))
  with stages.stage("train sft"):
    train.run(own, workdir / RUN)
  if not (workdir / EDITOR).exists():
    with stages.stage("export sft"):
      export.run(own, workdir / RUN)
  return workdir / EDITOR


def sft_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> ml_collections.ConfigDict:
  """The config of the run that makes the editor."""
  own = copy.deepcopy(config)
  own.job, own.model.path = "train", str(workdir / WIDENED)
  own.data.path, own.data.cache = str(workdir / CROWD), str(workdir / RUN / "cache")
  own.data.strategy = "winners"
  own.export.path = str(workdir / EDITOR)
  with own.unlocked():
    own.objective = ml_collections.ConfigDict({"name": "sft"})
    own.update(config.quickstart.sft)
  own.quickstart = ml_collections.ConfigDict()
  own.eval.candidates = ml_collections.ConfigDict()
  return own


def sources(config: ml_collections.ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """Returns the digits to train on and those to evaluate on, [n, 32, 32, 3] uint8 each."""
  images, _ = digits.real_digits()
  order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
  held = config.quickstart.held_out_sources
  return images[order[held:]], images[order[:held]]


def instructions(count: int) -> list[str]:
  """Every instruction in turn, `count` of them."""
  known = list(digit_edits.EDITS)
  return [known[i % len(known)] for i in range(count)]


def write_crowd(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes one person's edit a row: what is asked, done too little or too much."""
  if path.exists():
    return
  world, (pool, _) = config.quickstart, sources(config)
  rng = np.random.default_rng([config.seed, 0])
  shown = pool[rng.integers(len(pool), size=world.crowd_edits)]
  asked = instructions(len(shown))
  made = digit_edits.edit(shown, asked, rng.uniform(*world.crowd_does, len(shown)))
  if parallel.is_main_process():
    list_files.write(
      path,
      prompts=asked,
      images=[[encode_png(image)] for image in made],
      image_uids=[[f"crowd-{i:05d}"] for i in range(len(made))],
      ranks=[[0]] * len(made),
      sources=[encode_png(image) for image in shown],
    )
  parallel.barrier("crowd written")


def write_prompts(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes the evaluation's rows: every held-out digit with every instruction."""
  import pyarrow as pa
  from pyarrow import parquet

  _, held = sources(config)
  asked = [text for text in digit_edits.EDITS for _ in held]
  shown = np.concatenate([held] * len(digit_edits.EDITS))
  table = {
    "instruction": asked,
    "category": asked,
    "cond_image": [encode_png(image) for image in shown],
    "target_image": [encode_png(image) for image in digit_edits.edit(shown, asked)],
  }
  if parallel.is_main_process():
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(table), path)
  parallel.barrier("edits to make written")


def make_judgements(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path:
  """Lets the editor make several edits of a digit, and simulated people rank them."""
  world, path = config.quickstart, workdir / "judgements" / "rankings.parquet"
  if path.exists():
    console.say(f"judgements are there: {path}")
    return path
  (pool, _), many = sources(config), world.images_per_session
  rng = np.random.default_rng([config.seed, 1])
  shown = pool[rng.integers(len(pool), size=world.sessions)].repeat(many, axis=0)
  texts = [text for text in instructions(world.sessions) for _ in range(many)]
  encoded = [encode_png(image) for image in shown]
  rows = [Prompt(t, source=s) for t, s in zip(texts, encoded, strict=True)]
  images = draw_candidates(config, rows)
  rankings = quickstart_people.rank(
    digit_edits.match(images, texts, shown),
    images_per_session=many,
    temperature=world.temperature,
    seed=config.seed,
  )
  if parallel.is_main_process():
    quickstart_people.write_rankings(
      path, rankings, images, texts, model="lpo_jax/digits_editor", sources=encoded
    )
  parallel.barrier("judgements written")
  console.say(f"{len(rankings)} rankings of {many} edits by simulated people: {path}")
  return path
