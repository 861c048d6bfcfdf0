"""The train step beside PyTorch's, packed lists beside padded ones, and how cost grows.

  python benchmarks/step_vs_torch.py                  DPO: ours, torch, ours, torch, ...
  python benchmarks/step_vs_torch.py --what packing   LPO: packed slots, padded lists
  python benchmarks/step_vs_torch.py --what growth    LPO: twice of one thing each

Both sides of `torch` run the step of Diffusion-DPO's script in fp32: a policy and a
reference UNet, 8 pairs of 4x32x32 latents with t and noise shared in a pair, clipping at
1, AdamW. VAE and text encoders are left out on both sides. The UNet has 8.6 M parameters
(widths 64, 128, 128; two layers a block; 8 heads). Each turn is a process of its own that
warms up, then times `--steps` steps; sides alternate, and the ratio is that of the
medians. `packing` runs our step twice over the same lists of 2 to 8: in slots that are
all used, and each list padded to 8 as rows of a rectangular batch. `growth` runs our step
of 16 images, then with twice the images, lists twice as long, twice the resolution, and
over 8 pretended devices of the same cores.

Seconds are by the clock, and of the processor for a machine with other work.
"""

import argparse
import dataclasses
import json
import os
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
PAIRS, TOKENS, BETA, LEARNING_RATE = 8, 77, 5000.0, 1e-5
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Diffusion-LPO, section 5: 56 % of the pairs of Pick-a-Pic are in lists longer than two,
# and few lists are longer than 8. A chain of m images has m - 1 pairs; lengths that fall
# geometrically by 0.337 put 44 % of the pairs into lists of two.
FALL, LONGEST = 0.337, 8


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
  lists: list[int], slots: int, name: str, steps: int, side: int = 32
) -> Seconds:
  """Our steps over lists of these lengths in so many slots of `side` x `side` latents."""
  import jax
  import jax.numpy as jnp

  from lpo_jax import models, objectives, parallel
  from lpo_jax.diffusion import noising, schedule
  from lpo_jax.training import optimizer, state, step
  from lpo_jax.types import Batch, Conditioning, Ranking

  mesh = parallel.make_mesh()
  model = models.build({**UNET, "sample_size": side}, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  shapes = model.abstract_params

  def fill(leaf):
    return (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32)

  shardings = parallel.param_shardings(shapes, mesh)
  params = parallel.put(jax.tree.map(fill, shapes), shardings)
  reference = parallel.put(jax.tree.map(np.asarray, params), shardings)
  adamw = optimizer.build("adamw", shapes, learning_rate=LEARNING_RATE)
  method = step.Method(
    unet=model.apply,
    schedule=schedule.from_config(SCHEDULE),
    noising=noising.get("forward"),
    objective=objectives.get(name, beta=BETA),
    seed=0,
    scaling_factor=0.18215,
    unroll=True,
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
      rng.standard_normal((slots, TOKENS, 64)).astype(np.float32)
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


def theirs(steps: int) -> Seconds:
  """The steps of Diffusion-DPO's script in PyTorch."""
  import torch
  from diffusers import DDPMScheduler, UNet2DConditionModel

  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count() or 1)
  policy, reference = (UNet2DConditionModel.from_config(UNET) for _ in range(2))
  reference.load_state_dict(policy.state_dict())
  reference.requires_grad_(False)
  noise_schedule = DDPMScheduler(num_train_timesteps=1000, **SCHEDULE)
  adamw = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
  latents = torch.randn(2 * PAIRS, 4, 32, 32)
  states = torch.randn(PAIRS, TOKENS, 64).repeat(2, 1, 1)

  def one() -> None:
    timesteps = torch.randint(0, 1000, (PAIRS,)).repeat(2)
    noise = torch.randn(PAIRS, 4, 32, 32).repeat(2, 1, 1, 1)
    noisy = noise_schedule.add_noise(latents, noise, timesteps)
    pred = policy(noisy, timesteps, states).sample
    err = (pred - noise).pow(2).mean(dim=[1, 2, 3])
    with torch.no_grad():
      ref_pred = reference(noisy, timesteps, states).sample
      ref_err = (ref_pred - noise).pow(2).mean(dim=[1, 2, 3])
    (winner, loser), (ref_winner, ref_loser) = err.chunk(2), ref_err.chunk(2)
    inside = -0.5 * BETA * ((winner - loser) - (ref_winner - ref_loser))
    loss = -torch.nn.functional.logsigmoid(inside).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad()

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
  """

  run: Callable[[], Seconds]
  images: int
  devices: int = 1


def sides(what: str, steps: int) -> dict[str, Side]:
  """Rows by name."""
  pairs = [2] * PAIRS
  images = 2 * PAIRS
  if what == "torch":
    return {
      "lpo_jax": Side(lambda: ours(pairs, images, "dpo", steps), images),
      "PyTorch": Side(lambda: theirs(steps), images),
    }
  if what == "growth":
    fours = [4] * (PAIRS // 2)
    return {
      "16 images, lists of 2": Side(lambda: ours(pairs, images, "lpo", steps), images),
      "32 images": Side(lambda: ours(pairs * 2, 2 * images, "lpo", steps), 2 * images),
      "lists of 4": Side(lambda: ours(fours, images, "lpo", steps), images),
      "64 x 64 latents": Side(lambda: ours(pairs, images, "lpo", steps, 64), images),
      "8 devices": Side(lambda: ours(pairs, images, "lpo", steps), images, devices=8),
    }
  lists = lengths(6)
  used = sum(lists)
  return {
    "packed": Side(lambda: ours(lists, used, "lpo", steps), used),
    "padded": Side(lambda: ours(lists, LONGEST * len(lists), "lpo", steps), used),
  }


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


def main() -> None:
  """Alternates the sides; prints a table, each row beside the first."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--what", choices=("torch", "packing", "growth"), default="torch")
  parser.add_argument("--turns", type=int, default=3, help="of each side")
  parser.add_argument("--steps", type=int, default=4, help="timed in a turn")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  table = sides(arguments.what, arguments.steps)
  if arguments.side:
    print(json.dumps(table[arguments.side].run()))
    return
  times: dict[str, Seconds] = {name: [] for name in table}
  for _ in range(arguments.turns):
    for name, side in table.items():
      times[name] += turn(name, side)
  print(
    "| side | s a step, median | least | most | images/s | s / first's "
    "| processor s | processor s / first's |\n|---|--:|--:|--:|--:|--:|--:|--:|"
  )
  first = None
  for name, pairs in times.items():
    clock, processor = ([pair[i] for pair in pairs] for i in (0, 1))
    middle = statistics.median(clock), statistics.median(processor)
    first = first or middle
    print(
      f"| {name} | {middle[0]:.2f} | {min(clock):.2f} | {max(clock):.2f} "
      f"| {table[name].images / middle[0]:.2f} | {middle[0] / first[0]:.2f} "
      f"| {middle[1]:.1f} | {middle[1] / first[1]:.2f} |"
    )


if __name__ == "__main__":
  main()
