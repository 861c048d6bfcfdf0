"""The widen job: a UNet that draws, made one that is also told something else.

"edits": InstructPix2Pix shows the source's latents beside the noisy ones. The first
convolution gets input channels for them. "users": every attention to the text gets keys
and values for a user's tokens, as an IP-Adapter adds them. What is new has weights of
zero: until it is trained, the network predicts what it did, whatever else it is told.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import ml_collections
import numpy as np

from lpo_jax import console, models, parallel, pretrained
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import users


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


def with_users(
  part: pretrained.Part, user_dim: int, user_tokens: int, seed: int = 0
) -> pretrained.Part:
  """Adds to a UNet what it needs to be told of users.

  Args:
    part: a UNet that knows none.
    user_dim: width of a user's embeddings.
    user_tokens: made of each by the projector; 0: no projector, they are the tokens.
    seed: of the projector's first weights.

  Raises:
    UserError: it knows users already, or a number is out of range.

  Reference: Ye et al. 2023 (IP-Adapter); its values do not start at zero.
  """
  if part.config.get("user_dim"):
    raise UserError(
      f"the UNet knows users already (user_dim={part.config['user_dim']}); expected one "
      "that does not."
    )
  if user_dim < 1 or user_tokens < 0:
    raise UserError(
      f"widen.user_dim={user_dim}, widen.user_tokens={user_tokens}: expected the width of "
      "a user's embeddings (docs/personal.md), and a number of tokens from 0 on."
    )
  config = {**part.config, "user_dim": user_dim, "user_tokens": user_tokens}
  model = models.build(config)
  params = users.add(parallel.fetch(part.params), model, seed)
  return dataclasses.replace(part, config=config, params=params, model=model)


def _for_edits(config: ml_collections.ConfigDict, part: pretrained.Part):
  channels = pretrained.read_config(config.model.path, "vae").get("latent_channels", 4)
  said = f"its UNet takes {2 * channels} channels, the new ones with weights of zero"
  return widened(part, channels), said


def _for_users(config: ml_collections.ConfigDict, part: pretrained.Part):
  wide = with_users(
    part, config.widen.user_dim, config.widen.user_tokens, seed=config.seed
  )
  new = sum(
    leaf.size for name, leaf in wide.model.named_shapes().items()
    if users.is_adapter(name)
  )  # fmt: skip
  said = f"its UNet takes users, by {new:,} new weights, values of zero"
  return wide, said


# widen.kind -> the folder it is written to, and what makes the UNet and says what it is.
KINDS: dict[str, tuple[str, Callable]] = {
  "edits": ("editing_base", _for_edits),
  "users": ("personal_base", _for_users),
}


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Writes the pipeline of `model.path` with a UNet that is told more.

  Args:
    config: `model.path` and `widen` are read; `export.path` is where it goes.
    workdir: gets editing_base/ or personal_base/ where `export.path` is empty.

  Raises:
    UserError: no model, an unknown kind, a UNet that cannot be widened, or a folder that
      is not empty.
  """
  path, kind = config.model.path, config.widen.kind
  if not path:
    raise UserError("model.path is not set; give the pipeline whose UNet is widened.")
  if kind not in KINDS:
    raise unknown_name("widen.kind", kind, KINDS)
  folder, make = KINDS[kind]
  target = pathlib.Path(config.export.path or pathlib.Path(workdir) / folder)
  part, said = make(config, pretrained.load(path, "unet"))
  pretrained.save_pipeline(path, target, {"unet": part})
  console.say(f"wrote {target}: {said}. Train it with --config.model.path={target}")
  return target
