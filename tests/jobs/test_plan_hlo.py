"""What compiled programs move, against programs of which it is known."""

import json

import pytest

from lpo_jax.errors import UserError
from lpo_jax.jobs import plan_hlo

# Shortened from libtpu 0.0.42.1's for v5e:2x4: a loop of 3 turns over a stack of kernels,
# with an asynchronous all-gather that is written twice, a kernel over several lines, an
# all-reduce of which a slice is kept and whose channel is the same, and arrays in faster
# memory, S(1).
TPU = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused_slice (param_0.1: bf16[3,64,16], param_1.1: s32[]) -> bf16[1,64,16] {
  %param_0.1 = bf16[3,64,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = bf16[1,64,16]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%param_0.1, %param_1.1, %zero, %zero), dynamic_slice_sizes={1,64,16}
}

%start (param_0.2: bf16[1,64,16]) -> (bf16[1,64,16], bf16[1,64,64]) {
  %param_0.2 = bf16[1,64,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.2), channel_id=8, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={2}
  ROOT %both = (bf16[1,64,16]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (param_0.3: bf16[1,64,16], param_1.3: bf16[1,64,64]) -> bf16[1,64,64] {
  %param_0.3 = bf16[1,64,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.3 = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.2 = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.3), channel_id=8, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={2}
  ROOT %end = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%param_1.3, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (input: f32[64,64]) -> f32[64,16] {
  %input = f32[64,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,64]{1,0:T(8,128)} all-reduce(%input), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %at = s32[]{:T(128)} constant(0)
  ROOT %kept = f32[64,16]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.1, %at, %at), dynamic_slice_sizes={64,16}
}

%body (state: (s32[], f32[8,64], bf16[3,64,16])) -> (s32[], f32[8,64], bf16[3,64,16]) {
  %state = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, bf16[3,64,16]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %value = f32[8,64]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %stack = bf16[3,64,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %kernel = f32[8,64]{1,0:T(8,128)S(1)} custom-call(%value), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
 "xprof_metadata":"{}"
}}, metadata={op_name="splash"}
  %block = bf16[1,64,16]{2,1,0:T(8,128)(2,1)S(1)} fusion(%stack, %turn), kind=kLoop, calls=%fused_slice
  %started = (bf16[1,64,16]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)}) fusion(%block), kind=kCustom, calls=%start
  %shard = bf16[1,64,16]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%started), index=0
  %partial = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%started), index=1
  %whole = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} fusion(%shard, %partial), kind=kCustom, calls=%done
  %next = f32[8,64]{1,0:T(8,128)S(1)} convolution(%value, %whole), dim_labels=bf_io->bf
  ROOT %out = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, bf16[3,64,16]{2,1,0:T(8,128)(2,1)}) tuple(%turn, %next, %stack)
}

%condition (state.1: (s32[], f32[8,64], bf16[3,64,16])) -> pred[] {
  %turns = s32[]{:T(128)} constant(3)
  %state.1 = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, bf16[3,64,16]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%turn.1, %turns), direction=LT
}

ENTRY %main (w: bf16[3,64,16], x: f32[8,64], g: f32[64,64]) -> f32[64,16] {
  %w = bf16[3,64,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[8,64]{1,0:T(8,128)} parameter(1)
  %g = f32[64,64]{1,0:T(8,128)} parameter(2)
  %first = s32[]{:T(128)} constant(0)
  %copy-start = (f32[8,64]{1,0:T(8,128)S(1)}, f32[8,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[8,64]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %tuple = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, bf16[3,64,16]{2,1,0:T(8,128)(2,1)}) tuple(%first, %copy-done, %w)
  %while = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, bf16[3,64,16]{2,1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  ROOT %grad = f32[64,16]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_collectives_of_a_tpu_program():
  gather, scatter = plan_hlo.collectives(plan_hlo.read(TPU))
  assert (gather.kind, gather.times, gather.group) == ("all-gather", 3, 4)
  assert gather.bytes == 64 * 16 * 2
  assert gather.received == 3 * 3 * gather.bytes  # three others' parts, three times
  # What is thrown away of an all-reduce need not be sent.
  assert (scatter.kind, scatter.times, scatter.group) == ("reduce-scatter", 1, 4)
  assert scatter.received == 64 * 64 * 4 * 3 / 4


def test_memory_traffic_of_a_tpu_program():
  in_loop = 64 * 16 * 2 + 4  # a slice of the stack, and the counter
  copied = 8 * 64 * 4  # read; written to faster memory
  gradient = 64 * 64 * 4 + 64 * 16 * 4
  compared = 4 + 4 + 1
  assert (
    plan_hlo.hbm_bytes(plan_hlo.read(TPU))
    == 3 * (in_loop + compared) + copied + gradient
  )


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(UserError, match="no ENTRY"):
    plan_hlo.read("HloModule nothing\n")


# Two kernels split over 4 of 8 devices, gathered in each of 3 turns; gradients summed.
PROGRAM = """
  import json, jax, jax.numpy as jnp
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from lpo_jax.jobs import plan_hlo
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (AxisType.Auto,) * 2)
  def at(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
  kernels = at((3, 64, 64), None, None, "fsdp")
  x = at((16, 64), ("data", "fsdp"))
  everywhere = NamedSharding(mesh, P())
  def turn(y, kernel):
    return jnp.tanh(y @ jax.lax.with_sharding_constraint(kernel, P())), None
  def run(x, kernels):
    y = jax.lax.scan(turn, x, kernels)[0]
    return y, jax.lax.with_sharding_constraint(y.sum(0), P())
  with jax.set_mesh(mesh):
    looped = jax.jit(run).lower(x, kernels).compile().as_text()
    plain = jax.jit(lambda x: jnp.tanh(x @ x.T) * 2).lower(
      jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
  found = [vars(c) | {"received": c.received} for c in plan_hlo.collectives(plan_hlo.read(looped))]
  print(json.dumps([found, plan_hlo.hbm_bytes(plan_hlo.read(plain.as_text())),
                    plain.cost_analysis()["bytes accessed"]]))
"""


def test_programs_compiled_here(on_devices):
  found, bytes_, by_xla = json.loads(on_devices(8, PROGRAM))
  gather = next(c for c in found if c["kind"] == "all-gather")
  assert (gather["times"], gather["group"], gather["bytes"]) == (3, 4, 64 * 16 * 4)
  assert gather["received"] == 3 * 3 * 64 * 16 * 4
  total = next(c for c in found if c["kind"] == "all-reduce")
  # 64 sums on each of 8 devices: twice 7/8 of them arrive.
  assert (total["times"], total["group"], total["received"]) == (1, 8, 2 * 256 * 7 / 8)
  assert bytes_ == by_xla  # without loops XLA's own count is the same
