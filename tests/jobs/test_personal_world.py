"""The personal quickstart's world: what people judge, what is asked, what is shown."""

import pathlib
import re

import numpy as np
import pyarrow.parquet as parquet
import pytest

from lpo_jax.configs import personal_quickstart
from lpo_jax.data import held_out, sources
from lpo_jax.data.prompts import load as load_prompts
from lpo_jax.jobs import (
  evaluation_people,
  personal_report,
  quickstart_people,
  quickstart_personal,
)
from lpo_jax.jobs.evaluate import Evaluation, make_cases
from lpo_jax.scoring import digit_people


@pytest.fixture(scope="module")
def config():
  return personal_quickstart.get_config("smoke")


@pytest.fixture(scope="module")
def world(config, tmp_path_factory):
  """Judgements of the smoke world, on noise in place of what the base would draw."""
  folder = tmp_path_factory.mktemp("world")
  own = config.copy_and_resolve_references()

  def noise(config, rows):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (len(rows), 32, 32, 3)).astype(np.uint8)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quickstart_personal, "draw_candidates", noise)
    path = quickstart_personal.make_judgements(own, folder)
  return folder, path, own


def test_people_judge_the_same_pool_each_under_prompts_of_their_own(config, world):
  _, path, own = world
  judged = sources.open(str(path), "auto").read()
  count = config.quickstart.users
  assert len(judged.users) == count
  assert len(judged) == count * config.quickstart.sessions * 4
  for user in range(count):
    mine = judged.prompt[judged.user == user]
    assert len(np.unique(mine)) == config.quickstart.sessions  # a session a prompt
    assert (np.bincount(mine)[np.unique(mine)] == 4).all()
  seen = [set(judged.image_a[judged.user == u]) for u in range(count)]
  assert any(seen[0] & other for other in seen[1:])
  assert pathlib.Path(own.data.user_embeds).is_file()
  assert own.eval.scorer_paths.digits_person.endswith("people.json")


def test_each_person_is_asked_the_same_in_phrasings_never_trained_on(config, world):
  _, path, own = world
  asked = parquet.read_table(own.eval.prompts).to_pydict()
  trained = set(sources.open(str(path), "auto").read().prompts)
  assert not trained & set(asked["prompt"])
  people = sorted(set(asked["user"]))
  for user in people:
    mine = [p for p, u in zip(asked["prompt"], asked["user"]) if u == user]
    assert len(mine) == 10 and set(mine) == set(asked["prompt"])
  for user, category in zip(asked["user"], asked["category"]):
    new = held_out.is_held_out_person(user, config.data.held_out_users, config.seed)
    assert category == ("held_out" if new else "held_in")
  assert {*asked["category"]} == {"held_in", "held_out"}


def test_a_session_is_judged_by_the_persons_taste():
  scores = np.array([0.0, 3.0, -3.0, 6.0])
  session = quickstart_people.Session(7, 2, [0, 1, 2, 3])
  made = quickstart_people.judge_session(
    session, scores, 1e-3, 0.3, np.random.default_rng(0)
  )
  assert [(j.session, j.user) for j in made] == [(7, 2)] * 3
  winners = [j.left if j.label == 1 else j.right for j in made]
  assert winners == [1, 1, 3]  # the winner stays
  assert {made[1].left, made[1].right} == {1, 2}


def outcome(own):
  """An evaluation in which the personal model wins for people whose number is even."""
  rows = load_prompts(own.eval.prompts).rows
  cases = make_cases_of(rows)
  even = np.array([int(case.asked.user) % 2 == 0 for case in cases])
  people = {
    "personal": np.where(even, 1.0, -1.0),
    "common": np.zeros(len(cases)),
    "another": np.zeros(len(cases)),
    "base": np.zeros(len(cases)),
  }
  scores = {
    name: {"digits_person": x, "digits_legibility": np.ones(len(cases))}
    for name, x in people.items()
  }
  pairs = [("personal", "common"), ("personal", "another")]
  rows = evaluation_people.compare(scores, pairs, cases, set())
  images = {
    name: np.full((len(cases), 32, 32, 3), i, np.uint8) for i, name in enumerate(scores)
  }
  texts, seeds = [c.prompt for c in cases], [c.seed for c in cases]
  return Evaluation(texts, seeds, cases, images, scores, [], rows)


def make_cases_of(rows):
  from lpo_jax.data.prompts import PromptSet

  return make_cases(PromptSet(rows), 1, 0)


def test_win_rates_have_people_as_units(world):
  *_, own = world
  found = outcome(own)
  assert {row["category"] for row in found.people} == {"", "held_in", "held_out"}
  for row in found.people:
    if row["scorer"] != "digits_person":
      continue
    each = row["by_person"]
    assert row["unit"] == "person" and row["units"] == len(each)
    assert row["n"] == 10 * len(each)
    assert each == {user: float(int(user) % 2 == 0) for user in each}
    np.testing.assert_allclose(row["win_rate"], np.mean(list(each.values())))


def test_told_of_another_is_a_derangement_that_knows_no_taste(world):
  *_, own = world
  cases = make_cases_of(load_prompts(own.eval.prompts).rows)
  told = evaluation_people.as_told("another", cases)
  pairs = {(a.asked.user, b.asked.user) for a, b in zip(cases, told)}
  assert all(a != b for a, b in pairs)
  assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
  assert [(c.prompt, c.seed, c.index) for c in told] == [
    (c.prompt, c.seed, c.index) for c in cases
  ]
  assert {c.asked.user for c in evaluation_people.as_told("nobody", cases)} == {""}
  assert evaluation_people.as_told("own", cases) == list(cases)
  # The seeds are everybody's: the same noise.
  assert {case.seed for case in cases} == {0}


def test_the_report_shows_a_prompt_and_seed_for_different_people(world, tmp_path):
  *_, own = world
  found = outcome(own)
  people = digit_people.read(own.eval.scorer_paths.digits_person)
  grid = personal_report.grid(found, people)
  assert grid.candidates[0] == "nobody (common)" and len(grid.candidates) >= 3
  new = {c.asked.user for c in found.cases if c.category == "held_out"}
  for name in grid.candidates[1:]:
    words, user = re.fullmatch(r"(.+) \((\d+)\)", name).groups()
    assert user in new and people[user].words == words
    assert (np.asarray(grid.images[name]) == 0).all()  # the personal model's
  assert (np.asarray(grid.images["nobody (common)"]) == 1).all()
  report = {
    "judgements": dict.fromkeys(
      ("judgements_total", "judgements_used", "ties", "contradicted_pairs", "cycle_cuts"),
      1,
    ) | {"lists": 1, "lengths": {"5": 1}},
    "images": {"count": 1, "undecodable": 0},
    "prompts": {"count": 1, "leaked": 0},
    "annotators": {"count": 24},
  }  # fmt: skip
  personal_report.write(
    own, tmp_path, evaluation=found, data_report=report, runs={}, timings={"a": 1.0},
    exported={"path": "x", "checked": "read back"},
  )  # fmt: skip
  text = (tmp_path / "report.html").read_text()
  text = re.sub(r"[\u00a0\u202f]|&nbsp;", " ", text)
  row = personal_report.of_group(found.people, "held_out", "common")
  assert personal_report.interval(row) in text
  assert "whom it is for" in text and "what differs is the model" not in text
  assert "people are drawn again with replacement" in text


@pytest.mark.slow  # about a minute on two cores
def test_the_smoke_quickstart_goes_all_the_way(front_door, tmp_path):
  outcome = front_door(
    "--config=configs/personal_quickstart.py:smoke", f"--workdir={tmp_path}"
  )
  assert outcome.code == 0, outcome.text
  assert "diffusers predicts the same" in outcome.text
  for file in ("report.html", "summary.json", "evaluation/people.json"):
    assert (tmp_path / file).is_file()
  assert (tmp_path / "personal" / "export" / "ip_adapter.safetensors").is_file()
