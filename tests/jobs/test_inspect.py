"""The inspect job end to end on a small data set with something of everything wrong."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lpo_jax.configs import common
from lpo_jax.data import sources
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.stores import ImageStore
from lpo_jax.errors import UserError
from lpo_jax.jobs import inspect, inspect_facts

EVIL = "<script>alert('x')</script> a cat & \u202edog"


def picture(index, size=(24, 24)):
  pixels = np.full((size[1], size[0], 3), index * 10, np.uint8)
  pixels[: size[1] // 2] = 255 - index * 10
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG" if size[0] < 100 else "JPEG")
  return buffer.getvalue()


# (prompt, left, right, label of the left, annotator)
JUDGED = (
  (EVIL, "a", "b", 1.0, 1),
  (EVIL, "b", "c", 0.5, 1),
  (EVIL, "c", "d", 1.0, 2),
  ("two", "e", "f", 1.0, 3),
  ("two", "e", "f", 0.0, 3),  # a contradiction
  ("two", "g", "broken", 1.0, 4),
  ("two", "g", "g", 1.0, 5),  # the same image twice
  ("Three!", "x", "y", 1.0, 6),
  ("Three!", "y", "z", 1.0, 7),
  ("Three!", "z", "x", 1.0, 8),  # a circle
  ("Three!", "x", "y", np.nan, 9),  # nobody judged
)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "judged.parquet"
  uids = sorted({uid for row in JUDGED for uid in row[1:3]})
  data = {uid: picture(i) for i, uid in enumerate(uids)}
  data["x"] = picture(3, (120, 100))
  data["broken"] = data["broken"][:60]
  right = [data[row[2]] for row in JUDGED]
  right[4] = picture(20)  # f again, as another picture
  sources.write_pickapic(
    path,
    caption=[row[0] for row in JUDGED],
    image_0_uid=[row[1] for row in JUDGED],
    image_1_uid=[row[2] for row in JUDGED],
    jpg_0=[data[row[1]] for row in JUDGED],
    jpg_1=right,
    label_0=[row[3] for row in JUDGED],
    user_id=[row[4] for row in JUDGED],
    model_0=["tiny"] * len(JUDGED),
    model_1=["<b>big</b>" if row[2] in "bd" else "tiny" for row in JUDGED],
    row_group_size=3,
  )
  return path


def configured(path, **changes):
  config = common.get_config()
  config.data.path = str(path)
  with config.unlocked(), config.ignore_type():
    for name, value in changes.items():
      config.update_from_flattened_dict({name.replace("__", "."): value})
  return config


def test_everything_is_counted(parquet, tmp_path, capsys):
  evaluation = tmp_path / "eval.txt"
  evaluation.write_text("three\nnew\n")
  config = configured(parquet, eval__prompts=str(evaluation))
  found = inspect.run(config, tmp_path / "run")
  assert found == json.loads((tmp_path / "run" / "data_report.json").read_text())
  account = found["judgements"]
  assert account["judgements_total"] == len(JUDGED)
  assert account["dropped"] == {
    "unlabelled": 1,
    "same_image": 1,
    "contradictions": 2,
    "cycles": 1,
  }
  assert account["judgements_used"] == 6
  assert account["lengths"] == {"2": 1, "3": 1, "4": 1}
  assert account["share_over_two"] == pytest.approx(5 / 6)
  assert (account["ties"], account["repeated"]) == (1, 1)
  images = found["images"]
  assert (images["count"], images["checked"]) == (11, 11)
  assert list(images["undecodable_uids"]) == ["broken"]
  assert (images["undecodable"], images["truncated"]) == (1, 1)
  assert images["different_bytes_uids"] == ["f"]
  assert images["sizes"] == [
    {"width": 24, "height": 24, "images": 9},
    {"width": 120, "height": 100, "images": 1},
  ]
  assert images["aspects"] == {"1:1": 9, "4:3": 1}  # 1.2 is nearer to 4:3 than to 1
  assert (images["resolution"], images["enlarged"]) == (512, 10)
  assert images["cropped_away"] == pytest.approx((1 - 100 / 120) / 10)
  # 9 images in updates of 256: one try, and the epoch is begun again until it is full.
  assert found["packing"]["efficiency"] == 1.0
  assert found["prompts"]["tokens"] is None  # no model, no tokenizer
  assert found["prompts"]["tokens_not_counted"] == "model.path is not set"
  assert found["fractions"]["long_prompts"] is None
  assert found["annotators"]["count"] == 7
  assert found["annotators"]["top5_share"] == pytest.approx(7 / 9)
  assert found["generators"] == {"tiny": 10, "<b>big</b>": 1}
  assert found["prompts"]["leaked_examples"] == ["three"]
  assert found["fractions"]["leakage"] == 0.5
  assert found["fractions"]["undecodable"] == pytest.approx(1 / 11)
  said = capsys.readouterr().out.strip().splitlines()
  assert len([line for line in said if "checking images" not in line]) == 11
  assert said[-1].startswith("report") and "data_report.html" in said[-1]


def test_the_page_escapes_strangers_text(parquet, tmp_path):
  inspect.run(configured(parquet), tmp_path)
  page = (tmp_path / "data_report.html").read_text()
  assert "<script>alert" not in page and "&lt;script&gt;alert" in page
  assert "<b>big" not in page and "&lt;b&gt;big" in page
  assert "\u202e" not in page
  assert "http://" not in page.replace("http://www.w3.org", "")
  assert 'class="enlarge pixelated" src="data:image/png' in page
  assert 'class="enlarge" src="data:image/jpeg' in page
  assert page.count("2 =</span>") == 2  # b and c
  assert 'class="broken"' in page and "cannot be decoded" in page
  assert "the weakest link of a circle" in page
  assert "Images by aspect" in page and "Lists by length" in page
  assert "1, 1 of them truncated" in page
  assert "not counted: model.path is not set" in page
  assert "<svg" in page


def test_limits_refuse_after_the_report_is_written(parquet, tmp_path):
  config = configured(parquet)
  config.inspect.limits = {"undecodable": 0.01, "ties": 0.5}
  with pytest.raises(UserError, match=r"undecodable is 9\.09%, the limit 1\.00%"):
    inspect.run(config, tmp_path)
  assert "Above the limits" in (tmp_path / "data_report.html").read_text()
  assert json.loads((tmp_path / "data_report.json").read_text())["exceeded"] == {
    "undecodable": pytest.approx(1 / 11)
  }
  config.inspect.limits = {"undecodible": 0.01}
  with pytest.raises(UserError, match="did you mean 'undecodable'"):
    inspect.run(config, tmp_path)


def test_a_sample_of_the_images(parquet, tmp_path):
  config = configured(parquet, inspect__max_images=4)
  found = inspect.run(config, tmp_path)
  assert (found["images"]["checked"], found["images"]["count"]) == (4, 11)


def test_no_list_is_an_error_with_a_report(tmp_path):
  path = tmp_path / "ties.parquet"
  sources.write_pickapic(
    path,
    caption=["p"],
    image_0_uid=["a"],
    image_1_uid=["b"],
    jpg_0=[picture(1)],
    jpg_1=[picture(2)],
    label_0=[0.5],
  )
  with pytest.raises(UserError, match=r"no ranked list could be built.*1 all_tied"):
    inspect.run(configured(path), tmp_path)
  assert (tmp_path / "data_report.html").exists()


def test_finished_lists_with_evaluation_prompts_in_the_config(tmp_path):
  import base64

  images = [base64.b64encode(picture(i)).decode() for i in range(3)]
  row = {"prompt": "p", "images": images, "image_uids": list("abc"), "ranks": [0, 1, 1]}
  (tmp_path / "l.jsonl").write_text(json.dumps(row))
  config = configured(tmp_path / "l.jsonl", eval__prompts=("P.", "q"))
  found = inspect.run(config, tmp_path / "run")
  assert found["kind"] == "lists"
  assert found["judgements"]["lengths"] == {"3": 1}
  assert found["prompts"]["leaked"] == 1
  assert found["annotators"]["count"] == 0 and found["generators"] == {}


def shown(pictures):
  """Judgements whose images are these bytes, each lying in one place."""
  nothing = np.zeros(0, np.int32)
  return Judgements(
    prompts=[],
    image_uids=sorted(pictures),
    users=[],
    **dict.fromkeys(("prompt", "user", "image_a", "image_b"), nothing),
    label=nothing.astype(np.float32),
    weight=nothing.astype(np.float32),
    images=ImageStore.of_bytes([pictures[uid] for uid in sorted(pictures)]),
  )


def test_what_ends_early_is_told_from_what_is_no_image():
  webp = io.BytesIO()
  Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(webp, "WEBP")
  pictures = {
    "good": webp.getvalue(),
    "cut jpeg": picture(1, (120, 100))[:300],
    "cut png": picture(2)[:60],
    "cut webp": webp.getvalue()[:-4],
    "none": b"",
    "page": b"<html>Not found</html>",
  }
  scan = inspect_facts.check_images(shown(pictures), 0)
  assert (scan.checked, scan.sizes) == (6, {(20, 20): 1})
  assert sorted(scan.bad) == ["cut jpeg", "cut png", "cut webp", "none", "page"]
  assert scan.truncated == ["cut jpeg", "cut png", "cut webp"]
  assert "0x" not in scan.bad["page"]  # an address would differ from run to run


def test_what_training_makes_of_the_images():
  sizes = {(64, 64): 2, (128, 64): 1, (30, 60): 1, (1920, 1080): 4}
  found = inspect_facts.images(shown({}), inspect_facts.Scan(8, sizes=sizes), 64)
  assert found["aspects"] == {"1:2": 1, "1:1": 2, "16:9": 4, "2:1": 1}
  assert list(found["aspects"]) == ["1:2", "1:1", "16:9", "2:1"]
  assert found["enlarged"] == 1  # 30 x 60
  assert found["cropped_away"] == pytest.approx((0.5 + 0.5 + 4 * (1 - 1080 / 1920)) / 8)
  assert found["sizes"][0] == {"width": 1920, "height": 1080, "images": 4}


@pytest.mark.parametrize(
  ("lengths", "slots", "efficiency", "lists", "updates"),
  [
    ([2] * 8, 4, 1.0, 2, 4),
    ([3] * 8, 4, 0.75, 1, 6),  # a hole of one in every update
    ([3, 3, 1, 1], 4, 1.0, 2, 2),  # a long one and a short one
    ([5, 2, 2], 4, 0.0, 0, 0),  # the longest fits in none
    ([], 4, 0.0, 0, 0),
  ],
)
def test_packing(lengths, slots, efficiency, lists, updates):
  found = inspect_facts.packing(np.asarray(lengths, np.int64), slots, seed=0)
  assert found["efficiency"] == efficiency
  assert found["lists_per_update"] == lists
  assert (found["slots"], found["updates"]) == (slots, updates)


def test_prompts_that_the_text_encoder_cuts(tiny_world, tmp_path):
  config = configured(tiny_world.parquet, model__path=str(tiny_world.pipeline))
  found = inspect.run(config, tmp_path)["prompts"]["tokens"]
  assert (found["limit"], found["beyond"]) == (16, 0)
  folder = str(tiny_world.pipeline)
  texts = ["a", "a a", "a " * 14, "a " * 15, "a " * 90]
  found = inspect_facts.tokens(texts, folder)
  # Start and end count: 14 words are 16 tokens, of 15 one is lost.
  assert (found["limit"], found["beyond"], found["longest"]) == (16, 2, 92)
  assert found["examples"] == [texts[4], texts[3]]


def test_the_tokenizer_of_a_model_on_the_hub(tiny_world, tmp_path, monkeypatch, capsys):
  from huggingface_hub import constants

  # As huggingface_hub keeps it: what is in its cache is not asked for again.
  snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / "abc"
  snapshot.mkdir(parents=True)
  (snapshot.parents[1] / "refs").mkdir()
  (snapshot.parents[1] / "refs" / "main").write_text("abc")
  (snapshot / "tokenizer").symlink_to(tiny_world.pipeline / "tokenizer")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  config = configured(tiny_world.parquet, model__path="owner/tiny")
  found = inspect.run(config, tmp_path)["prompts"]
  assert (found["tokens"]["limit"], found["tokens_not_counted"]) == (16, "")
  capsys.readouterr()
  # A model that is not there costs the count, and says so; the rest is reported.
  config.model.path = str(tmp_path / "nowhere" / "at" / "all")
  found = inspect.run(config, tmp_path)["prompts"]
  assert found["tokens"] is None and "does not exist" in found["tokens_not_counted"]
  assert "tokens not counted (model folder" in capsys.readouterr().out
  page = (tmp_path / "data_report.html").read_text()
  assert "not counted: model folder" in page
  config.inspect.limits = {"long_prompts": 0.5}
  with pytest.raises(UserError, match=r"Tokens were not counted: .* does not exist"):
    inspect.run(config, tmp_path)


def test_a_limit_on_what_cannot_be_counted_is_refused(parquet, tmp_path):
  config = configured(parquet)
  for name in ("leakage", "long_prompts"):
    config.inspect.limits = {name: 0.5}
    with pytest.raises(UserError, match=rf"inspect\.limits\.{name} cannot be checked"):
      inspect.run(config, tmp_path)
  config.inspect.limits = {"empty_slots": 0.5, "truncated": 0.05}
  with pytest.raises(UserError, match=r"limits: truncated is 9\.09%"):
    inspect.run(config, tmp_path)


def test_labels_without_images(parquet, tmp_path, capsys):
  import pyarrow.parquet as pq

  labels = tmp_path / "labels.parquet"
  pq.write_table(pq.read_table(parquet).drop_columns(["jpg_0", "jpg_1"]), labels)
  whole = inspect.run(configured(parquet), tmp_path / "whole")
  capsys.readouterr()
  found = inspect.run(configured(labels), tmp_path / "labels")
  assert found["judgements"] == whole["judgements"]
  facts = found["images"]
  assert (facts["count"], facts["absent"], facts["undecodable"]) == (11, 11, 0)
  assert found["fractions"]["undecodable"] is None
  assert "11, 11 absent, 0 checked, 0 undecodable" in capsys.readouterr().out
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").write_bytes(picture(0))
  some = inspect.run(
    configured(labels, data__images=str(tmp_path / "images")), tmp_path
  )
  assert (some["images"]["absent"], some["images"]["checked"]) == (10, 1)
  assert (
    some["source"]["name"] == "pickapic"
    and "v1 lies within v2" in (some["source"]["splits"])
  )
