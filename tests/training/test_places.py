"""What of a run is split, whole or in the host's memory; what cannot be is refused."""

import jax
import jax.numpy as jnp
import pytest

from lpo_jax import parallel
from lpo_jax.errors import UserError
from lpo_jax.training import places

SHAPES = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}


class Mesh:
  """As far as the size of a reference matters."""

  def __init__(self, fsdp):
    self.shape = {"data": 1, "fsdp": fsdp}


def one_device():
  return parallel.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
  ("fsdp", "elements", "is_small"),
  [(8, 2**30, True), (8, 2**30 + 1, False), (16, 2, False)],
)
def test_a_reference_is_small_by_its_bytes_and_the_mesh(fsdp, elements, is_small):
  reference = {"kernel": jax.ShapeDtypeStruct((elements,), jnp.bfloat16)}
  assert places._is_small(Mesh(fsdp), reference) == is_small


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"parameters": "shard"}, "unknown mesh.parameters 'shard'.*'sharded'"),
    ({"reference": "whole"}, "unknown mesh.reference 'whole'"),
    ({"offload": ("emma",)}, "unknown mesh.offload 'emma'.*'ema'"),
    ({"offload": "ema"}, r"expected a tuple of names, such as \('ema',\)"),
    ({"offload": ("reference",), "is_base": True}, "the policy needs as well"),
    ({"offload": ("reference",), "frozen": None}, "reads nothing of it"),
  ],
)
def test_words_that_cannot_be_are_refused(options, words):
  options = {"frozen": SHAPES, **options}
  with pytest.raises(UserError, match=words):
    places.settle(one_device(), SHAPES, **options)


def test_offloading_is_refused_where_the_host_has_no_such_memory(monkeypatch):
  monkeypatch.setattr(places, "HOST", "pinned_nowhere")
  with pytest.raises(
    UserError, match=r"cpu devices here have no memory .* expected mesh.offload=\(\)"
  ):
    places.settle(one_device(), SHAPES, SHAPES, offload=("ema",))


def test_what_is_offloaded_comes_back_the_same():
  at = places.settle(one_device(), SHAPES, SHAPES, offload=("ema", "reference"))
  assert places.is_offloaded(at.ema) and places.is_offloaded(at.frozen)
  assert not places.is_offloaded(at.params) and not places.is_offloaded(at.update)
  there = jax.device_put({"kernel": jnp.arange(4096.0).reshape(64, 64)}, at.ema)
  assert there["kernel"].sharding.memory_kind == places.HOST
  back = places.to_device(there, at.ema)
  assert back["kernel"].sharding.memory_kind == "device"
  assert (back["kernel"] == jnp.arange(4096.0).reshape(64, 64)).all()
