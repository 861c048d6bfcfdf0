"""Alarms: what a run that still has a finite loss can do wrong, and what is done then.

Pure arithmetic on the metrics of one step after the other, and on the scores of run
points. Errors are compared with the reference's own, so that a bound means the same for
any model and beta. As with `guard`, everything that later findings depend on is in
`Alarms.get_state`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.training.guard import Finding

# What is done: say so | say so and lower the learning rate by train.rollback_factor | say
# so and give margins beyond the bound no gradient | go back as train.on_runaway="rollback"
# does | end the run with its last checkpoint.
POLICIES = ("off", "warn", "lower_lr", "cap_margin", "rollback", "stop")
# Those that change the updates to come, and the alarm that the second is a cure for.
CHANGES = ("lower_lr", "cap_margin")
CAPPED = "runaway_margin"
# Run points in a row that must agree before scores raise an alarm: few images scatter.
POINTS = 2


@dataclasses.dataclass(frozen=True)
class Alarm:
  """An alarm on the metrics of updates.

  Attributes:
    metric: what it is made of, of the update's metrics.
    sign: -1 where less is worse.
    words: what is true when it is raised; filled with the median and the bound.
  """

  metric: str
  sign: int
  words: str


# name -> sign * metric / ref_err, whose median over a window is compared with a bound.
ALARMS: Mapping[str, Alarm] = {
  "winner_worse": Alarm(
    "winner_gain",
    -1,
    "the best images are denoised worse than by the reference, by {0:.3g} of its error "
    "(above {1:g})",
  ),
  "runaway_margin": Alarm(
    "margin_p90", 1, "a tenth of the margins is above {0:.3g} of the reference's error "
    "(bound {1:g})",
  ),
  "drift": Alarm(
    "drift",
    1,
    "predictions are {0:.3g} of the reference's error away from the reference's (above "
    "{1:g})",
  ),
}  # fmt: skip
# alarm -> the key of its bound.
BOUNDS = {
  "winner_worse": "winner_worse_above",
  "runaway_margin": "runaway_margin_above",
  "drift": "drift_above",
  "reward_hacking": "reward_hacking_above",
}


def check_policies(config: Mapping[str, Any]) -> None:
  """Refuses alarms that name no policy, or that cannot work.

  Args:
    config: the run's whole.

  Raises:
    UserError: an unknown policy, a bound or window out of range, scorers that are not
      drawn, or too few checkpoints to go back to.
  """
  train, ev = config["train"], config["eval"]
  alarms = train["alarms"]
  for name, bound in BOUNDS.items():
    if alarms[name] not in POLICIES:
      raise unknown_name(f"train.alarms.{name}", alarms[name], POLICIES)
    if alarms[name] == "cap_margin" and name != CAPPED:
      raise UserError(
        f"train.alarms.{name}='cap_margin': only train.alarms.{CAPPED} has a margin to "
        f"cap. Expected one of: {', '.join(x for x in POLICIES if x != 'cap_margin')}."
      )
    if alarms[bound] <= 0:
      raise UserError(
        f"train.alarms.{bound}={alarms[bound]}: expected more than 0; "
        f"train.alarms.{name}='off' turns it off."
      )
  if alarms["window"] < 1:
    raise UserError(
      f"train.alarms.window={alarms['window']}: expected 1 update or more."
    )
  scorers = [alarms["trained_scorer"], alarms["unseen_scorer"]]
  if any(scorers) and not (ev["every"] and set(scorers) <= set(ev["scorers"])):
    raise UserError(
      f"train.alarms.trained_scorer={scorers[0]!r} and unseen_scorer={scorers[1]!r}: "
      f"expected both among eval.scorers={tuple(ev['scorers'])}, with eval.every above 0."
    )
  back = (train["keep_last"] - 1) * train["checkpoint_every"]
  going_back = [name for name in ALARMS if alarms[name] == "rollback"]
  if going_back and back <= alarms["window"]:
    raise UserError(
      f"train.alarms.{going_back[0]}='rollback' needs a checkpoint from before the "
      f"{alarms['window']} updates that it takes to notice, but train.keep_last="
      f"{train['keep_last']} and train.checkpoint_every={train['checkpoint_every']} may "
      "keep none: raise one of them."
    )


def stopped_error(finding: Finding) -> UserError:
  """The end of a run whose policy for an alarm is to stop."""
  return UserError(
    f"{finding.words}. Checkpoints from before step {finding.first} are from before it. "
    "Lower train.learning_rate, or raise objective.beta, in a new --workdir; or give the "
    f"same command with train.alarms.{finding.kind}='warn' to go on as it is, or with "
    "'rollback' or 'lower_lr'."
  )


class Alarms:
  """Watches a run's metrics, step by step, and the scores of its run points.

  An alarm is raised when the median of `window` steps is above its bound, and again only
  after it was not; one that lowers the learning rate, also after each further window.

  Args:
    settings: `train.alarms`.

  Attributes:
    due: name in `CHANGES` -> after how many completed updates it is to be made.
  """

  def __init__(self, settings: Mapping[str, Any]):
    self._settings = settings
    self._on = [name for name in ALARMS if settings[name] != "off"]
    self._forget()

  def _forget(self) -> None:
    window = self._settings["window"]
    self._history = {name: collections.deque(maxlen=window) for name in ALARMS}
    self._raised: set[str] = set()
    self._first_scores: list[float] | None = None
    self._points = 0
    self.due: dict[str, int] = {}

  def get_state(self) -> dict[str, Any]:
    """What `set_state` needs to find the same in the steps to come; JSON-able."""
    return {
      "history": {name: list(values) for name, values in self._history.items()},
      "raised": sorted(self._raised),
      "first_scores": self._first_scores,
      "points": self._points,
      "due": dict(self.due),
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from where `get_state` was called."""
    self._forget()
    for name, values in state["history"].items():
      self._history[name].extend(values)
    self._raised = set(state["raised"])
    self._first_scores, self._points = state["first_scores"], state["points"]
    # Checkpoints from before margins could be capped have the one change there was.
    older = {"lower_lr": state.get("lower_at")}
    self.due = {
      name: at for name, at in state.get("due", older).items() if at is not None
    }

  @property
  def reward_cap(self) -> float:
    """Share of the reference's error that keeps margins within the alarm's bound."""
    # A margin is the difference of two rewards.
    return self._settings[BOUNDS[CAPPED]] / 2

  def policy(self, finding: Finding) -> str:
    """What is to be done about a finding of this object."""
    return self._settings[finding.kind]

  def observe(self, step: int, values: Mapping[str, float]) -> list[Finding]:
    """Judges the metrics of one completed update; all of them, in order.

    What a method does not measure (no reference, no drift) raises nothing.
    """
    found = [self._of(name, step, values) for name in self._on]
    return [finding for finding in found if finding]

  def _of(self, name: str, step: int, values: Mapping[str, float]) -> Finding | None:
    alarm, history = ALARMS[name], self._history[name]
    value, scale = (values.get(key, math.nan) for key in (alarm.metric, "ref_err"))
    if not (math.isfinite(value) and scale > 0):
      return None
    history.append(alarm.sign * value / scale)
    if len(history) < self._settings["window"]:
      return None
    median, bound = statistics.median(history), self._settings[BOUNDS[name]]
    if median <= bound:
      self._raised.discard(name)
      return None
    again = name in self._raised
    if again and self._settings[name] != "lower_lr":
      return None
    self._raised.add(name)
    first = step - len(history) + 1
    history.clear()
    words = f"alarm {name} at step {step}: {alarm.words.format(median, bound)}"
    return Finding(name, first, step, words)

  def observe_scores(self, step: int, scores: Mapping[str, float]) -> list[Finding]:
    """Judges the scores of a run point, larger is better: reward hacking.

    Raised when, in `POINTS` run points in a row, the trained scorer's mean is above that
    of the run's first point and the unseen one's has fallen by more than a share of it.
    """
    settings, name = self._settings, "reward_hacking"
    keys = [settings["trained_scorer"], settings["unseen_scorer"]]
    if settings[name] == "off" or not all(key in scores for key in keys):
      return []
    trained, unseen = now = [float(scores[key]) for key in keys]
    if self._first_scores is None:
      self._first_scores = now
      return []
    before_trained, before_unseen = self._first_scores
    fell = before_unseen - unseen > settings[BOUNDS[name]] * abs(before_unseen)
    self._points = self._points + 1 if trained > before_trained and fell else 0
    if self._points != POINTS:
      return []
    words = (
      f"alarm {name} at step {step}: {keys[0]} rose from {before_trained:.4g} to "
      f"{trained:.4g} while {keys[1]} fell from {before_unseen:.4g} to {unseen:.4g}"
    )
    return [Finding(name, step, step, words)]


def sorted_by_weight(
  findings: Sequence[Finding], policy: Callable[[Finding], str]
) -> list[Finding]:
  """Those that end the run or go back come last: the others are said before."""
  return sorted(findings, key=lambda finding: POLICIES.index(policy(finding)))
