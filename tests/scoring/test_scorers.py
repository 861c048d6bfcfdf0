"""Every scorer against its original stack in torch, from the same PNG files on.

Random weights at reduced widths, through the files and the code that the published
weights take. benchmarks/scorer_parity.py does it at full size.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from lpo_jax import models
from lpo_jax.models import blip
from lpo_jax.pretrained import checkpoints
from lpo_jax.scoring import scorers, tokens

torch = pytest.importorskip("torch")

from . import peers  # noqa: E402 (needs torch)

SIZE, LENGTH, EMBED = 42, 20, 16
VISION = {"width": 40, "layers": 2, "head_width": 20, "patch_size": 14}
TEXT = {"width": 24, "layers": 2, "heads": 3, "context_length": LENGTH}
TOLERANCE = 1e-4
BATCH = 4  # of six photos: the second batch is filled up

BERT = [
  "[PAD]",
  "[UNK]",
  "[CLS]",
  "[SEP]",
  "[MASK]",
  *"abcdefghijklmnopqrstuvwxyz",
  "the",
]
BERT += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
BERT_SIZES = {
  **{"vocab_size": len(BERT) + 2, "hidden_size": 24, "intermediate_size": 40},
  **{"num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 40},
  "layer_norm_eps": 1e-12,
}
VIT_SIZES = {
  **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
  **{"num_attention_heads": 4, "image_size": SIZE, "patch_size": 14},
  "layer_norm_eps": 1e-6,
}


def scorer(name, path, **options):
  return scorers.get(name, path=str(path), batch_size=BATCH, **options)


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory, clip_tokenizer, randomise):
  """HPS v2's stack: its torch model and a folder with the file as it is published."""
  tokenizer, vocabulary = clip_tokenizer
  folder = tmp_path_factory.mktemp("hps")
  fields = {
    "embed_dim": EMBED,
    "vision_cfg": {**VISION, "image_size": SIZE},
    "text_cfg": {**TEXT, "vocab_size": vocabulary},
  }
  model = randomise(peers.OpenClip(fields), 1)
  state = {f"module.{name}": value for name, value in model.state_dict().items()}
  state["module.attn_mask"] = torch.zeros(LENGTH, LENGTH)
  torch.save({"epoch": 1, "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
  text = json.dumps({"model_cfg": fields, "preprocess_cfg": {}})
  (folder / "open_clip_config.json").write_text(text)
  for file in tokenizer.iterdir():
    shutil.copy(file, folder)
  return model, folder


def pad_with_zeros(ids):
  """What open_clip puts behind the end token; the tokenizers here repeat the token."""
  ids = torch.tensor(np.asarray(ids, np.int64))
  ends = ids.argmax(-1, keepdim=True)
  return torch.where(torch.arange(ids.shape[1]) > ends, 0, ids)


def cosines(model, folder, photos, prompts):
  """100 cos of HPS v2's stack, one image at a time."""
  own = tokens.ClipTokens(folder, LENGTH, tokens.as_open_clip)
  scores = []
  with torch.no_grad():
    for path, prompt in zip(photos, prompts):
      image = model.encode_image(peers.letterbox(path, SIZE)[None])
      text = model.encode_text(pad_with_zeros(own([prompt])))
      scores.append(100 * (image * text).sum().item())
  return np.array(scores)


def test_hps_equals_its_stack(open_clip, photos, opened, prompts, worst):
  model, folder = open_clip
  ours = scorer("hps_v2.1", folder)
  scores = ours(opened, prompts)
  theirs = cosines(model, folder, photos, prompts)
  assert worst(scores, theirs) < TOLERANCE
  assert scores.std() > 1
  assert (ours.version, ours.higher_is_better) == ("HPS v2.1", True)
  assert set(ours.description()) == {
    *("name", "version", "scale", "preprocessing", "higher_is_better", "identity")
  }
  # The place in a batch does not matter, nor whether pixels come as arrays.
  order = [3, 1, 4, 0, 5, 2, 3]
  again = ours([np.asarray(opened[i]) for i in order], [prompts[i] for i in order])
  assert np.allclose(again, scores[order], rtol=1e-6)
  ours.release()
  assert np.array_equal(ours(opened, prompts), scores)

  # A CLIP score of the same kind reads the same weights under their other names.
  state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
  plain = {f"{name.removeprefix('module.')}": v for name, v in state.items()}
  torch.save(plain, folder / "open_clip_pytorch_model.bin")
  h14 = scorer("clip_score_h14", folder)
  assert np.array_equal(h14(opened, prompts), scores)
  assert h14.identity == ours.identity


def test_open_clip_itself(open_clip, opened):
  """The re-statement in `peers` against the package, where it is installed."""
  try:
    import open_clip as package
  except Exception as reason:  # its torchvision may not fit this torch
    pytest.skip(f"open_clip cannot be imported: {reason}")
  model, folder = open_clip
  fields = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
  theirs = package.model.CLIP(**fields).eval()
  theirs.load_state_dict(model.state_dict())
  x = torch.stack([peers.letterbox(picture.filename, SIZE) for picture in opened])
  ids = tokens.ClipTokens(folder, LENGTH, tokens.as_open_clip)(
    ["a seven", "nine in ink"]
  )
  with torch.no_grad():
    for ours, other in (
      (model.encode_image(x), theirs.encode_image(x, normalize=True)),
      (
        model.encode_text(pad_with_zeros(ids)),
        theirs.encode_text(pad_with_zeros(ids), normalize=True),
      ),
    ):
      assert (ours - other).abs().max() < 1e-6


@pytest.fixture(scope="module")
def transformers_clip(tmp_path_factory, clip_tokenizer, randomise):
  """PickScore's stack: a CLIPModel of transformers and its folder."""
  transformers = pytest.importorskip("transformers")
  tokenizer, vocabulary = clip_tokenizer
  folder = tmp_path_factory.mktemp("pickscore")
  towers = {
    "vision_config": {
      **{"hidden_size": 40, "intermediate_size": 160, "num_hidden_layers": 2},
      **{"num_attention_heads": 2, "patch_size": 14, "image_size": SIZE},
    },
    "text_config": {
      **{"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2},
      **{"num_attention_heads": 3, "max_position_embeddings": LENGTH},
      **{"vocab_size": vocabulary, "bos_token_id": vocabulary - 2},
      **{"eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1},
    },
  }
  for tower in towers.values():
    tower["hidden_act"] = "quick_gelu"
  config = transformers.CLIPConfig(**towers, projection_dim=EMBED)
  model = randomise(transformers.CLIPModel(config), 2)
  with torch.no_grad():
    model.logit_scale.fill_(3.2)
  model.save_pretrained(folder)
  for file in tokenizer.iterdir():
    shutil.copy(file, folder)
  return model, folder


def processed(path):
  """transformers' CLIPImageProcessor on a file."""
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  side = {"height": SIZE, "width": SIZE}
  processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side)
  return torch.tensor(processor(Image.open(path))["pixel_values"][0])[None]


def test_pickscore_and_clip_score_equal_transformers(
  transformers_clip, photos, opened, prompts, worst
):
  from transformers import CLIPTokenizer

  model, folder = transformers_clip
  tokenizer = CLIPTokenizer.from_pretrained(folder)
  theirs = []
  with torch.no_grad():
    for path, prompt in zip(photos, prompts):
      text = tokenizer(
        prompt, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
      )
      theirs.append(model(pixel_values=processed(path), **text).logits_per_image.item())
  ours = scorer("pickscore", folder)(opened, prompts)
  assert worst(ours, theirs) < TOLERANCE
  assert ours.std() > 0.5
  # The other scale, out of a file of torch's, by its path, with a tokenizer elsewhere.
  torch.save(model.state_dict(), folder / "pytorch_model.bin")
  clip = scorer("clip_score", folder / "pytorch_model.bin", tokenizer=str(folder))
  assert worst(clip(opened, prompts), np.array(theirs) * 100 / np.exp(3.2)) < TOLERANCE
  assert clip.identity == scorer("pickscore", folder).identity


@pytest.mark.parametrize("name", ["aesthetic_v1", "aesthetic_v2"])
def test_aesthetic_equals_its_stack(
  transformers_clip, photos, opened, prompts, worst, randomise, tmp_path, name
):
  model, folder = transformers_clip
  if name == "aesthetic_v1":
    file, head = "sa_0_4_vit_l_14_linear.pth", torch.nn.Linear(EMBED, 1)
    layers = head
  else:
    file, head = "sac+logos+ava1-l14-linearMSE.pth", peers.head(EMBED)
    layers = head["layers"]
  randomise(head, 3)
  torch.save(head.state_dict(), tmp_path / file)
  with torch.no_grad():
    x = torch.stack([peers.crop_late(path, SIZE) for path in photos])
    embeds = model.visual_projection(model.vision_model(x).pooler_output)
    theirs = layers(torch.nn.functional.normalize(embeds, dim=-1))[:, 0].numpy()
  ours = scorer(name, tmp_path, tower=str(folder))
  assert worst(ours(opened, prompts), theirs) < TOLERANCE
  assert theirs.std() > 0.01
  tower = checkpoints.clip(folder, ["model.safetensors"], "ViT-L-14-quickgelu")
  assert ours.identity.split("+")[0] == tower.fingerprint() != ours.identity


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory, randomise):
  """ImageReward's stack out of transformers' BLIP, and its file as it is published."""
  transformers = pytest.importorskip("transformers")
  from transformers.models.blip.modeling_blip import BlipVisionModel
  from transformers.models.blip.modeling_blip_text import BlipTextModel

  folder = tmp_path_factory.mktemp("image_reward")
  vision = randomise(BlipVisionModel(transformers.BlipVisionConfig(**VIT_SIZES)), 4)
  config = transformers.BlipTextConfig(
    **BERT_SIZES, encoder_hidden_size=VIT_SIZES["hidden_size"], is_decoder=True
  )
  text = randomise(BlipTextModel(config, add_pooling_layer=False), 5)
  mlp = randomise(peers.head(BERT_SIZES["hidden_size"]), 6)
  torch.save(peers.published_names(vision, text, mlp), folder / "ImageReward.pt")
  fields = {"architectures": ["ImageReward"], "vision_config": VIT_SIZES}
  (folder / "config.json").write_text(json.dumps({**fields, "text_config": BERT_SIZES}))
  (folder / "vocab.txt").write_text("\n".join(BERT) + "\n")
  return vision, text, mlp, folder


def test_image_reward_equals_its_stack(image_reward, photos, opened, worst):
  from transformers import BertTokenizer

  vision, text, mlp, folder = image_reward
  prompts = ["the cat", "a dog " * 30, "", "the bee, the hive", "zzz", "The CAT"]
  tokenizer = BertTokenizer.from_pretrained(folder)
  tokenizer.add_special_tokens({"bos_token": "[DEC]"})
  tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
  theirs = []
  with torch.no_grad():
    for path, prompt in zip(photos, prompts):
      words = tokenizer(
        prompt,
        padding="max_length",
        truncation=True,
        max_length=35,
        return_tensors="pt",
      )
      states = vision(peers.crop_late(path, SIZE)[None]).last_hidden_state
      last = text(
        input_ids=words.input_ids,
        attention_mask=words.attention_mask,
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long),
      ).last_hidden_state
      reward = mlp["layers"](last[:, 0])[0, 0]
      theirs.append(((reward - 0.16717362830052426) / 1.0333394966054072).item())
  ours = scorer("image_reward", folder)
  scores = ours(opened, prompts)
  assert worst(scores, theirs) < TOLERANCE
  assert scores.std() > 0.05
  assert scores[0] != ours([opened[0]], ["the bee"])[0]


def test_image_rewards_towers_equal_transformers(image_reward):
  vision, text, _, folder = image_reward
  checkpoint = checkpoints.image_reward(folder, ["ImageReward.pt"])
  model = models.build(checkpoint.config)
  assert isinstance(model, blip.RewardModel)
  params = checkpoint.load(model)
  generator = np.random.default_rng(0)
  images = generator.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
  ids = generator.integers(0, len(BERT), (2, 9)).astype(np.int32)
  seen = np.arange(9) < np.array([[9], [4]])
  ours = jax.jit(model.apply)(params, images, ids, seen)
  with torch.no_grad():
    states = vision(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
    last = text(
      input_ids=torch.tensor(ids.astype(np.int64)),
      attention_mask=torch.tensor(seen.astype(np.int64)),
      encoder_hidden_states=states,
    ).last_hidden_state
  assert np.linalg.norm(ours.image_states - states.numpy()) < 1e-5 * states.norm()
  assert np.linalg.norm(ours.text_states - last.numpy()) < 1e-5 * last.norm()


def test_full_size_parameter_counts():
  """ImageReward's towers and head, as its code makes them; without BLIP's other heads."""

  def count(config):
    shapes = models.build(config).named_shapes().values()
    return sum(np.prod(shape.shape, dtype=np.int64) for shape in shapes)

  vision = 197 * 1024 + 1024 + 3 * 256 * 1024 + 1024 + 2048
  vision += 24 * (12 * 1024**2 + 13 * 1024)
  text = (30524 + 512 + 2) * 768
  matrices = (4 + 2 + 8) * 768**2 + 2 * 1024 * 768  # self, cross, feed-forward, cross
  vectors = (4 + 4 + 5) + 3 * 2  # biases of the same, and three norms
  text += 12 * (matrices + vectors * 768)
  head = 768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16 + 1024 + 128 + 64 + 16 + 1
  assert count({"architectures": ["ImageReward"]}) == vision + text + head
  for name, expected in (
    ("ViT-H-14", 986_109_441),
    ("ViT-L-14-quickgelu", 427_616_513),
  ):
    assert count(checkpoints.clip_config(checkpoints.OPEN_CLIP[name])) == expected
