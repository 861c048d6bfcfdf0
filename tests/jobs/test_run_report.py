"""The page of a training run and the words at its end, from one real run."""

import dataclasses
import io
import json
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from lpo_jax import main
from lpo_jax.jobs import closing, run_report
from lpo_jax.pages import curves
from lpo_jax.training.report import read_metrics


@dataclasses.dataclass(frozen=True)
class Done:
  """A run of two updates, and the text it printed."""

  workdir: pathlib.Path
  text: str


@pytest.fixture(scope="module")
def done(tiny_cache, tmp_path_factory):
  folder = tmp_path_factory.mktemp("trap")
  (folder / "wandb.py").write_text("raise AssertionError('imported, and nobody asked')")
  workdir = tmp_path_factory.mktemp("run") / "own run"  # commands have to quote it
  sys.path.insert(0, str(folder))
  try:
    outcome = tiny_cache.run(
      workdir, "train.total_steps=2", "logging.report=report.html"
    )
  finally:
    sys.path.remove(str(folder))
  assert outcome.code == 0, outcome.text
  return Done(workdir, outcome.text)


def page(workdir):
  return (workdir / "report.html").read_text("utf-8")


def test_wandb_is_not_imported_unasked(done):
  assert "wandb" not in sys.modules
  assert not (done.workdir / "wandb.json").exists()


def test_every_metric_is_drawn_once(done):
  metrics = read_metrics(done.workdir / "metrics.jsonl")
  names = {name for row in metrics for name in row} - {"step", "time"}
  finite = {n for n in names if any(row.get(n) is not None for row in metrics)}
  assert len(finite) > 6
  groups = curves.parts(finite)
  together = sum(len(members) - 1 for members in groups.values())
  # And one chart for the lengths of the lists.
  assert page(done.workdir).count("<svg") == len(finite) - together + 1


def test_the_page_says_what_was_set_and_what_is_there(done):
  text = page(done.workdir)
  changed = re.search(r'class="changed">(.*?)</table>', text, re.S).group(1)
  rows = re.findall(r"<tr><td><code>(.*?)</code>.*?<code>(.*?)</code>", changed)
  assert ("train.total_steps", "2") in rows
  assert "objective.name" not in dict(rows)  # as it is by default
  for words in ("<dd>levels</dd>", "<dt>lists</dt><dd>12</dd>", "step 2"):
    assert words in text
  assert '<a href="metrics.jsonl">' in text
  assert "http://" not in text and "https://" not in text
  assert len(text) < 1_000_000


def test_the_closing_words_say_where_and_what_next(done):
  last = read_metrics(done.workdir / "metrics.jsonl")[-1]
  said = done.text[done.text.index("lpo: step 2 of 2") :]
  assert f"loss {last['loss']:.4g}" in said
  for path in ("report.html", "metrics.jsonl", "checkpoints", "tensorboard"):
    assert str(done.workdir / path) in said
  assert f"tensorboard --logdir '{done.workdir / 'tensorboard'}'" in said


def test_the_commands_can_be_given_and_a_stop_is_reported(done, front_door):
  """ "Train for longer" goes on with the run, and a STOP file ends it after an update."""
  config = run_report.run_identity.recorded(done.workdir)
  command = run_report.commands(config, done.workdir, 2)["Train for longer"]
  python, dash_m, module, *arguments = shlex.split(command)
  assert (python, dash_m, module) == ("python", "-m", "lpo_jax.main")
  assert "--config.train.total_steps=4" in arguments
  (done.workdir / "STOP").touch()
  outcome = front_door(*arguments)
  assert outcome.code == 3, outcome.text
  assert "resuming from step 2 of 4" in outcome.text
  assert "lpo: step 3 of 4" in outcome.text and "Go on to step 4:" in outcome.text
  assert "3 of 4 updates of 16 images, stopped, and can go on" in page(done.workdir)


def test_a_recorded_config_is_the_config_and_can_be_changed(tmp_path):
  config = main.load_config("configs/lpo_sdxl_lora.py")
  plain = run_report.run_identity.plain
  (tmp_path / "config.json").write_text(json.dumps(plain(config)))
  back = main.load_config(str(tmp_path / "config.json"))
  assert plain(back) == plain(config)
  assert back.model.lora.targets == config.model.lora.targets  # tuples again
  main.override(back, "eval.prompts", "partiprompts")  # was None
  main.override(back, "train.total_steps", "7")
  assert (back.eval.prompts, back.train.total_steps) == ("partiprompts", 7)


def test_samples_and_evaluation_are_shown_when_they_come(done, tmp_path):
  """What `evaluate` leaves is there the next time the page is written."""
  samples = done.workdir / "samples"
  samples.mkdir(exist_ok=True)
  picture = Image.fromarray(np.full((800, 400, 3), 77, np.uint8))
  for step in range(1, 21):
    picture.save(samples / f"step_{step:06d}.png")
  row = {"candidate": "lpo", "baseline": "base", "scorer": "<b>taste</b>", "n": 4}
  row |= {"win_rate": 0.75, "ci_low": 0.5, "ci_high": 1.0, "ties": 0}
  row |= {"mean_candidate": 1.0, "mean_baseline": 0.5, "protocol": "same_seed"}
  other = {**row, "protocol": "median_of_k"}
  (done.workdir / "summary.json").write_text(json.dumps([row, other]))
  run_report.refresh(done.workdir)
  text = page(done.workdir)
  shown = run_report.samples(done.workdir)
  assert [one.label for one in shown] == [
    f"step {n}" for n in (1, 4, 6, 9, 12, 15, 17, 20)
  ]
  assert Image.open(io.BytesIO(shown[0].image)).size == (320, 640)
  assert text.count("data:image/jpeg") == 8
  assert "<b>" not in text and "&lt;b&gt;taste&lt;/b&gt;, median_of_k" in text
  assert "There is no evaluation" not in text
  assert len(text) < 5_000_000


def test_only_what_was_lost_of_the_data_is_mentioned():
  report = {"judgements_total": 9, "judgements_used": 6, "ties": 1}
  report |= {"dropped": {"no_image": 3, "bad_label": 0}, "lists_dropped": {}}
  described = {"report": report, "lists": 2, "items": 5, "lost": {"all_tied": 0}}
  described["settings"] = {"strategy": "levels"}
  counts = {"images": 5, "prompts": 2, "bad_images": 1}
  figures = run_report._account(described, counts)
  assert figures["judgements not used: no image"] == 3 and figures["bad images"] == 1
  assert len(figures) == 8 + 2


def test_rollbacks_and_alarms_are_told(tmp_path):
  row = {"rollback": 1, "words": "the loss ran away", "to_step": 4, "lr_scale": 0.5}
  (tmp_path / "rollbacks.jsonl").write_text(json.dumps(row) + "\n")
  alarms = [json.dumps({"step": n, "words": f"drift at step {n}"}) for n in range(12)]
  (tmp_path / "alarms.jsonl").write_text("\n".join(alarms) + "\n")
  rollback, first, *_, more = run_report.notes(tmp_path, [{"scorer": "taste"}])[1:]
  assert rollback == (
    "Rollback 1: the loss ran away; back to step 4, the learning rate times 0.5."
  )
  assert (first, more) == (
    "Alarm: drift at step 0",
    "2 more alarms are in alarms.jsonl.",
  )


def test_a_folder_that_is_no_run_gets_no_page(tmp_path, capsys):
  run_report.refresh(tmp_path)
  with closing.words("evaluate", tmp_path):
    pass
  assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_page_that_cannot_be_made_is_a_warning(done, tmp_path, capsys):
  (tmp_path / "config.json").write_text((done.workdir / "config.json").read_text())
  (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n["no row"]\n')
  run_report.refresh(tmp_path)
  assert "warning: no report of" in capsys.readouterr().out


def test_saved_steps_are_those_that_orbax_has(done, tmp_path):
  from lpo_jax.jobs import blueprint

  assert run_report.saved_steps(done.workdir) == blueprint.saved_steps(done.workdir)
  half = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
  half.mkdir(parents=True)
  (half / "_CHECKPOINT_METADATA").touch()
  (tmp_path / "checkpoints" / "8").mkdir()
  assert run_report.saved_steps(tmp_path) == []
