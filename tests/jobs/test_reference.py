"""Stored errors of the reference train as computed ones do, without its weights."""

import contextlib

import jax
import numpy as np
import pytest

from lpo_jax import main, parallel, trees
from lpo_jax.data import references
from lpo_jax.jobs import blueprint, cache
from lpo_jax.training import checkpoint, flops, report, step


def trained(world, workdir):
  """Weights after a run, and its losses."""
  config, *_ = main.parse(world.arguments(workdir))
  saved = checkpoint.Checkpoints(workdir / "checkpoints", reading=True)
  like = blueprint.make_blueprint(config, parallel.make_mesh()).like
  state, _ = saved.restore(like)
  saved.close()
  rows = report.read_metrics(workdir / "metrics.jsonl")
  return trees.named_leaves(jax.device_get(state.params)), rows


def test_training_on_stored_errors_is_the_same_run(tiny_cache, tmp_path):
  plain, stored = tmp_path / "plain", tmp_path / "stored"
  outcome = tiny_cache.run(plain)
  assert outcome.code == 0, outcome.text
  # Not computed yet: refused, before anything is compiled.
  outcome = tiny_cache.run(stored, "data.reference=")
  assert outcome.code == 2 and "has none of the reference's errors" in outcome.text
  outcome = tiny_cache.run(stored, "train.total_steps=2", job="reference")
  assert outcome.code == 0, outcome.text
  # For fewer updates than are trained: refused, and gone on with.
  outcome = tiny_cache.run(stored, "data.reference=")
  assert outcome.code == 2 and "has only some of" in outcome.text
  outcome = tiny_cache.run(stored, job="reference")
  assert outcome.code == 0, outcome.text
  # Stopped on the way, too.
  (stored / "STOP").touch()
  outcome = tiny_cache.run(stored, "data.reference=")
  assert outcome.code == 3 and "saved step 1 of 5" in outcome.text, outcome.text
  outcome = tiny_cache.run(stored, "data.reference=")
  assert outcome.code == 0, outcome.text
  weights, rows = trained(tiny_cache, plain)
  own_weights, own_rows = trained(tiny_cache, stored)
  assert [row["loss"] for row in own_rows] == [row["loss"] for row in rows]
  for name, leaf in weights.items():
    np.testing.assert_array_equal(own_weights[name], leaf, err_msg=name)
  assert own_rows[-1]["drift"] is None and rows[-1]["drift"] > 0
  # Updates of another size hold other lists: refused before anything is compiled.
  outcome = tiny_cache.run(tmp_path / "other", f"data.reference={stored}/reference",
                           "train.images_per_update=32")  # fmt: skip
  assert outcome.code == 2 and "has only some of" in outcome.text
  # Of another seed: refused.
  outcome = tiny_cache.run(tmp_path / "other", f"data.reference={stored}/reference",
                           "seed=1")  # fmt: skip
  assert outcome.code == 2 and "seed differ" in outcome.text


def test_a_quarter_of_the_work_and_all_of_the_reference_are_saved(tiny_cache, tmp_path):
  mesh, count, held = parallel.make_mesh(), {}, {}
  for name, override in {"step": "None", "stored": str(tmp_path)}.items():
    arguments = tiny_cache.arguments(tmp_path, f"data.reference={override}")
    config, *_ = main.parse(arguments)
    made = blueprint.make_blueprint(config, mesh)
    base = jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype), made.model.abstract_params
    )
    _, frozen = made.begin(parallel.put(base, made.shardings), mesh)
    held[name] = len(jax.tree.leaves(frozen))
    with contextlib.closing(cache.open_for(config, tmp_path)) as opened:
      store = references.References.empty(opened.lists) if name == "stored" else None
      with contextlib.closing(blueprint.make_batches(config, opened, store)) as batches:
        batch = batches.batch_spec
    traced = step.trace_train_step(
      mesh, made.like, frozen, batch, method=made.method, optimizer=made.optimizer
    )
    count[name] = flops.count_flops(traced.jaxpr.jaxpr)
  assert held["stored"] == 0 < held["step"]
  # Forward, backward and reference are 1 + 2 + 1; the backward of the first layers is
  # less than twice their forward.
  assert count["stored"] / count["step"] == pytest.approx(0.75, abs=0.03)
