"""Ids on the Hub: the real client against a server of this process, and without one."""

import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

from lpo_jax import models, pretrained
from lpo_jax.errors import UserError
from lpo_jax.pretrained import hub

# What lies in the repository of a pipeline; `wanted` says what a run fetches of it.
STABLE_DIFFUSION = (
  "README.md",
  "model_index.json",
  "v1-5-pruned.safetensors",
  "v1-5-pruned.ckpt",
  "safety_checker/config.json",
  "safety_checker/model.safetensors",
  "scheduler/scheduler_config.json",
  "text_encoder/config.json",
  "text_encoder/model.fp16.safetensors",
  "text_encoder/model.safetensors",
  "text_encoder/pytorch_model.bin",
  "tokenizer/merges.txt",
  "tokenizer/vocab.json",
  "unet/config.json",
  "unet/diffusion_pytorch_model.bin",
  "unet/diffusion_pytorch_model.fp16.safetensors",
  "unet/diffusion_pytorch_model.non_ema.safetensors",
  "unet/diffusion_pytorch_model.safetensors",
  "unet/flax_model.msgpack",
)


def test_one_set_of_weights_per_network_and_no_pickles():
  files = hub.wanted_files(STABLE_DIFFUSION, hub.USED, None, "it")
  assert files == [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
  ]
  files = hub.wanted_files(STABLE_DIFFUSION, ["unet"], "fp16", "it")
  assert files == [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
  ]
  with pytest.raises(UserError, match=r"'it' unet/; there are the variants \['fp16'"):
    names = set(STABLE_DIFFUSION) - {"unet/diffusion_pytorch_model.safetensors"}
    hub.wanted_files(names, ["unet"], None, "it")
  with pytest.raises(UserError, match="pickle"):
    hub.wanted_files(["config.json", "pytorch_model.bin"], ["clip"], None, "it")


def test_shards_come_with_their_index_and_their_variant():
  stem = "unet/diffusion_pytorch_model"
  plain = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
  half = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
  indices = [
    f"{stem}.safetensors.index.json",
    f"{stem}.safetensors.index.fp16.json",
  ]
  names = ["unet/config.json", *plain, *half, *indices]
  for variant, index, shards in ((None, 0, plain), ("fp16", 1, half)):
    files = hub.wanted_files(names, ["unet"], variant, "it")
    assert set(files) == {"unet/config.json", indices[index], *shards}


def test_a_network_that_is_a_repository_of_its_own_lies_at_the_top():
  names = ["config.json", "model.safetensors", "vocab.json", "open_clip_pytorch.bin"]
  assert hub.wanted_files(names, ["clip"], None, "it") == [
    "config.json",
    "model.safetensors",
    "vocab.json",
  ]


SERVER = """
import hashlib, http.server, json, pathlib, threading, urllib.parse

COMMIT = "c" * 40
asked = []

class Hub(http.server.BaseHTTPRequestHandler):
  '''The few answers of the Hub that downloading a repository takes.'''
  root = None

  def do_GET(self):
    self.answer(body=True)

  def do_HEAD(self):
    self.answer(body=False)

  def answer(self, body):
    path = urllib.parse.urlparse(self.path).path
    asked.append(path)
    files = sorted(p for p in self.root.rglob("*") if p.is_file())
    if "/owner/gated" in path:
      return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
    if "/owner/model" not in path:
      return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
    if "no-such" in path:
      return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
    if "/tree/" in path:
      entries = [
        {"type": "file", "path": self.name(p), "size": p.stat().st_size,
         "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
        for p in files
      ]
      return self.send(200, json.dumps(entries).encode(), {}, body)
    if path.startswith("/api/models/"):
      siblings = [{"rfilename": self.name(p)} for p in files]
      info = {"id": "owner/model", "sha": COMMIT, "siblings": siblings}
      return self.send(200, json.dumps(info).encode(), {}, body)
    file = self.root / path.split(f"/resolve/{COMMIT}/")[-1]
    data = file.read_bytes()
    headers = {"X-Repo-Commit": COMMIT, "ETag": hashlib.sha1(data).hexdigest()}
    self.send(200, data, headers, body)

  def name(self, path):
    return path.relative_to(self.root).as_posix()

  def send(self, code, data, headers, body):
    self.send_response(code)
    for key, value in {**headers, "Content-Length": len(data)}.items():
      self.send_header(key, str(value))
    self.end_headers()
    if body:
      self.wfile.write(data)

  def log_message(self, *_):
    pass

def serve(root):
  Hub.root = pathlib.Path(root)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server
"""

CLIENT = """
import os, pathlib, sys
root, cache = sys.argv[1:]
server = serve(root)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HUB_CACHE"] = cache
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
import numpy as np
from lpo_jax import pretrained, trees
from lpo_jax.errors import UserError

def refused(path, *words):
  try:
    pretrained.load(path, "vae")
  except UserError as error:
    for word in words:
      assert word in str(error), (word, str(error))
  else:
    raise AssertionError(path)

# The network alone, then the pipeline: what is there is not asked for again.
vae = pretrained.load("owner/model", "vae")
expected = trees.named_leaves(pretrained.load(root, "vae").params)
for name, leaf in trees.named_leaves(vae.params).items():
  assert np.array_equal(leaf, expected[name]), name
folder = pretrained.local_folder("owner/model")
inside = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
assert inside == [
  "model_index.json",
  "scheduler/scheduler_config.json",
  "vae/config.json",
  "vae/diffusion_pytorch_model.safetensors",
], inside
assert pretrained.scheduler_config("owner/model") == {"beta_start": 0.1}
whole = pretrained.local_folder("owner/model", None)
assert (whole / "safety_checker" / "model.safetensors").is_file()
pretrained.save_pipeline("owner/model", pathlib.Path(cache) / "new", {"vae": vae})

refused("owner/gated", "gated", "licence", "HF_TOKEN")
refused("owner/modle", "'owner/modle' is neither a folder here", "nor a model on the Hub")
refused("owner/model@no-such", "no revision 'no-such'")

server.shutdown()
server.server_close()
count = len(asked)
assert pretrained.local_folder("owner/model") == folder  # from the cache
assert pretrained.load("owner/model@main", "vae").config == vae.config
refused("owner/other", "not a folder here", "cannot be fetched", "go online", "folder")
assert len(asked) == count
"""


def test_ids_are_fetched_once_and_refusals_say_what_to_do(tmp_path):
  root = tmp_path / "repository"
  config = {"_class_name": "AutoencoderKL", "norm_num_groups": 4}
  config |= {"block_out_channels": [4], "mid_block_add_attention": False}
  model = models.build(config)
  pretrained.save(root, pretrained.Part("vae", config, model.init(0), model))
  (root / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
  (root / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
  (root / "one-file.safetensors").write_bytes(b"whole")
  for name, text in (
    ("scheduler/scheduler_config.json", '{"beta_start": 0.1}'),
    ("safety_checker/config.json", '{"architectures": ["Checker"]}'),
    ("safety_checker/model.safetensors", "checker"),
    (
      "model_index.json",
      json.dumps(
        {
          "vae": ["diffusers", "AutoencoderKL"],
          "scheduler": ["diffusers", "DDIMScheduler"],
          "safety_checker": ["stable_diffusion", "Checker"],
          "feature_extractor": [None, None],
        }
      ),
    ),
  ):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(text)
  code = "import os; os.environ.pop('HF_HUB_OFFLINE', None)\n" + SERVER + CLIENT
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), root, tmp_path / "cache"],
    cwd=pathlib.Path(pretrained.__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_offline_says_so(tmp_path):
  """The suite itself runs with HF_HUB_OFFLINE=1."""
  with pytest.raises(UserError, match=r"'runs/base' is not a folder here .*go online"):
    pretrained.local_folder("runs/base")


def test_what_is_no_id_is_not_asked_for(tmp_path):
  for path in (tmp_path / "nowhere", "./runs/base", "base", "runs/a/b"):
    with pytest.raises(UserError, match=r"does not exist\. Give the local path"):
      pretrained.local_folder(path)
  (tmp_path / "file.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match="is a file"):
    pretrained.local_folder(tmp_path / "file.safetensors")
