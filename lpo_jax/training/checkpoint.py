"""Keeping a run: all that it goes on from, together, atomically, through Orbax.

The only file that knows Orbax' API (v1).
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lpo_jax import parallel, trees
from lpo_jax.errors import UserError
from lpo_jax.training.state import TrainState

# Arrays that checkpoints from before they were there do not have, and their values then.
YOUNGER = {"lr_scale": np.float32(1), "reward_cap": np.float32(np.inf)}


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    folder: the run's `checkpoints/`; created when missing.
    keep_last: how many of the newest to keep.
    keep_every: keep for good the checkpoints of steps that this divides; 0: none.
    keep_best: how many of the best to keep besides, by `best_metric`.
    best_metric: a name in what `save` gets as metrics; "-name" where less is better.
    reading: look at them only; what an unfinished save left behind is not removed, since
      it may be that of a run that is alive.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    keep_last: int = 2,
    keep_every: int = 0,
    keep_best: int = 0,
    best_metric: str = "",
    reading: bool = False,
  ):
    from orbax.checkpoint import v1 as ocp

    self.folder = pathlib.Path(folder).absolute()
    keep = ocp.training.preservation_policies
    policies: list[Any] = [keep.LatestN(keep_last)]
    if keep_every:
      policies.append(keep.EveryNSteps(keep_every))
    if keep_best:

      def score(metrics: dict[str, float]) -> float:
        value = metrics.get(best_metric.removeprefix("-"), math.nan)
        value = -value if best_metric.startswith("-") else value
        return value if math.isfinite(value) else -math.inf

      policies.append(
        keep.BestN(
          n=keep_best, get_metric_fn=score, keep_checkpoints_without_metrics=False
        )
      )
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
      preservation_policy=keep.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=not reading,
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
    self,
    state: TrainState,
    meta: dict[str, Any],
    *,
    online: Any = None,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Starts an atomic save; returns early.

    The arrays are copied to the host before this returns, so the caller may donate
    them. A checkpoint of the same step is left as it is.

    Args:
      state: the train state.
      meta: anything JSON-able, such as the place in the data.
      online: a tree of arrays that only some methods have: snapshot and replay buffer.
      metrics: what `best_metric` is looked up in, such as scores of an evaluation.

    Raises:
      UserError: this save, or the one before, cannot be written.
    """
    step = int(state.step)
    if step == self.latest:
      return
    # As text: Orbax refuses an empty dict and integers of more than 64 bits.
    items = {"state": trees.named_leaves(state), "meta": {"json": json.dumps(meta)}}
    if online:
      items["online"] = trees.named_leaves(online)
    with self._writing(step):
      self._orbax.save_checkpointables_async(step, items, metrics=metrics)

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
    younger = self._check(step, "state", wanted)
    asked = {name: x for name, x in wanted.items() if name not in younger}
    with self._reading(step):
      loaded = self._orbax.load_checkpointables(step, {"state": asked})["state"]
    for name in younger:
      loaded[name] = parallel.put(YOUNGER[name], wanted[name].sharding)
    return trees.unflatten_named(loaded, like), self.meta(step)

  def meta(self, step: int) -> dict[str, Any]:
    """Loads what `save` got as `meta`."""
    with self._reading(step):
      loaded = self._orbax.load_checkpointables(step, {"meta": None})
      return json.loads(loaded["meta"]["json"])

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
    with self._reading(step):
      loaded = self._orbax.load_checkpointables(step, {"online": wanted})
    return trees.unflatten_named(loaded["online"], like)

  def forget_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps: a run went back."""
    self.wait()
    for later in [s for s in self.steps if s > step]:
      self._orbax.delete(later)

  def _check(
    self, step: int, item: str, wanted: dict[str, jax.ShapeDtypeStruct]
  ) -> list[str]:
    """Compares names and shapes first: Orbax' own complaint is pages of noise.

    Returns:
      The names of `YOUNGER` that the checkpoint does not have.
    """
    with self._reading(step):
      metadata = self._orbax.checkpointables_metadata(step).metadata[item]
      found = {name: tuple(x.shape) for name, x in metadata.items()}
    younger = [name for name in YOUNGER if name in wanted and name not in found]
    expected = {name: tuple(x.shape) for name, x in wanted.items()}
    expected = {name: shape for name, shape in expected.items() if name not in younger}
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
    return younger

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Turns whatever a damaged file leads to into a refusal that names the way out."""
    try:
      yield
    except UserError:
      raise
    except Exception as e:
      said = (str(e).splitlines() or [""])[0][:300]
      before = [s for s in self.steps if s < step]
      if before:
        way = f"To go on from the one before, {before[-1]}, move it out of the way"
      else:
        way = "There is none before it: to begin anew, move it out of the way"
      away = self.folder.parent / f"damaged-checkpoint-{step}"
      raise UserError(
        f"checkpoint {step} in {self.folder} cannot be read ({type(e).__name__}: {said})."
        f" Its files are damaged or not all there. {way} (mv '{self.folder / str(step)}' "
        f"'{away}') and give the same command again."
      ) from e

  @contextlib.contextmanager
  def _writing(self, step: int | None) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into a refusal."""
    try:
      yield
    # Of tensorstore a full disk is a ValueError; RuntimeErrors come from other hosts.
    except (OSError, ValueError, RuntimeError) as e:
      said = (str(e).splitlines() or [""])[0][:400]
      kept = self._complete()
      good = f"checkpoint {kept[-1]} is whole" if kept else "there is no earlier one"
      raise UserError(
        f"cannot save {'a checkpoint' if step is None else f'step {step}'} in "
        f"{self.folder} ({said}). Expected a folder that can be written to, with room "
        f"left; {good}. Make room (train.keep_last, train.keep_every and train.keep_best "
        "say how many checkpoints are kept) and give the same command again: it goes on "
        "from there."
      ) from e

  def _complete(self) -> list[int]:
    """The steps that are whole on disk, whatever Orbax still believes."""
    with contextlib.suppress(OSError):
      names = [p.name for p in self.folder.iterdir() if p.is_dir()]
      return sorted(int(name) for name in names if name.isdigit())
    return []

  def wait(self) -> None:
    """Waits until what was started to be saved is safe on disk.

    Raises:
      UserError: it cannot be written.
    """
    with self._writing(None):
      self._orbax.wait()

  def close(self) -> None:
    """Waits, then lets go of the folder.

    Raises:
      UserError: what was started to be saved cannot be written.
    """
    try:
      self.wait()
    finally:
      self._orbax.close()


def _wanted(like: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """What to load, by name, and where to."""
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in trees.named_leaves(like).items()
  }
