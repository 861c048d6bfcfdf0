"""How fast batches come from a cache, and how long a training step waits for them.

  python benchmarks/data_pipeline.py [--images 4000] [--updates 40] [--rate 200]
  python benchmarks/data_pipeline.py --metrics runs/X/metrics.jsonl

The first writes a cache of random records in SD1.5's sizes (moments 64 x 64 x 8, text
77 x 768) to a temporary folder, which the page cache then holds, with lists as long as
Diffusion-LPO says Pick-a-Pic's are, and takes batches of 256 from it. A step is stood in
for by a pause as long as 256 images take at `--rate` images/s; what is measured is how
long `next` takes after it, as training/report.py does. The second reads what a real run
measured.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np

from lpo_jax.data import cache, draws, encoding, manifest, packing, pipeline, records
from lpo_jax.data.ranked import RankedLists

SLOTS = 256
MOMENTS, TEXT = (64, 64, 8), (77, 768)


def list_lengths(images, rng):
  """84 % pairs and a tail that falls by 0.824 an image, cut at 8; see test_pipeline."""
  longer = 3 + rng.geometric(1 - 0.824, images) - 1
  lengths = np.minimum(np.where(rng.random(images) < 0.84, 2, longer), 8)
  return lengths[: int(np.searchsorted(np.cumsum(lengths), images))]


def write_cache(folder, images, dtype, seed=0):
  """Writes random records, every image in one list, four lists to a prompt."""
  rng = np.random.default_rng(seed)
  storage = encoding.storage_dtype(dtype)
  lengths = list_lengths(images, rng)
  count, prompts = int(lengths.sum()), ["", *map(str, range(-(-len(lengths) // 4)))]
  facts = {"moments": MOMENTS, "original_size": [512, 512], "crop": [0, 0]}
  shapes = {"prompt_embeds": TEXT, "pooled": None}
  noise = rng.standard_normal(1 << 20).astype(storage).tobytes()

  def produce(keys, shape, about):
    size = int(np.prod(shape)) * storage.itemsize
    starts = rng.integers(0, len(noise) - size, len(keys)) // 2 * 2

    def make(positions):
      for p in positions:
        yield records.Record(keys[p], noise[starts[p] : starts[p] + size], about)

    return make

  share = records.Share()
  uids = [f"i{i}" for i in range(count)]
  for name, keys, shape, about in (
    ("moments", uids, MOMENTS, facts),
    ("prompts", prompts, TEXT, shapes),
  ):
    list(records.write_shards(folder, name, keys, produce(keys, shape, about), share))
  shards = {
    name: records.shard_count(n, share.shard_size)
    for name, n in (("moments", count), ("prompts", len(prompts)))
  }
  identity = {
    "format": manifest.FORMAT,
    "dtype": dtype,
    "preprocessing": {"resolution": 512},
  }
  manifest.finish(folder, identity, shards=shards, max_bad=0)
  lists = RankedLists(
    prompt=(np.arange(len(lengths)) // 4 + 1).astype(np.int32),
    list_id=rng.integers(0, 2**32, len(lengths), np.uint32),
    weight=np.ones(len(lengths), np.float32),
    offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    image=rng.permutation(count).astype(np.int32),
    rank=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
    score=np.zeros(count, np.float32),
    prompts=prompts,
    image_uids=uids,
  )
  cache.write_lists(folder, lists, {})


def measure(opened, updates, *, prefetch, pause=0.0):
  """Takes batches; returns items/s, items per second of CPU, and the share of waiting."""
  batches = pipeline.Batches(
    opened, images_per_update=SLOTS, seed=0, caption_dropout=0.2, prefetch=prefetch
  )
  for _ in range(3):
    next(batches)
  waited, began, cpu = 0.0, time.perf_counter(), time.process_time()
  for _ in range(updates):
    time.sleep(pause)
    asked = time.perf_counter()
    next(batches)
    waited += time.perf_counter() - asked
  wall, cpu = time.perf_counter() - began, time.process_time() - cpu
  utilisation = batches.utilisation
  batches.close()
  items = SLOTS * updates
  return items / wall, items / cpu, waited / wall, utilisation


def plan_rate(opened, updates):
  """Items/s of shuffling and packing alone."""
  lengths = opened.lists.lengths
  order = draws.Draws(opened.parts, 0)
  packer, progress = packing.Packer(lengths, SLOTS), packing.Progress()
  began = time.process_time()
  for _ in range(updates):
    _, progress = packer.plan(progress, lambda at: int(lengths[order.at(at).index]))
  return SLOTS * updates / (time.process_time() - began)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=4000)
  parser.add_argument("--updates", type=int, default=40)
  parser.add_argument("--rate", type=float, default=200.0, help="images/s of a step")
  parser.add_argument(
    "--metrics", type=pathlib.Path, help="of a run: report its waiting"
  )
  flags = parser.parse_args()
  if flags.metrics:
    rows = [json.loads(line) for line in flags.metrics.read_text().splitlines()]
    shares = [row["data_wait_share"] for row in rows if "data_wait_share" in row]
    print(
      f"{len(shares)} steps waited {statistics.mean(shares):.2%} of the time for data"
    )
    return
  for dtype in encoding.DTYPES:
    with tempfile.TemporaryDirectory() as folder:
      write_cache(folder, flags.images, dtype)
      opened = cache.open_cache(folder)
      wall, cpu, _, utilisation = measure(opened, flags.updates, prefetch=0)
      pause = SLOTS / flags.rate
      steps = max(flags.updates // 4, 2)
      *_, waiting, _ = measure(opened, steps, prefetch=2, pause=pause)
      print(
        f"{dtype}: {cpu:.0f} items/s per core ({wall:.0f}/s in one thread), packing alone "
        f"{plan_rate(opened, flags.updates):.0f}/s, slots filled {utilisation:.2%}; a step "
        f"of {pause:.2f} s waits {waiting:.2%} of the time"
      )
      opened.close()


if __name__ == "__main__":
  main()
