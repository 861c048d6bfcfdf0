"""The personal quickstart's world: people of opposed tastes, each known by a few judgements."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import console, parallel
from lpo_jax.data import held_out
from lpo_jax.jobs import (
  quickstart_people,
  run_identity,
  users,
  widen,
)
from lpo_jax.jobs.quickstart_world import Stages, base_folder, draw_candidates
from lpo_jax.scoring import digit_people, digits
from lpo_jax.types import Prompt

# Candidates of the evaluation besides the methods' own names.
ANOTHER, BASE = "another", "base"
PERSONAL, COMMON = "personal", "common"


def make_base(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, stages: Stages
) -> pathlib.Path:
  """Adds to the shipped base what a UNet needs to be told of people; once."""
  target = workdir / "personal_base"
  run_identity.remember_config(config, workdir)
  if not (target / "model_index.json").is_file():
    with stages.stage("people in the base"):
      own = copy.deepcopy(config)
      own.model.path, own.export.path = str(base_folder(config)), str(target)
      widen.run(own, workdir)
  return target


def make_judgements(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path:
  """Draws a pool of candidates, lets people judge, and makes their embeddings.

  Sets `data.user_embeds`, `eval.prompts` and the scorer's people.
  """
  folder = workdir / "judgements"
  path, asked = folder / "judgements.parquet", folder / "prompts.parquet"
  everybody = folder / "people.json"
  config.data.path, config.eval.prompts = str(path), str(asked)
  config.data.user_embeds = str(folder / "user_embeds.npz")
  with config.unlocked():
    config.eval.scorer_paths = {"digits_person": str(everybody)}
  people = digit_people.make_people(config.quickstart.users, config.seed)
  if not path.exists():
    _judge(config, people, path)
  if parallel.is_main_process() and not asked.exists():
    digit_people.write(everybody, people)
    _write_prompts(config, people, asked)
  parallel.barrier("people written")
  if not pathlib.Path(config.data.user_embeds).exists():
    users.run(config, workdir)
  return path


def _judge(
  config: ml_collections.ConfigDict,
  people: dict[str, digit_people.Person],
  path: pathlib.Path,
) -> None:
  """Writes what people say of a pool of images that all of them choose from."""
  world = config.quickstart
  path.parent.mkdir(parents=True, exist_ok=True)
  texts, each = digits.prompts(digits.TRAIN_PHRASES), world.images_per_prompt
  prompts = [text for text in texts for _ in range(each)]
  images = draw_candidates(config, [Prompt(text) for text in prompts])
  made, number = [], 0
  for name, person in people.items():
    rng = np.random.default_rng([config.seed, 1, int(name)])
    scores = digit_people.like(images, person.bold, person.upright)
    # Under other prompts each time: the lists of a person and a prompt are one session's.
    for prompt in rng.permutation(len(texts))[: world.sessions]:
      shown = rng.permutation(each)[: world.images_per_session] + prompt * each
      session = quickstart_people.Session(number, int(name), shown.tolist())
      made += quickstart_people.judge_session(
        session, scores, world.temperature, world.tie_rate, rng
      )
      number += 1
  if parallel.is_main_process():
    quickstart_people.write_parquet(
      path, made, images, prompts, model="lpo_jax/digits_base"
    )
  parallel.barrier("judgements written")
  ties = sum(j.label == 0.5 for j in made)
  console.say(
    f"{len(made)} judgements ({ties} ties) by {len(people)} simulated people of "
    f"{len(images)} images in {number} sessions: {path}"
  )


def _write_prompts(
  config: ml_collections.ConfigDict,
  people: dict[str, digit_people.Person],
  path: pathlib.Path,
) -> None:
  """Writes what is drawn for whom: each digit once, in phrasings kept for evaluation."""
  import pyarrow as pa
  from pyarrow import parquet

  def is_new(name: str) -> bool:
    return held_out.is_held_out_person(name, config.data.held_out_users, config.seed)

  old = [name for name in people if not is_new(name)][: config.quickstart.shown_held_in]
  new = [name for name in people if is_new(name)][: config.quickstart.shown_held_out]
  rows: dict[str, list[str]] = {"prompt": [], "user": [], "category": []}
  for category, names in (("held_in", old), ("held_out", new)):
    for name in names:
      for digit, word in enumerate(digits.NAMES):
        phrase = digits.HELD_OUT_PHRASES[digit % 2]
        rows["prompt"].append(phrase.format(word))
        rows["user"].append(name)
        rows["category"].append(category)
  parquet.write_table(pa.table(rows), path)


def candidates(
  base: pathlib.Path, runs: dict[str, Any], workdir: pathlib.Path
) -> ml_collections.ConfigDict:
  """The model told of nobody, the personal one, and the same told of another person."""
  named = {BASE: str(base)} | {name: str(workdir / name) for name in runs}
  return ml_collections.ConfigDict(named | {ANOTHER: str(workdir / PERSONAL)})
