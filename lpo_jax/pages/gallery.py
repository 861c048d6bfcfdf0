"""The gallery: every candidate's image of a prompt and seed, side by side, in one file."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lpo_jax import pages
from lpo_jax.console import printable

# Widths of thumbnails that are tried, the largest that fits is taken; below the last one
# rows are left out instead.
SIDES = (384, 320, 256, 224, 192, 160, 128)
QUALITY = 76
SMALL = 96  # images up to this are kept to the pixel
THREADS = 4
_SAMPLED = 32
_PAGE_BYTES = 60_000  # of everything that is neither an image nor a row's text


@dataclasses.dataclass(frozen=True)
class Gallery:
  """What the page shows: n rows, one for each prompt and seed.

  Attributes:
    title: what was compared.
    lead: one or two sentences on how.
    candidates: column names, the baseline first.
    prompts: [n].
    seeds: [n].
    images: candidate -> [n] files.
    read: file -> [H, W, 3] uint8.
    scores: candidate -> scorer -> [n].
    lower_is_better: scorers of which the smaller score wins.
    categories: [n], or empty.
    facts: name -> value, listed at the end.
  """

  title: str
  lead: str
  candidates: Sequence[str]
  prompts: Sequence[str]
  seeds: Sequence[int]
  images: Mapping[str, Sequence[pathlib.Path]]
  read: Callable[[pathlib.Path], np.ndarray]
  scores: Mapping[str, Mapping[str, np.ndarray]]
  lower_is_better: Collection[str] = ()
  categories: Sequence[str] = ()
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_gallery(
  path: str | os.PathLike, gallery: Gallery, *, max_bytes: int = 28_000_000
) -> list[int]:
  """Writes the page, at most `max_bytes` large.

  Thumbnails get smaller until all rows fit; when they would be too small to judge, rows
  are left out: half of those shown are where candidates lose most against the baseline,
  the others are spread evenly. The page says so.

  Args:
    path: of the page. Files in its folder or below are linked from the enlarged image.
    gallery: what to show.
    max_bytes: largest size of the file.

  Returns:
    The rows that are shown, ascending.
  """
  path = pathlib.Path(path)
  scorers = list(dict.fromkeys(s for by in gallery.scores.values() for s in by))
  texts = _texts(gallery, scorers, path.parent)
  room, many = max_bytes - _PAGE_BYTES, len(gallery.candidates)
  shown, scale = list(range(len(texts))), 1.0
  while True:
    spent = sum(len(_to_json(texts[i])) for i in shown)
    most = (room - spent) / (len(shown) * many)
    side, per_image = _choose_side(gallery, shown, most, scale)
    if per_image > most:
      per_row = many * per_image + spent / len(shown)
      shown = _some_rows(gallery, scorers, max(int(0.96 * room / per_row), 1))
    thumbnails = _thumbnails(gallery, shown, side)
    spent = sum(len(_to_json(texts[i])) for i in shown)
    images = sum(len(image) + 3 for row in thumbnails for image in row)
    if spent + images <= room or len(shown) == 1:
      break
    # The sample promised too little: by how much is known now.
    scale *= 1.02 * max(1.0, images / (len(shown) * many * per_image))
  rows = [{**texts[i], "i": row} for i, row in zip(shown, thumbnails, strict=True)]
  _write(path, gallery, scorers, rows)
  return shown


def _write(
  path: pathlib.Path, gallery: Gallery, scorers: list[str], rows: list
) -> None:
  from markupsafe import Markup

  script = (pathlib.Path(__file__).parent / "gallery.js").read_text("utf-8")
  data = {
    "candidates": [printable(name) for name in gallery.candidates],
    "scorers": [
      {"name": printable(name), "lower": name in gallery.lower_is_better}
      for name in scorers
    ],
    "rows": rows,
  }
  pages.write_page(
    path,
    "gallery.html.j2",
    gallery=gallery,
    data=Markup(_to_json(data)),
    categories=list(dict.fromkeys(gallery.categories)),
    scorers=scorers,
    shown=len(rows),
    script=Markup(script),
    script_hash=pages.script_hash(script),
  )


def _to_json(value: Any) -> str:
  """JSON that can stand inside of a script element: ASCII without <, > and &."""
  text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def _texts(
  gallery: Gallery, scorers: list[str], folder: pathlib.Path
) -> list[dict[str, Any]]:
  """Everything of the rows but their images: prompt, seed, category, scores, links."""
  rows = []
  for n, (prompt, seed) in enumerate(zip(gallery.prompts, gallery.seeds, strict=True)):
    values = [
      [_rounded(gallery.scores[name], scorer, n) for scorer in scorers]
      for name in gallery.candidates
    ]
    links = [_link(gallery.images[name][n], folder) for name in gallery.candidates]
    row = {"n": n, "p": printable(prompt), "s": int(seed), "v": values, "l": links}
    if gallery.categories:
      row["c"] = printable(gallery.categories[n])
    rows.append(row)
  return rows


def _rounded(by_scorer: Mapping[str, Any], scorer: str, n: int) -> float | None:
  return float(f"{by_scorer[scorer][n]:.6g}") if scorer in by_scorer else None


def _link(image: pathlib.Path, folder: pathlib.Path) -> str:
  """The file as seen from the page; nothing of where the page itself is."""
  image, folder = pathlib.Path(image).resolve(), folder.resolve()
  return image.relative_to(folder).as_posix() if folder in image.parents else ""


def _choose_side(
  gallery: Gallery, shown: list[int], most: float, scale: float
) -> tuple[int, float]:
  """Returns the largest width that fits, or the least, and its bytes per image.

  Args:
    gallery: what is shown.
    shown: its rows.
    most: bytes that there are for an image.
    scale: how much larger than those of the sample the images are.
  """
  step = max(1, len(shown) // _SAMPLED)
  sample = [
    gallery.images[gallery.candidates[k % len(gallery.candidates)]][row]
    for k, row in enumerate(shown[::step])
  ]
  for side in SIDES:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      encoded = list(pool.map(lambda f: _thumbnail(gallery.read(f), side), sample))  # noqa: B023
    mean = float(np.mean([len(text) for text in encoded]))
    per_image = scale * (1.04 * mean + 3)
    if per_image <= most:
      break
  return side, per_image


def _some_rows(gallery: Gallery, scorers: list[str], many: int) -> list[int]:
  """Half the rows that lose most against the baseline, half spread evenly."""
  total = len(gallery.prompts)
  worst = np.zeros(total)
  base = gallery.scores[gallery.candidates[0]]
  for name in gallery.candidates[1:]:
    for scorer in scorers:
      if scorer in base and scorer in gallery.scores[name]:
        change = np.asarray(gallery.scores[name][scorer]) - np.asarray(base[scorer])
        change = -change if scorer in gallery.lower_is_better else change
        worst = np.minimum(worst, change / (np.std(change) or 1.0))
  chosen = set(np.argsort(worst, kind="stable")[: many // 2].tolist())
  rest = [row for row in range(total) if row not in chosen]
  places = np.linspace(0, len(rest) - 1, min(many - len(chosen), len(rest)))
  return sorted(chosen | {rest[int(place)] for place in places})


def _thumbnails(gallery: Gallery, shown: list[int], side: int) -> list[list[str]]:
  """[rows][candidates] of base64."""
  files = [gallery.images[name][row] for row in shown for name in gallery.candidates]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    encoded = list(pool.map(lambda file: _thumbnail(gallery.read(file), side), files))
  many = len(gallery.candidates)
  return [encoded[i : i + many] for i in range(0, len(encoded), many)]


def _thumbnail(pixels: np.ndarray, side: int) -> str:
  """An image as base64 of WebP, its longer side at most `side` pixels."""
  from PIL import Image

  buffer, image = io.BytesIO(), Image.fromarray(pixels)
  if max(image.size) <= SMALL:
    image.save(buffer, "WEBP", lossless=True)
  else:
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
  return base64.b64encode(buffer.getvalue()).decode()
