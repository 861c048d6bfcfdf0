"""The conditional UNet of Stable Diffusion 1, 2 and XL, of SSD-1B and of edits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import layers
from lpo_jax.models.base import Model, Settings, resolve_config
from lpo_jax.types import Array, Params

DEFAULTS: dict[str, Any] = {
  "sample_size": None,
  "in_channels": 4,
  "out_channels": 4,
  "center_input_sample": False,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
  "block_out_channels": (320, 640, 1280, 1280),
  "layers_per_block": 2,
  "downsample_padding": 1,
  "mid_block_scale_factor": 1,
  "norm_num_groups": 32,
  "norm_eps": 1e-5,
  "cross_attention_dim": 1280,
  "transformer_layers_per_block": 1,
  "reverse_transformer_layers_per_block": None,
  "attention_head_dim": 8,
  "use_linear_projection": False,
  "addition_embed_type": None,
  "addition_time_embed_dim": None,
  "projection_class_embeddings_input_dim": None,
  # The softmax is in fp32 whether it is asked for or not.
  "upcast_attention": False,
  # Sizes of what `ONLY` keeps switched off.
  "addition_embed_type_num_heads": 64,
}

ONLY: dict[str, tuple[Any, ...]] = {
  "only_cross_attention": (False,),
  "mid_block_only_cross_attention": (None, False),
  "dropout": (0.0, 0),
  "act_fn": ("silu", "swish"),
  "encoder_hid_dim": (None,),
  "encoder_hid_dim_type": (None,),
  "num_attention_heads": (None,),
  "dual_cross_attention": (False,),
  "class_embed_type": (None,),
  "num_class_embeds": (None,),
  "resnet_time_scale_shift": ("default",),
  "resnet_skip_time_act": (False,),
  "resnet_out_scale_factor": (1.0, 1),
  "time_embedding_type": ("positional",),
  "time_embedding_dim": (None,),
  "time_embedding_act_fn": (None,),
  "timestep_post_act": (None,),
  "time_cond_proj_dim": (None,),
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "attention_type": ("default",),
  "class_embeddings_concat": (False,),
  "cross_attention_norm": (None,),
}

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2D": 0, "UNetMidBlock2DCrossAttn": 1}


class GatedProjection(nnx.Module):
  """GEGLU: one projection, half of it values and half of it gates."""

  def __init__(self, inputs: int, outputs: int, dtype: Any):
    self.proj = layers.Linear(inputs, 2 * outputs, dtype=dtype)

  def __call__(self, x: Array) -> Array:
    value, gate = jnp.split(self.proj(x), 2, axis=-1)
    return value * layers.gelu(gate)


class FeedForward(nnx.Module):
  """A gated layer four times as wide, and back."""

  def __init__(self, channels: int, dtype: Any):
    self.net = nnx.List(
      [
        GatedProjection(channels, 4 * channels, dtype),
        layers.Nothing(),
        layers.Linear(4 * channels, channels, dtype=dtype),
      ]
    )

  def __call__(self, x: Array) -> Array:
    return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
  """Attention to itself, attention to the text, and a feed-forward layer."""

  def __init__(self, channels: int, context: int, heads: int, settings: Settings):
    dtype = settings.dtype
    self.norm1 = layers.LayerNorm(channels, dtype=dtype)
    self.attn1 = layers.Attention(channels, channels, heads, settings)
    self.norm2 = layers.LayerNorm(channels, dtype=dtype)
    self.attn2 = layers.Attention(channels, context, heads, settings)
    self.norm3 = layers.LayerNorm(channels, dtype=dtype)
    self.ff = FeedForward(channels, dtype)

  def __call__(self, x: Array, context: Array) -> Array:
    y = self.norm1(x)
    x = x + self.attn1(y, y)
    x = x + self.attn2(self.norm2(x), context)
    return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
  """Transformer blocks over the pixels of a feature map."""

  def __init__(
    self,
    channels: int,
    context: int,
    heads: int,
    depth: int,
    *,
    groups: int,
    linear: bool,
    settings: Settings,
  ):
    dtype = settings.dtype
    if linear:
      project = functools.partial(layers.Linear, channels, channels, dtype=dtype)
    else:
      project = functools.partial(layers.Conv, channels, channels, size=1, dtype=dtype)
    self.norm = layers.GroupNorm(channels, groups=groups, eps=1e-6, dtype=dtype)
    self.proj_in = project()
    self.transformer_blocks = nnx.List(
      [TransformerBlock(channels, context, heads, settings) for _ in range(depth)]
    )
    self.proj_out = project()
    self.settings = settings

  def __call__(self, x: Array, context: Array) -> Array:
    y = self.proj_in(self.norm(x))
    y = y.reshape(x.shape[0], -1, x.shape[-1])
    for block in self.transformer_blocks:
      y = self.settings.block(block.__call__)(y, context)
    return x + self.proj_out(y.reshape(x.shape))


class TimeEmbedding(nnx.Module):
  """Two linear layers in fp32: what a timestep means moves every activation."""

  def __init__(self, inputs: int, outputs: int):
    self.linear_1 = layers.Linear(inputs, outputs, dtype=jnp.float32)
    self.linear_2 = layers.Linear(outputs, outputs, dtype=jnp.float32)

  def __call__(self, x: Array) -> Array:
    return self.linear_2(layers.silu(self.linear_1(x)))


class Stage(nnx.Module):
  """Resnets at one resolution, each followed by a transformer where there are any."""

  def __init__(
    self,
    resnets: Sequence[layers.ResnetBlock],
    transformers: Sequence[Transformer],
    settings: Settings,
  ):
    self.resnets = nnx.List(resnets)
    if transformers:
      self.attentions = nnx.List(transformers)
    self.settings = settings

  def layer(self, index: int, x: Array, embedding: Array, context: Array) -> Array:
    """Applies resnet `index` and the transformer after it."""
    x = self.settings.block(self.resnets[index].__call__)(x, embedding)
    if hasattr(self, "attentions"):
      x = self.attentions[index](x, context)
    return x


class DownStage(Stage):
  """A stage on the way down: returns what the way up will want to see again."""

  def __init__(self, *args: Any, downsample: layers.Downsample | None):
    super().__init__(*args)
    if downsample is not None:
      self.downsamplers = nnx.List([downsample])

  def __call__(
    self, x: Array, embedding: Array, context: Array
  ) -> tuple[Array, list[Array]]:
    skips = []
    for index in range(len(self.resnets)):
      x = self.layer(index, x, embedding, context)
      skips.append(x)
    if hasattr(self, "downsamplers"):
      x = self.downsamplers[0](x)
      skips.append(x)
    return x, skips


class MidStage(Stage):
  """The lowest resolution: one resnet more than transformers."""

  def __call__(self, x: Array, embedding: Array, context: Array) -> Array:
    x = self.settings.block(self.resnets[0].__call__)(x, embedding)
    for index in range(1, len(self.resnets)):
      x = self.attentions[index - 1](x, context)
      x = self.settings.block(self.resnets[index].__call__)(x, embedding)
    return x


class UpStage(Stage):
  """A stage on the way up: takes one skip per resnet off the end of `skips`."""

  def __init__(self, *args: Any, upsample: layers.Upsample | None):
    super().__init__(*args)
    if upsample is not None:
      self.upsamplers = nnx.List([upsample])

  def __call__(
    self, x: Array, skips: list[Array], embedding: Array, context: Array
  ) -> Array:
    for index in range(len(self.resnets)):
      x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = self.layer(index, x, embedding, context)
    if hasattr(self, "upsamplers"):
      # The next skip knows the size, which odd latents do not double to.
      x = self.upsamplers[0](x, *skips[-1].shape[1:3])
    return x


def _per_stage(fields: Mapping[str, Any], name: str, stages: int) -> list[Any]:
  """Spreads a field that may be one value or a list of one per stage."""
  value = fields[name]
  if not isinstance(value, list | tuple):
    return [value] * stages
  if len(value) != stages:
    raise UserError(
      f"UNet2DConditionModel config field {name!r} has {len(value)} entries, but "
      f"'block_out_channels' has {stages}. Give one value, or one per stage."
    )
  return list(value)


def _has_attention(kind: str, known: Mapping[str, bool], field: str) -> bool:
  if kind not in known:
    raise unknown_name(f"UNet2DConditionModel config field {field!r}:", kind, known)
  return known[kind]


class UNet2DConditionModel(nnx.Module):
  """The whole network; see `UNet` for its arguments."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    dtype = settings.dtype
    widths = list(fields["block_out_channels"])
    stages = len(widths)
    down_types = _per_stage(fields, "down_block_types", stages)
    up_types = _per_stage(fields, "up_block_types", stages)
    counts = _per_stage(fields, "layers_per_block", stages)
    heads = _per_stage(fields, "attention_head_dim", stages)
    contexts = _per_stage(fields, "cross_attention_dim", stages)
    depths = _per_stage(fields, "transformer_layers_per_block", stages)
    up_depths = depths[::-1]
    if fields["reverse_transformer_layers_per_block"] is not None:
      up_depths = _per_stage(fields, "reverse_transformer_layers_per_block", stages)
    groups, eps = fields["norm_num_groups"], fields["norm_eps"]
    embedding = 4 * widths[0]

    resnet = functools.partial(
      layers.ResnetBlock, embedding=embedding, groups=groups, eps=eps, dtype=dtype
    )

    def transformers(stage: int, depth: Any, count: int) -> list[Transformer]:
      depth = depth if isinstance(depth, list | tuple) else [depth] * count
      if len(depth) != count:
        raise UserError(
          "UNet2DConditionModel config field 'transformer_layers_per_block' gives "
          f"{list(depth)} for a stage of {count} layers. Give one value, or one each."
        )
      return [
        Transformer(
          widths[stage],
          contexts[stage],
          heads[stage],
          each,
          groups=groups,
          linear=fields["use_linear_projection"],
          settings=settings,
        )
        for each in depth
      ]

    self.conv_in = layers.Conv(fields["in_channels"], widths[0], dtype=dtype)
    self.time_embedding = TimeEmbedding(widths[0], embedding)
    if fields["addition_embed_type"] == "text_time":
      self.add_embedding = TimeEmbedding(
        fields["projection_class_embeddings_input_dim"], embedding
      )

    down, width = [], widths[0]
    for stage, kind in enumerate(down_types):
      inputs, width = width, widths[stage]
      count = counts[stage]
      crossed = _has_attention(kind, DOWN_BLOCKS, "down_block_types")
      padding = fields["downsample_padding"]
      down.append(
        DownStage(
          [resnet(width if i else inputs, width) for i in range(count)],
          transformers(stage, depths[stage], count) if crossed else [],
          settings,
          downsample=layers.Downsample(width, padding=(padding, padding), dtype=dtype)
          if stage < stages - 1
          else None,
        )
      )
    self.down_blocks = nnx.List(down)

    mid = fields["mid_block_type"]
    if mid is not None:
      count = _has_attention(mid, MID_BLOCKS, "mid_block_type")
      scaled = functools.partial(resnet, output_scale=fields["mid_block_scale_factor"])
      self.mid_block = MidStage(
        [scaled(width, width) for _ in range(count + 1)],
        transformers(stages - 1, depths[-1], count) if count else [],
        settings,
      )

    up = []
    for place, kind in enumerate(up_types):
      stage = stages - 1 - place
      above, width = width, widths[stage]
      count = counts[stage] + 1
      crossed = _has_attention(kind, UP_BLOCKS, "up_block_types")
      # Skips come off in reverse: the last one is what entered the stage's twin.
      skips = [width] * (count - 1) + [widths[max(stage - 1, 0)]]
      up.append(
        UpStage(
          [
            resnet((width if i else above) + skip, width)
            for i, skip in enumerate(skips)
          ],
          transformers(stage, up_depths[place], count) if crossed else [],
          settings,
          upsample=layers.Upsample(width, dtype=dtype) if stage else None,
        )
      )
    self.up_blocks = nnx.List(up)

    norm = functools.partial(layers.GroupNorm, groups=groups, eps=eps)
    self.conv_norm_out = norm(widths[0], dtype=jnp.float32)
    self.conv_out = layers.Conv(widths[0], fields["out_channels"], dtype=jnp.float32)

    self.settings = settings
    self.wave = functools.partial(
      layers.sinusoidal_embedding,
      flip_sin_to_cos=fields["flip_sin_to_cos"],
      freq_shift=fields["freq_shift"],
    )
    self.wave_channels = widths[0]
    self.time_id_channels = fields["addition_time_embed_dim"]
    self.centre = fields["center_input_sample"]

  def __call__(
    self,
    latents: Array,
    timesteps: Array,
    prompt_embeds: Array,
    pooled_prompt_embeds: Array | None,
    time_ids: Array | None,
  ) -> Array:
    embedding = self.time_embedding(self.wave(timesteps, self.wave_channels))
    if hasattr(self, "add_embedding"):
      sizes = self.wave(time_ids.reshape(-1), self.time_id_channels)
      sizes = sizes.reshape(time_ids.shape[0], -1)
      pooled = pooled_prompt_embeds.astype(jnp.float32)
      embedding += self.add_embedding(jnp.concatenate([pooled, sizes], axis=-1))

    x = 2 * latents - 1 if self.centre else latents
    x = self.conv_in(x)
    context = prompt_embeds.astype(self.settings.dtype)
    skips = [x]
    for stage in self.down_blocks:
      x, seen = stage(x, embedding, context)
      skips += seen
    if hasattr(self, "mid_block"):
      x = self.mid_block(x, embedding, context)
    for stage in self.up_blocks:
      x = stage(x, skips, embedding, context)
    return self.conv_out(layers.silu(self.conv_norm_out(x)))


class UNet(Model):
  """Predicts noise, velocity or v from noisy latents, a time and a text."""

  def apply(
    self,
    params: Params,
    latents: Array,
    timesteps: Array,
    prompt_embeds: Array,
    pooled_prompt_embeds: Array | None = None,
    time_ids: Array | None = None,
  ) -> Array:
    """Runs the network.

    Args:
      params: nested dict in the shape of `abstract_params`.
      latents: [N, h, w, c] noisy latents; for edits, c includes the source image's.
      timesteps: [N] or scalar, 0 to 999.
      prompt_embeds: [N, L, D] text states.
      pooled_prompt_embeds: [N, P] pooled text, for models of the XL kind.
      time_ids: [N, 6] original height and width, crop top and left, target height and
        width, all in pixels, for models of the XL kind ([N, 5] for its refiner).

    Returns:
      [N, h, w, c] fp32.

    Raises:
      UserError: a model of the XL kind without pooled text or sizes.
    """
    extra = self.config.get("addition_embed_type") == "text_time"
    if extra and (pooled_prompt_embeds is None or time_ids is None):
      raise UserError(
        "this UNet is of the XL kind (addition_embed_type 'text_time'): pass "
        "pooled_prompt_embeds [N, P] and time_ids [N, 6]."
      )
    timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (latents.shape[0],))

    def run(params: Params, *args: Any) -> Array:
      return self.bind(params)(*args)

    return self.settings.whole(run)(
      params, latents, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids
    )


def build(config: Mapping[str, Any], settings: Settings) -> UNet:
  """Derives a UNet's structure from its config.

  Args:
    config: the fields of a diffusers `UNet2DConditionModel` config.
    settings: how to compute.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  kind = "UNet2DConditionModel"
  fields = resolve_config(config, defaults=DEFAULTS, only=ONLY, kind=kind)
  if fields["addition_embed_type"] not in (None, "text_time"):
    raise UserError(
      f"{kind} config field 'addition_embed_type' is "
      f"{fields['addition_embed_type']!r}; implemented: None, 'text_time'."
    )
  return UNet.of(lambda: UNet2DConditionModel(fields, settings), config, settings)
