"""The text encoders against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import models, trees
from lpo_jax.errors import UserError

TINY = {
  "vocab_size": 99,
  "hidden_size": 32,
  "intermediate_size": 48,
  "projection_dim": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "max_position_embeddings": 9,
  "bos_token_id": 97,
  "pad_token_id": 1,
}
START, END = 97, 98
# Ends at 4 and repeated as padding; at the last place; at 6 with other padding.
IDS = np.random.default_rng(0).integers(3, 97, (3, 9)).astype(np.int32)
IDS[:, 0] = START
IDS[0, 4:] = END
IDS[1, 8] = END
IDS[2, 6:] = (END, 1, 1)


def make(class_name, eos_token_id, activation):
  transformers = pytest.importorskip("transformers")
  config = transformers.CLIPTextConfig(
    **TINY, eos_token_id=eos_token_id, hidden_act=activation
  )
  return getattr(transformers, class_name)(config)


def build(**fields):
  return models.build({"architectures": ["CLIPTextModel"], **TINY, **fields})


@pytest.mark.parametrize(
  ("class_name", "eos_token_id", "activation"),
  [
    pytest.param("CLIPTextModel", 2, "quick_gelu", id="sd15"),
    pytest.param("CLIPTextModel", END, "gelu", id="sd21"),
    pytest.param("CLIPTextModelWithProjection", END, "gelu", id="sdxl-2"),
    pytest.param("CLIPTextModelWithProjection", 2, "quick_gelu", id="legacy-end"),
  ],
)
def test_equals_transformers(
  peer, relative_error, class_name, eos_token_id, activation
):
  text = peer(make(class_name, eos_token_id, activation), "text_encoder")
  projected = class_name == "CLIPTextModelWithProjection"
  torch = text.torch
  theirs = text.module(
    input_ids=torch.tensor(IDS.astype(np.int64)), output_hidden_states=True
  )
  pooled = theirs.text_embeds if projected else theirs.pooler_output
  last = theirs.last_hidden_state
  weights = np.random.default_rng(2).standard_normal(last.shape, np.float32)

  def scalar(params):
    output = text.part.apply(params, IDS)
    loss = jnp.sum(output.last_hidden_state * weights)
    return loss + jnp.sum(jnp.sin(output.pooled)), output

  gradients, ours = jax.jit(jax.grad(scalar, has_aux=True))(text.part.params)
  assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
  for mine, expected in zip(ours.hidden_states, theirs.hidden_states):
    assert relative_error(mine, expected.detach()) < 1e-5
  assert relative_error(ours.last_hidden_state, last.detach()) < 1e-5
  assert ours.pooled.shape == (3, 24 if projected else 32)
  assert relative_error(ours.pooled, pooled.detach()) < 1e-5

  expected = text.gradients((last * torch.tensor(weights)).sum() + pooled.sin().sum())
  gradients = trees.named_leaves(gradients)
  assert gradients.keys() == expected.keys()
  largest = max(np.linalg.norm(g) for g in expected.values())
  for name, gradient in expected.items():
    bound = max(np.linalg.norm(gradient), 1e-3 * largest)
    assert np.linalg.norm(gradients[name] - gradient) < 1e-4 * bound, name


def test_pooled_is_the_state_at_the_end_token():
  for eos_token_id in (2, END):
    model = build(eos_token_id=eos_token_id)
    output = model.apply(model.init(0), IDS)
    ends = output.last_hidden_state[np.arange(3), [4, 8, 6]]
    assert np.array_equal(output.pooled, ends)


def test_a_token_sees_no_later_one():
  model = build()
  params = model.init(0)
  changed = IDS.copy()
  changed[:, 5:] = 11
  before, after = model.apply(params, IDS), model.apply(params, changed)
  same = np.asarray(before.last_hidden_state == after.last_hidden_state).all(
    axis=(0, 2)
  )
  assert same[:5].all() and not same[5:].any()


def test_remat_changes_no_gradient(relative_error):
  results = []
  for remat in ("none", "blocks", "full"):
    config = {"architectures": ["CLIPTextModel"], **TINY, "num_hidden_layers": 1}
    model = models.build(config, remat=remat)

    def loss(params, model=model):
      return jnp.sum(jnp.sin(model.apply(params, IDS).last_hidden_state))

    gradients = jax.jit(jax.grad(loss))(model.init(0))
    results.append(np.concatenate([g.ravel() for g in jax.tree.leaves(gradients)]))
  assert np.linalg.norm(results[0]) > 1e-3
  assert relative_error(results[1], results[0]) < 1e-6
  assert relative_error(results[2], results[0]) < 1e-6


def test_refuses_more_tokens_than_places():
  model = build()
  with pytest.raises(UserError, match="has 9 places, came 10 tokens"):
    model.apply(model.abstract_params, np.zeros((1, 10), np.int32))


def test_refuses_what_it_does_not_implement_by_name():
  with pytest.raises(UserError, match="hidden_act"):
    build(hidden_act="relu")
  with pytest.raises(UserError, match="eos_token_id"):
    build(eos_token_id=[1, 2])
