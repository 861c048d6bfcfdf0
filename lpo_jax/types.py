"""The nouns that cross rooms: what a batch is, and what an objective may look at."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
Params = Mapping[Any, Any]  # nested dict of arrays, keyed like the modules' attributes
Metrics = dict[str, Array]


def _record(cls):
  """Makes a frozen dataclass that jax transforms treat as a pytree of its fields."""
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_record
class Denoising:
  """Everything an objective may look at: three scalars per image, fp32.

  Each is a mean over the latent's dimensions. Items that are not `Ranking.valid` hold
  any finite value and must not matter.

  Attributes:
    err: [B, N] mean (pred - target)^2, the policy's denoising error.
    ref_err: [B, N] mean (ref_pred - target)^2, the reference's, without gradient.
    drift: [B, N] mean (pred - ref_pred)^2, how far the policy moved.
  """

  err: Array
  ref_err: Array
  drift: Array


@_record
class Ranking:
  """What people said about the items of each list.

  Attributes:
    rank: [B, N] int32, 0 = best, equal = "no order among us" (a tie).
    valid: [B, N] bool, False where a list is shorter than N.
    score: [B, N] fp32 continuous score from outside (0 where there is none).
    weight: [B] fp32 weight of the list; 0 for rows that hold no list.
  """

  rank: Array
  valid: Array
  score: Array
  weight: Array


@_record
class Conditioning:
  """What the UNet is told about each slot, under diffusers' names.

  Attributes:
    prompt_embeds: [S, L, D] text states.
    pooled_prompt_embeds: [S, P] pooled text (SDXL), else None.
    time_ids: [S, 6] original size, crop and target size in pixels (SDXL), else None.
    source_latents: [S, h, w, c] the image to edit: the mode of its posterior, unscaled;
      0 where it is withheld. None where nothing is edited.
    user_embeds: [S, K, D] who it is for: K embeddings of a person; 0 where they are
      nobody. None where users are not told apart.
  """

  prompt_embeds: Array
  pooled_prompt_embeds: Array | None = None
  time_ids: Array | None = None
  source_latents: Array | None = None
  user_embeds: Array | None = None

  @property
  def arguments(self) -> dict[str, Array]:
    """What a network is told besides latents and time, by name; no more than there is."""
    fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
    return {name: value for name, value in fields if value is not None}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What an image is asked for by: a row of a prompt set.

  Attributes:
    text: the prompt; of an edit, the instruction.
    category: "" for none.
    source: the encoded image to edit; b"" where nothing is edited.
    target: the encoded edit that is held to be right; b"" where nobody made one.
    source_caption: what the source shows; "" where nobody said.
    target_caption: what the edit should show; "" where nobody said.
    user: whom it is drawn for; "" for nobody.
  """

  text: str
  category: str = ""
  source: bytes = dataclasses.field(default=b"", repr=False)
  target: bytes = dataclasses.field(default=b"", repr=False)
  source_caption: str = ""
  target_caption: str = ""
  user: str = ""

  @property
  def key(self) -> str:
    """Tells it from other rows by all that a model is asked; of a mere text, the text."""
    source = hashlib.sha256(self.source).hexdigest() if self.source else ""
    return "\0".join([self.text, source, self.user]).rstrip("\0")


@_record
class Trajectory:
  """Steps of the policy's own samples, in the slots that hold such a step.

  Attributes:
    noisy_latents: [S, h, w, c] fp32 x_t where the step begins.
    timesteps: [S] int32 of the list, in all its slots.
    target: [S, h, w, c] fp32 what the UNet answered there when it drew.
    stored: [S] bool, which slots hold a step; the others hold any finite values.
  """

  noisy_latents: Array
  timesteps: Array
  target: Array
  stored: Array


@_record
class Batch:
  """One update: S slots, each holding an image, and up to B lists that index them.

  Attributes:
    moments: [S, h, w, 2c] mean and log-variance of the unscaled VAE posterior.
    conditioning: per slot.
    identity: [S, 2] uint32, the (list key, epoch) that all randomness hangs on.
    item: [S] uint32, which item of its list the slot holds.
    slot: [B, N] int32, where each item of each list sits (0 where invalid).
    ranking: [B, N] ranks, validity, scores and [B] weights.
    trajectory: per slot, where the policy's own samples are among the items.
    ref_err: [S] fp32 the reference's errors, where they were computed beforehand.
  """

  moments: Array
  conditioning: Conditioning
  identity: Array
  item: Array
  slot: Array
  ranking: Ranking
  trajectory: Trajectory | None = None
  ref_err: Array | None = None
