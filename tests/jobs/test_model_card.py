"""The model card of an export, and the real client that pushes it to a local server."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from lpo_jax import main
from lpo_jax.configs import common
from lpo_jax.errors import UserError
from lpo_jax.jobs import model_card
from lpo_jax.pretrained import publishing

ROW = {
  "candidate": "lpo", "baseline": "base", "scorer": "<b>judge</b>|", "win_rate": 0.625,
  "ci_low": 0.5, "ci_high": 0.75, "ties": 1, "n": 40, "sampler": "ddim", "steps": 50,
  "mean_candidate": 2.0, "mean_baseline": 1.0, "p_sign": 0.5, "p_corrected": 0.5,
  "guidance_scale": 7.5, "images_per_prompt": 1, "prompt_set": "a|b <script>",
  "weights_candidate": "abc",
}  # fmt: skip


def config_of(world, *overrides):
  return main.parse(world.arguments(world.folder, *overrides))[0]


def write(config, workdir, folder, kind="pipeline", file=""):
  folder.mkdir()
  exported = model_card.Exported(folder, kind, 7, "3 tensors, equal to the bit", file)
  return model_card.write(config, workdir, exported).read_text("utf-8")


def test_what_is_known_is_said(tiny_cache, tmp_path):
  (tmp_path / "summary.json").write_text(json.dumps([ROW]))
  samples = tmp_path / "samples"
  samples.mkdir()
  Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(samples / "step_000002.png")
  text = write(config_of(tiny_cache, "seed=3"), tmp_path, tmp_path / "out")
  fields = ModelCard(text).data
  assert fields.library_name == "diffusers"
  assert fields.pipeline_tag == "text-to-image"
  assert fields.license is None and fields.base_model is None
  assert fields.tags == ["text-to-image", "preference-tuning", "lpo", "lpo_jax"]
  for line in (
    "| objective | lpo, beta 500.0 |",
    "| updates | 7 |",
    "| images an update | 16 |",
    "| seed | 3 |",
    "| licence of the base | not known: its card was not at hand |",
    "| source | judgements.parquet |",
    "| licence of the data | not known |",
    "| strategy | levels |",
    "| lists | 12 |",
    "| images in lists | 42 |",
    "| judgements used | 30 of 30 |",
    "| dropped | nothing |",
  ):
    assert line in text, line
  assert "0.625 | 0.500 to 0.750 | 1 | 40" in text
  assert "&lt;b&gt;judge&lt;/b&gt;\\|" in text and "<script>" not in text
  assert "![Samples](thumbnails.png)" in text
  assert Image.open(tmp_path / "out" / "thumbnails.png").size == (96, 64)
  assert str(tiny_cache.folder) not in text  # no paths of this machine


def test_what_is_not_known_is_said_to_be(tiny_cache, tmp_path):
  config = config_of(tiny_cache, f"data.cache={tmp_path / 'nowhere'}")
  text = write(config, tmp_path, tmp_path / "out")
  assert "| lists | not known: the cache was not at hand |" in text
  assert "Not known: no evaluation was at hand" in text
  assert "thumbnails" not in text
  with pytest.raises(UserError, match=r"export\.evaluation='nowhere' has no summary"):
    with config.unlocked():
      config.export.evaluation = "nowhere"
    write(config, tmp_path, tmp_path / "other")


def test_licence_and_names_are_strangers_text(tiny_cache, tmp_path):
  """The base's card names its licence; a name cannot leave its field."""
  base = tmp_path / 'ba"se: <i>x</i>\n---\n# [h](javascript:x)'.replace("/", "_")
  base.symlink_to(tiny_cache.pipeline)
  card = tiny_cache.pipeline / "README.md"
  card.write_text("---\nlicense: creativeml-openrail-m\n---\n# It\n")
  try:
    config = config_of(tiny_cache)
    with config.unlocked():
      config.model.path = str(base)
      config.export.push_to = "me/it"
      config.objective.name = "lpo"
    text = write(config, tmp_path, tmp_path / "out", "lora", "it.safetensors")
  finally:
    card.unlink()
  assert ModelCard(text).data.license == "creativeml-openrail-m"
  assert "lora" in ModelCard(text).data.tags
  assert "<i>" not in text.partition("```")[0] and "\n# [h]" not in text
  code = text.split("```python\n")[1].split("```")[0]
  compile(code, "card", "exec")
  assert "load_lora_weights('me/it', weight_name='it.safetensors')" in code


def test_columns_are_candidates_and_rows_prompts(tmp_path):
  from pyarrow import Table, parquet

  folder = tmp_path / "evaluation"
  rows = []
  for value, name in enumerate(("base", "lpo")):
    (folder / name).mkdir(parents=True)
    for prompt in range(3):
      pixels = np.full((8, 8, 3), 100 * value + prompt, np.uint8)
      Image.fromarray(pixels).save(folder / name / f"{prompt}.png")
      row = {"candidate": name, "prompt": f"p{prompt}", "file": f"{prompt}.png"}
      rows.append(row)
  parquet.write_table(Table.from_pylist(rows), folder / "per_image.parquet")
  candidates = {name: {"folder": name} for name in ("base", "lpo")}
  (folder / "about.json").write_text(json.dumps({"candidates": candidates}))
  said = model_card.thumbnails(tmp_path, tmp_path, tmp_path)
  assert said == "Columns, with the same seeds: base, lpo. Rows: p0; p1; p2."
  grid = np.asarray(Image.open(tmp_path / "thumbnails.png"))
  assert grid.shape == (3 * 192, 2 * 192, 3)
  corners = grid[::192, ::192, 0]
  np.testing.assert_array_equal(corners, [[0, 100], [1, 101], [2, 102]])


SERVER = """
import base64, http.server, json, os, pathlib, sys, threading
seen = []

class Hub(http.server.BaseHTTPRequestHandler):
  '''The few answers of the Hub that an upload takes.'''

  def do_GET(self):
    self.reply({"id": "me/it", "sha": "c" * 40, "siblings": []})

  def do_POST(self):
    size = int(self.headers.get("Content-Length") or 0)
    body = self.rfile.read(size)
    seen.append((self.path, body))
    if "/me/" not in self.path and b'"organization": "me"' not in body:
      if self.headers.get("Authorization") != "Bearer good":
        return self.reply({"error": "no"}, 403)
    if self.path.endswith("/repos/create"):
      return self.reply({"url": os.environ["HF_ENDPOINT"] + "/me/it", "id": "me/it"})
    if "/preupload/" in self.path:
      files = json.loads(body)["files"]
      return self.reply({"files": [
        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
        for f in files]})
    if "/commit/" in self.path:
      return self.reply({"commitUrl": os.environ["HF_ENDPOINT"]
                         + "/me/it/commit/" + "d" * 40, "commitOid": "d" * 40, "success": True})
    if "validate-yaml" in self.path:
      return self.reply({"errors": [], "warnings": []})
    return self.reply({"error": self.path}, 404)

  def reply(self, value, code=200):
    data = json.dumps(value).encode()
    self.send_response(code)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_TOKEN"] = "good"
from lpo_jax.configs import common
from lpo_jax.errors import UserError
from lpo_jax.pretrained import publishing

folder = pathlib.Path(sys.argv[1])
address = publishing.push(folder, "me/it", private=True,
                          files=("unet/*", "README.md"), message="lpo, 7 updates")
assert address.endswith("d" * 40), address
created = json.loads(next(b for p, b in seen if p.endswith("/repos/create")))
assert created["name"] == "it" and created["organization"] == "me", created
assert created.get("private") is True or created.get("visibility") == "private", created
lines = next(b for p, b in seen if "/commit/" in p).splitlines()
said = [json.loads(line) for line in lines]
header = next(s["value"] for s in said if s["key"] == "header")
assert header["summary"] == "lpo, 7 updates"
sent = {s["value"]["path"]: base64.b64decode(s["value"]["content"])
        for s in said if s["key"] == "file"}
assert sent == {"README.md": (folder / "README.md").read_bytes(),
                "unet/config.json": b"{}"}, sent

os.environ["HF_TOKEN"] = "bad"
try:
  publishing.push(folder, "you/it", private=True, files=("*",), message="m")
except UserError as error:
  assert "HTTP 403" in str(error) and "HF_TOKEN" in str(error), error
else:
  raise AssertionError("a push that the Hub refused")
"""


def test_the_real_client_pushes_what_belongs_to_the_export(tmp_path):
  (tmp_path / "unet").mkdir()
  (tmp_path / "unet" / "config.json").write_text("{}")
  (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
  (tmp_path / "secret.txt").write_text("stays here")
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(SERVER), tmp_path],
    cwd=pathlib.Path(publishing.__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_offline_and_wrong_ids_are_refused(tmp_path):
  """The suite itself runs with HF_HUB_OFFLINE=1."""
  settings = {"private": True, "files": ("*",), "message": "m"}
  with pytest.raises(UserError, match=r"'me/it' cannot be pushed .*Go online"):
    publishing.push(tmp_path, "me/it", **settings)
  for wrong in ("it", "me/it@main", "a/b/c"):
    with pytest.raises(UserError, match="expected the id of a model"):
      publishing.push(tmp_path, wrong, **settings)


def test_an_editor_is_asked_with_an_image(tmp_path):
  index = {"_class_name": "StableDiffusionInstructPix2PixPipeline"}
  (tmp_path / "model_index.json").write_text(json.dumps(index))
  config = common.get_config()
  config.model.path = str(tmp_path)
  exported = model_card.Exported(tmp_path, "pipeline", 1, "nothing")
  assert "pipeline_tag: image-to-image" in model_card.front_matter(config, exported)
  for kind in model_card.USAGE:
    asked = dataclasses.replace(exported, kind=kind, file="x.safetensors")
    said = model_card.usage(config, asked)
    compile(said, kind, "exec")
    assert 'pipeline("an instruction", image=source' in said
  (tmp_path / "model_index.json").unlink()
  assert 'pipeline("a prompt"' in model_card.usage(config, exported)
