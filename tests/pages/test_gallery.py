"""The gallery: what is in the file, and what a browser makes of it."""

import base64
import functools
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from lpo_jax import pages
from lpo_jax.pages import gallery

HOSTILE = "</script><script>document.title='x'</script> <img src=x onerror=\"alert(1)\">\u202e\x1b[31m\u2028&amp; cat"
NAMES = ("base", "lpo", 'a<b>"c\x07')
ROWS = 30
# Of lpo against base under taste: row 7 loses most, row 4 wins most.
CHANGE = np.array([0.1 * (n % 5) - 0.05 for n in range(ROWS)])
CHANGE[7], CHANGE[4] = -3.0, 2.0


def picture(path):
  """A smooth picture, another for every name."""
  seed = int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16)
  small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((120, 120), Image.Resampling.BICUBIC))


def made_up(folder, rows=ROWS, **changes):
  prompts = [f"{'cat' if n % 3 else 'dog'} number {n}" for n in range(rows)]
  prompts[2] = HOSTILE
  taste = np.linspace(20, 22, rows)
  change = np.resize(CHANGE, rows)
  fields = {
    "title": "A made-up evaluation",
    "lead": "Three candidates.",
    "candidates": NAMES,
    "prompts": prompts,
    "seeds": list(range(100, 100 + rows)),
    "images": {
      name: [folder / f"c{c}" / f"{n:05d}.png" for n in range(rows)]
      for c, name in enumerate(NAMES)
    },
    "read": picture,
    "scores": {
      "base": {"taste": taste, "error": taste},
      "lpo": {"taste": taste + change, "error": taste - change},
      NAMES[2]: {"taste": taste + 0.01, "error": taste},
    },
    "lower_is_better": {"error"},
    "categories": ["Animals" if n % 2 else "<i>" for n in range(rows)],
    "facts": {"sampler": "ddim", HOSTILE: HOSTILE},
  }
  return gallery.Gallery(**(fields | changes))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gallery")
  path = folder / "gallery.html"
  assert gallery.write_gallery(path, made_up(folder)) == list(range(ROWS))
  return path


def data_of(path):
  text = path.read_text("utf-8")
  found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
  return json.loads(found.group(1))


def test_every_row_has_its_thumbnails_scores_and_links(page):
  data = data_of(page)
  assert data["candidates"] == ["base", "lpo", 'a<b>"c\ufffd']
  assert [s["lower"] for s in data["scorers"]] == [False, True]
  assert [row["n"] for row in data["rows"]] == list(range(ROWS))
  row = data["rows"][7]
  assert row["s"] == 107 and row["c"] == "Animals" and row["p"] == "cat number 7"
  assert row["v"][1][0] == pytest.approx(row["v"][0][0] - 3.0, abs=2e-4)
  assert row["l"] == ["c0/00007.png", "c1/00007.png", "c2/00007.png"]
  for c, text in enumerate(row["i"]):
    shown = Image.open(io.BytesIO(base64.b64decode(text)))
    assert shown.format == "WEBP" and shown.size == (120, 120)
    there = picture(page.parent / f"c{c}" / "00007.png").astype(int)
    assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - there).mean() < 8


def test_nothing_a_stranger_wrote_becomes_markup(page):
  text = page.read_text("utf-8")
  assert text.count("<script") == 2 and "<img src" not in text
  assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
  cleaned = pages.printable(HOSTILE)
  assert data_of(page)["rows"][2]["p"] == cleaned
  assert "&lt;/script&gt;&lt;script&gt;" in text  # in the list of facts


def test_the_file_loads_nothing_and_names_its_script(page):
  text = page.read_text("utf-8")
  assert not re.search(r"https?://|url\((?!#)|@import|<link|<iframe", text)
  script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
  assert len(script) == 1
  digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
  assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text


def test_tiny_images_keep_every_pixel(tmp_path):
  tiny = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  path = tmp_path / "gallery.html"
  gallery.write_gallery(path, made_up(tmp_path, rows=3, read=lambda file: tiny))
  encoded = base64.b64decode(data_of(path)["rows"][0]["i"][0])
  assert (np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")) == tiny).all()


def test_images_elsewhere_are_shown_but_not_linked(tmp_path):
  there = made_up(tmp_path / "elsewhere", rows=3)
  (tmp_path / "here").mkdir()
  path = tmp_path / "here" / "gallery.html"
  gallery.write_gallery(path, there)
  assert data_of(path)["rows"][0]["l"] == ["", "", ""]
  assert str(tmp_path) not in path.read_text("utf-8")


@functools.cache
def noisy(path):
  """The hardest to compress: noise."""
  seed = int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16)
  return np.random.default_rng(seed).integers(0, 256, (320, 320, 3), np.uint8)


def test_thumbnails_shrink_until_all_rows_fit(tmp_path):
  path = tmp_path / "gallery.html"
  for limit, least, most in ((2_400_000, 200, 320), (700_000, 100, 200)):
    shown = gallery.write_gallery(
      path, made_up(tmp_path, rows=9, read=noisy), max_bytes=limit
    )
    assert shown == list(range(9)) and path.stat().st_size <= limit
    encoded = base64.b64decode(data_of(path)["rows"][0]["i"][0])
    assert least <= Image.open(io.BytesIO(encoded)).width <= most


def test_below_the_least_size_rows_are_left_out_and_the_page_says_so(tmp_path):
  path = tmp_path / "gallery.html"
  many = made_up(tmp_path, rows=ROWS, read=noisy)
  shown = gallery.write_gallery(path, many, max_bytes=500_000)
  assert path.stat().st_size <= 500_000
  assert 4 <= len(shown) < ROWS and shown == sorted(set(shown))
  assert 7 in shown  # the worst regression is among them
  assert f"shows {len(shown)} of {ROWS} rows" in path.read_text("utf-8")
  assert [row["n"] for row in data_of(path)["rows"]] == shown


def test_a_sample_that_misleads_does_not_make_the_file_too_large(tmp_path):
  flat = np.zeros((150, 150, 3), np.uint8)

  def read(path):  # of 66 rows every second one is sampled
    return noisy(path)[:150, :150] if int(path.stem) % 2 else flat

  path = tmp_path / "gallery.html"
  many = made_up(tmp_path, rows=66, read=read)
  shown = gallery.write_gallery(path, many, max_bytes=600_000)
  assert 300_000 < path.stat().st_size <= 600_000 and 10 < len(shown) < 66


@pytest.mark.slow
def test_five_hundred_prompts_of_four_candidates_are_below_thirty_megabytes(tmp_path):
  def busy(path):  # more detail than a photograph has
    seed = int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    large = np.asarray(small.resize((512, 512), Image.Resampling.BICUBIC)).astype(int)
    return np.uint8(np.clip(large + rng.integers(-12, 12, large.shape), 0, 255))

  path = tmp_path / "gallery.html"
  names = ("base", "a", "b", "c")
  images = {
    name: [tmp_path / f"{n % 40}{name}.png" for n in range(500)] for name in names
  }
  scores = {name: {"taste": np.zeros(500)} for name in names}
  shown = gallery.write_gallery(
    path,
    made_up(
      tmp_path, rows=500, candidates=names, images=images, scores=scores, read=busy
    ),
  )
  assert len(shown) == 500 and 15e6 < path.stat().st_size < 30e6


ORDER = "[...document.querySelectorAll('.row')].map(row => +row.dataset.row)"
COUNT = "document.getElementById('count').textContent"
WORDS = "document.querySelector('dialog .words').textContent"
OPEN = "document.querySelector('dialog').open"


def choose(browser, name, value):
  """Chooses in a select as a person does: the value changes, and an event says so."""
  element = f"document.getElementById({json.dumps(name)})"
  browser.js(f"{element}.value = {json.dumps(value)}; 0")
  browser.js(f"{element}.dispatchEvent(new Event('input'))")


def test_in_a_browser(page, browser):
  """Filter, sort, enlarge, move, close; dark; links to views; no request, no script."""
  address = page.as_uri()
  browser.open(address)
  assert browser.js("document.title") == "A made-up evaluation"
  assert browser.js(COUNT) == "30 of 30 rows"
  assert browser.js(ORDER)[:12] == list(range(12))
  first = (
    "[...document.querySelectorAll('.row')].map(r => r.querySelector('b').textContent)"
  )
  assert set(browser.js(first)) == {"base"}  # the reference is always there
  text = "document.querySelector('[data-row=\"2\"] h3').textContent"
  assert browser.js(text).startswith(pages.printable(HOSTILE))
  assert browser.js("document.querySelectorAll('img:not(.enlarge)').length") == 1
  browser.wait("document.querySelector('.row img').naturalWidth === 120")
  browser.wait("scrollTo(0, document.body.scrollHeight)," + f"{ORDER}.length > 12")
  # More rows as long as the end is in sight: all of them where all are small.
  browser.js("scrollTo(0, 0), document.body.style.zoom = 0.1, arrange()")
  browser.wait(f"{ORDER}.length === 30")
  browser.js("document.body.style.zoom = 1; 0")
  browser.click("#q")
  browser.type("NUMBER dog")
  dogs = [n for n in range(ROWS) if n % 3 == 0]
  assert browser.js(ORDER) == dogs and browser.js(COUNT) == "10 of 30 rows"
  choose(browser, "category", "Animals")
  assert browser.js(ORDER) == [n for n in dogs if n % 2]
  choose(browser, "category", "")
  choose(browser, "q", "")

  choose(browser, "candidate", "lpo")
  choose(browser, "sort", "worst")
  by_loss = sorted(range(ROWS), key=lambda n: (round(CHANGE[n], 6), n))
  assert browser.js(ORDER)[0] == 7 == by_loss[0]
  choose(browser, "scorer", "error")  # lower is better: the same one loses most
  assert browser.js(ORDER)[0] == 7
  choose(browser, "sort", "best")
  assert browser.js(ORDER)[0] == 4
  choose(browser, "sort", "difference")
  assert browser.js(ORDER)[:2] == [7, 4]
  hurt = "document.querySelector('.row figure:nth-child(2) .down').textContent"
  assert browser.js(hurt) == "(−3)"

  assert not browser.js(OPEN)
  browser.click(".row:nth-child(1) figure:nth-child(2) img")
  assert browser.js(OPEN)
  assert browser.js(WORDS).startswith("lpo, seed 107 · taste 17.48")
  href = "document.querySelector('dialog a').href"
  assert browser.js(href) == f"{page.parent.as_uri()}/c1/00007.png"
  same = "document.querySelector('dialog img').src === "
  same += "document.querySelector('.row figure:nth-child(2) img').src"
  assert browser.js(same)
  browser.key("ArrowLeft")
  assert browser.js(WORDS).startswith("base, seed 107")
  browser.key("ArrowLeft")  # there is nothing before the first
  assert browser.js(WORDS).startswith("base, seed 107")
  for _ in range(3):
    browser.key("ArrowRight")
  assert browser.js(WORDS).startswith("base, seed 104")  # the next row
  view = browser.js("location.hash")
  browser.key("Escape")
  browser.wait(f"!{OPEN}")

  browser.open(address + view)  # a view can be linked to
  assert browser.js(OPEN) and browser.js(WORDS).startswith("base, seed 104")
  assert browser.js(ORDER)[:2] == [7, 4]
  light = browser.js("getComputedStyle(document.body).backgroundColor")
  browser.dark()
  assert browser.js("getComputedStyle(document.body).backgroundColor") != light

  asked = {request.split(",")[0] for request in browser.requests}
  asked -= {"data:image/webp;base64"}
  assert {one.split("#")[0] for one in asked} <= {address, "about:blank"}
  assert browser.logs == []
