"""The autoencoder between images and latents, as Stable Diffusion 1, 2 and XL have it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lpo_jax.errors import UserError
from lpo_jax.models import layers, tiling
from lpo_jax.models.base import Model, Settings, resolve_config
from lpo_jax.types import Array, Params

DEFAULTS: dict[str, Any] = {
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ("DownEncoderBlock2D",),
  "up_block_types": ("UpDecoderBlock2D",),
  "block_out_channels": (64,),
  "layers_per_block": 1,
  "latent_channels": 4,
  "norm_num_groups": 32,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
  # Not the network's: how its latents are scaled, and advice on precision.
  "sample_size": 32,
  "scaling_factor": 0.18215,
  "force_upcast": True,
}

ONLY: dict[str, tuple[Any, ...]] = {
  "act_fn": ("silu", "swish"),
  "shift_factor": (None,),
  "latents_mean": (None,),
  "latents_std": (None,),
}

EPS = 1e-6


class PixelAttention(layers.Attention):
  """Attention with one head over the pixels of a feature map, added to its input."""

  def __init__(self, channels: int, groups: int, settings: Settings):
    super().__init__(channels, channels, 1, settings, bias=True)
    self.group_norm = layers.GroupNorm(
      channels, groups=groups, eps=EPS, dtype=settings.dtype
    )

  def __call__(self, x: Array) -> Array:
    y = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
    return x + super().__call__(y, y).reshape(x.shape)


class MidStage(nnx.Module):
  """Two resnets around an attention, at the lowest resolution."""

  def __init__(
    self,
    resnets: Sequence[layers.ResnetBlock],
    attention: PixelAttention | None,
    settings: Settings,
  ):
    self.resnets = nnx.List(resnets)
    if attention is not None:
      self.attentions = nnx.List([attention])
    self.settings = settings

  def __call__(self, x: Array) -> Array:
    x = self.settings.block(self.resnets[0].__call__)(x)
    if hasattr(self, "attentions"):
      x = self.settings.block(self.attentions[0].__call__)(x)
    return self.settings.block(self.resnets[1].__call__)(x)


class Stage(nnx.Module):
  """Resnets at one resolution, and the change to the next."""

  def __init__(
    self,
    resnets: Sequence[layers.ResnetBlock],
    settings: Settings,
    *,
    downsample: layers.Downsample | None = None,
    upsample: layers.Upsample | None = None,
  ):
    self.resnets = nnx.List(resnets)
    if downsample is not None:
      self.downsamplers = nnx.List([downsample])
    if upsample is not None:
      self.upsamplers = nnx.List([upsample])
    self.settings = settings

  def __call__(self, x: Array) -> Array:
    for resnet in self.resnets:
      x = self.settings.block(resnet.__call__)(x)
    if hasattr(self, "downsamplers"):
      x = self.downsamplers[0](x)
    if hasattr(self, "upsamplers"):
      x = self.upsamplers[0](x, 2 * x.shape[1], 2 * x.shape[2])
    return x


def _resnet(fields: Mapping[str, Any], settings: Settings) -> functools.partial:
  return functools.partial(
    layers.ResnetBlock,
    embedding=None,
    groups=fields["norm_num_groups"],
    eps=EPS,
    dtype=settings.dtype,
  )


def _mid(fields: Mapping[str, Any], settings: Settings) -> MidStage:
  width = fields["block_out_channels"][-1]
  attention = None
  if fields["mid_block_add_attention"]:
    attention = PixelAttention(width, fields["norm_num_groups"], settings)
  resnet = _resnet(fields, settings)
  return MidStage([resnet(width, width), resnet(width, width)], attention, settings)


class Encoder(nnx.Module):
  """Images to the moments of their latents, before `quant_conv`."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    dtype = settings.dtype
    widths = list(fields["block_out_channels"])
    resnet = _resnet(fields, settings)
    self.conv_in = layers.Conv(fields["in_channels"], widths[0], dtype=dtype)
    stages = []
    for stage, width in enumerate(widths):
      inputs = widths[max(stage - 1, 0)]
      last = stage == len(widths) - 1
      stages.append(
        Stage(
          [
            resnet(width if i else inputs, width)
            for i in range(fields["layers_per_block"])
          ],
          settings,
          # Padded below and to the right only, unlike the UNet.
          downsample=None
          if last
          else layers.Downsample(width, padding=(0, 1), dtype=dtype),
        )
      )
    self.down_blocks = nnx.List(stages)
    self.mid_block = _mid(fields, settings)
    self.conv_norm_out = layers.GroupNorm(
      widths[-1], groups=fields["norm_num_groups"], eps=EPS, dtype=jnp.float32
    )
    self.conv_out = layers.Conv(
      widths[-1], 2 * fields["latent_channels"], dtype=jnp.float32
    )

  def __call__(self, images: Array) -> Array:
    x = self.conv_in(images)
    for stage in self.down_blocks:
      x = stage(x)
    x = self.mid_block(x)
    return self.conv_out(layers.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
  """Latents, after `post_quant_conv`, to images."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    dtype = settings.dtype
    widths = list(fields["block_out_channels"])[::-1]
    resnet = _resnet(fields, settings)
    self.conv_in = layers.Conv(fields["latent_channels"], widths[0], dtype=dtype)
    self.mid_block = _mid(fields, settings)
    stages = []
    for stage, width in enumerate(widths):
      inputs = widths[max(stage - 1, 0)]
      last = stage == len(widths) - 1
      stages.append(
        Stage(
          [
            resnet(width if i else inputs, width)
            for i in range(fields["layers_per_block"] + 1)
          ],
          settings,
          upsample=None if last else layers.Upsample(width, dtype=dtype),
        )
      )
    self.up_blocks = nnx.List(stages)
    self.conv_norm_out = layers.GroupNorm(
      widths[-1], groups=fields["norm_num_groups"], eps=EPS, dtype=jnp.float32
    )
    self.conv_out = layers.Conv(widths[-1], fields["out_channels"], dtype=jnp.float32)

  def __call__(self, latents: Array) -> Array:
    x = self.mid_block(self.conv_in(latents))
    for stage in self.up_blocks:
      x = stage(x)
    return self.conv_out(layers.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
  """Both halves; see `VAE` for their arguments."""

  def __init__(self, fields: Mapping[str, Any], settings: Settings):
    channels = fields["latent_channels"]
    self.encoder = Encoder(fields, settings)
    self.decoder = Decoder(fields, settings)
    point = functools.partial(layers.Conv, size=1, dtype=jnp.float32)
    if fields["use_quant_conv"]:
      self.quant_conv = point(2 * channels, 2 * channels)
    if fields["use_post_quant_conv"]:
      self.post_quant_conv = point(channels, channels)

  def encode(self, images: Array) -> Array:
    moments = self.encoder(images)
    return self.quant_conv(moments) if hasattr(self, "quant_conv") else moments

  def decode(self, latents: Array) -> Array:
    if hasattr(self, "post_quant_conv"):
      latents = self.post_quant_conv(latents)
    return self.decoder(latents)


class VAE(Model):
  """Encodes images as Gaussians over latents, and decodes latents."""

  @property
  def pixels_per_latent(self) -> int:
    """How many pixels of an image's side one latent stands for."""
    widths = self.config.get("block_out_channels", DEFAULTS["block_out_channels"])
    return 2 ** (len(widths) - 1)

  def encode(self, params: Params, images: Array, *, tile: int = 0) -> Array:
    """Returns the posterior of the unscaled latents.

    Args:
      params: nested dict in the shape of `abstract_params`.
      images: [N, H, W, 3] in -1..1.
      tile: 0, or the side in pixels of the tiles in which larger images are encoded: for
        the memory of one tile, at the price of slightly different latents.

    Returns:
      [N, h, w, 2c] fp32: c means, then c log-variances as the network gives them,
      neither clipped nor scaled.

    Raises:
      UserError: a tile that cannot be, or an image that is no whole number of latents
        and is to be tiled.
    """
    encode = self.settings.whole(lambda params, x: self.bind(params).encode(x))
    run = functools.partial(encode, params)
    if not self._is_tiled(images.shape, tile):
      return run(images)
    factor = self.pixels_per_latent
    if any(size % factor for size in images.shape[1:3]):
      raise UserError(
        f"an image of {images.shape[1]}x{images.shape[2]} pixels cannot be encoded in "
        f"tiles: both sides must be multiples of {factor}."
      )
    return tiling.by_tiles(run, images, tile=tile, result_tile=tile // factor)

  def decode(self, params: Params, latents: Array, *, tile: int = 0) -> Array:
    """Returns the images of latents.

    Args:
      params: nested dict in the shape of `abstract_params`.
      latents: [N, h, w, c], already divided by the config's `scaling_factor`.
      tile: as for `encode`; in pixels here too.

    Returns:
      [N, H, W, 3] fp32, about -1..1 and not clipped.

    Raises:
      UserError: a tile that cannot be.
    """
    decode = self.settings.whole(lambda params, x: self.bind(params).decode(x))
    run = functools.partial(decode, params)
    factor = self.pixels_per_latent
    pixels = [size * factor for size in latents.shape]
    if not self._is_tiled(pixels, tile):
      return run(latents)
    return tiling.by_tiles(run, latents, tile=tile // factor, result_tile=tile)

  def _is_tiled(self, shape: Sequence[int], tile: int) -> bool:
    """Whether an image [N, H, W, ...] is larger than a tile that there is."""
    # Latents of a tile and of its overlap must be whole numbers.
    unit = tiling.STEPS_PER_TILE * self.pixels_per_latent
    if tile < 0 or tile % unit:
      raise UserError(
        f"tiles of {tile} pixels (model.vae_tile): expected 0 for none, or a multiple "
        f"of {unit}, such as the 'sample_size' in the config of the autoencoder."
      )
    return tile > 0 and max(shape[1:3]) > tile


def build(config: Mapping[str, Any], settings: Settings) -> VAE:
  """Derives an autoencoder's structure from its config.

  Args:
    config: the fields of a diffusers `AutoencoderKL` config.
    settings: how to compute.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  kind = "AutoencoderKL"
  fields = resolve_config(config, defaults=DEFAULTS, only=ONLY, kind=kind)
  stages = len(fields["block_out_channels"])
  for name, block in (
    ("down_block_types", "DownEncoderBlock2D"),
    ("up_block_types", "UpDecoderBlock2D"),
  ):
    if list(fields[name]) != [block] * stages:
      raise UserError(
        f"{kind} config field {name!r} is {list(fields[name])}; implemented: {block!r} "
        f"for each of the {stages} entries of 'block_out_channels'."
      )
  return VAE.of(lambda: AutoencoderKL(fields, settings), config, settings)
