"""Rollouts, the replay buffer, and the lists [expert, policy_sample] made of them.

Also run by path (`runpy`) in a process with several devices.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import parallel
from lpo_jax.diffusion import noising
from lpo_jax.errors import UserError
from lpo_jax.training import online, step
from lpo_jax.types import Ranking

EXPERTS = 4  # trajectories drawn before each update
STEPS = 5


def make_experts(world, epoch=0, rows=EXPERTS):
  """Lists of one image, as the data gives them."""
  batch = world.make_batch(seed=epoch, lists=(1,) * rows, ranks=((0,),) * rows)
  weight = np.arange(1, rows + 1, dtype=np.float32)
  ranking = batch.ranking
  ranking = Ranking(ranking.rank, ranking.valid, ranking.score, weight)
  identity = np.stack([np.arange(rows) + 100, np.full(rows, epoch)], 1)
  return world_replace(batch, ranking=ranking, identity=identity.astype(np.uint32))


def world_replace(batch, **fields):
  return type(batch)(**{**vars(batch), **fields})


def method(world, **fields):
  return world.make_method("dro", noising=noising.get("trajectory"), **fields)


class Feed:
  """Gives epoch after epoch, and remembers how many were taken."""

  def __init__(self, world, mesh, rows=EXPERTS):
    self.world, self.mesh, self.rows, self.taken = world, mesh, rows, 0

  def __call__(self):
    self.taken += 1
    batch = make_experts(self.world, self.taken - 1, self.rows)
    return parallel.global_batch(self.mesh, batch)


def make_online(
  world, *, mesh=None, images=2 * EXPERTS, rows=EXPERTS, chosen=None, **options
):
  mesh = mesh or parallel.make_mesh(devices=jax.devices()[:1])
  feed = Feed(world, mesh, rows)
  params = place(world, mesh, 0)
  experts = make_experts(world, rows=rows)
  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experts)
  made = online.Online(
    online.settings(images, **{"steps": STEPS, **options}),
    method=chosen or method(world),
    mesh=mesh,
    params=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    ),
    frozen=place(world, mesh, 1),
    experts=spec,
    more=feed,
  )
  return made, feed


def place(world, mesh, seed):
  params = world.make_params(seed)
  return parallel.put(params, parallel.param_shardings(params, mesh))


@pytest.fixture(scope="module")
def first(world):
  """One update of a fresh policy with the published buffer."""
  made, feed = make_online(world)
  batch = made.complete(feed(), place(world, made._mesh, 0), 0)
  return made, jax.tree.map(np.asarray, batch)


def test_lists_are_an_expert_and_the_policys_sample(first):
  made, batch = first
  assert batch.slot.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert batch.ranking.rank.tolist() == [[0, 1]] * EXPERTS
  assert batch.ranking.valid.all()
  assert batch.ranking.weight.tolist() == [1, 2, 3, 4]
  assert batch.item.tolist() == [0, 1] * EXPERTS
  assert batch.trajectory.stored.tolist() == [False, True] * EXPERTS
  expert, sample = slice(0, None, 2), slice(1, None, 2)
  for rows in (batch.trajectory.timesteps, batch.identity, batch.moments):
    np.testing.assert_array_equal(rows[expert], rows[sample])
  np.testing.assert_array_equal(
    batch.conditioning.prompt_embeds[expert], batch.conditioning.prompt_embeds[sample]
  )
  assert made.metrics["rollout_seconds"] == made.seconds > 0


def test_the_sample_is_a_step_of_the_trajectory_that_the_policy_took(world, first):
  """And what is stored there is the policy's own answer, to the bit of one program."""
  made, batch = first
  path = made.saved["buffer"].path
  for row in range(EXPERTS):
    told = np.asarray(path.timesteps[0, row])
    (at,) = np.flatnonzero(told == batch.trajectory.timesteps[2 * row])
    for name, of in (("noisy_latents", "noisy_latents"), ("target", "outputs")):
      np.testing.assert_array_equal(
        getattr(batch.trajectory, name)[2 * row + 1], getattr(path, of)[0, row, at]
      )
  rows = slice(1, None, 2)
  answer = world.unet(
    world.make_params(0),
    batch.trajectory.noisy_latents[rows],
    batch.trajectory.timesteps[rows],
    batch.conditioning.prompt_embeds[rows],
  )
  np.testing.assert_allclose(answer, batch.trajectory.target[rows], atol=1e-5)


@pytest.fixture(scope="module")
def noised(world, first):
  _, batch = first
  noise = jax.jit(lambda b: noising.trajectory(b, world.TABLES, 3, scaling_factor=0.5))
  return jax.tree.map(np.asarray, noise(batch))


def test_the_step_before_anything_is_learnt(world, first, noised):
  """With policy = reference: d_E = d_P = 0, and the loss is the margin."""
  _, batch = first
  ours = method(world)
  params = world.make_params(0)
  loss, metrics = jax.jit(
    lambda p, r, b: step.loss_and_metrics(ours, p, r, b),
    compiler_options=step.COMPILER_OPTIONS,
  )(params, params, batch)
  assert float(loss) == pytest.approx(0.001, rel=1e-6)
  assert float(metrics["margin"]) == 0.0
  by_hand = jnp.mean(
    jnp.square(
      world.unet(
        params,
        noised.noisy_latents,
        noised.timesteps,
        batch.conditioning.prompt_embeds,
      )
      - noised.target
    ),
    axis=(1, 2, 3),
  )
  # The policy meets its own answer; the expert's noise it does not know.
  assert float(by_hand[1::2].max()) < 1e-9 < float(by_hand[0::2].min())


def test_experts_are_noised_to_the_samples_timestep(world, first, noised):
  _, batch = first
  np.testing.assert_array_equal(noised.timesteps, batch.trajectory.timesteps)
  stored = batch.trajectory.stored
  np.testing.assert_array_equal(
    noised.noisy_latents[stored], batch.trajectory.noisy_latents[stored]
  )
  np.testing.assert_array_equal(noised.target[stored], batch.trajectory.target[stored])
  # x_t = a x_0 + s eps with an x_0 of the expert's posterior, a third of it far away.
  a, s = world.TABLES.coefficients(noised.timesteps[~stored], 4)
  clean = (noised.noisy_latents[~stored] - s * noised.target[~stored]) / a
  mean, logvar = np.split(batch.moments[~stored], 2, axis=-1)
  score = (np.asarray(clean) / 0.5 - mean) / np.exp(logvar / 2)
  assert np.abs(score).max() < 5 and 0.5 < score.std() < 1.5
  assert 0.5 < np.asarray(noised.target[~stored]).std() < 1.5


def test_every_timestep_is_met_equally_often(world):
  """Steps of a trajectory x shifts of the grid: uniform on 0 to 999."""
  ours = method(world)
  shape = (4000,)
  identity = np.stack([np.arange(4000), np.zeros(4000)], 1).astype(np.uint32)
  experts = world_replace(
    make_experts(world, rows=shape[0]),
    identity=identity,
    moments=np.zeros((4000, 1, 1, 8), np.float32),
  )
  told = jax.jit(
    lambda: online.roll_out(ours, world.make_params(0), None, experts, 20).timesteps
  )()
  counts = np.bincount(np.asarray(told).ravel(), minlength=1000)
  assert len(counts) == 1000 and counts.min() > 0
  # 80 of each; within a class of shifts all 20 timesteps are met together.
  assert np.all(counts.reshape(20, 50) == counts[:50])
  assert counts.std() < 3 * np.sqrt(80)
  assert np.all(np.diff(told, axis=1) == -50)


def test_microbatches_of_rollouts_are_the_same_rollouts(world, first):
  made, _ = make_online(world, chosen=method(world, microbatch=2))
  made.complete(Feed(world, made._mesh)(), place(world, made._mesh, 0), 0)
  for ours, whole in zip(
    jax.tree.leaves(made.saved["buffer"].path),
    jax.tree.leaves(first[0].saved["buffer"].path),
    strict=True,
  ):
    np.testing.assert_allclose(ours, whole, atol=2e-6)


def test_a_policy_of_base_and_delta_is_rolled_out(world, first):
  """`Method.weights` makes the weights: here the frozen ones and a tenth of the trained."""

  def weights(trainable, frozen):
    return jax.tree.map(lambda a, b: 0.1 * a + b, trainable, frozen)

  made, _ = make_online(world, chosen=method(world, weights=weights))
  batch = made.complete(Feed(world, made._mesh)(), place(world, made._mesh, 0), 0)
  rows = slice(1, None, 2)
  answer = world.unet(
    weights(world.make_params(0), world.make_params(1)),
    batch.trajectory.noisy_latents[rows],
    batch.trajectory.timesteps[rows],
    batch.conditioning.prompt_embeds[rows],
  )
  np.testing.assert_allclose(answer, batch.trajectory.target[rows], atol=1e-5)


def epochs_in(buffer):
  return sorted(np.unique(np.asarray(buffer.identity)[..., 1]).tolist())


def test_the_buffer_is_first_in_first_out(world):
  made, feed = make_online(world, buffer_size=3 * EXPERTS)
  params, seen = place(world, made._mesh, 0), []
  for update in range(5):
    batch = made.complete(feed(), params, update)
    seen.append(epochs_in(made.saved["buffer"]))
    assert len(np.unique(batch.identity[::2], axis=0)) == EXPERTS  # no one twice
  # Filled before the first update, then one generation each.
  assert seen == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
  assert feed.taken == 7


def test_who_is_drawn_again_is_somebody_else_to_chance(world):
  made, feed = make_online(world)
  made.complete(feed(), place(world, made._mesh, 0), 0)
  buffer = made.saved["buffer"]
  when = parallel.put(np.int32([1, 1, 2]), parallel.replicated(made._mesh))
  one, same, other = (made._draw(buffer, k) for k in when)
  for name in ("identity", "moments"):
    np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
  np.testing.assert_array_equal(one.identity[:, 0], other.identity[:, 0])  # all four
  assert not np.any(one.identity[:, 1] == other.identity[:, 1])
  # Identity decides the noise; see test_noising.


def test_the_snapshot_is_refreshed_every_so_many_updates(world):
  made, feed = make_online(world, refresh_every=2)
  kernels = []
  for update in range(4):
    params = place(world, made._mesh, 10 + update)
    made.complete(feed(), params, update)
    kernels.append(np.asarray(made.saved["snapshot"]["out"]["kernel"]))
  policies = [world.make_params(10 + update)["out"]["kernel"] for update in range(4)]
  for kernel, policy in zip(kernels, (0, 0, 2, 2), strict=True):
    np.testing.assert_array_equal(kernel, policies[policy])


def test_going_on_from_what_was_saved_is_the_same_run(world):
  """Between two refreshes, with more in the buffer than an update takes."""
  options = {"refresh_every": 3, "buffer_size": 2 * EXPERTS}
  straight, feed = make_online(world, **options)
  other, later = make_online(world, **options)
  for update in range(2):
    straight.complete(feed(), place(world, straight._mesh, update), update)
  other.restore(jax.tree.map(jnp.copy, straight.saved))
  later.taken = feed.taken
  for update in (2, 3):
    params = place(world, straight._mesh, update)
    pair = [
      o.complete(f(), params, update) for o, f in ((straight, feed), (other, later))
    ]
    for mine, theirs in zip(*map(jax.tree.leaves, pair), strict=True):
      np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
  ("images", "options", "words"),
  [
    (8, {"step": 20}, "did you mean 'steps'"),
    (7, {}, "images_per_update=7.*expected an even number"),
    (8, {"steps": 0}, r"online\.steps=0.*at least 1"),
    (8, {"refresh_every": 0}, "refresh_every=0"),
    (8, {"buffer_size": 6, "rollouts_per_update": 4}, "a multiple of the 4.*as 8"),
    (8, {"buffer_size": 2, "rollouts_per_update": 2}, "at least the 4.*such as 4"),
  ],
)
def test_numbers_that_do_not_go_together_are_refused(images, options, words):
  with pytest.raises(UserError, match=words):
    online.settings(images, **options)


def test_what_online_means_by_default_is_the_paper():
  made = online.settings(512)
  assert vars(made) == {
    "lists": 256, "rollouts": 256, "generations": 1, "steps": 20, "refresh_every": 1,
  }  # fmt: skip


def test_lists_of_several_experts_are_refused(world):
  batch = world.make_batch()
  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  with pytest.raises(UserError, match=r"longest list has 5 images.*--job select"):
    online.Online(
      online.settings(24),
      method=method(world),
      mesh=parallel.make_mesh(devices=jax.devices()[:1]),
      params={},
      frozen=None,
      experts=spec,
      more=None,
    )


def test_a_batch_without_trajectories_says_what_is_missing(world):
  with pytest.raises(UserError, match="section `online`"):
    noising.trajectory(world.make_batch(), world.TABLES, 0, scaling_factor=1.0)


def test_steps_that_leave_timesteps_out_are_refused(world):
  with pytest.raises(UserError, match=r"7 steps.*divisor of the schedule's 1000.*as 8"):
    make_online(world, steps=7)


EIGHT_DEVICES = """
import runpy, sys, types
import jax, numpy as np
from lpo_jax import parallel
world = types.SimpleNamespace(**runpy.run_path(sys.argv[1]))
ours = types.SimpleNamespace(**runpy.run_path(sys.argv[2]))
options = {"images": 16, "rollouts_per_update": 8, "buffer_size": 16}
batches = []
for mesh in (parallel.make_mesh(devices=jax.devices()[:1]), parallel.make_mesh(4, 2)):
  made, feed = ours.make_online(world, mesh=mesh, rows=8, **options)
  for update in range(2):
    batch = made.complete(feed(), ours.place(world, mesh, update), update)
  batches.append(batch)
for one, eight in zip(*map(jax.tree.leaves, batches), strict=True):
  np.testing.assert_allclose(np.asarray(one), np.asarray(eight), rtol=1e-6, atol=2e-6)
held = made.saved["buffer"].path.outputs.addressable_shards
assert {shard.data.shape[:2] for shard in held} == {(2, 1)}
assert {s.data.shape[0] for s in batch.moments.addressable_shards} == {2}
try:
  ours.make_online(world, mesh=mesh, images=8)
except Exception as error:
  print(error)
"""


def test_eight_devices_draw_what_one_draws(on_devices):
  """Each holds the trajectories that it drew; a number that does not divide is refused."""
  here = pathlib.Path(__file__)
  text = on_devices(8, EIGHT_DEVICES, here.parent / "conftest.py", here)
  assert "images_per_update / 2 = 4 does not divide over 8 devices" in text
  assert "the nearest that does is 8" in text
