"""Charts as inline SVG that follows the page's colours, in light and in dark.

Every function returns markup to put into a page as it is. The same arguments give the
same bytes. Lengths are CSS pixels at full width; colours are the page's variables.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from markupsafe import Markup
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# What matplotlib draws with -> the page's variable; the hex is what remains where a
# chart is taken out of its page, mid tones that read on white and on black.
_PALETTE = ("#868b94", "#bd7b22", "#2a8b93", "#8a72b8", "#b86480", "#6a9648")
_AXIS, _TICK, _INK = "#b5b3ac", "#787d85", "#7c8087"
_VARIABLES = {
  **{color: f"var(--c{index}, {color})" for index, color in enumerate(_PALETTE)},
  _AXIS: f"var(--axis, {_AXIS})",
  _TICK: f"var(--tick, {_TICK})",
  _INK: f"var(--ink, {_INK})",
}

_STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "lpo_jax",
  "text.parse_math": False,
  "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout everywhere
  "font.size": 11.5,
  "axes.labelsize": 12,
  "axes.labelcolor": _TICK,
  "axes.labelpad": 8,
  "axes.edgecolor": _AXIS,
  "axes.linewidth": 1.0,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.axisbelow": True,
  "axes.facecolor": "none",
  "axes.formatter.useoffset": False,
  "figure.facecolor": "none",
  "savefig.facecolor": "none",
  "grid.color": _AXIS,
  "grid.linewidth": 0.8,
  "grid.alpha": 0.55,
  "xtick.color": _AXIS,
  "ytick.color": _AXIS,
  "xtick.labelcolor": _TICK,
  "ytick.labelcolor": _TICK,
  "xtick.major.size": 4,
  "ytick.major.size": 0,
  "ytick.major.pad": 8,
}

_MAX_POINTS = 300  # of one line; longer ones are drawn as means of equal stretches


def line_chart(
  series: Mapping[str, tuple[Any, Any]],
  *,
  title: str,
  x_label: str = "",
  y_label: str = "",
  smooth: int | None = None,
  hline: float | None = None,
  colors: Mapping[str, int] | None = None,
  size: tuple[int, int] = (500, 320),
) -> Markup:
  """Draws lines over one another, each named at its end.

  Args:
    series: label -> (x [n], y [n]). Values that are not finite leave a gap.
    title: what is shown.
    x_label: name and unit of x.
    y_label: name and unit of y.
    smooth: draw a centred moving mean over so many points, the points faintly behind.
    hline: y of a dashed line to compare with.
    colors: label -> number of the page's series colour (0..5); default: in order.
    size: (width, height) at full width.

  Returns:
    An <svg> element.
  """
  scale, power = _power_of_ten([y for _, y in series.values()])
  y_label = f"{power} {y_label}".strip()
  with _style():
    figure, axes = _figure(size, title, x_label, y_label)
    ends = []
    for index, (label, (x, y)) in enumerate(series.items()):
      x, y = _stretch_means(np.asarray(x, np.float64), np.asarray(y, np.float64))
      y = y / scale
      color = _color(label, index, colors)
      if smooth and smooth > 1 and len(y) > 2:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=1.0, zorder=2)
        y = _moving_mean(y, smooth)
      alone = "o" if len(y) == 1 else None
      axes.plot(x, y, color=color, linewidth=2.0, marker=alone, markersize=5, zorder=3)
      finite = np.flatnonzero(np.isfinite(y))
      if len(finite):
        ends.append((y[finite[-1]], label, color))
    if hline is not None:
      axes.axhline(hline / scale, color=_TICK, linewidth=1.0, dashes=(4, 4), zorder=1)
    axes.margins(x=0.0, y=0.08)
    axes.grid(axis="y")
    _thin_ticks(axes.xaxis, 6, integer=True)
    _thin_ticks(axes.yaxis, 5)
    _name_ends(figure, axes, ends)
    return _svg(figure, title)


def bar_chart(
  labels: Sequence[Any],
  values: Sequence[float],
  *,
  title: str,
  x_label: str = "",
  y_label: str = "",
  color: int = 2,
  size: tuple[int, int] = (500, 320),
) -> Markup:
  """Draws one bar per label with its value above.

  Args:
    labels: [n] what each bar is.
    values: [n] how tall it is.
    title: what is shown.
    x_label: what the labels are.
    y_label: name and unit of the values.
    color: number of the page's series colour.
    size: (width, height) at full width.

  Returns:
    An <svg> element.
  """
  with _style():
    figure, axes = _figure(size, title, x_label, y_label)
    values = np.asarray(values, np.float64)
    at = np.arange(len(values))
    axes.bar(
      at, values, width=0.62, color=_color("", color, None), alpha=0.85, zorder=2
    )
    names = [_clean(label) for label in labels]
    every = max(1, -(-len(names) // 24))  # at most 24 names fit
    axes.set_xticks(at[::every], names[::every])
    axes.tick_params(axis="x", length=0)
    if len(values) <= 16:
      for x, value in zip(at, values):
        axes.annotate(
          _count(value),
          (x, value),
          xytext=(0, 5),
          textcoords="offset points",
          ha="center",
          color=_TICK,
          fontsize=11,
        )
      axes.set_yticks([])
    else:
      axes.grid(axis="y")
      _thin_ticks(axes.yaxis, 5)
    axes.margins(x=0.02, y=0.12)
    axes.set_ylim(bottom=min(0.0, *values) if len(values) else 0.0)
    _fit(figure, axes)
    return _svg(figure, title)


def interval_chart(
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str = "",
  x_label: str = "win rate",
  colors: Mapping[str, int] | None = None,
  width: int = 1016,
) -> Markup:
  """Draws win rates as points with their intervals, and the line where nobody wins.

  Args:
    rows: {candidate, baseline, win_rate, ci_low, ci_high} each; one line of the chart.
    title: what is shown.
    x_label: what the points are.
    colors: candidate -> number of the page's series colour; default: in order.
    width: at full width; the height follows the number of rows.

  Returns:
    An <svg> element.
  """
  with _style():
    height = 44 + (30 if title else 0) + 36 * max(1, len(rows)) + 30
    figure, axes = _figure((width, height), title, x_label, "")
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    names = [_clean(f"{row['candidate']} against {row['baseline']}") for row in rows]
    axes.axvline(0.5, color=_TICK, linewidth=1.0, dashes=(4, 4), zorder=1)
    for y, row in enumerate(rows):
      candidate = row["candidate"]
      color = _color(candidate, candidates.index(candidate), colors)
      ends = [row["ci_low"], row["ci_high"]]
      axes.plot(ends, [y, y], color=color, linewidth=5, alpha=0.35, zorder=2)
      axes.plot(row["win_rate"], y, "o", color=color, markersize=9, zorder=3)
      text = {"va": "center_baseline", "color": _INK, "fontsize": 12.5}
      axes.annotate(names[y], (0, y), xycoords=("figure pixels", "data"), **text)
      axes.annotate(
        f"{row['win_rate']:.3f}",
        (width, y),
        xycoords=("figure pixels", "data"),
        ha="right",
        fontweight=700,
        **text,
      )
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.012, 1.012)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.grid(axis="x")
    longest = max((len(name) for name in names), default=0)
    _fit(figure, axes, left=7.5 * longest + 12, right=64)
    return _svg(figure, title or x_label)


@dataclasses.dataclass(frozen=True)
class Band:
  """A line with its interval, and the points it was made from.

  Attributes:
    x: [n] of the line.
    y: [n] of the line.
    low: [n] lower end of the interval; NaN where there is none.
    high: [n] its upper end.
    dots: (x, y) of single points.
  """

  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float]
  high: Sequence[float]
  dots: Sequence[tuple[float, float]] = ()


def band_chart(
  series: Mapping[str, Band],
  *,
  title: str,
  x_label: str = "",
  y_label: str = "",
  hline: float | None = None,
  colors: Mapping[str, int] | None = None,
  size: tuple[int, int] = (500, 380),
) -> Markup:
  """Draws lines within their intervals over one another, each named at its end.

  Args:
    series: label -> line, interval and points.
    title: what is shown.
    x_label: name and unit of x.
    y_label: name and unit of y.
    hline: y of a dashed line to compare with.
    colors: label -> number of the page's series colour; default: in order.
    size: (width, height) at full width.

  Returns:
    An <svg> element.
  """
  dots = {label: np.asarray(band.dots).reshape(-1, 2) for label, band in series.items()}
  reach = [
    np.concatenate([band.x, dots[label][:, 0]]) for label, band in series.items()
  ]
  scale, power = _power_of_ten(reach)
  with _style():
    figure, axes = _figure(size, title, f"{power} {x_label}".strip(), y_label)
    ends = []
    for index, (label, band) in enumerate(series.items()):
      color = _color(label, index, colors)
      x = np.asarray(band.x) / scale
      axes.fill_between(x, band.low, band.high, color=color, alpha=0.14, linewidth=0)
      axes.plot(
        dots[label][:, 0] / scale, dots[label][:, 1], "o", color=color, alpha=0.45,
        markersize=4, markeredgewidth=0, zorder=2,
      )  # fmt: skip
      if len(x):
        axes.plot(x, band.y, color=color, linewidth=2.0, zorder=3)
        ends.append((band.y[-1], label, color))
    if hline is not None:
      axes.axhline(hline, color=_TICK, linewidth=1.0, dashes=(4, 4), zorder=1)
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y")
    _thin_ticks(axes.xaxis, 6)
    _thin_ticks(axes.yaxis, 5)
    _name_ends(figure, axes, ends)
    return _svg(figure, title)


def _style():
  import matplotlib

  return matplotlib.rc_context(_STYLE)


def _figure(
  size: tuple[int, int], title: str, x_label: str, y_label: str
) -> tuple[Figure, Axes]:
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
  FigureCanvasSVG(figure)
  axes = figure.add_subplot()
  if title:
    place = {"x": 0, "y": size[1] - 14, "transform": None}  # pixels
    figure.text(s=_clean(title), color=_INK, fontsize=14, fontweight=700, **place)
  # The y label stands flat above the axis, where it reads without turning one's head.
  axes.set_xlabel(_clean(x_label), loc="right")
  if y_label:
    axes.annotate(
      _clean(y_label),
      (0.0, 1.0),
      xycoords="axes fraction",
      xytext=(0, 10),
      textcoords="offset points",
      color=_TICK,
      fontsize=12,
    )
  return figure, axes


def _color(label: str, index: int, colors: Mapping[str, int] | None) -> str:
  index = (colors or {}).get(label, index)
  return _PALETTE[index % len(_PALETTE)]


def _clean(text: Any) -> str:
  from lpo_jax import pages

  return pages.printable(str(text)).replace("\n", " ").replace("\t", " ")


def _count(value: float) -> str:
  return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def _stretch_means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns at most `_MAX_POINTS` points: means over equal stretches of the line."""
  if len(x) <= _MAX_POINTS:
    return x, y
  edges = np.linspace(0, len(x), _MAX_POINTS + 1).astype(int)[:-1]
  sizes = np.diff(np.append(edges, len(x)))
  return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def _moving_mean(y: np.ndarray, window: int) -> np.ndarray:
  """Returns the centred mean over `window` points, narrower at the ends; NaN stays."""
  half = window // 2
  finite = np.isfinite(y)
  total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
  count = np.concatenate([[0], np.cumsum(finite)])
  at = np.arange(len(y))
  low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
  mean = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
  return np.where(finite, mean, np.nan)


def _power_of_ten(lines: Sequence[Any]) -> tuple[float, str]:
  """Returns what to divide by, and how to say so, where values are all tiny."""
  values = [np.abs(np.asarray(y, np.float64).reshape(-1)) for y in lines]
  values = np.concatenate([np.zeros(1), *values])
  largest = np.max(values, where=np.isfinite(values), initial=0.0)
  if not 0.0 < largest < 0.02:
    return 1.0, ""
  power = int(np.floor(np.log10(largest)))
  return 10.0**power, "× 10" + str(power).translate(_SUPERSCRIPTS)


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _thin_ticks(axis: Any, most: int, *, integer: bool = False) -> None:
  from matplotlib import ticker

  steps = [1, 2, 5, 10] if integer else [1, 2, 2.5, 5, 10]
  axis.set_major_locator(
    ticker.MaxNLocator(most, integer=integer, steps=steps, min_n_ticks=3)
  )
  if integer:
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _name_ends(figure: Figure, axes: Axes, ends: list) -> None:
  """Writes each line's name beside its end, pushed apart where they would overlap."""
  longest = max((len(label) for _, label, _ in ends), default=0)
  right = 20 + 7 * min(longest, 20)
  _fit(figure, axes, right=right)
  low, high = axes.get_ylim()
  gap = 16 / (axes.get_position().height * figure.bbox.height) * (high - low)
  at = -np.inf
  for y, label, color in sorted(ends):
    at = max(y, at + gap)
    axes.annotate(
      _clean(label),
      (1.0, at),
      xycoords=("axes fraction", "data"),
      xytext=(8, 0),
      textcoords="offset points",
      va="center_baseline",
      color=color,
      fontsize=12.5,
      fontweight=700,
      annotation_clip=False,
    )


def _fit(
  figure: Figure, axes: Axes, *, left: float | None = None, right: float = 4
) -> None:
  """Places the axes so that what is written around them stays inside the figure."""
  width, height = figure.bbox.width, figure.bbox.height
  if left is None:
    labels = [label.get_text() for label in axes.get_yticklabels()]
    left = 8 + 7 * max((len(label) for label in labels), default=0)
  bottom = 48 if axes.get_xlabel() else 28
  top = 10 + (26 if figure.texts else 0)
  top += 20 if any(text.xycoords == "axes fraction" for text in axes.texts) else 0
  axes.set_position(
    [
      left / width,
      bottom / height,
      max(0.2, 1 - (left + right) / width),
      max(0.1, 1 - (bottom + top) / height),
    ]
  )


def _svg(figure: Figure, label: str) -> Markup:
  """Returns the figure as markup: no header, no namespaces, the page's colours."""
  from markupsafe import Markup, escape

  buffer = io.StringIO()
  nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
  figure.savefig(buffer, format="svg", metadata=nothing)
  text = buffer.getvalue()
  box = re.search(r'viewBox="[^"]*"', text).group()
  body = text[text.index("</defs>") + len("</defs>") : text.rindex("</svg>")]
  for pattern, replacement in (
    ("xlink:href", "href"),
    (r' transform="rotate\(-?0 [^"]*\)"', ""),
    (r"font-family: 'DejaVu Sans'; ", ""),  # the root names the page's font
    (r"font-weight: (700|bold)", "font-weight: 600"),
    (r"font: (700|bold) (\S+) 'DejaVu Sans'", r"font-weight: 600; font-size: \2"),
    (r"font: (\S+) 'DejaVu Sans'", r"font-size: \1"),
    (r'(?<= d=")[^"]*', lambda m: _shorter(m.group())),
    (r'(?<=style=")[^"]*', lambda m: _themed(m.group())),
    (r"\n\s*", "\n"),
  ):
    body = re.sub(pattern, replacement, body)
  return Markup(
    f'<svg {box} role="img" aria-label="{escape(_clean(label))}" '
    'stroke-linejoin="round" style="font-family: var(--sans, sans-serif)">'
    f"{_own_ids(body)}</svg>"
  )


def _shorter(path: str) -> str:
  """Returns path data on one line, to a hundredth of a pixel."""
  path = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m.group()):.2f}", path)
  return " ".join(path.split())


def _themed(style: str) -> str:
  for color, variable in _VARIABLES.items():
    style = style.replace(color, variable)
  return style


def _own_ids(text: str) -> str:
  """Drops ids that nothing refers to and makes the others this chart's alone."""
  used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
  prefix = "c" + hashlib.sha256(text.encode()).hexdigest()[:8]
  text = re.sub(
    r' id="([^"]+)"',
    lambda m: f' id="{prefix}{m.group(1)}"' if m.group(1) in used else "",
    text,
  )
  return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", text)
