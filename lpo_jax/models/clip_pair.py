"""Both towers of CLIP: texts and images as vectors of one space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lpo_jax.models import layers
from lpo_jax.models.base import Model, Settings, resolve_config
from lpo_jax.models.clip import TextTransformer, check_length, text_fields
from lpo_jax.models.clip_vision import VisionTransformer, check_size, vision_fields
from lpo_jax.types import Array, Params

KIND = "CLIPModel"


class CLIP(nnx.Module):
  """The towers, their projections and the scale of their products."""

  def __init__(
    self,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    width: int,
    settings: Settings,
  ):
    self.text_model = TextTransformer(text, settings)
    self.vision_model = VisionTransformer(vision, settings)
    for name, fields in (("text_projection", text), ("visual_projection", vision)):
      inputs = fields["hidden_size"]
      setattr(self, name, layers.Linear(inputs, width, bias=False, dtype=jnp.float32))
    self.logit_scale = layers.param()

  def embed_texts(self, input_ids: Array) -> Array:
    return self.text_projection(self.text_model(input_ids).pooled)

  def embed_images(self, images: Array) -> Array:
    return self.visual_projection(self.vision_model(images).pooled)


class CLIPPair(Model):
  """Embeds texts and images; a score is made of their cosines.

  exp(params["logit_scale"]) * cos(text, image) is what transformers calls a logit.
  """

  def embed_texts(self, params: Params, input_ids: Array) -> Array:
    """Embeds texts.

    Args:
      params: nested dict in the shape of `abstract_params`.
      input_ids: [N, L] int32, as for `clip.TextEncoder.apply`.

    Returns:
      [N, P] fp32, not normalised.

    Raises:
      UserError: more tokens than the model has places.
    """
    check_length(input_ids, text_config(self.config))
    run = self.settings.whole(lambda params, ids: self.bind(params).embed_texts(ids))
    return run(params, input_ids)

  def embed_images(self, params: Params, images: Array) -> Array:
    """Embeds images.

    Args:
      params: nested dict in the shape of `abstract_params`.
      images: [N, H, W, 3], as for `clip_vision.VisionEncoder.apply`.

    Returns:
      [N, P] fp32, not normalised.

    Raises:
      UserError: images of another size.
    """
    check_size(images, vision_config(self.config))
    run = self.settings.whole(lambda params, x: self.bind(params).embed_images(x))
    return run(params, images)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the text tower's fields in a `CLIPConfig`."""
  return _nested(config, "text_config")


def vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the vision tower's fields in a `CLIPConfig`."""
  return _nested(config, "vision_config")


def _nested(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  # Files of before transformers 4.28 have the fields twice; this is the one that counts.
  old = config.get(f"{name}_dict")
  return (config.get(name) or {}) if old is None else old


def build(config: Mapping[str, Any], settings: Settings) -> CLIPPair:
  """Derives the structure of both towers from their config.

  Args:
    config: the fields of a transformers `CLIPConfig`.
    settings: how to compute.

  Raises:
    UserError: a field that is not implemented, by name.
  """
  width = resolve_config(config, defaults={"projection_dim": 512}, only={}, kind=KIND)
  text = text_fields(text_config(config), f"{KIND} text")
  vision = vision_fields(vision_config(config), f"{KIND} vision")
  return CLIPPair.of(
    lambda: CLIP(text, vision, width["projection_dim"], settings), config, settings
  )
