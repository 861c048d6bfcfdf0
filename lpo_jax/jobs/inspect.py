"""The inspect job: what is in a data set, what training would use, and what not."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lpo_jax import console, pages
from lpo_jax.data import decoding, lists, records, sources
from lpo_jax.data.ranked import ListReport, RankedLists
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.jobs import cache, inspect_facts
from lpo_jax.jobs.inspect_facts import FRACTIONS, REASONS

EXAMPLE_LISTS = 6
THUMBNAIL = 192  # pixels; smaller images are shown pixel by pixel


def run(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
  """Writes data_report.html and data_report.json, and says the gist.

  Args:
    config: `data`, `eval.prompts` and `inspect` are read, the tokenizer in `model.path`
      if there is one, and what packing depends on. `inspect.limits` names shares (see
      `inspect_facts.FRACTIONS`) and the most each may be.
    workdir: where the reports go.

  Returns:
    What data_report.json holds; of a mixture, for each source.

  Raises:
    UserError: the source cannot be read; or, after the reports are written, a share is
      above its limit, a limit could not be checked, or no list came out.
  """
  folder = Path(workdir)
  if config.data.mixture:  # each source by itself, into a folder of its name
    parts = cache.places(config, workdir)
    return {part.name: run(part.config, folder / part.name) for part in parts}
  data, limits = config.data, dict(config.inspect.limits or {})
  for name in limits:
    if name not in FRACTIONS:
      raise unknown_name("inspect.limits", name, FRACTIONS)
  opened = sources.open(
    data.path, data.source, split=data.get("split"), images=data.get("images")
  )
  source = opened.read()
  settings = cache.list_settings(config)
  built, report = lists.build(
    source, **{cache.LIST_SETTINGS[name]: value for name, value in settings.items()}
  )
  scan = inspect_facts.check_images(
    source, config.inspect.max_images, max_pixels=data.max_pixels
  )
  found = {
    "path": str(data.path),
    "kind": "lists" if isinstance(source, RankedLists) else "judgements",
    "source": {
      "name": opened.name,
      "about": opened.kind.about,
      "licence": opened.kind.licence,
      "splits": opened.kind.splits,
    },
    "settings": settings,
    "judgements": report.as_dict(),
    "images": inspect_facts.images(source, scan, data.resolution),
    "annotators": inspect_facts.annotators(source),
    "generators": inspect_facts.generators(source),
    "prompts": inspect_facts.texts(source, config.eval.prompts, config.model.path),
    "packing": inspect_facts.packing(
      built.lengths, config.train.images_per_update, config.seed
    ),
  }
  found["fractions"] = {name: share(found) for name, share in FRACTIONS.items()}
  found["limits"] = limits
  found["exceeded"] = {
    name: found["fractions"][name]
    for name, most in limits.items()
    if (found["fractions"][name] or 0) > most
  }
  folder.mkdir(parents=True, exist_ok=True)
  records.write_json(folder / "data_report.json", found)
  _write_page(folder / "data_report.html", found, built, report)
  for line in summary(found):
    console.say(line)
  console.say(f"report       {folder / 'data_report.html'}")
  lists.refuse_empty(report)
  unknown = [name for name in limits if found["fractions"][name] is None]
  if unknown:
    why = found["prompts"]["tokens_not_counted"]
    raise UserError(
      f"inspect.limits.{unknown[0]} cannot be checked, as the data say nothing of it. "
      "long_prompts needs a tokenizer in model.path, leakage needs eval.prompts, "
      "top5_annotators needs user ids, shares of images need images. Set what is "
      "missing, or take the limit away."
      + (f" Tokens were not counted: {why}" if unknown[0] == "long_prompts" else "")
    )
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


def summary(found: Mapping[str, Any]) -> list[str]:
  """Returns the report in ten lines for a terminal."""
  account, images = found["judgements"], found["images"]
  people, texts = found["annotators"], found["prompts"]
  total, used = account["judgements_total"], account["judgements_used"]
  lengths = [(int(n), count) for n, count in account["lengths"].items()]
  mean = sum(n * count for n, count in lengths) / max(account["lists"], 1)
  unused = ", ".join(f"{count} {why}" for why, count in account["dropped"].items())
  checked = "all" if images["checked"] == images["count"] else f"{images['checked']}"
  sizes = ", ".join(f"{s['width']}x{s['height']}" for s in images["sizes"][:3])
  long, packed = texts["tokens"], found["packing"]
  makers = ", ".join(list(found["generators"])[:4])
  rows = {
    "source": f"{found['path']} ({found['kind']}: {found['source']['about']}); licence: "
    f"{found['source']['licence']}; splits: {found['source']['splits']}",
    "judgements": f"{total:,}; ties {account['ties']:,}, "
    f"repeated {account['repeated']:,}",
    "used": f"{used:,} ({used / max(total, 1):.1%})"
    + (f"; not used: {unused}" if unused else ""),
    "lists": f"{account['lists']:,} by {account['strategy']}, {mean:.2f} images each; "
    f"{account['share_over_two']:.1%} of judgements in lists of more than 2",
    "images": f"{images['count']:,}, {images['absent']:,} absent, {checked} checked, {images['undecodable']} "
    f"undecodable ({images['truncated']} truncated), {images['different_bytes']} with "
    "changing bytes",
    "sizes": f"{sizes or 'unknown'}"
    + (" ..." if images["different_sizes"] > 3 else "")
    + f"; {images['enlarged']} smaller than {images['resolution']}, "
    f"{images['cropped_away']:.1%} cropped away",
    "annotators": f"{people['count']:,}; the busiest five gave "
    f"{people['top5_share']:.1%}",
    "generators": makers or "unknown",
    "prompts": f"{texts['count']:,}; "
    + (
      f"{long['beyond']} beyond {long['limit']} tokens; "
      if long
      else f"tokens not counted ({texts['tokens_not_counted'].rstrip('.')}); "
    )
    + (
      f"{texts['leaked']} of {texts['evaluation']} evaluation prompts among them"
      if texts["evaluation"]
      else "no evaluation prompts to compare with"
    ),
    "packing": f"{packed['efficiency']:.1%} of the slots of updates of "
    f"{packed['slots']} images are filled",
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
    aspect_chart=_aspect_chart(found["images"]["aspects"]),
    examples=[_example(built, i) for i in _choose(built)] if _any_images(built) else [],
    headlines=_headlines(found),
  )


def _aspect_chart(aspects: Mapping[str, int]) -> Any:
  from lpo_jax.pages import charts

  if not aspects:
    return None
  return charts.bar_chart(
    list(aspects),
    list(aspects.values()),
    title="Images by aspect",
    x_label="width : height, the nearest of the usual ones",
    y_label="images",
    color=3,
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
      "Slots filled",
      f"{found['packing']['efficiency']:.1%}",
      f"in updates of {found['packing']['slots']:,} images",
    ),
    pages.Headline(
      "Images",
      images["count"],
      f"{images['checked']:,} checked, {images['undecodable']:,} undecodable",
    ),
  ]


def _any_images(built: RankedLists) -> bool:
  return built.images is not None and bool(np.any(built.images.present))


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
