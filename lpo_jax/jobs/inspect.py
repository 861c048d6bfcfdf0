"""The inspect job: what is in a data set, what training would use, and what not."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpo_jax import console, pages
from lpo_jax.data import decoding, lists, prompts, records, sources
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import ListReport, RankedLists
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import cache

EXAMPLE_LISTS = 6
THUMBNAIL = 192  # pixels; smaller images are shown pixel by pixel
SHOWN = 10  # of anything that could be many

# Why a judgement is not used, in words.
REASONS = {
  "unlabelled": "nobody judged: no label, or not a number",
  "bad_label": "the labels are not shares of one win, or do not fit the images",
  "no_prompt": "no prompt text",
  "no_image": "no image uid",
  "same_image": "the same image on both sides, or twice in a list",
  "ties_dropped": "ties, which data.ties=drop leaves out",
  "ties_not_expressible": "ties, which this strategy cannot put in a list",
  "ties_yielded": "ties between images that stronger judgements put in order",
  "contradictions": "as many people preferred one image as the other",
  "outvoted": "against the majority on the same two images",
  "cycles": "the weakest link of a circle of preferences",
  "all_tied": "in a list where everything ties",
  "single_image": "in a list of one image",
}


@dataclasses.dataclass(frozen=True)
class Scan:
  """What decoding the images (or a sample of them) showed.

  Attributes:
    checked: images that were decoded.
    bad: uid -> why it cannot be decoded.
    changed: uids that stand for different bytes in different rows.
    sizes: (width, height) in pixels -> number of images.
  """

  checked: int
  bad: Mapping[str, str]
  changed: Sequence[str]
  sizes: Mapping[tuple[int, int], int]


def run(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
  """Writes data_report.html and data_report.json, and says the gist.

  Args:
    config: `data`, `eval.prompts` and `inspect` are read. `inspect.limits` names shares
      (see `fractions`) and the most each may be.
    workdir: where the reports go.

  Returns:
    What data_report.json holds.

  Raises:
    UserError: the source cannot be read; or, after the reports are written, a share is
      above its limit or no list came out.
  """
  data, limits = config.data, dict(config.inspect.limits or {})
  for name in limits:
    if name not in FRACTIONS:
      raise unknown_name("inspect.limits", name, FRACTIONS)
  source = sources.read(data.path, data.source, split=data.get("split"))
  settings = cache.list_settings(config)
  built, report = lists.build(
    source, **{cache.LIST_SETTINGS[name]: value for name, value in settings.items()}
  )
  scan = check_images(source, config.inspect.max_images)
  found = {
    "path": str(data.path),
    "kind": "lists" if isinstance(source, RankedLists) else "judgements",
    "settings": settings,
    "judgements": report.as_dict(),
    "images": _images(source, scan),
    "annotators": _annotators(source),
    "generators": _generators(source),
    "prompts": _prompts(source, config.eval.prompts),
  }
  found["fractions"] = {name: share(found) for name, share in FRACTIONS.items()}
  found["limits"] = limits
  found["exceeded"] = {
    name: found["fractions"][name]
    for name, most in limits.items()
    if found["fractions"][name] > most
  }
  folder = Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  records.write_json(folder / "data_report.json", found)
  _write_page(folder / "data_report.html", found, built, report)
  for line in summary(found):
    console.say(line)
  console.say(f"report       {folder / 'data_report.html'}")
  lists.refuse_empty(report)
  if found["exceeded"]:
    shares = "; ".join(
      f"{name} is {value:.2%}, the limit {limits[name]:.2%}"
      for name, value in found["exceeded"].items()
    )
    raise UserError(
      f"the data exceeds inspect.limits: {shares}. See {folder / 'data_report.html'}; "
      "repair the data, or raise the limit if you can live with it."
    )
  return found


def check_images(source: Judgements | RankedLists, max_images: int | None) -> Scan:
  """Decodes images as the cache job will, and compares the bytes under each uid.

  Args:
    source: where the images are.
    max_images: most images to decode, spread over the files; None or 0 for all.

  Returns:
    What was found.
  """
  store, uids = source.images, source.image_uids
  if store is None or not store.count:
    return Scan(0, {}, [], {})
  chosen = store.sample(max_images or store.count)
  progress = console.Progress("checking images", len(chosen), "images")
  digests: dict[int, bytes] = {}
  bad: dict[str, str] = {}
  changed: set[str] = set()
  sizes: collections.Counter[tuple[int, int]] = collections.Counter()
  for index, encoded in store.sightings(chosen):
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    if index in digests:
      if digests[index] != digest:
        changed.add(uids[index])
      continue
    digests[index] = digest
    try:
      height, width = decoding.prepare(encoded, 16).original_size
      sizes[width, height] += 1
    except decoding.BadImage as error:
      bad[uids[index]] = str(error)
    progress.update(len(digests), undecodable=len(bad))
  return Scan(len(chosen), bad, sorted(changed), dict(sizes))


def _images(source: Judgements | RankedLists, scan: Scan) -> dict[str, Any]:
  by_count = sorted(scan.sizes.items(), key=lambda size: (-size[1], size[0]))
  return {
    "count": len(source.image_uids),
    "checked": scan.checked,
    "undecodable": len(scan.bad),
    "undecodable_uids": dict(sorted(scan.bad.items())[:SHOWN]),
    "different_bytes": len(scan.changed),
    "different_bytes_uids": list(scan.changed[:SHOWN]),
    "sizes": [
      {"width": width, "height": height, "images": count}
      for (width, height), count in by_count[:SHOWN]
    ],
    "different_sizes": len(by_count),
  }


def _annotators(source: Judgements | RankedLists) -> dict[str, Any]:
  """How many people judged, and how much of it the five busiest did."""
  user = np.full(len(source), -1) if source.user is None else np.asarray(source.user)
  counts = np.bincount(user[user >= 0], minlength=len(source.users))
  busiest = np.argsort(-counts, kind="stable")[:5]
  known = int(counts.sum())
  return {
    "count": int(np.sum(counts > 0)),
    "unknown_judgements": int(np.sum(user < 0)),
    "top5_share": float(counts[busiest].sum() / known) if known else 0.0,
    "top5": {source.users[i]: int(counts[i]) for i in busiest if counts[i]},
  }


def _generators(source: Judgements | RankedLists) -> dict[str, int]:
  """Images by the model that made them, most first."""
  if source.image_model is None:
    return {}
  model = np.asarray(source.image_model)
  counts = np.bincount(model[model >= 0], minlength=len(source.models))
  named = {source.models[i]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}
  unknown = int(np.sum(model < 0)) + named.pop("", 0)
  named = {name: count for name, count in named.items() if count}
  if not named:
    return {}
  return {**named, "unknown": unknown} if unknown else named


def _prompts(source: Judgements | RankedLists, evaluation: Any) -> dict[str, Any]:
  """Prompts, and which of the evaluation's are among them."""
  used = [source.prompts[i] for i in np.unique(source.prompt)]
  held_out = prompts.read(evaluation) if evaluation else []
  leaked = prompts.overlap(held_out, used)
  return {
    "count": len(used),
    "evaluation": len(held_out),
    "leaked": len(leaked),
    "leaked_examples": leaked[:SHOWN],
  }


def _of_judgements(reason: str):
  def share(found: Mapping[str, Any]) -> float:
    total = found["judgements"]["judgements_total"]
    return found["judgements"][reason] / total if total else 0.0

  return share


def _of_images(what: str):
  def share(found: Mapping[str, Any]) -> float:
    images = found["images"]
    return images[what] / images["checked"] if images["checked"] else 0.0

  return share


def _unused(found: Mapping[str, Any]) -> float:
  account = found["judgements"]
  total = account["judgements_total"]
  return 1 - account["judgements_used"] / total if total else 0.0


def _leakage(found: Mapping[str, Any]) -> float:
  held_out = found["prompts"]["evaluation"]
  return found["prompts"]["leaked"] / held_out if held_out else 0.0


# What `inspect.limits` can name: shares of the judgements, of the images that were
# checked, of the evaluation prompts.
FRACTIONS = {
  "unused": _unused,
  **{reason: _of_judgements(reason) for reason in (*REASONS, "ties", "repeated")},
  "undecodable": _of_images("undecodable"),
  "different_bytes": _of_images("different_bytes"),
  "leakage": _leakage,
  "top5_annotators": lambda found: found["annotators"]["top5_share"],
}


def summary(found: Mapping[str, Any]) -> list[str]:
  """Returns the report in nine lines for a terminal."""
  account, images = found["judgements"], found["images"]
  people, texts = found["annotators"], found["prompts"]
  total, used = account["judgements_total"], account["judgements_used"]
  lengths = [(int(n), count) for n, count in account["lengths"].items()]
  mean = sum(n * count for n, count in lengths) / max(account["lists"], 1)
  unused = ", ".join(f"{count} {why}" for why, count in account["dropped"].items())
  checked = "all" if images["checked"] == images["count"] else f"{images['checked']}"
  sizes = ", ".join(f"{s['width']}x{s['height']}" for s in images["sizes"][:3])
  makers = ", ".join(list(found["generators"])[:4])
  rows = {
    "source": f"{found['path']} ({found['kind']})",
    "judgements": f"{total:,}; ties {account['ties']:,}, "
    f"repeated {account['repeated']:,}",
    "used": f"{used:,} ({used / max(total, 1):.1%})"
    + (f"; not used: {unused}" if unused else ""),
    "lists": f"{account['lists']:,} by {account['strategy']}, {mean:.2f} images each; "
    f"{account['share_over_two']:.1%} of judgements in lists of more than 2",
    "images": f"{images['count']:,}, {checked} checked, {images['undecodable']} "
    f"undecodable, {images['different_bytes']} with changing bytes",
    "sizes": f"{sizes or 'unknown'}"
    + (" ..." if images["different_sizes"] > 3 else ""),
    "annotators": f"{people['count']:,}; the busiest five gave "
    f"{people['top5_share']:.1%}",
    "generators": makers or "unknown",
    "prompts": f"{texts['count']:,}; "
    + (
      f"{texts['leaked']} of {texts['evaluation']} evaluation prompts among them"
      if texts["evaluation"]
      else "no evaluation prompts to compare with"
    ),
  }
  return [pages.printable(f"{name:<12} {text}") for name, text in rows.items()]


# The page.


def _write_page(
  path: Path, found: Mapping[str, Any], built: RankedLists, report: ListReport
) -> None:
  from lpo_jax.pages import charts

  lengths = sorted(report.lengths.items())
  length_chart = charts.bar_chart(
    [length for length, _ in lengths],
    [count for _, count in lengths],
    title="Lists by length",
    x_label="images in a list",
    y_label="lists",
  )
  pages.write_page(
    path,
    "data_report.html.j2",
    found=found,
    reasons=REASONS,
    length_chart=length_chart if lengths else None,
    examples=[_example(built, i) for i in _choose(built)] if built.images else [],
    headlines=_headlines(found),
  )


def _headlines(found: Mapping[str, Any]) -> list[pages.Headline]:
  account, images = found["judgements"], found["images"]
  fractions = found["fractions"]
  return [
    pages.Headline("Judgements", account["judgements_total"]),
    pages.Headline(
      "Used",
      f"{1 - fractions['unused']:.1%}",
      f"{account['judgements_used']:,} of them",
    ),
    pages.Headline(
      "Ranked lists", account["lists"], f"for {account['prompts']:,} prompts"
    ),
    pages.Headline(
      "In lists of more than two",
      f"{account['share_over_two']:.1%}",
      "of the used judgements",
    ),
    pages.Headline(
      "Images",
      images["count"],
      f"{images['checked']:,} checked, {images['undecodable']:,} undecodable",
    ),
  ]


def _choose(built: RankedLists) -> list[int]:
  """Lists to show: spread evenly from the longest to the shortest."""
  order = np.argsort(-built.lengths, kind="stable")
  picks = np.linspace(0, len(order) - 1, min(EXAMPLE_LISTS, len(order)))
  return [int(order[i]) for i in np.unique(np.round(picks).astype(np.int64))]


def _example(built: RankedLists, index: int) -> dict[str, Any]:
  """One list as the trainer sees it: square crops, best first."""
  span = slice(built.offsets[index], built.offsets[index + 1])
  ranks = built.rank[span].tolist()
  items = []
  for image, rank in zip(built.image[span].tolist(), ranks, strict=True):
    model = -1 if built.image_model is None else int(built.image_model[image])
    items.append(
      {
        "place": rank + 1,
        "tied": ranks.count(rank) > 1,
        "uid": built.image_uids[image],
        "model": built.models[model] if model >= 0 else "",
        **_thumbnail(built.images.read(image)),
      }
    )
  return {"prompt": built.prompts[built.prompt[index]], "items": items}


def _thumbnail(encoded: bytes) -> dict[str, Any]:
  """A data URI of the centre square; None with the reason if it cannot be decoded."""
  from PIL import Image

  try:
    shorter = min(decoding.prepare(encoded, 16).original_size)
    pixels = decoding.prepare(encoded, min(shorter, THUMBNAIL)).pixels
  except decoding.BadImage as error:
    return {"uri": None, "pixelated": False, "error": str(error)}
  small = shorter < THUMBNAIL // 2
  if small:
    return {"uri": pages.image_uri(pixels), "pixelated": True, "error": ""}
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
  return {
    "uri": pages.image_uri(buffer.getvalue()),
    "pixelated": False,
    "error": "",
  }
