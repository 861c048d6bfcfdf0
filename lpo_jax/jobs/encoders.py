"""The networks that encode images and prompts, as plain functions on all local devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import generation, parallel, pretrained
from lpo_jax.data import encoding
from lpo_jax.errors import UserError

PIXELS_PER_CALL = 8 * 512 * 512  # per device: what fits beside the VAE in 16 GB
PROMPTS_PER_CALL = 32


def image_job(config: Any, source: Any, used: Sequence[int]) -> encoding.ImageJob:
  """How the images at these indices of the source become records."""
  encode, batch_size = image_encoder(config)
  return encoding.ImageJob(
    read=lambda position: source.images.read(int(used[position])),
    encode=encode,
    resolution=config.data.resolution,
    batch_size=batch_size,
    max_pixels=config.data.max_pixels,
  )


def image_encoder(config: Any) -> tuple[Callable[[np.ndarray], jax.Array], int]:
  """Returns uint8 images -> moments on all local devices, and its batch size.

  fp32 throughout: the records outlive the run, and SDXL's VAE overflows in fp16.
  """
  vae = pretrained.load(config.model.path, "vae", dtype=jnp.float32)
  resolution = config.data.resolution
  factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
  if resolution % factor:
    raise UserError(
      f"data.resolution={resolution} must be a multiple of {factor}, the number of "
      "pixels per latent of this VAE."
    )
  mesh = parallel.make_mesh(devices=jax.local_devices())
  params = jax.device_put(vae.params, parallel.replicated(mesh))
  by_image = parallel.by_slot(mesh)

  @jax.jit
  def moments(params, images):
    images = images.astype(jnp.float32) / 127.5 - 1.0
    return vae.encode(params, images, tile=config.model.vae_tile)

  def encode(images: np.ndarray) -> jax.Array:
    return moments(params, jax.device_put(images, by_image))

  per_device = max(PIXELS_PER_CALL // resolution**2, 1)
  per_device = min(per_device, 4) if jax.default_backend() == "cpu" else per_device
  return encode, per_device * len(jax.local_devices())


def prompt_encoder(config: Any) -> Callable[[list[str]], tuple[np.ndarray, Any]]:
  """Returns prompts -> (prompt_embeds, pooled or None), in fp32 for the same reason."""
  conditioner = generation.TextConditioner(
    config.model.path,
    dtype=jnp.float32,
    batch_size=PROMPTS_PER_CALL,
    clip_skip=config.model.clip_skip,
  )
  return conditioner.encode
