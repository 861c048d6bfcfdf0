"""Ranked lists as a noun: their columns, their names, and the account of judgements."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lpo_jax.data.stores import ImageStore


@dataclasses.dataclass(frozen=True)
class RankedLists:
  """Ranked lists of images, columnar: list b owns items offsets[b] to offsets[b + 1].

  Attributes:
    prompt: [B] int32, index into `prompts`.
    list_id: [B] uint32, hash of the prompt, the images and, by user, the annotator.
    weight: [B] float32.
    offsets: [B + 1] int64.
    image: [sum n] int32, index into `image_uids`, best first.
    rank: [sum n] int32, 0 best, equal = tied, dense.
    score: [sum n] float32, 0 where there is none.
    prompts: texts.
    image_uids: names of the images.
    user: [B] int32 annotator, -1 where unknown or several; None if never known.
    users: annotators.
    images: the encoded images by index, or None.
    models: generators that `image_model` indexes.
    image_model: [I] int32, -1 where unknown; None if no image has one.
    source_image: [B] int32 index into `image_uids` of the image that the list's images
      edit, as its prompt instructs; None where nothing is edited.
    dropped: reason -> number of rows refused while reading.
  """

  prompt: np.ndarray
  list_id: np.ndarray
  weight: np.ndarray
  offsets: np.ndarray
  image: np.ndarray
  rank: np.ndarray
  score: np.ndarray
  prompts: Sequence[str]
  image_uids: Sequence[str]
  user: np.ndarray | None = None
  users: Sequence[str] = ()
  images: ImageStore | None = None
  models: Sequence[str] = ()
  image_model: np.ndarray | None = None
  source_image: np.ndarray | None = None
  dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.prompt)

  @property
  def lengths(self) -> np.ndarray:
    """[B] int64 number of images of each list."""
    return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class ListReport:
  """Where every judgement went: ``judgements_total = judgements_used + dropped``.

  In a source of finished lists a "judgement" is one recorded ranking.

  Attributes:
    strategy: what built the lists.
    judgements_total: rows of the source, refused ones included.
    judgements_used: rows that some list states.
    unlabelled: nobody judged (no label, or NaN).
    bad_label: the two labels are not shares of one win.
    no_prompt: no prompt text.
    no_image: no image uid, or no image.
    same_image: one image on both sides, or twice in a list.
    ties_dropped: ties, with ties="drop".
    ties_not_expressible: ties that the strategy or max_size leaves no list to state.
    ties_yielded: ties between images that stronger wins put in order.
    contradictions: as many for one image as for the other.
    outvoted: against the majority on the same two images.
    cycles: weakest wins of a circle of preferences.
    all_tied: in a list without any order.
    against_scores: wins whose images the shares of all judgements put the other way
      round, or level.
    split_apart: wins between images of one ranking that was too long for one list.
    single_image: in a list of one image.
    few_shot: kept out to describe the person, see `few_shot`.
    ties: labelled ties, whatever became of them.
    repeated: judgements beyond the first of the same two images for the same prompt.
    cycle_cuts: pairs cut to open circles of preferences.
    contradicted_pairs: pairs of images dropped as contradictions.
    lists: ranked lists built.
    prompts: prompts with at least one list.
    images: different images in the lists.
    lists_dropped: reason -> lists refused.
    lengths: list length -> number of lists.
    share_over_two: share of the used judgements that lists of more than two state.
  """

  strategy: str
  judgements_total: int
  judgements_used: int
  unlabelled: int = 0
  bad_label: int = 0
  no_prompt: int = 0
  no_image: int = 0
  same_image: int = 0
  ties_dropped: int = 0
  ties_not_expressible: int = 0
  ties_yielded: int = 0
  contradictions: int = 0
  outvoted: int = 0
  cycles: int = 0
  all_tied: int = 0
  against_scores: int = 0
  split_apart: int = 0
  single_image: int = 0
  few_shot: int = 0
  ties: int = 0
  repeated: int = 0
  cycle_cuts: int = 0
  contradicted_pairs: int = 0
  lists: int = 0
  prompts: int = 0
  images: int = 0
  lists_dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
  lengths: Mapping[int, int] = dataclasses.field(default_factory=dict)
  share_over_two: float = 0.0

  @property
  def dropped(self) -> dict[str, int]:
    """Reason -> judgements that no list states, without the zeros."""
    counts = {reason: getattr(self, reason) for reason in DROP_REASONS}
    return {reason: count for reason, count in counts.items() if count}

  def as_dict(self) -> dict[str, Any]:
    """Returns plain numbers, strings and dicts with string keys, ready for JSON."""
    fields = dataclasses.asdict(self)
    fields["lengths"] = {str(k): v for k, v in self.lengths.items()}
    return {**fields, "dropped": self.dropped}


# Every judgement that is not used is counted under exactly one of these.
DROP_REASONS = (
  "unlabelled",
  "bad_label",
  "no_prompt",
  "no_image",
  "same_image",
  "ties_dropped",
  "ties_not_expressible",
  "ties_yielded",
  "contradictions",
  "outvoted",
  "cycles",
  "all_tied",
  "against_scores",
  "split_apart",
  "single_image",
  "few_shot",
)


def add_reports(reports: Iterable[ListReport]) -> ListReport:
  """Returns the account of everything, from accounts of disjoint sets of prompts.

  All but `images` is then exact: an image may be in several sets, and counts in each.
  """
  reports = list(reports)
  sums = {
    field.name: sum(getattr(report, field.name) for report in reports)
    for field in dataclasses.fields(ListReport)
    if field.type == "int"
  }
  counters = {
    name: sum((Counter(getattr(r, name)) for r in reports), Counter())
    for name in ("lists_dropped", "lengths")
  }
  # The shares are ratios of whole numbers, and these are what is added up.
  over_two = sum(round(r.share_over_two * r.judgements_used) for r in reports)
  used = sums["judgements_used"]
  return ListReport(
    strategy=reports[0].strategy,
    **sums,
    lists_dropped=dict(sorted(counters["lists_dropped"].items())),
    lengths=dict(sorted(counters["lengths"].items())),
    share_over_two=over_two / used if used else 0.0,
  )


def list_ids(
  prompts: Sequence[str],
  uids: Sequence[str],
  offsets: Sequence[int],
  users: Sequence[str],
) -> np.ndarray:
  """Names lists by what they are about: ``hash(prompt, sorted uids, user, repeat)``.

  The order of rows, the other lists and the ranks do not matter, so that all randomness
  that hangs on the id survives a change of the data around it. Lists of the same images
  for the same prompt are told apart by how many came before.

  Args:
    prompts: [B] texts.
    uids: [sum n] image names.
    offsets: [B + 1] bounds of each list in `uids`.
    users: [B] annotators, "" where they do not distinguish lists.

  Returns:
    [B] uint32.
  """
  ids = np.empty(len(prompts), np.uint32)
  repeats: dict[bytes, int] = {}
  for i, (prompt, user) in enumerate(zip(prompts, users, strict=True)):
    names = sorted(uids[offsets[i] : offsets[i + 1]])
    text = "\x1f".join([prompt, user, *names]).encode("utf-8", "surrogatepass")
    key = hashlib.blake2b(text, digest_size=8).digest()
    repeat = repeats[key] = repeats.get(key, -1) + 1
    if repeat:
      key = hashlib.blake2b(key + repeat.to_bytes(4, "little"), digest_size=8).digest()
    ids[i] = int.from_bytes(key[:4], "little")
  return ids
