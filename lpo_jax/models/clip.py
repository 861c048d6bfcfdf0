"""CLIP's text encoders, with and without their projection."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import layers
from lpo_jax.models.attention import attend
from lpo_jax.models.base import Model, Settings, Stack, resolve_config
from lpo_jax.types import Array, Params

DEFAULTS: dict[str, Any] = {
  "vocab_size": 49408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "projection_dim": 512,
  "num_hidden_layers": 12,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "eos_token_id": 49407,
}

ACTIVATIONS = {"quick_gelu": layers.quick_gelu, "gelu": layers.gelu}

# Configs of before transformers 4.31 say 2, whatever the end token of the vocabulary is.
LEGACY_EOS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextOutput:
  """What a text encoder says about a prompt.

  Attributes:
    hidden_states: the embeddings, then each layer's output: [N, L, D] each. SDXL reads
      the last but one.
    last_hidden_state: [N, L, D] the last layer's output after the final norm.
    pooled: [N, D] `last_hidden_state` at the end token; [N, P] projected where the
      class has a projection.
  """

  hidden_states: tuple[Array, ...]
  last_hidden_state: Array
  pooled: Array


class SelfAttention(nnx.Module):
  """Multi-head attention, causal in texts and not in images."""

  def __init__(self, channels: int, heads: int, settings: Settings, is_causal: bool):
    dtype = settings.dtype
    self.k_proj = layers.Linear(channels, channels, dtype=dtype)
    self.v_proj = layers.Linear(channels, channels, dtype=dtype)
    self.q_proj = layers.Linear(channels, channels, dtype=dtype)
    self.out_proj = layers.Linear(channels, channels, dtype=dtype)
    self.heads = heads
    self.is_causal = is_causal
    self.implementation = settings.attention

  def __call__(self, x: Array) -> Array:
    y = attend(
      layers.split_heads(self.q_proj(x), self.heads),
      layers.split_heads(self.k_proj(x), self.heads),
      layers.split_heads(self.v_proj(x), self.heads),
      implementation=self.implementation,
      is_causal=self.is_causal,
    )
    return self.out_proj(y.reshape(x.shape))


class FeedForward(nnx.Module):
  """Two linear layers."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    channels, width = fields["hidden_size"], fields["intermediate_size"]
    self.fc1 = layers.Linear(channels, width, dtype=dtype)
    self.fc2 = layers.Linear(width, channels, dtype=dtype)
    self.activation = fields["hidden_act"]

  def __call__(self, x: Array) -> Array:
    return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
  """Attention and a feed-forward layer, each behind a norm and added to its input."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings, is_causal: bool):
    channels, eps = fields["hidden_size"], fields["layer_norm_eps"]
    heads, dtype = fields["num_attention_heads"], settings.dtype
    self.self_attn = SelfAttention(channels, heads, settings, is_causal)
    self.layer_norm1 = layers.LayerNorm(channels, eps=eps, dtype=dtype)
    self.mlp = FeedForward(fields, dtype)
    self.layer_norm2 = layers.LayerNorm(channels, eps=eps, dtype=dtype)

  def __call__(self, x: Array) -> Array:
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
  """Tokens plus their places."""

  def __init__(self, fields: Mapping[str, Any], dtype: Any):
    channels = fields["hidden_size"]
    places = fields["max_position_embeddings"]
    self.token_embedding = layers.Embedding(fields["vocab_size"], channels, dtype=dtype)
    self.position_embedding = layers.Embedding(places, channels, dtype=dtype)

  def __call__(self, input_ids: Array) -> Array:
    places = jnp.arange(input_ids.shape[-1])
    return self.token_embedding(input_ids) + self.position_embedding(places)


class Encoder(nnx.Module):
  """The layers, one after the other."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings, is_causal: bool):
    count = fields["num_hidden_layers"]
    make = functools.partial(EncoderLayer, fields, settings, is_causal)
    self.layers = Stack(make, count, settings)

  def __call__(self, x: Array) -> tuple[Array, ...]:
    return (x, *self.layers.states(x))


class TextTransformer(nnx.Module):
  """Everything but the projection."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    self.embeddings = Embeddings(fields, settings.dtype)
    self.encoder = Encoder(fields, settings, is_causal=True)
    self.final_layer_norm = layers.LayerNorm(
      fields["hidden_size"], eps=fields["layer_norm_eps"], dtype=jnp.float32
    )
    self.eos_token_id = fields["eos_token_id"]

  def __call__(self, input_ids: Array) -> TextOutput:
    states = self.encoder(self.embeddings(input_ids))
    last = self.final_layer_norm(states[-1])
    if self.eos_token_id == LEGACY_EOS:
      ends = jnp.argmax(input_ids, axis=-1)
    else:
      ends = jnp.argmax(input_ids == self.eos_token_id, axis=-1)
    pooled = jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]
    states = tuple(state.astype(jnp.float32) for state in states)
    return TextOutput(states, last, pooled)


class CLIPText(nnx.Module):
  """The encoder under the names that Stable Diffusion's files have."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings, projects: bool):
    self.text_model = TextTransformer(fields, settings)
    if projects:
      self.text_projection = layers.Linear(
        fields["hidden_size"], fields["projection_dim"], bias=False, dtype=jnp.float32
      )

  def __call__(self, input_ids: Array) -> TextOutput:
    output = self.text_model(input_ids)
    if not hasattr(self, "text_projection"):
      return output
    return dataclasses.replace(output, pooled=self.text_projection(output.pooled))


class TextEncoder(Model):
  """Turns token ids into the text states that a UNet attends to."""

  def apply(self, params: Params, input_ids: Array) -> TextOutput:
    """Runs the encoder.

    Args:
      params: nested dict in the shape of `abstract_params`.
      input_ids: [N, L] int32 with L up to the config's `max_position_embeddings`. The
        pooled state is taken at the first `eos_token_id`, or, where an old config says
        2, at the highest id.

    Returns:
      All states, in fp32.

    Raises:
      UserError: more tokens than the model has places.
    """
    check_length(input_ids, self.config)
    run = self.settings.whole(lambda params, ids: self.bind(params)(ids))
    return run(params, input_ids)

  def skipped(self, params: Params, output: TextOutput, skip: int) -> Array:
    """Returns what the final norm makes of an earlier layer's output.

    Args:
      params: as for `apply`.
      output: what `apply` gave.
      skip: how many of the last layers are left out; 0 gives `last_hidden_state`.

    Returns:
      [N, L, D] fp32.
    """
    if skip == 0:
      return output.last_hidden_state
    norm = self.bind(params).text_model.final_layer_norm
    return norm(output.hidden_states[-(skip + 1)])


def check_length(input_ids: Array, config: Mapping[str, Any]) -> None:
  """Refuses texts that the position table has no places for.

  Raises:
    UserError: they have more tokens than the config says.
  """
  places = config.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
  if input_ids.shape[-1] > places:
    raise UserError(
      f"the text encoder has {places} places, came {input_ids.shape[-1]} tokens: "
      "truncate the prompts (the tokenizer's model_max_length does)."
    )


def tower_fields(
  config: Mapping[str, Any], defaults: Mapping[str, Any], kind: str
) -> dict[str, Any]:
  """Completes the fields of one tower of CLIP.

  Raises:
    UserError: an activation that is not implemented, or heads that do not divide the
      width.
  """
  fields = resolve_config(config, defaults=defaults, only={}, kind=kind)
  if fields["hidden_act"] not in ACTIVATIONS:
    raise unknown_name(
      f"{kind} config field 'hidden_act':", fields["hidden_act"], ACTIVATIONS
    )
  width, heads = fields["hidden_size"], fields["num_attention_heads"]
  if width % heads:
    raise UserError(
      f"{kind} config field 'num_attention_heads' is {heads}, which does not divide "
      f"'hidden_size' {width}."
    )
  return fields


def text_fields(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """Completes the fields of a `CLIPTextConfig`.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  fields = tower_fields(config, DEFAULTS, kind)
  if not isinstance(fields["eos_token_id"], int):
    raise UserError(
      f"{kind} config field 'eos_token_id' is {fields['eos_token_id']!r}; implemented: "
      "one int."
    )
  return fields


def build(config: Mapping[str, Any], settings: Settings) -> TextEncoder:
  """Derives a text encoder's structure from its config.

  Args:
    config: the fields of a transformers `CLIPTextConfig`; `architectures` decides
      whether there is a projection.
    settings: how to compute.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  kind = config["architectures"][0]
  fields = text_fields(config, kind)
  projects = kind == "CLIPTextModelWithProjection"
  return TextEncoder.of(lambda: CLIPText(fields, settings, projects), config, settings)
