"""Names of leaves, and rules over them."""

import dataclasses

import jax
import numpy as np
import pytest

from lpo_jax import trees
from lpo_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
  left: object
  right: object


TREE = {
  "down": {0: {"kernel": 1, "bias": 2}, 10: {"kernel": 3}, 2: {"kernel": 4}},
  "pair": Pair(left=[5, 6], right=None),
}
NAMES = {
  "down.0.bias": 2,
  "down.0.kernel": 1,
  "down.2.kernel": 4,
  "down.10.kernel": 3,
  "pair.left.0": 5,
  "pair.left.1": 6,
}


def test_names_of_dicts_lists_and_dataclasses():
  assert trees.named_leaves(TREE) == NAMES


def test_names_are_in_tree_order():
  assert list(trees.named_leaves(TREE).values()) == jax.tree.leaves(TREE)


def test_map_named_sees_name_and_all_leaves():
  mapped = trees.map_named(lambda name, a, b: f"{name}:{a + b}", TREE, TREE)
  assert trees.named_leaves(mapped) == {n: f"{n}:{2 * v}" for n, v in NAMES.items()}
  assert mapped["pair"].right is None


def test_unflatten_is_the_inverse_whatever_the_order():
  shuffled = dict(sorted(NAMES.items(), key=lambda item: -item[1]))
  assert trees.unflatten_named(shuffled, TREE) == TREE


def test_unflatten_names_what_does_not_match():
  wrong = {**NAMES, "up.0": 1}
  del wrong["down.2.kernel"]
  with pytest.raises(UserError, match=r"1 missing .*down\.2\.kernel.*1 unexpected.*up"):
    trees.unflatten_named(wrong, TREE)


def test_first_matching_rule_wins():
  rules = [(r"bias$", "a"), (r"^down\.(0|10)\.", "b"), (r".*", "c")]
  assert trees.named_leaves(trees.match_rules(rules, TREE, what="test")) == {
    "down.0.bias": "a",
    "down.0.kernel": "b",
    "down.10.kernel": "b",
    "down.2.kernel": "c",
    "pair.left.0": "c",
    "pair.left.1": "c",
  }


def test_a_leaf_without_rule_is_an_error():
  with pytest.raises(UserError, match=r"no decay rule matches parameter 'pair.left.0'"):
    trees.match_rules([("kernel|bias", 1)], TREE, what="decay")


def test_rules_may_hold_false_values():
  matched = trees.match_rules([("a", None), (".*", False)], {"a": 1, "b": 2}, what="x")
  assert matched == {"a": None, "b": False}


def test_leaves_may_be_arrays_of_no_elements():
  tree = {"a": np.zeros((0, 3))}
  assert trees.named_leaves(tree)["a"].shape == (0, 3)
