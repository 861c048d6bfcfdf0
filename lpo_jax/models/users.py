"""Users in a UNet: what is added to it, how that begins, and how much it counts.

Names are those of a diffusers UNet with an IP-Adapter, so that its state is ours.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lpo_jax import trees
from lpo_jax.models import layers
from lpo_jax.models.base import Model
from lpo_jax.types import Array, Params

# The parameters that a network which knows users has beside the others.
ADAPTER = r"^encoder_hid_proj\.|\.attn2\.processor\."
_VALUES = re.compile(r"\.attn2\.processor\.to_v_ip\.")
_KEYS = re.compile(r"\.processor\.to_k_ip\.0\.")


class UserProjections(nnx.Module):
  """Keys and values of a user's tokens, named as diffusers' processors are."""

  def __init__(self, channels: int, user: int, dtype: Any):
    make = functools.partial(layers.Linear, user, channels, bias=False, dtype=dtype)
    self.to_k_ip = nnx.List([make()])
    self.to_v_ip = nnx.List([make()])


class UserProjection(nnx.Module):
  """Some tokens of the text's width from each of a user's embeddings."""

  def __init__(self, user: int, tokens: int, context: int, dtype: Any):
    self.image_embeds = layers.Linear(user, tokens * context, dtype=dtype)
    self.norm = layers.LayerNorm(context, dtype=dtype)
    self.context = context

  def __call__(self, embeds: Array) -> Array:
    tokens = self.image_embeds(embeds)
    return self.norm(tokens.reshape(embeds.shape[0], -1, self.context))


class UserProjectionLayers(nnx.Module):
  """Holds the projector where diffusers has a list, one for each adapter."""

  def __init__(self, projection: UserProjection):
    self.image_projection_layers = nnx.List([projection])


def is_adapter(name: str) -> bool:
  """Whether a parameter is one of those that users add."""
  return re.search(ADAPTER, name) is not None


def add(base: Params, model: Model, seed: int) -> Params:
  """Makes the weights of a network that knows users from those of one that does not.

  Values start at zero, so that the network says what it said, to the last bit, whoever
  the user is: policy and reference are equal before the first update. Keys start as the
  text's, where the widths agree: the projector's tokens lie in the text's space, and a
  query finds among them what it would find among words. The projector, and keys of
  another width, start as torch's layers do.

  Args:
    base: weights without users.
    model: the network with users.
    seed: of what is drawn.

  Returns:
    Weights in the structure of `model`, NumPy where they are new.
  """
  known = trees.named_leaves(base)
  drawn = trees.named_leaves(model.init(seed))

  def begin(name: str, leaf: Any) -> Any:
    if name in known:
      return known[name]
    if _VALUES.search(name):
      return np.zeros(leaf.shape, np.float32)
    text = known.get(_KEYS.sub(".to_k.", name)) if _KEYS.search(name) else None
    same = text is not None and text.shape == leaf.shape
    return np.array(text, np.float32) if same else drawn[name]

  return trees.map_named(begin, model.abstract_params)


def weigh(params: Params, weight: float) -> Params:
  """Multiplies what attention to the user adds.

  text + weight * user: the values have no bias, so that the weight can be theirs.

  Args:
    params: of a network that knows users; of one that does not they stay as they are.
    weight: 1 as trained, 0 for nobody.
  """

  def scale(name: str, leaf: Array) -> Array:
    return leaf * jnp.asarray(weight, leaf.dtype) if _VALUES.search(name) else leaf

  return trees.map_named(scale, params)
