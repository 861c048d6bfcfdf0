"""Whose run a workdir holds: the config that made it, and what may differ."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections

from lpo_jax import parallel
from lpo_jax.errors import UserError

# Keys that may change between the sessions of one run without making it another run.
FREE_KEYS = (
  "job",
  "mesh.",
  "eval.",
  "export.",
  "inspect.",
  "select.",
  "generate.",
  "quickstart.publish",
  # Of an ablation: each of its runs compares its own config.
  "quickstart.betas",
  "quickstart.seeds",
  "quickstart.methods",
  "quickstart.panels",
  "quickstart.pace",
  "data.cache",
  "data.max_bad_images",
  "model.attention",
  "model.remat",
  "model.scan",
  "train.total_steps",
  "train.microbatch",
  "train.checkpoint_every",
  "train.keep_last",
  "train.log_every",
  "train.max_minutes",
)


def recorded(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the config of the run in a workdir.

  Keys that are younger than the run get their defaults, which are what it did.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  from lpo_jax.configs import common

  file = pathlib.Path(workdir) / "config.json"
  try:
    then = json.loads(file.read_text("utf-8"))
  except (OSError, ValueError) as e:
    raise UserError(
      f"{file} cannot be read ({e}): expected the workdir of a run of this program."
    ) from e
  defaults = json.loads(common.get_config().to_json_best_effort())

  def fill(given: Any, default: Any, name: str) -> Any:
    # The keys of an open section are options: what is not there was not asked for.
    both = isinstance(given, dict) and isinstance(default, dict)
    if not both or name in common.OPEN_SECTIONS:
      return given
    prefix = f"{name}." if name else ""
    return default | {k: fill(v, default.get(k), prefix + k) for k, v in given.items()}

  return ml_collections.ConfigDict(fill(then, defaults, ""))


def refuse_other_run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Checks that the run in `workdir`, if there is one, is this one.

  Raises:
    UserError: the workdir holds a run with other values of keys that matter.
  """
  file = workdir / "config.json"
  if file.exists():
    then = _flat(recorded(workdir).to_dict())
    mine = _flat(json.loads(config.to_json_best_effort()))
    differing = [
      key
      for key in sorted(mine.keys() | then.keys())
      if mine.get(key) != then.get(key) and not key.startswith(FREE_KEYS)
    ]
    if differing:
      key = differing[0]
      raise UserError(
        f"{workdir} holds another run: {', '.join(differing)} differ (first: {key} was "
        f"{then.get(key)!r}, is {mine.get(key)!r}). Use the old values to go on "
        "with it, or another --workdir for a new run."
      )


def remember_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes config.json, which makes the workdir this run's.

  Raises:
    UserError: the workdir holds a run with other values of keys that matter.
  """
  refuse_other_run(config, workdir)
  parallel.barrier("config compared")
  if parallel.is_main_process():
    workdir.mkdir(parents=True, exist_ok=True)
    now = json.loads(config.to_json_best_effort())
    text = json.dumps(now, indent=2) + "\n"
    (workdir / "config.json").write_text(text, encoding="utf-8")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Flattens nested dictionaries to dotted keys."""
  if not isinstance(tree, dict) or not tree:
    return {prefix[:-1]: tree}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f"{prefix}{key}.")
  return flat
