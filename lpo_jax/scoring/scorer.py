"""What every scorer is: images and prompts in, one number per image out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Told:
  """What a scorer may be told of n images besides pixels and prompts; None: not known.

  Attributes:
    seeds: what each was drawn from.
    names: what each is called: its uid, or "<candidate>/<file name>".
    sources: [n] the pictures that were edited, [H, W, 3] uint8 each, as the editor saw
      them.
    targets: [n] the edits that are held to be right, alike.
    source_captions: [n] what the sources show.
    target_captions: [n] what the edits should show.
    users: [n] whom they are for.
  """

  seeds: Sequence[int] | None = None
  names: Sequence[str] | None = None
  sources: Sequence[np.ndarray] | None = None
  targets: Sequence[np.ndarray] | None = None
  source_captions: Sequence[str] | None = None
  target_captions: Sequence[str] | None = None
  users: Sequence[str] | None = None


# What a scorer asks for -> where a prompt set has it; for errors.
COLUMNS = {
  "sources": "a column of images to edit, such as cond_image",
  "targets": "a column of right edits, such as target_image",
  "source_captions": "a column source_caption",
  "target_captions": "a column target_caption",
  "users": "a column user",
}


class Scorer:
  """Something that gives an image a score.

  This is all that the rest of the program may rely on. A scorer is made without reading
  its weights; `identity` and the first call read them, so that asking for the identity
  before images are drawn is how missing weights are found out in time.

  Attributes:
    name: its name in `scorers.SCORERS`.
    version: which scorer of that name: the published checkpoint, or what the file says.
    measures: what a score is, in one sentence with its scale: for reports.
    scale: unit and usual range of a score, in words.
    preprocessing: what is done to an image before a network sees it, in words.
    higher_is_better: whether the larger of two scores wins.
    needs: fields of `Told` that it cannot do without.
    reads: fields of `Told` that it looks at besides, where there are any.
  """

  name: str
  version: str
  measures: str
  scale: str
  preprocessing: str
  higher_is_better: bool = True
  needs: tuple[str, ...] = ()
  reads: tuple[str, ...] = ()

  @property
  def identity(self) -> str:
    """What decides a score besides the image and the prompt: a fingerprint in hex.

    Raises:
      UserError: the weights are not there, or cannot be read.
    """
    raise NotImplementedError

  def score(
    self,
    images: Sequence[Any],
    prompts: Sequence[str],
    told: Told,
  ) -> np.ndarray:
    """Scores what `__call__` has checked: [n] numbers."""
    raise NotImplementedError

  def release(self) -> None:
    """Forgets weights, so that the next scorer has the memory; a call reads them again."""

  def __call__(
    self,
    images: Sequence[Any] | np.ndarray,
    prompts: Sequence[str],
    **told: Sequence[Any] | None,
  ) -> np.ndarray:
    """Scores n images for n prompts.

    Args:
      images: [n, H, W, 3] uint8, or n pictures of any sizes: arrays [H, W], [H, W, 3] or
        [H, W, 4] of uint8, or PIL images.
      prompts: n texts.
      **told: fields of `Told`, n entries each.

    Returns:
      [n] fp64, computed in fp32, all finite.

    Raises:
      UserError: numbers of images, prompts, seeds and so on differ, pixels of another
        kind, weights or something it needs that is not there, or a score that is not
        finite.
    """
    count = len(images)
    for what, values in (("prompts", prompts), *told.items()):
      if values is not None and len(values) != count:
        raise UserError(
          f"scorer {self.name!r} expected as many {what} as images, came {len(values)} "
          f"for {count}."
        )
    if not count:
      return np.zeros(0)
    for what in self.needs:
      if told.get(what) is None:
        raise UserError(
          f"scorer {self.name!r} needs the {what.replace('_', ' ')} of the images, and "
          f"there are none: expected a prompt set with {COLUMNS.get(what, what)}, or "
          "another scorer."
        )
    scores = np.asarray(self.score(images, prompts, Told(**told)), np.float64)
    bad = int(np.count_nonzero(~np.isfinite(scores)))
    if bad:
      raise UserError(f"scorer {self.name!r} gave {bad} scores that are not finite.")
    return scores

  def description(self) -> dict[str, Any]:
    """Returns what every result states about its scorer, as JSON takes it."""
    return {
      "name": self.name,
      "version": self.version,
      "scale": self.scale,
      "preprocessing": self.preprocessing,
      "higher_is_better": self.higher_is_better,
      "identity": self.identity,
    }


@dataclasses.dataclass(frozen=True)
class Formula(Scorer):
  """A scorer without weights.

  Attributes:
    fn: images [n, H, W, 3] uint8, n prompts, and what `needs` names -> [n].
  """

  name: str
  version: str
  measures: str
  scale: str
  preprocessing: str
  fn: Callable[..., np.ndarray] = dataclasses.field(repr=False)
  needs: tuple[str, ...] = ()
  higher_is_better: bool = True

  @property
  def identity(self) -> str:
    return f"{self.name} {self.version}"

  def score(self, images, prompts, told):
    shape = getattr(images, "shape", ())
    if len(shape) != 4 or shape[-1] != 3:
      raise UserError(
        f"scorer {self.name!r} expected images [n, H, W, 3], came "
        f"{shape or type(images).__name__}."
      )
    return self.fn(images, prompts, *(getattr(told, what) for what in self.needs))
