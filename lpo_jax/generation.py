"""Prompts and seeds in, images out: one jitted function for the whole way."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lpo_jax import models, parallel, pretrained, tables
from lpo_jax.diffusion import noising, samplers, schedule, scheduler_fields
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import users
from lpo_jax.types import Array, Conditioning, Params


class TextConditioner:
  """Encodes prompts as the pipeline in `folder` does.

  One text encoder gives its last hidden state (SD 1.x, 2.x). Two give their penultimate
  hidden states side by side, and the second one's pooled embedding (SDXL).

  Args:
    folder: a diffusers pipeline, or its id on the Hub.
    dtype: of the encoders' activations.
    batch_size: prompts per call.
    clip_skip: how many more of the last layers are left out, as in diffusers' pipelines:
      of one encoder's, with its final norm applied after; of each of two encoders', with
      none.

  Raises:
    UserError: an encoder has too few layers for `clip_skip`.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    batch_size: int = 16,
    clip_skip: int = 0,
  ):
    self.folder, self._batch_size = pretrained.local_folder(folder), batch_size
    folder, self._clip_skip = self.folder, clip_skip
    names = ["text_encoder", "text_encoder_2"]
    self._names = [n for n in names if n == names[0] or (self.folder / n).is_dir()]
    self._tokenizers = [
      pretrained.load_tokenizer(folder, n.replace("text_encoder", "tokenizer"))
      for n in self._names
    ]
    self._parts = [pretrained.load(folder, n, dtype=dtype) for n in self._names]
    self._encode = jax.jit(self._forward)
    # Two encoders' last layer is never read.
    layers = [part.config.get("num_hidden_layers", 12) for part in self._parts]
    most = min(layers) + 1 - len(layers)
    if not 0 <= clip_skip <= most:
      raise UserError(
        f"model.clip_skip={clip_skip}: expected 0 to {most}, for the text encoders in "
        f"{str(folder)!r} have no more layers to leave out."
      )

  def _forward(self, params: list[Params], ids: list[Array]) -> tuple[Array, Any]:
    outputs = [
      part.apply(p, i) for part, p, i in zip(self._parts, params, ids, strict=True)
    ]
    if len(outputs) == 1:
      model = self._parts[0].model
      return model.skipped(params[0], outputs[0], self._clip_skip), None
    states = [output.hidden_states[-(self._clip_skip + 2)] for output in outputs]
    return jnp.concatenate(states, axis=-1), outputs[1].pooled.astype(jnp.float32)

  def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns prompt_embeds [n, L, D] and pooled_prompt_embeds [n, P] or None, fp32."""
    ids = [tokenizer.tokenize(list(prompts)) for tokenizer in self._tokenizers]
    params = [part.params for part in self._parts]
    states, pooled = [], []
    for start in range(0, len(prompts), self._batch_size):
      chunk = [_pad(i[start : start + self._batch_size], self._batch_size) for i in ids]
      count = min(self._batch_size, len(prompts) - start)
      state, pool = self._encode(params, chunk)
      states.append(np.asarray(state)[:count])
      pooled.append(None if pool is None else np.asarray(pool)[:count])
    has_pooled = pooled and pooled[0] is not None
    return np.concatenate(states), np.concatenate(pooled) if has_pooled else None


def _rows(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
  return None if values is None else values[rows]


def _takes_sources(
  folder: Any, in_channels: int, channels: int, index: Mapping[str, Any]
) -> bool:
  """Whether a UNet sees an image to edit beside the noisy latents.

  Raises:
    UserError: its channels are of neither kind, or it wants its sources scaled.
  """
  if in_channels not in (channels, 2 * channels):
    raise UserError(
      f"the UNet of {folder} takes {in_channels} channels; expected {channels}, as many "
      f"as the VAE's latents have, or {2 * channels} for one that edits (InstructPix2Pix). "
      "Inpainting and depth models are not implemented."
    )
  if index.get("is_cosxl_edit"):
    raise UserError(
      f"{folder} is CosXL Edit, whose source latents are scaled: not implemented. Expected "
      "an InstructPix2Pix pipeline with is_cosxl_edit=false."
    )
  return in_channels == 2 * channels


def _pad(rows: np.ndarray, count: int) -> np.ndarray:
  """Repeats the last row until there are `count`."""
  return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])


def initial_latents(
  prompts: Sequence[str], seeds: Sequence[int], shape: Sequence[int]
) -> np.ndarray:
  """Standard normal x_T [n, h, w, c], a function of (prompt, seed) alone.

  The same prompt and seed give the same noise in every model, batch and mesh: the base
  of same-seed comparisons.
  """
  words = [[zlib.crc32(p.encode()), s] for p, s in zip(prompts, seeds, strict=True)]
  keys = noising.identity_keys(0, "sample", jnp.asarray(words, jnp.uint32))
  draw = jax.vmap(lambda key: jax.random.normal(key, tuple(shape), jnp.float32))
  return np.asarray(draw(keys))


def _bind_sampler(
  name: str, *, steps: int, eta: float, sigmas: str
) -> tuple[functools.partial, bool]:
  """Returns the sampler with its options, and whether it wants keys to draw noise by.

  Raises:
    UserError: an unknown sampler or sigmas, eta or sigmas for one that has none.
  """
  known = tables.options_of(samplers.get(name))
  levels = ("auto", *samplers.SIGMAS)
  if sigmas not in levels:
    raise unknown_name("eval.sigmas", sigmas, levels)
  options: dict[str, Any] = {"steps": steps}
  if "eta" in known:
    options["eta"] = eta
  elif eta:
    raise _no_option(name, "eta", eta, "0")
  if "sigmas" in known:
    options["sigmas"] = sigmas
  elif sigmas not in ("auto", "schedule"):
    raise _no_option(name, "sigmas", sigmas, "'auto'")
  bound = tables.bind("sampler", samplers.SAMPLERS, name, options)
  return bound, "keys" in known and options.get("eta") != 0


def _no_option(name: str, option: str, value: Any, neutral: str) -> UserError:
  have = [n for n, f in samplers.SAMPLERS.items() if option in tables.options_of(f)]
  return UserError(
    f"eval.{option}={value}: sampler {name!r} has no {option}; expected {neutral}, or "
    f"eval.sampler among: {', '.join(have)}."
  )


class Generator:
  """Draws images with the pipeline in `folder`, whatever UNet weights it is given.

  Args:
    folder: a diffusers pipeline, or its id on the Hub: its VAE, text encoders, scheduler
      and UNet config.
    mesh: images are split over all its devices.
    sampler: a name in `samplers.SAMPLERS`.
    steps: network evaluations (twice with guidance).
    guidance_scale: classifier-free guidance; 1 for none.
    image_guidance_scale: of an editing UNet, how much more it keeps to the source;
      `samplers.guided_edit`. Both 1 for no guidance.
    eta: of DDIM; other samplers have none and refuse any but 0.
    sigmas: noise levels, a name in `samplers.SIGMAS`, or "auto": what the pipeline's
      scheduler asks for. Samplers without a choice refuse any but "schedule".
    batch_size: images per call, rounded up to a multiple of the devices.
    dtype: of activations.
    clip_skip: see `TextConditioner`.
    vae_tile: see `models.vae.VAE.encode`.
    user_scale: how much a user counts, for a UNet that knows users: 1 as it was trained.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    mesh: Mesh,
    sampler: str = "ddim",
    steps: int = 50,
    guidance_scale: float = 7.5,
    image_guidance_scale: float = 1.5,
    eta: float = 0.0,
    sigmas: str = "auto",
    batch_size: int = 16,
    dtype: Any = jnp.float32,
    clip_skip: int = 0,
    vae_tile: int = 0,
    user_scale: float = 1.0,
  ):
    self._user_scale = user_scale
    self._sampler, self._draws_noise = _bind_sampler(
      sampler, steps=steps, eta=eta, sigmas=sigmas
    )
    self.folder = folder = pretrained.local_folder(folder)
    scheduler = pretrained.scheduler_config(folder)
    scheduler_fields.refuse_others(sampler, scheduler)
    if self._sampler.keywords.get("sigmas") == "auto":
      asked = scheduler_fields.sigmas(scheduler)
      self._sampler = functools.partial(self._sampler, sigmas=asked)
    self._mesh, self._vae_tile = mesh, vae_tile
    self.unet = models.build(pretrained.read_config(folder, "unet"), dtype=dtype)
    self._vae = pretrained.load(folder, "vae", dtype=dtype)
    self._text = TextConditioner(folder, dtype=dtype, clip_skip=clip_skip)
    self._schedule = schedule.from_config(scheduler)
    self._guidance_scale = guidance_scale
    self._image_guidance_scale = image_guidance_scale
    devices = mesh.size
    self.batch_size = -(-batch_size // devices) * devices
    size, channels = (
      self.unet.config["sample_size"],
      self._vae.config.get("latent_channels", 4),
    )
    self.latent_shape = (size, size, channels)
    self.pixels = size * 2 ** (len(self._vae.config["block_out_channels"]) - 1)
    index = json.loads((self.folder / "model_index.json").read_text("utf-8"))
    self.edits = _takes_sources(
      folder, self.unet.config["in_channels"], channels, index
    )
    self._zero_null = bool(index.get("force_zeros_for_empty_prompt"))
    slots, everywhere = parallel.by_slot(mesh), parallel.replicated(mesh)
    self._draw = jax.jit(
      self._forward,
      in_shardings=(None, everywhere, slots, slots, everywhere, slots, slots),
      out_shardings=everywhere,
    )
    shardings = jax.tree.map(lambda _: everywhere, self._vae.params)
    self._vae_params = parallel.put(self._vae.params, shardings)

  @property
  def scaling_factor(self) -> float:
    """What the VAE's latents are multiplied by."""
    return self._vae.config.get("scaling_factor", 0.18215)

  def _forward(
    self,
    unet_params: Params,
    vae_params: Params,
    latents: Array,
    text: Conditioning,
    null: Conditioning,
    identity: Array,
    sources: Array | None,
  ) -> Array:
    """[n] rows of everything -> images [n, H, W, 3] uint8."""
    if self._user_scale != 1.0:
      unet_params = users.weigh(unet_params, self._user_scale)
    null = jax.tree.map(lambda one, rows: jnp.broadcast_to(one, rows.shape), null, text)
    if sources is not None:
      seen = self._source_latents(vae_params, sources)
      text = dataclasses.replace(text, source_latents=seen)
      null = dataclasses.replace(null, source_latents=jnp.zeros_like(seen))
    rows, guide = self._guidance(text, null)
    told = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)

    def unet(noisy_latents: Array, timesteps: Array) -> Array:
      return self.unet.apply(unet_params, noisy_latents, timesteps, **told.arguments)

    denoiser, noise = guide(unet), {}
    if self._draws_noise:
      noise["keys"] = noising.identity_keys(0, "sampler", identity)
    clean = self._sampler(denoiser, latents, self._schedule, **noise)
    clean = clean / self.scaling_factor
    images = self._vae.decode(vae_params, clean, tile=self._vae_tile)
    pixels = jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0
    return jnp.round(pixels).astype(jnp.uint8)

  def _source_latents(self, vae_params: Params, sources: Array) -> Array:
    """What the UNet is shown of images to edit: the posterior's mode, not scaled."""
    images = sources.astype(jnp.float32) / 127.5 - 1.0
    moments = self._vae.encode(vae_params, images, tile=self._vae_tile)
    return jnp.split(moments, 2, axis=-1)[0]

  def _guidance(
    self, text: Conditioning, null: Conditioning
  ) -> tuple[list[Conditioning], Callable[[samplers.Denoiser], samplers.Denoiser]]:
    """What the UNet is told, block by block of rows, and how its answers are joined."""
    scale, image_scale = self._guidance_scale, self._image_guidance_scale
    if scale == 1.0 and (not self.edits or image_scale == 1.0):
      return [text], lambda unet: unet
    if not self.edits:
      return [null, text], lambda unet: samplers.guided(unet, scale)
    image = dataclasses.replace(null, source_latents=text.source_latents)
    return [text, image, null], lambda unet: samplers.guided_edit(
      unet, scale, image_scale
    )

  def conditioning(self, prompts: Sequence[str]) -> Conditioning:
    """Encodes prompts as the UNet wants them, [n, ...] NumPy."""
    embeds, pooled = self._text.encode(prompts)
    if self._zero_null:
      empty = np.array([prompt == "" for prompt in prompts])
      embeds = np.where(empty[:, None, None], 0.0, embeds)
      pooled = None if pooled is None else np.where(empty[:, None], 0.0, pooled)
    time_ids = None
    if pooled is not None:
      one = [self.pixels, self.pixels, 0, 0, self.pixels, self.pixels]
      time_ids = np.tile(np.asarray(one, np.float32), (len(prompts), 1))
    return Conditioning(embeds, pooled, time_ids)

  def __call__(
    self,
    unet_params: Params,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    sources: np.ndarray | None = None,
    user_embeds: np.ndarray | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
  ) -> np.ndarray:
    """Draws one image per (prompt, seed).

    Args:
      unet_params: global arrays; the policy's, the reference's, any.
      prompts: n texts; for an editing UNet, instructions.
      seeds: n non-negative ints.
      sources: [n, H, W, 3] uint8 images to edit, of the size that is drawn, for an
        editing UNet; None for one that draws.
      user_embeds: [n, K, D] whom each is for, zeros for nobody, for a UNet that knows
        users; None: for nobody. Guidance is away from the image for nobody.
      on_progress: called with the number of images done.

    Returns:
      [n, H, W, 3] uint8 on every host.

    Raises:
      UserError: an editing UNet without sources, one that draws with them, or sources of
        another number or size; embeddings of users of another number or width, or for
        a UNet that knows none.
    """
    self._check_sources(sources, len(prompts))
    self._check_users(user_embeds, len(prompts))
    distinct = sorted(set(prompts))
    encoded = self.conditioning(["", *distinct])
    null = jax.tree.map(lambda x: x[:1], encoded)
    if user_embeds is not None:
      null = dataclasses.replace(null, user_embeds=np.zeros_like(user_embeds[:1]))
    row_of = {prompt: i + 1 for i, prompt in enumerate(distinct)}
    images = []
    with jax.set_mesh(self._mesh):
      for start in range(0, len(prompts), self.batch_size):
        stop = min(start + self.batch_size, len(prompts))
        rows = _pad(np.arange(start, stop), self.batch_size)
        texts, numbers = [prompts[i] for i in rows], [seeds[i] for i in rows]
        text = jax.tree.map(lambda x: x[[row_of[t] for t in texts]], encoded)  # noqa: B023
        text = dataclasses.replace(text, user_embeds=_rows(user_embeds, rows))
        identity = [[zlib.crc32(t.encode()), n] for t, n in zip(texts, numbers)]
        drawn = self._draw(
          unet_params,
          self._vae_params,
          *self._place(initial_latents(texts, numbers, self.latent_shape), text, null),
          *self._place(np.asarray(identity, np.uint32), _rows(sources, rows)),
        )
        images.append(parallel.fetch(drawn)[: stop - start])
        on_progress(stop)
    return np.concatenate(images)

  def _check_sources(self, sources: np.ndarray | None, count: int) -> None:
    if self.edits != (sources is not None):
      raise UserError(
        f"the UNet of {self.folder} "
        + (
          "edits images, and the prompts have none to edit: give eval.prompts (or "
          "generate.prompts) as a file with a column of source images, such as cond_image."
          if self.edits
          else "draws from text alone, and the prompts come with images to edit: use an "
          "editing UNet (--job widen makes one to train), or prompts without sources."
        )
      )
    wanted = (count, self.pixels, self.pixels, 3)
    if sources is not None and (sources.shape != wanted or sources.dtype != np.uint8):
      raise UserError(
        f"images to edit: expected uint8 of shape {list(wanted)}, got {sources.dtype} "
        f"of shape {list(sources.shape)}."
      )

  @property
  def knows_users(self) -> bool:
    """Whether its UNet can be told whom an image is for."""
    return bool(self.unet.config.get("user_dim"))

  def _check_users(self, embeds: np.ndarray | None, count: int) -> None:
    width = self.unet.config.get("user_dim")
    if embeds is not None and (embeds.shape[0], embeds.shape[-1]) != (count, width):
      raise UserError(
        f"user_embeds of shape {list(embeds.shape)}: expected {count} rows of width "
        f"{width or '(none: this UNet knows no users)'}."
      )

  def _place(self, *values: Any) -> tuple:
    """Every host holds all rows; each device takes its own."""
    slots, everywhere = parallel.by_slot(self._mesh), parallel.replicated(self._mesh)

    def one(x: np.ndarray) -> jax.Array:
      where = slots if len(x) == self.batch_size else everywhere
      return parallel.put(x, where)

    return tuple(jax.tree.map(one, value) for value in values)
