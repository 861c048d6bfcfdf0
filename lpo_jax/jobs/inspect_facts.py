"""What the inspect job finds in a data set: the figures of data_report.json."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lpo_jax import console, pretrained
from lpo_jax.data import decoding, prompts
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.packing import Packer, Progress
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError
from lpo_jax.types import Prompt

SHOWN = 10  # of anything that could be many
MOST_UPDATES = 200  # that the packing is tried on
# Width over height; an image counts to the nearest of them.
ASPECTS = {
  f"{width}:{height}": width / height
  for width, height in (
    *((1, 2), (9, 16), (2, 3), (3, 4), (1, 1)),
    *((4, 3), (3, 2), (16, 9), (2, 1)),
  )
}

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
  "against_scores": "wins that all judgements of the images together do not bear out",
  "split_apart": "wins between images of one ranking, too long for one list",
  "single_image": "in a list of one image",
  "few_shot": "kept out of all lists to describe the person (data.few_shot)",
}


@dataclasses.dataclass(frozen=True)
class Scan:
  """What decoding the images (or a sample of them) showed.

  Attributes:
    checked: images that were decoded, or tried.
    bad: uid -> why it cannot be decoded.
    truncated: those of them that end too early, as after an interrupted download.
    changed: uids that stand for different bytes in different rows.
    sizes: (width, height) in pixels -> number of images.
  """

  checked: int = 0
  bad: Mapping[str, str] = dataclasses.field(default_factory=dict)
  truncated: Sequence[str] = ()
  changed: Sequence[str] = ()
  sizes: Mapping[tuple[int, int], int] = dataclasses.field(default_factory=dict)


def check_images(
  source: Judgements | RankedLists,
  max_images: int | None,
  *,
  max_pixels: int = decoding.MAX_PIXELS,
) -> Scan:
  """Decodes images as the cache job will, and compares the bytes under each uid.

  Args:
    source: where the images are.
    max_images: most images to decode, spread over the files; None or 0 for all.
    max_pixels: of an image; larger ones are counted as undecodable.

  Returns:
    What was found.
  """
  store, uids = source.images, source.image_uids
  if store is None or not store.count:
    return Scan()
  chosen = store.sample(max_images or store.count)
  progress = console.Progress("checking images", len(chosen), "images")
  digests: dict[int, bytes] = {}
  bad: dict[str, str] = {}
  truncated: list[str] = []
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
      height, width = decoding.prepare(encoded, 16, max_pixels=max_pixels).original_size
      sizes[width, height] += 1
    except decoding.BadImage as error:
      bad[uids[index]] = str(error)
      if _ends_early(encoded, str(error)):
        truncated.append(uids[index])
    progress.update(len(digests), undecodable=len(bad))
  return Scan(len(chosen), bad, sorted(truncated), sorted(changed), dict(sizes))


def _ends_early(encoded: bytes, reason: str) -> bool:
  """Whether an image that cannot be decoded has a beginning and no end."""
  if encoded.startswith(b"RIFF"):  # WebP, which says how long it should be
    return len(encoded) < int.from_bytes(encoded[4:8], "little") + 8
  return "truncated" in reason.lower()


def images(
  source: Judgements | RankedLists, scan: Scan, resolution: int
) -> dict[str, Any]:
  """What the images are, and what training at this resolution makes of them."""
  decoded = sum(scan.sizes.values())
  aspects: collections.Counter[str] = collections.Counter()
  enlarged, cut = 0, 0.0
  for (width, height), count in scan.sizes.items():
    aspect = math.log(width / height)
    aspects[min(ASPECTS, key=lambda a: abs(math.log(ASPECTS[a]) - aspect))] += count
    enlarged += count * (min(width, height) < resolution)
    cut += count * (1 - min(width, height) / max(width, height))
  here = 0 if source.images is None else int(np.sum(source.images.present))
  by_count = sorted(scan.sizes.items(), key=lambda size: (-size[1], size[0]))
  return {
    "count": len(source.image_uids),
    "absent": len(source.image_uids) - here,
    "checked": scan.checked,
    "undecodable": len(scan.bad),
    "undecodable_uids": dict(sorted(scan.bad.items())[:SHOWN]),
    "truncated": len(scan.truncated),
    "different_bytes": len(scan.changed),
    "different_bytes_uids": list(scan.changed[:SHOWN]),
    "sizes": [
      {"width": width, "height": height, "images": count}
      for (width, height), count in by_count[:SHOWN]
    ],
    "different_sizes": len(by_count),
    "aspects": {name: aspects[name] for name in ASPECTS if aspects[name]},
    "resolution": resolution,
    "enlarged": enlarged,
    "cropped_away": cut / decoded if decoded else 0.0,
  }


def annotators(source: Judgements | RankedLists) -> dict[str, Any]:
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


def generators(source: Judgements | RankedLists) -> dict[str, int]:
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


def texts(
  source: Judgements | RankedLists, evaluation: Any, model_path: str
) -> dict[str, Any]:
  """Prompts: how many, how long, and which of the evaluation's are among them."""
  used = [source.prompts[i] for i in np.unique(source.prompt)]
  rows = prompts.load(evaluation).rows if evaluation else ()
  held_out = [row.text for row in rows]
  leaked = prompts.overlap(held_out, used)
  if leaked and any(row.source for row in rows):
    leaked = _leaked_edits(source, rows)
  counted, why = None, "model.path is not set"
  if model_path:
    try:
      counted, why = tokens(used, model_path), ""
    except UserError as error:  # the rest of the report needs no model
      why = str(error)
  return {
    "count": len(used),
    "evaluation": len(held_out),
    "leaked": len(leaked),
    "leaked_examples": leaked[:SHOWN],
    "tokens": counted,
    "tokens_not_counted": why,
  }


def _leaked_edits(
  source: Judgements | RankedLists, rows: Sequence[Prompt]
) -> list[str]:
  """The instructions of evaluation edits that are among the data, picture and all.

  An instruction alone comes again by design. Pictures are the same where their bytes are;
  of the data only those are read whose instruction is one of the evaluation's.
  """
  image = getattr(source, "source_image", None)
  if image is None or source.images is None:
    return []
  asked = {prompts.normalise(row.text) for row in rows}
  shared = [
    i for i, text in enumerate(source.prompts) if prompts.normalise(text) in asked
  ]
  lists = np.flatnonzero(np.isin(source.prompt, shared) & (image >= 0))
  known = {
    (prompts.normalise(source.prompts[source.prompt[i]]), _digest(source, image[i]))
    for i in lists
  }
  return [
    row.text
    for row in rows
    if (prompts.normalise(row.text), hashlib.sha256(row.source).digest()) in known
  ]


def _digest(source: RankedLists, image: int) -> bytes:
  try:
    return hashlib.sha256(source.images.read(int(image))).digest()
  except decoding.BadImage:  # it is not there; the page says so elsewhere
    return b""


def tokens(used: Sequence[str], model_path: str) -> dict[str, Any]:
  """How many prompts the text encoder cannot take whole.

  Args:
    used: prompts.
    model_path: a pipeline folder, or its id on the Hub.

  Raises:
    UserError: no tokenizer there.
  """
  tokenizer = pretrained.load_tokenizer(model_path)
  lengths = tokenizer.lengths(used)
  longest_first = np.argsort(-lengths, kind="stable")
  beyond = int(np.sum(lengths > tokenizer.max_length))
  return {
    "limit": tokenizer.max_length,
    "beyond": beyond,
    "longest": int(lengths.max(initial=0)),
    "examples": [used[i] for i in longest_first[: min(beyond, SHOWN)]],
  }


def packing(lengths: np.ndarray, slots: int, seed: int) -> dict[str, Any]:
  """How full updates of so many slots get: tries the first of a shuffled epoch.

  Args:
    lengths: images per list.
    slots: S, images per update.
    seed: of the shuffle.

  Returns:
    slots; updates that were tried; lists in each on average; the share of their slots
    that holds an image, 0 if the longest list does not fit at all.
  """
  shuffled = np.random.default_rng(seed).permutation(lengths)
  longest = int(lengths.max(initial=0))
  updates = min(MOST_UPDATES, max(int(lengths.sum()) // slots, 1))
  fits = bool(len(lengths)) and longest <= slots
  filled = placed = 0
  if fits:
    packer, progress = Packer(shuffled, slots), Progress()
    for _ in range(updates):
      done, progress = packer.plan(progress, lambda at: shuffled[at % len(shuffled)])
      filled += done.filled
      placed += len(done.positions)
  return {
    "slots": slots,
    "longest": longest,
    "updates": updates if fits else 0,
    "lists_per_update": placed / updates if fits else 0.0,
    "efficiency": filled / (updates * slots) if fits else 0.0,
  }


def _of_judgements(reason: str):
  def share(found: Mapping[str, Any]) -> float:
    total = found["judgements"]["judgements_total"]
    return found["judgements"][reason] / total if total else 0.0

  return share


def _of_images(what: str):
  def share(found: Mapping[str, Any]) -> float | None:
    images = found["images"]
    return images[what] / images["checked"] if images["checked"] else None

  return share


def _cropped_away(found: Mapping[str, Any]) -> float | None:
  images = found["images"]
  return images["cropped_away"] if images["sizes"] else None


def _unused(found: Mapping[str, Any]) -> float:
  account = found["judgements"]
  total = account["judgements_total"]
  return 1 - account["judgements_used"] / total if total else 0.0


def _leakage(found: Mapping[str, Any]) -> float | None:
  held_out = found["prompts"]["evaluation"]
  return found["prompts"]["leaked"] / held_out if held_out else None


def _concentration(found: Mapping[str, Any]) -> float | None:
  people = found["annotators"]
  return people["top5_share"] if people["count"] else None


def _long_prompts(found: Mapping[str, Any]) -> float | None:
  counted, total = found["prompts"]["tokens"], found["prompts"]["count"]
  return None if counted is None else counted["beyond"] / max(total, 1)


# What `inspect.limits` can name: shares of the judgements, of the images that were
# checked, of the prompts, of the evaluation prompts, of an update's slots. None where
# nothing could be counted.
FRACTIONS = {
  "unused": _unused,
  **{reason: _of_judgements(reason) for reason in (*REASONS, "ties", "repeated")},
  **{
    what: _of_images(what)
    for what in ("undecodable", "truncated", "different_bytes", "enlarged")
  },
  "cropped_away": _cropped_away,
  "long_prompts": _long_prompts,
  "leakage": _leakage,
  "top5_annotators": _concentration,
  "empty_slots": lambda found: 1 - found["packing"]["efficiency"],
}
