"""Attention, through one door: implementations that agree, chosen by where they run.

The scores of a long sequence to itself are the largest array a UNet makes (4096 x 4096
for each head of each image). The kernels named "flash" and "cudnn" never write them;
"chunked" writes a block of them at a time, everywhere; "xla" writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lpo_jax.errors import UserError, unknown_name
from lpo_jax.models import chunked as blockwise
from lpo_jax.parallel import AXES
from lpo_jax.types import Array

# From how many queries and keys on a kernel beats XLA: at 1024 its estimate is 1.3 to
# 1.5 times as fast on a TPU and takes a fifth of the memory, at 256 it gains nothing;
# see docs/performance.md. A prompt's 77 keys are far below.
LONG = 1024
# Scores above which "auto" gives up some speed for memory, in bytes on one device.
LARGE_SCORES = 2**28
# On a CPU, what the cores' caches hold: scores above it are cheaper computed again than
# read again, and "chunked" is the faster; below, a step gains nothing. And the size of its
# blocks, in scores.
CPU_SCORES = 2**24
CPU_BLOCK = 2**20
# Rows of the scores that "chunked" holds at a time elsewhere, and "flash" at most in one
# block.
CHUNK_ROWS = 512
FLASH_BLOCK = 1024
# Lanes of a TPU's vector registers: blocks are a multiple of it.
LANES = 128


def precision(dtype: Any) -> jax.lax.Precision:
  """Of a product of this dtype: fp32 factors are not to be rounded."""
  # An fp32 product on a TPU or a recent GPU rounds its factors unless told not to.
  highest = jnp.dtype(dtype) == jnp.float32
  return jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT


def xla(q: Array, k: Array, v: Array, is_causal: bool) -> Array:
  """The formula as it stands: all scores at once, anywhere."""
  # Heads next to the batch: on CPU up to twice as fast as `jax.nn`'s function.
  q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
  product = functools.partial(jnp.einsum, precision=precision(q.dtype))
  scores = product("nhld,nhmd->nhlm", q, k, preferred_element_type=jnp.float32)
  scores = scores / math.sqrt(q.shape[-1])
  if is_causal:
    seen = jnp.tri(*scores.shape[2:], dtype=bool)
    scores = jnp.where(seen, scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.moveaxis(product("nhlm,nhmd->nhld", weights, v), 1, 2)


def chunked(q: Array, k: Array, v: Array, is_causal: bool) -> Array:
  """A block of scores at a time, computed again in the backward pass; anywhere."""
  call = call_of(q.shape, k.shape, q.dtype)
  if call.batch % call.devices:
    return _blockwise(call, is_causal, q, k, v)
  # A loop over images would fetch each from the device that holds it.
  alone = dataclasses.replace(call, batch=call.batch // call.devices, devices=1)
  return _on_each_device(functools.partial(_blockwise, alone, is_causal), q, k, v)


def _blockwise(call: Call, is_causal: bool, q: Array, k: Array, v: Array) -> Array:
  if call.platform == "cpu":
    heads, limit = 1, max(1, CPU_BLOCK // call.keys)
  else:
    heads, limit = call.batch * call.heads, CHUNK_ROWS
  rows = -(-call.queries // -(-call.queries // limit))
  tiling = blockwise.Tiling(heads, rows, is_causal, precision(q.dtype))
  return blockwise.attend(tiling, q, k, v)


def cudnn(q: Array, k: Array, v: Array, is_causal: bool) -> Array:
  """cuDNN's fused kernel, on NVIDIA GPUs, in half precision."""
  try:
    # With the residual, the plain forward pass is the one that gradients are taken of:
    # policy and reference run the same program.
    y, _ = jax.nn.dot_product_attention(
      q, k, v, is_causal=is_causal, implementation="cudnn", return_residual=True
    )
  except (NotImplementedError, RuntimeError) as e:
    raise UserError(
      f"attention 'cudnn' cannot run here: {e} Choose 'auto', 'xla' or 'chunked'."
    ) from e
  return y


def flash(
  q: Array, k: Array, v: Array, is_causal: bool, *, interpret: bool = False
) -> Array:
  """Splash attention, the Pallas kernel that jax has for TPUs.

  The compiler cannot split a Mosaic kernel over devices: where a mesh is set, every
  device is given its part of the batch.

  Args:
    q: [N, L, H, D]; k and v: [N, M, H, D]; any D, it is not padded.
    k: see q.
    v: see q.
    is_causal: whether position i sees only positions up to i.
    interpret: run the kernel as plain operations, on any platform: for tests.

  Returns:
    [N, L, H, D] in q's dtype.
  """
  return _on_each_device(functools.partial(_flash, is_causal, interpret), q, k, v)


def _on_each_device(
  run: Callable[[Array, Array, Array], Array], q: Array, k: Array, v: Array
) -> Array:
  """Runs it on every device's own part of the batch."""
  mesh = jax.sharding.get_abstract_mesh()
  if _split_over(mesh) == 1:
    return run(q, k, v)
  batch = PartitionSpec(_axes(mesh))
  # A kernel does not say over which axes its results vary.
  local = jax.shard_map(
    run, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False
  )
  return local(q, k, v)


def _axes(mesh: Any) -> tuple[str, ...]:
  return tuple(a for a in AXES if a in mesh.axis_names and a not in mesh.manual_axes)


def _split_over(mesh: Any) -> int:
  return math.prod(mesh.shape[axis] for axis in _axes(mesh))


# Splash has one kernel for values and another for values to be differentiated. Here both
# are the second: the policy and a reference of equal weights run the same program.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(is_causal: bool, interpret: bool, q: Array, k: Array, v: Array) -> Array:
  return _flash_forward(is_causal, interpret, q, k, v)[0]


def _flash_forward(
  is_causal: bool, interpret: bool, q: Array, k: Array, v: Array
) -> tuple[Array, tuple[Callable[[Array], Any], None]]:
  with jax.default_matmul_precision(_kernel_precision(q.dtype)):
    return jax.vjp(functools.partial(_splash, is_causal, interpret), q, k, v)


def _flash_backward(
  is_causal: bool, interpret: bool, pull: Callable[[Array], Any], cotangent: Array
) -> tuple[Array, Array, Array]:
  with jax.default_matmul_precision(_kernel_precision(cotangent.dtype)):
    return pull(cotangent)


_flash.defvjp(_flash_forward, _flash_backward)


def _kernel_precision(dtype: Any) -> str:
  return "highest" if jnp.dtype(dtype) == jnp.float32 else "default"


def _splash(is_causal: bool, interpret: bool, q: Array, k: Array, v: Array) -> Array:
  # Pallas for TPUs takes a second to import.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  queries, keys, heads, width = *q.shape[1:2], *k.shape[1:]
  limit = FLASH_BLOCK if q.dtype.itemsize == 2 and width <= 256 else FLASH_BLOCK // 2
  block_q, padded_q = blocks(queries, limit)
  block_k, padded_k = blocks(keys, limit)
  sizes = splash.BlockSizes(
    block_q=block_q,
    block_kv=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    # One kernel for all three gradients: a fifth faster than two.
    use_fused_bwd_kernel=True,
  )
  kind = splash.CausalMask if is_causal else splash.FullMask
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([kind((padded_q, padded_k))] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  segments = None
  if padded_k > keys:
    # Keys of another segment are not seen; padded queries see what real ones see, and
    # are cut off.
    padding = jnp.arange(padded_k) >= keys
    segments = splash.SegmentIds(
      jnp.zeros(padded_q, jnp.int32), padding.astype(jnp.int32)
    )
  q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
  q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
  q, k, v = _pad(q, 2, padded_q), _pad(k, 2, padded_k), _pad(v, 2, padded_k)
  y = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)
  return jnp.moveaxis(y[:, :, :queries], 1, 2)


def _pad(x: Array, axis: int, size: int) -> Array:
  return jnp.pad(
    x, [(0, size - n) if i == axis else (0, 0) for i, n in enumerate(x.shape)]
  )


def blocks(length: int, limit: int) -> tuple[int, int]:
  """Cuts a sequence into the fewest equal blocks of whole lanes.

  Args:
    length: of the sequence.
    limit: of a block, a multiple of `LANES`.

  Returns:
    The size of a block, and the length padded to a multiple of it.

  >>> blocks(4096, 1024), blocks(2304, 1024), blocks(300, 1024), blocks(77, 1024)
  ((1024, 4096), (768, 2304), (384, 384), (128, 128))
  """
  count = -(-length // limit)
  block = -(-length // (count * LANES)) * LANES
  return block, count * block


@dataclasses.dataclass(frozen=True)
class Call:
  """What decides how one attention can be computed.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    batch: N, on all devices together.
    queries: L.
    keys: M.
    heads: H.
    width: D, of one head.
    dtype: of q, k and v.
    devices: among which the batch is split.
  """

  platform: str
  batch: int
  queries: int
  keys: int
  heads: int
  width: int
  dtype: Any
  devices: int = 1

  @property
  def scores(self) -> float:
    """Bytes of the scores on one device."""
    return 4 * self.batch * self.heads * self.queries * self.keys / self.devices


def _against_flash(call: Call) -> str | None:
  if call.platform != "tpu":
    return f"it is a kernel for TPUs, and this is compiled for {call.platform!r}"
  if call.batch % call.devices:
    return f"a batch of {call.batch} does not divide over {call.devices} devices"
  if jnp.dtype(call.dtype) not in (jnp.bfloat16, jnp.float32):
    return f"it takes bfloat16 or float32, not {jnp.dtype(call.dtype)}"
  return None


def _against_cudnn(call: Call) -> str | None:
  if call.platform != "gpu":
    return f"it is a kernel for NVIDIA GPUs, and this is compiled for {call.platform!r}"
  if jnp.dtype(call.dtype) not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 or float16, not {jnp.dtype(call.dtype)}"
  if call.width % 8 or call.width > 256:
    return f"a head of {call.width} is not a multiple of 8 up to 256"
  if call.queries % 2 or call.keys % 2:
    return f"it differentiates even lengths, not {call.queries} by {call.keys} keys"
  return None


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute attention.

  Attributes:
    run: (q, k, v, is_causal) -> y.
    obstacle: says why it cannot run a call; None if it can.
  """

  run: Callable[[Array, Array, Array, bool], Array]
  obstacle: Callable[[Call], str | None] = lambda call: None


ATTENTION: dict[str, Implementation] = {
  "xla": Implementation(xla),
  "chunked": Implementation(chunked),
  "cudnn": Implementation(cudnn, _against_cudnn),
  "flash": Implementation(flash, _against_flash),
}
NAMES = ("auto", *ATTENTION)


def check_name(name: str) -> None:
  """Refuses what is neither "auto" nor in the table.

  Raises:
    UserError: with the known names and the nearest.
  """
  if name not in NAMES:
    raise unknown_name("attention", name, NAMES)


def choose(call: Call) -> str:
  """Says what "auto" is: the first that holds.

  | platform | condition | name | because |
  |---|---|---|---|
  | tpu | both sequences >= `LONG`, bf16, the batch divides | flash | estimated 1.3 to 4 times as fast, far less memory |
  | gpu | both sequences >= `LONG`, bf16 or fp16, heads of 8 n <= 128 | cudnn | never writes the scores; wider heads need Hopper |
  | cpu | scores > `CPU_SCORES` on a device | chunked | they stay in the cache: 2 to 5 times as fast |
  | any | scores > `LARGE_SCORES` on a device | chunked | fits, for one more forward pass of the attention |
  | any | | xla | fastest for short sequences and a prompt's 77 keys |

  Args:
    call: the shapes, and where.

  Returns:
    A name of `ATTENTION` that can run the call.
  """
  half = jnp.dtype(call.dtype).itemsize == 2
  if half and min(call.queries, call.keys) >= LONG:
    if _against_flash(call) is None:
      return "flash"
    if _against_cudnn(call) is None and call.width <= 128:
      return "cudnn"
  most = CPU_SCORES if call.platform == "cpu" else LARGE_SCORES
  return "chunked" if call.scores > most else "xla"


def compiled_for() -> str:
  """Returns the platform that the code being traced will run on.

  It is not always `jax.default_backend()`: a step is compiled for TPUs on a machine
  without any, by setting a mesh of their descriptions. The mesh set with `jax.set_mesh`
  knows its devices' platform while tracing, and is asked first; then the default device;
  then the backend. `jax.lax.platform_dependent` would ask last, when lowering, but needs
  every branch to be traced, all of them to have the same residuals for the gradient, and
  a platform for each that its kernels can be lowered for. If the answer is wrong, a
  kernel fails to compile; it cannot compute something else.

  Returns:
    "cpu", "gpu" or "tpu".
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = getattr(device, "platform", None)
  if platform is None:
    default = jax.config.jax_default_device
    platform = getattr(default, "platform", default) or jax.default_backend()
  return "gpu" if platform in ("cuda", "rocm") else platform


def call_of(q_shape: Sequence[int], k_shape: Sequence[int], dtype: Any) -> Call:
  """Describes a call of [N, L, H, D] with [N, M, H, D] in the mesh that is set."""
  batch, queries, heads, width = q_shape
  devices = _split_over(jax.sharding.get_abstract_mesh())
  return Call(
    compiled_for(), batch, queries, k_shape[1], heads, width, jnp.dtype(dtype), devices
  )


def attend(
  q: Array, k: Array, v: Array, *, implementation: str = "auto", is_causal: bool = False
) -> Array:
  """softmax(q k^T / sqrt(D)) v, with scores and softmax in fp32.

  Args:
    q: [N, L, H, D].
    k: [N, M, H, D].
    v: [N, M, H, D].
    implementation: a name of `ATTENTION`, or "auto" for what `choose` says.
    is_causal: whether position i sees only positions up to i.

  Returns:
    [N, L, H, D] in q's dtype.

  Raises:
    UserError: the implementation asked for cannot run this, with the reason.
  """
  check_name(implementation)
  call = call_of(q.shape, k.shape, q.dtype)
  name = choose(call) if implementation == "auto" else implementation
  obstacle = ATTENTION[name].obstacle(call)
  if obstacle:
    raise UserError(
      f"attention {name!r} cannot run q {tuple(q.shape)} with k {tuple(k.shape)}: "
      f"{obstacle}. Choose 'auto', which would take {choose(call)!r} here."
    )
  return ATTENTION[name].run(q, k, v, is_causal)
