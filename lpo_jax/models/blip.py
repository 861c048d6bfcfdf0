"""ImageReward: BLIP's vision tower, a BERT that attends to it, and a head on its state."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lpo_jax.errors import UserError
from lpo_jax.models import layers
from lpo_jax.models.attention import attend, precision
from lpo_jax.models.base import Model, Settings, Stack, resolve_config
from lpo_jax.types import Array, Params

KIND = "ImageReward"
VISION_DEFAULTS: dict[str, Any] = {
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "image_size": 224,
  "patch_size": 16,
  "layer_norm_eps": 1e-6,
}
TEXT_DEFAULTS: dict[str, Any] = {
  "vocab_size": 30524,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "max_position_embeddings": 512,
  "layer_norm_eps": 1e-12,
}
# What both towers have and nothing else is made for.
ONLY = {"hidden_act": ("gelu",), "add_cross_attention": (True,)}
HEAD_WIDTHS = (1024, 128, 64, 16)
# Of the head's output over its training data; constants of the published code.
MEAN = 0.16717362830052426
STD = 1.0333394966054072


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardOutput:
  """What ImageReward makes of images and their prompts.

  Attributes:
    image_states: [N, 1 + patches, D] the vision tower's last states after its norm.
    text_states: [N, L, E] the text tower's last states.
    reward: [N] the head's output, standardised.
  """

  image_states: Array
  text_states: Array
  reward: Array


class PatchEmbed(nnx.Module):
  """Patches to vectors."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    patch = fields["patch_size"]
    self.proj = layers.Conv(
      3, fields["hidden_size"], size=patch, stride=patch, padding=(0, 0), dtype=dtype
    )

  def __call__(self, images: Array) -> Array:
    y = self.proj(images)
    return y.reshape(y.shape[0], -1, y.shape[-1])


class VisionAttention(nnx.Module):
  """Attention of all patches to all; queries, keys and values in one matrix."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    channels = fields["hidden_size"]
    self.qkv = layers.Linear(channels, 3 * channels, dtype=settings.dtype)
    self.proj = layers.Linear(channels, channels, dtype=settings.dtype)
    self.heads = fields["num_attention_heads"]
    self.implementation = settings.attention

  def __call__(self, x: Array) -> Array:
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    q, k, v = (layers.split_heads(part, self.heads) for part in (q, k, v))
    y = attend(q, k, v, implementation=self.implementation)
    return self.proj(y.reshape(x.shape))


class VisionMlp(nnx.Module):
  """Two linear layers."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    channels, width = fields["hidden_size"], fields["intermediate_size"]
    self.fc1 = layers.Linear(channels, width, dtype=dtype)
    self.fc2 = layers.Linear(width, channels, dtype=dtype)

  def __call__(self, x: Array) -> Array:
    return self.fc2(layers.gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
  """Attention and a feed-forward layer, each behind a norm and added to its input."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    channels, eps = fields["hidden_size"], fields["layer_norm_eps"]
    self.norm1 = layers.LayerNorm(channels, eps=eps, dtype=settings.dtype)
    self.attn = VisionAttention(fields, settings)
    self.norm2 = layers.LayerNorm(channels, eps=eps, dtype=settings.dtype)
    self.mlp = VisionMlp(fields, settings.dtype)

  def __call__(self, x: Array) -> Array:
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class VisionTower(nnx.Module):
  """A class token and patches through the blocks, under timm's names."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    channels, dtype = fields["hidden_size"], settings.dtype
    places = (fields["image_size"] // fields["patch_size"]) ** 2 + 1
    self.patch_embed = PatchEmbed(fields, dtype)
    self.cls_token = layers.param(1, 1, channels, used_as=dtype)
    self.pos_embed = layers.param(1, places, channels, used_as=dtype)
    make = functools.partial(VisionBlock, fields, settings)
    self.blocks = Stack(make, fields["num_hidden_layers"], settings)
    self.norm = layers.LayerNorm(channels, eps=fields["layer_norm_eps"], dtype=dtype)

  def __call__(self, images: Array) -> Array:
    patches = self.patch_embed(images)
    first = self.cls_token[...].astype(patches.dtype)
    first = jnp.broadcast_to(first, (patches.shape[0], *first.shape[1:]))
    x = jnp.concatenate([first, patches], axis=1)
    return self.norm(self.blocks(x + self.pos_embed[...].astype(x.dtype)))


class BertProjections(nnx.Module):
  """Queries of the text; keys and values of the text, or of the image."""

  def __init__(self, fields: Mapping[str, Any], context: int, dtype: Any):
    channels = fields["hidden_size"]
    self.query = layers.Linear(channels, channels, dtype=dtype)
    self.key = layers.Linear(context, channels, dtype=dtype)
    self.value = layers.Linear(context, channels, dtype=dtype)
    self.heads = fields["num_attention_heads"]

  def __call__(self, x: Array, context: Array, seen: Array | None) -> Array:
    q = layers.split_heads(self.query(x), self.heads)
    k = layers.split_heads(self.key(context), self.heads)
    v = layers.split_heads(self.value(context), self.heads)
    # No more than 35 tokens: not worth a kernel that knows masks.
    product = functools.partial(jnp.einsum, precision=precision(q.dtype))
    scores = product("nlhd,nmhd->nhlm", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    if seen is not None:
      scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return product("nhlm,nmhd->nlhd", weights, v).reshape(x.shape)


class BertOutput(nnx.Module):
  """A linear layer, its input's origin added, and a norm behind both."""

  def __init__(self, inputs: int, fields: Mapping[str, Any], dtype: Any):
    channels = fields["hidden_size"]
    self.dense = layers.Linear(inputs, channels, dtype=dtype)
    self.LayerNorm = layers.LayerNorm(
      channels, eps=fields["layer_norm_eps"], dtype=dtype
    )

  def __call__(self, y: Array, x: Array) -> Array:
    return self.LayerNorm(self.dense(y) + x)


class BertAttention(nnx.Module):
  """Attention with its output layer."""

  def __init__(self, fields: Mapping[str, Any], context: int, dtype: Any):
    self.self = BertProjections(fields, context, dtype)
    self.output = BertOutput(fields["hidden_size"], fields, dtype)

  def __call__(self, x: Array, context: Array, seen: Array | None) -> Array:
    return self.output(self.self(x, context, seen), x)


class BertIntermediate(nnx.Module):
  """The wide half of a feed-forward layer."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    self.dense = layers.Linear(
      fields["hidden_size"], fields["intermediate_size"], dtype=dtype
    )

  def __call__(self, x: Array) -> Array:
    return layers.gelu(self.dense(x))


class BertLayer(nnx.Module):
  """Attention to the text, attention to the image, and a feed-forward layer."""

  def __init__(self, fields: Mapping[str, Any], context: int, settings: Settings):
    dtype = settings.dtype
    self.attention = BertAttention(fields, fields["hidden_size"], dtype)
    self.crossattention = BertAttention(fields, context, dtype)
    self.intermediate = BertIntermediate(fields, dtype)
    self.output = BertOutput(fields["intermediate_size"], fields, dtype)

  def __call__(self, x: Array, seen: Array, image_states: Array) -> Array:
    x = self.attention(x, x, seen)
    x = self.crossattention(x, image_states, None)
    return self.output(self.intermediate(x), x)


class BertEmbeddings(nnx.Module):
  """Tokens plus their places, normalised."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    channels = fields["hidden_size"]
    places = fields["max_position_embeddings"]
    self.word_embeddings = layers.Embedding(fields["vocab_size"], channels, dtype=dtype)
    self.position_embeddings = layers.Embedding(places, channels, dtype=dtype)
    self.LayerNorm = layers.LayerNorm(
      channels, eps=fields["layer_norm_eps"], dtype=dtype
    )

  def __call__(self, input_ids: Array) -> Array:
    places = jnp.arange(input_ids.shape[-1])
    return self.LayerNorm(
      self.word_embeddings(input_ids) + self.position_embeddings(places)
    )


class BertEncoder(nnx.Module):
  """The layers, one after the other."""

  def __init__(self, fields: Mapping[str, Any], context: int, settings: Settings):
    make = functools.partial(BertLayer, fields, context, settings)
    self.layer = Stack(make, fields["num_hidden_layers"], settings)

  def __call__(self, x: Array, seen: Array, image_states: Array) -> Array:
    return self.layer(x, seen, image_states)


class TextTower(nnx.Module):
  """A BERT with cross-attention in every layer."""

  def __init__(self, fields: Mapping[str, Any], context: int, settings: Settings):
    self.embeddings = BertEmbeddings(fields, settings.dtype)
    self.encoder = BertEncoder(fields, context, settings)

  def __call__(self, input_ids: Array, seen: Array, image_states: Array) -> Array:
    return self.encoder(self.embeddings(input_ids), seen, image_states)


class BLIP(nnx.Module):
  """Both towers, under the names of BLIP's files."""

  def __init__(
    self, vision: Mapping[str, Any], text: Mapping[str, Any], settings: Settings
  ):
    self.visual_encoder = VisionTower(vision, settings)
    self.text_encoder = TextTower(text, vision["hidden_size"], settings)


class Head(nnx.Module):
  """Five linear layers; between them only dropouts, which keep their numbers."""

  def __init__(self, inputs: int):
    widths = (inputs, *HEAD_WIDTHS, 1)
    dense = [
      layers.Linear(a, b, dtype=jnp.float32) for a, b in itertools.pairwise(widths)
    ]
    gap = layers.Nothing
    self.layers = nnx.List(
      [dense[0], gap(), dense[1], gap(), dense[2], gap(), dense[3], dense[4]]
    )

  def __call__(self, x: Array) -> Array:
    for layer in self.layers:
      x = layer(x)
    return x[..., 0]


class Reward(nnx.Module):
  """ImageReward under the names of its file."""

  def __init__(
    self, vision: Mapping[str, Any], text: Mapping[str, Any], settings: Settings
  ):
    self.blip = BLIP(vision, text, settings)
    self.mlp = Head(text["hidden_size"])

  def __call__(self, images: Array, input_ids: Array, seen: Array) -> RewardOutput:
    image_states = self.blip.visual_encoder(images)
    text_states = self.blip.text_encoder(input_ids, seen, image_states)
    reward = (self.mlp(text_states[:, 0].astype(jnp.float32)) - MEAN) / STD
    return RewardOutput(
      image_states.astype(jnp.float32), text_states.astype(jnp.float32), reward
    )


class RewardModel(Model):
  """Says how much people would like an image, given its prompt."""

  def apply(
    self, params: Params, images: Array, input_ids: Array, seen: Array
  ) -> RewardOutput:
    """Runs both towers and the head.

    reward = (head(text_states[:, 0]) - 0.16717) / 1.03334

    Args:
      params: nested dict in the shape of `abstract_params`.
      images: [N, H, W, 3], resized to the config's `image_size` and normalised.
      input_ids: [N, L] int32.
      seen: [N, L] bool, false where the text is padding.

    Returns:
      States and rewards, in fp32.

    Raises:
      UserError: images of another size, or more tokens than there are places.
    """
    vision, text = tower_fields(self.config)
    size, places = vision["image_size"], text["max_position_embeddings"]
    if tuple(images.shape[1:3]) != (size, size) or input_ids.shape[-1] > places:
      raise UserError(
        f"{KIND} takes images of {size}x{size} pixels and up to {places} tokens, came "
        f"{images.shape[1]}x{images.shape[2]} and {input_ids.shape[-1]}: resize the "
        "images, truncate the prompts."
      )
    run = self.settings.whole(lambda params, *rest: self.bind(params)(*rest))
    return run(params, images, input_ids, seen)


def tower_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Completes the fields of the vision tower and of the text tower.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  found = []
  for tower, defaults in (("vision", VISION_DEFAULTS), ("text", TEXT_DEFAULTS)):
    fields = resolve_config(
      config.get(f"{tower}_config") or {},
      defaults=defaults,
      only=ONLY,
      kind=f"{KIND} {tower}",
    )
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if width % heads:
      raise UserError(
        f"{KIND} {tower} config field 'num_attention_heads' is {heads}, which does not "
        f"divide 'hidden_size' {width}."
      )
    found.append(fields)
  return found[0], found[1]


def build(config: Mapping[str, Any], settings: Settings) -> RewardModel:
  """Derives the structure from `vision_config` and `text_config`.

  Args:
    config: absent fields have the values of the published ImageReward 1.0.
    settings: how to compute.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  vision, text = tower_fields(config)
  return RewardModel.of(lambda: Reward(vision, text, settings), config, settings)
