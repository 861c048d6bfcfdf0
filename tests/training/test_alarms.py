"""What raises an alarm, by hand, and the same again after a resume."""

import json
import math

import pytest

from lpo_jax.configs import common
from lpo_jax.errors import UserError
from lpo_jax.training import alarms as alarms_lib
from lpo_jax.training.alarms import Alarms


def settings(**changed):
  given = common.get_config().train.alarms
  with given.unlocked():
    given.update({"window": 3, **changed})
  return given


def steps(alarms, rows, first=1, scale=2.0):
  """Shows rows of metrics; returns the (kind, first, step) that were found."""
  found = []
  for step, row in enumerate(rows, first):
    for finding in alarms.observe(step, {"ref_err": scale, **row}):
      found.append((finding.kind, finding.first, finding.step))
  return found


def test_the_winner_is_worse_when_the_median_of_the_window_is():
  alarms = Alarms(settings(winner_worse_above=0.05))
  gains = [0.3, -0.2, 0.3, -0.2, -0.12]  # bound: -0.05 * 2; medians 0.3, -0.2, -0.12
  rows = [{"winner_gain": x} for x in gains]
  assert steps(alarms, rows) == [("winner_worse", 2, 4)]


def test_exactly_the_bound_raises_nothing():
  alarms = Alarms(settings(drift_above=0.25))
  assert steps(alarms, [{"drift": 0.5}] * 20) == []
  assert steps(alarms, [{"drift": 0.5001}] * 3, first=21) == [("drift", 20, 22)]


def test_the_words_have_the_numbers():
  alarms = Alarms(settings(window=1, runaway_margin_above=0.5))
  (finding,) = alarms.observe(7, {"ref_err": 0.5, "margin_p90": 1.0})
  assert finding.words == (
    "alarm runaway_margin at step 7: a tenth of the margins is above 2 of the "
    "reference's error (bound 0.5)"
  )


def test_an_alarm_is_raised_once_until_it_was_quiet():
  alarms = Alarms(settings(drift_above=0.1))
  loud, quiet = {"drift": 1.0}, {"drift": 0.0}
  assert steps(alarms, [loud] * 30) == [("drift", 1, 3)]
  assert steps(alarms, [quiet] * 3, first=31) == []
  assert steps(alarms, [loud] * 30, first=34) == [("drift", 33, 35)]


def test_what_lowers_the_rate_acts_again_after_each_window():
  alarms = Alarms(settings(drift_above=0.1, drift="lower_lr"))
  found = steps(alarms, [{"drift": 1.0}] * 9)
  assert [step for _, _, step in found] == [3, 6, 9]


@pytest.mark.parametrize("row", [{}, {"drift": math.nan}, {"drift": math.inf}])
def test_what_is_not_measured_raises_nothing(row):
  alarms = Alarms(settings(window=1, drift_above=0.1))
  assert steps(alarms, [row] * 5) == []
  assert alarms.observe(6, {"drift": 9.0}) == []  # no reference to compare with
  assert steps(Alarms(settings(window=1, drift="off")), [{"drift": 9.0}] * 5) == []


def hacking(points, **changed):
  names = {"trained_scorer": "taste", "unseen_scorer": "legible"}
  alarms = Alarms(settings(**names, **changed))
  found = []
  for step, (taste, legible) in enumerate(points):
    found += alarms.observe_scores(step, {"taste": taste, "legible": legible})
  return [(f.kind, f.step) for f in found]


def test_reward_hacking_is_one_score_up_and_the_other_down():
  start, bad = (0.0, 0.9), (1.0, 0.8)  # 0.9 - 0.8 > 0.1 * 0.9
  assert hacking([start, bad, bad, bad]) == [("reward_hacking", 2)]
  assert hacking([start, bad, start, bad]) == []  # one point alone is chance
  assert hacking([start] + [(1.0, 0.82)] * 3) == []  # within the share
  assert hacking([start] + [(-1.0, 0.1)] * 3) == []  # both fell: no hacking
  assert hacking([start, bad, bad], reward_hacking="off") == []


def test_a_negative_score_falls_by_a_share_of_its_size():
  assert hacking([(0.0, -1.0), (1.0, -1.2), (1.0, -1.2)]) == [("reward_hacking", 2)]
  assert hacking([(0.0, -1.0), (1.0, -1.05), (1.0, -1.05)]) == []


def test_a_resumed_run_finds_what_the_other_finds():
  """At every step the state goes through JSON and into new hands."""
  chosen = settings(drift_above=0.1, drift="lower_lr", trained_scorer="a")
  with chosen.unlocked():
    chosen.unseen_scorer = "b"
  rows = [{"drift": 0.1 * (step % 7), "winner_gain": -step} for step in range(40)]
  whole, found = Alarms(chosen), []
  for step, row in enumerate(rows):
    found += whole.observe(step, {"ref_err": 1.0, **row})
    found += whole.observe_scores(step, {"a": step, "b": -step})
  assert len(found) > 5
  state, again = Alarms(chosen).get_state(), []
  for step, row in enumerate(rows):
    alarms = Alarms(chosen)
    alarms.set_state(json.loads(json.dumps(state)))
    again += alarms.observe(step, {"ref_err": 1.0, **row})
    again += alarms.observe_scores(step, {"a": step, "b": -step})
    state = alarms.get_state()
  assert again == found


def test_those_that_end_the_run_come_last():
  chosen = settings(window=1, drift="stop", winner_worse="warn", drift_above=0.1)
  alarms = Alarms(chosen)
  found = alarms.observe(1, {"ref_err": 1.0, "drift": 9.0, "winner_gain": -9.0})
  ordered = alarms_lib.sorted_by_weight(found[::-1], alarms.policy)
  assert [finding.kind for finding in ordered] == ["winner_worse", "drift"]


@pytest.mark.parametrize(
  "changed,said",
  [
    ({"train.alarms.drift": "explode"}, "unknown train.alarms.drift"),
    ({"train.alarms.drift": "cap_margin"}, "only train.alarms.runaway_margin has a"),
    ({"train.alarms.drift_above": 0.0}, "drift_above=0.0: expected more than 0"),
    ({"train.alarms.window": 0}, "expected 1 update or more"),
    ({"train.alarms.trained_scorer": "x"}, "expected both among eval.scorers"),
    (
      {"train.alarms.drift": "rollback", "train.checkpoint_every": 5},
      "'rollback' needs a checkpoint from before the 5 updates",
    ),
    ({}, None),
  ],
)
def test_settings_that_cannot_work_are_refused(changed, said):
  config = common.get_config()
  config.update_from_flattened_dict(changed)
  if said is None:
    alarms_lib.check_policies(config)
    return
  with pytest.raises(UserError, match=said.replace("(", r"\(")):
    alarms_lib.check_policies(config)
