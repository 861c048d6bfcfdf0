"""The loop: nothing is compiled and nothing moves unasked once it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax.training import report

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations(monkeypatch):
  """How many programs had been compiled when each step was reported."""
  seen, at_step = [], {}

  def listen(event, duration, **_):
    if event == COMPILED:
      seen.append(duration)

  push = report.Report.push

  def spy(self, step, metrics):
    at_step[step] = len(seen)
    return push(self, step, metrics)

  jax.monitoring.register_event_duration_secs_listener(listen)
  monkeypatch.setattr(report.Report, "push", spy)
  return at_step


def test_nothing_is_compiled_after_the_first_step(tiny_cache, tmp_path, compilations):
  outcome = tiny_cache.run(
    tmp_path,
    "train.total_steps=6",
    "train.checkpoint_every=3",
    "eval.every=2",
    "eval.prompts=('a thing', 'another')",
    "eval.steps=2",
    "eval.batch_size=2",
    "mesh.offload=('ema','reference')",
  )
  assert outcome.code == 0, outcome.text
  assert sorted(compilations) == [1, 2, 3, 4, 5, 6]
  assert compilations[1] > 0
  assert compilations[2] == compilations[1]
  # Samples are drawn after steps 2, 4 and 6: their programs are compiled once, and the
  # checkpoint of step 3 needs none.
  assert compilations[3] > compilations[2]
  assert compilations[6] == compilations[5] == compilations[4] == compilations[3]


def test_the_guard_of_the_loop_would_see_a_transfer():
  add = jax.jit(lambda x, y: x + y).lower(jnp.zeros(3), jnp.zeros(3)).compile()
  here = jnp.ones(3)
  with jax.transfer_guard("disallow"):
    np.testing.assert_array_equal(np.asarray(jax.device_get(add(here, here))), 2.0)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
      add(np.ones(3, np.float32), here)
