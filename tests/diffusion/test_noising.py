"""Randomness by identity: who a slot is decides its draws, never where it sits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.diffusion import noising, schedule
from lpo_jax.errors import UserError
from lpo_jax.types import Batch, Conditioning, Ranking

TABLES = schedule.from_config(
  {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
SCALE = 0.18215
LISTS = [3, 2, 4, 1]  # images of each list
SLOTS = sum(LISTS)
LIST_OF_SLOT = np.repeat(np.arange(len(LISTS)), LISTS)


def make_batch(*, keys=(11, 4000000000, 7, 0), epoch=0, size=4, seed=0):
  """Lists one after the other, with moments of their own."""
  rng = np.random.default_rng(seed)
  moments = rng.standard_normal((SLOTS, size, size, 8)).astype(np.float32)
  empty = np.zeros((1, 1))
  return Batch(
    moments=moments,
    conditioning=Conditioning(np.zeros((SLOTS, 1, 1), np.float32)),
    identity=np.stack(
      [np.asarray(keys, np.uint32)[LIST_OF_SLOT], np.full(SLOTS, epoch, np.uint32)], 1
    ),
    item=np.concatenate([np.arange(n) for n in LISTS]).astype(np.uint32),
    slot=empty.astype(np.int32),
    ranking=Ranking(empty, empty, empty, np.zeros(1)),
  )


def take(batch, rows):
  """The same images in other slots."""
  return dataclasses.replace(
    batch,
    moments=batch.moments[rows],
    identity=batch.identity[rows],
    item=batch.item[rows],
  )


@functools.cache
def compiled(**options):
  bound = functools.partial(noising.get("forward", **options), scaling_factor=SCALE)
  return jax.jit(lambda batch, seed: bound(batch, TABLES, seed))


def run(batch, seed=0, **options):
  return jax.tree.map(np.asarray, compiled(**options)(batch, seed))


def parts(batch, noised):
  """Solves x_t = a x_0 + s eps for x_0; eps is the target."""
  a, s = TABLES.coefficients(noised.timesteps, 4)
  return np.asarray((noised.noisy_latents - s * noised.target) / a), noised.target


def same_within_lists(x):
  return all(np.array_equal(x[i], x[j]) for i in range(SLOTS) for j in pairs_with(i))


def pairs_with(i):
  return [j for j in range(SLOTS) if LIST_OF_SLOT[j] == LIST_OF_SLOT[i]]


def all_different(x):
  return len({row.tobytes() for row in np.ascontiguousarray(x)}) == len(x)


def first_of_lists():
  return np.cumsum([0, *LISTS[:-1]])


def test_a_list_shares_timestep_and_noise_but_not_the_posterior_sample():
  batch = make_batch()
  # Equal moments: what differs in x_0 is the posterior's draw.
  batch = dataclasses.replace(batch, moments=np.ones_like(batch.moments))
  noised = run(batch)
  latents, noise = parts(batch, noised)
  assert same_within_lists(noise)
  assert same_within_lists(noised.timesteps)
  assert all_different(noised.noisy_latents)
  for i in range(SLOTS):
    for j in range(i):
      assert np.abs(latents[i] - latents[j]).max() > 0.01
  assert all_different(noise[first_of_lists()])
  assert len(set(noised.timesteps[first_of_lists()].tolist())) == len(LISTS)


def test_the_posterior_noise_is_not_the_forward_noise():
  batch = make_batch()
  batch = dataclasses.replace(batch, moments=np.zeros_like(batch.moments))
  latents, noise = parts(batch, run(batch))
  flat = np.corrcoef((latents / SCALE).ravel(), noise.ravel())[0, 1]
  assert abs(flat) < 0.15  # 640 numbers: a deviation is 0.04


def test_slots_may_be_permuted():
  batch, rows = make_batch(), np.random.default_rng(1).permutation(SLOTS)
  before, after = run(batch), run(take(batch, rows))
  for name in ("noisy_latents", "timesteps", "target"):
    np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[rows])


def test_packing_does_not_matter():
  batch = make_batch()
  whole = run(batch)
  for rows in (np.arange(3), np.asarray([8, 2, 5])):  # other lists, other sizes
    part = run(take(batch, rows))
    np.testing.assert_array_equal(part.timesteps, whole.timesteps[rows])
    np.testing.assert_array_equal(part.target, whole.target[rows])
    # Another shape is another program: sums may be contracted differently.
    np.testing.assert_allclose(
      part.noisy_latents, whole.noisy_latents[rows], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("change", ["seed", "epoch", "keys"])
def test_everything_changes_with(change):
  batch = make_batch()
  before = run(batch)
  after = {
    "seed": lambda: run(batch, seed=1),
    "epoch": lambda: run(make_batch(epoch=1)),
    "keys": lambda: run(make_batch(keys=(12, 13, 14, 15))),
  }[change]()
  old_latents, old_noise = parts(batch, before)
  new_latents, new_noise = parts(batch, after)
  firsts = first_of_lists()
  for old, new in ((old_latents, new_latents), (old_noise, new_noise)):
    assert (np.abs(new - old).reshape(SLOTS, -1).max(1) > 0.01).all()
  assert (before.timesteps[firsts] != after.timesteps[firsts]).any()


def test_list_key_and_epoch_do_not_mix():
  """(1, 2) and (2, 1) are different, and so is a key that differs in its high bits."""
  keys = noising.identity_keys(
    0,
    "noise",
    jnp.asarray([[1, 2], [2, 1], [3, 0], [0, 3], [2**31 + 1, 2]], jnp.uint32),
  )
  assert all_different(np.asarray(jax.random.key_data(keys)))


def test_purposes_never_share_a_stream():
  identity, item = jnp.asarray([[5, 0]], jnp.uint32), jnp.asarray([0], jnp.uint32)
  keys = [
    np.asarray(jax.random.key_data(noising.identity_keys(0, purpose, identity, who)))
    for purpose in noising.PURPOSES
    for who in (None, item)
  ]
  assert all_different(np.concatenate(keys))
  assert len(set(noising.PURPOSES.values())) == len(noising.PURPOSES)


def test_streams_are_part_of_every_runs_identity():
  """The numbers themselves: if they change, old runs cannot be resumed."""
  identity = jnp.asarray([[11, 3]], jnp.uint32)
  by_hand = jax.random.key(9)
  for word in (2, 11, 3, 1):  # purpose, list, epoch, item
    by_hand = jax.random.fold_in(by_hand, word)
  ours = noising.identity_keys(9, "posterior", identity, jnp.asarray([1], jnp.uint32))
  np.testing.assert_array_equal(
    jax.random.key_data(ours)[0], jax.random.key_data(by_hand)
  )
  assert noising.PURPOSES == {
    "timestep": 0,
    "noise": 1,
    "posterior": 2,
    "sample": 3,
    "sampler": 4,
    "rollout": 5,
    "shift": 6,
    "replay": 7,
  }


def test_independent_noise_is_per_image_and_the_timestep_is_not():
  batch = make_batch()
  shared, own = run(batch), run(batch, independent_noise=True)
  assert all_different(own.target)
  np.testing.assert_array_equal(own.timesteps, shared.timesteps)
  np.testing.assert_allclose(
    parts(batch, own)[0], parts(batch, shared)[0], rtol=0, atol=2e-5
  )


def test_noisy_latents_are_the_schedules():
  batch = make_batch()
  noised = run(batch)
  latents, noise = parts(batch, noised)
  mean, logvar = np.split(batch.moments, 2, axis=-1)
  # x_0 is within the posterior: its standard score is the draw.
  score = (latents / SCALE - mean) / np.exp(logvar / 2)
  assert 0.8 < score.std() < 1.2 and abs(score.mean()) < 0.2
  again = TABLES.add_noise(jnp.asarray(latents), jnp.asarray(noise), noised.timesteps)
  np.testing.assert_allclose(again, noised.noisy_latents, rtol=0, atol=1e-5)


def test_v_prediction_changes_the_target_alone():
  batch = make_batch()
  velocity = dataclasses.replace(TABLES, prediction_type="v_prediction")
  forward = functools.partial(noising.get("forward"), scaling_factor=SCALE)
  epsilon = forward(batch, TABLES, 0)
  other = forward(batch, velocity, 0)
  np.testing.assert_array_equal(epsilon.noisy_latents, other.noisy_latents)
  latents, noise = parts(batch, jax.tree.map(np.asarray, epsilon))
  expected = velocity.target(jnp.asarray(latents), jnp.asarray(noise), other.timesteps)
  np.testing.assert_allclose(other.target, expected, rtol=0, atol=1e-5)


def many(count, **moments):
  """A batch of `count` lists of one small image with constant mean and log-variance."""
  mean = np.full((count, 4, 4, 4), moments["mean"], np.float32)
  logvar = np.full((count, 4, 4, 4), moments["logvar"], np.float32)
  empty = np.zeros((1, 1))
  return Batch(
    moments=np.concatenate([mean, logvar], -1),
    conditioning=Conditioning(np.zeros((count, 1, 1), np.float32)),
    identity=np.stack([np.arange(count), np.zeros(count)], 1).astype(np.uint32),
    item=np.zeros(count, np.uint32),
    slot=empty.astype(np.int32),
    ranking=Ranking(empty, empty, empty, np.zeros(1)),
  )


def test_posterior_has_its_mean_and_variance_and_timesteps_are_uniform():
  count, mean, logvar = 2048, 1.5, -0.8
  batch = many(count, mean=mean, logvar=logvar)
  noised = run(batch, max_timestep=700, min_timestep=100)
  latents, noise = parts(batch, noised)
  # 131072 numbers: deviations of the estimates are 0.28 % of the spread, 0.4 % of
  # the variance.
  spread = SCALE * np.exp(logvar / 2)
  assert abs(latents.mean() - SCALE * mean) < 5 * spread / 362
  assert abs(latents.var() / spread**2 - 1) < 0.02
  assert abs(noise.mean()) < 0.014 and abs(noise.var() - 1) < 0.02
  t = noised.timesteps
  assert t.min() >= 100 and t.max() < 700 and t.min() < 110 and t.max() > 690
  counts = np.histogram(t, bins=6, range=(100, 700))[0]
  # Chi square with 5 degrees of freedom: above 20.5 once in a thousand seeds.
  assert ((counts - count / 6) ** 2 / (count / 6)).sum() < 20.5


def test_sample_posterior_by_hand():
  moments = jnp.asarray([2.0, -1.0, 2 * np.log(3.0), -100.0]).reshape(1, 1, 1, 4)
  noise = jnp.asarray([0.5, 4.0]).reshape(1, 1, 1, 2)
  out = noising.sample_posterior(moments, noise, 0.5).ravel()
  # The log-variance is clipped at -30, as in diffusers.
  expected = [0.5 * (2 + 3 * 0.5), 0.5 * (-1 + np.exp(-15.0) * 4)]
  np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_posterior_is_fp32_whatever_the_cache_holds():
  moments = jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 2).astype(jnp.bfloat16)
  noise = jnp.full((1, 1, 1, 1), 1e-4, jnp.float32)
  out = noising.sample_posterior(moments, noise, 1.0)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out.ravel(), [1.0001], rtol=1e-7)


@pytest.mark.parametrize("low", [0, 999])
def test_a_range_of_one_timestep(low):
  noised = run(make_batch(), min_timestep=low, max_timestep=low + 1)
  assert set(noised.timesteps.tolist()) == {low}


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("foward", {}, "unknown noising 'foward'; did you mean 'forward'"),
    ("forward", {"min_timesteps": 3}, "did you mean 'min_timestep'"),
    ("forward", {"min_timestep": -1}, "min_timestep=-1"),
    ("forward", {"min_timestep": 5, "max_timestep": 5}, "0 <= min_timestep < max"),
    ("forward", {"max_timestep": 0}, "max_timestep=0"),
  ],
)
def test_bad_options_are_refused(name, options, words):
  with pytest.raises(UserError, match=words):
    noising.get(name, **options)


@pytest.mark.parametrize(
  "options", [{"min_timestep": 1000}, {"max_timestep": 1001}, {"min_timestep": 5000}]
)
def test_timesteps_outside_of_the_schedule_are_refused(options):
  bound = noising.get("forward", **options)
  with pytest.raises(UserError, match=r"max_timestep <= 1000, the schedule's length"):
    bound(make_batch(), TABLES, 0, scaling_factor=SCALE)
