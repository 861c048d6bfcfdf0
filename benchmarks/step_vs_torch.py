"""The train step beside PyTorch's, packed lists beside padded ones, and how cost grows.

  python benchmarks/step_vs_torch.py                  DPO: ours, torch, ours, torch, ...
  python benchmarks/step_vs_torch.py --what gpu       the same of SD 1.5, on one GPU
  python benchmarks/step_vs_torch.py --what packing   LPO: packed slots, padded lists
  python benchmarks/step_vs_torch.py --what growth --turns 1 --steps 2 --plot growth.png
                                                      LPO: more and more of one thing

Both sides of `torch` run the step of Diffusion-DPO's script in fp32: a policy and a
reference UNet, 8 pairs of 4x32x32 latents with t and noise shared in a pair, clipping at
1, AdamW. VAE and text encoders are left out on both sides. The UNet has 8.6 M parameters
(widths 64, 128, 128; two layers a block; 8 heads). Each turn is a process of its own that
warms up, then times `--steps` steps; sides alternate, and the ratio is that of the
medians. `gpu` wants jax and torch that both see the GPU (`pip install 'lpo_jax[cuda]'` and
a CUDA build of torch), and runs SD 1.5's UNet at 512 pixels with random weights: bfloat16
activations (torch: autocast and `torch.compile`, its own choice of attention), fp32
weights and AdamW. `packing` runs our step twice over the same lists of 2 to 8: in slots that are
all used, and each list padded to 8 as rows of a rectangular batch. `growth` runs our step
of 8 images in lists of 2, then with twice and four times the images, lists twice and four
times as long, four times the pixels, and over 2 and 8 pretended devices of the same cores.

Seconds are by the clock, and of the processor for a machine with other work.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

UNET = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": 32,
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": (64, 128, 128),
  "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
  "layers_per_block": 2,
  "cross_attention_dim": 64,
  "attention_head_dim": 8,
}
TOKENS, BETA, LEARNING_RATE = 77, 5000.0, 1e-5
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Diffusion-LPO, section 5: 56 % of the pairs of Pick-a-Pic are in lists longer than two,
# and few lists are longer than 8. A chain of m images has m - 1 pairs; lengths that fall
# geometrically by 0.337 put 44 % of the pairs into lists of two.
FALL, LONGEST = 0.337, 8


@dataclasses.dataclass(frozen=True)
class Work:
  """What both sides compute.

  Attributes:
    unet: its config.json.
    side: of the latents.
    dtype: of the activations.
    device: torch's name of where.
    flop: of an image, of a step that computes nothing twice; 0: not looked up.
  """

  unet: dict = dataclasses.field(default_factory=lambda: UNET)
  side: int = 32
  dtype: str = "float32"
  device: str = "cpu"
  flop: float = 0.0


def sd15() -> Work:
  """Stable Diffusion 1.5 at 512 pixels, on a GPU."""
  # A forward pass is 0.8033 TFLOP (torch's FlopCounterMode): policy, its gradient of
  # twice as much, reference.
  folder = pathlib.Path(__file__).resolve().parents[1] / "lpo_jax/assets/architectures"
  unet = json.loads((folder / "sd15_unet.json").read_text("utf-8"))
  return Work(unet, 64, "bfloat16", "cuda", 4 * 0.8033e12)


Seconds = list[tuple[float, float]]  # of each step: by the clock, of the processor


def timed(one: Callable[[], None], steps: int) -> Seconds:
  """Times steps after one that warms up."""
  seconds = []
  for _ in range(steps + 1):
    began, processor_began = time.perf_counter(), time.process_time()
    one()
    now = time.perf_counter(), time.process_time()
    seconds.append((now[0] - began, now[1] - processor_began))
  return seconds[1:]


def ours(
  lists: list[int], slots: int, name: str, steps: int, work: Work | None = None
) -> Seconds:
  """Our steps over lists of these lengths in so many slots."""
  import jax
  import jax.numpy as jnp

  from lpo_jax import models, objectives, parallel
  from lpo_jax.diffusion import noising, schedule
  from lpo_jax.training import optimizer, places, state, step
  from lpo_jax.types import Batch, Conditioning, Ranking

  work = work or Work()
  side, width = work.side, work.unet["cross_attention_dim"]
  mesh = parallel.make_mesh()
  platform = mesh.devices.flat[0].platform
  if work.device != "cpu" and platform == "cpu":
    raise SystemExit("jax sees no GPU: pip install 'lpo_jax[cuda]'")
  model = models.build(work.unet, dtype=jnp.dtype(work.dtype))
  rng = np.random.default_rng(0)
  shapes = model.abstract_params

  def fill(leaf):
    return (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32)

  shardings = parallel.param_shardings(shapes, mesh)
  params = parallel.put(jax.tree.map(fill, shapes), shardings)
  # Of its own: what is narrow already would be the very arrays that the step donates.
  reference = model.narrow(jax.tree.map(jnp.copy, params))
  adamw = optimizer.build("adamw", shapes, learning_rate=LEARNING_RATE)
  method = step.Method(
    unet=model.apply,
    weights=places.in_use(step.whole, model, shardings),
    schedule=schedule.from_config(SCHEDULE),
    noising=noising.get("forward"),
    objective=objectives.get(name, beta=BETA),
    seed=0,
    scaling_factor=0.18215,
    unroll=platform == "cpu",
  )
  longest = max(lists)
  slot = np.zeros((len(lists), longest), np.int32)
  valid = np.zeros((len(lists), longest), bool)
  identity = np.zeros((slots, 2), np.uint32)
  item = np.zeros(slots, np.uint32)
  start, room = 0, slots // len(lists) if slots > sum(lists) else 0
  for row, length in enumerate(lists):
    slot[row, :length] = start + np.arange(length)
    valid[row, :length] = True
    identity[start : start + length] = row, 0
    item[start : start + length] = np.arange(length)
    start += room or length
  batch = Batch(
    moments=rng.standard_normal((slots, side, side, 8)).astype(np.float32),
    conditioning=Conditioning(
      rng.standard_normal((slots, TOKENS, width)).astype(np.float32)
    ),
    identity=identity,
    item=item,
    slot=slot,
    ranking=Ranking(
      rank=np.where(valid, np.arange(longest), 0).astype(np.int32),
      valid=valid,
      score=np.zeros(valid.shape, np.float32),
      weight=np.ones(len(lists), np.float32),
    ),
  )
  batch = parallel.global_batch(mesh, batch)
  like = state.placement(mesh, params, adamw, with_ema=False, shardings=shardings)
  current = state.place(like, params, adamw)
  compiled = step.compile_train_step(
    mesh, current, reference, batch, method=method, optimizer=adamw
  )

  def one() -> None:
    nonlocal current
    current, metrics = compiled(current, reference, batch)
    jax.block_until_ready((current, metrics))

  return timed(one, steps)


def theirs(pairs: int, steps: int, work: Work) -> Seconds:
  """The steps of Diffusion-DPO's script in PyTorch."""
  import torch
  from diffusers import DDPMScheduler, UNet2DConditionModel

  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count() or 1)
  on_gpu, narrow = work.device != "cpu", work.dtype != "float32"
  if on_gpu and not torch.cuda.is_available():
    raise SystemExit("torch sees no GPU: install a CUDA build of it")
  policy, reference = (
    UNet2DConditionModel.from_config(work.unet).to(work.device) for _ in range(2)
  )
  reference.load_state_dict(policy.state_dict())
  reference.requires_grad_(False).to(getattr(torch, work.dtype))
  noise_schedule = DDPMScheduler(num_train_timesteps=1000, **SCHEDULE)
  adamw = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
  side, width = work.side, work.unet["cross_attention_dim"]
  latents = torch.randn(2 * pairs, 4, side, side, device=work.device)
  states = torch.randn(pairs, TOKENS, width, device=work.device).repeat(2, 1, 1)
  predict, predict_ref = policy, reference
  if on_gpu:
    predict, predict_ref = torch.compile(policy), torch.compile(reference)

  def one() -> None:
    timesteps = torch.randint(0, 1000, (pairs,), device=work.device).repeat(2)
    noise = torch.randn(pairs, 4, side, side, device=work.device).repeat(2, 1, 1, 1)
    noisy = noise_schedule.add_noise(latents, noise, timesteps)
    with torch.autocast(work.device, torch.bfloat16, enabled=narrow):
      pred = predict(noisy, timesteps, states).sample
      with torch.no_grad():
        ref_pred = predict_ref(noisy, timesteps, states).sample
    err = (pred.float() - noise).pow(2).mean(dim=[1, 2, 3])
    ref_err = (ref_pred.float() - noise).pow(2).mean(dim=[1, 2, 3])
    (winner, loser), (ref_winner, ref_loser) = err.chunk(2), ref_err.chunk(2)
    inside = -0.5 * BETA * ((winner - loser) - (ref_winner - ref_loser))
    loss = -torch.nn.functional.logsigmoid(inside).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad()
    if on_gpu:
      torch.cuda.synchronize()

  return timed(one, steps)


def lengths(count: int) -> list[int]:
  """Lengths of lists, each as often as the paper's distribution has it."""
  share = FALL ** np.arange(LONGEST - 1)
  many = share / share.sum() * count
  whole = np.floor(many).astype(int)
  for i in np.argsort(whole - many)[: count - whole.sum()]:
    whole[i] += 1
  return [length for length, n in enumerate(whole, 2) for _ in range(n)]


@dataclasses.dataclass(frozen=True)
class Side:
  """One row of a table.

  Attributes:
    run: a turn: runs steps, returns their seconds.
    images: of a step.
    devices: pretended ones, of the same cores.
    grown: how many times there is of what, for the plot.
  """

  run: Callable[[], Seconds]
  images: int
  devices: int = 1
  grown: tuple[str, int] = ("", 1)


def sides(what: str, steps: int, count: int) -> dict[str, Side]:
  """Rows by name; `count` pairs in those of `torch` and `gpu`."""
  if what in ("torch", "gpu"):
    pairs = [2] * count
    work = sd15() if what == "gpu" else Work()
    mine = functools.partial(ours, pairs, 2 * count, "dpo", steps, work)
    their = functools.partial(theirs, count, steps, work)
    return {"lpo_jax": Side(mine, 2 * count), "PyTorch": Side(their, 2 * count)}
  if what == "growth":
    return growth(steps)
  lists = lengths(6)
  used = sum(lists)
  return {
    "packed": Side(lambda: ours(lists, used, "lpo", steps), used),
    "padded": Side(lambda: ours(lists, LONGEST * len(lists), "lpo", steps), used),
  }


def growth(steps: int) -> dict[str, Side]:
  """Rows by name: the smallest step first."""

  def side(
    images: int = 8,
    longest: int = 2,
    latents: int = 32,
    devices: int = 1,
    grown: tuple[str, int] = ("", 1),
  ) -> Side:
    lists = [longest] * (images // longest)
    work = Work({**UNET, "sample_size": latents}, latents)
    run = functools.partial(ours, lists, images, "lpo", steps, work)
    return Side(run, images, devices, grown)

  return {
    "8 images, lists of 2, 32 x 32": side(),
    "16 images": side(images=16, grown=("images", 2)),
    "32 images": side(images=32, grown=("images", 4)),
    "lists of 4": side(longest=4, grown=("images of a list", 2)),
    "lists of 8": side(longest=8, grown=("images of a list", 4)),
    "64 x 64 latents": side(latents=64, grown=("pixels", 4)),
    "2 devices": side(devices=2, grown=("devices on the same cores", 2)),
    "8 devices": side(devices=8, grown=("devices on the same cores", 8)),
  }


def plot(table: dict[str, Side], ratios: dict[str, float], path: str) -> None:
  """Draws how many times the processor seconds come with how many times of a thing."""
  from matplotlib.figure import Figure

  points: dict[str, list[tuple[float, float]]] = {}
  for name, side in table.items():
    kind, times = side.grown
    if kind:
      points.setdefault(kind, [(1, 1)]).append((times, ratios[name]))
  figure = Figure(figsize=(5.5, 4.5), layout="constrained")
  axes = figure.subplots()
  most = max(x for line in points.values() for x, _ in line)
  axes.plot([1, most], [1, most], "--", color="grey", label="in proportion")
  for kind, line in points.items():
    axes.plot(*zip(*line, strict=True), "o-", label=kind)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log", base=2)
  axes.xaxis.set_major_formatter("{x:g}x")
  axes.yaxis.set_major_formatter("{x:g}x")
  axes.set_xlabel("times as much of it")
  axes.set_ylabel("processor seconds of a step, times")
  axes.set_title("What a step of LPO costs, on a CPU")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)


def turn(name: str, side: Side) -> Seconds:
  """Runs a side in a process of its own."""
  flags = os.environ.get("XLA_FLAGS", "")
  if side.devices > 1:
    flags += f" --xla_force_host_platform_device_count={side.devices}"
  done = subprocess.run(
    [sys.executable, *sys.argv, "--side", name],
    stdout=subprocess.PIPE,
    check=True,
    text=True,
    env={**os.environ, "XLA_FLAGS": flags},
  )
  return [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]


def peak_of_gpu() -> float | None:
  """bf16 FLOP/s of this machine's first GPU, if it is one of those looked up."""
  from lpo_jax.jobs import plan_chips

  asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  if shutil.which(asked[0]) is None:
    raise SystemExit("--what gpu: no nvidia-smi on this machine, so no GPU of NVIDIA's")
  names = subprocess.run(asked, capture_output=True, check=True, text=True).stdout
  return plan_chips.peak_of(names.splitlines()[0].strip())


def main() -> None:
  """Alternates the sides; prints a table, each row beside the first."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--what", choices=("torch", "gpu", "packing", "growth"), default="torch"
  )
  parser.add_argument("--turns", type=int, default=3, help="of each side")
  parser.add_argument("--steps", type=int, default=4, help="timed in a turn")
  parser.add_argument("--pairs", type=int, default=8, help="of --what torch and gpu")
  parser.add_argument("--plot", help="of --what growth: a PNG to write")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.plot and arguments.what != "growth":
    parser.error("--plot is of --what growth")
  table = sides(arguments.what, arguments.steps, arguments.pairs)
  if arguments.side:
    print(json.dumps(table[arguments.side].run()))
    return
  peak = peak_of_gpu() if arguments.what == "gpu" else None
  times: dict[str, Seconds] = {name: [] for name in table}
  for _ in range(arguments.turns):
    for name, side in table.items():
      times[name] += turn(name, side)
  head = ["side", "s a step, median", "least", "most", "images/s", "s / first's"]
  head += ["processor s", "processor s / first's", *(["MFU"] if peak else [])]
  print("| " + " | ".join(head) + " |\n|---|" + "--:|" * (len(head) - 1))
  first, ratios = None, {}
  for name, pairs in times.items():
    clock, processor = ([pair[i] for pair in pairs] for i in (0, 1))
    middle = statistics.median(clock), statistics.median(processor)
    first = first or middle
    ratios[name] = middle[1] / first[1]
    speed = table[name].images / middle[0]
    row = [name, *(f"{x:.2f}" for x in (middle[0], min(clock), max(clock), speed))]
    row += [f"{middle[0] / first[0]:.2f}", f"{middle[1]:.1f}", f"{ratios[name]:.2f}"]
    if peak:
      row.append(f"{100 * speed * sd15().flop / peak:.1f}%")
    print("| " + " | ".join(row) + " |")
  if arguments.plot:
    plot(table, ratios, arguments.plot)


if __name__ == "__main__":
  main()
