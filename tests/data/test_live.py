"""Without a cache: the numbers of the cached run, encoded once and on demand."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from lpo_jax.data import cache, decoding, encoding, live, manifest, pipeline, records
from lpo_jax.data.encoding import ImageJob
from lpo_jax.data.lists import RankedLists
from lpo_jax.errors import UserError

RESOLUTION = 8
UIDS = [f"img{i}" for i in range(7)]
PROMPTS = ["", "a cat", "a dog"]
GOOD = [i for i in range(7) if i != 3]
LISTS = RankedLists(
  prompt=np.array([1, 0, 1], np.int32),
  list_id=np.array([100, 101, 102], np.uint32),
  weight=np.ones(3, np.float32),
  offsets=np.array([0, 2, 5, 7]),
  image=np.array([2, 0, 6, 5, 4, 1, 3], np.int32),  # 3 is a bad one
  rank=np.array([0, 1, 0, 1, 1, 0, 1], np.int32),
  score=np.zeros(7, np.float32),
  prompts=["a cat", "a dog"],
  image_uids=UIDS,
)


def _read(position):
  if position == 3:
    return b"junk"
  pixels = np.random.default_rng(position).integers(0, 256, (16, 40, 3), np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "PNG")
  return stream.getvalue()


def _moments(images):
  """A stand-in for a VAE: [n, 8, 8, 3] -> [n, 2, 2, 4], different for every image."""
  x = images.astype(np.float32) / 127.5 - 1
  mean = x.reshape(-1, 2, 4, 2, 4, 3).mean((2, 4))[..., :2]
  return np.concatenate([mean, np.full_like(mean, -50)], -1)


def _text(prompts):
  states = [np.full((5, 3), len(p) + np.arange(3), np.float32) for p in prompts]
  return np.stack(states), np.float32([[len(p), -1] for p in prompts])


class Vae:
  """The stand-in VAE, counting the images it is shown."""

  def __init__(self):
    self.shown = 0

  def __call__(self, images):
    self.shown += len(images)
    return _moments(images)


def _open(folder, vae=_moments, read=_read, **options):
  job = ImageJob(read, vae, RESOLUTION, batch_size=2)
  defaults = {"folder": folder, "max_bad": 0.2, "dtype": "float16"}
  return live.open_images(LISTS, UIDS, PROMPTS, job, _text, **{**defaults, **options})


def _cached(folder):
  """The same, the long way."""
  identity = {
    "format": manifest.FORMAT,
    "dtype": "float16",
    "preprocessing": {"resolution": RESOLUTION},
  }
  share = records.Share(shard_size=3)
  job = ImageJob(_read, _moments, RESOLUTION, batch_size=3)
  good = [UIDS[i] for i in GOOD]
  again = ImageJob(lambda i: _read(GOOD[i]), _moments, RESOLUTION, batch_size=3)
  manifest.begin(folder, identity)
  encoding.write_images(folder, UIDS, job, max_bad=0.2, share=share)
  encoding.write_prompts(folder, PROMPTS, _text, share=share)
  shards = {"moments": 3, "prompts": 1}
  manifest.finish(folder, identity, shards=shards, max_bad=0.2)
  encoding.write_images(folder, good, again, max_bad=0, view="mirrored", share=share)
  manifest.add_view(folder, "mirrored", shards=2, notes={})
  cache.write_lists(folder, LISTS, {})
  return cache.open_cache(folder, mirrored=True)


@pytest.mark.parametrize("flip", ["off", "list", "independent"])
def test_same_batches_as_from_a_cache(tmp_path, flip):
  options = {"images_per_update": 4, "seed": 0, "prefetch": 0, "flip": flip}
  options |= {"caption_dropout": 0.5, "time_ids": "original"}
  opened = _cached(tmp_path / "cache"), _open(tmp_path)
  one, two = (pipeline.Batches(each, **options) for each in opened)
  for _ in range(6):
    same = jax.tree.map(np.array_equal, next(one), next(two))
    assert all(jax.tree.leaves(same))
  # A run may go on from either: the place in the data is the same.
  assert one.get_state() == two.get_state()


def test_nothing_is_encoded_twice_or_before_its_time(tmp_path):
  vae = Vae()
  opened = _open(tmp_path, vae)
  begun = vae.shown
  assert begun == 2  # one call, for the shape
  opened.moments([4, 0, 4])
  assert vae.shown == begun + 2
  opened.moments([0, 4])
  assert vae.shown == begun + 2
  opened.moments([0, 4 + 6])  # the mirrored image 4 is another
  assert vae.shown == begun + 4
  opened.close()


def test_bad_images_leave_the_lists(tmp_path):
  opened = _open(tmp_path)
  assert [
    len(row) for row in np.split(opened.lists.image, opened.lists.offsets[1:-1])
  ] == [
    2,
    3,
  ]
  assert "img3" in (tmp_path / "bad_images.jsonl").read_text()
  with pytest.raises(UserError, match=r"1 of 7 images.*max_bad_images=0\.1"):
    _open(tmp_path, max_bad=0.1)
  with pytest.raises(UserError, match="no image of 7 could be used"):
    _open(tmp_path, read=lambda i: b"", max_bad=1.0)


def test_image_that_cannot_be_encoded_is_refused_when_it_comes(tmp_path):
  def vae(images):
    moments = _moments(images).copy()
    moments[images[:, 0, 0, 0] == bright] = np.inf
    return moments

  bright = decoding.prepare(_read(5), 8).pixels[0, 0, 0]
  opened = _open(tmp_path, vae)
  opened.moments([0])
  with pytest.raises(UserError, match=r"img5: the VAE gives.*run --job cache"):
    opened.moments([4])


def test_too_much_to_hold(tmp_path, monkeypatch):
  monkeypatch.setattr(live, "MOST_BYTES", 1000)
  with pytest.raises(UserError, match="keeps the images in memory"):
    _open(tmp_path)
