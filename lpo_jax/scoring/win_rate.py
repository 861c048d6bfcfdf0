"""Win rates: how often a candidate's image beats the baseline's from the same seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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


def win_rate(
  candidate: np.ndarray,
  baseline: np.ndarray,
  *,
  prompts: Sequence[Any] | np.ndarray | None = None,
  seeds: Sequence[Any] | np.ndarray | None = None,
  unit: str = "auto",
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
    candidate: [n] scores, higher is better.
    baseline: [n] scores of the images from the same prompts and seeds.
    prompts: [n] ids (numbers or strings); None if unknown: the unit is then the pair.
    seeds: [n] seeds; with `prompts`, checked to name every pair only once.
    unit: "prompt", "pair", or "auto": prompts where there are at least 20 of them.
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

  outcome = (candidate > baseline) + 0.5 * (candidate == baseline)
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
  )


def rows(
  scores: Mapping[str, Mapping[str, np.ndarray]],
  comparisons: Sequence[tuple[str, str]],
  prompts: Sequence[Any] | np.ndarray | None,
  *,
  seeds: Sequence[Any] | np.ndarray | None = None,
  **options: Any,
) -> list[dict[str, Any]]:
  """Makes the rows of summary.json: every comparison under every scorer.

  Args:
    scores: scores[candidate][scorer] is [n], all in the same order of pairs.
    comparisons: (candidate, baseline) names, in the order wanted.
    prompts: [n] prompt of every pair, or None.
    seeds: [n] seed of every pair, or None.
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
      try:
        result = win_rate(*pair, prompts=prompts, seeds=seeds, **options)
      except UserError as error:
        raise UserError(
          f"{candidate} against {baseline} under {scorer}: {error}"
        ) from None
      row = {"candidate": candidate, "baseline": baseline, "scorer": scorer}
      table.append(row | dataclasses.asdict(result))
  return table


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns `rows` as a Markdown table, for the console and for notes.

  Args:
    rows: as `rows` makes them.

  Returns:
    Lines without a final line feed; "" if there are no rows.
  """
  if not rows:
    return ""
  lines = [
    "| candidate | baseline | scorer | win rate | 95 % interval | ties | n "
    "| mean candidate | mean baseline |",
    "|---|---|---|--:|--:|--:|--:|--:|--:|",
  ]
  for row in rows:
    cells = [str(row[key]).replace("|", "\\|") for key in _NAMES]
    cells += [
      f"{row['win_rate']:.3f}",
      f"{row['ci_low']:.3f} to {row['ci_high']:.3f}",
      str(row["ties"]),
      str(row["n"]),
      f"{row['mean_candidate']:.4g}",
      f"{row['mean_baseline']:.4g}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


_NAMES = ("candidate", "baseline", "scorer")


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
