"""Compiles full-size train steps: a table of docs/performance.md.

  python benchmarks/compile_times.py --model sdxl --target cpu
  python benchmarks/compile_times.py --model sd15 --target v5p:2x2x1 --images 8 \
    --remat none --attention auto --effort quick

The real step (LPO, policy and reference, AdamW, bf16 activations) on abstract arrays:
no weights, no accelerator. A TPU target needs the `tpu` extra, and with it only the
compiler of that TPU: JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1. Prints one row, and with
--table adds it to that file. A step of SDXL takes minutes and 10 GB of memory.

TFLOPs an image are those of the products and convolutions in the traced program, loops
times their length: what the backward pass computes again is in them, and kernels. The
last three columns are the compiler's own, for one chip: its kernels (custom calls) have
neither FLOPs nor seconds there. `--effort quick` is what the plan job compiles with.
"""

import argparse
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lpo_jax import models, objectives, parallel
from lpo_jax.diffusion import noising, schedule
from lpo_jax.jobs.plan_step import EFFORTS
from lpo_jax.training import flops, optimizer, places, state, step
from lpo_jax.types import Batch, Conditioning, Ranking

HERE = pathlib.Path(__file__).resolve().parent
ARCHITECTURES = HERE.parent / "lpo_jax" / "assets" / "architectures"
# Resolution in pixels: what each was trained at.
MODELS = {"sd15": 512, "sd21": 768, "sdxl": 1024, "ssd1b": 1024}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COLUMNS = (
  "model",
  "target",
  "images a device",
  "remat",
  "scan",
  "attention",
  "effort",
  "TFLOPs an image",
  "StableHLO operations",
  "trace + lower, s",
  "compile, s",
  "compile, CPU s",
  "HLO instructions",
  "arguments, GiB",
  "temporaries, GiB",
  "TFLOP a chip",
  "GB accessed",
  "estimate, s",
)
# A hint to the compiler, which its estimate takes for -1 second where it counts it.
WITHOUT_ESTIMATE = 'custom_call_target="AssumeGatherIndicesInBound"'
LIST_SIZE = 2


def read_config(name: str) -> dict:
  """The fields of the real config.json."""
  return json.loads((ARCHITECTURES / f"{name}_unet.json").read_text("utf-8"))


def lowest_resolution(config: dict) -> dict:
  """The network's lowest resolution alone: of SDXL 40 of its 70 transformer blocks."""
  last = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "transformer_layers_per_block",
  )
  fields = {
    **config,
    **{key: config[key][-1:] for key in last if isinstance(config.get(key), list)},
    "up_block_types": config["up_block_types"][:1],
  }
  return {**fields, "layers_per_block": 1}


def make_mesh(target: str) -> jax.sharding.Mesh:
  """One CPU device, or all chips of a TPU topology with the parameters split."""
  if target == "cpu":
    return parallel.make_mesh(devices=jax.devices("cpu")[:1])
  chips = topologies.get_topology_desc(target, "tpu").devices
  return parallel.make_mesh(1, -1, devices=chips)


def abstract_batch(
  config: dict, mesh: jax.sharding.Mesh, images: int, side: int
) -> Batch:
  """A batch of lists of two, as shapes with shardings."""
  lists = images // LIST_SIZE

  def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)

  pooled = time_ids = None
  if config.get("addition_embed_type") == "text_time":
    width = config["projection_class_embeddings_input_dim"]
    width -= 6 * config["addition_time_embed_dim"]
    pooled, time_ids = shape(images, width), shape(images, 6)
  batch = Batch(
    moments=shape(images, side, side, 8),
    conditioning=Conditioning(
      shape(images, 77, config["cross_attention_dim"]), pooled, time_ids
    ),
    identity=shape(images, 2, dtype=jnp.uint32),
    item=shape(images, dtype=jnp.uint32),
    slot=shape(lists, LIST_SIZE, dtype=jnp.int32),
    ranking=Ranking(
      rank=shape(lists, LIST_SIZE, dtype=jnp.int32),
      valid=shape(lists, LIST_SIZE, dtype=jnp.bool_),
      score=shape(lists, LIST_SIZE),
      weight=shape(lists),
    ),
  )
  return with_shardings(batch, parallel.batch_shardings(mesh, batch))


def with_shardings(tree, shardings):
  """Says where the arrays of a tree of shapes will live."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings,
  )


def trace(arguments: argparse.Namespace) -> jax.stages.Traced:
  """Traces the train step as the train job does."""
  mesh = make_mesh(arguments.target)
  config = read_config(arguments.model)
  side = (arguments.resolution or MODELS[arguments.model]) // 8
  if arguments.lowest:
    side //= 2 ** (len(config["block_out_channels"]) - 1)
    config = lowest_resolution(config)
  model = models.build(
    config,
    dtype=jnp.bfloat16,
    attention=arguments.attention,
    remat=arguments.remat,
    scan=arguments.scan,
  )
  shapes = model.abstract_params
  shardings = parallel.param_shardings(shapes, mesh)
  method = step.Method(
    unet=model.apply,
    weights=places.in_use(step.whole, model, shardings),
    schedule=schedule.from_config(SCHEDULE),
    noising=noising.get("forward"),
    objective=objectives.get("lpo", beta=5000.0),
    seed=0,
    scaling_factor=0.13025 if "time_ids" in config else 0.18215,
    microbatch=arguments.microbatch * mesh.size,
    unroll=arguments.target == "cpu",
  )
  adamw = optimizer.build("adamw", shapes, learning_rate=1e-5)
  return step.trace_train_step(
    mesh,
    state.placement(mesh, shapes, adamw, with_ema=False, shardings=shardings),
    with_shardings(model.narrow(shapes), shardings),
    abstract_batch(config, mesh, arguments.images * mesh.size, side),
    method=method,
    optimizer=adamw,
  )


def measure(arguments: argparse.Namespace) -> list[str]:
  """Traces, lowers and compiles; returns the row."""
  jax.config.update("jax_enable_compilation_cache", False)
  began = time.monotonic()
  traced = trace(arguments)
  lowered = traced.lower()
  lower_seconds = time.monotonic() - began
  operations = count_instructions(lowered.as_text())
  images = arguments.images * make_mesh(arguments.target).size
  count = flops.count_flops(traced.jaxpr) / images
  return [
    arguments.model + (", lowest" if arguments.lowest else ""),
    arguments.target,
    str(arguments.images),
    arguments.remat,
    arguments.scan,
    arguments.attention,
    arguments.effort,
    f"{count / 1e12:.2f}",
    f"{operations:,}",
    f"{lower_seconds:.0f}",
    *([""] * 8 if arguments.lower_only else compile_(lowered, options_of(arguments))),
  ]


def options_of(arguments: argparse.Namespace) -> dict:
  """Compiler options besides those of the step."""
  platform = "cpu" if arguments.target == "cpu" else "tpu"
  return EFFORTS[arguments.effort].get(platform, {})


def count_instructions(text: str) -> int:
  """Lines of a program that give a value a name."""
  return sum(" = " in line for line in text.splitlines())


def compile_(lowered: jax.stages.Lowered, options: dict) -> list[str]:
  """Compiles: seconds by the clock and of the processor, instructions, GiB, costs."""
  began, processor_began = time.monotonic(), time.process_time()
  compiled = lowered.compile(compiler_options=options)
  seconds = time.monotonic() - began
  processor_seconds = time.process_time() - processor_began
  memory, text = compiled.memory_analysis(), compiled.as_text()
  costs = compiled.cost_analysis()
  estimate = estimated_seconds(costs.get("optimal_seconds", -1.0), text)
  return [
    f"{seconds:.0f}",
    f"{processor_seconds:.0f}",
    f"{count_instructions(text):,}",
    f"{memory.argument_size_in_bytes / 2**30:.2f}",
    f"{memory.temp_size_in_bytes / 2**30:.2f}",
    f"{costs['flops'] / 1e12:.1f}",
    f"{costs['bytes accessed'] / 1e9:.1f}",
    f"{estimate:.4f}" if estimate > 0 else "",
  ]


def estimated_seconds(said: float, text: str) -> float:
  """The compiler's estimate without its hints, of a program of less than a second."""
  return said + min(max(math.ceil(-said), 0), text.count(WITHOUT_ESTIMATE))


def main() -> None:
  """Prints a row under its head; adds it to the table where one is named."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", choices=MODELS, required=True)
  parser.add_argument("--target", default="cpu", help="cpu, or a topology: v5e:2x4")
  parser.add_argument("--images", type=int, default=2, help="of a device and update")
  parser.add_argument("--microbatch", type=int, default=0, help="of a device; 0: all")
  parser.add_argument("--resolution", type=int, help="in pixels, if not the model's")
  parser.add_argument(
    "--lowest", action="store_true", help="its lowest resolution and nothing else"
  )
  parser.add_argument("--remat", default="blocks")
  parser.add_argument("--scan", default="stacks")
  parser.add_argument("--attention", default="xla")
  parser.add_argument("--effort", choices=EFFORTS, default="full")
  parser.add_argument("--lower-only", action="store_true", help="do not compile")
  parser.add_argument("--table", type=pathlib.Path, help="a file to add the row to")
  arguments = parser.parse_args()
  lines = ["| " + " | ".join(x) + " |" for x in (COLUMNS, measure(arguments))]
  lines.insert(1, "|" + "---|" * len(COLUMNS))
  print("\n".join(lines))
  if arguments.table is not None:
    text = arguments.table.read_text("utf-8") if arguments.table.exists() else ""
    with arguments.table.open("a", encoding="utf-8") as file:
      file.write("\n".join(lines[2:] if text else lines) + "\n")


if __name__ == "__main__":
  main()
