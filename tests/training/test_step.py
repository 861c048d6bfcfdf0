"""The step: what it computes, and what must not change it."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import trees
from lpo_jax.errors import UserError
from lpo_jax.objectives import OBJECTIVES
from lpo_jax.training import optimizer, step
from lpo_jax.types import Denoising


def assert_trees_close(a, b, tolerance):
  """Largest difference, relative to the largest value of each leaf."""
  a, b = trees.named_leaves(a), trees.named_leaves(b)
  assert a.keys() == b.keys()
  for name, x in a.items():
    scale = np.abs(b[name]).max()
    assert np.abs(np.asarray(x) - b[name]).max() <= tolerance * scale, name


def bytes_of(tree):
  return {n: np.asarray(x).tobytes() for n, x in trees.named_leaves(tree).items()}


@pytest.fixture(scope="module")
def whole(value_and_grad):
  """Loss, metrics and gradient of an objective without accumulation."""
  return functools.cache(value_and_grad)


def test_scalars_by_numpy(world):
  """err, ref_err and drift in fp64, from what noising shows the network."""
  method, batch = world.make_method(), world.make_batch()
  noised = method.noising(batch, method.schedule, 3, scaling_factor=0.5)
  scalars = jax.jit(functools.partial(step.denoise, method.unet))(
    world.make_params(0), world.make_params(1), noised, batch.conditioning
  )

  def predict(seed):
    p = jax.tree.map(lambda x: x.astype(np.float64), world.make_params(seed))
    x = np.asarray(noised.noisy_latents, np.float64) @ p["out"]["kernel"]
    row = batch.conditioning.prompt_embeds.mean(1) @ p["text"]["kernel"]
    row = row + np.asarray(noised.timesteps)[:, None] / 1000 * p["time"]["scale"]
    return x + p["out"]["bias"] + row[:, None, None, :]

  def mean_square(x):
    return (x**2).mean((1, 2, 3))

  policy, reference, target = predict(0), predict(1), np.asarray(noised.target)
  for ours, theirs in (
    (scalars.err, mean_square(policy - target)),
    (scalars.ref_err, mean_square(reference - target)),
    (scalars.drift, mean_square(policy - reference)),
  ):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def test_dspo_inner_product_is_in_the_scalars(world):
  """<pred - target, pred - ref_pred> = (err + drift - ref_err) / 2."""
  rng = np.random.default_rng(0)
  pred, ref_pred, target = rng.standard_normal((3, 5, 2, 2, 4)).astype(np.float32)
  noised = step.Noised(noisy_latents=pred, timesteps=np.zeros(5), target=target)
  conditioning = world.make_batch().conditioning
  unet = lambda p, *_, **told: jnp.asarray(p)  # noqa: E731
  s = step.denoise(unet, pred, ref_pred, noised, conditioning)
  inner = ((pred - target) * (pred - ref_pred)).mean((1, 2, 3))
  np.testing.assert_allclose((s.err + s.drift - s.ref_err) / 2, inner, atol=1e-6)


def test_lists_are_gathered_by_slot():
  scalars = step.Denoising(*(np.float32([10, 20, 30, 40]) * k for k in (1, 2, 3)))
  gathered = step.to_lists(scalars, np.asarray([[2, 0], [3, 0]]))
  np.testing.assert_array_equal(gathered.err, [[30, 10], [40, 10]])
  np.testing.assert_array_equal(gathered.drift, [[90, 30], [120, 30]])


@pytest.mark.parametrize(
  ("objective", "microbatch"),
  [("lpo", 6), ("lpo", 4), ("lpo", 3), ("lpo", 1), ("dpo", 4), ("sft", 4)],
)
def test_accumulation_is_the_large_batch(value_and_grad, whole, objective, microbatch):
  loss, metrics, gradient = value_and_grad(objective, microbatch=microbatch)
  expected_loss, expected_metrics, expected_gradient = whole(objective)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  assert_trees_close(gradient, expected_gradient, 2e-6)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_weighting_is_a_beta_of_the_timestep(world, value_and_grad, whole):
  """Linear in the errors: the weights can be moved into sft's list weights."""
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.uniform(0.5, 2.0, 1000), jnp.float32)
  batch = world.make_batch()
  method = world.make_method()
  noised = method.noising(batch, method.schedule, 3, scaling_factor=0.5)
  timesteps = np.asarray(noised.timesteps)[batch.slot[:, 0]]  # one a list
  loss, _, gradient = value_and_grad("sft", weighting=lambda t: table[t])

  # sft is a mean over lists by their weights: undo what they are divided by.
  weights = np.asarray(batch.ranking.weight) * np.asarray(table)[timesteps]
  ratio = weights.sum() / np.asarray(batch.ranking.weight).sum()
  ranking = dataclasses.replace(batch.ranking, weight=weights.astype(np.float32))
  expected = value_and_grad("sft", dataclasses.replace(batch, ranking=ranking))
  np.testing.assert_allclose(loss, expected[0] * ratio, rtol=1e-6)
  scaled = jax.tree.map(lambda x: x * ratio, expected[2])
  assert_trees_close(gradient, scaled, 2e-6)

  # An objective with a beta: weights of 2 are a beta of twice the size; what the run
  # reports of margins stays as it was.
  loss, metrics, _ = value_and_grad("dpo", weighting=lambda t: jnp.full(t.shape, 2.0))
  twice = world.objectives.get("dpo", beta=2 * world.HYPER["dpo"]["beta"])
  method = dataclasses.replace(world.make_method("dpo"), objective=twice)
  expected, _ = jax.jit(functools.partial(step.loss_and_metrics, method))(
    world.make_params(0), world.make_params(1), batch
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics["margin"], whole("dpo")[1]["margin"], rtol=1e-6)


def test_unrolling_changes_nothing(value_and_grad, whole):
  loss, _, gradient = value_and_grad("lpo", microbatch=4, unroll=True)
  np.testing.assert_allclose(loss, whole("lpo")[0], rtol=1e-6)
  assert_trees_close(gradient, whole("lpo")[2], 2e-6)


def count_products(jaxpr):
  """Matrix products in a program, and in the programs inside of it."""
  total = sum(e.primitive is jax.lax.dot_general_p for e in jaxpr.eqns)
  inside = (jax.extend.core.jaxprs_in_params(e.params) for e in jaxpr.eqns)
  return total + sum(count_products(inner) for each in inside for inner in each)


def test_no_prediction_is_computed_for_a_third_time(world):
  """A network that computes itself again (remat) costs no more in microbatches."""

  def products(unet, microbatch):
    method = world.make_method("lpo", unet=unet, microbatch=microbatch)
    arguments = world.make_params(0), world.make_params(1), world.make_batch()
    gradient = jax.grad(lambda *x: step.loss_and_metrics(method, *x)[0])
    return count_products(jax.make_jaxpr(gradient)(*arguments).jaxpr)

  again = jax.checkpoint(world.unet)
  assert products(again, 4) == products(again, 0)
  # One that does not is computed twice, once for every microbatch.
  assert products(world.unet, 4) >= products(world.unet, 0)


def permuted(batch, order):
  """The same images in other slots: slot s holds what order[s] held."""
  place = np.argsort(order)
  moved = jax.tree.map(
    lambda x: x[order],
    (batch.moments, batch.conditioning, batch.identity, batch.item),
  )
  return dataclasses.replace(
    batch,
    moments=moved[0],
    conditioning=moved[1],
    identity=moved[2],
    item=moved[3],
    slot=place[batch.slot].astype(np.int32),
  )


@pytest.mark.parametrize("microbatch", [0, 4])
def test_slots_may_be_permuted(world, value_and_grad, whole, microbatch):
  order = np.random.default_rng(0).permutation(12)
  loss, metrics, gradient = value_and_grad(
    "lpo", permuted(world.make_batch(), order), microbatch=microbatch
  )
  expected_loss, expected_metrics, expected_gradient = whole("lpo")
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  assert_trees_close(gradient, expected_gradient, 2e-6)
  np.testing.assert_allclose(metrics["margin"], expected_metrics["margin"], rtol=1e-5)


def test_the_reference_gets_no_gradient(world):
  method = world.make_method("lpo")
  gradient = jax.grad(
    lambda r: step.loss_and_metrics(
      method, world.make_params(0), r, world.make_batch()
    )[0]
  )(world.make_params(1))
  assert not any(x.any() for x in jax.tree.leaves(gradient))


@pytest.fixture(scope="module")
def three_updates(world):
  """A run with everything on: warm-up, decay and freezing by name, clip, EMA."""
  run = world.Run(
    ema_decay=0.9,
    warmup_steps=4,
    clip_norm=0.05,
    decay_rules=[("bias|scale", False), (".*", True)],
    trainable_rules=[("^text", False), (".*", True)],
    options={"weight_decay": 0.1},
  )
  history = [(run.params, None, None, None)]
  for epoch in range(3):
    metrics = run(world.make_batch(epoch))
    ema = jax.tree.map(np.array, run.state.ema)
    history.append((run.params, ema, metrics, int(run.state.step)))
  return run, history


def test_step_counts_completed_updates(three_updates):
  _, history = three_updates
  assert [count for *_, count in history[1:]] == [1, 2, 3]


def test_frozen_parameters_keep_every_bit_and_have_no_slots(three_updates):
  run, history = three_updates
  first, last = history[0][0], history[-1][0]
  assert bytes_of(first["text"]) == bytes_of(last["text"])
  assert all(
    (a != b).all() for a, b in zip(*map(jax.tree.leaves, (first["out"], last["out"])))
  )
  slots = [n for n in trees.named_leaves(run.state.opt_state) if ".mu." in n]
  assert sorted(n.partition(".mu.")[2] for n in slots) == [
    "out.bias",
    "out.kernel",
    "time.scale",
  ]


def test_ema_is_the_running_mean(three_updates):
  _, history = three_updates
  ema = jax.tree.map(lambda x: x.astype(np.float64), history[0][0])
  for params, after, *_ in history[1:]:
    ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, params)
    assert_trees_close(after, ema, 1e-6)


def test_metrics_of_an_update(three_updates):
  _, history = three_updates
  for before, after in itertools.pairwise(history):
    metrics = after[2]
    grouped = {name for name in metrics if "/" in name}
    assert len(grouped) == 5 * (4 + 3)
    assert set(metrics) - grouped == {
      "loss",
      "implicit_acc",
      "margin",
      "winner_gain",
      "loser_gain",
      "drift",
      "err",
      "ref_err",
      "margin_p10",
      "margin_p50",
      "margin_p90",
      "grad_norm",
      "grad_norm_clipped",
      "update_norm",
    }
    moved = jax.tree.map(lambda a, b: a - b, after[0], before[0])
    norm = np.sqrt(
      sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(moved))
    )
    np.testing.assert_allclose(metrics["update_norm"], norm, rtol=1e-4)


def test_a_step_of_adamw_by_hand(world, whole, three_updates):
  """lr / warm-up on the first update, decay by name, clipped moments."""
  _, history = three_updates
  batch_loss, _, gradient = whole("lpo")
  first, after, metrics = history[0][0], history[1][0], history[1][2]
  np.testing.assert_allclose(metrics["loss"], batch_loss, rtol=1e-6)
  flat = trees.named_leaves(gradient)

  def norm(names):
    return np.sqrt(sum((flat[n].astype(np.float64) ** 2).sum() for n in names))

  np.testing.assert_allclose(metrics["grad_norm"], norm(flat), rtol=1e-5)
  trained = [n for n in flat if not n.startswith("text")]
  clip = 0.05 / norm(trained)  # what is frozen does not use up the norm
  assert clip < 1
  for name in trained:
    g = clip * flat[name]
    p, q = (trees.named_leaves(t)[name] for t in (first, after))
    decay = 0.1 * p if name.endswith("kernel") else 0.0
    # The first moments are g and g^2 once their bias is corrected.
    expected = p - 0.01 / 4 * (g / (np.abs(g) + 1e-8) + decay)
    np.testing.assert_allclose(q, expected, rtol=0, atol=2e-7)


def silent(batch):
  """No list has a weight: the gradient is exactly 0."""
  weight = np.zeros_like(batch.ranking.weight)
  return dataclasses.replace(
    batch, ranking=dataclasses.replace(batch.ranking, weight=weight)
  )


@pytest.mark.parametrize("name", list(optimizer.OPTIMIZERS))
def test_decay_is_the_learning_rate_times_the_rate(world, name):
  run = world.Run(
    optimizer_name=name,
    learning_rate=0.5,
    decay_rules=[("bias|scale", False), (".*", True)],
    options={"weight_decay": 0.02},
  )
  before = run.params
  metrics = run(silent(world.make_batch()))
  assert metrics["loss"] == metrics["grad_norm"] == 0.0
  for path, p in trees.named_leaves(before).items():
    q = trees.named_leaves(run.params)[path]
    factor = 1 - 0.5 * 0.02 if path.endswith("kernel") else 1.0
    np.testing.assert_allclose(q, factor * p, rtol=1e-6)


def test_warm_up_rises_and_stays():
  rate = optimizer.learning_rate_schedule(8.0, 4)
  np.testing.assert_allclose([rate(k) for k in range(6)], [2, 4, 6, 8, 8, 8], rtol=1e-6)
  for steps in (0, 1):
    rate = optimizer.learning_rate_schedule(8.0, steps)
    assert [float(rate(k)) for k in range(3)] == [8.0] * 3


def test_adafactors_first_update_by_hand():
  """No scaling by the parameter, and the rate as it is: lr g / rms, clipped at 1."""
  params = {"kernel": np.full((2, 3), 5.0, np.float32)}
  tx = optimizer.build("adafactor", params, learning_rate=0.1, clip_norm=None)
  gradient = {"kernel": np.float32([[1, -2, 3], [-4, 5, -6]])}
  updates, _ = tx.update(gradient, tx.init(params), params)
  np.testing.assert_allclose(
    updates["kernel"], -0.1 * np.sign(gradient["kernel"]), rtol=1e-5
  )


@pytest.mark.parametrize(
  ("clip_norm", "kept"),
  [(1.0, 0.2), (4.0, 0.8), (5.0, 1.0), (9.0, 1.0), (None, 1.0), (0, 1.0), (0.0, 1.0)],
)
def test_what_is_trained_is_clipped_before_the_optimizer_sees_it(clip_norm, kept):
  params = {"kernel": np.zeros(2, np.float32), "frozen": np.zeros(2, np.float32)}
  tx = optimizer.build(
    "adamw",
    params,
    learning_rate=0.1,
    clip_norm=clip_norm,
    trainable_rules=[("frozen", False), (".*", True)],
  )
  gradient = {"kernel": np.float32([3, -4]), "frozen": np.float32([100, 100])}
  updates, slots = tx.update(gradient, tx.init(params), params)
  mu = next(x for n, x in trees.named_leaves(slots).items() if n.endswith("mu.kernel"))
  np.testing.assert_allclose(mu, 0.1 * kept * gradient["kernel"], rtol=1e-5)
  assert not updates["frozen"].any()


def broken(batch):
  moments = batch.moments.copy()
  moments[3, 0, 0, 0] = np.nan
  return dataclasses.replace(batch, moments=moments)


def test_skip_drops_a_bad_update_and_goes_on_as_if_it_had_not_been(world):
  run = world.Run(ema_decay=0.5, on_nonfinite="skip", warmup_steps=3)
  run(world.make_batch(0))
  before, ema = bytes_of(run.state.params), run.params
  ema = jax.tree.map(
    lambda e, p: 0.5 * (e + p), jax.tree.map(np.array, run.state.ema), ema
  )
  for _ in range(12):  # optax alone would give in at the eleventh
    metrics = run(broken(world.make_batch(1)))
    assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert metrics["update_norm"] == 0.0
    assert bytes_of(run.state.params) == before
  assert int(run.state.step) == 13
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.state.ema))
  run(world.make_batch(2))

  straight = world.Run(ema_decay=0.5, on_nonfinite="skip", warmup_steps=3)
  straight(world.make_batch(0))
  straight(world.make_batch(2))
  assert bytes_of(run.state.params) == bytes_of(straight.state.params)


def test_stop_leaves_a_bad_update_to_the_report(world):
  run = world.Run()
  metrics = run(broken(world.make_batch()))
  assert not np.isfinite(metrics["loss"])
  assert np.isnan(run.params["out"]["kernel"]).any()


def test_the_state_is_donated_and_the_reference_is_not(world):
  run = world.Run()
  state, ref_params = run.state, run.ref_params
  reference = bytes_of(ref_params)
  run()
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert bytes_of(ref_params) == reference
  run()
  assert int(run.state.step) == 2


def test_sft_needs_no_reference(world, whole):
  run = world.Run(method=world.make_method("sft"))
  assert run.ref_params is None
  metrics = run()
  assert set(metrics) == {"loss", "grad_norm", "grad_norm_clipped", "update_norm"}
  np.testing.assert_allclose(metrics["loss"], whole("sft")[0], rtol=1e-6)


def test_same_seed_same_bits_other_seed_other_loss(world):
  losses = []
  for seed in (3, 3, 4):
    run = world.Run(method=world.make_method(seed=seed))
    losses.append((run()["loss"], bytes_of(run.state.params)))
  assert losses[0] == losses[1]
  assert losses[0][0] != losses[2][0]


class Devices:
  """A mesh, as far as its size matters."""

  def __init__(self, size):
    self.size = size


def test_seed_and_beta_are_inputs_of_the_compiled_step(world):
  """One program for all of them, with the numbers of a step that has them inside."""

  def method_of(seed, beta):
    objective = world.objectives.get("lpo", beta=beta)
    return dataclasses.replace(world.make_method(seed=seed), objective=objective)

  programs, losses = set(), []
  for seed, beta in ((3, 30.0), (4, 30.0), (3, 7.0)):
    method = method_of(seed, beta)
    run = world.Run(method=method)
    arguments = (run.mesh, run.state, run.ref_params, run.place(world.make_batch()))
    traced = step.trace_train_step(
      *arguments, method=method, optimizer=run.optimizer, ema_decay=0.0
    )
    programs.add(traced.lower().as_text())
    losses.append(run()["loss"])
    inside, _ = jax.jit(functools.partial(step.loss_and_metrics, method))(
      world.make_params(0), world.make_params(1), world.make_batch()
    )
    np.testing.assert_allclose(losses[-1], inside, rtol=1e-6)
  assert len(programs) == 1 and len(set(losses)) == 3


@pytest.mark.parametrize("seed", [0, 7, -1, 2**31 + 5, 2**32 + 7])
def test_a_seed_draws_the_same_as_an_input(world, seed):
  inputs = world.make_method(seed=seed).inputs
  traced = jax.jit(lambda seed: jax.random.key_data(jax.random.key(seed)))(inputs.seed)
  np.testing.assert_array_equal(traced, jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize(
  ("images", "microbatch", "words"),
  [
    (12, 0, "train.images_per_update=12 does not divide over 8 .* that does is 8"),
    (5, 0, "does not divide over 8 devices; the nearest that does is 8"),
    (64, 24, "train.microbatch=24: expected a divisor of train.images_per_update=64"),
    (64, 4, "multiple of the 8 device"),
  ],
)
def test_batch_arithmetic_is_refused_with_numbers(images, microbatch, words):
  with pytest.raises(UserError, match=words):
    step.check_batch_arithmetic(Devices(8), images, microbatch)


@pytest.mark.parametrize(("images", "microbatch"), [(64, 0), (64, 64), (64, 8)])
def test_batch_arithmetic_that_works(images, microbatch):
  step.check_batch_arithmetic(Devices(8), images, microbatch)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"name": "adamW2"}, "unknown optimizer 'adamW2'; did you mean 'adamw'"),
    ({"options": {"weight_decya": 1}}, "did you mean 'weight_decay'"),
    ({"on_nonfinite": "skp"}, "unknown on_nonfinite 'skp'; did you mean 'skip'"),
    ({"trainable_rules": [(".*", False)]}, "freezes every parameter"),
    ({"trainable_rules": [("out", True)]}, "no trainable rule matches parameter 'text"),
    ({"decay_rules": [("out", True)]}, "no weight decay rule matches parameter 'text"),
  ],
)
def test_optimizers_that_cannot_be_are_refused(world, options, words):
  with pytest.raises(UserError, match=words):
    optimizer.build(
      **{
        "name": "adamw",
        "params": world.make_params(),
        "learning_rate": 1.0,
        **options,
      }
    )


EIGHT = """
  import json, runpy
  import jax, numpy as np
  from lpo_jax import parallel, trees
  parallel.SMALLEST_SHARDED = 1
  world = runpy.run_path("tests/training/conftest.py")
  ranks = [[0, 1, 2, 3, 4], [2, 0, 1, 1, 0], [0, 1, 1, 0, 0], [3, 1, 0, 2, 0]]
  batch = world["make_batch"](0, lists=[5, 4, 3, 4], ranks=ranks)
  out = {}
  for name, mesh, microbatch in (
    ("one", parallel.make_mesh(devices=jax.devices()[:1]), 0),
    ("eight", parallel.make_mesh(4, 2), 8),
  ):
    method = world["make_method"](microbatch=microbatch)
    run = world["Run"](mesh=mesh, method=method, batch=batch, options={"eps": 1e-3})
    metrics = [run(batch), run(batch)]
    start = world["Run"](mesh=mesh, method=method, batch=batch,
                         ref_params=world["make_params"](0))(batch)
    out[name] = {
      "metrics": metrics,
      "params": {n: x.tolist() for n, x in trees.named_leaves(run.params).items()},
      "start": [start["margin"], start["drift"], start["winner_gain"]],
      "split": not run.state.params["out"]["kernel"].is_fully_replicated,
    }
  print(json.dumps(out))
"""


EVERY = """
  import json, runpy
  import jax
  from lpo_jax import parallel, trees
  parallel.SMALLEST_SHARDED = 1
  world = runpy.run_path("tests/training/conftest.py")
  ranks = [[0, 1, 2, 3, 4], [2, 0, 1, 1, 0], [0, 1, 1, 0, 0], [3, 1, 0, 2, 0]]
  batch = world["make_batch"](0, lists=[5, 4, 3, 4], ranks=ranks)
  out = []
  for mesh, microbatch in (
    (parallel.make_mesh(devices=jax.devices()[:1]), 0),
    (parallel.make_mesh(2, 4), 0),
    (parallel.make_mesh(4, 2), 8),
  ):
    params = [world["make_params"](seed) for seed in (0, 1)]
    params = [parallel.put(p, parallel.param_shardings(p, mesh)) for p in params]
    losses, gradients = world["every_objective"](microbatch)(
      *params, parallel.global_batch(mesh, batch))
    named = trees.named_leaves(gradients)
    out.append([losses.tolist(), {n: x.tolist() for n, x in named.items()}])
  print(json.dumps(out))
"""


def assert_all_objectives_equal(a, b):
  """Losses and gradients, each relative to the objective's own largest value."""
  np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
  for name, x in b[1].items():
    x, y = np.asarray(x), np.asarray(a[1][name])
    axes = tuple(range(1, x.ndim))
    error = np.abs(y - x).max(axes) / np.abs(x).max(axes)
    assert error.max() <= 1e-5, dict(zip(OBJECTIVES, error))


def test_every_objective_is_the_same_on_eight_devices(on_devices):
  one, *others = json.loads(on_devices(8, EVERY))
  assert len(one[0]) == len(OBJECTIVES)
  for other in others:
    assert_all_objectives_equal(other, one)


def test_every_objective_is_the_same_under_accumulation(world):
  arguments = world.make_params(0), world.make_params(1), world.make_batch()
  one, *others = [
    [losses, trees.named_leaves(gradients)]
    for losses, gradients in (world.every_objective(m)(*arguments) for m in (0, 4))
  ]
  for other in others:
    assert_all_objectives_equal(other, one)


def test_eight_devices_are_one(on_devices):
  out = json.loads(on_devices(8, EIGHT))
  one = out.pop("one")
  for name, run in out.items():
    assert run["split"], name
    for a, b in zip(run["metrics"], one["metrics"], strict=True):
      assert a.keys() == b.keys()
      for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=2e-5, err_msg=f"{name} {key}")
    for key, value in run["params"].items():
      np.testing.assert_allclose(value, one["params"][key], rtol=0, atol=2e-6)
    # Policy = reference: nothing has moved, on any mesh.
    assert run["start"] == one["start"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
  "options",
  [{}, {"optimizer_name": "adafactor", "options": {"momentum": 0.9}}],
  ids=["adamw", "adafactor"],
)
def test_the_scale_of_a_rollback_is_the_learning_rates(world, options):
  """Half the scale is half the rate, decay and clipping included, to the bit."""
  lowered, half = world.Run(learning_rate=0.02, **options), world.Run(**options)
  assert lowered.state.lr_scale == 1
  lowered.state = dataclasses.replace(
    lowered.state,
    lr_scale=jax.device_put(np.float32(0.5), lowered.state.lr_scale.sharding),
  )
  for epoch in range(3):
    batch = world.make_batch(epoch)
    assert lowered(batch)["update_norm"] == half(batch)["update_norm"] > 0
  assert lowered.state.lr_scale == 0.5
  for name, x in trees.named_leaves(lowered.params).items():
    np.testing.assert_array_equal(x, trees.named_leaves(half.params)[name], name)


def test_capped_rewards_have_no_gradient():
  """Beyond a share of the reference's error, 2.0 here; within it nothing changes."""
  err = jnp.asarray([1.0, 1.6, 1.9, 2.4, 3.0])
  scalars = Denoising(err=err, ref_err=jnp.full(5, 2.0), drift=jnp.ones(5))

  def rewards(err, cap):
    return step.capped(dataclasses.replace(scalars, err=err), cap).err

  for cap, expected, moves in (
    (0.3, [1.4, 1.6, 1.9, 2.4, 2.6], [0, 1, 1, 1, 0]),
    (np.inf, err, [1, 1, 1, 1, 1]),
  ):
    y, pull = jax.vjp(lambda err: rewards(err, np.float32(cap)), err)  # noqa: B023
    np.testing.assert_allclose(y, expected, rtol=1e-7)
    np.testing.assert_array_equal(pull(jnp.ones(5))[0], moves)
  # An objective without a reference has errors of 0 there.
  none = dataclasses.replace(scalars, ref_err=jnp.zeros(5))
  np.testing.assert_array_equal(step.capped(none, np.float32(np.inf)).err, err)
