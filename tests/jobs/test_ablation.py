"""The rank-enforcement ablation: its runs, and the smoke form end to end."""

import json
import pathlib

import numpy as np
import pytest

from lpo_jax import main
from lpo_jax.data import lists, sources
from lpo_jax.errors import UserError
from lpo_jax.jobs import ablation, ablation_report, quickstart, quickstart_people
from lpo_jax.scoring.frontier import Frontier, Point
from lpo_jax.training.report import read_metrics

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "ablation_ranks.py"


def full():
  config = main.load_config(str(CONFIG))
  config.model.path = "base"
  return config


# The whole ablation, without running it.


def test_every_arm_meets_every_beta_and_seed_in_its_own_folder(tmp_path):
  config = full()
  runs = ablation.plan(config, tmp_path)
  assert len(runs) == 8 * 2 * 3
  assert len({one.folder for one in runs}) == len(runs)
  assert {one.config.seed for one in runs} == {0, 1, 2}
  assert {(one.arm, one.config.objective.beta) for one in runs} == {
    (arm, beta) for arm in config.quickstart.methods for beta in (500.0, 2000.0)
  }
  # Stopped half way, it has every arm and seed with one beta.
  assert {one.beta for one in runs[:24]} == {config.quickstart.betas[0]}
  for one in runs:  # one cache of images and one set of rankings for a seed
    assert one.config.data.cache == str(tmp_path / f"seed{one.seed}" / "cache")
    assert one.config.data.path.startswith(str(tmp_path / f"seed{one.seed}" / "judge"))
    assert one.config.train == config.train  # equal images


def test_what_the_arms_say_of_one_ranking(tmp_path):
  """Ranks by list, of twelve images ranked by one person."""
  path = tmp_path / "judgements.parquet"
  images = np.zeros((12, 8, 8, 3), np.uint8)
  images += np.arange(12, dtype=np.uint8)[:, None, None, None]
  order = [7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6]
  quickstart_people.write_rankings(path, [order], images, ["p"] * 12, model="m")
  source = sources.read(path)
  said = {}
  for one in ablation.plan(full(), tmp_path)[:8]:
    data, name = one.config.data, one.config.objective.name
    built, _ = lists.build(
      source, data.strategy, max_size=data.max_list_size, ranks=data.ranks
    )
    cut = np.split(built.rank, built.offsets[1:-1])
    places = [order.index(int(built.image_uids[i][-2:])) for i in built.image]
    said[one.arm] = (name, [part.tolist() for part in cut], places)
  twelve = list(range(12))
  assert said["full"] == ("lpo", [twelve], twelve)
  assert said["all_pairs"] == ("all_pairs", [twelve], twelve)
  assert said["winner"] == ("lpo", [[0] + [1] * 11], twelve)
  name, cut, places = said["adjacent"]
  pairs = {tuple(p) for p in np.reshape(places, (-1, 2)).tolist()}
  assert (name, cut) == ("lpo", [[0, 1]] * 11)
  assert pairs == {(i, i + 1) for i in range(11)}
  assert said["shuffled"][:2] == ("lpo", [twelve])
  assert sorted(said["shuffled"][2]) == twelve and said["shuffled"][2] != twelve
  for size, lengths in {2: [2] * 6, 4: [4] * 3, 8: [4, 8]}.items():
    name, cut, places = said[f"size{size}"]
    assert sorted(map(len, cut)) == lengths and sorted(places) == twelve
    assert all(part == list(range(len(part))) for part in cut)


def test_it_says_what_it_will_cost(tmp_path):
  config = full()
  runs = ablation.plan(config, tmp_path)
  (runs[0].folder).mkdir(parents=True)
  (runs[0].folder / "points.json").write_text("{}")
  config.quickstart.pace.update(trained=96.0, drawn=20.0, overhead=100.0)
  said = ablation.estimate(config, runs)
  # 60 updates of 48 images, and 4 checkpoints of 20 prompts with 5 seeds.
  assert "8 arms x 2 betas x 3 seeds = 48 runs, 47 of them to do" in said
  assert "trains on 2880 images and draws 400: about 2:30 a run and 1:57:30" in said


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("betas", (), "quickstart.betas is empty"),
    ("panels", {"sizes": ("size3",)}, "'size3'; did you mean 'size"),
  ],
)
def test_what_is_no_ablation_is_refused(key, value, words):
  config = full()
  with config.unlocked():
    config.quickstart[key] = value
  with pytest.raises(UserError, match=words):
    ablation.check(config)


def test_processes_with_a_seed_each_share_their_timings(tmp_path):
  one, other = quickstart.Stages(tmp_path), quickstart.Stages(tmp_path)
  for stages, name in ((one, "seed 0"), (other, "seed 1"), (one, "seed 2")):
    with stages.stage(name):
      pass
  assert list(quickstart.Stages(tmp_path).seconds) == ["seed 0", "seed 1", "seed 2"]
  assert len(list(tmp_path.iterdir())) == 1


def test_people_rank_as_they_compare():
  """Of any two images, exp(a / T) / (exp(a / T) + exp(b / T)) of the people prefer a."""
  scores = np.tile([1.0, 0.5, 0.0], 4000)
  rankings = quickstart_people.rank(
    scores, images_per_session=3, temperature=0.5, seed=3
  )
  assert rankings[7][0] in (21, 22, 23) and len(rankings) == 4000
  assert rankings == quickstart_people.rank(
    scores, images_per_session=3, temperature=0.5, seed=3
  )
  place = np.argsort(np.asarray(rankings) % 3, axis=1)  # of each of the three images
  for i, j, share in ((0, 1, 0.731), (0, 2, 0.881), (1, 2, 0.731)):
    # sigmoid(1) and sigmoid(2); the standard deviation is 0.007.
    assert np.mean(place[:, i] < place[:, j]) == pytest.approx(share, abs=0.03)
  first = np.mean(np.asarray(rankings)[:, 0] % 3 == 0)
  assert first == pytest.approx(0.665, abs=0.03)  # e^2 / (e^2 + e + 1)


# What the report says of points that are made up.


def points(arm, gained, drift=1.0):
  """One checkpoint for each seed, with one beta."""
  return [Point(arm, 1.0, s, 10, drift, 0.5, g, 0.0) for s, g in enumerate(gained)]


def frontiers_of(made):
  return {arm: Frontier(made, arm) for arm in dict.fromkeys(p.arm for p in made)}


def test_a_leader_is_named_only_beyond_the_scatter():
  made = points("clear", (0.80, 0.81, 0.82)) + points("behind", (0.70, 0.71, 0.72))
  said = ablation_report.leaders(frontiers_of(made), [1.0])
  assert said[0].startswith("At a drift of 1 clear gains most taste, 0.810 (0.785 to ")
  assert "It leads: the difference over seeds is +0.100" in said[0]
  made = points("wild", (0.60, 0.80, 0.91)) + points("behind", (0.70, 0.71, 0.72))
  said = ablation_report.leaders(frontiers_of(made), [1.0])
  assert "1 wild gains" in said[0] and said[0].endswith("no leader.")


def test_differences_from_one_arm_are_paired_by_seed():
  """At half the drift half of what was gained: 0.4, 0.45 and 0.35, 0.35."""
  made = points("full", (0.8, 0.9)) + points("wide", (0.7, 0.7))
  made += points("near", (0.6, 0.6), drift=0.5)
  table = ablation_report.against(frontiers_of(made), [0.5, 1.0], "full")
  assert table.columns == ["method", "drift 0.5", "drift 1"]
  # s / sqrt(2) = 0.025 and 0.05; t(0.975, 1 degree of freedom) = 12.706.
  assert table.rows == [
    ["wide", "-0.075 (-0.393 to +0.243)", "-0.150 (-0.785 to +0.485)"],
    ["near", "+0.175 (-0.143 to +0.493)", "–"],
  ]
  one = frontiers_of([p for p in made if p.seed == 0])
  assert ablation_report.against(one, [1.0], "full").rows[0] == ["wide", "-0.100"]


# The smoke form.


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, front_door):
  workdir = tmp_path_factory.mktemp("ablation") / "run"
  outcome = front_door(f"--config={CONFIG}:smoke", f"--workdir={workdir}")
  assert outcome.code == 0, outcome.text
  return workdir, outcome.text


@pytest.mark.slow
def test_it_runs_end_to_end(smoke):
  workdir, text = smoke
  assert "2 arms x 1 betas x 1 seeds = 2 runs, 2 of them to do" in text
  points = json.loads((workdir / "points.json").read_text("utf-8"))
  assert [(p["arm"], p["step"]) for p in points] == [
    (arm, step) for arm in ("full", "shuffled") for step in (2, 4)
  ]
  for point in points:
    assert 0 < point["drift"] < 1e-2 and 0 <= point["won"] <= 1
    assert point["beta"] == 2000.0 and abs(point["lost"]) <= 1
  # Shuffled ranks are another training. Drift grows from the base on.
  drifts = [p["drift"] for p in points]
  assert len(set(drifts)) == 4 and drifts[0] < drifts[1] and drifts[2] < drifts[3]
  first = [
    read_metrics(workdir / "seed0" / f"{arm}_beta2000" / "metrics.jsonl")[0]
    for arm in ("full", "shuffled")
  ]
  # log 12! for lists of twelve, before anything has moved.
  assert first[0]["loss"] == pytest.approx(19.98721, rel=1e-5)
  assert first[1]["loss"] == pytest.approx(19.98721, rel=1e-5)


@pytest.mark.slow
def test_the_report_has_charts_and_its_table_as_markdown(smoke):
  workdir, _ = smoke
  page = (workdir / "report.html").read_text("utf-8")
  assert page.count("<svg") == 3 and "What is enforced" in page
  table = (workdir / "table.md").read_text("utf-8")
  for title in ("At equal drift", "At equal loss of legibility", "At equal images"):
    assert title in page and f"## {title}" in table
  point = json.loads((workdir / "points.json").read_text("utf-8"))[1]
  row = f"| full | 2000 | {point['gained']:.3f} | {100 * point['won']:.1f} % |"
  assert row in table
  assert "With one seed nothing can be said" in table


@pytest.mark.slow
def test_what_is_done_is_not_done_again(smoke, front_door):
  workdir, _ = smoke
  files = [*workdir.glob("seed0/*/metrics.jsonl"), *workdir.glob("seed0/*/points.json")]
  before = {file: file.read_bytes() for file in files}
  assert len(before) == 4
  outcome = front_door(f"--config={CONFIG}:smoke", f"--workdir={workdir}")
  assert outcome.code == 0, outcome.text
  assert "2 runs, 0 of them to do" in outcome.text
  assert "drawing" not in outcome.text and "compiling" not in outcome.text
  assert {file: file.read_bytes() for file in files} == before
