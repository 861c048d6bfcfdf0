"""Noticing that a run goes wrong: numbers that are none, numbers that run away.

Pure arithmetic on the metrics of one step after the other: what is made of a finding is
the caller's policy. Everything that later findings depend on is in `Guard.get_state`, so
that a resumed run finds what the uninterrupted one finds.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError, unknown_name

# What policies there are: for a loss or gradient that is not finite, for a runaway.
ON_NONFINITE = ("stop", "skip", "rollback")
ON_RUNAWAY = ("off", "warn", "stop", "rollback")

# What runs away, as far as a step has it. Preference losses can fall to 0 while the
# denoising error of winner and loser explodes: `err` sees that.
RUNAWAYS = ("loss", "err", "update_norm")
NOT_FINITE = ("loss", "grad_norm")
# Steps that the running median is of, and how many it needs to be one.
WINDOW, FEWEST = 100, 20


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that went wrong.

  Attributes:
    kind: "nonfinite" | "runaway", or the name of an alarm.
    first: the step at which it began.
    step: the step at which it was judged.
    words: what a person is told.
  """

  kind: str
  first: int
  step: int
  words: str


class GoBack(Exception):
  """A finding whose policy is to go on from the last good checkpoint."""

  def __init__(self, finding: Finding):
    super().__init__(finding.words)
    self.finding = finding


def runaway_error(finding: Finding) -> UserError:
  """The end of a run whose policy for a runaway is to stop."""
  return UserError(
    f"{finding.words}. The last checkpoint from before step {finding.first} is good: "
    "give the same command with train.on_runaway='rollback' to go back to it with a "
    "lower learning rate, or with 'off' if this is how the run should look."
  )


def no_way_back(finding: Finding, limit: int | None) -> UserError:
  """The end of a run that cannot go back; `limit` where that is how often it did."""
  if limit is None:
    why = (
      f"no checkpoint is left whose weights were good in a step before {finding.first}"
    )
    fix = "Lower train.learning_rate or raise train.keep_last in a new --workdir"
  else:
    why = f"the run went back train.max_rollbacks={limit} times already"
    fix = "Lower train.learning_rate or objective.beta in a new --workdir, or look at "
    fix += "the data of these steps"
  return UserError(f"{finding.words}, and {why}. {fix}; see rollbacks.jsonl.")


def check_policies(train: Mapping[str, Any]) -> None:
  """Refuses settings of `train` that name no policy, or that cannot work.

  Raises:
    UserError: an unknown policy, a factor out of range, or too few checkpoints to go
      back to.
  """
  if train["on_nonfinite"] not in ON_NONFINITE:
    raise unknown_name("train.on_nonfinite", train["on_nonfinite"], ON_NONFINITE)
  if train["on_runaway"] not in ON_RUNAWAY:
    raise unknown_name("train.on_runaway", train["on_runaway"], ON_RUNAWAY)
  if train["runaway_factor"] <= 1:
    raise UserError(
      f"train.runaway_factor={train['runaway_factor']}: expected more than 1, such as "
      "5: times the running median."
    )
  if not 0 < train["rollback_factor"] <= 1:
    raise UserError(
      f"train.rollback_factor={train['rollback_factor']}: expected above 0 and at most "
      "1, such as 0.5: what a rollback multiplies the learning rate by."
    )
  steps = train["runaway_steps"] if train["on_runaway"] == "rollback" else 1
  back = (train["keep_last"] - 1) * train["checkpoint_every"]
  if goes_back(train) and back <= steps:
    raise UserError(
      f"'rollback' needs a checkpoint from before the {steps} step(s) that it takes to "
      f"notice, but train.keep_last={train['keep_last']} and train.checkpoint_every="
      f"{train['checkpoint_every']} may keep none: raise one of them."
    )


def goes_back(train: Mapping[str, Any]) -> bool:
  """Whether some policy of `train` is to go back to a checkpoint."""
  policies = (train["on_nonfinite"], train["on_runaway"], *train["alarms"].values())
  return "rollback" in policies


def good_checkpoints(steps: Sequence[int], finding: Finding) -> list[int]:
  """Those whose weights a later step, still from before the finding, found good.

  A loss is of the weights before its update: what the step before the first bad one
  left is what the first bad one was bad with.
  """
  return [step for step in sorted(steps) if step + 1 < finding.first]


class Guard:
  """Watches a run's metrics, step by step.

  A runaway is a metric above `factor` times its running median, over the last `WINDOW`
  good steps, for `steps` steps in a row. Steps under suspicion do not enter the median.

  Args:
    factor: see above.
    steps: see above.

  Attributes:
    rollbacks: how often the run went back.
    scale: what the learning rate is multiplied by since.
  """

  def __init__(self, *, factor: float, steps: int):
    self._factor, self._steps = factor, steps
    self.rollbacks, self.scale = 0, 1.0
    self._forget()

  def _forget(self) -> None:
    self._history = {n: collections.deque(maxlen=WINDOW) for n in RUNAWAYS}
    self._streak = 0

  def get_state(self) -> dict[str, Any]:
    """What `set_state` needs to find the same in the steps to come; JSON-able."""
    return {
      "history": {name: list(values) for name, values in self._history.items()},
      "streak": self._streak,
      "rollbacks": self.rollbacks,
      "scale": self.scale,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from where `get_state` was called."""
    self._forget()
    for name, values in state["history"].items():
      self._history[name].extend(values)
    self._streak = state["streak"]
    self.rollbacks, self.scale = state["rollbacks"], state["scale"]

  def went_back(self, state: Mapping[str, Any], factor: float) -> None:
    """Takes the state of the checkpoint gone back to, and counts one rollback more.

    The learning rate falls from what it was when things went wrong, which may be lower
    than it was at the checkpoint.
    """
    rollbacks, scale = self.rollbacks + 1, self.scale * factor
    self.set_state(state)
    self.rollbacks, self.scale, self._streak = rollbacks, scale, 0

  def lower(self, factor: float) -> None:
    """Lowers the learning rate without going back."""
    self.scale *= factor

  def observe(self, step: int, values: Mapping[str, float]) -> Finding | None:
    """Judges the metrics of one completed update; all of them, in order.

    Args:
      step: completed updates.
      values: what the step measured.

    Returns:
      What went wrong, if this step is what says so. A runaway is said once: what it
      rose to is then what later steps are compared with.
    """
    for name in NOT_FINITE:
      if name in values and not math.isfinite(values[name]):
        words = f"{name} became {values[name]} at step {step}"
        return Finding("nonfinite", step, step, words)
    far = self._far(values)
    if not far:
      self._streak = 0
      for name in RUNAWAYS:
        if name in values:
          self._history[name].append(float(values[name]))
      return None
    self._streak += 1
    if self._streak < self._steps:
      return None
    name, median = far
    words = (
      f"{name} is {values[name]:.4g} at step {step}, more than {self._factor:g} times "
      f"its running median {median:.4g}, for {self._streak} steps in a row"
    )
    first = step - self._streak + 1
    self._forget()
    return Finding("runaway", first, step, words)

  def _far(self, values: Mapping[str, float]) -> tuple[str, float] | None:
    """The first metric that is too far above its median, and that median."""
    for name in RUNAWAYS:
      past = self._history[name]
      if name not in values or len(past) < FEWEST:
        continue
      median = statistics.median(past)
      if median > 0 and not values[name] <= self._factor * median:
        return name, median
    return None
