"""Scorers of edits against their stacks in torch, and by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from lpo_jax.errors import UserError
from lpo_jax.scoring import preprocessing, scorers

from .test_scorers import transformers_clip  # noqa: F401 (a fixture)

torch = pytest.importorskip("torch")

SIZE = 42
SIDE = 60
BEFORE = ["a seven", "nine in ink", "zero"]
AFTER = ["a bold seven", "a nine", "a hand drawing zero"]
ASKED = ["make it bold", "tilt it", "x"]


@pytest.fixture(scope="module")
def pictures():
  """Edits, sources and right edits, [3, 60, 60, 3] uint8 each."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (9, 6, 6, 3), np.uint8)
  big = [np.asarray(Image.fromarray(x).resize((SIDE, SIDE))) for x in coarse]
  return np.stack(big).reshape(3, 3, SIDE, SIDE, 3)


def stretched(images):
  """What InstructPix2Pix's metrics/clip_similarity.py does to [0, 1] images."""
  x = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
  x = torch.nn.functional.interpolate(x, size=SIZE, mode="bicubic", align_corners=False)
  mean, std = (
    torch.tensor(v)[:, None, None] for v in (preprocessing.MEAN, preprocessing.STD)
  )
  return (x - mean) / std


def unit(x):
  return x / x.norm(dim=-1, keepdim=True)


def image_features(model, x):
  with torch.no_grad():
    return unit(model.visual_projection(model.vision_model(x).pooler_output))


def text_features(model, folder, texts):
  from transformers import CLIPTokenizer

  tokenizer = CLIPTokenizer.from_pretrained(folder)
  ids = tokenizer(
    texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
  )
  with torch.no_grad():
    pooled = model.text_model(input_ids=ids.input_ids).pooler_output
    return unit(model.text_projection(pooled))


def test_stretching_is_torchs(pictures):
  ours = preprocessing.prepare(pictures[0], "stretch", SIZE)
  theirs = stretched(pictures[0]).permute(0, 2, 3, 1).numpy()
  assert np.abs(ours - theirs).max() < 2e-5
  # Not square, and enlarged.
  one = np.ascontiguousarray(pictures[0, :1, :31])
  ours = preprocessing.prepare(one, "stretch", SIZE)
  assert np.abs(ours - stretched(one).permute(0, 2, 3, 1).numpy()).max() < 2e-5


def test_clip_of_edits_is_instructpix2pixs(transformers_clip, pictures):  # noqa: F811
  """Directions and similarities, differences taken of unit vectors."""
  model, folder = transformers_clip
  edits, sources, targets = pictures
  told = {"source_captions": BEFORE, "target_captions": AFTER, "sources": [*sources]}
  told["targets"] = [*targets]
  v, v0 = (image_features(model, stretched(x)) for x in (edits, sources))
  t, t0 = (text_features(model, folder, x) for x in (AFTER, BEFORE))
  cosine = torch.nn.functional.cosine_similarity
  wanted = {
    "clip_direction": cosine(v - v0, t - t0),
    "clip_image_source": cosine(v, v0),
  }
  crop = [
    torch.from_numpy(preprocessing.prepare(x, "crop_late", SIZE)).permute(0, 3, 1, 2)
    for x in (edits, targets)
  ]
  w, w1 = (image_features(model, x) for x in crop)
  wanted |= {"clip_image_target": cosine(w, w1), "clip_caption": cosine(w, t)}
  for name, values in wanted.items():
    ours = scorers.get(name, path=str(folder), tokenizer=str(folder), batch_size=2)
    scores = ours(edits, ASKED, **told)
    np.testing.assert_allclose(scores, values.numpy(), atol=2e-5)
    assert np.ptp(scores) > 1e-3
  # An edit that changed nothing has no direction.
  same = scorers.get("clip_direction", path=str(folder), tokenizer=str(folder))
  assert same(sources, ASKED, **told).tolist() == [0, 0, 0]
  with pytest.raises(UserError, match="'clip_direction' needs the source captions"):
    same(edits, ASKED, sources=[*sources], target_captions=AFTER)


def test_dino_is_transformers(tmp_path, pictures, randomise):
  """ViTModel with a file as those on the Hub are, pooler and all."""
  transformers = pytest.importorskip("transformers")
  config = transformers.ViTConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    image_size=56,
    patch_size=8,
  )
  model = randomise(transformers.ViTModel(config, add_pooling_layer=True), 3)
  with torch.no_grad():
    model.embeddings.cls_token.normal_(generator=torch.manual_seed(1))
    model.embeddings.position_embeddings.normal_(generator=torch.manual_seed(2))
  model.save_pretrained(tmp_path)
  edits, sources, targets = pictures

  def features(images):
    large = [Image.fromarray(x).resize((64, 64), Image.BICUBIC) for x in images]
    x = np.stack([np.asarray(image)[4:60, 4:60] for image in large]) / 255.0
    x = (x - preprocessing.IMAGENET_MEAN) / preprocessing.IMAGENET_STD
    x = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
      return model(x).last_hidden_state[:, 0]

  for name, key, others in (
    ("dino_source", "sources", sources),
    ("dino_target", "targets", targets),
  ):
    ours = scorers.get(name, path=str(tmp_path), batch_size=2)
    scores = ours(edits, ASKED, **{key: [*others]})
    wanted = torch.nn.functional.cosine_similarity(features(edits), features(others))
    np.testing.assert_allclose(scores, wanted.numpy(), atol=2e-5)
    assert np.ptp(scores) > 1e-3
    np.testing.assert_allclose(ours(others, ASKED, **{key: [*others]}), 1, atol=1e-6)
  assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "gelu"


def test_l1_by_hand():
  scorer = scorers.get("l1_source")
  assert not scorer.higher_is_better and scorer.needs == ("sources",)
  edits = np.zeros((2, 2, 2, 3), np.uint8)
  sources = np.full((2, 2, 2, 3), 51, np.uint8)
  edits[1] = 255
  assert scorer(edits, ["a", "b"], sources=[*sources]).tolist() == pytest.approx(
    [0.2, 0.8]
  )
  with pytest.raises(UserError, match=r"'l1_target' needs the targets.*target_image"):
    scorers.get("l1_target")(edits, ["a", "b"], sources=[*sources])
  with pytest.raises(UserError, match="L1 compares pixels"):
    scorer(edits, ["a", "b"], sources=[*sources[:, :1]])
