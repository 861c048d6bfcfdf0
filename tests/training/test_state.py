"""The train state: what a run publishes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpo_jax.errors import UserError
from lpo_jax.training import state as state_lib


def test_the_running_mean_is_published_where_there_is_one():
  params = {"kernel": jnp.asarray([1.0, 2.0])}
  with_mean = state_lib.TrainState(
    step=jnp.asarray(3),
    params=params,
    opt_state=(),
    ema={"kernel": jnp.zeros(2)},
    lr_scale=jnp.ones(()),
    reward_cap=jnp.asarray(jnp.inf),
  )
  np.testing.assert_array_equal(with_mean.published["kernel"], [0.0, 0.0])
  without = state_lib.create(params, optax.sgd(0.1), with_ema=False)
  np.testing.assert_array_equal(without.published["kernel"], [1.0, 2.0])


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_the_ramp_is_diffusers(decay):
  torch = pytest.importorskip("torch")
  from diffusers.training_utils import EMAModel

  weight = torch.nn.Parameter(torch.zeros(3))
  theirs = EMAModel([weight], decay=decay, foreach=True)
  ours, schedule = np.zeros(3), state_lib.ema_schedule("ramp", decay)
  for update in range(30):
    values = np.random.default_rng(update).standard_normal(3)
    weight.data = torch.from_numpy(values)
    theirs.step([weight])
    kept = float(schedule(jnp.int32(update)))
    ours = kept * ours + (1 - kept) * values
    np.testing.assert_allclose(theirs.shadow_params[0].numpy(), ours, atol=1e-6)
  assert schedule(jnp.int32(10**6)) == np.float32(decay)
  assert state_lib.ema_schedule("constant", decay)(0) == decay


def test_an_unknown_schedule_is_refused():
  with pytest.raises(UserError, match=r"unknown train\.ema_schedule 'rampe'"):
    state_lib.ema_schedule("rampe", 0.9)
