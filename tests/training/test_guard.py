"""What counts as going wrong, by hand, and the same again after a resume."""

import json
import math

import pytest

from lpo_jax.configs import common
from lpo_jax.errors import UserError
from lpo_jax.training import guard as guards
from lpo_jax.training.guard import Finding, Guard


def steady(guard, steps, *, first=1, **values):
  """Shows the guard the same values for so many steps; nothing may be found."""
  for step in range(first, first + steps):
    assert guard.observe(step, values) is None


def test_a_runaway_is_so_many_times_the_median_for_so_many_steps():
  guard = Guard(factor=5, steps=3)
  steady(guard, 20, loss=1.0)
  steady(guard, 2, first=21, loss=5.1)
  found = guard.observe(23, {"loss": 6.0})
  assert (found.kind, found.first, found.step) == ("runaway", 21, 23)
  assert found.words == (
    "loss is 6 at step 23, more than 5 times its running median 1, for 3 steps in a row"
  )


def test_exactly_the_factor_is_not_above_it():
  guard = Guard(factor=5, steps=1)
  steady(guard, 20, loss=1.0)
  steady(guard, 50, first=21, loss=5.0)


def test_a_single_spike_is_none_and_does_not_enter_the_median():
  guard = Guard(factor=5, steps=2)
  steady(guard, 20, loss=1.0)
  for step in range(21, 221, 2):  # every other step a spike, for longer than the window
    assert guard.observe(step, {"loss": 6.0}) is None
    assert guard.observe(step + 1, {"loss": 1.0}) is None


def test_the_first_steps_have_no_median():
  guard = Guard(factor=5, steps=1)
  steady(guard, guards.FEWEST - 1, loss=1.0)
  assert guard.observe(guards.FEWEST, {"loss": 1e9}) is None
  assert guard.observe(guards.FEWEST + 1, {"loss": 1e10}) is not None


def test_it_is_said_once_and_the_new_level_is_what_counts():
  guard = Guard(factor=5, steps=2)
  steady(guard, 20, loss=1.0)
  assert guard.observe(21, {"loss": 100.0}) is None
  assert guard.observe(22, {"loss": 100.0}) is not None
  steady(guard, 100, first=23, loss=100.0)


@pytest.mark.parametrize("name", ["loss", "err", "update_norm"])
def test_the_error_and_the_update_are_watched_too(name):
  """A preference loss falls to 0 while the errors of winner and loser explode."""
  guard = Guard(factor=5, steps=1)
  calm = {"loss": 0.5, "err": 0.1, "update_norm": 1e-3, "drift": 0.1}
  steady(guard, 20, **calm)
  assert guard.observe(21, {**calm, "drift": 1e9}) is None
  found = guard.observe(22, {**calm, name: 6 * calm[name]})
  assert found.words.startswith(f"{name} is")


@pytest.mark.parametrize("level", [0.0, -3.0])
def test_what_is_not_positive_has_no_multiple(level):
  guard = Guard(factor=5, steps=1)
  steady(guard, 20, loss=level)
  assert guard.observe(21, {"loss": 1e6}) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_found_at_once(value):
  guard = Guard(factor=5, steps=3)
  assert guard.observe(7, {"loss": 1.0, "grad_norm": value}) == Finding(
    "nonfinite", 7, 7, f"grad_norm became {value} at step 7"
  )
  # It never becomes a median.
  assert guard.get_state()["history"]["loss"] == []


def test_a_resumed_guard_finds_the_same():
  """The streak and the median go on, through JSON as in a checkpoint."""
  losses = [1.0 + (step * 37 % 11) / 10 for step in range(130)] + [9.0] * 4

  def find(cut):
    guard = Guard(factor=5, steps=4)
    found = []
    for step, loss in enumerate(losses, 1):
      if step == cut:
        state = json.loads(json.dumps(guard.get_state()))
        guard = Guard(factor=5, steps=4)
        guard.set_state(state)
      found.append(guard.observe(step, {"loss": loss}))
    return found, guard.get_state()

  straight = find(0)
  assert [f.step for f in straight[0] if f] == [134]
  for cut in (5, 101, 132, 134):
    assert find(cut) == straight


def test_going_back_lowers_the_rate_from_where_it_was():
  guard = Guard(factor=5, steps=2)
  steady(guard, 20, loss=1.0)
  state = guard.get_state()
  guard.observe(21, {"loss": 100.0})
  for count, scale in ((1, 0.5), (2, 0.25)):  # twice to the same checkpoint
    guard.went_back(state, 0.5)
    assert (guard.rollbacks, guard.scale) == (count, scale)
    assert guard.get_state()["history"] == state["history"]
    assert guard.get_state()["streak"] == 0


def test_a_checkpoint_is_good_when_a_good_step_came_after_it():
  found = Finding("nonfinite", first=7, step=7, words="")
  # What step 6 left is what step 7 was bad with.
  assert guards.good_checkpoints([6, 8, 3, 5, 7], found) == [3, 5]


def settings(**changes):
  return {**common.get_config().train.to_dict(), **changes}


def test_the_defaults_can_be_meant():
  guards.check_policies(settings())
  assert not guards.goes_back(settings())
  assert guards.goes_back(settings(on_nonfinite="rollback"))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"on_nonfinite": "skp"}, "unknown train.on_nonfinite 'skp'; did you mean 'skip'"),
    ({"on_runaway": "rolback"}, "did you mean 'rollback'"),
    ({"runaway_factor": 1.0}, "train.runaway_factor=1.0: expected more than 1"),
    ({"rollback_factor": 0.0}, "train.rollback_factor=0.0: expected above 0"),
    ({"rollback_factor": 1.5}, "train.rollback_factor=1.5"),
    ({"on_nonfinite": "rollback", "keep_last": 1}, "train.keep_last=1 and"),
    (
      {"on_runaway": "rollback", "checkpoint_every": 5},
      "checkpoint from before the 5 step",
    ),
  ],
)
def test_policies_that_cannot_work_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    guards.check_policies(settings(**changes))
