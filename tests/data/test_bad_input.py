"""Data as bad as they come: huge prompts, nothing but ties, captions of any kind."""

import collections
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpo_jax.data import lists, precedence, sources
from lpo_jax.data.judgements import Judgements
from lpo_jax.errors import UserError


def crowd(images, count, *, seed=0, star=False):
  """One prompt with very many images: circles, ties and contradictions, or one star."""
  rng = np.random.default_rng(seed)
  a = np.zeros(count, np.int32) if star else rng.integers(0, images, count)
  b = (a + 1 + rng.integers(0, images - 1, count)) % images
  if star:
    b = 1 + np.arange(count) % (images - 1)
  taste = rng.standard_normal(images)
  won = taste[a] + rng.random(count) - 0.5 > taste[b]
  label = np.where(rng.random(count) < 0.15, 0.5, np.where(star, 1.0, won))
  zeros = np.zeros(count, np.int32)
  return Judgements(
    prompts=["p"],
    image_uids=[f"{i:05d}" for i in range(images)],
    users=["u"],
    prompt=zeros,
    user=zeros,
    image_a=a.astype(np.int32),
    image_b=b.astype(np.int32),
    label=label.astype(np.float32),
    weight=np.ones(count, np.float32),
  )


@pytest.mark.parametrize("strategy", lists.STRATEGIES)
@pytest.mark.parametrize("star", [False, True])
def test_a_prompt_with_3000_images_stays_fast(strategy, star):
  source = crowd(3000, 9000, star=star)
  began = time.process_time()
  _, report = lists.build(source, strategy)
  assert time.process_time() - began < 5  # 1 s; a search per judgement took minutes
  assert report.judgements_total == 9000
  assert report.judgements_used + sum(report.dropped.values()) == 9000


@pytest.mark.slow
@pytest.mark.parametrize("strategy", lists.STRATEGIES)
@pytest.mark.parametrize("images", [3000, 30_000, 50_000])
def test_a_prompt_with_50000_judgements(strategy, images):
  source = crowd(images, 50_000, star=images == 50_000)
  began = time.process_time()
  lists.build(source, strategy)
  assert time.process_time() - began < 30


@pytest.mark.parametrize("strategy", lists.LIST_STRATEGIES)
def test_a_list_of_3000_images_stays_fast(tmp_path, strategy):
  many = 3000 if strategy != "pairs" else 300  # pairs: every two of them
  row = {"prompt": "p", "image_uids": [f"{i}" for i in range(many)]}
  row["scores"] = [float(i * 7 % many) for i in range(many)]
  pq.write_table(pa.Table.from_pylist([row]), tmp_path / "l.parquet")
  began = time.process_time()
  built, _ = lists.build(sources.read(tmp_path / "l.parquet"), strategy)
  assert time.process_time() - began < 5
  assert len(np.unique(built.image)) == (1 if strategy == "winners" else many)


def test_both_ways_to_find_circles_agree(monkeypatch):
  rng = np.random.default_rng(0)
  cut_any = 0
  for _ in range(200):
    count = int(rng.integers(2, 12))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[: 2 * count]]
    kind = rng.random(len(pairs))
    wins = [p if k < 0.6 else p[::-1] for p, k in zip(pairs, kind) if k < 0.8]
    ties = [p for p, k in zip(pairs, kind) if k >= 0.8]
    component = precedence.Component(count, wins, ties)
    monkeypatch.setattr(precedence, "CLOSURE_IMAGES", 100)
    order, *closure = precedence.consistent(component)
    monkeypatch.setattr(precedence, "CLOSURE_IMAGES", 0)
    other, *search = precedence.consistent(component)
    assert closure == search
    assert order.levels() == other.levels()
    # Added one by one, without looking at parts: the definition.
    plain = precedence.Order(count)
    cut = [i for i, win in enumerate(wins) if not plain.prefer(*win)]
    yielded = [i for i, tie in enumerate(ties) if not plain.equate(*tie)]
    assert closure == [cut, yielded] and order.levels() == plain.levels()
    cut_any += bool(cut) and bool(yielded)
  assert cut_any > 20


def write(path, labels, **changes):
  count = len(labels)
  columns = {
    "caption": ["p"] * count,
    "image_0_uid": ["a"] * count,
    "image_1_uid": ["b"] * count,
    "jpg_0": [b"a"] * count,
    "jpg_1": [b"b"] * count,
    **changes,
  }
  sources.write_pickapic(path, label_0=labels, **columns)
  return sources.read(path)


def test_nothing_but_ties_nothing_but_contradictions_nothing_labelled(tmp_path):
  path = tmp_path / "p.parquet"
  for labels, reason in (
    ([0.5, 0.5], "all_tied"),
    ([1.0, 0.0], "contradictions"),
    ([np.nan, np.nan], "unlabelled"),
  ):
    built, report = lists.build(write(path, labels), "levels")
    assert len(built) == 0 and report.dropped == {reason: 2}
    with pytest.raises(UserError, match=f"from 2 judgements .2 {reason}"):
      lists.refuse_empty(report)


def test_a_list_of_one(tmp_path):
  row = {"prompt": "p", "image_uids": ["a"], "ranks": [0]}
  pq.write_table(pa.Table.from_pylist([row]), tmp_path / "l.parquet")
  source = sources.read(tmp_path / "l.parquet")
  _, report = lists.build(source, "levels")
  assert report.dropped == {"single_image": 1}
  assert lists.build(source, "winners")[1].lists == 1


@pytest.mark.parametrize("kind", ["pickapic", "lists"])
def test_no_rows(tmp_path, kind):
  columns = {name: pa.array([], pa.string()) for name in sources.SOURCES[kind].required}
  if kind == "lists":
    columns["image_uids"] = pa.array([], pa.list_(pa.string()))
  pq.write_table(pa.table(columns), tmp_path / "e.parquet")
  with pytest.raises(UserError, match=r"e\.parquet: no rows"):
    sources.read(tmp_path / "e.parquet")


def test_captions_of_any_kind(tmp_path):
  captions = ["", "x" * 100_000, "a\0b", "\n", "日本 🎨"]
  uids = [f"{i}" for i in range(5)]
  found = write(tmp_path / "p.parquet", [1.0] * 5, caption=captions, image_0_uid=uids)
  assert sorted(found.prompts) == sorted(captions)
  built, report = lists.build(found, "levels")
  assert report.lists == 5 and len(set(built.list_id.tolist())) == 5
  assert sorted(built.prompts[i] for i in built.prompt) == sorted(captions)


def test_the_first_place_wins_where_a_uid_has_several_bytes(tmp_path):
  for number in range(2):  # of two files, two columns, two rows
    sources.write_pickapic(
      tmp_path / f"{number}.parquet",
      caption=["p", "q"],
      image_0_uid=["a", "b"],
      image_1_uid=["b", "a"],
      jpg_0=[f"{number}00".encode(), f"{number}10".encode()],
      jpg_1=[f"{number}01".encode(), f"{number}11".encode()],
      label_0=[1.0, 1.0],
    )
  store = sources.read(tmp_path).images
  assert [store.read(0), store.read(1)] == [b"000", b"010"]
  seen = collections.defaultdict(set)
  for index, data in store.sightings():
    seen[index].add(data)
  assert [len(seen[i]) for i in range(2)] == [2, 2]  # in the row group that is read
