"""The shipped configs: whole, unchanged by accident, and without dead keys."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import ml_collections
import pytest

from lpo_jax import main, pretrained
from lpo_jax.configs import common
from lpo_jax.jobs import quickstart

ROOT = pathlib.Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens" / "configs"
WRITE = "LPO_JAX_WRITE_GOLDENS"

FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name[0] != "_")


def arguments(path):
  """What a config can be asked for after its colon: sizes, or presets by name."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  smoke = any(word in path.stem for word in ("quickstart", "ablation", "sweep"))
  return ["", *(["smoke"] if smoke else ()), *getattr(module, "PRESETS", ())]


# Every config, and every size and preset it comes in.
LOCATIONS = [
  f"{path.stem}:{argument}" if argument else path.stem
  for path in FILES
  for argument in arguments(path)
]
# How a section is called where it is read, besides its own name.
CALLED = {
  "eval": "ev",
  "train": "t",
  "quickstart": "world",
  "select": "wanted",
  "generate": "wanted",
}


def load(location):
  stem, _, size = location.partition(":")
  path = str(ROOT / "configs" / f"{stem}.py")
  return main.load_config(f"{path}:{size}" if size else path)


def flatten(tree, prefix=""):
  """Nested dictionaries to {"a.b": value}; empty ones stay values."""
  if not isinstance(tree, dict) or not tree:
    return {prefix[:-1]: tree}
  flat = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.")
  return flat


@pytest.mark.parametrize("location", LOCATIONS)
def test_resolves_to_its_golden(location):
  resolved = flatten(main.plain(load(location)))
  file = GOLDENS / f"{location.replace(':', '_')}.json"
  if os.environ.get(WRITE) == "1":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(resolved, indent=2, sort_keys=True) + "\n", "utf-8")
  golden = json.loads(file.read_text("utf-8")) if file.exists() else {}
  missing = object()
  lines = [
    f"{key}: golden {golden.get(key, '(none)')!r}, now {resolved.get(key, '(none)')!r}"
    for key in sorted(golden.keys() | resolved.keys())
    if golden.get(key, missing) != resolved.get(key, missing)
  ]
  assert not lines, (
    f"configs/{location} no longer resolves to {file.relative_to(ROOT)}:\n  "
    + "\n  ".join(lines[:20])
    + f"\nIf this was meant, rewrite the goldens and commit them:\n  {WRITE}=1 python -m "
    "pytest tests/test_configs.py"
  )


def test_no_golden_is_left_over():
  names = {location.replace(":", "_") for location in LOCATIONS}
  assert {path.stem for path in GOLDENS.glob("*.json")} == names


@pytest.mark.parametrize("location", LOCATIONS)
def test_says_its_command_and_what_to_expect(location):
  stem = location.partition(":")[0]
  text = (ROOT / "configs" / f"{stem}.py").read_text("utf-8")
  header = text.split('"""')[1]
  if stem == "common":
    return
  assert f"python -m lpo_jax.main --config configs/{stem}.py --workdir" in header
  assert "Hardware" in header and "Expected" in header


def test_an_unknown_size_is_refused_with_the_known_ones():
  with pytest.raises(main.UserError, match=r"'smok'; did you mean 'smoke'\?"):
    load("quickstart:smok")


@pytest.mark.parametrize("location", LOCATIONS)
def test_every_shipped_config_is_whole(location):
  """`load_config` refuses unknown and missing keys; types are those of common."""
  resolved, defaults = load(location), common.get_config()

  def compare(given, known, prefix):
    for key, value in known.items():
      if value is None or given[key] is None:
        continue
      if isinstance(value, ml_collections.ConfigDict):
        if prefix + key not in common.OPEN_SECTIONS:
          compare(given[key], value, f"{prefix}{key}.")
      else:
        assert isinstance(given[key], type(value)), f"{prefix}{key}: {given[key]!r}"

  compare(resolved, defaults, "")


def leaves(config, prefix=""):
  """Dotted keys of all values; open sections, which are handed on whole, as one."""
  for key, value in config.items(preserve_field_references=False):
    if isinstance(value, ml_collections.ConfigDict) and (
      prefix + key not in common.OPEN_SECTIONS
    ):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key


def test_an_unknown_preset_is_refused_with_the_known_ones():
  with pytest.raises(main.UserError, match=r"'papr'; did you mean 'paper'\?"):
    load("repro_dpo_sd15:papr")


def test_every_key_of_common_is_read_by_some_code():
  paths = [p for p in (ROOT / "lpo_jax").rglob("*.py") if "configs" not in p.parts]
  code = "\n".join(path.read_text("utf-8") for path in paths)
  unread = []
  for name in leaves(common.get_config()):
    section, _, key = name.rpartition(".")
    if section:
      owners = "|".join(filter(None, (re.escape(section), CALLED.get(section))))
      pattern = rf"\b(?:{owners})\.{key}\b|[\"']{key}[\"']"
    else:
      pattern = rf"\bconfig\.{key}\b"
    if not re.search(pattern, code):
      unread.append(name)
  assert not unread, f"nothing reads {unread}; remove them from configs/common.py"


def describe(folder):
  """Checks a base pipeline; returns its model card on one line."""
  for name in ("unet", "vae", "text_encoder"):
    assert pretrained.load(folder, name).config == pretrained.read_config(folder, name)
  ids = pretrained.load_tokenizer(folder).tokenize(["a handwritten seven"])
  text = pretrained.read_config(folder, "text_encoder")
  assert ids.shape == (1, text["max_position_embeddings"])
  assert ids.max() == text["eos_token_id"] == text["vocab_size"] - 1
  assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 4e6
  card = " ".join((folder / "README.md").read_text("utf-8").split())
  assert "python -m lpo_jax.main --config configs/quickstart_base.py --workdir" in card
  assert "seed: 0" in card
  return card


def updates(config):
  return f"{config.train.total_steps} `sft` updates"


def test_the_base_that_ships():
  card = describe(quickstart.SHIPPED_BASE)
  assert updates(load("quickstart_base")) in card
  legible = re.search(r"recognises ([\d.]+) % of (\d+) samples", card)
  assert float(legible[1]) >= 85 and int(legible[2]) >= 100


@pytest.mark.slow  # a minute on two cores, and only a new base runs it
def test_the_command_behind_the_base_that_ships(tmp_path):
  """For a few steps: a pipeline and its card come out."""
  command = [sys.executable, "-m", "lpo_jax.main"]
  command += ["--config", str(ROOT / "configs" / "quickstart_base.py:smoke")]
  command += ["--workdir", str(tmp_path / "run")]
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, timeout=400
  )
  assert done.returncode == 0, done.stdout + done.stderr
  folder = tmp_path / "run" / "digits_base"
  assert updates(load("quickstart_base:smoke")) in describe(folder)
  assert f"base model: {folder}" in done.stdout
