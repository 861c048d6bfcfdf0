"""What an evaluation leaves behind: tables, an account of it, and the gallery."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from lpo_jax import __version__, console
from lpo_jax.data.image_folders import Case, Matched
from lpo_jax.data.prompts import PromptSet
from lpo_jax.jobs import candidates, drawing, sampling
from lpo_jax.pages import gallery
from lpo_jax.scoring import protocols, typeset

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow")
MEGABYTE = 1_000_000


@dataclasses.dataclass(frozen=True)
class Results:
  """All that came out of an evaluation.

  Attributes:
    prompts: the set as it was read.
    cases: [n] what was compared.
    left_out: cases that some candidate had no image of.
    locations: candidate -> where it is, the baseline first.
    weights: candidate -> words that identify its weights.
    folders: candidate -> what its folder of images had, of those that are one.
    images: candidate -> files.
    scores: candidate -> scorer -> [n].
    scorers: scorer -> its description.
    lower_is_better: scorers of which the smaller score wins.
    rows: of summary.json.
    by_category: rows within categories; empty without them.
  """

  prompts: PromptSet
  cases: Sequence[Case]
  left_out: int
  locations: Mapping[str, str]
  weights: Mapping[str, str]
  folders: Mapping[str, Matched]
  images: Mapping[str, drawing.ImageFiles]
  scores: Mapping[str, Mapping[str, np.ndarray]]
  scorers: Mapping[str, Mapping[str, Any]]
  lower_is_better: set[str]
  rows: Sequence[Mapping[str, Any]]
  by_category: Sequence[Mapping[str, Any]]


def write(
  workdir: pathlib.Path, config: ml_collections.ConfigDict, results: Results
) -> None:
  """Writes summary.json and, in evaluation/, everything else.

  Args:
    workdir: gets `summary.json` (the rows), and in `evaluation/`: `about.json`,
      `summary.md`, `summary.tex`, `per_image.parquet`, `per_prompt.parquet`,
      `gallery.html` and `tensorboard/`.
    config: `eval` is read.
    results: what came out.
  """
  from pyarrow import parquet

  folder = workdir / "evaluation"
  folder.mkdir(parents=True, exist_ok=True)
  account = about(workdir, config, results)
  _write_json(workdir / "summary.json", list(results.rows))
  _write_json(folder / "about.json", account)
  parquet.write_table(per_image(results), folder / "per_image.parquet")
  parquet.write_table(per_prompt(results), folder / "per_prompt.parquet")
  text = markdown(account)
  (folder / "summary.md").write_text(text, encoding="utf-8")
  (folder / "summary.tex").write_text(tex(account), encoding="utf-8")
  _write_tensorboard(folder / candidates.TENSORBOARD, text)
  for name, one in account["candidates"].items():
    if one.get("images_per_second"):
      console.say(
        f"{name}: {one['images_per_second']:.3g} images/s on {one['devices']} (batches of "
        f"{one['batch_size']}; with text encoders, VAE and files, without the first batch)"
      )
  if config.eval.gallery_mb:
    page = folder / "gallery.html"
    shown = write_gallery(page, config, results)
    size = page.stat().st_size / MEGABYTE
    console.say(f"gallery: {page} ({len(shown)} rows, {size:.1f} MB)")


def about(
  workdir: pathlib.Path, config: ml_collections.ConfigDict, results: Results
) -> dict[str, Any]:
  """Everything that the numbers hang on, and the numbers."""
  ev = config.eval
  drawn = {key: ev[key] for key in ("sampler", "steps", "guidance_scale", "eta")}
  drawn |= {"sigmas": ev.sigmas, "images_per_prompt": ev.seeds}
  drawn |= {"first_seed": ev.first_seed, "dtype": str(config.model.dtype)}
  drawn["pipeline"] = sampling.pipeline_identity(config)
  drawn |= sampling.decided_by(config, [case.asked for case in results.cases])
  drawn["seeds"] = (
    "first_seed onwards, the same for all candidates; a prompt that comes again gets the "
    "next ones; the initial noise is a function of prompt and seed"
  )
  family = len(results.rows)
  return {
    "drawing": drawn,
    "prompts": results.prompts.facts(),
    "cases": len(results.cases),
    "left_out": results.left_out,
    "baseline": ev.baseline,
    "candidates": {
      name: _candidate(workdir, name, results) for name in results.locations
    },
    "scorers": dict(results.scorers),
    "protocols": {name: _first_line(protocols.get(name)) for name in ev.protocols},
    "median_by": ev.median_by or "each scorer by itself",
    "statistics": {
      "win_rate": "(wins + ties / 2) / n",
      "interval": "95 % percentile bootstrap, paired, resampling `unit`; of one comparison, "
      "not corrected for many",
      "p_sign": "two-sided exact binomial sign test over `unit`, tied units left out",
      "correction": ev.correction,
      "comparisons": family,
      "comparisons_by_category": len(results.by_category),
    },
    "scores": describe(results.scores),
    "rows": list(results.rows),
    "by_category": list(results.by_category),
    "versions": {"lpo_jax": __version__, "python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in PACKAGES},
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
  }


def _first_line(documented: Any) -> str:
  return documented.__doc__.strip().splitlines()[0]


def _candidate(workdir: pathlib.Path, name: str, results: Results) -> dict[str, Any]:
  """Where a candidate's images are from, and how fast they were drawn."""
  location = results.locations[name]
  found = {
    "location": location,
    "kind": candidates.kind(location),
    "weights": results.weights[name],
  }
  if name in results.folders:
    return found | {"images": results.folders[name].account()}
  folder = workdir / "evaluation" / candidates.folder_name(name)
  speed = drawing.read_speed(folder)
  found |= {"folder": folder.name, "images_per_second": speed.images_per_second}
  return found | dataclasses.asdict(speed)


def describe(scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
  """Mean, deviation (n - 1) and median over images of every candidate's scores."""
  return [
    {
      "candidate": name,
      "scorer": scorer,
      "mean": float(np.mean(values)),
      "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
      "median": float(np.median(values)),
      "images": len(values),
    }
    for name, by_scorer in scores.items()
    for scorer, values in by_scorer.items()
  ]


def per_image(results: Results) -> Any:
  """One row for each candidate and image: scores, and the file."""
  import pyarrow as pa

  cases, names = results.cases, list(results.locations)
  repeated = [case for _ in names for case in cases]
  columns: dict[str, Any] = {
    "candidate": [name for name in names for _ in cases],
    "prompt": [case.prompt for case in repeated],
    "seed": [case.seed for case in repeated],
  }
  for scorer in results.scorers:
    columns[scorer] = np.concatenate([results.scores[name][scorer] for name in names])
  columns["category"] = [case.category for case in repeated]
  columns["row"] = [case.row for case in repeated]
  columns["file"] = [path.name for name in names for path in results.images[name].paths]
  return pa.table(columns)


def per_prompt(results: Results) -> Any:
  """One row for each candidate and prompt: mean and median scores, share won."""
  import pyarrow as pa

  numbers, first, group = np.unique(
    [case.row for case in results.cases], return_index=True, return_inverse=True
  )
  count = np.bincount(group)
  firsts = [results.cases[i] for i in first]
  names, baseline = list(results.locations), next(iter(results.locations))
  columns: dict[str, list] = {
    "candidate": [name for name in names for _ in numbers],
    "row": [int(n) for _ in names for n in numbers],
    "prompt": [case.prompt for _ in names for case in firsts],
    "category": [case.category for _ in names for case in firsts],
    "images": [int(n) for _ in names for n in count],
  }
  for scorer in results.scorers:
    theirs = results.scores[baseline][scorer]
    sign = -1.0 if scorer in results.lower_is_better else 1.0
    for name in names:
      mine = results.scores[name][scorer]
      won = (sign * mine > sign * theirs) + 0.5 * (mine == theirs)
      for what, values in (
        ("mean", np.bincount(group, mine) / count),
        ("median", [np.median(mine[group == g]) for g in range(len(numbers))]),
        ("won", np.bincount(group, won) / count),
        ("difference", np.bincount(group, mine - theirs) / count),
      ):
        columns.setdefault(f"{scorer}_{what}", []).extend(map(float, values))
  return pa.table(columns)


def markdown(account: Mapping[str, Any]) -> str:
  """The account as a page of Markdown: how, who won, what was scored."""
  show, drawn, facts = typeset.markdown, account["drawing"], account["prompts"]
  statistics = account["statistics"]
  parts = [
    "# Evaluation",
    f"{account['cases']} images of each candidate: {facts['prompts']} prompts "
    f"({show(facts['source'])}, sha256 {facts['sha256']}"
    f"{'' if facts['pinned'] else ', not pinned'}), {drawn['images_per_prompt']} each from "
    f"seed {drawn['first_seed']} on; {drawn['sampler']}, {drawn['steps']} steps, guidance "
    f"{_guidance(drawn)}, {drawn['dtype']}. {account['left_out']} images were left "
    "out for all.",
    "\n".join(
      f"- {show(name)}: {show(said)}" for name, said in account["protocols"].items()
    )
    + f"\n- median of k chosen by: {show(account['median_by'])}",
    typeset.markdown_table(account["rows"]),
    f"Ties count half. Intervals: {statistics['interval']}. Sign tests: "
    f"{statistics['p_sign']}; corrected ({statistics['correction']}) over the "
    f"{statistics['comparisons']} rows of this table.",
    "## Scores",
    typeset.markdown_table(account["scores"], typeset.SCORES),
    "\n".join(
      f"- {show(one['name'])}, version {show(one['version'])}: {show(one['scale'])}; "
      f"{'higher' if one['higher_is_better'] else 'lower'} is better; "
      f"{show(one['preprocessing'])}; identity {show(one['identity'])}"
      for one in account["scorers"].values()
    ),
  ]
  if account["by_category"]:
    parts += [
      "## By category",
      typeset.markdown_table(account["by_category"]),
      f"Corrected over the {statistics['comparisons_by_category']} rows of this table.",
    ]
  return "\n\n".join(parts) + "\n"


def _guidance(drawn: Mapping[str, Any]) -> str:
  """By the text, and of edits by the image too."""
  image = drawn.get("image_guidance_scale")
  return f"{drawn['guidance_scale']}{'' if image is None else f' (image {image})'}"


def tex(account: Mapping[str, Any]) -> str:
  """The comparisons and scores as lines of LaTeX tabulars."""
  drawn = account["drawing"]
  how = f"{drawn['sampler']}, {drawn['steps']} steps, guidance {_guidance(drawn)}"
  parts = [
    f"% {typeset.latex(how)}; sign tests corrected: {account['statistics']['correction']}",
    typeset.latex_rows(account["rows"]),
    typeset.latex_rows(account["scores"], typeset.SCORES),
    typeset.latex_rows(account["by_category"]),
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


def write_gallery(
  path: pathlib.Path, config: ml_collections.ConfigDict, results: Results
) -> list[int]:
  """Writes the gallery page; returns the rows it shows."""
  ev, cases = config.eval, results.cases
  has_categories = any(case.category for case in cases)
  return gallery.write_gallery(
    path,
    gallery.Gallery(
      title="Same prompt, same seed",
      lead=f"{len(results.locations)} candidates, {len(cases)} images each; "
      f"{'left of each edit its source; ' if cases[0].asked.source else ''}every image of "
      f"a row starts from the same noise. The first column is the baseline, "
      f"{ev.baseline}; in brackets the difference to it.",
      candidates=list(results.locations),
      prompts=[case.prompt for case in cases],
      seeds=[case.seed for case in cases],
      images={name: files.paths for name, files in results.images.items()},
      read=_shown(results),
      scores=results.scores,
      lower_is_better=results.lower_is_better,
      categories=[case.category for case in cases] if has_categories else (),
      facts={
        "prompt set": results.prompts.source,
        "sampler": ev.sampler,
        "steps": ev.steps,
        "guidance": _guidance(
          {"guidance_scale": ev.guidance_scale}
          | sampling.decided_by(config, [case.asked for case in cases])
        ),
        **{f"weights of {name}": said for name, said in results.weights.items()},
        **{
          f"scorer {name}": f"version {said['version']}; {said['scale']}; "
          f"{said['preprocessing']}"
          for name, said in results.scorers.items()
        },
      },
    ),
    max_bytes=int(ev.gallery_mb * MEGABYTE),
  )


def _shown(results: Results) -> Callable[[pathlib.Path], np.ndarray]:
  """How the gallery reads an image: an edit beside its source."""
  if not results.cases[0].asked.source:
    return drawing.read
  asked = {
    path: case.asked
    for files in results.images.values()
    for path, case in zip(files.paths, results.cases, strict=True)
  }

  def read(path: pathlib.Path) -> np.ndarray:
    edit = drawing.read(path)
    source = sampling.picture(asked[path], min(edit.shape[:2]))
    if source.shape[0] != edit.shape[0]:
      return edit
    return np.concatenate([source, edit], axis=1)

  return read


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensorboard(folder: pathlib.Path, text: str) -> None:
  """Shows the summary in TensorBoard; an earlier one is replaced."""
  from tensorboardX import SummaryWriter

  shutil.rmtree(folder, ignore_errors=True)
  with SummaryWriter(str(folder)) as board:
    board.add_text("evaluation", text)
