"""Win rates: how often a candidate's image beats the baseline's from the same seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lpo_jax.errors import UserError, unknown_name

# With fewer prompts than this, resampling prompts says little about other prompts, and
# the interval is made over image pairs instead.
MIN_PROMPTS = 20

_MAX_DRAWS = 4_000_000  # resampled counts held at once: 32 MB


@dataclasses.dataclass(frozen=True)
class WinRate:
  """A paired comparison of two models under one scorer.

  Attributes:
    n: image pairs compared.
    win_rate: (wins + ties / 2) / n, in 0..1.
    ci_low: lower end of the percentile bootstrap interval.
    ci_high: its upper end. Where all units agree the interval has no width; that is a
      property of the bootstrap, not certainty: n units without a loss are still
      compatible with a loss in 3 / n of all cases.
    ties: pairs with exactly equal scores.
    mean_candidate: mean score of the candidate.
    mean_baseline: mean score of the baseline.
    p_sign: two-sided exact sign test over the units, tied units left out.
    unit: what was resampled and what the sign test counts: "prompt" or "pair".
    units: how many of them there are.
    median_candidate: median score of the candidate.
    median_baseline: median score of the baseline.
  """

  n: int
  win_rate: float
  ci_low: float
  ci_high: float
  ties: int
  mean_candidate: float
  mean_baseline: float
  p_sign: float
  unit: str
  units: int
  median_candidate: float
  median_baseline: float


def win_rate(
  candidate: np.ndarray,
  baseline: np.ndarray,
  *,
  prompts: Sequence[Any] | np.ndarray | None = None,
  seeds: Sequence[Any] | np.ndarray | None = None,
  unit: str = "auto",
  higher_is_better: bool = True,
  resamples: int = 2000,
  confidence: float = 0.95,
  seed: int = 0,
) -> WinRate:
  """Compares the scores of two models' images, pair by pair.

  win_rate = mean over pairs of 1[c > b] + 1[c = b] / 2

  The interval resamples units with replacement. Images of one prompt are not
  independent, so that the unit is the prompt wherever there are enough of them. The
  result does not depend on the order of the pairs.

  Args:
    candidate: [n] scores.
    baseline: [n] scores of the images from the same prompts and seeds.
    prompts: [n] ids (numbers or strings); None if unknown: the unit is then the pair.
    seeds: [n] seeds; with `prompts`, checked to name every pair only once.
    unit: "prompt", "pair", or "auto": prompts where there are at least 20 of them.
    higher_is_better: whether the larger of two scores wins.
    resamples: bootstrap resamples.
    confidence: share of the resamples that the interval holds.
    seed: of the bootstrap.

  Returns:
    The comparison.

  Raises:
    UserError: scores that are NaN or infinite, arrays of different lengths, no pairs,
      a pair that is given twice, or an unknown unit.

  >>> result = win_rate([3.0, 2.0, 1.0, 5.0], [1.0, 2.0, 3.0, 4.0])
  >>> result.win_rate, result.ties, result.unit
  (0.625, 1, 'pair')
  """
  candidate = _scores("candidate", candidate)
  baseline = _scores("baseline", baseline)
  n = len(candidate)
  _require_aligned(n, baseline=baseline, prompts=prompts, seeds=seeds)
  if unit not in ("auto", "prompt", "pair"):
    raise unknown_name("unit of the win rate", unit, ["auto", "prompt", "pair"])
  if unit == "prompt" and prompts is None:
    raise UserError("unit 'prompt' needs the prompt of every pair; pass prompts=.")

  wins = candidate > baseline if higher_is_better else candidate < baseline
  outcome = wins + 0.5 * (candidate == baseline)
  group = np.arange(n)
  if prompts is not None:
    group = np.unique(np.asarray(prompts), return_inverse=True)[1].reshape(-1)
    _require_distinct(group, seeds)
    if unit == "auto":
      unit = "prompt" if group.max() + 1 >= MIN_PROMPTS else "pair"
  if prompts is None or unit == "pair":
    unit, group = "pair", np.arange(n)

  size = np.bincount(group).astype(np.float64)  # pairs of each unit
  won = np.bincount(group, weights=outcome)  # sums of halves: exact in any order
  rates = _resampled_rates(won, size, resamples, np.random.default_rng(seed))
  tail = (1.0 - confidence) / 2.0
  ci_low, ci_high = np.quantile(rates, [tail, 1.0 - tail])
  return WinRate(
    n=n,
    win_rate=float(outcome.sum() / n),
    ci_low=float(ci_low),
    ci_high=float(ci_high),
    ties=int((candidate == baseline).sum()),
    mean_candidate=float(np.sort(candidate).mean()),
    mean_baseline=float(np.sort(baseline).mean()),
    p_sign=_sign_test(int((won > size / 2).sum()), int((won < size / 2).sum())),
    unit=unit,
    units=len(size),
    median_candidate=float(np.median(candidate)),
    median_baseline=float(np.median(baseline)),
  )


def rows(
  scores: Mapping[str, Mapping[str, np.ndarray]],
  comparisons: Sequence[tuple[str, str]],
  prompts: Sequence[Any] | np.ndarray | None,
  *,
  seeds: Sequence[Any] | np.ndarray | None = None,
  lower_is_better: Collection[str] = (),
  **options: Any,
) -> list[dict[str, Any]]:
  """Makes the rows of summary.json: every comparison under every scorer.

  Args:
    scores: scores[candidate][scorer] is [n], all in the same order of pairs.
    comparisons: (candidate, baseline) names, in the order wanted.
    prompts: [n] prompt of every pair, or None.
    seeds: [n] seed of every pair, or None.
    lower_is_better: the scorers of which the smaller score wins.
    **options: further options of `win_rate`.

  Returns:
    One row for each scorer that both sides have, scorers outermost: candidate,
    baseline, scorer, then the fields of `WinRate`. Plain Python numbers.

  Raises:
    UserError: a comparison names a candidate without scores, two candidates share no
      scorer, or as `win_rate`, saying which comparison.
  """
  for name in (name for comparison in comparisons for name in comparison):
    if name not in scores:
      raise unknown_name("candidate", name, scores)
  for candidate, baseline in comparisons:
    if not set(scores[candidate]) & set(scores[baseline]):
      raise UserError(
        f"{candidate!r} and {baseline!r} have no scorer in common "
        f"({sorted(scores[candidate])} and {sorted(scores[baseline])}); "
        "score both with the same eval.scorers."
      )
  table = []
  for scorer in dict.fromkeys(s for by_scorer in scores.values() for s in by_scorer):
    for candidate, baseline in comparisons:
      if scorer not in scores[candidate] or scorer not in scores[baseline]:
        continue
      pair = scores[candidate][scorer], scores[baseline][scorer]
      better = scorer not in lower_is_better
      try:
        result = win_rate(
          *pair, prompts=prompts, seeds=seeds, higher_is_better=better, **options
        )
      except UserError as error:
        raise UserError(
          f"{candidate} against {baseline} under {scorer}: {error}"
        ) from None
      row = {"candidate": candidate, "baseline": baseline, "scorer": scorer}
      table.append(row | dataclasses.asdict(result))
  return table


def bonferroni(p_values: Sequence[float]) -> list[float]:
  """Corrects p values of m tests: min(1, m p).

  >>> bonferroni([0.01, 0.04, 0.5])
  [0.03, 0.12, 1.0]
  """
  return [min(1.0, len(p_values) * p) for p in p_values]


def holm(p_values: Sequence[float]) -> list[float]:
  """Corrects p values of m tests step by step, never less powerful than Bonferroni.

  With p_(1) <= ... <= p_(m): corrected p_(i) = max over j <= i of min(1, (m - j + 1) p_(j))

  Reference: Holm 1979, A simple sequentially rejective multiple test procedure.

  >>> holm([0.04, 0.01, 0.03])
  [0.06, 0.03, 0.06]
  """
  many, corrected, largest = len(p_values), [0.0] * len(p_values), 0.0
  for place, i in enumerate(np.argsort(p_values, kind="stable")):
    largest = max(largest, min(1.0, (many - place) * p_values[i]))
    corrected[i] = largest
  return corrected


CORRECTIONS: dict[str, Callable[[Sequence[float]], list[float]]] = {
  "holm": holm,
  "bonferroni": bonferroni,
  "none": list,
}


def correct(rows: Sequence[Mapping[str, Any]], how: str) -> list[dict[str, Any]]:
  """Returns rows with their sign tests corrected for how many rows there are.

  Args:
    rows: one family of tests, as `rows` makes them.
    how: a name in `CORRECTIONS`.

  Returns:
    The rows with `p_corrected`, `correction` and `comparisons`, the family's size. The
    intervals stay as they are: each is of one comparison.

  Raises:
    UserError: an unknown correction.
  """
  if how not in CORRECTIONS:
    raise unknown_name("eval.correction", how, CORRECTIONS)
  corrected = CORRECTIONS[how]([row["p_sign"] for row in rows])
  return [
    {**row, "p_corrected": p, "correction": how, "comparisons": len(rows)}
    for row, p in zip(rows, corrected, strict=True)
  ]


def _scores(name: str, values: Any) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values):
    raise UserError(
      f"expected the {name}'s scores as one number per image, got an array of shape "
      f"{list(values.shape)}; score at least one image."
    )
  bad = ~np.isfinite(values)
  if bad.any():
    raise UserError(
      f"{int(bad.sum())} of the {name}'s {len(values)} scores are NaN or infinite (the "
      f"first is number {int(np.argmax(bad))}), and nobody can say who won there; look "
      "at these images and at the scorer's input range, or leave the pair out for both."
    )
  return values


def _require_aligned(n: int, **arrays: Any) -> None:
  for name, values in arrays.items():
    if values is not None and len(values) != n:
      raise UserError(
        f"expected one entry of {name} for each of the candidate's {n} scores, got "
        f"{len(values)}; both sides need the same prompts and seeds in the same order."
      )


def _require_distinct(group: np.ndarray, seeds: Any) -> None:
  if seeds is None:
    return
  seed = np.unique(np.asarray(seeds), return_inverse=True)[1].reshape(-1)
  repeated = len(group) - len(np.unique(np.stack([group, seed]), axis=1).T)
  if repeated:
    raise UserError(
      f"{repeated} of {len(group)} pairs repeat a prompt and seed that came before; "
      "each image counts once, so give every prompt its own seeds."
    )


def _resampled_rates(
  won: np.ndarray, size: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
  """Returns [resamples] win rates of units drawn with replacement.

  Units of equal (won, size) are interchangeable, so that a resample is one multinomial
  draw over the few kinds of unit: exact, small, and blind to the units' order.
  """
  kinds, counts = np.unique(np.stack([won, size], axis=1), axis=0, return_counts=True)
  rates = []
  step = max(1, _MAX_DRAWS // len(kinds))
  for start in range(0, resamples, step):
    draws = rng.multinomial(
      len(won), counts / counts.sum(), size=min(step, resamples - start)
    )
    rates.append((draws @ kinds[:, 0]) / (draws @ kinds[:, 1]))
  return np.concatenate(rates)


def _sign_test(wins: int, losses: int) -> float:
  if not wins + losses:
    return 1.0
  from scipy import stats

  return float(stats.binomtest(wins, wins + losses).pvalue)
