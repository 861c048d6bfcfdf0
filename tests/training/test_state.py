"""The train state: what a run publishes."""

import jax.numpy as jnp
import numpy as np
import optax

from lpo_jax.training import state as state_lib


def test_the_running_mean_is_published_where_there_is_one():
  params = {"kernel": jnp.asarray([1.0, 2.0])}
  with_mean = state_lib.TrainState(
    step=jnp.asarray(3), params=params, opt_state=(), ema={"kernel": jnp.zeros(2)}
  )
  np.testing.assert_array_equal(with_mean.published["kernel"], [0.0, 0.0])
  without = state_lib.create(params, optax.sgd(0.1), with_ema=False)
  np.testing.assert_array_equal(without.published["kernel"], [1.0, 2.0])
