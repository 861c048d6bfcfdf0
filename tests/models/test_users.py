"""Users in a UNet: nothing at first, diffusers' IP-Adapter afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy

from lpo_jax import models, pretrained, trees
from lpo_jax.errors import UserError
from lpo_jax.jobs import widen
from lpo_jax.models import users
from lpo_jax.pretrained import ip_adapter

# Two sizes and a stack of two blocks; the middle comes last in diffusers' count.
CONFIG = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": 8,
  "block_out_channels": [16, 32],
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 24,
  "norm_num_groups": 4,
  "transformer_layers_per_block": [1, 2],
}
# The same of one size, which compiles in a tenth of the time.
SMALL = {
  **CONFIG,
  "block_out_channels": [8],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "up_block_types": ["UpBlock2D"],
  "mid_block_type": None,
  "transformer_layers_per_block": 2,
}
DIM = 6


def draw(shape, seed):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_base(config):
  model = models.build(config)
  return pretrained.Part("unet", config, model.init(0), model)


@pytest.fixture(scope="module")
def base():
  return make_base(SMALL)


@pytest.fixture(scope="module")
def told():
  """Latents, times, texts, and two users of three embeddings each."""
  return (
    draw((2, 4, 4, 4), 1),
    np.array([7, 901]),
    draw((2, 5, 24), 2),
    draw((2, 3, DIM), 3),
  )


@pytest.fixture(scope="module")
def apply(base):
  """Our UNet with users, compiled once."""
  wide = widen.with_users(base, DIM, 4)

  def run(params, latents, times, texts, user_embeds):
    return wide.apply(params, latents, times, texts, user_embeds=user_embeds)

  return jax.jit(run)


def trained(part, seed=5):
  """The same network with random numbers where users come in."""

  def change(name, leaf):
    if not users.is_adapter(name):
      return leaf
    noise = draw(leaf.shape, [seed, len(name)])
    return noise / 4 + (1 if name.endswith("norm.scale") else 0)

  return trees.map_named(change, part.params)


def test_before_training_no_user_changes_anything(base, told, apply):
  wide = widen.with_users(base, DIM, 4)
  latents, times, texts, embeds = told
  plain = jax.jit(base.apply)(base.params, latents, times, texts)
  one = np.asarray(apply(wide.params, *told))
  nobody = np.asarray(apply(wide.params, latents, times, texts, 0 * embeds))
  np.testing.assert_array_equal(one, nobody)
  np.testing.assert_allclose(one, plain, atol=2e-6)  # two programs
  leaves = trees.named_leaves(wide.params)
  added = [name for name in leaves if users.is_adapter(name)]
  assert leaves.keys() - added == base.model.named_shapes().keys()
  sites = [n.rpartition(".processor.")[0] for n in added if "to_v_ip" in n]
  assert len(added) == 2 * len(sites) + 4
  for site in sites:
    processor = f"{site}.processor"
    assert not leaves[f"{processor}.to_v_ip.0.kernel"].any()
    np.testing.assert_array_equal(
      leaves[f"{processor}.to_k_ip.0.kernel"], leaves[f"{site}.to_k.kernel"]
    )


def test_the_gradient_reaches_the_values_first(base, told):
  """At zero values only they have a gradient: the rest begins to move with them."""
  wide = widen.with_users(base, DIM, 4)
  latents, times, texts, embeds = told

  def loss(params):
    return jnp.mean(
      jnp.square(wide.apply(params, latents, times, texts, user_embeds=embeds))
    )

  for name, leaf in trees.named_leaves(jax.jit(jax.grad(loss))(wide.params)).items():
    if users.is_adapter(name):
      assert bool(jnp.any(leaf != 0)) == ("to_v_ip" in name), name


def test_users_matter_once_trained_and_nobody_is_zeros(base, told, apply):
  wide = widen.with_users(base, DIM, 4)
  params = trained(wide)
  latents, times, texts, embeds = told
  one = np.asarray(apply(params, *told))
  other = np.asarray(apply(params, latents, times, texts, embeds[::-1]))
  assert np.abs(one - other).max() > 1e-2
  nobody = apply(params, latents, times, texts, 0 * embeds)
  unasked = jax.jit(wide.apply)(params, latents, times, texts)
  np.testing.assert_allclose(unasked, nobody, atol=1e-5)
  assert np.abs(one - nobody).max() > 1e-2


def test_a_weight_of_zero_is_no_user_and_weights_are_linear_in_the_values(
  base, told, apply
):
  wide = widen.with_users(base, DIM, 4)
  params = trained(wide)
  without = apply(users.weigh(params, 0.0), *told)
  np.testing.assert_allclose(without, apply(wide.params, *told), atol=1e-6)
  doubled = trees.map_named(
    lambda name, leaf: 2 * leaf if "to_v_ip" in name else leaf, params
  )
  np.testing.assert_array_equal(
    apply(users.weigh(params, 2.0), *told), apply(doubled, *told)
  )
  assert np.abs(apply(doubled, *told) - apply(params, *told)).max() > 1e-3


def test_without_a_projector_the_embeddings_are_the_tokens(base, told):
  latents, times, texts, embeds = told
  wide = widen.with_users(base, DIM, 0)
  names = [n for n in wide.model.named_shapes() if users.is_adapter(n)]
  assert all("processor" in name for name in names)
  params = trained(wide)
  run = jax.jit(lambda e: wide.apply(params, latents, times, texts, user_embeds=e))
  # Attention knows no order: a user's embeddings are a set.
  np.testing.assert_allclose(run(embeds), run(embeds[:, ::-1]), atol=1e-5)
  assert np.abs(run(embeds) - run(2 * embeds)).max() > 1e-3
  assert "no projector" in ip_adapter.refusal(wide.config)


def diffusers_with(torch, base, tmp_path, file):
  """diffusers' UNet of the base, with the adapter in the file."""
  import diffusers

  pretrained.save(tmp_path, base)
  unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
  loader = diffusers.loaders.ip_adapter.IPAdapterMixin()
  loader.unet, loader.unet_name, loader.text_encoder = unet, "unet", None
  loader.load_ip_adapter(
    str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None
  )
  return unet, loader


def test_equals_diffusers_with_the_exported_adapter(told, tmp_path, relative_error):
  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  base = make_base(CONFIG)
  wide = widen.with_users(base, DIM, 4)
  params = trained(wide)
  file = ip_adapter.save(tmp_path / "a" / ip_adapter.FILE_NAME, wide.model, params)
  assert ip_adapter.refusal(wide.config) is None
  unet, loader = diffusers_with(torch, base, tmp_path, file)
  loader.set_ip_adapter_scale(0.3)
  latents, times, texts, embeds = map(torch.tensor, told)
  with torch.no_grad():
    theirs = unet(
      latents.permute(0, 3, 1, 2),
      times,
      texts,
      added_cond_kwargs={"image_embeds": [embeds]},
    ).sample.permute(0, 2, 3, 1)

  @jax.jit
  def apply(params):
    return wide.apply(params, *told[:3], user_embeds=told[3])

  ours = apply(users.weigh(params, 0.3))
  assert relative_error(ours, theirs.numpy()) < 1e-5
  # The error is not small because the adapter is.
  assert relative_error(apply(wide.params), theirs.numpy()) > 1e-2


@pytest.mark.parametrize("tokens", [4, 3, 0])
def test_a_file_read_back_is_what_was_written(base, tmp_path, tokens):
  wide = widen.with_users(base, DIM, tokens)
  params = trained(wide)
  file = ip_adapter.save(tmp_path / "x.safetensors", wide.model, params)
  back = ip_adapter.load(file, wide.model)
  wanted = {n: x for n, x in trees.named_leaves(params).items() if users.is_adapter(n)}
  assert back.keys() == wanted.keys()
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(back[name], leaf)
  # What is taken off and put on again is the same, by the header or by the shapes.
  plain = ip_adapter.detach(dataclasses.replace(wide, params=params))
  assert plain.config == base.config
  files = [file]
  if tokens:
    files.append(tmp_path / "foreign.safetensors")
    numpy.save_file(numpy.load_file(file), files[1])
  for each in files:
    again = ip_adapter.attach(plain, each)
    assert again.config == wide.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))
  other = widen.with_users(base, DIM + 1, tokens)
  with pytest.raises(UserError, match="user_dim and user_tokens agree"):
    ip_adapter.load(file, other.model)


def test_refusals(base, told):
  latents, times, texts, embeds = told
  with pytest.raises(UserError, match="width 6, and this UNet takes no users"):
    base.apply(base.params, latents, times, texts, user_embeds=embeds)
  wide = widen.with_users(base, DIM, 4)
  with pytest.raises(UserError, match=r"width 5, and this UNet takes 6"):
    wide.apply(wide.params, latents, times, texts, user_embeds=embeds[..., :5])
  with pytest.raises(UserError, match="knows users already"):
    widen.with_users(wide, DIM, 4)
  with pytest.raises(UserError, match="user_dim=0"):
    widen.with_users(base, 0, 4)
  with pytest.raises(UserError, match="knows no users"):
    ip_adapter.save("nowhere", base.model, base.params)
