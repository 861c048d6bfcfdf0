"""Rows of results as Markdown and LaTeX; names are strangers' text and are escaped."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lpo_jax.console import printable

_MARKDOWN = re.compile(r"([\\`*\[\]|])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LATEX = {
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "<": r"\textless{}",
  ">": r"\textgreater{}",
  "|": r"\textbar{}",
  "\ufffd": "?",
  **{character: f"\\{character}" for character in "&%$#_{}"},
}


def one_line(text: Any) -> str:
  """Returns text on one line, control characters shown as U+FFFD."""
  return re.sub(r"[\s\u2028\u2029]+", " ", printable(str(text)))


def markdown(text: Any) -> str:
  r"""Returns text as it stands in a Markdown table: no markup, no HTML.

  >>> markdown("a|b <script>")
  'a\\|b &lt;script&gt;'
  """
  text = _MARKDOWN.sub(r"\\\1", one_line(text))
  return "".join(_HTML.get(c, c) for c in text)


def latex(text: Any) -> str:
  r"""Returns text as LaTeX sets it.

  >>> latex("50 % of a_b")
  '50 \\% of a\\_b'
  """
  return "".join(_LATEX.get(c, c) for c in one_line(text))


@dataclasses.dataclass(frozen=True)
class Column:
  """One column of a table.

  Attributes:
    title: what heads it.
    show: row -> text, not yet escaped.
    needs: the key without which a row has no such column.
    number: whether it is set to the right.
  """

  title: str
  show: Callable[[Mapping[str, Any]], str]
  needs: str
  number: bool = True


def _p(value: float) -> str:
  return f"{value:.1e}" if value < 0.0001 else f"{value:.4f}"


def _name(key: str) -> Column:
  return Column(key, lambda row: row[key], key, number=False)


COMPARISONS = (
  _name("category"),
  _name("protocol"),
  _name("candidate"),
  _name("baseline"),
  _name("scorer"),
  Column("win rate", lambda r: f"{r['win_rate']:.3f}", "win_rate"),
  Column(
    "95 % interval", lambda r: f"{r['ci_low']:.3f} to {r['ci_high']:.3f}", "ci_low"
  ),
  Column("ties", lambda r: str(r["ties"]), "ties"),
  Column("n", lambda r: str(r["n"]), "n"),
  Column("mean candidate", lambda r: f"{r['mean_candidate']:.4g}", "mean_candidate"),
  Column("mean baseline", lambda r: f"{r['mean_baseline']:.4g}", "mean_baseline"),
  Column("sign test p", lambda r: _p(r["p_sign"]), "p_sign"),
  Column("p corrected", lambda r: _p(r["p_corrected"]), "p_corrected"),
)
SCORES = (
  _name("candidate"),
  _name("scorer"),
  Column("mean", lambda r: f"{r['mean']:.4g}", "mean"),
  Column("standard deviation", lambda r: f"{r['deviation']:.4g}", "deviation"),
  Column("median", lambda r: f"{r['median']:.4g}", "median"),
  Column("images", lambda r: str(r["images"]), "images"),
)


def brief(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
  """The columns that a console has room for; no protocol where there is one only."""
  left_out = {"p_sign"}
  if len({row.get("protocol") for row in rows}) < 2:
    left_out.add("protocol")
  return [column for column in COMPARISONS if column.needs not in left_out]


def _present(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]):
  return [column for column in columns if column.needs in rows[0]]


def markdown_table(
  rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = COMPARISONS
) -> str:
  """Returns `rows` as a Markdown table, for the console and for notes.

  Args:
    rows: dictionaries that have the same keys.
    columns: those whose key the rows lack are left out.

  Returns:
    Lines without a final line feed; "" if there are no rows.
  """
  if not rows:
    return ""
  columns = _present(rows, columns)
  cells = [[markdown(c.title) for c in columns]]
  cells += [[markdown(c.show(row)) for c in columns] for row in rows]
  lines = [f"| {' | '.join(row)} |" for row in cells]
  rule = "|".join("--:" if column.number else "---" for column in columns)
  return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def latex_rows(
  rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = COMPARISONS
) -> str:
  """Returns `rows` as lines of a LaTeX tabular, with the titles as a comment above.

  Args:
    rows: dictionaries that have the same keys.
    columns: those whose key the rows lack are left out.

  Returns:
    Lines without a final line feed; "" if there are no rows.
  """
  if not rows:
    return ""
  columns = _present(rows, columns)
  titles = " & ".join(latex(c.title) for c in columns)
  lines = [" & ".join(latex(c.show(row)) for c in columns) + r" \\" for row in rows]
  return "\n".join([f"% {titles}", *lines])
