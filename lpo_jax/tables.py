"""A choice is a table of functions, found by name and bound to checked options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lpo_jax.errors import UserError, unknown_name


def options_of(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  """Returns the keyword-only parameters of `fn`: what a config may set."""
  parameters = inspect.signature(fn).parameters
  return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def bind(
  kind: str,
  table: Mapping[str, Callable[..., Any]],
  name: str,
  options: Mapping[str, Any],
) -> functools.partial:
  """Finds `name` in `table` and binds `options` to its keyword-only parameters.

  Args:
    kind: what the table holds, for the error ("objective").
    table: functions by name.
    name: the choice.
    options: values for keyword-only parameters.

  Raises:
    UserError: an unknown name or option (with the nearest match), or a required option
      that is missing.

  >>> def half(x, *, offset): return x / 2 + offset
  >>> bind("function", {"half": half}, "half", {"offset": 1})(4)
  3.0
  """
  if name not in table:
    raise unknown_name(kind, name, table)
  known = options_of(table[name])
  for option in options:
    if option not in known:
      raise unknown_name(f"option of {kind} {name!r}", option, known)
  required = [n for n, p in known.items() if p.default is p.empty]
  missing = [n for n in required if n not in options]
  if missing:
    raise UserError(
      f"{kind} {name!r} needs {', '.join(missing)}; set {kind}.{missing[0]} in the config."
    )
  return functools.partial(table[name], **options)
