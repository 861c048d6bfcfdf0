"""Whose run a workdir holds: the config that made it, and what may differ."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

import lpo_jax
from lpo_jax import console, parallel, pretrained
from lpo_jax.data import fingerprints, user_embeds
from lpo_jax.errors import UserError

# Keys that may change between the sessions of one run without making it another run.
FREE_KEYS = (
  "job",
  "mesh.",
  "eval.",
  "export.",
  "logging.",
  "inspect.",
  "select.",
  "generate.",
  "widen.",
  "users.",  # what they made is in the fingerprint
  "plan.",
  "quickstart.publish",
  # Of an ablation: each of its runs compares its own config.
  "quickstart.betas",
  "quickstart.seeds",
  "quickstart.methods",
  "quickstart.panels",
  "quickstart.pace",
  "data.cache",
  "data.reference",  # the same errors, wherever they come from
  "data.max_bad_images",
  "model.attention",
  "model.remat",
  "model.scan",
  "train.total_steps",
  "train.microbatch",
  "train.checkpoint_every",
  "train.keep_last",
  "train.keep_every",
  "train.keep_best",
  "train.best_metric",
  "train.log_every",
  "train.max_minutes",
  "train.hang_minutes",
  "train.on_hang",
  # What is done about a runaway; the weights and rates up to it stay what they are.
  "train.on_runaway",
  "train.runaway_",
  "train.alarms.",
  "train.rollback_factor",
  "train.max_rollbacks",
)
# "skip" is part of the optimizer's state; between these a run may change its mind.
SAME_STATE = {"train.on_nonfinite": ("stop", "rollback")}
# Networks whose weights decide what a run computes.
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def recorded(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the config of the run in a workdir.

  Keys that are younger than the run get their defaults, which are what it did.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  file = pathlib.Path(workdir) / "config.json"
  try:
    then = json.loads(file.read_text("utf-8"))
  except (OSError, ValueError) as e:
    raise UserError(
      f"{file} cannot be read ({e}): expected the workdir of a run of this program. If "
      "it is one and has checkpoints, --job train with the run's config writes the file "
      "again."
    ) from e
  return filled(then)


def filled(then: dict[str, Any]) -> ml_collections.ConfigDict:
  """Adds to a run's config as it was written the keys that are younger than the run."""
  from lpo_jax.configs import common

  defaults = json.loads(common.get_config().to_json_best_effort())

  def fill(given: Any, default: Any, name: str) -> Any:
    # The keys of an open section are options: what is not there was not asked for.
    both = isinstance(given, dict) and isinstance(default, dict)
    if not both or name in common.OPEN_SECTIONS:
      return given
    prefix = f"{name}." if name else ""
    return default | {k: fill(v, default.get(k), prefix + k) for k, v in given.items()}

  return ml_collections.ConfigDict(fill(then, defaults, ""))


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON-able dictionaries, lists and scalars."""
  return json.loads(config.to_json_best_effort())


def refuse_other_run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Checks that the run in `workdir`, if there is one, is this one.

  Raises:
    UserError: the workdir holds a run with other values of keys that matter.
  """
  file = workdir / "config.json"
  if file.exists():
    _refuse_other_config(config, recorded(workdir), workdir)


def _refuse_other_config(
  config: ml_collections.ConfigDict,
  recorded_config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
) -> None:
  then, mine = _flat(recorded_config.to_dict()), _flat(plain(config))
  differing = [
    key
    for key in sorted(mine.keys() | then.keys())
    if mine.get(key) != then.get(key)
    and not key.startswith(FREE_KEYS)
    and not all(side.get(key) in SAME_STATE.get(key, ()) for side in (mine, then))
  ]
  if differing:
    key = differing[0]
    raise UserError(
      f"{workdir} holds another run: {', '.join(differing)} differ (first: {key} was "
      f"{then.get(key)!r}, is {mine.get(key)!r}). Use the old values to go on "
      "with it, or another --workdir for a new run."
    )


def fingerprint(config: ml_collections.ConfigDict, lists: Any) -> dict[str, str]:
  """Hashes what the config only names: the base model's weights, and the data.

  Args:
    config: of the run.
    lists: those of the opened cache.

  Returns:
    "model.unet", "data.lists" ... -> 16 hex digits.
  """
  path = pretrained.local_folder(config.model.path)
  prints = {
    f"model.{name}": pretrained.fingerprint(path, name, sampled=True)
    for name in NETWORKS
    if (path / name).is_dir()
  }
  data = fingerprints.of_lists(lists)
  if config.data.user_embeds is not None:
    data["user_embeds"] = user_embeds.read(config.data.user_embeds).fingerprint()
    data["users"] = fingerprints.of_users(lists)
  return prints | {f"data.{name}": value for name, value in data.items()}


def set_aside_broken_config(workdir: pathlib.Path) -> None:
  """Moves a config.json that is no JSON away: checkpoints have their own copy."""
  file = workdir / "config.json"
  if not parallel.is_main_process() or not file.exists():
    return
  try:
    json.loads(file.read_text("utf-8"))
  except ValueError as e:
    away = file.with_suffix(".json.broken")
    console.warn(
      f"{file} is broken ({e}) and is now {away.name}; the checkpoints say whose they are"
    )
    os.replace(file, away)


def describe(
  config: ml_collections.ConfigDict, prints: Mapping[str, str]
) -> dict[str, Any]:
  """Says in a checkpoint whose it is; `refuse_other_checkpoint` reads it."""
  return {
    "config": plain(config),
    "seed": config.seed,
    "fingerprint": dict(prints),
    "version": lpo_jax.__version__,
  }


def refuse_other_checkpoint(
  config: ml_collections.ConfigDict,
  prints: Mapping[str, str],
  meta: Mapping[str, Any],
  workdir: pathlib.Path,
) -> None:
  """Checks that a checkpoint is of this config, on this model and data.

  Args:
    config: of this session.
    prints: from `fingerprint`.
    meta: the checkpoint's; one from before these were kept is not compared.
    workdir: for the message.

  Raises:
    UserError: naming every key that matters and differs.
  """
  if "config" in meta:
    _refuse_other_config(config, filled(meta["config"]), workdir)
  then = meta.get("fingerprint", {})
  differing = sorted(k for k in then if k in prints and then[k] != prints[k])
  differing += sorted(then.keys() ^ prints.keys()) if then else []
  if differing:
    raise UserError(
      f"the checkpoints in {workdir} were made with the same config, but what it names "
      f"has changed since: {', '.join(differing)}. Put back the old files to go on, or "
      "use another --workdir for a new run."
    )
  if meta.get("version", lpo_jax.__version__) != lpo_jax.__version__:
    console.warn(
      f"the checkpoint was written by lpo_jax {meta['version']}, this is "
      f"{lpo_jax.__version__}: the same to the bit is only promised for one version"
    )


@contextlib.contextmanager
def only_session(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this process; the lock ends with it however it ends.

  Raises:
    UserError: another live process trains in this workdir.
  """
  import fcntl

  if not parallel.is_main_process():
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / ".lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise UserError(
        f"another process is training in {workdir}. Wait for it or stop it (touch "
        f"'{workdir / 'STOP'}'), or use another --workdir."
      ) from e
    except OSError:
      pass  # some network file systems have no locks; then nobody is kept out
    yield


def remember_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes config.json, which makes the workdir this run's.

  Raises:
    UserError: the workdir holds a run with other values of keys that matter.
  """
  refuse_other_run(config, workdir)
  parallel.barrier("config compared")
  if parallel.is_main_process():
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(config), indent=2) + "\n"
    partial = workdir / ".config.json.partial"  # a kill leaves the old one or the new
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, workdir / "config.json")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Flattens nested dictionaries to dotted keys."""
  if not isinstance(tree, dict) or not tree:
    return {prefix[:-1]: tree}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f"{prefix}{key}.")
  return flat
