"""The conditional UNet of Stable Diffusion 1, 2 and XL, of SSD-1B, edits and users."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import layers
from lpo_jax.models.base import Model, Settings, resolve_config
from lpo_jax.models.transformer import Context, Transformer
from lpo_jax.models.users import UserProjection, UserProjectionLayers
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
  # Ours: width of a user's embeddings, None where users are not told apart; how many
  # tokens the projector makes of each, 0 where the embeddings are the tokens.
  "user_dim": None,
  "user_tokens": 4,
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

# How many transformers follow each resnet, or for the mid block, how many in all.
DOWN_BLOCKS = {"DownBlock2D": 0, "CrossAttnDownBlock2D": 1}
UP_BLOCKS = {"UpBlock2D": 0, "CrossAttnUpBlock2D": 1}
MID_BLOCKS = {"UNetMidBlock2D": 0, "UNetMidBlock2DCrossAttn": 1}


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

  def layer(self, index: int, x: Array, embedding: Array, context: Context) -> Array:
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

  def __call__(self, x: Array, embedding: Array, context: Context) -> Array:
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


class Blueprint:
  """The config, spread over the stages; makes their modules."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    self.fields, self.settings = fields, settings
    self.widths = list(fields["block_out_channels"])
    self.stages = len(self.widths)
    self.counts = self.per_stage("layers_per_block")
    self.heads = self.per_stage("attention_head_dim")
    self.contexts = self.per_stage("cross_attention_dim")
    self.depths = self.per_stage("transformer_layers_per_block")
    self.up_depths = self.depths[::-1]
    if fields["reverse_transformer_layers_per_block"] is not None:
      self.up_depths = self.per_stage("reverse_transformer_layers_per_block")
    self.embedding = 4 * self.widths[0]

  def per_stage(self, name: str) -> list[Any]:
    """Spreads a field that may be one value or a list of one per stage."""
    value = self.fields[name]
    if not isinstance(value, list | tuple):
      return [value] * self.stages
    if len(value) != self.stages:
      raise UserError(
        f"UNet2DConditionModel config field {name!r} has {len(value)} entries, but "
        f"'block_out_channels' has {self.stages}. Give one value, or one per stage."
      )
    return list(value)

  def resnet(self, inputs: int, width: int, **options: Any) -> layers.ResnetBlock:
    return layers.ResnetBlock(
      inputs,
      width,
      embedding=self.embedding,
      groups=self.fields["norm_num_groups"],
      eps=self.fields["norm_eps"],
      dtype=self.settings.dtype,
      **options,
    )

  def transformers(self, stage: int, depth: Any, count: int) -> list[Transformer]:
    depths = depth if isinstance(depth, list | tuple) else [depth] * count
    if len(depths) != count:
      raise UserError(
        "UNet2DConditionModel config field 'transformer_layers_per_block' gives "
        f"{list(depths)} for a stage of {count} layers. Give one value, or one each."
      )
    return [
      Transformer(
        self.widths[stage],
        self.contexts[stage],
        self.heads[stage],
        each,
        groups=self.fields["norm_num_groups"],
        linear=self.fields["use_linear_projection"],
        settings=self.settings,
        user=self.user,
      )
      for each in depths
    ]

  @property
  def user(self) -> int | None:
    """Width of the user's tokens that attention sees, if it sees any."""
    width = self.fields["user_dim"]
    return self.contexts[0] if width and self.fields["user_tokens"] else width

  def down(self) -> list[DownStage]:
    stages, width = [], self.widths[0]
    padding = (self.fields["downsample_padding"],) * 2
    for stage, kind in enumerate(self.per_stage("down_block_types")):
      inputs, width = width, self.widths[stage]
      count = self.counts[stage]
      crossed = _look_up(DOWN_BLOCKS, kind, "down_block_types")
      downsample = None
      if stage < self.stages - 1:
        dtype = self.settings.dtype
        downsample = layers.Downsample(width, padding=padding, dtype=dtype)
      stages.append(
        DownStage(
          [self.resnet(width if i else inputs, width) for i in range(count)],
          self.transformers(stage, self.depths[stage], count) if crossed else [],
          self.settings,
          downsample=downsample,
        )
      )
    return stages

  def mid(self) -> MidStage | None:
    kind = self.fields["mid_block_type"]
    if kind is None:
      return None
    count = _look_up(MID_BLOCKS, kind, "mid_block_type")
    width, scale = self.widths[-1], self.fields["mid_block_scale_factor"]
    return MidStage(
      [self.resnet(width, width, output_scale=scale) for _ in range(count + 1)],
      self.transformers(self.stages - 1, self.depths[-1], count) if count else [],
      self.settings,
    )

  def up(self) -> list[UpStage]:
    stages, width = [], self.widths[-1]
    for place, kind in enumerate(self.per_stage("up_block_types")):
      stage = self.stages - 1 - place
      below, width = width, self.widths[stage]
      count = self.counts[stage] + 1
      crossed = _look_up(UP_BLOCKS, kind, "up_block_types")
      # Skips come off in reverse: the last one is what entered the stage's twin.
      skips = [width] * (count - 1) + [self.widths[max(stage - 1, 0)]]
      inputs = [(width if i else below) + skip for i, skip in enumerate(skips)]
      upsample = None
      if stage:
        upsample = layers.Upsample(width, dtype=self.settings.dtype)
      stages.append(
        UpStage(
          [self.resnet(each, width) for each in inputs],
          self.transformers(stage, self.up_depths[place], count) if crossed else [],
          self.settings,
          upsample=upsample,
        )
      )
    return stages


def _look_up(table: Mapping[str, int], kind: str, field: str) -> int:
  if kind not in table:
    raise unknown_name(f"UNet2DConditionModel config field {field!r}:", kind, table)
  return table[kind]


class UNet2DConditionModel(nnx.Module):
  """The whole network; see `UNet` for its arguments."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    blueprint = Blueprint(fields, settings)
    width, embedding = blueprint.widths[0], blueprint.embedding
    self.conv_in = layers.Conv(fields["in_channels"], width, dtype=settings.dtype)
    self.time_embedding = TimeEmbedding(width, embedding)
    if fields["addition_embed_type"] == "text_time":
      inputs = fields["projection_class_embeddings_input_dim"]
      self.add_embedding = TimeEmbedding(inputs, embedding)
    self.user_dim = fields["user_dim"]
    if self.user_dim and fields["user_tokens"]:
      self.encoder_hid_proj = UserProjectionLayers(
        UserProjection(
          self.user_dim, fields["user_tokens"], blueprint.contexts[0], settings.dtype
        )
      )
    self.down_blocks = nnx.List(blueprint.down())
    if (mid := blueprint.mid()) is not None:
      self.mid_block = mid
    self.up_blocks = nnx.List(blueprint.up())
    self.conv_norm_out = layers.GroupNorm(
      width,
      groups=fields["norm_num_groups"],
      eps=fields["norm_eps"],
      dtype=jnp.float32,
    )
    self.conv_out = layers.Conv(width, fields["out_channels"], dtype=jnp.float32)

    self.settings = settings
    self.wave = functools.partial(
      layers.sinusoidal_embedding,
      flip_sin_to_cos=fields["flip_sin_to_cos"],
      freq_shift=fields["freq_shift"],
    )
    self.wave_channels = width
    self.time_id_channels = fields["addition_time_embed_dim"]
    self.centre = fields["center_input_sample"]

  def __call__(
    self,
    latents: Array,
    timesteps: Array,
    prompt_embeds: Array,
    pooled_prompt_embeds: Array | None = None,
    time_ids: Array | None = None,
    source_latents: Array | None = None,
    user_embeds: Array | None = None,
  ) -> Array:
    embedding = self.time_embedding(self.wave(timesteps, self.wave_channels))
    if hasattr(self, "add_embedding"):
      sizes = self.wave(time_ids.reshape(-1), self.time_id_channels)
      sizes = sizes.reshape(time_ids.shape[0], -1)
      pooled = pooled_prompt_embeds.astype(jnp.float32)
      embedding += self.add_embedding(jnp.concatenate([pooled, sizes], axis=-1))

    if source_latents is not None:
      latents = jnp.concatenate([latents, source_latents.astype(latents.dtype)], -1)
    x = 2 * latents - 1 if self.centre else latents
    x = self.conv_in(x)
    text = prompt_embeds.astype(self.settings.dtype)
    context = Context(text, self.user_tokens(user_embeds, x.shape[0]))
    skips = [x]
    for stage in self.down_blocks:
      x, seen = stage(x, embedding, context)
      skips += seen
    if hasattr(self, "mid_block"):
      x = self.mid_block(x, embedding, context)
    for stage in self.up_blocks:
      x = stage(x, skips, embedding, context)
    return self.conv_out(layers.silu(self.conv_norm_out(x)))

  def user_tokens(self, embeds: Array | None, count: int) -> Array | None:
    """[N, T, E] tokens; of nobody, where no user is given, those of zeros."""
    if not self.user_dim:
      return None
    if embeds is None:
      embeds = jnp.zeros((count, 1, self.user_dim))
    embeds = embeds.astype(self.settings.dtype)
    if hasattr(self, "encoder_hid_proj"):
      return self.encoder_hid_proj.image_projection_layers[0](embeds)
    return embeds


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
    source_latents: Array | None = None,
    user_embeds: Array | None = None,
  ) -> Array:
    """Runs the network.

    Args:
      params: nested dict in the shape of `abstract_params`.
      latents: [N, h, w, c] noisy latents; for edits, c may include the source image's.
      timesteps: [N] or scalar, 0 to 999.
      prompt_embeds: [N, L, D] text states.
      pooled_prompt_embeds: [N, P] pooled text, for models of the XL kind.
      time_ids: [N, 6] original height and width, crop top and left, target height and
        width, all in pixels, for models of the XL kind ([N, 5] for its refiner).
      source_latents: [N, h, w, c] latents of the image to edit, not scaled, where
        `latents` do not include them.
      user_embeds: [N, K, D] of users, for models that know them (`user_dim`); zeros are
        nobody, and so is None.

    Returns:
      [N, h, w, c] fp32.

    Raises:
      UserError: a model of the XL kind without pooled text or sizes; embeddings of users
        for a model that knows none, or of another width.
    """
    extra = self.config.get("addition_embed_type") == "text_time"
    if extra and (pooled_prompt_embeds is None or time_ids is None):
      raise UserError(
        "this UNet is of the XL kind (addition_embed_type 'text_time'): pass "
        "pooled_prompt_embeds [N, P] and time_ids [N, 6]."
      )
    width = self.config.get("user_dim")
    if user_embeds is not None and user_embeds.shape[-1] != width:
      raise UserError(
        f"user_embeds have width {user_embeds.shape[-1]}, and this UNet takes "
        f"{width or 'no users'} (its config's user_dim). Make one that takes them with "
        "--job widen --config.widen.kind=users."
      )
    timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (latents.shape[0],))

    def run(params: Params, *args: Any) -> Array:
      return self.bind(params)(*args)

    return self.settings.whole(run)(
      params,
      latents,
      timesteps,
      prompt_embeds,
      pooled_prompt_embeds,
      time_ids,
      source_latents,
      user_embeds,
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
