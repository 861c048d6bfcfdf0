"""Times the building of lists from a made-up Pick-a-Pic v2; the table of docs/data.md.

  python benchmarks/list_building.py --judgements 1000000

Made up: people come back to their prompts, the winner mostly stays on screen against a
new picture (stars and chains), sometimes an old picture returns (circles), sometimes it
is a tie, and several people judge the same pictures (contradictions). Each strategy runs
in a process of its own, on two cores; the memory is that process's peak, with the
judgements in it.
"""

import argparse
import multiprocessing
import os
import resource
import time

import numpy as np

from lpo_jax.data import lists
from lpo_jax.data.judgements import Judgements

CORES, SECONDS, GIGABYTES = 2, 60, 4  # what a strategy may take
PROMPTS_PER_JUDGEMENT = 0.059  # 59k prompts and 5k people for a million judgements
PEOPLE_PER_JUDGEMENT = 0.005


def make(count: int, seed: int = 0) -> Judgements:
  """Makes judgements like Pick-a-Pic's: prompts and people are skewed, 15 % ties."""
  rng = np.random.default_rng(seed)
  prompts = max(int(count * PROMPTS_PER_JUDGEMENT), 1)
  people = max(int(count * PEOPLE_PER_JUDGEMENT), 1)
  per_prompt = rng.multinomial(count, _skewed(rng, prompts))
  owner = rng.choice(people, prompts, p=_skewed(rng, people))
  visitor = rng.choice(people, count, p=_skewed(rng, people))
  # One draw of each kind per judgement; the loop only walks.
  draw = rng.random((4, count))
  a, b = np.empty(count, np.int32), np.empty(count, np.int32)
  label = np.empty(count, np.float32)
  quality = rng.standard_normal(2 * count + 2).tolist()
  images = row = 0
  for size in per_prompt.tolist():
    begin, images = images, images + 2
    left, right = begin, begin + 1
    for _ in range(size):
      returns, taste, tie, side = draw[:, row].tolist()
      a[row], b[row] = left, right
      better = quality[left] + 2 * (taste - 0.5) > quality[right]
      label[row] = 0.5 if tie < 0.15 else float(better)
      stays = left if better else right
      other = images
      if returns < 0.2:
        other = begin + int(side * (images - begin))
        other += (other == stays) * (1 if other + 1 < images else -1)
      images = max(images, other + 1)
      left, right = (stays, other) if side < 0.5 else (other, stays)
      row += 1
  prompt = np.repeat(np.arange(prompts, dtype=np.int32), per_prompt)
  return Judgements(
    prompts=[f"a picture of thing number {i}, highly detailed" for i in range(prompts)],
    image_uids=[
      f"{i:08x}-4f2e-4d57-8fd5-{i * 7919 % 2**32:012x}" for i in range(images)
    ],
    users=[str(i) for i in range(people)],
    prompt=prompt,
    user=np.where(rng.random(count) < 0.8, owner[prompt], visitor).astype(np.int32),
    image_a=a,
    image_b=b,
    label=label,
    weight=(1 / np.maximum(per_prompt, 1))[prompt].astype(np.float32),
  )


def _skewed(rng: np.random.Generator, count: int) -> np.ndarray:
  weights = rng.lognormal(0, 1.2, count)
  return weights / weights.sum()


def measure(source: Judgements, strategy: str, group_by: str) -> dict:
  """Builds the lists in a fresh process; returns what it cost and what came out."""
  context = multiprocessing.get_context("fork")  # the judgements need no copy
  here, there = context.Pipe(duplex=False)
  process = context.Process(target=_build, args=(there, source, strategy, group_by))
  process.start()
  there.close()
  cost = here.recv()
  process.join()
  return cost


def _build(answer, source: Judgements, strategy: str, group_by: str) -> None:
  begin, busy = time.perf_counter(), time.process_time()
  _, report = lists.build(source, strategy, group_by=group_by)
  seconds, busy = time.perf_counter() - begin, time.process_time() - busy
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  mean = sum(n * m for n, m in report.lengths.items()) / report.lists
  cost = {
    "seconds": seconds,
    "busy": busy,
    "gigabytes": peak,
    "lists": report.lists,
    "mean": mean,
    "used": report.judgements_used / report.judgements_total,
    "over_two": report.share_over_two,
  }
  answer.send(cost)


def main() -> None:
  """Prints one Markdown table; exits with 1 if a strategy takes more than it may."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--judgements", type=int, default=1_000_000)
  parser.add_argument("--group_by", choices=lists.GROUPS, nargs="+", default=["prompt"])
  flags = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  source = make(flags.judgements)
  print(
    f"{len(source):,} judgements of {len(source.image_uids):,} images, "
    f"{len(source.prompts):,} prompts, {len(source.users):,} people; "
    f"{np.mean(source.label == 0.5):.0%} ties; {CORES} cores\n"
  )
  print(
    "| strategy | group_by | seconds | CPU | peak GB | lists | images | used | over 2 |"
  )
  print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
  late = []
  for group_by in flags.group_by:
    for strategy in lists.STRATEGIES:
      cost = measure(source, strategy, group_by)
      print(
        f"| {strategy} | {group_by} | {cost['seconds']:.1f} | {cost['busy']:.1f} | "
        f"{cost['gigabytes']:.2f} | "
        f"{cost['lists']:,} | {cost['mean']:.2f} | {cost['used']:.1%} | "
        f"{cost['over_two']:.1%} |",
        flush=True,
      )
      if cost["seconds"] > SECONDS or cost["gigabytes"] > GIGABYTES:
        late.append(f"{strategy} by {group_by}")
  if late:
    raise SystemExit(f"more than {SECONDS} s or {GIGABYTES} GB for {', '.join(late)}")


if __name__ == "__main__":
  main()
