import base64
import html.parser
import io
import re
import xml.etree.ElementTree

import jinja2
import numpy as np
import pytest
from PIL import Image

from lpo_jax import pages
from lpo_jax.pages import charts

HOSTILE = "<script>alert('x')</script>\" onerror=\"a\x00b\x1b[31m\u202eright\ud800 $x$"


def _image(seed=0, size=16):
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def _row(candidate, baseline, scorer="taste", win_rate=0.75, **more):
  row = {"candidate": candidate, "baseline": baseline, "scorer": scorer, "n": 40}
  row |= {"win_rate": win_rate, "ci_low": win_rate - 0.1, "ci_high": win_rate + 0.1}
  return row | {"ties": 3, "mean_candidate": -0.5, "mean_baseline": 0.25} | more


def _metrics(scale=1.0):
  return [
    {
      "step": step,
      "loss": 0.7 / step,
      "implicit_acc": 0.6,
      "drift": 1e-5 * step * scale,
    }
    for step in range(1, 40)
  ]


def _report(**changes):
  images = np.stack([np.stack([_image(r + k) for k in range(2)]) for r in range(2)])
  fields = {
    "title": "A made-up run",
    "summary": "One thing.\n\nAnother thing, in 85 % of cases.",
    "headlines": [pages.Headline("LPO against base", 0.75, "taste")],
    "grid": pages.ImageGrid(
      candidates=["base", "LPO"],
      prompts=["a handwritten seven", HOSTILE],
      seeds=[[11, 12], [13, 14]],
      images={"base": images, "LPO": images},
      scores={"LPO": {"taste": [[0.1, 0.2], [0.3, 0.4]]}},
    ),
    "win_rates": [_row("LPO", "base"), _row("DPO", "base", p_sign=1e-9)],
    "scorers": {"taste": "What they like."},
    "training": {"DPO": _metrics(), "LPO": _metrics(2.0)},
    "data": {"Judgements read": 2400},
    "list_lengths": {3: 5, 2: 9},
    "timings": {"train": 75.0, "export": 25.0},
    "notes": ["Simulated."],
    "config": {"seed": 7, "prompt": HOSTILE},
    "versions": {"jax": "1.2.3"},
    "files": {"summary.json": "every figure"},
  }
  return pages.RunReport(**(fields | changes))


def _write(tmp_path, report):
  path = tmp_path / "report.html"
  pages.write_run_report(path, report)
  return path.read_text(encoding="utf-8")


class _Reader(html.parser.HTMLParser):
  """Collects what a browser would load, run, and show."""

  def __init__(self):
    super().__init__()
    self.loads, self.tags, self.handlers, self.ids, self.sections = [], [], [], [], []
    self.shown = ""

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
        self.loads.append(value)
      if name.startswith("on"):
        self.handlers.append(value)
      if name == "id":
        (self.sections if tag == "section" else self.ids).append(value)

  def handle_data(self, data):
    self.shown += data


def _read(text):
  reader = _Reader()
  reader.feed(text)
  return reader


ALL_SECTIONS = ["images", "win-rates", "training", "data", "timings", "notes"]


def test_a_full_report_has_every_section_and_its_figures(tmp_path):
  text = _write(tmp_path, _report())
  reader = _read(text)
  assert reader.sections == [*ALL_SECTIONS, "reproduce"]
  for words in ("0.650 – 0.850", "−0.5", "1 min 15 s", "75 %", "2,400", "seed 14"):
    assert words in reader.shown
  assert "85\u00a0% of cases" in text  # never broken across lines
  assert text.count('class="enlarge pixelated"') == 8
  assert text.count("<svg") == 1 + 3 + 1  # intervals, three metrics, list lengths


@pytest.mark.parametrize(
  ("section", "fields"),
  [
    ("images", {"grid": None}),
    ("win-rates", {"win_rates": ()}),
    ("training", {"training": {}}),
    ("training", {"training": {"LPO": [{"step": 1, "loss": float("nan")}]}}),
    ("data", {"data": {}, "list_lengths": {}}),
    ("timings", {"timings": {}}),
    ("notes", {"notes": ()}),
    ("reproduce", {"config": None, "versions": {}, "files": {}}),
  ],
)
def test_a_section_without_content_is_left_out(tmp_path, section, fields):
  sections = _read(_write(tmp_path, _report(**fields))).sections
  assert sections == [s for s in [*ALL_SECTIONS, "reproduce"] if s != section]


def test_a_title_alone_is_a_page(tmp_path):
  reader = _read(_write(tmp_path, pages.RunReport("Only a title")))
  assert reader.sections == [] and "Only a title" in reader.shown


def test_nothing_a_prompt_says_becomes_markup(tmp_path):
  report = _report(
    title=HOSTILE,
    summary=HOSTILE,
    notes=[HOSTILE],
    data={HOSTILE: HOSTILE},
    scorers={HOSTILE: HOSTILE},
    win_rates=[_row(HOSTILE, "base", HOSTILE)],
    training={HOSTILE: _metrics()},
    files={HOSTILE: HOSTILE},
    versions={HOSTILE: HOSTILE},
    timings={HOSTILE: 1.0},
    headlines=[pages.Headline(HOSTILE, HOSTILE, HOSTILE)],
  )
  text = _write(tmp_path, report)
  reader = _read(text)
  assert reader.tags.count("script") == 1 and reader.handlers == []
  assert "<script>alert" not in text and "&lt;script&gt;alert" in text
  assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", text)
  assert "a\ufffdb\ufffd[31m\ufffdright\ufffd $x$" in text


def test_what_only_a_run_has_is_text_too(tmp_path):
  text = _write(
    tmp_path,
    _report(
      samples=[
        pages.Sample(
          HOSTILE, base64.b64decode(pages.image_uri(_image()).partition(",")[2])
        )
      ],
      samples_of=[HOSTILE],
      checkpoints=[{"step": 1500, "megabytes": 3.5, "what": HOSTILE}],
      commands={HOSTILE: HOSTILE},
      training={"LPO": [{"step": 1, HOSTILE: 2.0}, {"step": 2, HOSTILE: 3.0}]},
      config={"seed": 7, "data": {"path": HOSTILE, "flip": "off"}, "more": {}},
      defaults={"seed": 0, "data": {"path": "", "flip": "off"}, "more": {}},
      links=["summary.json"],
    ),
  )
  reader = _read(text)
  assert {"samples", "checkpoints", "go-on"} <= set(reader.sections)
  assert reader.handlers == [] and reader.tags.count("script") == 1
  assert "step 1,500" in reader.shown and "3.5 MB, <script>alert" in reader.shown
  assert "summary.json" in reader.loads
  table = text[text.index('class="changed"') :].split("</table>")[0]
  assert re.findall(r"<tr><td><code>(.*?)</code>", table) == ["seed", "data.path"]
  assert "measured (1)" in reader.shown  # under its own name, cleaned and escaped


def test_the_page_loads_nothing(tmp_path):
  text = _write(tmp_path, _report())
  reader = _read(text)
  loads = [load for load in reader.loads if not load.startswith(("data:image/", "#"))]
  assert loads == []
  assert not {"link", "iframe", "object", "embed", "base"} & set(reader.tags)
  assert set(re.findall(r"url\(([^)]{1})", text)) <= {"#"}
  assert "http://" not in text and "https://" not in text
  assert "default-src 'none'" in text


def test_the_policy_names_the_hash_of_the_script(tmp_path):
  import hashlib

  text = _write(tmp_path, _report())
  script = re.search(r"<script>(.*?)</script>", text, re.DOTALL).group(1)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert f"script-src 'sha256-{digest}'" in text


def test_the_same_report_gives_the_same_bytes_and_ids_are_unique(tmp_path):
  one, other = _write(tmp_path, _report()), _write(tmp_path, _report())
  assert one == other
  ids = _read(one).ids
  assert len(ids) == len(set(ids)) > 0


def test_candidates_keep_their_colour_and_the_baseline_is_grey(tmp_path):
  text = _write(tmp_path, _report())
  assert '<span class="swatch c0"></span>base' in text
  assert '<span class="swatch c1"></span>LPO' in text
  assert '<span class="swatch c2"></span>DPO' in text
  text = _write(tmp_path, _report(grid=None))
  assert '<span class="swatch c0"></span>base' in text


def test_metrics_with_gaps_and_nan_are_drawn(tmp_path):
  rows = [
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": float("nan")},
    {"step": 3, "loss": None},
    {"step": 4, "implicit_acc": 0.5},
  ]
  text = _write(tmp_path, _report(training={"LPO": rows}))
  assert "Implicit accuracy" in text and "nan" not in text.lower().split("</style>")[1]


def test_missing_images_are_named(tmp_path):
  grid = pages.ImageGrid(["base"], ["p"], [[1, 2]], {"base": [[_image()]]})
  with pytest.raises(ValueError, match="2 seeds but 1 images of 'base'"):
    _write(tmp_path, _report(grid=grid))


def test_large_images_are_smooth_unless_told_otherwise(tmp_path):
  def grid(**options):
    large = {"base": [[_image(size=96)]]}
    return _report(grid=pages.ImageGrid(["base"], ["p"], [[1]], large, **options))

  assert 'class="enlarge"' in _write(tmp_path, grid())
  assert 'class="enlarge pixelated"' in _write(tmp_path, grid(pixelated=True))


def test_image_uri_keeps_every_pixel():
  pixels = _image()
  uri = pages.image_uri(pixels)
  assert uri.startswith("data:image/png;base64,")
  data = base64.b64decode(uri.split(",")[1])
  assert (np.asarray(Image.open(io.BytesIO(data))) == pixels).all()
  assert pages.image_uri(data) == uri
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "JPEG")
  assert pages.image_uri(buffer.getvalue()).startswith("data:image/jpeg;base64,")


def test_image_uri_refuses_what_is_no_image():
  with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64 \[4, 4, 3\]"):
    pages.image_uri(np.zeros((4, 4, 3)))
  with pytest.raises(ValueError, match="no known image type"):
    pages.image_uri(b"<svg onload=...>")


def test_a_failed_write_leaves_the_old_page(tmp_path):
  path = tmp_path / "page.html"
  pages.write_page(path, "base.html.j2")
  before = path.read_text()
  with pytest.raises(jinja2.UndefinedError):
    pages.write_page(path, "run_report.html.j2")
  assert path.read_text() == before
  assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def _texts(svg):
  return [node.text for node in xml.etree.ElementTree.fromstring(svg).iter("text")]


def test_line_chart_names_lines_and_scales_small_values():
  x = np.arange(1000)
  chart = charts.line_chart(
    {"a": (x, 2e-5 * x / 1000), "<b>": (x, 3e-5 * np.ones(1000))},
    title="Drift & co",
    x_label="step",
    hline=0.0,
    smooth=20,
  )
  texts = _texts(chart)
  assert {"a", "<b>", "Drift & co", "step", "× 10⁻⁵", "3"} <= set(texts)
  assert len(chart) < 60_000  # a thousand points are not drawn one by one
  assert "var(--c0, #868b94)" in chart and "var(--c1," in chart


def test_band_chart_scales_both_ends_of_a_frontier():
  nothing = float("nan")
  series = {
    "a": charts.Band([0.0, 2e-5], [0.5, 0.9], [0.4, 0.8], [0.6, 1.0], [(3e-5, 0.7)]),
    "<b>": charts.Band([0.0, 1e-5], [0.5, 0.6], [nothing] * 2, [nothing] * 2),
  }
  chart = charts.band_chart(series, title="Won", x_label="drift", y_label="wins")
  texts = _texts(chart)
  # The furthest dot sets the scale: 3 times 10^-5, and a tick at 3.
  assert {"a", "<b>", "Won", "× 10⁻⁵ drift", "wins"} <= set(texts)
  assert any(text in texts for text in ("3", "3.0")), texts
  assert chart.count("fill-opacity: 0.14") == 1  # no band where there is no interval


def test_chart_names_that_would_collide_are_pushed_apart():
  series = {name: ([0, 1], [0, 1]) for name in ("one", "two", "three")}
  chart = charts.line_chart(series, title="t")
  root = xml.etree.ElementTree.fromstring(chart)
  heights = [float(n.get("y")) for n in root.iter("text") if n.text in series]
  assert len(heights) == 3 and np.diff(sorted(heights)).min() > 12


def test_moving_mean_by_hand():
  mean = charts._moving_mean(np.array([0.0, 3.0, 6.0, np.nan, 2.0]), 3)
  np.testing.assert_allclose(mean, [1.5, 3.0, 4.5, np.nan, 2.0])


def test_stretch_means_keep_the_mean():
  x, y = charts._stretch_means(np.arange(1234.0), np.arange(1234.0) ** 2)
  assert len(x) == 300 and (np.diff(x) > 0).all() and y[0] < y[-1]


def test_bar_and_interval_charts_show_their_values():
  texts = _texts(charts.bar_chart([2, 3], [1200, 5], title="Lengths", y_label="lists"))
  assert {"2", "3", "1,200", "5", "Lengths", "lists"} <= set(texts)
  rows = [_row("LPO", "base"), _row("LPO", "DPO", win_rate=0.5)]
  texts = _texts(charts.interval_chart(rows))
  assert {"LPO against base", "LPO against DPO", "0.750", "0.500"} <= set(texts)


def test_empty_charts_are_still_charts():
  assert "<svg" in charts.line_chart({}, title="t")
  assert "<svg" in charts.band_chart({}, title="t")
  assert "<svg" in charts.bar_chart([], [], title="t")
  assert "<svg" in charts.interval_chart([])
