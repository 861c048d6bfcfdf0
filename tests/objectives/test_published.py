"""Published formulas re-stated in NumPy: equal loss, and gradient equal to the slope.

Pairwise formulas are written as the released scripts have them, on a batch of winners
and losers; listwise ones as loops over one list. What a paper holds fixed (a weight, a
baseline) is computed from `at` and not from `x`, so that the slope of the restatement
is the gradient that is meant.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest

from lpo_jax import objectives
from lpo_jax.errors import UserError
from lpo_jax.objectives import lists
from lpo_jax.types import Denoising, Ranking

STEP = 1e-6


@dataclasses.dataclass(frozen=True)
class Scalars:
  """[B, N] float64, best item first; score is no function of the rest."""

  err: np.ndarray
  ref_err: np.ndarray
  drift: np.ndarray
  score: np.ndarray


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def logsigmoid(x):
  return -np.log1p(np.exp(-x))


def released_inside(x, beta):
  """scale_term * (model_diff - ref_diff), as in Diffusion-DPO's script."""
  model_diff = x.err[:, 0] - x.err[:, 1]
  ref_diff = x.ref_err[:, 0] - x.ref_err[:, 1]
  return -0.5 * beta * (model_diff - ref_diff)


def kto(x, at, beta):
  z = max(np.mean(at.ref_err - at.err), 0)
  y = np.asarray([1, -1])
  return np.mean(1 - sigmoid(y * beta * (x.ref_err - x.err - z)))


def dpo(x, at, beta):
  return np.mean(-logsigmoid(released_inside(x, beta)))


def ipo(x, at, beta):
  h = released_inside(x, beta) / beta
  return beta**2 * np.mean((h - 1 / (2 * beta)) ** 2)


def dpo_hinge(x, at, beta):
  return np.mean(np.maximum(1 - released_inside(x, beta), 0))


def mapo(x, at, beta, snr_value):
  def ratio(loss):
    return snr_value * loss / (np.exp(snr_value * loss) - 1)

  margin = 1000.0 * (ratio(x.err[:, 0]) - ratio(x.err[:, 1]))
  return np.mean(x.err[:, 0]) - beta * np.mean(logsigmoid(margin))


def dmpo(x, at, beta, alpha):
  p, q = sigmoid(released_inside(x, beta)), 1 - alpha
  return np.mean(
    p * (np.log(p) - np.log(q)) + (1 - p) * (np.log(1 - p) - np.log(1 - q))
  )


def poly_dpo(x, at, beta, alpha):
  p = sigmoid(released_inside(x, beta))
  return np.mean(-np.log(p) + alpha * (1 - p))


def linear_dpo(x, at, beta, eta):
  model_diff = at.err[:, 0] - at.err[:, 1]
  ref_diff = at.ref_err[:, 0] - at.ref_err[:, 1]
  w = np.clip(0.2 * beta * (model_diff - ref_diff) + 0.5, eta, 1 - eta)
  return np.mean(w * (x.err[:, 0] - x.err[:, 1]))


def dro(x, at, margin):
  d = x.err - x.ref_err
  return np.mean(np.maximum(d[:, 0] - d[:, 1] + margin, 0))


def each_list(per_list):
  """A loop over lists; s is beta_code / 2 times the improvement."""

  def loss(x, at, beta, **hyper):
    def logit(y):
      return -0.5 * beta * (y.err - y.ref_err)

    values = [
      per_list(s, fixed, score, **hyper)
      for s, fixed, score in zip(logit(x), logit(at), x.score, strict=True)
    ]
    return np.mean(values)

  return loss


def lpo(s, fixed, score, top_k=0, reduction="sum"):
  choices = [np.log(np.exp(s[j:]).sum()) - s[j] for j in range(len(s) - 1)]
  choices = choices[: top_k or len(choices)]
  return sum(choices) / (len(choices) if reduction == "mean" else 1)


def all_pairs(s, fixed, score):
  n = len(s)
  return sum(-logsigmoid(s[i] - s[j]) for i in range(n) for j in range(i + 1, n))


def dcg_pairs(s, score, tau):
  total, n = 0.0, len(s)
  for i in range(n):
    for j in range(i + 1, n):
      gain = abs(2 ** score[i] - 2 ** score[j])
      discount = abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
      total -= gain * discount * logsigmoid(s[i] - s[j])
  return total


def rankdpo(s, fixed, score):
  return dcg_pairs(s, score, np.arange(1, len(s) + 1))


def lipo_lambda(s, fixed, score):
  return dcg_pairs(s, score, 1 + np.argsort(np.argsort(-fixed)))


def lair(s, fixed, score, temperature, penalty):
  p = np.exp(score / temperature) / np.exp(score / temperature).sum()
  n = len(s)
  return -np.sum((p - 1 / n) * s) + penalty / n * np.sum(s**2)


def capo(s, fixed, score):
  n, pairs = len(s), []
  rate = [
    np.mean([sigmoid(score[i] - score[j]) for j in range(n) if j != i])
    for i in range(n)
  ]
  for i in range(n):
    for j in range(i + 1, n):
      pairs.append((rate[i] - rate[j] - (s[i] - s[j])) ** 2)
  return np.mean(pairs)


# name, options, restatement, list length.
PUBLISHED = [
  ("kto", {"beta": 5.0}, kto, 2),
  ("dpo", {"beta": 5.0}, dpo, 2),
  ("ipo", {"beta": 5.0}, ipo, 2),
  ("dpo_hinge", {"beta": 2.0}, dpo_hinge, 2),
  ("mapo", {"beta": 0.1, "snr_value": 0.5}, mapo, 2),
  ("dmpo", {"beta": 5.0, "alpha": 0.01}, dmpo, 2),
  ("poly_dpo", {"beta": 5.0, "alpha": 8.0}, poly_dpo, 2),
  ("linear_dpo", {"beta": 2.0, "eta": 1e-3}, linear_dpo, 2),
  ("dro", {"margin": 0.001}, dro, 2),
  ("capo", {"beta": 5.0}, each_list(capo), 4),
  ("lpo", {"beta": 5.0}, each_list(lpo), 4),
  ("lpo", {"beta": 5.0, "reduction": "mean", "top_k": 2}, each_list(lpo), 4),
  ("all_pairs", {"beta": 5.0}, each_list(all_pairs), 4),
  ("rankdpo", {"beta": 5.0}, each_list(rankdpo), 4),
  ("lambda", {"beta": 5.0}, each_list(lipo_lambda), 4),
  ("lair", {"beta": 5.0, "temperature": 0.7, "penalty": 0.3}, each_list(lair), 4),
]


def scalars(n, seed=0, better=0.0):
  rng = np.random.default_rng(seed)
  err, ref_err, drift = rng.uniform(0.2, 1.2, (3, 4, n))
  return Scalars(
    err=err - better,
    ref_err=ref_err,
    drift=drift,
    score=-np.sort(-rng.uniform(0, 2, (4, n)), axis=1),
  )


def ranking_of(x, rank=None):
  shape = x.err.shape
  return Ranking(
    rank=np.broadcast_to(np.arange(shape[1]) if rank is None else rank, shape),
    valid=np.ones(shape, bool),
    score=x.score,
    weight=np.ones(shape[0]),
  )


def denoising_of(x):
  return Denoising(err=x.err, ref_err=x.ref_err, drift=x.drift)


def slope(loss, x, field):
  """Central differences of loss(x, at=x) by every entry of x.field, `at` held."""
  out = np.zeros_like(x.err)
  for index in np.ndindex(*out.shape):
    by = np.zeros_like(out)
    by[index] = STEP
    up, down = (
      loss(dataclasses.replace(x, **{field: getattr(x, field) + sign * by}), x)
      for sign in (1, -1)
    )
    out[index] = (up - down) / (2 * STEP)
  return out


@pytest.mark.parametrize(
  ("name", "hyper", "restated", "n"), PUBLISHED, ids=[p[0] for p in PUBLISHED]
)
def test_loss_and_gradient_are_the_published_ones(name, hyper, restated, n):
  # Better than the reference on the whole, so that KTO's baseline is not 0.
  x = scalars(n, better=0.2)
  objective = objectives.get(name, **hyper)
  with jax.enable_x64(True):
    fn = jax.jit(jax.value_and_grad(lambda d: objective(d, ranking_of(x))[0]))
    loss, gradient = fn(denoising_of(x))
  np.testing.assert_allclose(loss, restated(x, x, **hyper), rtol=1e-9)
  for field in ("err", "ref_err"):
    if field in objective.needs:
      expected = slope(lambda y, at: restated(y, at, **hyper), x, field)
      assert expected.any() or field != "err"
      np.testing.assert_allclose(
        getattr(gradient, field), expected, rtol=1e-6, atol=1e-7
      )


@pytest.mark.parametrize("detach", [False, True])
def test_dspo_of_vectors(detach):
  """The released loss is of predictions; three scalars of them are enough."""
  rng = np.random.default_rng(0)
  pred, target, ref_pred = rng.standard_normal((3, 3, 2, 5))  # lists, (w, l), D
  beta = 0.7

  def inside(pred):
    model, ref = (np.mean((p - target) ** 2, -1) for p in (pred, ref_pred))
    return -0.5 * beta * ((model[:, 0] - model[:, 1]) - (ref[:, 0] - ref[:, 1]))

  def restated(x, at):
    c = beta * (1 - sigmoid(inside(at if detach else x)))[:, None]
    moved = (x - target)[:, 0] - c * (x - ref_pred)[:, 0]
    return np.mean(moved**2)

  def ours(pred):
    pairs = ((pred, target), (ref_pred, target), (pred, ref_pred))
    d = Denoising(*(((a - b) ** 2).mean(-1) for a, b in pairs))
    ranking = ranking_of(Scalars(*np.zeros((4, 3, 2))))
    return objectives.get("dspo", beta=beta, detach=detach)(d, ranking)[0]

  with jax.enable_x64(True):
    loss, gradient = jax.jit(jax.value_and_grad(ours))(pred)
  np.testing.assert_allclose(loss, restated(pred, pred), rtol=1e-9)
  expected = np.zeros_like(pred)
  for index in np.ndindex(*pred.shape):
    by = np.zeros_like(pred)
    by[index] = STEP
    expected[index] = (restated(pred + by, pred) - restated(pred - by, pred)) / 2 / STEP
  np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
  assert np.any(expected[:, 1]) != detach


@pytest.mark.parametrize("drift", [0.05, 0.2])
def test_dspo_in_the_sdxl_form_jumps_at_a_tenth(drift):
  x = dataclasses.replace(scalars(2), drift=np.full((4, 2), drift))
  p = sigmoid(released_inside(x, 3.0))
  expected = np.mean((1 - p) ** 2 * (drift if drift >= 0.1 else 1))
  assert_value("dspo", x, expected, beta=3.0, form="sdxl")


def value(name, x, rank=None, **hyper):
  objective = objectives.get(name, **hyper)
  with jax.enable_x64(True):
    return float(objective(denoising_of(x), ranking_of(x, rank))[0])


def assert_value(name, x, expected, **hyper):
  np.testing.assert_allclose(value(name, x, **hyper), expected, rtol=1e-9)


def test_two_items_are_one_loss():
  x = scalars(2)
  dpo_loss = value("dpo", x, beta=5.0)
  assert_value("all_pairs", x, dpo_loss, beta=5.0)
  assert_value("lpo", x, dpo_loss, beta=5.0)
  assert_value("lpo", x, dpo_loss, beta=5.0, reduction="mean")
  assert_value("lpo", x, dpo_loss, beta=5.0, top_k=1)
  assert_value("poly_dpo", x, dpo_loss, beta=5.0, alpha=0.0)


def test_rankdpo_of_equal_weights_is_all_pairs():
  """A star: every pair has the same gains and places 1 and 2."""
  x = dataclasses.replace(scalars(3), score=np.tile([1.0, 0.0, 0.0], (4, 1)))
  star = np.asarray([0, 1, 1])
  weight = (2 - 1) * (1 / math.log(2) - 1 / math.log(3))
  expected = weight * value("all_pairs", x, star, beta=5.0)
  for rewards in ("score", "wins"):
    got = value("rankdpo", x, star, beta=5.0, rewards=rewards)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_lambda_starts_as_rankdpo():
  x = scalars(4)
  x = dataclasses.replace(x, err=x.ref_err)
  assert_value("lambda", x, value("rankdpo", x, beta=5.0), beta=5.0)


def test_all_pairs_is_dpo_times_the_pairs():
  x = scalars(4)
  assert_value("all_pairs", x, 6 * value("dpo", x, beta=5.0), beta=5.0)


def test_top_k_of_lpo():
  """The last choice is none; with ties at the top they choose together."""
  x, beta = scalars(4), 5.0
  assert value("lpo", x, beta=beta, top_k=3) == value("lpo", x, beta=beta)
  star = value("lpo", x, np.asarray([0, 1, 1, 1]), beta=beta)
  assert_value("lpo", x, star, beta=beta, top_k=1)
  twins = np.asarray([0, 0, 1, 2])
  first = value("lpo", x, np.asarray([0, 0, 1, 1]), beta=beta)
  np.testing.assert_allclose(value("lpo", x, twins, beta=beta, top_k=1), first)


def test_lair_is_least_where_it_says():
  """s_i = N w_i / (2 lambda), with value -N / (4 lambda) sum w^2."""
  x, penalty, n = scalars(4), 0.3, 4
  p = np.exp(x.score) / np.exp(x.score).sum(1, keepdims=True)
  best = n * (p - 1 / n) / (2 * penalty)
  x = dataclasses.replace(x, err=x.ref_err - best)  # beta = 2: s = ref_err - err
  expected = np.mean(-n / (4 * penalty) * np.sum((p - 1 / n) ** 2, axis=1))
  assert_value("lair", x, expected, beta=2.0, temperature=1.0, penalty=penalty)


@pytest.mark.parametrize("name", ["dpo", "ipo", "dpo_hinge", "all_pairs"])
def test_label_noise(name):
  x = scalars(3)
  right = value(name, x, beta=2.0)
  wrong = value(name, x, np.asarray([2, 1, 0]), beta=2.0)
  smooth = value(name, x, beta=2.0, label_smoothing=0.1)
  np.testing.assert_allclose(smooth, 0.9 * right + 0.1 * wrong)
  robust = [value(name, x, r, beta=2.0, flip_noise=0.2) for r in ([0, 1, 2], [2, 1, 0])]
  # Unbiased: over labels flipped at that rate it is the loss on clean ones.
  np.testing.assert_allclose(0.8 * robust[0] + 0.2 * robust[1], right)


@pytest.mark.parametrize(
  ("utility", "expected"),
  [("loss_averse", math.log(2)), ("risk_seeking", -math.log(2))],
)
def test_utilities_of_kto_at_step_zero(utility, expected):
  x = scalars(2)
  x = dataclasses.replace(x, err=x.ref_err)
  assert_value("kto", x, expected, beta=5.0, utility=utility)


def test_wrong_choices_are_refused():
  x = scalars(2)
  for name, hyper, message in (
    ("kto", {"beta": 1.0, "utility": "sigmod"}, "did you mean 'sigmoid'"),
    ("dspo", {"form": "sdx"}, "unknown form 'sdx'"),
    ("lpo", {"beta": 1.0, "reduction": "avg"}, "unknown reduction 'avg'"),
    ("lair", {"beta": 1.0, "temperature": 1.0, "penalty": 1.0, "rewards": "x"}, "'x'"),
    ("dmpo", {"beta": 1.0, "alpha": 0.0}, "alpha=0"),
    ("dpo", {"beta": 1.0, "flip_noise": 0.5}, "flip_noise=0.5"),
  ):
    with pytest.raises(UserError, match=message):
      value(name, x, **hyper)


def test_calibrated_rewards_by_hand():
  rewards = np.asarray([[0.0, math.log(3), 1e30]])
  rate = lists.calibrate(rewards, np.asarray([[True, True, False]]))
  np.testing.assert_allclose(rate, [[0.25, 0.75, 0.0]], rtol=1e-6)
  rate = lists.calibrate(rewards, np.ones((1, 3), bool))
  np.testing.assert_allclose(rate, [[0.125, 0.375, 1.0]], rtol=1e-6)


@pytest.mark.parametrize("name", ["rankdpo", "lambda", "lair", "capo"])
def test_extreme_scores_are_finite(name):
  x = dataclasses.replace(scalars(3), score=np.asarray([[1e30, 0.0, -1e30]] * 4))
  x = jax.tree.map(np.float32, dataclasses.asdict(x))
  extra = {"temperature": 0.1, "penalty": 1.0} if name == "lair" else {}
  objective = objectives.get(name, beta=5.0, **extra)
  ranking = ranking_of(Scalars(**x))
  d = Denoising(err=x["err"], ref_err=x["ref_err"], drift=x["drift"])
  loss, gradient = jax.value_and_grad(lambda d: objective(d, ranking)[0])(d)
  assert np.isfinite(loss) and np.isfinite(gradient.err).all() and gradient.err.any()


def test_the_ratio_of_mapo_is_smooth_at_zero():
  """Near 0 and far away, value and slope are those of x / (e^x - 1)."""
  from lpo_jax.objectives.pairwise_errors import _inverse_mean_exponential as ratio

  for at in (1e-30, 1e-4, 0.29, 0.31, 2.0, 30.0):
    with jax.enable_x64(True):
      got, derivative = jax.value_and_grad(ratio)(at)
      np.testing.assert_allclose(got, at / math.expm1(at), rtol=1e-9)
      assert got + at == pytest.approx(float(ratio(-at)), rel=1e-12)
    if at > 0.1:
      em = math.expm1(at)
      np.testing.assert_allclose(derivative, 1 / em - at * (em + 1) / em**2, rtol=1e-7)
  for at, expected, slope_there in ((0.0, 1.0, -0.5), (1e30, 0.0, 0.0)):
    got, derivative = jax.value_and_grad(ratio)(np.float32(at))
    assert (float(got), float(derivative)) == (expected, slope_there)
