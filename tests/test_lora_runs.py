"""Runs that train factors, through the front door: small checkpoints, files, going on."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

from lpo_jax import main, parallel, pretrained, trees
from lpo_jax.jobs import blueprint, candidates
from lpo_jax.models import lora
from lpo_jax.pretrained import lora as lora_files
from lpo_jax.training.report import read_metrics

TOTAL = 4
LORA = ("model.lora.rank=2", "model.lora.alpha=4.0", "train.learning_rate=1e-3")


def published(world, workdir):
  """What a run would publish of its factors, by name."""
  config, *_ = main.parse(world.arguments(workdir, *LORA))
  mesh = parallel.make_mesh()
  plan, delta, step = blueprint.restore_published(config, workdir, mesh)
  return plan, parallel.fetch(delta), step


def bytes_of(folder):
  return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def straight(tiny_cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("lora")
  base = bytes_of(tiny_cache.pipeline)
  outcome = tiny_cache.run(workdir, *LORA, f"train.total_steps={TOTAL}")
  assert outcome.code == 0, outcome.text
  assert bytes_of(tiny_cache.pipeline) == base
  return workdir


@pytest.fixture(scope="module")
def exported(tiny_cache, straight):
  """The folders of the run's exports, by kind and format."""
  folders = {}
  for kind, style in (("lora", "peft"), ("lora", "kohya"), ("merged", "peft")):
    folder = straight / f"{kind}-{style}"
    outcome = tiny_cache.run(
      straight,
      *LORA,
      f"export.kind={kind}",
      f"export.format={style}",
      f"export.path={folder}",
      job="export",
    )
    assert outcome.code == 0, outcome.text
    assert "equal to the bit" in outcome.text
    assert "diffusers predicts the same" in outcome.text
    folders[kind, style] = folder
  return folders


def test_margins_begin_at_exactly_zero(straight):
  first, second, *_ = read_metrics(straight / "metrics.jsonl")
  assert first["margin"] == first["drift"] == 0 and first["implicit_acc"] == 0.5
  assert second["drift"] > 0


def test_a_checkpoint_holds_factors_alone(tiny_cache, straight):
  plan, delta, step = published(tiny_cache, straight)
  assert step == TOTAL
  assert set(trees.named_leaves(delta)) == {
    f"{name}.{factor}" for name in plan.tuning.layout for factor in "AB"
  }
  assert len(plan.tuning.layout) == 8 and lora.count(delta) == 960
  base = pretrained.load(tiny_cache.pipeline, "unet").params
  files = (straight / "checkpoints").rglob("*")
  size = sum(file.stat().st_size for file in files if file.is_file())
  assert size < sum(leaf.nbytes for leaf in jax.tree.leaves(base)) / 2


def test_going_on_gives_the_same_bits(tiny_cache, straight, tmp_path):
  for total in (1, TOTAL):
    outcome = tiny_cache.run(tmp_path, *LORA, f"train.total_steps={total}")
    assert outcome.code == 0, outcome.text
  assert "resuming from step 1" in outcome.text
  mine, theirs = (published(tiny_cache, w)[1] for w in (tmp_path, straight))
  assert jax.tree.all(jax.tree.map(np.array_equal, mine, theirs))
  mine, theirs = (read_metrics(w / "metrics.jsonl") for w in (tmp_path, straight))
  assert [row["loss"] for row in mine] == [row["loss"] for row in theirs]


def test_all_exports_are_the_same_weights(tiny_cache, straight, exported):
  """A file of factors on the base, the merged pipeline, and the run itself."""
  mesh = parallel.make_mesh()
  places = [straight, *exported.values()]
  drawn = [
    candidates.load_params(str(place), mesh, str(tiny_cache.pipeline))
    for place in places
  ]
  for params, _ in drawn[1:]:
    assert jax.tree.all(jax.tree.map(np.array_equal, params, drawn[0][0]))
  assert len({identity for _, identity in drawn}) == len(places)
  base = pretrained.load(tiny_cache.pipeline, "unet").params
  same = trees.named_leaves(jax.tree.map(np.array_equal, base, drawn[0][0]))
  assert [name for name in same if not same[name]] == list(
    published(tiny_cache, straight)[0].tuning.layout
  )


def test_the_header_tells_of_the_run(exported):
  with safe_open(exported["lora", "kohya"] / "lpo.kohya.safetensors", "numpy") as file:
    header = file.metadata()
  assert header["ss_network_dim"] == "2" and header["ss_network_alpha"] == "4.0"
  assert header["ss_learning_rate"] == "0.001" and header["ss_steps"] == str(TOTAL)
  assert header["modelspec.prediction_type"] == "epsilon"
  assert json.loads(header["lpo_jax.objective"]) == {"name": "lpo", "beta": 500.0}


def test_cards_say_how_to_use_each_kind(exported):
  """Beside the file of factors, and in the merged pipeline's folder."""
  for (kind, _), folder in exported.items():
    card = (folder / "README.md").read_text("utf-8")
    assert ("load_lora_weights" in card) == (kind == "lora")
    assert "| LoRA | rank 2, alpha 4 |" in card and f"| updates | {TOTAL} |" in card


def test_training_goes_on_from_a_file(tiny_cache, exported, tmp_path):
  """The reference is the base without the file's factors."""
  file = exported["lora", "kohya"]
  settings = (f"model.lora.path={file}", *LORA[2:], "train.total_steps=1")
  outcome = tiny_cache.run(tmp_path, *settings)
  assert outcome.code == 0, outcome.text
  (row,) = read_metrics(tmp_path / "metrics.jsonl")
  assert row["drift"] > 0
  outcome = tiny_cache.run(tmp_path, *settings, "export.kind=lora", job="export")
  assert outcome.code == 0, outcome.text
  model = pretrained.load(tiny_cache.pipeline, "unet").model
  before, after = (lora_files.load(f, model).adapter for f in (file, tmp_path / "lora"))
  assert before.layout == after.layout
  for name, leaf in trees.named_leaves(after.delta).items():
    expected = trees.named_leaves(before.delta)[name]
    # One step of Adam, of half the learning rate, of which the mean takes a tenth.
    np.testing.assert_allclose(leaf, expected, atol=5.1e-5, err_msg=name)
    assert np.abs(expected).max() > 3e-4


def test_factors_of_a_full_fine_tune(tiny_cache, tmp_path):
  settings = ("train.total_steps=2", "train.learning_rate=1e-3")
  assert tiny_cache.run(tmp_path, *settings).code == 0
  outcome = tiny_cache.run(
    tmp_path, *settings, "export.kind=lora", "export.rank=8", job="export"
  )
  assert outcome.code == 0, outcome.text
  assert "diffusers predicts the same" in outcome.text
  kept = json.loads((tmp_path / "lora" / "kept.json").read_text())
  assert f"rank 8 keep {100 * kept['overall']:.1f} %" in outcome.text
  assert 0 < kept["overall"] < 1
  # It is the nearest of its rank to what the run publishes.
  model = pretrained.load(tiny_cache.pipeline, "unet")
  adapter = lora_files.load(tmp_path / "lora", model.model).adapter
  config, *_ = main.parse(tiny_cache.arguments(tmp_path, *settings))
  tuned, _ = blueprint.trained_params(config, tmp_path, parallel.make_mesh())
  near = trees.named_leaves(lora.merge(model.params, adapter.delta, adapter.layout))
  wanted, base = trees.named_leaves(tuned), trees.named_leaves(model.params)
  for name, share in kept["by_kernel"].items():
    left = np.sum(np.square(np.asarray(near[name]) - np.asarray(wanted[name])))
    whole = np.sum(np.square(np.asarray(wanted[name]) - np.asarray(base[name])))
    np.testing.assert_allclose(left / whole, 1 - share, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    (("model.lora.rank=-1",), "model.lora.rank=-1: expected 0"),
    (("model.lora.rank=2", "model.lora.init=zeros"), "unknown model.lora.init 'zeros'"),
    (("model.lora.rank=2", "model.lora.targets=(('.*', False),)"), "choose nothing"),
    (("model.lora.path=nowhere",), "no LoRA file at 'nowhere'"),
  ],
)
def test_settings_that_are_refused(tiny_cache, tmp_path, settings, words):
  outcome = tiny_cache.run(tmp_path, *settings)
  assert outcome.code == 2 and words in outcome.text, outcome.text
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    (("export.kind=lorra",), "unknown export.kind 'lorra'; did you mean 'lora'"),
    (("export.kind=lora", "export.format=pef"), "unknown export.format 'pef'"),
    (("export.kind=lora", "export.dtype=float8"), "unknown export.dtype 'float8'"),
  ],
)
def test_exports_that_are_refused(tiny_cache, straight, settings, words):
  outcome = tiny_cache.run(straight, *LORA, *settings, job="export")
  assert outcome.code == 2 and words in outcome.text, outcome.text


def test_another_rank_is_another_run(tiny_cache, straight):
  outcome = tiny_cache.run(straight, *LORA, "model.lora.rank=3", "train.total_steps=9")
  assert outcome.code == 2 and "model.lora.rank differ" in outcome.text
