"""What every objective owes, and one worked example of each.

A new objective joins by an entry in `expectations.EXPECT`; the tests below then run on it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import objectives, tables
from lpo_jax.errors import UserError
from lpo_jax.types import Denoising, Ranking

from .expectations import EXPECT

NAMES = list(objectives.OBJECTIVES)
everyone = pytest.mark.parametrize("name", NAMES)


def test_every_objective_is_in_the_battery():
  assert set(EXPECT) == set(objectives.OBJECTIVES) == set(objectives.NEEDS)


def bound(name):
  return objectives.get(name, **EXPECT[name].hyper)


@functools.cache
def compiled(name):
  """(loss, metrics), gradient: jitted once for each objective and shape."""
  fn = bound(name)
  return jax.jit(jax.value_and_grad(lambda d, r: fn(d, r), has_aux=True))


def loss_of(name, denoising, ranking):
  return float(compiled(name)(denoising, ranking)[0][0])


def grad_of(name, denoising, ranking):
  gradient = compiled(name)(denoising, ranking)[1]
  return jax.tree.map(np.asarray, gradient)


def make(err, ref_err, rank, valid=None, weight=None, drift=None, score=None):
  """Arrays of a batch; drift defaults to what nobody should read."""
  err, ref_err = np.asarray(err, np.float32), np.asarray(ref_err, np.float32)
  valid = np.ones(err.shape, bool) if valid is None else np.asarray(valid, bool)
  weight = np.ones(len(err)) if weight is None else weight
  return (
    Denoising(
      err=err,
      ref_err=ref_err,
      drift=np.full(err.shape, 0.01, np.float32) if drift is None else drift,
    ),
    Ranking(
      rank=np.asarray(rank, np.int32),
      valid=valid,
      score=np.zeros(err.shape, np.float32) if score is None else score,
      weight=np.asarray(weight, np.float32),
    ),
  )


def random_batch(seed=0):
  """Six lists of up to five: ties, holes in the middle, one of one image, one empty."""
  rng = np.random.default_rng(seed)
  ranks = [
    [0, 1, 2, 3, 4],
    [2, 0, 0, 1, 9],
    [1, 9, 0, 1, 1],
    [0, 9, 9, 0, 1],
    [9, 9, 0, 9, 9],
    [9, 9, 9, 9, 9],
  ]
  rank = np.asarray(ranks)
  err, ref_err = rng.uniform(0.5, 1.5, (2, 6, 5))
  return make(
    err, ref_err, np.where(rank == 9, 0, rank), rank != 9, rng.uniform(0.5, 2, 6)
  )


def items_by(order, denoising, ranking):
  """Permutes the items of each list."""
  moved = jax.tree.map(
    lambda x: np.take_along_axis(x, order, 1) if x.ndim == 2 else x,
    (denoising, ranking),
  )
  return moved


def lists_of(rows, denoising, ranking):
  return jax.tree.map(lambda x: x[rows], (denoising, ranking))


CASES = [
  pytest.param(name, case, id=f"{name}-{i}")
  for name, expect in EXPECT.items()
  for i, case in enumerate(expect.worked)
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_worked_by_hand(name, case):
  rows = [[(0.0,) * 5 if x is None else x for x in row] for row in case.lists]
  valid = [[x is not None for x in row] for row in case.lists]
  err, ref_err, rank, score, drift = np.moveaxis(np.asarray(rows, np.float32), -1, 0)
  batch = make(err, ref_err, rank, valid, case.weight, drift, score)
  np.testing.assert_allclose(loss_of(name, *batch), case.loss, rtol=2e-6, atol=2e-7)


@everyone
@pytest.mark.parametrize("m", [2, 3, 4, 8])
def test_step_zero(name, m):
  same = np.full((3, m), 0.25)
  rank = np.stack([np.random.default_rng(i).permutation(m) for i in range(3)])
  batch = make(same, same, rank)
  batch = (dataclasses.replace(batch[0], drift=np.zeros_like(batch[0].err)), batch[1])
  expected = EXPECT[name].step_zero(m)
  np.testing.assert_allclose(loss_of(name, *batch), expected, rtol=2e-6)


@everyone
@pytest.mark.parametrize("high", [1e30, -1e30])
@pytest.mark.parametrize("low", [1e30, 0.0, -1e30])
def test_extremes_are_finite(name, high, low):
  signs = np.asarray([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1]])
  rank = [[0, 1, 2], [0, 1, 2], [0, 1, 1], [0, 0, 1]]
  batch = make(np.where(signs, high, low), np.where(signs, low, high), rank)
  (loss, metrics), gradient = compiled(name)(*batch)
  for leaf in jax.tree.leaves((loss, metrics, gradient)):
    assert np.isfinite(leaf).all()


@everyone
@pytest.mark.parametrize("junk", [1e30, -3e38, 0.0, 1e-45, 7.25])
def test_what_is_not_valid_does_not_matter(name, junk):
  denoising, ranking = random_batch()
  valid = ranking.valid

  def fill(x, value):
    return np.where(valid, x, np.asarray(value, x.dtype))

  junked = (
    Denoising(
      err=fill(denoising.err, junk),
      ref_err=fill(denoising.ref_err, -junk),
      drift=fill(denoising.drift, junk),
    ),
    dataclasses.replace(
      ranking, rank=fill(ranking.rank, -3), score=fill(ranking.score, junk)
    ),
  )
  assert loss_of(name, *junked) == loss_of(name, denoising, ranking)
  for before, after in zip(
    jax.tree.leaves(grad_of(name, denoising, ranking)),
    jax.tree.leaves(grad_of(name, *junked)),
    strict=True,
  ):
    np.testing.assert_array_equal(after, before)
    assert not after[~valid].any()


@everyone
def test_padding_adds_nothing(name):
  denoising, ranking = random_batch()
  wide = jax.tree.map(
    lambda x: np.pad(x, ((0, 2), (0, 3)) if x.ndim == 2 else ((0, 2),)),
    (denoising, ranking),
  )
  np.testing.assert_allclose(
    loss_of(name, *wide), loss_of(name, denoising, ranking), rtol=1e-6
  )


@everyone
def test_order_of_items_and_lists_does_not_matter(name):
  denoising, ranking = random_batch()
  loss, gradient = (f(name, denoising, ranking) for f in (loss_of, grad_of))
  rng = np.random.default_rng(3)
  order = np.stack([rng.permutation(5) for _ in range(6)])
  moved = items_by(order, denoising, ranking)
  np.testing.assert_allclose(loss_of(name, *moved), loss, rtol=1e-6)
  np.testing.assert_allclose(
    grad_of(name, *moved).err,
    np.take_along_axis(gradient.err, order, 1),
    rtol=1e-5,
    atol=1e-7,
  )
  rows = rng.permutation(6)
  moved = lists_of(rows, denoising, ranking)
  np.testing.assert_allclose(loss_of(name, *moved), loss, rtol=1e-6)
  np.testing.assert_allclose(
    grad_of(name, *moved).err, gradient.err[rows], rtol=1e-5, atol=1e-7
  )


@everyone
def test_ranks_are_an_order_and_not_numbers(name):
  """Only which is smaller matters (0 stays best)."""
  denoising, ranking = random_batch()
  stretched = dataclasses.replace(ranking, rank=ranking.rank**3 * 5)
  assert loss_of(name, denoising, stretched) == loss_of(name, denoising, ranking)


@everyone
def test_a_batch_without_a_valid_item_is_zero(name):
  denoising, ranking = random_batch()
  for empty in (
    dataclasses.replace(ranking, valid=np.zeros_like(ranking.valid)),
    dataclasses.replace(ranking, weight=np.zeros_like(ranking.weight)),
  ):
    assert loss_of(name, denoising, empty) == 0.0
    for leaf in jax.tree.leaves(grad_of(name, denoising, empty)):
      assert not leaf.any()


def weighted_alone(name, denoising, ranking, rows):
  """(weights, losses) of lists, each as a batch of its own."""
  losses = [loss_of(name, *lists_of([i], denoising, ranking)) for i in rows]
  return ranking.weight[rows], np.asarray(losses)


@everyone
def test_the_loss_is_the_weighted_mean_over_lists(name):
  denoising, ranking = random_batch()
  if EXPECT[name].couples_lists:
    # What couples them is the same in every list: copies of one.
    denoising, ranking = lists_of([0, 0, 0, 0], denoising, ranking)
    ranking = dataclasses.replace(ranking, weight=np.float32([1, 2, 0.5, 3]))
  weight, losses = weighted_alone(name, denoising, ranking, [0, 1, 2, 3])
  only = lists_of([0, 1, 2, 3], denoising, ranking)
  np.testing.assert_allclose(
    loss_of(name, *only), np.average(losses, weights=weight), rtol=1e-6
  )
  # Weights are relative.
  doubled = dataclasses.replace(only[1], weight=2 * only[1].weight)
  np.testing.assert_allclose(
    loss_of(name, only[0], doubled), loss_of(name, *only), rtol=1e-6
  )


@everyone
def test_a_list_of_weight_zero_is_absent(name):
  denoising, ranking = random_batch()
  denoising = dataclasses.replace(denoising, err=denoising.err.copy())
  denoising.err[1] *= 1e30
  silent = dataclasses.replace(ranking, weight=ranking.weight.copy())
  silent.weight[1] = 0.0
  rest = lists_of([0, 2, 3, 4, 5], denoising, ranking)
  np.testing.assert_allclose(
    loss_of(name, denoising, silent), loss_of(name, *rest), rtol=1e-6
  )
  assert not grad_of(name, denoising, silent).err[1].any()


@everyone
def test_a_list_of_ties(name):
  err = [[0.1, 0.5, 0.9], [0.3, 0.2, 0.8]]
  ref_err = [[0.2, 0.4, 0.9], [0.5, 0.5, 0.5]]
  batch = make(err, ref_err, [[0, 1, 2], [0, 0, 0]])
  gradient = grad_of(name, *batch).err
  alone = loss_of(name, *lists_of([0], *batch))
  if EXPECT[name].ties_are_silent:
    np.testing.assert_allclose(loss_of(name, *batch), alone, rtol=1e-6)
    assert not gradient[1].any()
    assert loss_of(name, *lists_of([1], *batch)) == 0.0
  else:
    assert gradient[1].all()
    assert abs(loss_of(name, *batch) - alone) > 1e-3


@everyone
def test_gradient_is_the_finite_difference(name):
  if EXPECT[name].stops_gradient:
    pytest.skip("see test_published.py, which knows what is frozen")
  fn = bound(name)
  with jax.enable_x64(True):
    denoising, ranking = random_batch(seed=5)
    denoising = jax.tree.map(lambda x: x.astype(np.float64), denoising)
    gradient = jax.grad(lambda d: fn(d, ranking)[0])(denoising)
    assert gradient.err.dtype == np.float64
    step = 1e-6

    @jax.jit
    def slopes(d):
      """Central differences by every err at once."""
      basis = jnp.eye(d.err.size).reshape(-1, *d.err.shape) * step
      moved = lambda by: fn(dataclasses.replace(d, err=d.err + by), ranking)[0]  # noqa: E731
      up, down = jax.vmap(moved)(basis), jax.vmap(moved)(-basis)
      return ((up - down) / (2 * step)).reshape(d.err.shape)

    np.testing.assert_allclose(gradient.err, slopes(denoising), rtol=1e-6, atol=1e-8)


@everyone
def test_needs_is_what_it_reads(name):
  denoising, ranking = random_batch()
  before = compiled(name)(denoising, ranking)
  for field in dataclasses.fields(Denoising):
    moved = dataclasses.replace(
      denoising, **{field.name: getattr(denoising, field.name) * 1.5 + 0.1}
    )
    # Not all alike: a shift of a whole list may cancel.
    getattr(moved, field.name)[:, 0] += 0.3
    after = compiled(name)(moved, ranking)
    if field.name in bound(name).needs:
      assert float(after[0][0]) != float(before[0][0])
    else:
      for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


@everyone
def test_results_are_fp32_scalars(name):
  denoising, ranking = random_batch()
  (loss, metrics), gradient = compiled(name)(denoising, ranking)
  for value in (loss, *metrics.values()):
    assert value.shape == () and value.dtype == np.float32
  assert gradient.err.dtype == np.float32
  assert "loss" not in metrics  # the step reports it


@everyone
def test_learning_moves_the_best_item_the_right_way(name):
  """Less error on what was ranked first is never worse."""
  denoising, ranking = random_batch()
  first = ranking.valid & (ranking.rank == 0)
  gradient = grad_of(name, denoising, ranking).err
  assert (gradient[first] >= 0).all()
  assert (gradient[:4][first[:4]] > 0).all()


@everyone
def test_get_binds_and_describes(name):
  objective = bound(name)
  assert objective.name == name
  assert objective.needs == objectives.NEEDS[name]
  assert dict(objective.hyper) == EXPECT[name].hyper
  assert objective.needs <= {f.name for f in dataclasses.fields(Denoising)}


@everyone
def test_wrong_options_are_refused(name):
  hyper = EXPECT[name].hyper
  with pytest.raises(UserError, match=f"option of objective '{name}' 'bete'"):
    objectives.get(name, **hyper, bete=1.0)
  for option, parameter in tables.options_of(objectives.OBJECTIVES[name]).items():
    if parameter.default is parameter.empty:
      rest = {k: v for k, v in hyper.items() if k != option}
      with pytest.raises(UserError, match=f"needs {option}; set objective.{option}"):
        objectives.get(name, **rest)


def test_unknown_names_are_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"unknown objective 'lop'; did you mean 'lpo'"):
    objectives.get("lop", beta=1.0)
  with pytest.raises(UserError, match=r"'bete'; did you mean 'beta'"):
    objectives.get("lpo", bete=1.0)
