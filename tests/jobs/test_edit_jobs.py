"""Edits through the front door: widen, generate, inspect, cache, train, evaluate, export."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lpo_jax import pretrained
from lpo_jax.configs import common
from lpo_jax.data import decoding, sources
from lpo_jax.data.image_folders import Case
from lpo_jax.jobs import evaluate, inspect_facts, sampling
from lpo_jax.jobs.quickstart_people import encode_png
from lpo_jax.scoring import digit_edits, digits
from lpo_jax.training.report import read_metrics
from lpo_jax.types import Prompt

DRAWING = ("eval.steps=2", "eval.guidance_scale=2.0", "eval.batch_size=4")
TEXTS = ("make it bold", "tilt it left")
IMAGES = 4


@pytest.fixture(scope="module")
def edits(tiny_world, tmp_path_factory):
  """An editing pipeline whose answers depend on the source, and rows of edits to make."""
  folder = tmp_path_factory.mktemp("edits")
  outcome = tiny_world.run(folder, job="widen")
  assert outcome.code == 0, outcome.text
  part = pretrained.load(folder / "editing_base", "unet")
  rng = np.random.default_rng(0)
  part.params["conv_in"]["kernel"] = rng.normal(
    0, 0.1, part.params["conv_in"]["kernel"].shape
  ).astype(np.float32)
  pretrained.save_pipeline(folder / "editing_base", folder / "pipeline", {"unet": part})
  shown = digits.real_digits()[0][:4]
  asked = [TEXTS[i % 2] for i in range(4)]
  right = digit_edits.edit(shown, asked)
  columns = {
    "instruction": asked,
    "cond_image": [encode_png(image) for image in shown],
    "target_image": [encode_png(image) for image in right],
  }
  parquet.write_table(pa.table(columns), folder / "rows.parquet")
  return folder, shown, right


def pixels(paths):
  return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_edits_are_compared_by_what_they_are_of(tiny_world, edits, tmp_path):
  folder, shown, right = edits
  shared = (
    *DRAWING,
    f"model.path={folder / 'pipeline'}",
    f"eval.prompts={folder / 'rows.parquet'}",
    "eval.scorers=('digits_edit','l1_source','l1_target')",
    f"eval.candidates.base={folder / 'pipeline'}",
    f"eval.candidates.unseeing={folder / 'editing_base'}",
  )
  outcome = tiny_world.run(tmp_path, *shared, job="evaluate")
  assert outcome.code == 0, outcome.text
  place = tmp_path / "evaluation"
  images = pixels(sorted((place / "base").glob("*.png")))
  rows = parquet.read_table(place / "per_image.parquet").to_pylist()[: len(images)]
  for name, other in (("l1_source", shown), ("l1_target", right)):
    wanted = np.abs(images / 255.0 - other / 255.0).mean((1, 2, 3))
    np.testing.assert_allclose([row[name] for row in rows], wanted, rtol=1e-6)
  asked = [TEXTS[i % 2] for i in range(4)]
  np.testing.assert_allclose(
    [row["digits_edit"] for row in rows], digit_edits.match(images, asked, [*shown])
  )
  summary = json.loads((tmp_path / "summary.json").read_text())
  for row in summary:
    assert row["image_guidance_scale"] == 1.5
    # L1 is won by the smaller one, and each digit is a unit, not each instruction.
    sign = -1 if row["scorer"].startswith("l1") else 1
    gap = sign * (row["mean_candidate"] - row["mean_baseline"])
    assert (row["n"], row["units"]) == (4, 4) and gap * (row["win_rate"] - 0.5) >= 0
  # The gallery shows the source left of each edit; other sources would draw again.
  assert "left of each edit its source" in (place / "gallery.html").read_text()
  drawn = json.loads((place / "base" / "drawing.json").read_text())
  assert drawn["image_guidance_scale"] == 1.5 and len(drawn["sources"]) == 16
  rows = [
    Prompt(text, source=encode_png(x)) for text, x in zip(asked, right, strict=True)
  ]
  others = sampling.decided_by(common.get_config(), rows)
  assert others["sources"] != drawn["sources"]
  assert sampling.decided_by(common.get_config(), [Prompt("a seven")]) == {}
  refused = tiny_world.run(tmp_path, *shared, "eval.scorers=('clip_caption',)",
                           job="evaluate")  # fmt: skip
  assert (
    refused.code == 2 and "needs a column target_caption, and 4 of 4" in refused.text
  )
  plain = (*shared, "eval.prompts=('make it bold',)", "eval.scorers=('digits_taste',)")
  refused = tiny_world.run(tmp_path, *plain, job="evaluate")
  assert refused.code == 2 and "edits images, and the prompts have none" in refused.text


def test_an_instruction_with_its_source_is_the_unit_of_intervals():
  """Of one instruction on 30 sources there are 30 units, not one."""
  cases = [
    Case(i, i, Prompt("make it bold", source=bytes([i + 1])), i) for i in range(30)
  ]
  scores = {
    "a": {"digits_edit": np.arange(30.0)},
    "b": {"digits_edit": np.full(30, 9.5)},
  }
  config = common.get_config()
  (row,) = evaluate.compare(config, scores, [("a", "b")], cases, set())
  assert (row["unit"], row["units"], row["win_rate"]) == ("prompt", 30, 20 / 30)


@pytest.fixture(scope="module")
def generated(tiny_world, edits, tmp_path_factory):
  """Ranked lists of the editor's own edits."""
  folder, _, _ = edits
  workdir = tmp_path_factory.mktemp("generated")
  outcome = tiny_world.run(
    workdir,
    *DRAWING,
    f"model.path={folder / 'pipeline'}",
    f"generate.prompts={folder / 'rows.parquet'}",
    f"generate.images_per_prompt={IMAGES}",
    "generate.scorers=('digits_edit',)",
    job="generate",
  )
  assert outcome.code == 0, outcome.text
  return workdir / "lists.parquet"


def test_generated_lists_are_edits_of_their_sources(edits, generated):
  _, shown, _ = edits
  rows = parquet.read_table(generated).to_pylist()
  assert [row["prompt"] for row in rows] == [TEXTS[i % 2] for i in range(4)]
  for row, source in zip(rows, shown, strict=True):
    images = np.stack([decoding.decode(data) for data in row["images"]])
    np.testing.assert_array_equal(decoding.decode(row["cond_image"]), source)
    scores = digit_edits.match(images, [row["prompt"]] * IMAGES, [source] * IMAGES)
    np.testing.assert_allclose(row["scores"], scores)
  assert len({uid for row in rows for uid in row["image_uids"]}) == 4 * IMAGES
  found = sources.read(generated)
  assert len(set(found.source_image.tolist())) == 4


def test_an_instruction_leaks_only_with_its_picture(edits, generated, tmp_path):
  folder, _, _ = edits
  source = sources.read(generated)
  found = inspect_facts.texts(source, str(folder / "rows.parquet"), "")
  assert (found["evaluation"], found["leaked"]) == (4, 4)
  others = digits.real_digits()[0][4:8]
  columns = {"instruction": TEXTS * 2, "cond_image": [encode_png(x) for x in others]}
  parquet.write_table(pa.table(columns), tmp_path / "others.parquet")
  found = inspect_facts.texts(source, str(tmp_path / "others.parquet"), "")
  assert (found["evaluation"], found["leaked"]) == (4, 0)


STEPS = 12
# The smoke form with one method fewer: compiling is what it takes time for.
ONE_METHOD = """
from lpo_jax.configs import edit_quickstart


def get_config(arg=""):
  config = edit_quickstart.get_config("smoke")
  with config.unlocked():
    del config.quickstart.methods["dpo"]
  return config
"""


@pytest.fixture(scope="module")
def quickstart(tiny_world, front_door, tmp_path_factory):
  """The editing quickstart's smoke form on the tiny pipeline, samples on the way."""
  workdir = tmp_path_factory.mktemp("quickstart")
  (workdir / "one_method.py").write_text(ONE_METHOD)
  outcome = front_door(
    f"--config={workdir / 'one_method.py'}",
    f"--workdir={workdir}",
    f"--config.model.path={tiny_world.pipeline}",
    f"--config.eval.every={STEPS}",
    f"--config.train.checkpoint_every={STEPS}",
    "--config.logging.report=",
  )
  assert outcome.code == 0, outcome.text
  return workdir


@pytest.mark.slow
def test_the_editing_quickstart_goes_from_end_to_end(quickstart):
  rows = json.loads((quickstart / "summary.json").read_text())
  pairs = {(row["candidate"], row["baseline"]) for row in rows}
  assert pairs == {("lpo", "sft")}
  assert {row["scorer"] for row in rows} == {"digits_edit", "digits_kept", "l1_target"}
  page = (quickstart / "report.html").read_text()
  assert "teaching an editor" in page and "right edit" in page
  # Digits to evaluate on are none of those that were ranked, whatever the instruction.
  report = json.loads((quickstart / "data_report.json").read_text())
  assert (report["prompts"]["evaluation"], report["prompts"]["leaked"]) == (16, 0)
  for method in ("sft", "lpo"):
    config = json.loads((quickstart / method / "config.json").read_text())
    dropout = [config["data"][f"{k}_dropout"] for k in ("caption", "source", "both")]
    assert dropout == [0.05] * 3 and config["objective"]["name"] == method
    last = read_metrics(quickstart / method / "metrics.jsonl")[-1]
    assert last["step"] == STEPS
    assert 0 < last["score/digits_edit"] < 1 and last["score/l1_target"] > 0


@pytest.mark.slow
def test_samples_begin_with_what_is_edited(quickstart):
  grid = np.asarray(Image.open(quickstart / "lpo" / "samples" / "step_000012.png"))
  rows = parquet.read_table(quickstart / "edits_to_make.parquet").to_pylist()[:8]
  side = digits.SIZE
  assert grid.shape == (8 * side, 3 * side, 3)  # a row: the source and two seeds
  shown = [decoding.decode(row["cond_image"]) for row in rows]
  np.testing.assert_array_equal(grid[:, :side], np.concatenate(shown))


@pytest.mark.slow
def test_exports_name_the_class_that_edits(quickstart):
  for folder in (quickstart / "editor", quickstart / "lpo" / "export"):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"


@pytest.mark.slow
def test_the_smoke_form_as_a_user_runs_it_and_diffusers_opens_what_comes(tmp_path):
  """Both methods on the shipped base, and the export, in processes of their own."""
  pytest.importorskip("torch")
  command = [sys.executable, "-m", "lpo_jax.main", "--config=edit_quickstart.py:smoke"]
  subprocess.run([*command, f"--workdir={tmp_path}"], check=True)
  rows = json.loads((tmp_path / "summary.json").read_text())
  pairs = {(row["candidate"], row["baseline"]) for row in rows}
  assert {("lpo", "sft"), ("dpo", "sft"), ("lpo", "dpo")} <= pairs
  source = (
    "import sys, diffusers, numpy as np\n"
    "from PIL import Image\n"
    "pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])\n"
    "image = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))\n"
    "done = pipeline('make it bold', image=image, num_inference_steps=2).images[0]\n"
    "print(type(pipeline).__name__, done.size)\n"
  )
  command = [sys.executable, "-c", source, str(tmp_path / "lpo" / "export")]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout == "StableDiffusionInstructPix2PixPipeline (32, 32)\n"
