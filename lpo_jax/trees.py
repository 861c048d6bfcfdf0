"""Parameter trees: leaves by name, and ordered regex rules over these names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from lpo_jax.errors import UserError


def leaf_name(path: Sequence[Any]) -> str:
  """Joins a jax key path with dots: ``down_blocks.0.resnets.1.conv1.kernel``."""
  parts = []
  for entry in path:
    for attribute in ("key", "name", "idx"):
      if hasattr(entry, attribute):
        parts.append(str(getattr(entry, attribute)))
        break
  return ".".join(parts)


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves of `tree` by dotted name, in tree order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {leaf_name(path): leaf for path, leaf in leaves}


# Stands in a name for the number of a block, where equal blocks are stacked in one
# array whose first axis is the block.
EACH = "each"


def is_stacked(name: str) -> bool:
  """Whether the first axis of a parameter is the block of a stack."""
  return EACH in name.split(".")


def block_names(name: str, shape: Sequence[int]) -> list[str]:
  """Returns the name of each block of a stack; that of any other parameter as it is.

  Args:
    name: dotted, of a parameter or of a module in which it lies.
    shape: of the parameter.

  >>> block_names("layers.each.bias", (2, 8))
  ['layers.0.bias', 'layers.1.bias']
  """
  if not is_stacked(name):
    return [name]
  words = name.split(".")
  place = words.index(EACH)
  return [
    ".".join([*words[:place], str(block), *words[place + 1 :]])
    for block in range(shape[0])
  ]


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Maps ``fn(name, leaf, *other_leaves)`` over trees of equal structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(leaf_name(path), *leaves), tree, *rest
  )


def unflatten_named(leaves: Mapping[str, Any], like: Any) -> Any:
  """Puts `leaves`, by dotted name, into the structure of `like`.

  Raises:
    UserError: a name of `like` is missing from `leaves`, or one is left over.
  """
  names = named_leaves(like)
  missing = [name for name in names if name not in leaves]
  extra = [name for name in leaves if name not in names]
  if missing or extra:
    raise UserError(
      f"parameter names do not match: {len(missing)} missing (first: {missing[:3]}), "
      f"{len(extra)} unexpected (first: {extra[:3]})."
    )
  return map_named(lambda name, _: leaves[name], like)


def pick(tree: Mapping[Any, Any], names: Collection[str]) -> dict[Any, Any]:
  """Returns the leaves of these names, in as much of the structure as holds them.

  Args:
    tree: nested mappings.
    names: dotted; others are left out, and so are branches without any.

  >>> pick({"a": {"kernel": 1, "bias": 2}, "b": {"bias": 3}}, ["a.bias"])
  {'a': {'bias': 2}}
  """

  def walk(branch: Mapping[Any, Any], above: str) -> dict[Any, Any]:
    found = {}
    for key, value in branch.items():
      name = f"{above}{key}"
      if isinstance(value, Mapping):
        inner = walk(value, f"{name}.")
        found |= {key: inner} if inner else {}
      elif name in names:
        found[key] = value
    return found

  return walk(tree, "")


def overlay(tree: Any, part: Any) -> Any:
  """Returns `tree` with the leaves of `part` in place of its own, by name.

  >>> overlay({"a": {"kernel": 1, "bias": 2}}, {"a": {"bias": 5}})
  {'a': {'bias': 5, 'kernel': 1}}
  """
  instead = named_leaves(part)
  return map_named(lambda name, leaf: instead.get(name, leaf), tree)


def match_rules(rules: Sequence[tuple[str, Any]], tree: Any, *, what: str) -> Any:
  """Gives every leaf the value of the first rule whose regex finds its name.

  Args:
    rules: (regex, value) in order; `re.search` against the dotted leaf name.
    tree: any pytree.
    what: what the values mean, for the error ("partition", "weight decay").

  Returns:
    A tree of `tree`'s structure that holds the matched values.

  Raises:
    UserError: a leaf that no rule matches (nothing is decided by silence), or rules
      that are none.

  >>> match_rules([("bias$", 0.0), (".*", 0.01)], {"bias": 1, "kernel": 2}, what="decay")
  {'bias': 0.0, 'kernel': 0.01}
  """
  try:
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
  except (TypeError, ValueError, re.error) as e:
    raise UserError(
      f"{what} rules {rules!r} cannot be used ({e}); expected (regex, value) pairs, such "
      "as (('bias$', False), ('.*', True))."
    ) from e

  def first_match(name: str, _: Any) -> Any:
    for pattern, value in compiled:
      if pattern.search(name):
        return value
    raise UserError(
      f"no {what} rule matches parameter {name!r}; rules are tried in order: "
      f"{[p.pattern for p, _ in compiled]}. Add one, or end the list with '.*'."
    )

  return map_named(first_match, tree)
