"""The image encoders and both towers of CLIP against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpo_jax import models, pretrained, trees
from lpo_jax.errors import UserError

VISION = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "projection_dim": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "image_size": 12,
  "patch_size": 4,
}
TEXT = {
  "vocab_size": 99,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "max_position_embeddings": 9,
  "bos_token_id": 97,
  "eos_token_id": 98,
  "pad_token_id": 1,
}
IMAGES = np.random.default_rng(1).standard_normal((2, 12, 12, 3), np.float32)
IDS = np.random.default_rng(0).integers(3, 97, (3, 9)).astype(np.int32)
IDS[:, 0] = 97
IDS[0, 4:], IDS[1, 8], IDS[2, 6:] = 98, 98, 98


def build(class_name="CLIPVisionModel", **fields):
  return models.build({"architectures": [class_name], **VISION, **fields})


def planes(torch, images):
  return torch.tensor(images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
  ("class_name", "activation"),
  [
    pytest.param("CLIPVisionModel", "gelu", id="h14"),
    pytest.param("CLIPVisionModelWithProjection", "quick_gelu", id="l14"),
  ],
)
def test_equals_transformers(peer, relative_error, class_name, activation):
  transformers = pytest.importorskip("transformers")
  config = transformers.CLIPVisionConfig(**VISION, hidden_act=activation)
  vision = peer(getattr(transformers, class_name)(config), "image_encoder")
  projects = class_name == "CLIPVisionModelWithProjection"
  theirs = vision.module(pixel_values=planes(vision.torch, IMAGES))
  pooled = theirs.image_embeds if projects else theirs.pooler_output
  last = theirs.last_hidden_state
  weights = np.random.default_rng(2).standard_normal(last.shape, np.float32)

  def scalar(params):
    output = vision.part.apply(params, IMAGES)
    loss = jnp.sum(output.last_hidden_state * weights)
    return loss + jnp.sum(jnp.sin(output.pooled)), output

  gradients, ours = jax.jit(jax.grad(scalar, has_aux=True))(vision.part.params)
  assert ours.pooled.shape == (2, 24 if projects else 32)
  assert relative_error(ours.last_hidden_state, last.detach()) < 1e-5
  assert relative_error(ours.pooled, pooled.detach()) < 1e-5

  expected = vision.gradients((last * vision.torch.tensor(weights)).sum()
                              + pooled.sin().sum())  # fmt: skip
  gradients = trees.named_leaves(gradients)
  assert gradients.keys() == expected.keys()
  largest = max(np.linalg.norm(g) for g in expected.values())
  for name, gradient in expected.items():
    bound = max(np.linalg.norm(gradient), 1e-3 * largest)
    assert np.linalg.norm(gradients[name] - gradient) < 1e-4 * bound, name


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_both_towers_equal_transformers(peer, relative_error, activation):
  transformers = pytest.importorskip("transformers")
  config = transformers.CLIPConfig(
    text_config={**TEXT, "hidden_act": activation},
    vision_config={**VISION, "hidden_act": activation},
    projection_dim=20,
  )
  clip = peer(transformers.CLIPModel(config), "clip")
  with clip.torch.no_grad():
    clip.module.logit_scale.fill_(3.25)
  clip.module.save_pretrained(clip.root / "clip")
  part = pretrained.load(clip.root, "clip")
  with clip.torch.no_grad():
    theirs = clip.module(
      input_ids=clip.torch.tensor(IDS.astype(np.int64)),
      pixel_values=planes(clip.torch, IMAGES),
    )
  texts = jax.jit(part.model.embed_texts)(part.params, IDS)
  images = jax.jit(part.model.embed_images)(part.params, IMAGES)
  assert texts.shape == (3, 20) and images.shape == (2, 20)
  texts /= jnp.linalg.norm(texts, axis=-1, keepdims=True)
  images /= jnp.linalg.norm(images, axis=-1, keepdims=True)
  assert relative_error(texts, theirs.text_embeds) < 1e-5
  assert relative_error(images, theirs.image_embeds) < 1e-5
  assert part.params["logit_scale"] == np.float32(3.25)
  logits = jnp.exp(part.params["logit_scale"]) * texts @ images.T
  assert relative_error(logits, theirs.logits_per_text) < 1e-5

  # Round trip, and names that old files and the encoder by itself have.
  pretrained.save(clip.root / "again", part)
  ours = clip.root / "again" / "clip" / "model.safetensors"
  assert ours.read_bytes() == (clip.root / "clip" / "model.safetensors").read_bytes()
  tensors = load_file(ours)
  assert tensors["logit_scale"].shape == ()
  places = {
    "text_model.embeddings.position_ids": np.arange(9)[None],
    "vision_model.embeddings.position_ids": np.arange(10)[None],
  }
  save_file({**tensors, **places}, ours, metadata={"format": "pt"})
  again = pretrained.load(
    clip.root / "again",
    "clip",
    sharding=lambda *_: jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )
  for name, leaf in trees.named_leaves(part.params).items():
    assert np.array_equal(trees.named_leaves(again.params)[name], leaf), name
  assert again.params["logit_scale"].shape == ()


def test_old_configs_of_both_towers_say_their_fields_twice():
  transformers = pytest.importorskip("transformers")
  fields = {
    "architectures": ["CLIPModel"],
    "projection_dim": 20,
    "text_config": {**TEXT, "hidden_size": 64},
    "text_config_dict": TEXT,
    "vision_config": VISION,
    "vision_config_dict": None,
  }
  theirs = transformers.CLIPConfig(**fields)
  assert theirs.text_config.hidden_size == 16
  shapes = models.build(fields).named_shapes()
  assert shapes["text_projection.kernel"].shape == (16, 20)
  assert shapes["visual_projection.kernel"].shape == (32, 20)


def test_full_size_parameter_counts():
  """laion's CLIP-H/14 and OpenAI's CLIP-L/14, as counted on torch's meta device."""

  def count(width, text, vision, activation):
    fields = {
      "architectures": ["CLIPModel"],
      "projection_dim": width,
      "text_config": {"hidden_act": activation, **text},
      "vision_config": {"patch_size": 14, "hidden_act": activation, **vision},
    }
    shapes = models.build(fields).named_shapes().values()
    return sum(np.prod(shape.shape, dtype=np.int64) for shape in shapes)

  def sizes(width, layers, heads):
    return {
      "hidden_size": width,
      "intermediate_size": 4 * width,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
    }

  assert count(1024, sizes(1024, 24, 16), sizes(1280, 32, 16), "gelu") == 986_109_441
  assert count(768, sizes(768, 12, 12), sizes(1024, 24, 16), "gelu") == 427_616_513


def test_refuses_images_of_another_size():
  model = build()
  with pytest.raises(UserError, match="12x12 pixels, came 8x12"):
    model.apply(model.abstract_params, np.zeros((1, 8, 12, 3), np.float32))


@pytest.mark.parametrize(
  ("field", "value"),
  [("hidden_act", "relu"), ("patch_size", [4, 4]), ("num_attention_heads", 5)],
)
def test_refuses_what_it_does_not_implement_by_name(field, value):
  with pytest.raises(UserError, match=f"CLIPVisionModel config field '{field}'"):
    build(**{field: value})
  pair = {"architectures": ["CLIPModel"], "vision_config": {**VISION, field: value}}
  with pytest.raises(UserError, match=f"CLIPModel vision config field '{field}'"):
    models.build({**pair, "text_config": TEXT})
