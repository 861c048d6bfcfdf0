"""The cache: what is written is what is read, and nothing unfit is ever read."""

import dataclasses
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from lpo_jax.data import (
  cache,
  decoding,
  encoding,
  fingerprints,
  manifest,
  records,
)
from lpo_jax.data.lists import RankedLists
from lpo_jax.errors import UserError

RESOLUTION = 8
IDENTITY = {
  "format": manifest.FORMAT,
  "dtype": "float16",
  "fingerprints": {"vae": "aaaa", "text_encoder": "bbbb"},
  "preprocessing": {"resolution": RESOLUTION},
  "source": {"path": "somewhere", "files": "cccc"},
}
UIDS = [f"img{i}" for i in range(7)]
PROMPTS = ["", "a cat", "a dog"]
SHARE = records.Share(shard_size=3)


def _picture(seed, height=RESOLUTION, width=RESOLUTION):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "PNG")
  return stream.getvalue(), pixels


def _moments(images):
  """A stand-in for a VAE: [n, 8, 8, 3] -> [n, 2, 2, 4], different for every image."""
  x = images.astype(np.float32) / 127.5 - 1
  mean = x.reshape(-1, 2, 4, 2, 4, 3).mean((2, 4))[..., :2]
  logvar = np.broadcast_to(np.float32([-50, 30]), mean.shape)
  return np.concatenate([mean, logvar], -1)


def _text(prompts):
  states = [np.full((5, 3), len(p) + np.arange(3), np.float32) for p in prompts]
  return np.stack(states), None


def _text_and_pooled(prompts):
  return _text(prompts)[0], np.float32([[len(p), -1] for p in prompts])


def _job(read=lambda i: _picture(i)[0], encode=_moments):
  return encoding.ImageJob(read, encode, RESOLUTION, batch_size=2)


def _build(folder, *, job=None, text=_text, identity=IDENTITY, max_bad=0.5, **options):
  job = job or _job()
  manifest.begin(folder, identity)
  encoding.write_images(folder, UIDS, job, max_bad=max_bad, share=SHARE, **options)
  encoding.write_prompts(folder, PROMPTS, text, batch_size=2, share=SHARE, **options)
  shards = {"moments": 3, "prompts": 1}
  return manifest.finish(folder, identity, shards=shards, max_bad=max_bad)


def _lists(rows, uids=UIDS, prompts=("a dog", "a cat")):
  """rows: (prompt index, [image indices], [ranks])."""
  sizes = [len(images) for _, images, _ in rows]
  return RankedLists(
    prompt=np.array([p for p, _, _ in rows], np.int32),
    list_id=np.array([100 + i for i in range(len(rows))], np.uint32),
    weight=np.array([1 + i for i in range(len(rows))], np.float32),
    offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    image=np.array([i for _, images, _ in rows for i in images], np.int32),
    rank=np.array([r for _, _, ranks in rows for r in ranks], np.int32),
    score=np.array([0.5 * r for _, _, ranks in rows for r in ranks], np.float32),
    prompts=list(prompts),
    image_uids=list(uids),
    user=np.arange(len(rows), dtype=np.int32),
  )


ROWS = [(0, [2, 0], [0, 1]), (1, [6, 5, 4], [0, 1, 1])]
SETTINGS = {"strategy": "paths", "max_list_size": 8}


def test_round_trip(tmp_path):
  built = _build(tmp_path)
  cache.write_lists(tmp_path, _lists(ROWS), SETTINGS, {"judgements_total": 3})
  opened = cache.open_cache(tmp_path, expect={"fingerprints": {"vae": "aaaa"}})
  assert opened.manifest == json.loads(json.dumps(built))
  assert built["moments"]["shape"] == [2, 2, 4]
  assert built["counts"] == {"images": 7, "bad_images": 0, "prompts": 3}
  assert opened.lists.image_uids == UIDS
  expected = _moments(np.stack([_picture(i)[1] for i in (5, 0, 5)]))
  got = opened.moments([5, 0, 5])
  assert got.dtype == np.float32 and got.shape == (3, 2, 2, 4)
  np.testing.assert_allclose(got[..., :2], expected[..., :2], rtol=5e-4, atol=1e-7)
  # The log-variance is clipped to what a sampler would clip it to.
  assert (got[..., 2] == -30).all() and (got[..., 3] == 20).all()
  # Lists index records: "a dog" is prompt record 2, "a cat" is 1, "" is the null prompt.
  assert opened.lists.prompt.tolist() == [2, 1]
  assert opened.lists.image.tolist() == [2, 0, 6, 5, 4]
  assert opened.lists.rank.tolist() == [0, 1, 0, 1, 1]
  assert opened.lists.score.tolist() == [0, 0.5, 0, 0.5, 0.5]
  assert opened.lists.weight.tolist() == [1, 2]
  assert opened.lists.list_id.tolist() == [100, 101]
  assert opened.null_prompts == (0,)
  np.testing.assert_array_equal(opened.prompt_embeds([2, 0]), _text(["a dog", ""])[0])
  described = cache.lists_manifest(tmp_path, cache.lists_key(SETTINGS))
  assert described["report"] == {"judgements_total": 3}
  opened.close()


def test_conditioning_without_and_with_pooled(tmp_path):
  _build(tmp_path / "one")
  cache.write_lists(tmp_path / "one", _lists(ROWS), SETTINGS)
  plain = cache.open_cache(tmp_path / "one").conditioning(
    np.array([1, 1]), np.arange(2)
  )
  assert plain.prompt_embeds.shape == (2, 5, 3)
  assert plain.pooled_prompt_embeds is None and plain.time_ids is None

  wide = _job(lambda i: _picture(i, 16, 40)[0])  # halved to 8 x 20, cut 6 from the left
  _build(tmp_path / "two", job=wide, text=_text_and_pooled)
  cache.write_lists(tmp_path / "two", _lists(ROWS), SETTINGS)
  opened = cache.open_cache(tmp_path / "two")
  prompts, images = np.array([2, 0, 2]), np.array([0, 1, 2])
  got = opened.conditioning(prompts, images)
  np.testing.assert_array_equal(got.prompt_embeds, _text(["a dog", "", "a dog"])[0])
  assert got.pooled_prompt_embeds.tolist() == [[5, -1], [0, -1], [5, -1]]
  assert got.time_ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 3
  got = opened.conditioning(prompts, images, time_ids="original")
  assert got.time_ids.tolist() == [[16, 40, 0, 6, 8, 8]] * 3
  with pytest.raises(UserError, match="did you mean 'original'"):
    opened.conditioning(prompts, images, time_ids="orignal")


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_storage_precision(tmp_path, dtype, error):
  identity = {**IDENTITY, "dtype": dtype}
  _build(tmp_path, dtype=dtype, identity=identity)
  cache.write_lists(tmp_path, _lists(ROWS), SETTINGS)
  expected = _moments(_picture(3)[1][None])[0, ..., :2]
  got = cache.open_cache(tmp_path).moments([3])[0, ..., :2]
  assert (np.abs(got - expected) <= error * np.abs(expected)).all()
  with pytest.raises(UserError, match=r"unknown data\.cache_dtype"):
    encoding.write_images(tmp_path, UIDS, _job(), max_bad=0, dtype="float8")


def test_stopped_half_way_continues_to_the_same_cache(tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  _build(whole)
  calls = []

  def dying(images):
    calls.append(len(images))
    if len(calls) == 4:  # in the second shard of three
      raise KeyboardInterrupt
    return _moments(images)

  with pytest.raises(KeyboardInterrupt):
    _build(broken, job=_job(encode=dying))
  with pytest.raises(UserError, match=r"only an unfinished one.*--job cache"):
    cache.open_cache(broken)
  read = []

  def reading(position):
    read.append(position)
    return _picture(position)[0]

  _build(broken, job=_job(reading))
  assert read == [3, 4, 5, 6]  # the first shard is not touched again
  for folder in (whole, broken):
    cache.write_lists(folder, _lists(ROWS), SETTINGS)
  a, b = cache.open_cache(whole), cache.open_cache(broken)
  np.testing.assert_array_equal(a.moments(range(7)), b.moments(range(7)))
  assert a.manifest == b.manifest
  assert not list(broken.glob("*.partial")) and not (broken / "begun.json").exists()


def test_unfinished_work_of_another_model_is_refused(tmp_path):
  other = {**IDENTITY, "fingerprints": {"vae": "zzzz", "text_encoder": "bbbb"}}
  manifest.begin(tmp_path, other)
  manifest.begin(tmp_path, IDENTITY)  # nothing was encoded yet: a new beginning
  encoding.write_images(tmp_path, UIDS, _job(), max_bad=0, share=SHARE)
  with pytest.raises(UserError, match=r"unfinished cache.*fingerprints\.vae.*'zzzz'"):
    manifest.begin(tmp_path, other)
  manifest.begin(tmp_path, IDENTITY)
  # Of a key that is not expected (the path), a change is no difference.
  moved = {**IDENTITY, "source": {"path": "elsewhere", "files": "cccc"}}
  manifest.begin(tmp_path, moved, expect={"source": {"files": "cccc"}})
  assert len(list(tmp_path.glob("moments-*.array_record"))) == 3


def test_records_of_unknown_origin_are_not_continued(tmp_path):
  _build(tmp_path)
  (tmp_path / "manifest.json").unlink()
  read = []
  _build(tmp_path, job=_job(lambda i: read.append(i) or _picture(i)[0]))
  assert read == list(range(7))


def test_differences_are_refused_by_name(tmp_path):
  _build(tmp_path)
  cache.write_lists(tmp_path, _lists(ROWS), SETTINGS)
  expect = {
    "fingerprints": {"vae": "xxxx", "text_encoder": "bbbb"},
    "preprocessing": {"resolution": 16},
  }
  with pytest.raises(UserError) as refusal:
    cache.open_cache(tmp_path, expect=expect)
  message = str(refusal.value)
  assert "fingerprints.vae: this run has 'xxxx', found 'aaaa'" in message
  assert "preprocessing.resolution: this run has 16, found 8" in message
  assert "text_encoder" not in message
  assert "Delete that folder, or point data.cache elsewhere" in message


def test_future_format_is_refused(tmp_path):
  built = _build(tmp_path)
  records.write_json(tmp_path / "manifest.json", {**built, "format": 99})
  with pytest.raises(UserError, match="format: this run has 1, found 99"):
    cache.open_cache(tmp_path)


def test_no_cache_at_all(tmp_path):
  with pytest.raises(UserError, match=r"no finished cache in .*run --job cache"):
    cache.open_cache(tmp_path / "nothing")


def _with_bad(*bad):
  return _job(lambda i: b"not an image" if i in bad else _picture(i)[0])


def test_bad_images_are_written_down_and_leave_the_lists(tmp_path):
  def read(position):
    if position == 4:
      raise FileNotFoundError("gone.jpg")
    return b"not an image" if position == 0 else _picture(position)[0]

  built = _build(tmp_path, job=_job(read))
  assert built["counts"]["bad_images"] == 2
  lines = (tmp_path / "bad_images.jsonl").read_text().splitlines()
  bad = {entry["uid"]: entry["reason"] for entry in map(json.loads, lines)}
  assert set(bad) == {"img0", "img4"}
  assert "cannot be decoded" in bad["img0"] and "gone.jpg" in bad["img4"]
  rows = [
    (0, [1, 2], [0, 1]),  # untouched
    (0, [0, 1], [0, 1]),  # one left
    (1, [3, 0, 5, 6], [0, 1, 2, 3]),  # shortened, ranks closed up
    (1, [0, 1, 2], [0, 1, 1]),  # only ties left
    (0, [3, 4, 5], [0, 0, 1]),  # shortened, order still there
  ]
  described = cache.write_lists(tmp_path, _lists(rows), SETTINGS)
  assert described["lost"] == {
    "items": 4,
    "lists_shortened": 2,
    "lists_too_short": 1,
    "lists_all_tied": 1,
  }
  lists = cache.open_cache(tmp_path).lists
  assert lists.list_id.tolist() == [100, 102, 104]
  assert lists.weight.tolist() == [1, 3, 5]
  assert lists.offsets.tolist() == [0, 2, 5, 7]
  # Records: img1 0, img2 1, img3 2, img5 3, img6 4.
  assert lists.image_uids == ["img1", "img2", "img3", "img5", "img6"]
  assert lists.image.tolist() == [0, 1, 2, 3, 4, 2, 3]
  assert lists.rank.tolist() == [0, 1, 0, 1, 2, 0, 1]


def test_lists_tied_by_intent_stay():
  lists = _lists([(0, [0, 1], [0, 0]), (0, [2], [0])])
  kept, lost = cache.drop_missing(lists, np.arange(7))
  assert len(kept) == 2 and not any(lost.values())
  np.testing.assert_array_equal(kept.rank, lists.rank)
  np.testing.assert_array_equal(kept.offsets, lists.offsets)


def test_edits_keep_the_image_that_they_edit(tmp_path):
  rows = [(0, [0, 1], [0, 1]), (0, [2, 4], [0, 1]), (1, [1, 2], [0, 1]), (1, [3], [0])]
  source = np.array([6, 6, 5, -1], np.int32)
  edits = dataclasses.replace(_lists(rows), source_image=source)
  kept, lost = cache.drop_missing(edits, np.array([0, 1, 2, 3, -1, -1, 6]))
  # The second lost an image, the third the image that it edits.
  assert kept.list_id.tolist() == [100, 103]
  assert kept.source_image.tolist() == [6, -1]
  assert (lost["lists_too_short"], lost["lists_without_source"]) == (1, 1)
  keys, prompts = ["img6", "img0", "img1", "img3", "img2"], ["a cat", "a dog"]
  indexed, _ = cache.index_lists(edits, keys, prompts, {"img4", "img5"}, tmp_path)
  assert indexed.source_image.tolist() == [0, -1]
  assert indexed.image.tolist() == [1, 2, 3]
  with pytest.raises(UserError, match=r"1 images or prompts .*'img6'"):
    cache.index_lists(edits, keys[1:], prompts, {"img4", "img5"}, tmp_path)
  assert cache.drop_missing(_lists(rows), np.arange(7))[0].source_image is None


def test_too_many_bad_images_stop_the_job(tmp_path):
  with pytest.raises(UserError, match=r"3 of 7 images .*max_bad_images=0.4.*img1: can"):
    _build(tmp_path, job=_with_bad(1, 4, 6), max_bad=0.4)
  assert len((tmp_path / "bad_images.jsonl").read_text().splitlines()) == 3
  # The work is not lost: allowing more goes on from it.
  read = []
  job = _job(lambda i: read.append(i) or b"")
  assert _build(tmp_path, job=job, max_bad=0.5)["counts"]["images"] == 4
  assert read == []


def test_too_many_bad_images_stop_early(tmp_path):
  read = []
  uids = [f"img{i}" for i in range(90)]
  job = _job(lambda i: read.append(i) or b"junk")
  with pytest.raises(UserError, match="3 of 90 images"):
    encoding.write_images(tmp_path, uids, job, max_bad=0.02, share=SHARE)
  # One shard, and what was on its way by then.
  assert max(read) < 3 + job.batch_size * (encoding.BATCHES_AHEAD + 2)


def test_nothing_usable(tmp_path):
  with pytest.raises(UserError, match="no image of 7 could be used"):
    _build(tmp_path, job=_with_bad(*range(7)), max_bad=1.0)


def test_values_that_are_not_finite(tmp_path):
  def vae(images):
    moments = _moments(images).copy()
    moments[moments[..., 0] == moments[..., 0].max()] = np.inf
    return moments

  with pytest.raises(UserError, match="VAE gives values that are not finite"):
    _build(tmp_path / "vae", job=_job(encode=vae), max_bad=0.1)
  with pytest.raises(UserError, match="outside float16 for the prompt 'a cat'"):
    _build(tmp_path / "text", text=lambda p: (_text(p)[0] * 1e4, None))


def test_lists_never_touch_records(tmp_path):
  _build(tmp_path)
  cache.write_lists(tmp_path, _lists(ROWS), SETTINGS)
  before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.array_record")}
  pairs = {"strategy": "pairs", "max_list_size": 8}
  cache.write_lists(tmp_path, _lists([(0, [0, 1], [0, 1])]), pairs)
  after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.array_record")}
  assert before == after
  keys = [cache.lists_key(SETTINGS), cache.lists_key(pairs)]
  assert cache.known_lists(tmp_path) == sorted(keys)
  assert len(cache.open_cache(tmp_path, keys[0]).lists) == 2
  assert len(cache.open_cache(tmp_path, keys[1]).lists) == 1
  with pytest.raises(
    UserError, match=r"has no lists .no key given.*images are not enc"
  ):
    cache.open_cache(tmp_path)
  with pytest.raises(UserError, match="has no lists nope"):
    cache.open_cache(tmp_path, "nope")


def test_lists_of_other_records_are_not_known(tmp_path):
  _build(tmp_path)
  cache.write_lists(tmp_path, _lists(ROWS), SETTINGS)
  for path in [*tmp_path.glob("moments-*"), tmp_path / "manifest.json"]:
    path.unlink()
  _build(tmp_path, job=_with_bad(0))  # every record index moves by one
  assert cache.known_lists(tmp_path) == []


def test_lists_from_another_source_are_refused(tmp_path):
  _build(tmp_path)
  uids = [*UIDS[:-1], "stranger"]
  with pytest.raises(
    UserError, match=r"1 images or prompts.*'stranger'.*another source"
  ):
    cache.write_lists(tmp_path, _lists(ROWS, uids=uids), SETTINGS)
  with pytest.raises(UserError, match="'a cow'"):
    cache.write_lists(tmp_path, _lists(ROWS, prompts=("a dog", "a cow")), SETTINGS)
  # What no list uses is nobody's business.
  unused = _lists([(0, [0, 1], [0, 1])], uids=uids, prompts=("a dog", "a cow"))
  assert cache.write_lists(tmp_path, unused, SETTINGS)["lists"] == 1


def test_lists_key_depends_on_settings_only():
  assert cache.lists_key({"a": 1, "b": 2}) == cache.lists_key({"b": 2, "a": 1})
  assert cache.lists_key({"a": 1}) != cache.lists_key({"a": 2})


def test_fingerprints(tmp_path):
  (tmp_path / "rows.csv").write_text("a,1\n")
  (tmp_path / "x.jpg").write_bytes(b"12345")
  first = fingerprints.of_source(tmp_path)
  assert fingerprints.of_source(tmp_path) == first
  (tmp_path / "x.jpg").write_bytes(b"54321")  # a picture counts by its size
  assert fingerprints.of_source(tmp_path) == first
  (tmp_path / "rows.csv").write_text("a,0\n")  # rows count by what they say
  second = fingerprints.of_source(tmp_path)
  assert second != first
  (tmp_path / "y.jpg").write_bytes(b"")
  assert fingerprints.of_source(tmp_path) != second
  # Where it lies does not matter; a pattern is the files it finds.
  moved = tmp_path.rename(tmp_path.with_name("moved"))
  third = fingerprints.of_source(moved)
  one = fingerprints.of_source(moved / "rows.csv")
  assert one == fingerprints.of_source(moved / "*.csv") is not None
  moved.rename(tmp_path)
  assert fingerprints.of_source(tmp_path) == third
  assert fingerprints.of_source(tmp_path / "absent") is None
  contents = fingerprints.of_contents(tmp_path)
  (tmp_path / "y.jpg").rename(tmp_path / "z.jpg")
  assert fingerprints.of_contents(tmp_path) != contents


def test_large_source_files_count_at_both_ends(tmp_path):
  size = 3 << 18
  path = tmp_path / "rows.parquet"
  path.write_bytes(bytes(size))
  first = fingerprints.of_source(path)
  path.write_bytes(bytes(size - 1) + b"x")
  assert fingerprints.of_source(path) != first


def test_user_column_follows(tmp_path):
  lists = _lists([(0, [0, 1], [0, 1]), (0, [2, 3], [0, 1])])
  record = np.arange(7)
  record[0] = -1
  kept, _ = cache.drop_missing(lists, record)
  assert kept.user.tolist() == [1]
  none = dataclasses.replace(lists, user=None)
  assert cache.drop_missing(none, record)[0].user is None


def test_a_reader_that_fails_fails_the_job(tmp_path):
  """What the reading thread raises is not lost, and no thread stays behind."""
  threads = threading.active_count()

  def read(position):
    if position == 5:
      raise UserError("the file is gone")
    return _picture(position)[0]

  with pytest.raises(UserError, match="the file is gone"):
    _build(tmp_path, job=_job(read))
  assert threading.active_count() == threads


def test_speed_adds_up(tmp_path):
  job = _job()
  _build(tmp_path, job=job)
  speed = job.speed.as_dict()
  assert speed["images"] == 7
  assert 0 <= speed["waiting_share"] <= 1
  assert speed["decode_images_per_second"] > speed["images_per_second"] > 0
  assert speed["encode_images_per_second"] > 0


def _with_views(folder, **options):
  """A cache with both views; images 8 x 20 before the crop, which takes 6 off each end."""
  job = _job(lambda i: _picture(i, 16, 40)[0])
  built = _build(folder, job=job, text=_text_and_pooled)
  uids = [uid for uid in UIDS if uid not in options.get("without", ())]
  again = _job(lambda i: _picture(UIDS.index(uids[i]), 16, 40)[0])
  encoding.write_images(folder, uids, again, max_bad=0, view="mirrored", share=SHARE)
  manifest.add_view(folder, "mirrored", shards=-(-len(uids) // 3), notes={"x": 1})
  cache.write_lists(folder, _lists(ROWS), SETTINGS)
  return built


def test_mirrored_view(tmp_path):
  built = _with_views(tmp_path)
  stored = manifest.read(tmp_path)
  assert stored["shards"] == {"moments": 3, "prompts": 1, "mirrored": 3}
  assert stored["counts"] == {**built["counts"], "not_mirrored": 0}
  assert stored["notes"]["mirrored"] == {"x": 1}
  plain = cache.open_cache(tmp_path)
  opened = cache.open_cache(tmp_path, mirrored=True)
  assert not plain.has_mirrored and opened.has_mirrored and opened.image_count == 7
  # Index i + 7 is image i mirrored; the stand-in VAE averages 4 x 4 pixels.
  got = opened.moments([3, 10, 3])
  np.testing.assert_array_equal(got[1], got[0][:, ::-1])
  np.testing.assert_array_equal(got[2], got[0])
  np.testing.assert_array_equal(plain.moments([3])[0], got[0])


def test_mirrored_crop_counts_from_the_other_side(tmp_path):
  # 16 x 41 is halved to 8 x 20 (41/2 rounds to the even 20): 6 off the left, 6 off the
  # right; 16 x 42 to 8 x 21: 6 off the left, 7 off the right.
  for width, left, mirrored in ((41, 6, 6), (42, 6, 7)):
    image = decoding.prepare(_picture(0, 16, width)[0], 8)
    other = decoding.mirror(image)
    assert (image.crop, other.crop) == ((0, left), (0, mirrored))
    np.testing.assert_array_equal(other.pixels, image.pixels[:, ::-1])
    assert other.original_size == (16, width)


def test_image_without_mirrored_record_stays_as_it_is(tmp_path):
  _with_views(tmp_path, without=("img2",))
  assert manifest.read(tmp_path)["counts"]["not_mirrored"] == 1
  opened = cache.open_cache(tmp_path, mirrored=True)
  got = opened.moments([2, 9, 10, 3])
  np.testing.assert_array_equal(got[1], got[0])
  np.testing.assert_array_equal(got[2], got[3][:, ::-1])


def test_cache_without_mirrored_view_is_refused_where_it_is_needed(tmp_path):
  _build(tmp_path)
  cache.write_lists(tmp_path, _lists(ROWS), SETTINGS)
  with pytest.raises(UserError, match=r"has no mirrored images, which data\.flip"):
    cache.open_cache(tmp_path, mirrored=True)


def test_mirrored_leftovers_of_unknown_origin_are_removed(tmp_path):
  _with_views(tmp_path)
  (tmp_path / "manifest.json").unlink()
  manifest.begin(tmp_path, IDENTITY)
  assert not list(tmp_path.glob("mirrored-*"))
