import json
import math

import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.scoring import win_rate


def test_win_rate_of_four_pairs_by_hand():
  # win, tie, loss, win: (2 + 1/2) / 4
  result = win_rate.win_rate([3, 2, 1, 5], [1, 2, 3, 4])
  assert (result.n, result.ties, result.win_rate) == (4, 1, 0.625)
  assert (result.mean_candidate, result.mean_baseline) == (2.75, 2.5)
  assert (result.unit, result.units) == ("pair", 4)
  assert 0.0 <= result.ci_low <= 0.625 <= result.ci_high <= 1.0


def test_sign_test_is_the_exact_binomial():
  # 9 wins, 1 loss, 2 ties: 2 * (C(10, 0) + C(10, 1)) / 2^10
  candidate = [1.0] * 9 + [-1.0] + [0.0] * 2
  result = win_rate.win_rate(candidate, [0.0] * 12)
  assert result.p_sign == pytest.approx(22 / 1024, rel=1e-12)


def test_identical_models_tie_everywhere():
  scores = np.random.default_rng(0).normal(size=50)
  result = win_rate.win_rate(scores, scores, prompts=np.arange(50) // 2)
  assert result.win_rate == 0.5 and result.ties == 50 and result.p_sign == 1.0
  assert result.ci_low <= 0.5 <= result.ci_high


def test_swapping_the_sides_mirrors_the_result():
  rng = np.random.default_rng(1)
  a, b = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
  ab = win_rate.win_rate(a, b, resamples=20_000)
  ba = win_rate.win_rate(b, a, resamples=20_000)
  assert ab.win_rate + ba.win_rate == pytest.approx(1.0, abs=1e-15)
  assert ab.ties == ba.ties > 0 and ab.p_sign == pytest.approx(ba.p_sign, rel=1e-9)
  assert ab.ci_low + ba.ci_high == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("unit", ["prompt", "pair"])
def test_the_order_of_the_pairs_does_not_matter(unit):
  rng = np.random.default_rng(2)
  a, b = rng.normal(size=120), rng.normal(size=120)
  prompts = np.repeat([f"prompt {i}" for i in range(40)], 3)
  shuffled = rng.permutation(120)
  one = win_rate.win_rate(a, b, prompts=prompts, unit=unit)
  other = win_rate.win_rate(
    a[shuffled], b[shuffled], prompts=prompts[shuffled], unit=unit
  )
  assert one == other


def test_prompts_are_the_unit_from_twenty_of_them():
  scores = np.arange(40.0)
  few = win_rate.win_rate(scores, scores, prompts=np.arange(40) % 19)
  many = win_rate.win_rate(scores, scores, prompts=np.arange(40) % 20)
  told = win_rate.win_rate(scores, scores, prompts=np.arange(40) % 20, unit="pair")
  assert (few.unit, few.units) == ("pair", 40)
  assert (many.unit, many.units) == ("prompt", 20)
  assert (told.unit, told.units) == ("pair", 40)


def test_images_that_repeat_a_prompts_outcome_do_not_narrow_the_interval():
  outcome = np.random.default_rng(3).choice([-1.0, 1.0], size=50, p=[0.3, 0.7])
  single = win_rate.win_rate(outcome, np.zeros(50), prompts=np.arange(50))
  repeated = win_rate.win_rate(
    np.repeat(outcome, 8), np.zeros(400), prompts=np.repeat(np.arange(50), 8)
  )
  assert (repeated.ci_low, repeated.ci_high) == (single.ci_low, single.ci_high)
  assert repeated.p_sign == single.p_sign
  by_pair = win_rate.win_rate(np.repeat(outcome, 8), np.zeros(400))
  assert by_pair.ci_high - by_pair.ci_low < 0.5 * (single.ci_high - single.ci_low)


def test_interval_has_the_width_of_the_normal_approximation():
  outcome = np.where(np.arange(1000) < 600, 1.0, -1.0)
  result = win_rate.win_rate(outcome, np.zeros(1000), resamples=20_000)
  half = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
  assert result.ci_low == pytest.approx(0.6 - half, abs=2e-3)
  assert result.ci_high == pytest.approx(0.6 + half, abs=2e-3)


@pytest.mark.parametrize("images", [1, 4])
def test_interval_covers_the_truth_about_95_times_in_100(images):
  rng = np.random.default_rng(4)
  prompts, repetitions = 100, 200
  covered = 0
  for repetition in range(repetitions):
    # Each prompt has its own chance to win, of mean 0.7; images share it.
    chance = rng.beta(2.1, 0.9, size=prompts)
    won = rng.random((prompts, images)) < chance[:, None]
    result = win_rate.win_rate(
      won.reshape(-1),
      np.full(prompts * images, 0.5),
      prompts=np.repeat(np.arange(prompts), images),
      seed=repetition,
    )
    covered += result.ci_low <= 0.7 <= result.ci_high
  assert 0.90 <= covered / repetitions <= 0.99


def test_large_comparisons_are_resampled_in_pieces(monkeypatch):
  rng = np.random.default_rng(5)
  a, b = rng.normal(size=200), rng.normal(size=200)
  whole = win_rate.win_rate(a, b)
  monkeypatch.setattr(win_rate, "_MAX_DRAWS", 300)
  assert win_rate.win_rate(a, b).ci_low == pytest.approx(whole.ci_low, abs=0.02)


def test_scores_nobody_can_compare_are_refused():
  with pytest.raises(
    UserError, match=r"2 of the baseline's 3 scores are NaN.*number 1"
  ):
    win_rate.win_rate([1, 2, 3], [0, math.nan, math.inf])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"baseline": [1.0]}, "each of the candidate's 2 scores, got 1"),
    ({"prompts": [0]}, "one entry of prompts"),
    ({"prompts": [0, 0], "seeds": [7, 7]}, "1 of 2 pairs repeat a prompt and seed"),
    ({"unit": "prompts"}, "did you mean 'prompt'"),
    ({"unit": "prompt"}, "needs the prompt of every pair"),
    ({"candidate": [], "baseline": []}, "score at least one image"),
  ],
)
def test_bad_input_says_what_to_change(arguments, message):
  arguments = {"candidate": [1.0, 2.0], "baseline": [1.0, 1.0]} | arguments
  with pytest.raises(UserError, match=message):
    win_rate.win_rate(
      arguments.pop("candidate"), arguments.pop("baseline"), **arguments
    )


def _scores():
  return {
    "base": {"taste": np.zeros(4), "legibility": np.ones(4)},
    "lpo": {"taste": np.array([1.0, 1.0, 0.0, -1.0]), "legibility": np.ones(4)},
    "dpo": {"taste": np.array([1.0, 0.0, 0.0, 0.0])},
  }


def test_rows_hold_every_comparison_under_every_shared_scorer():
  rows = win_rate.rows(
    _scores(), [("lpo", "base"), ("dpo", "base"), ("lpo", "dpo")], np.arange(4)
  )
  named = [(r["scorer"], r["candidate"], r["baseline"], r["win_rate"]) for r in rows]
  assert named == [
    ("taste", "lpo", "base", 0.625),
    ("taste", "dpo", "base", 0.625),
    ("taste", "lpo", "dpo", 0.5),
    ("legibility", "lpo", "base", 0.5),
  ]
  # What summary.json promises, in this order; more may follow.
  assert list(rows[0])[:10] == [
    *("candidate", "baseline", "scorer", "n", "win_rate", "ci_low", "ci_high"),
    *("ties", "mean_candidate", "mean_baseline"),
  ]
  assert json.loads(json.dumps(rows)) == rows


def test_rows_name_what_is_wrong():
  with pytest.raises(UserError, match="unknown candidate 'lop'; did you mean 'lpo'"):
    win_rate.rows(_scores(), [("lop", "base")], None)
  scores = _scores() | {"other": {"beauty": np.zeros(4)}}
  with pytest.raises(UserError, match="no scorer in common"):
    win_rate.rows(scores, [("other", "base")], None)
  scores["dpo"]["taste"][0] = math.nan
  with pytest.raises(UserError, match="dpo against base under taste: 1 of the cand"):
    win_rate.rows(scores, [("dpo", "base")], None)


def test_medians_and_scores_of_which_less_is_better():
  # Of 1, 2, 9 against 3, 2, 4: win, tie, loss where less is better.
  result = win_rate.win_rate([1, 2, 9], [3, 2, 4], higher_is_better=False)
  assert (result.win_rate, result.ties) == (0.5, 1)
  assert (result.median_candidate, result.median_baseline) == (2, 3)
  mirrored = win_rate.win_rate([-1, -2, -9], [-3, -2, -4])
  assert mirrored.p_sign == result.p_sign and mirrored.ci_low == result.ci_low
  scores = {"base": {"error": np.array([1.0, 2.0])}}
  scores["lpo"] = {"error": np.array([0.5, 1.0])}
  for lower, won in (((), 0.0), (("error",), 1.0)):
    (row,) = win_rate.rows(scores, [("lpo", "base")], None, lower_is_better=lower)
    assert row["win_rate"] == won


def test_corrections_by_hand():
  # In order 0.01, 0.02, 0.025, 0.5 of 4 tests: 4 p, 3 p, 2 p, 1 p, never falling.
  p_values = [0.025, 0.01, 0.5, 0.02]
  assert win_rate.holm(p_values) == pytest.approx([0.06, 0.04, 0.5, 0.06])
  assert win_rate.bonferroni(p_values) == pytest.approx([0.1, 0.04, 1.0, 0.08])
  assert win_rate.holm([0.04]) == win_rate.bonferroni([0.04]) == [0.04]
  rng = np.random.default_rng(6)
  for _ in range(20):
    p_values = list(rng.random(7) ** 3)
    holm, bonferroni = win_rate.holm(p_values), win_rate.bonferroni(p_values)
    assert all(
      p <= h <= b + 1e-15 for p, h, b in zip(p_values, holm, bonferroni, strict=True)
    )


def test_corrected_rows_say_how_and_over_how_many():
  rows = win_rate.rows(_scores(), [("lpo", "base"), ("dpo", "base")], np.arange(4))
  rows[0]["p_sign"] = 0.01
  corrected = win_rate.correct(rows, "holm")
  assert [row["comparisons"] for row in corrected] == [len(rows)] * len(rows) == [3] * 3
  assert corrected[0]["p_corrected"] == pytest.approx(0.03)
  assert {row["correction"] for row in corrected} == {"holm"}
  assert win_rate.correct(rows, "none")[0]["p_corrected"] == 0.01
  with pytest.raises(UserError, match=r"eval\.correction 'hom'; did you mean 'holm'"):
    win_rate.correct(rows, "hom")
