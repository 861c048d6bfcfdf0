"""What the formulas imply: identities of single objectives, and the shared metrics."""

import itertools
import math

import jax
import numpy as np
import pytest

from lpo_jax import objectives
from lpo_jax.objectives import lists
from lpo_jax.types import Denoising, Ranking

BETA = 3.0


def ranking_of(rank, valid=None, weight=None):
  rank = np.asarray(rank, np.int32)
  valid = np.ones(rank.shape, bool) if valid is None else np.asarray(valid, bool)
  return Ranking(
    rank=rank,
    valid=valid,
    score=np.zeros(rank.shape, np.float32),
    weight=np.ones(len(rank), np.float32) if weight is None else weight,
  )


def denoising_of(logits, ref_err=1.0):
  """Errors whose logits, -beta/2 (err - ref_err), are these."""
  logits = np.asarray(logits, np.float32)
  ref_err = np.broadcast_to(np.float32(ref_err), logits.shape)
  return Denoising(
    err=ref_err - logits * np.float32(2 / BETA),
    ref_err=ref_err,
    drift=np.zeros_like(logits),
  )


def run(name, logits, rank, **ranking):
  objective = objectives.get(name, beta=BETA)
  return objective(denoising_of(logits), ranking_of(rank, **ranking))[0]


def logits(*shape, seed=0, scale=2.0):
  return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_lpo_of_two_items_is_dpo():
  a, rank = logits(64, 2, scale=4), np.asarray([[0, 1], [1, 0], [0, 0], [3, 7]] * 16)
  weight = np.random.default_rng(1).uniform(0, 2, 64).astype(np.float32)
  values = {}
  for name in ("lpo", "dpo"):
    objective = objectives.get(name, beta=BETA)
    values[name] = jax.value_and_grad(
      lambda d, fn=objective: fn(d, ranking_of(rank, weight=weight))[0]
    )(denoising_of(a))
  np.testing.assert_allclose(values["lpo"][0], values["dpo"][0], rtol=1e-6)
  for field in ("err", "ref_err"):
    np.testing.assert_allclose(
      getattr(values["lpo"][1], field),
      getattr(values["dpo"][1], field),
      rtol=1e-5,
      atol=1e-8,
    )


def test_lpo_gradient_formula():
  """dL/da_i = sum_{j <= i} softmax_{k >= j}(a)_i - 1, best first."""
  m = 6
  a = logits(1, m)
  objective = objectives.get("lpo", beta=BETA)
  ranking = ranking_of([range(m)])
  gradient = jax.grad(lambda d: objective(d, ranking)[0])(denoising_of(a)).err[0]
  expected = np.zeros(m)
  for j in range(m):
    rest = np.exp(a[0, j:].astype(np.float64))
    expected[j:] += rest / rest.sum()
  expected -= 1
  np.testing.assert_allclose(gradient, -BETA / 2 * expected, rtol=1e-5, atol=1e-6)


def by_enumeration(a, rank):
  """-log of the product of Luce choices, one for each item that beats another."""
  total = 0.0
  for j, mine in enumerate(rank):
    worse = [a[k] for k, other in enumerate(rank) if other > mine]
    if worse:
      total -= math.log(
        math.exp(a[j]) / (math.exp(a[j]) + sum(math.exp(x) for x in worse))
      )
  return total


@pytest.mark.parametrize(
  "rank",
  [
    [0, 1, 2, 3, 4],
    [4, 2, 0, 1, 3],
    [0, 1, 1, 1, 1],
    [0, 0, 0, 0, 1],
    [1, 0, 1, 0, 2],
    [0, 1, 1, 2, 2],
  ],
)
def test_lpo_is_the_product_of_choices(rank):
  a = logits(1, 5, seed=sum(rank))
  expected = by_enumeration(a[0].astype(np.float64), rank)
  np.testing.assert_allclose(run("lpo", a, [rank]), expected, rtol=2e-6)


def test_lpo_of_a_star_is_the_winners_choice():
  a = logits(1, 4)
  choice = np.log(np.exp(a[0].astype(np.float64)).sum()) - a[0, 0]
  np.testing.assert_allclose(run("lpo", a, [[0, 1, 1, 1]]), choice, rtol=1e-6)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_lpo_is_a_probability_over_orders(m):
  a = logits(1, m)
  orders = itertools.permutations(range(m))
  probability = sum(math.exp(-float(run("lpo", a, [order]))) for order in orders)
  np.testing.assert_allclose(probability, 1.0, rtol=1e-6)


def test_dpo_of_a_pair_and_its_opposite():
  for gap in (0.0, 0.5, 3.0):
    win, lose = (
      math.exp(-float(run("dpo", [[gap, 0.0]], [r]))) for r in ([0, 1], [1, 0])
    )
    np.testing.assert_allclose(win + lose, 1.0, rtol=1e-6)
    np.testing.assert_allclose(win, 1 / (1 + math.exp(-gap)), rtol=1e-6)


def test_dpo_of_a_list_is_the_mean_of_its_pairs():
  a = logits(1, 4)
  rank = [2, 0, 1, 1]
  pairs = [
    float(run("dpo", [[a[0, i], a[0, k]]], [[0, 1]]))
    for i in range(4)
    for k in range(4)
    if rank[i] < rank[k]
  ]
  assert len(pairs) == 5
  np.testing.assert_allclose(run("dpo", a, [rank]), np.mean(pairs), rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "lpo"])
def test_only_differences_within_a_list_matter(name):
  a, rank = logits(3, 4), [[0, 1, 2, 3], [0, 1, 1, 2], [1, 0, 2, 2]]
  shift = np.asarray([[3.0], [-2.0], [0.5]], np.float32)
  np.testing.assert_allclose(run(name, a + shift, rank), run(name, a, rank), rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "lpo"])
def test_the_reference_cancels_where_the_policy_equals_it(name):
  """At step 0 how hard each image is to denoise does not matter."""
  errors = np.random.default_rng(0).uniform(0.01, 2, (2, 3)).astype(np.float32)
  d = Denoising(err=errors, ref_err=errors, drift=np.zeros_like(errors))
  ranking = ranking_of([[0, 1, 2], [2, 0, 1]])
  loss, _ = objectives.get(name, beta=5000.0)(d, ranking)
  expected = {"dpo": math.log(2), "lpo": math.log(6)}[name]
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_implicit_logits_are_in_code_units():
  d = Denoising(
    err=np.asarray([[1.0, 5.0]], np.float32),
    ref_err=np.asarray([[1.5, 1.0]], np.float32),
    drift=np.zeros((1, 2), np.float32),
  )
  ranking = ranking_of([[0, 1]], valid=[[True, False]])
  np.testing.assert_array_equal(
    lists.implicit_logits(d, ranking, 2000.0), [[500.0, 0.0]]
  )


def test_is_better_by_hand():
  better = lists.is_better(ranking_of([[1, 0, 1, 0]], valid=[[1, 1, 1, 0]]))
  expected = np.zeros((1, 4, 4), bool)
  expected[0, 1, 0] = expected[0, 1, 2] = True
  np.testing.assert_array_equal(better, expected)


def test_mean_over_lists_by_hand():
  ranking = ranking_of(np.zeros((3, 1)), weight=np.asarray([1.0, 3.0, 5.0], np.float32))
  per_list = np.asarray([2.0, 4.0, np.inf], np.float32)
  counts = np.asarray([True, True, False])
  assert float(lists.mean_over_lists(per_list, counts, ranking)) == (2 + 12) / 4
  assert float(lists.mean_over_lists(per_list, counts & False, ranking)) == 0.0


def test_standing_metrics_by_hand():
  # Rewards (ref_err - err): list 0: 2, -1, 0.5; list 1: 1, 1 and one not valid.
  d = Denoising(
    err=np.asarray([[1, 4, 0.5], [2, 1, 1e30]], np.float32),
    ref_err=np.asarray([[3, 3, 1.0], [3, 2, -1e30]], np.float32),
    drift=np.asarray([[1, 2, 3], [4, 5, 1e30]], np.float32),
  )
  ranking = ranking_of([[0, 2, 1], [0, 1, 0]], valid=[[1, 1, 1], [1, 1, 0]])
  metrics = jax.jit(lists.standing_metrics)(d, ranking)
  expected = {
    # Ordered pairs: (2, 0.5), (2, -1), (0.5, -1) and the equal (1, 1).
    "implicit_acc": (1 + 1 + 1 + 0.5) / 4,
    "margin": (3 + 1.5 + 1.5 + 0) / 4,
    "winner_gain": (2 + 1) / 2,
    "loser_gain": (-1 + 0.5 + 1) / 3,
    "drift": (1 + 2 + 3 + 4 + 5) / 5,
    "err": (1 + 4 + 0.5 + 2 + 1) / 5,
    "ref_err": (3 + 3 + 1 + 3 + 2) / 5,
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_standing_metrics_at_step_zero_and_of_nothing():
  errors = np.random.default_rng(0).uniform(0.1, 2, (2, 3)).astype(np.float32)
  d = Denoising(err=errors, ref_err=errors, drift=np.zeros_like(errors))
  start = lists.standing_metrics(d, ranking_of([[0, 1, 2], [0, 0, 1]]))
  assert float(start["implicit_acc"]) == 0.5
  for name in ("margin", "winner_gain", "loser_gain", "drift"):
    assert float(start[name]) == 0.0
  nothing = lists.standing_metrics(d, ranking_of(np.zeros((2, 3)), np.zeros((2, 3))))
  assert all(float(x) == 0.0 for x in nothing.values())


def grouped_case():
  """Three lists, of 2, of 3 and of 5 items, and a row that holds none."""
  reward = np.zeros((4, 5), np.float32)
  reward[0, :2] = 3, 1
  reward[1, :3] = -1, 0, 2
  reward[2] = 5, 4, 4, 2, 1
  valid = np.zeros((4, 5), bool)
  valid[0, :2] = valid[1, :3] = valid[2] = True
  drift = np.where(valid, np.arange(4, dtype=np.float32)[:, None] + 1, 1e30)
  err = np.where(valid, 10 - reward, 1e30).astype(np.float32)
  ref_err = np.where(valid, 10.0, -1e30).astype(np.float32)
  rank = np.tile(np.arange(5), (4, 1))
  d = Denoising(err=err, ref_err=ref_err, drift=drift.astype(np.float32))
  return d, ranking_of(rank, valid=valid)


def test_metrics_by_group_by_hand():
  # 249 of 1000 is the last of t0, 250 the first of t1; the row without a list is in t3.
  place = np.float32([249, 250, 999, 999]) / np.float32(1000)
  metrics = jax.jit(lists.metrics_by_group)(*grouped_case(), place)
  expected = {
    "margin/t0": 2.0,
    "implicit_acc/t0": 1.0,
    "winner_gain/t0": 3.0,
    "loser_gain/t0": 1.0,
    "drift/t0": 1.0,
    # -1 < 0 < 2 in the wrong order: margins -1, -3, -2.
    "margin/t1": -2.0,
    "implicit_acc/t1": 0.0,
    "winner_gain/t1": -1.0,
    "loser_gain/t1": 1.0,
    "drift/t1": 2.0,
    # 5, 4, 4, 2, 1: margins 1, 1, 3, 4, 0, 2, 3, 2, 3, 1, and the equal pair counts half.
    "margin/t3": 2.0,
    "implicit_acc/t3": 0.95,
    "winner_gain/t3": 5.0,
    "loser_gain/t3": 11 / 4,
    "drift/t3": 3.0,
  }
  twins = {"t0": "size2", "t1": "size3_4", "t3": "size5_up"}
  for name, value in expected.items():
    metric, group = name.split("/")
    for key in (name, f"{metric}/{twins[group]}"):
      np.testing.assert_allclose(metrics[key], value, rtol=1e-6, err_msg=key)
  rest = {name for name in metrics if name.endswith("/t2")}
  assert len(rest) == 5 and all(np.isnan(metrics[name]) for name in rest)
  assert len(metrics) == 5 * 7


def test_groups_add_up_to_the_whole():
  """Means of groups, times how many they are of, are the standing metric."""
  d, ranking = grouped_case()
  whole = lists.standing_metrics(d, ranking)
  place = np.float32([0.3, 0.3, 0.8, 0.1])
  metrics = lists.metrics_by_group(d, ranking, place)
  pairs = {"size2": 1, "size3_4": 3, "size5_up": 10}
  for name in ("margin", "implicit_acc"):
    total = sum(n * metrics[f"{name}/{group}"] for group, n in pairs.items()) / 14
    np.testing.assert_allclose(total, whole[name], rtol=1e-6)
    by_time = (4 * metrics[f"{name}/t1"] + 10 * metrics[f"{name}/t3"]) / 14
    np.testing.assert_allclose(by_time, whole[name], rtol=1e-6)
  assert np.isnan(metrics["drift/t0"])  # a row without a list is no list


def test_margin_quantiles_by_hand():
  d, ranking = grouped_case()
  got = jax.jit(lists.margin_quantiles)(d, ranking)
  pairs = [2, -1, -3, -2, 1, 1, 3, 4, 0, 2, 3, 2, 3, 1]
  for name, q in {"margin_p10": 0.1, "margin_p50": 0.5, "margin_p90": 0.9}.items():
    np.testing.assert_allclose(got[name], np.quantile(pairs, q), rtol=1e-5)
  nothing = lists.margin_quantiles(d, ranking_of(np.zeros((4, 5)), np.zeros((4, 5))))
  assert all(np.isnan(x) for x in nothing.values())


def test_sft_is_the_mean_error_of_the_winners():
  d = denoising_of(logits(2, 3))
  ranking = ranking_of([[0, 1, 0], [1, 1, 0]], weight=np.float32([1, 3]))
  objective = objectives.get("sft")
  loss, gradient = jax.value_and_grad(lambda x: objective(x, ranking)[0])(d)
  e = d.err.astype(np.float64)
  np.testing.assert_allclose(
    loss, ((e[0, 0] + e[0, 2]) / 2 + 3 * e[1, 2]) / 4, rtol=1e-6
  )
  np.testing.assert_allclose(
    gradient.err, [[1 / 8, 0, 1 / 8], [0, 0, 3 / 4]], rtol=1e-6
  )
  assert not gradient.ref_err.any()
