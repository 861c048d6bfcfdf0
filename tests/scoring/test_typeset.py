from lpo_jax.scoring import typeset

HOSTILE = "<script>alert('x')</script> \"q\" a|b `c` *d* [e](f) \\ {g} 50 % $h$ #_~^&\n\x1b[31m\u202e"


def _row(candidate="lpo"):
  return {
    "candidate": candidate,
    "baseline": "base",
    "scorer": "taste",
    "n": 4,
    "win_rate": 0.625,
    "ci_low": 0.25,
    "ci_high": 1.0,
    "ties": 1,
    "mean_candidate": 2.75,
    "mean_baseline": -0.0123456,
  }


def test_markdown_table():
  lines = typeset.markdown_table([_row("l|po")]).splitlines()
  assert lines[0] == (
    "| candidate | baseline | scorer | win rate | 95 % interval | ties | n | mean "
    "candidate | mean baseline |"
  )
  assert lines[1] == "|---|---|---|--:|--:|--:|--:|--:|--:|"
  assert lines[2] == (
    "| l\\|po | base | taste | 0.625 | 0.250 to 1.000 | 1 | 4 | 2.75 | -0.01235 |"
  )
  assert typeset.markdown_table([]) == ""


def test_p_values_and_protocols_are_shown_where_they_are():
  row = _row() | {"p_sign": 0.02, "p_corrected": 1e-7, "protocol": "same_seed"}
  lines = typeset.markdown_table([row]).splitlines()
  assert lines[0].startswith("| protocol |")
  assert lines[2].endswith("| 0.0200 | 1.0e-07 |")
  assert "protocol" not in typeset.markdown_table([row], typeset.brief([row]))
  both = [row, row | {"protocol": "median_of_k"}]
  assert "median_of_k" in typeset.markdown_table(both, typeset.brief(both))


def test_latex_rows():
  lines = typeset.latex_rows([_row("l&po_2")]).splitlines()
  assert lines[0].startswith("% candidate & baseline & scorer & win rate & 95 \\% int")
  assert lines[1] == (
    "l\\&po\\_2 & base & taste & 0.625 & 0.250 to 1.000 & 1 & 4 & 2.75 & -0.01235 \\\\"
  )
  assert typeset.latex_rows([]) == ""


def test_nothing_hostile_gets_through():
  table = typeset.markdown_table([_row(HOSTILE)])
  assert len(table.splitlines()) == 3 and "<" not in table
  assert "\\|b \\`c\\` \\*d\\* \\[e\\](f) \\\\" in table
  line = typeset.latex_rows([_row(HOSTILE)]).splitlines()[1]
  assert "\\textless{}script\\textgreater{}" in line
  assert "\\textbackslash{} \\{g\\} 50 \\% \\$h\\$ \\#\\_\\textasciitilde{}" in line
  assert line.endswith("\\\\") and line.count("\\&") == 1
  for text in (table, line):
    assert not any(ord(c) < 32 and c != "\n" for c in text) and "\u202e" not in text
