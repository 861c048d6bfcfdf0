"""FLOPs of traced programs, by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lpo_jax.models import attention
from lpo_jax.training.flops import count_flops, utilisation


def of(function, *shapes):
  return count_flops(jax.make_jaxpr(function)(*(jnp.zeros(s) for s in shapes)))


def test_a_product_and_its_gradient():
  def loss(a, b):
    return (a @ b).sum()

  forward = 2 * 4 * 5 * 7
  assert of(loss, (4, 5), (5, 7)) == forward
  # The gradient needs one product for each factor, and not the value.
  assert of(jax.grad(loss, (0, 1)), (4, 5), (5, 7)) == 3 * forward


def test_a_convolution():
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  # Each of 2 x 8 x 8 x 5 results is a sum over 3 x 3 places of 3 channels.
  assert of(convolve, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


def test_a_loop_counts_as_often_as_it_runs():
  def loop(x, kernels):
    return jax.lax.scan(lambda y, k: (y @ k, None), x, kernels)[0]

  assert of(loop, (2, 3), (4, 3, 3)) == 4 * 2 * 2 * 3 * 3


def test_a_branch_counts_as_its_dearest():
  def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)

  assert of(either, (3, 3)) == 2 * 2 * 27


def test_what_is_computed_again_counts_again():
  def block(x):
    return jnp.sin(x @ x)

  once = of(jax.grad(lambda x: block(block(x)).sum()), (4, 4))
  again = of(jax.grad(lambda x: jax.checkpoint(block)(block(x)).sum()), (4, 4))
  assert again - once == 2 * 64


def test_a_kernel_counts_as_often_as_its_grid_has_cells():
  shape = (1, 256, 2, 64)  # N, L, H, D
  expected = 2 * 2 * 256 * 256 * 2 * 64  # scores, and their product with the values
  for name in ("xla", "flash"):

    def attend(q, k, v, name=name):
      options = {"interpret": True} if name == "flash" else {}
      return getattr(attention, name)(q, k, v, False, **options)

    assert of(attend, shape, shape, shape) == expected, name


def test_what_is_shared_out_counts_on_all_devices():
  mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
  split, whole = PartitionSpec("data"), PartitionSpec()
  local = jax.shard_map(
    lambda x, k: x @ k, mesh=mesh, in_specs=(split, whole), out_specs=split
  )
  assert of(local, (8, 3), (3, 5)) == 2 * 8 * 3 * 5


def test_utilisation():
  assert utilisation(3e12, seconds=2.0, chips=3, peak=1e12) == 0.5
