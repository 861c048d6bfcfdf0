"""The train step beside PyTorch's on the same cores, and packed lists beside padded ones.

  python benchmarks/step_vs_torch.py                  DPO: ours, torch, ours, torch, ...
  python benchmarks/step_vs_torch.py --what packing   LPO: packed slots, padded lists

Both sides of `torch` run the step of Diffusion-DPO's script in fp32: a policy and a
reference UNet, 8 pairs of 4x32x32 latents with t and noise shared in a pair, clipping at
1, AdamW. VAE and text encoders are left out on both sides. The UNet has 8.6 M parameters
(widths 64, 128, 128; two layers a block; 8 heads). Each turn is a process of its own that
warms up, then times `--steps` steps; sides alternate, and the ratio is that of the
medians. `packing` runs our step twice over the same lists of 2 to 8: in slots that are
all used, and each list padded to 8 as rows of a rectangular batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

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


def ours(lists: list[int], slots: int, name: str, steps: int) -> list[float]:
  """Seconds of our steps over lists of these lengths in so many slots."""
  import jax
  import jax.numpy as jnp

  from lpo_jax import models, objectives, parallel
  from lpo_jax.diffusion import noising, schedule
  from lpo_jax.training import optimizer, state, step
  from lpo_jax.types import Batch, Conditioning, Ranking

  mesh = parallel.make_mesh()
  model = models.build(UNET, dtype=jnp.float32)
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
    moments=rng.standard_normal((slots, 32, 32, 8)).astype(np.float32),
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
  seconds = []
  for _ in range(steps + 1):
    began = time.perf_counter()
    current, metrics = compiled(current, reference, batch)
    jax.block_until_ready((current, metrics))
    seconds.append(time.perf_counter() - began)
  return seconds[1:]  # the first warms up


def theirs(steps: int) -> list[float]:
  """Seconds of the steps of Diffusion-DPO's script in PyTorch."""
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

  seconds = []
  for _ in range(steps + 1):
    began = time.perf_counter()
    one()
    seconds.append(time.perf_counter() - began)
  return seconds[1:]


def lengths(count: int) -> list[int]:
  """Lengths of lists, each as often as the paper's distribution has it."""
  share = FALL ** np.arange(LONGEST - 1)
  many = share / share.sum() * count
  whole = np.floor(many).astype(int)
  for i in np.argsort(whole - many)[: count - whole.sum()]:
    whole[i] += 1
  return [length for length, n in enumerate(whole, 2) for _ in range(n)]


def sides(what: str, steps: int) -> dict:
  """Name -> what runs a turn of that side, and how many images a step has."""
  if what == "torch":
    pairs = [2] * PAIRS
    return {
      "lpo_jax": (lambda: ours(pairs, 2 * PAIRS, "dpo", steps), 2 * PAIRS),
      "PyTorch": (lambda: theirs(steps), 2 * PAIRS),
    }
  lists = lengths(6)
  used = sum(lists)
  return {
    "packed": (lambda: ours(lists, used, "lpo", steps), used),
    "padded": (lambda: ours(lists, LONGEST * len(lists), "lpo", steps), used),
  }


def main() -> None:
  """Alternates the sides; prints a table and the ratio of the medians."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--what", choices=("torch", "packing"), default="torch")
  parser.add_argument("--turns", type=int, default=3, help="of each side")
  parser.add_argument("--steps", type=int, default=4, help="timed in a turn")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  table = sides(arguments.what, arguments.steps)
  if arguments.side:
    print(json.dumps(table[arguments.side][0]()))
    return
  times: dict[str, list[float]] = {name: [] for name in table}
  for _ in range(arguments.turns):
    for name in table:
      command = [sys.executable, *sys.argv, "--side", name]
      done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
      times[name] += json.loads(done.stdout.splitlines()[-1])
  print("| side | median s | min s | max s | images/s |\n|---|---|---|---|---|")
  for name, seconds in times.items():
    middle = statistics.median(seconds)
    print(
      f"| {name} | {middle:.2f} | {min(seconds):.2f} | {max(seconds):.2f} "
      f"| {table[name][1] / middle:.2f} |"
    )
  first, second = (statistics.median(seconds) for seconds in times.values())
  print(f"\n{' / '.join(reversed(times))}, seconds a step: {second / first:.2f}")


if __name__ == "__main__":
  main()
