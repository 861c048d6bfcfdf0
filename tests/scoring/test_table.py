"""Scorers found by name: options, words, and refusals before anything is read."""

import os

import ml_collections
import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.pretrained import pickles
from lpo_jax.scoring import preprocessing, scorers, tokens

IMAGES = np.zeros((2, 32, 32, 3), np.uint8)


def test_every_scorer_says_what_it_is():
  for name in set(scorers.SCORERS) - {"external"}:
    scorer = scorers.get(name)
    assert scorer.name == name
    assert scorer.higher_is_better != name.startswith("l1_")
    for words in (scorer.version, scorer.measures, scorer.scale, scorer.preprocessing):
      assert words, name
    assert scorer([], []).shape == (0,)


def test_options_come_from_the_config_by_name():
  paths = ml_collections.ConfigDict(
    {"hps_v2_1": "a", "aesthetic_v2": {"path": "b", "tower": "c", "dtype": "bfloat16"}}
  )
  hps, aesthetic, digits = scorers.chosen(
    ["hps_v2.1", "aesthetic_v2", "digits_taste"], paths
  )
  assert hps._path == "a" and hps.place.dtype == "float32"
  assert (aesthetic._path, aesthetic._tower) == ("b", "c")
  assert aesthetic.place.dtype == "bfloat16"
  assert digits.identity == "digits_taste 1"


@pytest.mark.parametrize(
  ("names", "paths", "words"),
  [
    (["hps_v3"], {}, "unknown scorer 'hps_v3'; did you mean"),
    (["hps_v2"], {"hps": "x"}, "unknown scorer in eval.scorer_paths 'hps'"),
    (["hps_v2"], {"hps_v2": {"pth": "x"}}, "mean 'path'"),
    (
      ["hps_v2"],
      {"hps_v2": {"dtype": "float16"}},
      "unknown dtype of a scorer 'float16'",
    ),
    (["hps_v2"], {"hps_v2": {"batch_size": 0}}, "expected at least 1"),
    (
      ["digits_taste"],
      {"digits_taste": "x"},
      "unknown option of scorer 'digits_taste'",
    ),
  ],
)
def test_refuses_what_is_in_no_table(names, paths, words):
  with pytest.raises(UserError) as refusal:
    scorers.chosen(names, paths)
  assert words in str(refusal.value)


def test_weights_that_are_not_there(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(UserError, match=r"'yuvalkirstain/PickScore_v1'.*give its folder"):
    _ = scorers.get("pickscore").identity
  with pytest.raises(
    UserError, match=r"HPS_v2.1_compressed.pt in .*which holds: x.txt"
  ):
    (tmp_path / "x.txt").write_text("")
    scorers.get("hps_v2.1", path=str(tmp_path))(IMAGES, ["a", "b"])
  with pytest.raises(UserError, match=r"aesthetic_v2.*improved-aesthetic-predictor"):
    _ = scorers.get("aesthetic_v2").identity
  with pytest.raises(UserError, match=r"no folder here.*no id on the Hub"):
    _ = scorers.get("hps_v2", path="no/such/place").identity
  (tmp_path / "w.safetensors").write_text("version https://git-lfs")
  with pytest.raises(UserError, match="not a readable safetensors file"):
    _ = scorers.get("clip_score", path=str(tmp_path / "w.safetensors")).identity
  with pytest.raises(UserError, match=r"ends in \.safetensors"):
    _ = scorers.get("clip_score", path=str(tmp_path / "x.txt")).identity


def test_a_malicious_file_is_refused_by_the_scorer(tmp_path):
  torch = pytest.importorskip("torch")

  class Evil:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path}/was_here",)

  file = tmp_path / "HPS_v2_compressed.pt"
  torch.save({"state_dict": {"visual.proj": Evil()}}, file)
  with pytest.raises(UserError, match=r"asks for posix\.system"):
    scorers.get("hps_v2", path=str(tmp_path))(IMAGES, ["a", "b"])
  assert not (tmp_path / "was_here").exists()


def test_refuses_heads_of_another_kind(tmp_path):
  torch = pytest.importorskip("torch")

  def refuse(words, **tensors):
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save({k.replace("_", "."): torch.zeros(v) for k, v in tensors.items()}, file)
    with pytest.raises(UserError, match=words):
      scorers.get("aesthetic_v2", path=str(tmp_path)).head()

  relu = {f"layers_{i}_{k}": (4, 4)[: 2 - (k == "bias")] for i in (0, 3, 6, 9, 11)
          for k in ("weight", "bias")}  # fmt: skip
  refuse("no activations between them", **relu)
  refuse("no aesthetic head", visual_proj=(2, 2))
  refuse("gives 3 numbers an image", weight=(3, 4), bias=(3,))
  linear = {f"layers_{i}_{k}": (4, 4)[: 2 - (k == "bias")] for i in (0, 2, 4, 6, 7)
            for k in ("weight", "bias")}  # fmt: skip
  refuse("after 4 numbers", **{**linear, "layers_6_weight": (4, 5)})


def test_calls_that_do_not_fit():
  taste = scorers.get("digits_taste")
  with pytest.raises(UserError, match="as many prompts as images, came 1 for 2"):
    taste(IMAGES, ["one"])
  with pytest.raises(UserError, match="as many names as images, came 3 for 2"):
    taste(IMAGES, ["one", "two"], names=["a", "b", "c"])
  with pytest.raises(UserError, match=r"expected images \[n, H, W, 3\]"):
    taste([IMAGES[0], IMAGES[1]], ["one", "two"])


def test_open_clip_cleans_prompts_as_its_tokenizer_does():
  clean = tokens.as_open_clip
  assert clean("  A\tcat &amp;amp; a   DOG ") == "a cat & a dog"
  assert clean("“It’s”") == '"it\'s"'
  assert clean("schÃ¶n") == "schön"
  assert tokens.as_it_is(" A  cat") == " A  cat"


def test_clip_tokens_end_with_the_end_token(clip_tokenizer):
  folder, vocabulary = clip_tokenizer
  ids = tokens.ClipTokens(folder, 8, tokens.as_it_is)(["seven", "digit two " * 20, ""])
  assert ids.shape == (3, 8) and ids.dtype == np.int32
  assert (ids[:, 0] == vocabulary - 2).all()
  assert ids[1, -1] == vocabulary - 1 and ids[2, 1] == vocabulary - 1


def test_describes_the_ways_in_words():
  assert set(preprocessing.WORDS) == set(preprocessing.WAYS)
  assert "longest side 224" in preprocessing.describe("letterbox", 224)
  assert pickles.CONVERT.count("weights_only=True") == 1


def test_paths_can_be_set_on_the_command_line():
  from lpo_jax import main
  from lpo_jax.configs import common

  config = common.get_config()
  main.override(config, "eval.scorer_paths.hps_v2_1", "weights/file.pt")
  (hps,) = scorers.chosen(["hps_v2.1"], config.eval.scorer_paths)
  assert (hps.name, hps._path) == ("hps_v2.1", "weights/file.pt")
