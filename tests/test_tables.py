"""Choosing by name: what is bound, and what is refused with which words."""

import pytest

from lpo_jax import errors, tables
from lpo_jax.errors import UserError


def scale(x, *, factor, offset=0):
  return x * factor + offset


def plain(x):
  return x


TABLE = {"scale": scale, "plain": plain}


def test_binds_options_and_keeps_defaults():
  assert tables.bind("function", TABLE, "scale", {"factor": 3})(2) == 6
  assert tables.bind("function", TABLE, "scale", {"factor": 3, "offset": 1})(2) == 7
  assert tables.bind("function", TABLE, "plain", {})(2) == 2


def test_options_are_the_keyword_only_parameters():
  assert list(tables.options_of(scale)) == ["factor", "offset"]
  assert not tables.options_of(plain)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("scael", {}, ["unknown function 'scael'", "mean 'scale'", "plain, scale"]),
    ("zzz", {}, ["unknown function 'zzz'.", "plain, scale"]),
    (
      "scale",
      {"factr": 1},
      ["unknown option of function 'scale' 'factr'", "mean 'factor'"],
    ),
    ("scale", {"offset": 1}, ["needs factor", "function.factor"]),
    ("plain", {"x": 1}, ["unknown option of function 'plain' 'x'"]),
  ],
)
def test_refusals_name_what_came_and_what_was_meant(name, options, words):
  with pytest.raises(UserError) as refusal:
    tables.bind("function", TABLE, name, options)
  for word in words:
    assert word in str(refusal.value)


def test_nearest_is_none_when_nothing_is_close():
  assert errors.nearest("lpo", ["dpo", "sft"]) == "dpo"
  assert errors.nearest("quite different", ["dpo", "sft"]) is None
  assert errors.nearest("lpo", []) is None
