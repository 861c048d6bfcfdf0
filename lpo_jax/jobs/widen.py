"""The widen job: a UNet that draws, made one that can also see an image to edit.

InstructPix2Pix shows the source's latents beside the noisy ones. The first convolution
gets input channels for them, with weights of zero: until it is trained, the network
predicts what it did, whatever the source.
"""

from __future__ import annotations

import dataclasses
import pathlib

import ml_collections
import numpy as np

from lpo_jax import console, models, parallel, pretrained
from lpo_jax.errors import UserError


def widened(part: pretrained.Part, latent_channels: int) -> pretrained.Part:
  """Adds the source's channels to a UNet, behind those of the noisy latents.

  Args:
    part: a UNet of `latent_channels` input channels.
    latent_channels: c of the VAE's latents.

  Raises:
    UserError: it has another number of channels, such as an editing UNet's.

  Reference: Brooks et al. 2022 (InstructPix2Pix), section 3.2.
  """
  channels = part.config["in_channels"]
  if channels != latent_channels:
    raise UserError(
      f"the UNet takes {channels} channels; expected {latent_channels}, as many as the "
      "VAE's latents have. An editing UNet needs no widening."
    )
  config = {**part.config, "in_channels": 2 * channels}
  conv_in = dict(parallel.fetch(part.params["conv_in"]))
  conv_in["kernel"] = np.pad(
    np.asarray(conv_in["kernel"]), ((0, 0), (0, 0), (0, channels), (0, 0))
  )
  params = {**part.params, "conv_in": conv_in}
  return dataclasses.replace(
    part, config=config, params=params, model=models.build(config)
  )


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Writes the pipeline of `model.path` with a UNet that edits.

  Args:
    config: `model.path` is read; `export.path` is where it goes.
    workdir: gets editing_base/ where `export.path` is empty.

  Raises:
    UserError: no model, a UNet that is not one that draws, or a folder that is not empty.
  """
  path = config.model.path
  if not path:
    raise UserError("model.path is not set; give the pipeline whose UNet is widened.")
  target = pathlib.Path(config.export.path or pathlib.Path(workdir) / "editing_base")
  channels = pretrained.read_config(path, "vae").get("latent_channels", 4)
  part = widened(pretrained.load(path, "unet"), channels)
  pretrained.save_pipeline(path, target, {"unet": part})
  console.say(
    f"wrote {target}: its UNet takes {2 * channels} channels, the new ones with weights "
    f"of zero. Train it with --config.model.path={target}"
  )
  return target
