"""The quickstart as a new user runs it, and every refusal that the front door has."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from lpo_jax import generation, main, parallel, pretrained
from lpo_jax.data import sources
from lpo_jax.training import checkpoint
from lpo_jax.training.report import read_metrics

torch = pytest.importorskip("torch")

ROOT = pathlib.Path(__file__).parent.parent
LOCATION = f"{ROOT / 'configs' / 'quickstart.py'}:smoke"
SMOKE = main.load_config(LOCATION)
WORLD, STEPS = SMOKE.quickstart, SMOKE.train.total_steps
METHODS, SCORERS = tuple(WORLD.methods), tuple(SMOKE.eval.scorers)
DRAWN = len(SMOKE.eval.prompts) * SMOKE.eval.seeds  # images per candidate
ROW = {
  "candidate", "baseline", "scorer", "n", "win_rate", "ci_low", "ci_high", "ties",
  "mean_candidate", "mean_baseline",
}  # fmt: skip
# Pick-a-Pic v1 and v2, column by column.
PICKAPIC = {
  "are_different": "bool",
  "best_image_uid": "string",
  "caption": "string",
  "created_at": "timestamp[ns]",
  "has_label": "bool",
  "image_0_uid": "string",
  "image_0_url": "string",
  "image_1_uid": "string",
  "image_1_url": "string",
  "jpg_0": "binary",
  "jpg_1": "binary",
  "label_0": "double",
  "label_1": "double",
  "model_0": "string",
  "model_1": "string",
  "ranking_id": "int64",
  "user_id": "int64",
  "num_example_per_prompt": "int64",
  "__index_level_0__": "int64",
}


# The quickstart.


def quickstart(folder):
  """Runs the shortened quickstart in `folder`, which it fills."""
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "lpo_jax.main",
      f"--config={LOCATION}",
      f"--workdir={folder / 'run'}",
    ],
    cwd=folder,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """The run and its workdir, from an empty directory."""
  folder = tmp_path_factory.mktemp("quickstart")
  done = quickstart(folder)
  assert done.returncode == 0, done.stdout + done.stderr
  return done, folder / "run"


@pytest.fixture(scope="module")
def workdir(first):
  return first[1]


@pytest.fixture(scope="module")
def summary(workdir):
  return json.loads((workdir / "summary.json").read_text("utf-8"))


def test_says_what_it_does_and_where_things_are(first):
  done, workdir = first
  assert list(workdir.parent.iterdir()) == [workdir]  # nothing beside the workdir
  stages = re.findall(r"^== (.+)$", done.stdout, re.MULTILINE)
  assert stages == [
    "candidates and judgements", "inspect", "cache",
    *(f"train {method}" for method in METHODS), "evaluate", f"export {WORLD.publish}",
  ]  # fmt: skip
  for name in ("report.html", "summary.json", f"{WORLD.publish}/export"):
    assert str(workdir / name) in done.stdout
  assert "base model: the one that ships" in done.stdout
  assert "Traceback" not in done.stderr
  timings = json.loads((workdir / "timings.json").read_text())
  assert list(timings) == stages and min(timings.values()) > 0


def test_the_report_is_one_file(workdir):
  page = (workdir / "report.html").read_text("utf-8")
  loads = re.findall(r"(?:src|srcset|poster|data)\s*=\s*[\"']([^\"']{0,80})", page)
  loads += re.findall(r"<link[^>]*href\s*=\s*[\"']([^\"']{0,80})", page)
  loads += re.findall(r"url\(\s*[\"']?([^\"')]{0,80})", page)
  assert loads and all(load.startswith(("data:", "#")) for load in loads)
  assert "@import" not in page and "<script src" not in page
  for word in ("LPO", "DPO", "digits_taste", "digits_legibility", "win rate"):
    assert word in page, word
  data_report = (workdir / "data_report.html").read_text("utf-8")
  assert not re.search(r"(?:src|url\()[=\"' ]*https?:", data_report)


def test_the_summary_has_every_comparison_with_an_interval(workdir, summary):
  assert all(row.keys() >= ROW for row in summary)
  for row in summary:
    figures = {key: row[key] for key in ROW - {"candidate", "baseline", "scorer"}}
    assert all(math.isfinite(value) for value in figures.values()), row
    assert 0 <= row["ci_low"] <= row["win_rate"] <= row["ci_high"] <= 1, row
    assert row["n"] == DRAWN and 0 <= row["ties"] <= row["n"]
  compared = {(r["candidate"], r["baseline"], r["scorer"]) for r in summary}
  for scorer in SCORERS:
    assert {(m, "base", scorer) for m in METHODS} <= compared
    assert (*reversed(METHODS), scorer) in compared


def test_the_win_rates_are_those_of_the_scores(workdir, summary):
  from pyarrow import parquet

  table = parquet.read_table(workdir / "evaluation" / "per_image.parquet")
  of = {name: np.array(table[name].to_pylist()) for name in table.column_names}
  for row in summary:
    mine, theirs = (
      of[row["scorer"]][of["candidate"] == row[who]]
      for who in ("candidate", "baseline")
    )
    wins, ties = np.sum(mine > theirs), np.sum(mine == theirs)
    assert row["ties"] == ties
    assert row["win_rate"] == pytest.approx((wins + ties / 2) / len(mine))
    assert row["mean_candidate"] == pytest.approx(mine.mean())


def test_the_judgements_have_exactly_pickapics_columns(workdir):
  from pyarrow import parquet

  table = parquet.read_table(workdir / "judgements" / "judgements.parquet")
  assert {f.name: str(f.type) for f in table.schema} == PICKAPIC
  assert table.column_names == list(PICKAPIC)
  rows = table.to_pylist()
  # The winner stays: each image but a session's first is compared once as newcomer.
  assert len(rows) == WORLD.sessions * (WORLD.images_per_session - 1)
  assert {row["ranking_id"] for row in rows} == set(range(WORLD.sessions))
  for row in rows:
    labels = (row["label_0"], row["label_1"])
    best = {(1, 0): row["image_0_uid"], (0, 1): row["image_1_uid"], (0.5, 0.5): "tie"}
    assert row["best_image_uid"] == best[labels]
    assert row["has_label"] and row["jpg_0"] and row["jpg_1"]
  assert 0 < sum(row["label_0"] == 0.5 for row in rows) < len(rows) / 2


@pytest.mark.parametrize("method", METHODS)
def test_every_update_is_logged(workdir, method):
  rows = read_metrics(workdir / method / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  for row in rows:
    # A bin that no list of the update fell into has no number.
    assert all("/" in name for name, value in row.items() if value is None)
    assert all(math.isfinite(value) for value in row.values() if value is not None)
    assert row["images_per_second"] > 0 and 0 <= row["data_wait_share"] <= 1
  assert rows[0]["margin"] == rows[0]["drift"] == 0  # nothing has moved yet
  assert rows[-1]["drift"] > 1e-8
  assert list((workdir / method / "tensorboard").glob("events.*"))
  written = json.loads((workdir / method / "config.json").read_text("utf-8"))
  assert written["objective"] == {"name": method, "beta": SMOKE.objective.beta}
  assert written["train"]["total_steps"] == STEPS


def test_dpo_begins_at_log_two(workdir):
  loss = read_metrics(workdir / "dpo" / "metrics.jsonl")[0]["loss"]
  assert loss == pytest.approx(math.log(2), rel=1e-5)


def test_both_methods_saw_as_many_images(workdir):
  configs = [json.loads((workdir / m / "config.json").read_text()) for m in METHODS]
  for config in configs:
    config["objective"].pop("name")
    config["data"].pop("strategy")
  assert configs[0] == configs[1]


def test_one_cache_serves_both(workdir):
  manifest = json.loads((workdir / "cache" / "manifest.json").read_text("utf-8"))
  assert manifest["counts"]["images"] == WORLD.sessions * WORLD.images_per_session
  assert manifest["counts"]["bad_images"] == 0
  assert manifest["moments"]["shape"] == [8, 8, 8]
  assert manifest["preprocessing"]["resolution"] == 32
  assert len(list((workdir / "cache").glob("lists-*.npz"))) == len(METHODS)
  assert (workdir / "cache" / "bad_images.jsonl").read_text() == ""


def test_diffusers_draws_what_we_draw(workdir):
  """The export in StableDiffusionPipeline on PyTorch, from the same latents."""
  import diffusers

  torch.set_num_threads(2)
  folder = workdir / WORLD.publish / "export"
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
  prompts, seeds = ["seven written by hand", "a handwritten two"], [3, 4]
  settings = {name: SMOKE.eval[name] for name in ("steps", "guidance_scale")}
  mesh = parallel.make_mesh()
  generator = generation.Generator(folder, mesh=mesh, batch_size=2, **settings)
  params = parallel.put(
    pretrained.load(folder, "unet").params,
    parallel.param_shardings(generator.unet.abstract_params, mesh),
  )
  ours = generator(params, prompts, seeds).astype(np.int32)
  latents = generation.initial_latents(prompts, seeds, generator.latent_shape)
  theirs = pipeline(
    prompts,
    num_inference_steps=settings["steps"],
    guidance_scale=settings["guidance_scale"],
    latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
    output_type="np",
  ).images
  theirs = np.round(theirs * 255).astype(np.int32)
  assert ours.shape == theirs.shape == (2, 32, 32, 3)
  assert theirs.std() > 10  # not an empty page
  assert np.abs(ours - theirs).max() <= 2


def test_the_export_is_not_the_base(workdir):
  config = json.loads((workdir / WORLD.publish / "config.json").read_text("utf-8"))
  base = pretrained.load(config["model"]["path"], "unet").params
  tuned = pretrained.load(workdir / WORLD.publish / "export", "unet").params
  assert not np.array_equal(base["conv_out"]["kernel"], tuned["conv_out"]["kernel"])
  for name in ("vae", "text_encoder"):
    prints = [
      pretrained.fingerprint(folder, name)
      for folder in (config["model"]["path"], workdir / WORLD.publish / "export")
    ]
    assert prints[0] == prints[1]


def test_the_second_time_nothing_is_redone(first, workdir):
  kept = [
    "judgements/judgements.parquet",
    "cache/manifest.json",
    *(f"{m}/metrics.jsonl" for m in METHODS),
    *(f"evaluation/{who}/00007.png" for who in ("base", *METHODS)),
  ]
  before = {name: (workdir / name).stat().st_mtime_ns for name in kept}
  done = quickstart(workdir.parent)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "judgements are there" in done.stdout
  assert "cache is up to date" in done.stdout
  assert done.stdout.count(f"already trained to step {STEPS}") == len(METHODS)
  assert "compiling" not in done.stdout and "drawing" not in done.stdout
  assert before == {name: (workdir / name).stat().st_mtime_ns for name in kept}
  # The report is written again, from the same figures.
  assert "digits_taste" in (workdir / "report.html").read_text("utf-8")


def test_another_world_in_the_same_place_is_refused(workdir):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "lpo_jax.main",
      "--config=quickstart.py:smoke",
      f"--workdir={workdir}",
      "--config.quickstart.temperature=9.0",
    ],
    cwd=workdir.parent,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert f"quickstart.temperature was {WORLD.temperature}, is 9.0" in done.stderr
  assert "another --workdir" in done.stderr


# The command line.


def refused(outcome, *words):
  """Asserts exit 2 and one paragraph with these words, without a traceback."""
  assert outcome.code == 2, outcome.text
  assert "Traceback" not in outcome.text
  for word in words:
    assert word in outcome.text, f"{word!r} is not in: {outcome.text}"


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("objective.betaa=1", ("'betaa'", "did you mean 'beta'?")),
    ("objective.name=lop", ("'lop'", "did you mean 'lpo'?")),
    ("noising.name=foward", ("'foward'", "did you mean 'forward'?")),
    ("trian.total_steps=3", ("'trian'", "did you mean 'train'?")),
    ("train.total_stepz=3", ("did you mean 'train.total_steps'?",)),
    ("train.total_steps=many", ("expected int (now 5), came str",)),
    ("train.total_steps=2.5", ("expected int (now 5), came float",)),
    ("train=3", ("train is a section", "total_steps")),
    ("seed.x=3", ("config key seed is a value", "'x'")),
    ("train.total_steps=0", ("train.total_steps=0: expected at least 1",)),
    ("train.checkpoint_every=0", ("train.checkpoint_every=0", "at least 1")),
    ("train.ema=1.5", ("train.ema=1.5", "below 1")),
    ("train.microbatch=3", ("train.microbatch=3", "divisor", "=16")),
    ("train.images_per_update=4", ("longest list has 5 images", "images_per_update=4")),
    ("train.optimizer=adam", ("'adam'", "did you mean 'adamw'?")),
    ("train.optimizer_args.momentum=1", ("'momentum'", "weight_decay")),
    ("train.trainable=(('(',True),)", ("trainable rules", "(regex, value) pairs")),
    ("model.dtype=float3", ("'float3'", "did you mean 'float32'?")),
    ("model.remat=block", ("'block'", "'blocks'? Known: blocks, dots, full, none")),
    ("model.scan=stack", ("'stack'", "did you mean 'stacks'? Known: none, stacks")),
    ("model.path=", ("model.path is not set",)),
    ("model.path=/nowhere", ("'/nowhere' does not exist",)),
    ("mesh.data=3", ("mesh.data=3", "does not cover the 1 device(s)")),
    ("data.cache=/nowhere", ("no finished cache in /nowhere", "--job cache")),
    ("data.strategy=choice", ("has no lists", "--job cache")),
  ],
)  # fmt: skip
def test_settings_that_cannot_be_used(tiny_cache, tmp_path, override, words):
  refused(tiny_cache.run(tmp_path / "run", override), *words)
  # What could not start does not stand in the way of the repaired command.
  assert not (tmp_path / "run" / "config.json").exists()


def test_command_lines_that_cannot_be_used(tiny_world, front_door, tmp_path):
  config, workdir = f"--config={tiny_world.config}", f"--workdir={tmp_path}"
  refused(front_door(), "--config", "--workdir")
  refused(front_door(config, workdir, "--job=trian"), "'trian'; did you mean 'train'?")
  refused(
    front_door(config, workdir, "--jobb=train"), "'--jobb'; did you mean '--job'?"
  )
  refused(front_door(config, workdir, "--config.seed"), "--config.seed has no value")
  refused(
    front_door("--config=configs/quickstrat.py", workdir),
    "no config file 'configs/quickstrat.py'; did you mean configs/quickstart.py?",
  )
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  refused(front_door(f"--config={tmp_path}/broken.py", workdir), "SyntaxError")
  (tmp_path / "file").touch()
  refused(
    front_door(config, f"--workdir={tmp_path}/file/run", "--job=cache"),
    "cannot make --workdir",
  )


def test_a_path_with_its_own_equals_sign(tiny_world, tmp_path):
  outcome = tiny_world.run(tmp_path, "data.path=/no/such=place", job="inspect")
  refused(outcome, "/no/such=place")


# Data.


@pytest.fixture
def damaged(tiny_world, tmp_path):
  """A function that writes judgements with some columns replaced; returns the file."""

  def write(**columns):
    path = tmp_path / "damaged.parquet"
    sources.write_pickapic(path, **{**tiny_world.judgements, **columns})
    return path

  return write


def cache(world, tmp_path, path, *overrides):
  """Runs the cache job on `path`."""
  place = f"data.cache={tmp_path / 'cache'}"
  return world.run(tmp_path, f"data.path={path}", place, *overrides, job="cache")


def test_no_data(tiny_world, tmp_path):
  refused(cache(tiny_world, tmp_path, ""), "data.path is not set")
  refused(cache(tiny_world, tmp_path, "/nowhere"), "/nowhere")


def test_a_truncated_file(tiny_world, tmp_path):
  whole = tiny_world.parquet.read_bytes()
  path = tmp_path / "half.parquet"
  path.write_bytes(whole[: len(whole) // 2])
  for job in ("inspect", "cache"):
    place = f"data.cache={tmp_path / 'cache'}"
    outcome = tiny_world.run(tmp_path, f"data.path={path}", place, job=job)
    refused(outcome, str(path), "truncated")


def test_an_image_that_will_not_decode(tiny_world, damaged, tmp_path):
  rows = tiny_world.judgements
  # The best of a list of three whose other two tie, in one judgement.
  jpg_0 = [
    b"not an image" if uid == "5-0" else data
    for uid, data in zip(rows["image_0_uid"], rows["jpg_0"], strict=True)
  ]
  path = damaged(jpg_0=jpg_0)
  # 1 of 42 is more than the 1 % of the default.
  outcome = cache(tiny_world, tmp_path, path)
  refused(
    outcome, "1 of 42 images", "data.max_bad_images=0.01", "5-0: cannot be decoded"
  )
  bad_file = tmp_path / "cache" / "bad_images.jsonl"
  assert [json.loads(line)["uid"] for line in bad_file.read_text().splitlines()] == [
    "5-0"
  ]
  outcome = cache(tiny_world, tmp_path, path, "data.max_bad_images=0.03")
  assert outcome.code == 0, outcome.text
  assert "41 images, 1 bad (bad_images.jsonl)" in outcome.text
  assert json.loads(bad_file.read_text())["uid"] == "5-0"
  (described,) = (tmp_path / "cache").glob("lists-*.json")
  lost = json.loads(described.read_text())["lost"]
  assert lost == {
    "items": 1,
    "lists_shortened": 0,
    "lists_too_short": 0,
    "lists_all_tied": 1,
  }


def test_judgements_without_a_list_in_them(tiny_world, damaged, tmp_path):
  rows = tiny_world.judgements
  count = len(rows["caption"])
  alone = damaged(image_1_uid=rows["image_0_uid"], jpg_1=rows["jpg_0"])
  outcome = cache(tiny_world, tmp_path, alone)
  refused(outcome, "no ranked list", f"{count} same_image", "at least 2 images")
  unlabelled = damaged(label_0=[math.nan] * count)
  outcome = cache(tiny_world, tmp_path, unlabelled)
  refused(outcome, "no ranked list", f"{count} unlabelled", "check the labels")
  all_tied = damaged(label_0=[0.5] * count)
  outcome = cache(tiny_world, tmp_path, all_tied)
  refused(outcome, "no ranked list", "all_tied")
  assert not (tmp_path / "cache" / "manifest.json").exists()


def test_lists_of_one_image(tiny_world, tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  rows = tiny_world.judgements
  table = {
    "prompt": rows["caption"][:3],
    "image_uids": [[uid] for uid in rows["image_0_uid"][:3]],
    "images": [[data] for data in rows["jpg_0"][:3]],
    "ranks": [[0]] * 3,
  }
  parquet.write_table(pa.table(table), tmp_path / "lists.parquet")
  outcome = cache(tiny_world, tmp_path, tmp_path / "lists.parquet")
  refused(outcome, "no ranked list", "3 single_image")


# Running.


def test_another_run_in_the_same_workdir(tiny_cache, tmp_path):
  settings = ("train.total_steps=1",)
  assert tiny_cache.run(tmp_path, *settings).code == 0
  refused(
    tiny_cache.run(tmp_path, *settings, "seed=1"),
    f"{tmp_path} holds another run: seed differ",
    "seed was 0, is 1",
    "another --workdir",
  )
  refused(tiny_cache.run(tmp_path, *settings, "objective.beta=7.0"), "objective.beta")
  # What does not change the run may change.
  assert (
    tiny_cache.run(tmp_path, *settings, "train.keep_last=3", "eval.steps=3").code == 0
  )


def test_an_export_of_a_half_precision_pipeline_fits_together(tiny_cache, tmp_path):
  """A half text encoder beside an fp32 UNet would fail at diffusers' first prompt."""
  half = tmp_path / "half"
  parts = {
    name: pretrained.load(tiny_cache.pipeline, name)
    for name in ("unet", "vae", "text_encoder")
  }
  pretrained.save_pipeline(tiny_cache.pipeline, half, parts, dtype=np.float16)
  # The shared cache is of other weights by their fingerprints.
  settings = (f"model.path={half}", "train.total_steps=1", f"data.cache={half}/cache")
  for job in ("cache", "train", "export"):
    outcome = tiny_cache.run(tmp_path, *settings, job=job)
    assert outcome.code == 0, outcome.text
  assert "diffusers predicts the same" in outcome.text
  for name in ("unet", "text_encoder"):
    part = pretrained.load(tmp_path / "export", name, dtype=None)
    assert {str(x.dtype) for x in jax.tree.leaves(part.params)} == {"float32"}
  half_text = pretrained.load(half, "text_encoder").params
  text = pretrained.load(tmp_path / "export", "text_encoder").params
  assert jax.tree.all(jax.tree.map(np.array_equal, text, half_text))


@pytest.fixture
def breakable(tiny_cache, tmp_path):
  """A copy of the pipeline, and a function that puts inf into it or takes it out."""
  folder = tmp_path / "pipeline"
  shutil.copytree(tiny_cache.pipeline, folder)
  whole = pretrained.load(folder, "unet")

  def damage(value):
    # Not the first number, by which a run knows its base again.
    bias = np.array(whole.params["conv_out"]["bias"])
    bias[1:] = value
    params = {**whole.params, "conv_out": {**whole.params["conv_out"], "bias": bias}}
    part = pretrained.Part("unet", whole.config, params, whole.model)
    pretrained.save(folder, part if value else whole)

  return folder, damage


def test_a_loss_that_is_no_number_stops_before_it_is_saved(
  tiny_cache, breakable, tmp_path
):
  folder, damage = breakable
  run = tmp_path / "run"
  settings = (f"model.path={folder}", "train.checkpoint_every=1")
  assert tiny_cache.run(run, *settings, "train.total_steps=2").code == 0
  damage(math.inf)  # of the reference, from now on
  outcome = tiny_cache.run(run, *settings, "train.total_steps=4")
  refused(outcome, "at step 3", "The last checkpoint is from before", "learning_rate")
  rows = read_metrics(run / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert rows[-1]["loss"] is None
  checkpoints = checkpoint.Checkpoints(run / "checkpoints")
  assert checkpoints.latest == 2
  checkpoints.close()
  damage(0)
  outcome = tiny_cache.run(run, *settings, "train.total_steps=4")
  assert outcome.code == 0, outcome.text
  rows = read_metrics(run / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert all(math.isfinite(row["loss"]) for row in rows)


def test_or_skips_it_where_that_is_asked_for(tiny_cache, breakable, tmp_path):
  folder, damage = breakable
  run = tmp_path / "run"
  settings = (f"model.path={folder}", "train.on_nonfinite=skip")
  assert tiny_cache.run(run, *settings, "train.total_steps=2").code == 0
  damage(math.inf)
  outcome = tiny_cache.run(run, *settings, "train.total_steps=5")
  assert outcome.code == 0, outcome.text
  assert outcome.text.count("the update is skipped") == 3
  rows = read_metrics(run / "metrics.jsonl")
  assert [row["loss"] is None for row in rows] == [False] * 2 + [True] * 3
  damage(0)
  outcome = tiny_cache.run(run, *settings, "train.total_steps=6")
  assert outcome.code == 0, outcome.text
  after = read_metrics(run / "metrics.jsonl")[-1]
  assert math.isfinite(after["loss"]) and after["drift"] > 0
  # A run that only ever skips is told to stop.
  damage(math.inf)
  outcome = tiny_cache.run(run, *settings, "train.total_steps=40")
  refused(outcome, "11 steps in a row", "step 17", "learning_rate")
