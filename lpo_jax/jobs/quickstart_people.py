"""The quickstart's people: simulated annotators who compare images, or rank them.

`judge` is Pick-a-Pic's way: a person sees two images for a prompt, the one they prefer
stays, the other is replaced by the next candidate, until the candidates of the session
are used up. With `rank` they put all candidates of the session in order.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Sequence

import numpy as np

from lpo_jax.data import list_files, sources


@dataclasses.dataclass(frozen=True)
class Judgement:
  """One comparison.

  Attributes:
    session: which session, a Pick-a-Pic `ranking_id`.
    user: who judged.
    left: index of the image on the left.
    right: index of the image on the right.
    label: 1 if the left one won, 0 if the right one, 0.5 for a tie.
  """

  session: int
  user: int
  left: int
  right: int
  label: float


def judge(
  scores: np.ndarray,
  *,
  images_per_session: int,
  users: int,
  temperature: float,
  tie_rate: float,
  seed: int,
) -> list[Judgement]:
  """Lets people judge, session by session, with Bradley-Terry noise.

  P(left wins | no tie) = sigmoid((s_left - s_right) / temperature);
  P(tie) = tie_rate exp(-|s_left - s_right| / temperature): the closer, the likelier.

  Args:
    scores: [n] the taste of every image; sessions are consecutive runs of images.
    images_per_session: candidates a person sees in one session.
    users: number of people; each session is one person's.
    temperature: of the noise, in units of the score.
    tie_rate: probability that two equally good images are called a tie.
    seed: of the noise; each session has its own stream.

  Returns:
    Judgements in the order they were made.

  Reference: Bradley & Terry 1952; the interface of Kirstain et al. 2023 (Pick-a-Pic).
  """
  made = []
  for session, start in enumerate(range(0, len(scores), images_per_session)):
    rng = np.random.default_rng([seed, session])
    user = int(rng.integers(users))
    candidates = range(start, min(start + images_per_session, len(scores)))
    made += judge_session(
      Session(session, user, candidates), scores, temperature, tie_rate, rng
    )
  return made


@dataclasses.dataclass(frozen=True)
class Session:
  """What one person is shown in one go.

  Attributes:
    number: a Pick-a-Pic `ranking_id`.
    user: who judges.
    candidates: indices of images, in the order of appearance.
  """

  number: int
  user: int
  candidates: Sequence[int]


def judge_session(
  session: Session,
  scores: np.ndarray,
  temperature: float,
  tie_rate: float,
  rng: np.random.Generator,
) -> list[Judgement]:
  """Lets one person judge candidates two at a time, the winner stays; see `judge`."""
  made, stays = [], session.candidates[0]
  for newcomer in session.candidates[1:]:
    left, right = (stays, newcomer) if rng.random() < 0.5 else (newcomer, stays)
    gap = (scores[left] - scores[right]) / temperature
    if rng.random() < tie_rate * np.exp(-abs(gap)):
      label = 0.5
    else:
      label = float(rng.random() < 1 / (1 + np.exp(-gap)))
      stays = left if label == 1 else right
    made.append(Judgement(session.number, session.user, left, right, label))
  return made


def rank(
  scores: np.ndarray, *, images_per_session: int, temperature: float, seed: int
) -> list[list[int]]:
  """Lets people rank whole sessions, with Plackett-Luce noise and without ties.

  P(i is chosen among those left) = exp(s_i / temperature) / sum_k exp(s_k / temperature):
  of any two images it says what `judge` says with the same temperature.

  Args:
    scores: [n] the taste of every image; sessions are consecutive runs of images.
    images_per_session: candidates a person sees in one session.
    temperature: of the noise, in units of the score.
    seed: of the noise; each session has its own stream.

  Returns:
    Of each session the indices of its images, best first.

  Reference: Plackett 1975; sorting by s / temperature + Gumbel noise samples it (Yellott
  1977).
  """
  made = []
  for session, start in enumerate(range(0, len(scores), images_per_session)):
    seen = np.asarray(scores[start : start + images_per_session], np.float64)
    noise = np.random.default_rng([seed, session]).gumbel(size=len(seen))
    made.append((start + np.argsort(-(seen / temperature + noise))).tolist())
  return made


def encode_png(image: np.ndarray) -> bytes:
  """Returns [H, W, 3] uint8 as PNG bytes: lossless, and Pick-a-Pic has PNGs too."""
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG")
  return buffer.getvalue()


def write_rankings(
  path: pathlib.Path,
  rankings: Sequence[Sequence[int]],
  images: np.ndarray,
  prompts: Sequence[str],
  *,
  model: str,
  sources: Sequence[bytes] | None = None,
) -> None:
  """Writes ranked lists, each session a row; the source `lists` reads them.

  Args:
    path: the parquet file, written atomically.
    rankings: indices of each session's images, best first.
    images: [n, H, W, 3] uint8.
    prompts: [n] the prompt of each image.
    model: the generator's name.
    sources: [n] of edits, the encoded image that each is an edit of.
  """
  list_files.write(
    path,
    prompts=[prompts[ranking[0]] for ranking in rankings],
    images=[[encode_png(images[i]) for i in ranking] for ranking in rankings],
    image_uids=[[f"quickstart-{i:05d}" for i in ranking] for ranking in rankings],
    ranks=[list(range(len(ranking))) for ranking in rankings],
    models=[[model] * len(ranking) for ranking in rankings],
    sources=None if sources is None else [sources[r[0]] for r in rankings],
  )


def write_parquet(
  path: pathlib.Path,
  judgements: Sequence[Judgement],
  images: np.ndarray,
  prompts: Sequence[str],
  *,
  model: str,
) -> None:
  """Writes the judgements with exactly Pick-a-Pic's columns.

  Args:
    path: the parquet file, written atomically.
    judgements: who preferred what.
    images: [n, H, W, 3] uint8.
    prompts: [n] the prompt of each image.
    model: the generator's name.
  """
  encoded = [encode_png(image) for image in images]
  uids = [f"quickstart-{i:05d}" for i in range(len(images))]
  partial = path.with_suffix(".partial")
  sources.write_pickapic(
    partial,
    caption=[prompts[j.left] for j in judgements],
    image_0_uid=[uids[j.left] for j in judgements],
    image_1_uid=[uids[j.right] for j in judgements],
    jpg_0=[encoded[j.left] for j in judgements],
    jpg_1=[encoded[j.right] for j in judgements],
    label_0=[j.label for j in judgements],
    user_id=[j.user for j in judgements],
    ranking_id=[j.session for j in judgements],
    model_0=[model] * len(judgements),
    model_1=[model] * len(judgements),
  )
  partial.replace(path)
