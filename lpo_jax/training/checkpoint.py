"""Keeping a run: all that it goes on from, together, atomically, through Orbax.

The only file that knows Orbax' API (v1).
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from lpo_jax import trees
from lpo_jax.errors import UserError
from lpo_jax.training.state import TrainState


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    folder: the run's `checkpoints/`; created when missing.
    keep_last: how many of the newest to keep.
  """

  def __init__(self, folder: str | pathlib.Path, *, keep_last: int = 2):
    from orbax.checkpoint import v1 as ocp

    self.folder = pathlib.Path(folder).absolute()
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise UserError(
        f"cannot write checkpoints to {self.folder}: {e}. Expected a writable folder; "
        "choose another --workdir."
      ) from e
    self._orbax = ocp.training.Checkpointer(
      self.folder,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep_last),
      cleanup_tmp_directories=True,
    )

  @property
  def latest(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    latest = self._orbax.latest
    return None if latest is None else latest.step

  @property
  def steps(self) -> list[int]:
    """The steps of all complete checkpoints, ascending."""
    return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

  def save(
    self, state: TrainState, meta: dict[str, Any], *, online: Any = None
  ) -> None:
    """Starts an atomic save; returns early.

    The arrays are copied to the host before this returns, so the caller may donate
    them. A checkpoint of the same step is left as it is.

    Args:
      state: the train state.
      meta: anything JSON-able, such as the place in the data.
      online: a tree of arrays that only some methods have: snapshot and replay buffer.
    """
    step = int(state.step)
    if step == self.latest:
      return
    # As text: Orbax refuses an empty dict and integers of more than 64 bits.
    items = {"state": trees.named_leaves(state), "meta": {"json": json.dumps(meta)}}
    if online:
      items["online"] = trees.named_leaves(online)
    self._orbax.save_checkpointables_async(step, items)

  def restore(
    self, like: TrainState, step: int | None = None
  ) -> tuple[TrainState, dict]:
    """Loads a checkpoint onto the devices where `like` lives.

    Args:
      like: arrays or ShapeDtypeStructs with shardings; any mesh will do.
      step: which; default the latest.

    Raises:
      UserError: there is none, or its arrays are not those of `like`.
    """
    step = self.latest if step is None else step
    if step is None:
      raise UserError(f"no checkpoint in {self.folder}: train first (--job train).")
    wanted = _wanted(like)
    self._check(step, "state", wanted)
    loaded = self._orbax.load_checkpointables(step, {"state": wanted, "meta": None})
    meta = json.loads(loaded["meta"]["json"])
    return trees.unflatten_named(loaded["state"], like), meta

  def restore_online(self, like: Any, step: int) -> Any:
    """Loads what `save` got as `online`; nothing for nothing.

    Args:
      like: as for `restore`; empty for a method that has none.
      step: which.

    Raises:
      UserError: the arrays are not those of `like`.
    """
    if not like:
      return like
    wanted = _wanted(like)
    self._check(step, "online", wanted)
    loaded = self._orbax.load_checkpointables(step, {"online": wanted})
    return trees.unflatten_named(loaded["online"], like)

  def _check(
    self, step: int, item: str, wanted: dict[str, jax.ShapeDtypeStruct]
  ) -> None:
    """Compares names and shapes first: Orbax' own complaint is pages of noise."""
    metadata = self._orbax.checkpointables_metadata(step).metadata.get(item, {})
    found = {name: tuple(x.shape) for name, x in metadata.items()}
    expected = {name: tuple(x.shape) for name, x in wanted.items()}
    differing = sorted(
      name
      for name in found.keys() | expected.keys()
      if found.get(name) != expected.get(name)
    )
    if differing:
      name = differing[0]
      raise UserError(
        f"checkpoint {step} in {self.folder} is of another model or optimizer: "
        f"{len(differing)} arrays differ, first {name!r} (expected "
        f"{expected.get(name)}, found {found.get(name)}). Use the config it was made "
        "with, or another --workdir."
      )

  def wait(self) -> None:
    """Waits until what was started to be saved is safe on disk."""
    self._orbax.wait()

  def close(self) -> None:
    """Waits, then lets go of the folder."""
    self._orbax.wait()
    self._orbax.close()


def _wanted(like: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """What to load, by name, and where to."""
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in trees.named_leaves(like).items()
  }
