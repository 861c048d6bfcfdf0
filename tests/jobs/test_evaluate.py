"""The evaluate job: kinds of candidates, what it draws, scores, compares and writes."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from lpo_jax import main, pages, parallel, pretrained, trees
from lpo_jax.errors import UserError
from lpo_jax.jobs import blueprint, candidates, evaluate, run_identity
from lpo_jax.pages import RunReport
from lpo_jax.scoring import digits
from lpo_jax.training.checkpoint import Checkpoints

PROMPTS = ("a handwritten one", "the digit two in ink", "a handwritten one", "three")
SEEDS, N = 3, 12
SETTINGS = (
  f"eval.prompts={PROMPTS!r}",
  f"eval.seeds={SEEDS}",
  "eval.first_seed=5",
  "eval.scorers=('digits_taste',)",
  # As tests/jobs/test_generate.py: the compilation is shared.
  "eval.steps=2",
  "eval.guidance_scale=1.0",
  "eval.batch_size=3",
)
BOTH = "eval.protocols=('same_seed','median_of_k')"
HOSTILE = (
  "<script>alert(1)</script> \"q\" 'a' | & \\x {tex} $m$ `c` \x1b]0;x\x07 \u202ertl\nb"
)
RUDE = (
  'a<b onload="x">\x1b[31m|_&$\u202e'  # of a candidate, by somebody without manners
)


def run(world, workdir, *overrides, **locations):
  """Runs the job through the front door; `locations` are its candidates."""
  chosen = [f"eval.candidates.{name}={place}" for name, place in locations.items()]
  return world.run(workdir, *SETTINGS, *chosen, *overrides, job="evaluate")


def pixels(folder):
  return np.stack([np.asarray(Image.open(folder / f"{i:05d}.png")) for i in range(N)])


@pytest.fixture(scope="module")
def other(tiny_world, tmp_path_factory):
  """The pipeline with other weights in its UNet."""
  folder = tmp_path_factory.mktemp("other") / "pipeline"
  part = pretrained.load(tiny_world.pipeline, "unet")
  changed = trees.map_named(lambda name, x: x * 1.25, part.params)
  changed = pretrained.Part("unet", part.config, changed, part.model)
  pretrained.save_pipeline(tiny_world.pipeline, folder, {"unet": changed})
  return folder


@pytest.fixture(scope="module")
def drawn(tiny_world, other, tmp_path_factory):
  """An evaluation of two pipelines, and what it printed."""
  workdir = tmp_path_factory.mktemp("drawn")
  outcome = run(tiny_world, workdir, BOTH, base=tiny_world.pipeline, other=other)
  assert outcome.code == 0, outcome.text
  return workdir, outcome.text


def scores_of(workdir):
  """candidate -> [n] scores, from the parquet file."""
  rows = parquet.read_table(workdir / "evaluation" / "per_image.parquet").to_pylist()
  names = dict.fromkeys(row["candidate"] for row in rows)
  return {
    name: np.array([r["digits_taste"] for r in rows if r["candidate"] == name])
    for name in names
  }


def test_all_candidates_get_the_same_prompts_and_seeds(drawn):
  folder = drawn[0] / "evaluation"
  rows = parquet.read_table(folder / "per_image.parquet").to_pylist()
  for name in ("base", "other"):
    mine = [row for row in rows if row["candidate"] == name]
    assert [row["prompt"] for row in mine] == [p for p in PROMPTS for _ in range(SEEDS)]
    # The first prompt comes again: its images would be the same ones with seeds 5 to 7.
    assert [row["seed"] for row in mine] == [5, 6, 7, 5, 6, 7, 8, 9, 10, 5, 6, 7]
    assert [row["row"] for row in mine] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    images = pixels(folder / name)
    assert len({image.tobytes() for image in images}) == N
    values = digits.taste(images, [""] * N)
    np.testing.assert_allclose([row["digits_taste"] for row in mine], values)
    assert [row["file"] for row in mine] == [f"{i:05d}.png" for i in range(N)]
  assert (pixels(folder / "base") != pixels(folder / "other")).any()


def test_the_rows_are_those_of_the_scores(drawn):
  scores, rows = (
    scores_of(drawn[0]),
    json.loads((drawn[0] / "summary.json").read_text()),
  )
  base, other = scores["base"], scores["other"]
  same, median = rows
  assert (same["protocol"], median["protocol"]) == ("same_seed", "median_of_k")
  assert same["win_rate"] == pytest.approx(np.mean(other > base)) and same["n"] == N
  middle = {k: np.median(v.reshape(4, SEEDS), axis=1) for k, v in scores.items()}
  assert median["win_rate"] == np.mean(middle["other"] > middle["base"])
  assert median["n"] == 4 and median["mean_candidate"] == pytest.approx(
    middle["other"].mean()
  )
  for row in rows:
    assert (row["correction"], row["comparisons"]) == ("holm", 2)
    assert row["p_corrected"] >= row["p_sign"]
    # Each row says all that its numbers hang on.
    assert (row["sampler"], row["steps"], row["guidance_scale"]) == ("ddim", 2, 1.0)
    assert (row["images_per_prompt"], row["first_seed"]) == (SEEDS, 5)
    assert row["scorer_version"] == "1" and row["scorer_identity"] == "digits_taste 1"
    assert row["weights_candidate"] != row["weights_baseline"]


def test_the_table_by_prompt_is_that_of_the_images(drawn):
  scores = scores_of(drawn[0])
  file = drawn[0] / "evaluation" / "per_prompt.parquet"
  rows = parquet.read_table(file).to_pylist()
  assert [(r["candidate"], r["row"]) for r in rows] == [
    (name, row) for name in ("base", "other") for row in range(4)
  ]
  base, other = (scores[name].reshape(4, SEEDS) for name in ("base", "other"))
  mine = rows[4:]
  assert [row["prompt"] for row in mine] == list(PROMPTS)
  assert {row["images"] for row in rows} == {SEEDS}
  for key, expected in (
    ("mean", other.mean(axis=1)),
    ("median", np.median(other, axis=1)),
    ("difference", (other - base).mean(axis=1)),
    ("won", (other > base).mean(axis=1)),
  ):
    np.testing.assert_allclose([row[f"digits_taste_{key}"] for row in mine], expected)
  assert {row["digits_taste_won"] for row in rows[:4]} == {0.5}


def test_the_account_says_how_everything_was_made(drawn):
  about = json.loads((drawn[0] / "evaluation" / "about.json").read_text())
  assert about["drawing"]["sampler"] == "ddim" and about["drawing"]["steps"] == 2
  assert about["prompts"]["repeated"] == 1 and about["prompts"]["prompts"] == 4
  assert about["scorers"]["digits_taste"]["preprocessing"] == "none"
  assert about["statistics"]["correction"] == "holm"
  assert about["versions"]["jax"] == jax.__version__
  values = scores_of(drawn[0])["other"]
  found = next(row for row in about["scores"] if row["candidate"] == "other")
  assert found["median"] == pytest.approx(np.median(values))
  assert found["deviation"] == pytest.approx(np.std(values, ddof=1))
  for one in about["candidates"].values():
    assert one["kind"] == "pipeline" and len(one["weights"]) == 16
    # All but the first batch, which compiles.
    assert one["images"] == N - 3 and one["batch_size"] == 3
    assert one["images_per_second"] == pytest.approx(one["images"] / one["seconds"])
    assert f"{one['images_per_second']:.3g} images/s on {one['devices']}" in drawn[1]
  tables = (drawn[0] / "evaluation" / "summary.md").read_text()
  assert "| median_of_k | other | base | digits_taste |" in tables
  assert "corrected (holm) over the 2 rows" in tables
  assert "prompts: 4, 1 repeated" in drawn[1]


def test_a_stop_keeps_what_is_drawn_and_the_same_command_goes_on(
  tiny_world, other, drawn, tmp_path
):
  workdir = tmp_path / "again"
  shutil.copytree(drawn[0], workdir)
  folder = workdir / "evaluation"
  for number in (1, 4, 5, 6, 10):
    (folder / "other" / f"{number:05d}.png").unlink()
  kept = (folder / "base" / "00000.png").stat().st_mtime_ns
  (workdir / "STOP").touch()
  asked = {"base": tiny_world.pipeline, "other": other}
  outcome = run(tiny_world, workdir, BOTH, **asked)
  assert outcome.code == 3, outcome.text
  assert "7 of 12 images of other are drawn. The same command goes on" in outcome.text
  outcome = run(tiny_world, workdir, BOTH, **asked)
  assert outcome.code == 0, outcome.text
  assert "drawing base" not in outcome.text
  assert "drawing other  12/12" in outcome.text
  assert (folder / "base" / "00000.png").stat().st_mtime_ns == kept
  # Other images share their batch now: the same up to reduction order.
  mine, theirs = (pixels(w / "evaluation" / "other") for w in (workdir, drawn[0]))
  assert np.abs(mine.astype(int) - theirs).max() <= 1


@pytest.fixture(scope="module")
def folders(tiny_world, drawn, tmp_path_factory):
  """An evaluation of the drawn images as folders, under names and prompts from hell."""
  home = tmp_path_factory.mktemp("folders")
  shutil.copytree(drawn[0] / "evaluation" / "base", home / "base")
  shutil.copytree(drawn[0] / "evaluation" / "other", home / "by<i>others")
  given = [PROMPTS[0], HOSTILE, PROMPTS[2], PROMPTS[3]]
  rude = home / "by<i>others"
  seeds = [5, 6, 7, 5, 6, 7, 8, 9, 10, 5, 6, 7]
  index = []
  for i, seed in enumerate(seeds):
    (rude / f"{i:05d}.png").rename(rude / f"<{i}>&'.png")
    index.append({"prompt": given[i // SEEDS], "seed": seed, "file": f"<{i}>&'.png"})
  (rude / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in index))
  file = home / "<b>set\x1b[31m.jsonl"
  rows = [
    {"prompt": p, "category": "<i>x" if i % 2 else "y"} for i, p in enumerate(given)
  ]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = main.load_config(str(tiny_world.config))
  config.model.path = ""  # nothing is drawn
  config.eval.prompts = str(file)
  config.eval.seeds, config.eval.first_seed = SEEDS, 5
  config.eval.scorers = ("digits_taste",)
  config.eval.protocols = ("same_seed", "median_of_k")
  with config.unlocked():
    config.eval.candidates = {"base": str(home / "base"), RUDE: str(rude)}
  workdir = home / "evaluated"
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    evaluation = evaluate.run(config, workdir)
  return workdir, evaluation, out.getvalue()


def test_folders_of_images_compare_as_their_drawer_does(drawn, folders):
  workdir, evaluation, _ = folders
  mine, theirs = (
    json.loads((w / "summary.json").read_text()) for w in (workdir, drawn[0])
  )
  for one, two in zip(mine, theirs, strict=True):
    for key in ("win_rate", "ties", "mean_candidate", "median_baseline", "protocol"):
      assert one[key] == two[key], key
  assert (evaluation.images[RUDE][np.array([[3, 0]])] == pixels(
    drawn[0] / "evaluation" / "other"
  )[np.array([[3, 0]])]).all()  # fmt: skip
  about = json.loads((workdir / "evaluation" / "about.json").read_text())
  assert [row["category"] for row in about["by_category"]] == ["y", "<i>x"]
  assert [row["n"] for row in about["by_category"]] == [6, 6]
  assert about["candidates"]["base"]["kind"] == "images"
  assert about["left_out"] == 0


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_what_strangers_wrote_is_text_everywhere(folders, tmp_path):
  """Prompt, candidate, category, set and file names: in every page, table and log."""
  workdir, evaluation, printed = folders
  folder = workdir / "evaluation"
  clean = pages.printable(HOSTILE)
  # The console: nothing that a terminal obeys.
  assert "\ufffd[31m" in printed and not CONTROLS.search(printed)
  # JSON: escapes alone.
  for file in (workdir / "summary.json", folder / "about.json"):
    text = file.read_text()
    assert text.isascii() and not CONTROLS.search(text)
  assert json.loads((workdir / "summary.json").read_text())[0]["candidate"] == RUDE
  # Markdown and TensorBoard, which renders it.
  tables = (folder / "summary.md").read_text()
  assert "<" not in tables and not CONTROLS.search(tables)
  assert "a&lt;b onload=" in tables
  (events,) = (folder / "tensorboard").glob("events.*")
  written = events.read_bytes()
  assert b"a&lt;b onload=" in written and b"<b " not in written
  assert b"\x1b[31m" not in written
  # LaTeX.
  lines = (folder / "summary.tex").read_text()
  assert not CONTROLS.search(lines) and "a\\textless{}b onload=" in lines
  assert "[31m\\textbar{}\\_\\&\\$?" in lines
  # The gallery.
  page = (folder / "gallery.html").read_text()
  assert page.count("<script") == 2 and "<script>alert" not in page
  assert "<b " not in page and "<i>" not in page and not CONTROLS.search(page)
  data = re.search(r'id="data">(.*?)</script>', page).group(1)
  assert json.loads(data)["rows"][3]["p"] == clean
  # The report of a run.
  report = tmp_path / "report.html"
  grid = pages.ImageGrid(
    list(evaluation.images),
    [HOSTILE],
    [[5, 6, 7]],
    {name: images[np.array([[3, 4, 5]])] for name, images in evaluation.images.items()},
  )
  pages.write_run_report(
    report, RunReport(title="x", grid=grid, win_rates=evaluation.rows)
  )
  page = report.read_text()
  assert page.count("<script") == 1 and "<b " not in page and not CONTROLS.search(page)
  # The tables of data hold what came.
  found = parquet.read_table(folder / "per_image.parquet")["prompt"].to_pylist()
  assert HOSTILE in found


def test_images_that_are_not_there_are_refused_or_left_out_for_all(
  tiny_world, drawn, tmp_path
):
  for name in ("base", "other"):
    shutil.copytree(drawn[0] / "evaluation" / name, tmp_path / name)
  (tmp_path / "other" / "00004.png").unlink()
  broken = tmp_path / "base" / "00007.png"
  broken.write_bytes(broken.read_bytes()[:100])
  asked = {"base": tmp_path / "base", "other": tmp_path / "other"}
  outcome = run(tiny_world, tmp_path / "a", **asked)
  assert outcome.code == 2
  assert "of the 12 images asked for, 0 are missing" in outcome.text
  assert "1 cannot be read (first: 00007.png: cannot be decoded" in outcome.text
  outcome = run(tiny_world, tmp_path / "a", "eval.missing=leave_out", **asked)
  assert outcome.code == 0, outcome.text
  assert outcome.text.count("left out for all candidates") == 2
  about = json.loads((tmp_path / "a" / "evaluation" / "about.json").read_text())
  assert (about["cases"], about["left_out"]) == (10, 2)
  assert about["candidates"]["other"]["images"]["first_missing"] == [4]
  kept = [i for i in range(N) if i not in (4, 7)]
  scores = scores_of(drawn[0])
  (row,) = json.loads((tmp_path / "a" / "summary.json").read_text())
  assert row["n"] == 10
  assert row["win_rate"] == np.mean(scores["other"][kept] > scores["base"][kept])


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory):
  """A run's workdir with a checkpoint: parameters 1.1 and EMA 1.2 times the base's."""
  workdir = tmp_path_factory.mktemp("trained")
  config = main.load_config(str(tiny_world.config))
  mesh = parallel.make_mesh()
  plan = blueprint.make_blueprint(config, mesh)
  base = pretrained.load(tiny_world.pipeline, "unet").params
  filled = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.like)
  state = dataclasses.replace(
    filled,
    step=np.int32(7),
    params=jax.tree.map(lambda x: 1.1 * np.asarray(x), base),
    ema=jax.tree.map(lambda x: 1.2 * np.asarray(x), base),
  )
  state = parallel.put(state, jax.tree.map(lambda x: x.sharding, plan.like))
  run_identity.remember_config(config, workdir)
  checkpoints = Checkpoints(workdir / "checkpoints")
  checkpoints.save(state, {})
  checkpoints.close()
  return workdir


@pytest.mark.parametrize(
  ("suffix", "factor"), [("", 1.2), ("@7:raw", 1.1), (":ema", 1.2)]
)
def test_of_a_run_step_and_weights_can_be_chosen(tiny_world, trained, suffix, factor):
  params, identity = candidates.load_params(f"{trained}{suffix}", parallel.make_mesh())
  base = pretrained.load(tiny_world.pipeline, "unet").params
  kernel = np.asarray(params["conv_in"]["kernel"])
  np.testing.assert_allclose(
    kernel, factor * np.asarray(base["conv_in"]["kernel"]), rtol=1e-6
  )
  assert identity == f"{trained}@7{suffix.removeprefix('@7')}"


def test_a_location_that_is_there_by_its_whole_name_is_that(tmp_path):
  (tmp_path / "run:raw").mkdir()
  assert candidates.parse(str(tmp_path / "run:raw")).weights == ""
  assert candidates.parse("owner/name@main").place == "owner/name@main"


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (("eval.candidates.x={run}@8",), ("eval.candidates.x", "step 8; it has: 7")),
    (("eval.candidates.x={run}:rew",), ("'rew'", "did you mean 'raw'?")),
    (("eval.candidates.x={pipeline}:raw",), ("only a run has checkpoints",)),
    (("eval.candidates.x={pipeline}@3",), ("only a run has checkpoints",)),
    (("eval.candidates.x={folder}/pipelin",), ("did you mean 'pipeline'?",)),
    (("eval.candidates.x={folder}",), ("none of what can be compared", "a LoRA file")),
    (("eval.candidates.x=nobody/nothing",), ("'nobody/nothing' is not a folder",)),
    (("eval.candidates.x={lora}", "model.path="), ("is a LoRA file", "set model.path")),
    (("eval.candidates.x=",), ("eval.candidates.x is empty",)),
    (("eval.baseline=bas",), ("eval.baseline 'bas'; did you mean 'base'?",)),
    (("eval.missing=ignore",), ("eval.missing 'ignore'", "Known: leave_out, refuse")),
    (("eval.protocols=('same_sed',)",), ("'same_sed'; did you mean 'same_seed'?",)),
    (("eval.protocols=()",), ("eval.protocols is empty",)),
    (("eval.correction=hol",), ("'hol'; did you mean 'holm'?",)),
    (("eval.median_by=digits",), ("eval.median_by 'digits'",)),
    (("eval.seeds=0",), ("eval.seeds=0", "at least 1 image")),
    (("eval.prompts=()",), ("eval.prompts is empty",)),
    (("eval.prompts_sha256=00",), ("eval.prompts_sha256 asks for 00",)),
    (("eval.scorers=()",), ("eval.scorers is empty",)),
  ],
)
def test_refusals(tiny_world, trained, tmp_path, overrides, words):
  lora = tmp_path / "x.safetensors"
  lora.touch()
  places = {
    "run": trained,
    "pipeline": tiny_world.pipeline,
    "folder": tiny_world.folder,
    "lora": lora,
  }
  filled = [override.format(**places) for override in overrides]
  outcome = run(tiny_world, tmp_path / "w", *filled, base=tiny_world.pipeline)
  assert outcome.code == 2 and "Traceback" not in outcome.text
  for word in words:
    assert word in outcome.text, outcome.text


def test_another_architecture_is_refused_by_its_first_parameter():
  mine, theirs = (
    {"a": np.zeros(2), "b": np.zeros(3)},
    {"a": np.zeros(2), "b": np.zeros(4)},
  )
  candidates.refuse_other_architecture(mine, mine, "x")
  with pytest.raises(
    UserError, match=r"not of model.path's arch.*'b': \(3,\), expected \(4"
  ):
    candidates.refuse_other_architecture(mine, theirs, "x")


def test_folder_names_are_kept_apart_and_inside():
  names = [
    "base",
    "lpo, drift of dpo",
    "..",
    ".",
    "tensorboard",
    "",
    "a/b",
    "a\\b",
    "a\x00b",
    RUDE,
    "ä",
  ]
  folders = [candidates.folder_name(name) for name in names]
  assert folders[:2] == names[:2] and len(set(folders)) == len(names)
  assert all(re.fullmatch(r"[\w ,+=()-]+", name, re.ASCII) for name in folders)
