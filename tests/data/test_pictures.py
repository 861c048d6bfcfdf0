"""Images apart from labels: found by name, read once, never outside their folder."""

import collections
import io
import json
import tarfile
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from lpo_jax.data import files, lists, sources
from lpo_jax.data.sources.pictures import inside
from lpo_jax.errors import UserError

ROWS = {
  "caption": ["p", "p", "q"],
  "image_0_uid": ["a", "b", "c"],
  "image_1_uid": ["b", "c", "d"],
  "label_0": [1.0, 0.0, 1.0],
}
DATA = {name: f"bytes of {name}".encode() for name in "abcde"}


def write_pairs(path, **changes):
  rows = {**ROWS, **changes}
  sources.write_pickapic(
    path,
    jpg_0=[DATA[uid] for uid in rows["image_0_uid"]],
    jpg_1=[DATA[uid] for uid in rows["image_1_uid"]],
    row_group_size=1,
    **rows,
  )
  return path


def write_labels(path, **changes):
  write_pairs(path, **changes)
  pq.write_table(pq.read_table(path).drop_columns(["jpg_0", "jpg_1"]), path)
  return path


def write_tar(path, members):
  with tarfile.open(path, "w") as archive:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return path


def read_all(source):
  return {uid: source.images.read(i) for i, uid in enumerate(source.image_uids)}


def test_labels_alone_make_the_same_lists(tmp_path):
  whole = sources.read(write_pairs(tmp_path / "whole.parquet"))
  labels = sources.read(write_labels(tmp_path / "labels.parquet"))
  assert labels.images is None
  one, report = lists.build(whole, "levels")
  other, same = lists.build(labels, "levels")
  assert report == same
  assert one.list_id.tolist() == other.list_id.tolist()


def parquet_of_pairs(folder):
  # "d" is here twice: the first place in order of file, row group, column, row counts.
  write_pairs(folder / "train-0.parquet")
  sources.write_pickapic(
    folder / "train-1.parquet",
    **{**ROWS, "image_1_uid": ["b", "c", "d"]},
    jpg_0=[b"later"] * 3,
    jpg_1=[b"later"] * 3,
  )


def parquet_of_images(folder):
  columns = {"image_uid": list(DATA), "image": [{"bytes": d} for d in DATA.values()]}
  pq.write_table(pa.table(columns), folder / "i.parquet", row_group_size=2)


def parquet_of_lists(folder):
  columns = {
    "image_uids": [["e"], [], ["b", "a"], None, ["d", "c"]],
    "images": [[DATA["e"]], [], [DATA["b"], DATA["a"]], None, [DATA["d"], DATA["c"]]],
  }
  pq.write_table(pa.table(columns), folder / "l.parquet", row_group_size=2)


def pictures(folder):
  (folder / "deep").mkdir()
  for name in "ab":
    (folder / f"{name}.png").write_bytes(DATA[name])
  for name in "cde":
    (folder / "deep" / f"{name}.png").write_bytes(DATA[name])


def tar(folder):
  write_tar(folder / "1.tar", [(f"{n}.png", DATA[n]) for n in "abc"])
  write_tar(folder / "2.tar", [("d.webp", DATA["d"]), ("c.png", b"later")])


def zipped(folder):
  with zipfile.ZipFile(folder / "1.zip", "w") as archive:
    for name in "abcd":
      archive.writestr(f"{name}.jpg", DATA[name])


@pytest.mark.parametrize(
  "make",
  [parquet_of_pairs, parquet_of_images, parquet_of_lists, pictures, tar, zipped],
)
def test_images_are_joined_by_name(tmp_path, make):
  folder = tmp_path / "images"
  folder.mkdir()
  make(folder)
  uids = {}
  if make is pictures:  # paths, where a folder is deep
    uids = {"image_0_uid": ["a", "b.png", "deep/c"], "image_1_uid": ["b.png", "deep/c"]}
    uids["image_1_uid"].append("deep/d.png")
    for uid in (*uids["image_0_uid"], *uids["image_1_uid"]):
      DATA.setdefault(uid, DATA[uid.split("/")[-1][0]])
  labels = write_labels(tmp_path / "labels.parquet", **uids)
  found = sources.read(labels, images=folder)
  assert found.images.present.all()
  assert read_all(found) == {uid: DATA[uid] for uid in found.image_uids}


def test_missing_images_are_absent_and_not_bad(tmp_path):
  write_tar(tmp_path / "some.tar", [("a.png", DATA["a"]), ("c.png", DATA["c"])])
  labels = write_labels(tmp_path / "labels.parquet")
  store = sources.read(labels, images=tmp_path / "some.tar").images
  assert store.count == 4
  assert store.present.tolist() == [True, False, True, False]
  assert store.read(1) == b""
  assert [index for index, _ in store.iterate()] == [0, 2]
  assert store.file_order(np.array([3, 2, 1])).tolist() == [2]
  assert store.sample(10).tolist() == [0, 2] and store.sample(1).tolist() == [0]
  assert [i for i, _ in store.sightings(np.array([0, 1]))] == [0]
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "z.png").write_bytes(b"z")
  nothing = sources.read(labels, images=tmp_path / "other").images
  assert nothing.count == 4 and not nothing.present.any()
  assert nothing.sample(3).tolist() == [] and [*nothing.sightings()] == []


def test_each_row_group_is_read_once_and_only_if_needed(tmp_path, monkeypatch):
  count, images = 12, tmp_path / "images.parquet"
  names = [f"{i * 5 % count:02d}" for i in range(count)]
  pq.write_table(
    pa.table({"uid": names, "jpg": [n.encode() for n in names]}),
    images,
    row_group_size=3,
  )
  labels = tmp_path / "labels.parquet"
  wanted = [names[0], names[11], names[1], names[9]]
  write_labels(
    labels,
    caption=["p"] * 2,
    image_0_uid=["a", "a"],
    image_1_uid=["b", "c"],
    label_0=[1, 0],
  )
  table = pq.read_table(labels)
  for side, uids in (("image_0_uid", wanted[:2]), ("image_1_uid", wanted[2:])):
    at = table.column_names.index(side)
    table = table.set_column(at, side, pa.array(uids))
  pq.write_table(table, labels)
  reads, opened = collections.Counter(), files.open_parquet

  class Counting:
    def __init__(self, path):
      self.file = opened(path)

    def __getattr__(self, name):
      return getattr(self.file, name)

    def read(self, columns):
      assert "jpg" not in columns
      return self.file.read(columns=columns)

    def read_row_group(self, group, columns):
      reads[group] += 1
      return self.file.read_row_group(group, columns=columns)

  monkeypatch.setattr(files, "open_parquet", Counting)
  found = sources.read(labels, images=images)
  assert not reads
  assert {found.image_uids[i]: data for i, data in found.images.iterate()} == {
    name: name.encode() for name in wanted
  }
  assert reads == {0: 1, 3: 1}


@pytest.mark.parametrize("kind", ["pickapic", "lists", "rapidata"])
def test_reading_labels_reads_no_image_bytes(tmp_path, monkeypatch, kind):
  noise = [np.random.default_rng(i).bytes(2_000_000) for i in range(6)]
  path = tmp_path / "p.parquet"
  if kind == "pickapic":
    sources.write_pickapic(path, **ROWS, jpg_0=noise[:3], jpg_1=noise[3:])
  elif kind == "lists":
    columns = {"prompt": ["p"], "image_uids": [list("abcdef")], "ranks": [[*range(6)]]}
    pq.write_table(pa.table({**columns, "images": [noise]}), path)
  else:
    cells = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(noise)]
    columns = {"prompt": ["p"] * 3, "image1": cells[:3], "image2": cells[3:]}
    votes = {"votes_image1": [3, 2, 1], "votes_image2": [1, 2, 3]}
    pq.write_table(pa.table({**columns, **votes}), path)
  size = 0

  class Counted(io.FileIO):
    def read(self, count=-1):
      nonlocal size
      data = super().read(count)
      size += len(data)
      return data

  monkeypatch.setattr(files, "open_parquet", lambda path: pq.ParquetFile(Counted(path)))
  found = sources.read(path)
  assert 0 < size < 1_000_000 < path.stat().st_size  # footers, and ahead of them
  data = {found.images.read(i) for i in range(6 if kind != "pickapic" else 4)}
  assert data <= set(noise) and size > 8_000_000


@pytest.mark.parametrize(
  "name",
  ["../a.png", "/etc/a.png", "b/../../a.png", "C:\\a.png", "..\\a.png", "a\0.png"],
)
def test_names_that_leave_the_data_are_refused(tmp_path, name):
  with pytest.raises(UserError, match="outside the data's own folder"):
    inside(name, "x")
  row = {"prompt": "p", "images": [name, "b.png"], "ranks": [0, 1]}
  (tmp_path / "l.jsonl").write_text(json.dumps(row))
  with pytest.raises(UserError, match=r"l\.jsonl, byte 0 names the file"):
    sources.read(tmp_path / "l.jsonl")
  (tmp_path / "test.json").write_text(
    json.dumps([{"prompt": "p", "image_path": ["a.png", name], "rank": [1, 2]}])
  )
  (tmp_path / "a.png").write_bytes(b"a")
  with pytest.raises(UserError, match=r"test\.json, row 0 names the file"):
    sources.read(tmp_path / "test.json")
  if "\0" not in name:
    write_tar(tmp_path / "w.tar", [(name, b"")])
    with pytest.raises(UserError, match=r"w\.tar names the file"):
      sources.read(tmp_path / "w.tar")
    labels = write_labels(tmp_path / "labels.parquet")
    with pytest.raises(UserError, match=r"w\.tar names the file"):
      sources.read(labels, images=tmp_path / "w.tar")
  assert inside("./b/a..png", "x") == "b/a..png"


def test_a_json_name_that_leaves_is_refused_beside_uids_too(tmp_path):
  row = {"prompt": "p", "images": ["../s.png", "b.png"], "image_uids": ["a", "b"]}
  (tmp_path / "l.jsonl").write_text(json.dumps({**row, "ranks": [0, 1]}))
  with pytest.raises(UserError, match=r"names the file '\.\./s\.png'"):
    sources.read(tmp_path / "l.jsonl")


def test_places_without_images(tmp_path):
  labels = write_labels(tmp_path / "labels.parquet")
  (tmp_path / "void").mkdir()
  for where, match in (
    (tmp_path / "void", "no pictures, parquet files or archives"),
    (tmp_path / "viod", r"no images there; did you mean.*void"),
    ("ftp://x/y", "paths are local, or start with one of gs://"),
  ):
    with pytest.raises(UserError, match=match):
      sources.read(labels, images=where)
  pq.write_table(pa.table({"x": [1]}), tmp_path / "void" / "x.parquet")
  with pytest.raises(UserError, match=r"has the columns x\. Expected names and bytes"):
    sources.read(labels, images=tmp_path / "void")
  (tmp_path / "cut.tar").write_bytes(b"no archive" * 100)
  with pytest.raises(UserError, match="cannot be read as a tar archive"):
    sources.read(labels, images=tmp_path / "cut.tar")


class Bucket(MemoryFileSystem):
  """Files in memory that answer to s3:// paths, in place of the real thing."""

  protocol = "s3"
  store = {}  # noqa: RUF012
  pseudo_dirs = [""]  # noqa: RUF012

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + path.removeprefix("s3://").strip("/")


@pytest.fixture
def bucket():
  before = "s3fs.S3FileSystem"
  fsspec.register_implementation("s3", Bucket, clobber=True)
  yield epath.Path("s3://bucket/data")
  Bucket.store.clear()
  fsspec.register_implementation("s3", before, clobber=True)


def test_buckets_are_read_through_fsspec(tmp_path, bucket):
  write_labels(tmp_path / "train-00000-of-00001.parquet")
  pictures_at = tmp_path / "images"
  pictures_at.mkdir()
  tar(pictures_at)
  for name in ("train-00000-of-00001.parquet", "images/1.tar", "images/2.tar"):
    target = bucket / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((tmp_path / name).read_bytes())
  found = sources.read(
    "s3://bucket/data", split="train", images="s3://bucket/data/images"
  )
  assert read_all(found) == {name: DATA[name] for name in "abcd"}
  assert len(sources.read(f"file://{tmp_path}/train-00000-of-00001.parquet")) == 3
  with pytest.raises(UserError, match="no such file or folder"):
    sources.read("s3://bucket/gone")


def test_the_hub_without_a_network_says_what_to_do(monkeypatch):
  constants = pytest.importorskip("huggingface_hub.constants")
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(
    UserError, match=r"cannot be reached.*hf download owner/name --repo"
  ):
    sources.read("hf://owner/name")
  with pytest.raises(UserError, match="write hf://owner/name; without a network"):
    sources.read("owner/name")
