"""Pages a person looks at: one self-contained HTML file each, made from a template."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import lpo_jax
from lpo_jax.console import printable

# The only script a page has: shows an image large on click or Enter. The page's
# content security policy names this text's hash, so that nothing else can run.
_SCRIPT = """
document.documentElement.classList.add("js");
const dialog = document.createElement("dialog");
const large = document.createElement("img");
const words = document.createElement("p");
dialog.append(large, words);
document.body.append(dialog);
dialog.addEventListener("click", () => dialog.close());
function enlarge(image) {
  large.src = image.src;
  large.alt = image.alt;
  large.className = image.classList.contains("pixelated") ? "pixelated" : "";
  words.textContent = image.alt;
  dialog.showModal();
}
for (const image of document.querySelectorAll("img.enlarge")) {
  image.tabIndex = 0;
  image.addEventListener("click", () => enlarge(image));
  image.addEventListener("keydown", (e) => { if (e.key === "Enter") enlarge(image); });
}
"""


def _finalize(value: Any) -> Any:
  """Cleans what an expression prints; markup we made ourselves stays as it is."""
  if isinstance(value, str) and not hasattr(value, "__html__"):
    return printable(value)
  return value


def _prose(text: str) -> str:
  """Returns a sentence as a typesetter would: 85 % on one line, curly apostrophes."""
  return re.sub(r"(?<=\w)'(?=\w|\s)", "’", re.sub(r"(?<=\d) %", "\u00a0%", text))


@functools.cache
def _environment():
  """Returns the template environment: everything escaped, nothing undefined."""
  import jinja2
  from markupsafe import Markup

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.globals.update(
    script=Markup(_SCRIPT),
    script_hash=script_hash(_SCRIPT),
    lpo_jax_version=lpo_jax.__version__,
  )
  environment.filters.update(number=number, duration=duration, prose=_prose)
  return environment


def script_hash(script: str) -> str:
  """Returns what a page's policy calls its one script by."""
  return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def render(template: str, **context: Any) -> str:
  """Renders a template of this folder.

  Args:
    template: file name, e.g. "run_report.html.j2".
    **context: what the template names. Strings are escaped; `charts` return markup
      that is not.

  Returns:
    The page as text.

  Raises:
    jinja2.UndefinedError: the template names something that is not in `context`.
  """
  return _environment().get_template(template).render(**context)


def image_uri(image: np.ndarray | bytes) -> str:
  """Returns an image as a data URI.

  Args:
    image: uint8 [H, W, 3] (written as PNG), or the bytes of a PNG, JPEG, GIF or WebP
      file, which are kept as they are.

  Returns:
    "data:image/png;base64,...", or the type the bytes have.

  Raises:
    ValueError: another dtype or shape, or bytes of no known image type.
  """
  if not isinstance(image, bytes | bytearray | memoryview):
    image = _png(np.asarray(image))
  image = bytes(image)
  kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
  for magic, kind in kinds.items():
    if image.startswith(magic):
      return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
  raise ValueError(f"bytes of no known image type: they begin with {image[:8]!r}")


def _png(pixels: np.ndarray) -> bytes:
  from PIL import Image

  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
    raise ValueError(
      f"expected an image of uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
    )
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


def write_page(path: str | os.PathLike, template: str, **context: Any) -> None:
  """Renders a page into `path`; a reader sees the old file or the new one, whole."""
  text = render(template, **context)
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with open(handle, "w", encoding="utf-8", newline="\n") as file:
      file.write(text)
    os.chmod(temporary, 0o644)  # mkstemp makes it private
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def number(value: Any) -> str:
  """Returns a value as a person would write it.

  >>> [number(v) for v in (12345, -0.123456, 1234.56, 2.0, float("nan"), None, "x")]
  ['12,345', '−0.1235', '1,235', '2', 'NaN', '–', 'x']
  """
  if value is None:
    return "–"
  if isinstance(value, bool | np.bool_):
    return "yes" if value else "no"
  if isinstance(value, int | np.integer):
    return f"{value:,}".replace("-", "−")
  if isinstance(value, float | np.floating):
    if not np.isfinite(value):
      return {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(float(value))]
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "−")
  return str(value)


def duration(seconds: float) -> str:
  """Returns a length of time in the two largest units that matter.

  >>> [duration(s) for s in (0.25, 7.04, 75, 3725)]
  ['0.25 s', '7.0 s', '1 min 15 s', '1 h 2 min']
  """
  if seconds < 60:
    return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


@dataclasses.dataclass(frozen=True)
class Headline:
  """One figure worth a tile: what it is, its value, and a few words below."""

  label: str
  value: Any
  detail: str = ""


@dataclasses.dataclass(frozen=True)
class ImageGrid:
  """Images of several candidates from the same prompts and seeds, side by side.

  Attributes:
    candidates: column names, the baseline first.
    prompts: [R] one row each.
    seeds: [R][K] the seeds of each row, shared by all candidates.
    images: images[candidate][row][k]: uint8 [H, W, 3] or encoded bytes. An array
      [R, K, H, W, 3] will do.
    scores: scores[candidate][scorer][row][k], shown under the images.
    pixelated: draw enlarged pixels as squares; None: where images are below 96 wide.
    differs: what is another in each column.
  """

  candidates: Sequence[str]
  prompts: Sequence[str]
  seeds: Sequence[Sequence[int]]
  images: Mapping[str, Sequence[Sequence[np.ndarray | bytes]]]
  scores: Mapping[str, Mapping[str, Sequence[Sequence[float]]]] = dataclasses.field(
    default_factory=dict
  )
  pixelated: bool | None = None
  differs: str = "the model"


@dataclasses.dataclass(frozen=True)
class Sample:
  """An image that a run drew on its way.

  Attributes:
    label: when, e.g. "step 500".
    image: encoded, as small as it is to be shown.
    pixelated: draw enlarged pixels as squares.
  """

  label: str
  image: bytes
  pixelated: bool = False


@dataclasses.dataclass(frozen=True)
class RunReport:
  """What the page of a run shows; a section without content is left out.

  Candidates have the same colour everywhere: use the same names in `grid`,
  `win_rates` and `training`.

  Attributes:
    title: what was done.
    summary: the outcome in plain words; blank lines separate paragraphs.
    headlines: the few figures to see first.
    grid: images side by side.
    samples: what the run drew from the same prompts and seeds, in order.
    samples_of: the prompts of `samples`, one a row of each image.
    win_rates: rows {candidate, baseline, scorer, n, win_rate, ci_low, ci_high, ties,
      mean_candidate, mean_baseline}, and p_sign, unit, units if known.
    scorers: scorer -> what it measures, one sentence.
    training: run -> its metrics rows (step, loss, implicit_acc, margin, drift, ...).
    data: what is known of the data: name -> value.
    list_lengths: images in a list -> number of lists.
    checkpoints: rows {step, megabytes, what}.
    timings: stage -> seconds, in order.
    notes: caveats, one plain sentence each.
    commands: what for -> the command, to go on from here.
    config: the resolved config.
    defaults: what `config` would be by itself; keys that differ are marked.
    versions: package -> version.
    files: path -> what is there.
    links: the paths among `files` that lie beside the page, to be followed.
  """

  title: str
  summary: str = ""
  headlines: Sequence[Headline] = ()
  grid: ImageGrid | None = None
  samples: Sequence[Sample] = ()
  samples_of: Sequence[str] = ()
  win_rates: Sequence[Mapping[str, Any]] = ()
  scorers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  training: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(
    default_factory=dict
  )
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  list_lengths: Mapping[int, int] = dataclasses.field(default_factory=dict)
  checkpoints: Sequence[Mapping[str, Any]] = ()
  timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()
  commands: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] | None = None
  defaults: Mapping[str, Any] | None = None
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)
  links: Sequence[str] = ()


def write_run_report(path: str | os.PathLike, report: RunReport) -> None:
  """Writes the page of a run: images, win rates, curves, data, timings, config."""
  from lpo_jax.pages import curves

  colors = _candidate_colors(report)
  by_scorer: dict[str, list] = {}
  for row in report.win_rates:
    by_scorer.setdefault(row["scorer"], []).append(row)
  total = sum(report.timings.values()) or 1.0
  write_page(
    path,
    "run_report.html.j2",
    report=report,
    paragraphs=[p.strip() for p in report.summary.split("\n\n") if p.strip()],
    colors=colors,
    grid=report.grid and _grid_rows(report.grid),
    scorers=_scorer_sections(report, by_scorer, colors),
    interval_unit=_interval_unit(report.win_rates),
    samples=[(sample, image_uri(sample.image)) for sample in report.samples],
    curves=curves.main_charts(report.training, colors),
    other_curves=curves.other_charts(report.training, colors),
    speeds=curves.speeds(report.training),
    lengths=_length_chart(report.list_lengths),
    timings=[
      (stage, seconds, seconds / total) for stage, seconds in report.timings.items()
    ],
    largest_share=max(report.timings.values(), default=0.0) / total or 1.0,
    total_seconds=sum(report.timings.values()),
    config=report.config and json.dumps(report.config, indent=2, default=str),
    changed=_changed(report.config, report.defaults),
  )


def _changed(
  config: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
  """Lists (dotted key, value, default) wherever a config is not the default."""
  if config is None or defaults is None:
    return []
  mine, theirs = _flat(config), _flat(defaults)
  shown = {key: json.dumps(value, default=str) for key, value in theirs.items()}
  rows = []
  for key, value in mine.items():
    value = json.dumps(value, default=str)
    if value != shown.get(key):
      rows.append((key, value, shown.get(key, "")))
  return rows


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Flattens nested mappings to dotted keys; empty sections are left out."""
  if not isinstance(tree, Mapping):
    return {prefix[:-1]: tree}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f"{prefix}{key}.")
  return flat


def _candidate_colors(report: RunReport) -> dict[str, int]:
  """Gives every candidate one of the page's series colours, the baseline first."""
  names = list(report.grid.candidates) if report.grid else []
  candidates = {row["candidate"] for row in report.win_rates}
  baselines = [row["baseline"] for row in report.win_rates]
  names += [name for name in baselines if name not in candidates]
  names += [row["candidate"] for row in report.win_rates]
  if not names:
    names = [None]  # without a baseline its grey stays free
  names += list(report.training)
  return {name: i for i, name in enumerate(dict.fromkeys(names)) if name is not None}


def _grid_rows(grid: ImageGrid) -> dict[str, Any]:
  """Returns the grid as the template walks it: rows of cells of figures."""
  rows = []
  widest, most = 0, 1
  for r, prompt in enumerate(grid.prompts):
    seeds = list(grid.seeds[r])
    most = max(most, len(seeds))
    cells = []
    for candidate in grid.candidates:
      images = list(grid.images[candidate][r])
      if len(images) != len(seeds):
        raise ValueError(
          f"prompt {r} has {len(seeds)} seeds but {len(images)} images of {candidate!r}"
        )
      scores = grid.scores.get(candidate, {})
      figures = []
      for k, (seed, image) in enumerate(zip(seeds, images)):
        widest = max(widest, _width(image))
        values = {scorer: by_row[r][k] for scorer, by_row in scores.items()}
        figures.append({"seed": seed, "uri": image_uri(image), "scores": values})
      cells.append({"candidate": candidate, "figures": figures})
    rows.append({"prompt": prompt, "cells": cells})
  names = dict.fromkeys(s for by in grid.scores.values() for s in by)
  pixelated = widest < 96 if grid.pixelated is None else grid.pixelated
  return {
    "rows": rows,
    "pixelated": pixelated,
    "scorers": list(names),
    # As many images abreast as stay large enough to see, over all candidates 12.
    "per_line": min(most, max(2, 12 // max(1, len(grid.candidates)))),
  }


def _width(image: np.ndarray | bytes) -> int:
  if isinstance(image, bytes | bytearray | memoryview):
    from PIL import Image

    return Image.open(io.BytesIO(image)).width
  return np.asarray(image).shape[1]


def _scorer_sections(
  report: RunReport, by_scorer: Mapping[str, list], colors: Mapping[str, int]
) -> list[dict[str, Any]]:
  from lpo_jax.pages import charts

  return [
    {
      "name": scorer,
      "about": report.scorers.get(scorer, ""),
      "rows": rows,
      "chart": charts.interval_chart(rows, colors=colors),
    }
    for scorer, rows in by_scorer.items()
  ]


def _interval_unit(rows: Sequence[Mapping[str, Any]]) -> str | None:
  """Returns what the intervals resample, if all rows agree on it."""
  units = {row.get("unit") for row in rows}
  return units.pop() if len(units) == 1 else None


def _length_chart(lengths: Mapping[int, int]) -> Any:
  if not lengths:
    return None
  from lpo_jax.pages import charts

  keys = sorted(lengths)
  return charts.bar_chart(
    keys,
    [lengths[key] for key in keys],
    title="Lists by length",
    x_label="images in a list",
    y_label="lists",
    size=(500, 280),
  )
