"""The generate job: a model's own images, scored, ranked, and read again as lists."""

import json

import numpy as np
import pytest
from pyarrow import parquet

from lpo_jax.data import decoding, lists, sources
from lpo_jax.jobs import generate
from lpo_jax.scoring import digits

PROMPTS = tuple(f"a handwritten {name}" for name in ("one", "two", "three"))
IMAGES = 3
SETTINGS = (
  f"generate.prompts={PROMPTS!r}",
  f"generate.images_per_prompt={IMAGES}",
  "generate.first_seed=100",
  "generate.scorers=('digits_taste',)",
  "eval.steps=2",
  "eval.guidance_scale=1.0",
  "eval.batch_size=3",  # one prompt a part
)


def run(world, workdir, *overrides):
  return world.run(workdir, *SETTINGS, *overrides, job="generate")


@pytest.fixture(scope="module")
def drawn(tiny_world, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("drawn")
  outcome = run(tiny_world, workdir)
  assert outcome.code == 0, outcome.text
  return workdir / "lists.parquet", outcome.text


def test_every_prompt_becomes_a_list_ranked_by_the_scorer(drawn):
  path, text = drawn
  assert "drawing lists  3/3 prompts" in text
  assert f"--config.data.path={path}" in text
  rows = parquet.read_table(path).to_pylist()
  assert [row["prompt"] for row in rows] == list(PROMPTS)
  for row in rows:
    pixels = [decoding.prepare(data, 32).pixels for data in row["images"]]
    taste = digits.taste(np.stack(pixels), [""] * IMAGES)
    np.testing.assert_allclose(row["scores"], taste)
    assert row["score_digits_taste"] == row["scores"]
    order = np.argsort(-taste)
    assert [row["ranks"][i] for i in order] == [0, 1, 2]
  uids = [uid for row in rows for uid in row["image_uids"]]
  assert len(set(uids)) == 9
  assert not list(path.parent.glob("*.parts"))


def test_the_lists_are_a_source_as_they_are(drawn):
  source = sources.read(drawn[0])
  built, report = lists.build(source, "levels", max_size=8)
  assert report.lengths == {3: 3} and not report.dropped
  rows = {r["prompt"]: r for r in parquet.read_table(drawn[0]).to_pylist()}
  for b in range(len(built)):
    row = rows[built.prompts[built.prompt[b]]]
    items = slice(built.offsets[b], built.offsets[b + 1])
    best = np.argsort(row["ranks"])
    named = [built.image_uids[i] for i in built.image[items]]
    assert named == [row["image_uids"][i] for i in best]
    np.testing.assert_allclose(built.score[items], np.asarray(row["scores"])[best])


def test_nothing_to_do_the_second_time_and_other_settings_are_refused(
  tiny_world, drawn, tmp_path
):
  before = drawn[0].read_bytes()
  again = run(tiny_world, tmp_path, f"generate.path={drawn[0]}")
  assert again.code == 0 and "lists are there" in again.text
  assert drawn[0].read_bytes() == before
  other = run(tiny_world, tmp_path, f"generate.path={drawn[0]}", "eval.steps=3")
  assert other.code == 2 and "steps was 2, is 3" in other.text


def test_stopping_keeps_what_is_done(tiny_world, drawn, tmp_path, monkeypatch):
  """Asked to stop after the first prompt: exit 3; the same command draws the others."""
  written, write_part = [], generate.write_part

  def watched(path, *arguments):
    write_part(path, *arguments)
    written.append(path.name)
    if len(written) == 1:
      (tmp_path / "STOP").touch()

  monkeypatch.setattr(generate, "write_part", watched)
  outcome = run(tiny_world, tmp_path)
  assert outcome.code == 3, outcome.text
  assert "STOP: 1 of 3 prompts are done" in outcome.text
  assert not (tmp_path / "lists.parquet").exists()
  outcome = run(tiny_world, tmp_path)
  assert outcome.code == 0, outcome.text
  assert len(written) == 3 == len(set(written))
  mine, theirs = (parquet.read_table(p) for p in (tmp_path / "lists.parquet", drawn[0]))
  assert mine.equals(theirs)
  settings = json.loads((tmp_path / "lists.json").read_text())
  assert settings["images_per_prompt"] == IMAGES


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("generate.scorers=()", "expected a prompt file or a tuple of texts, and some"),
    ("generate.scorers=('tast',)", "unknown scorer 'tast'"),
    ("generate.images_per_prompt=0", "images_per_prompt=0"),
    ("generate.tie_tolerance=-0.1", "expected at least 1 image and 0"),
    ("generate.policy=nowhere", "nowhere"),
  ],
)
def test_bad_settings_are_refused(tiny_world, tmp_path, override, words):
  outcome = run(tiny_world, tmp_path, override)
  assert outcome.code == 2
  assert words in outcome.text


@pytest.mark.parametrize(
  ("scores", "tolerance", "ranks"),
  [
    ([3.0, 1.0, 2.0], 0.0, [0, 2, 1]),
    ([1.0, 1.0, 2.0], 0.0, [1, 1, 0]),
    # A chain of small gaps is not one tie: each group reaches down from its best.
    ([1.0, 0.9, 0.8, 0.7], 0.15, [0, 0, 1, 1]),
    ([0.5], 0.0, [0]),
    ([2.0, 2.0], 0.0, [0, 0]),
  ],
)
def test_scores_become_ranks(scores, tolerance, ranks):
  assert generate.ranks_of(np.asarray(scores), tolerance) == ranks


def test_several_scorers_are_joined_by_the_share_of_the_others_beaten():
  """RankDPO's phi: votes of all models over n (k - 1)."""
  scores = {"a": np.asarray([3.0, 2.0, 1.0]), "b": np.asarray([0.1, 0.9, 0.1])}
  joined = generate.combine(scores, 0.0)
  # a: 2, 1, 0 wins of 2; b: half, 2, half.
  np.testing.assert_allclose(joined, [(1 + 0.25) / 2, (0.5 + 1) / 2, (0 + 0.25) / 2])
  np.testing.assert_allclose(generate.combine({"a": scores["a"]}, 0.0), [3, 2, 1])
