"""Data sets on disk: exact columns, lazy images, a good refusal of everything else."""

import base64
import collections
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lpo_jax.data import files, lists, prompts, sources
from lpo_jax.data.stores import ImageStore
from lpo_jax.errors import UserError


def picture(color, kind="PNG", size=(8, 8)):
  buffer = io.BytesIO()
  Image.new("RGB", size, color).save(buffer, kind)
  return buffer.getvalue()


RED, GREEN, BLUE = picture("red"), picture("green", "WEBP"), picture("blue", "JPEG")
ROWS = {
  "caption": ["a cat", "a dog", "a cat", "a cat"],
  "image_0_uid": ["r", "g", "g", "b"],
  "image_1_uid": ["g", "b", "b", "r"],
  "jpg_0": [RED, GREEN, GREEN, BLUE],
  "jpg_1": [GREEN, BLUE, BLUE, RED],
  "label_0": [1.0, 0.5, 1.0, np.nan],
  "user_id": [7, 7, 10, 7],
  "model_0": ["sd", "xl", "xl", "sd"],
  "model_1": ["xl", "sd", "sd", "sd"],
}


def write(path, **changes):
  sources.write_pickapic(path, **{**ROWS, **changes})
  return path


def rewrite(path, change):
  """Applies `change` to the arrow table of a written file."""
  pq.write_table(change(pq.read_table(path)), path)
  return path


def test_written_files_have_exactly_the_columns_of_pickapic(tmp_path):
  table = pq.read_table(write(tmp_path / "p.parquet"))
  assert {f.name: str(f.type) for f in table.schema} == {
    "are_different": "bool",
    "best_image_uid": "string",
    "caption": "string",
    "created_at": "timestamp[ns]",
    "has_label": "bool",
    "image_0_uid": "string",
    "image_0_url": "string",
    "image_1_uid": "string",
    "image_1_url": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "double",
    "label_1": "double",
    "model_0": "string",
    "model_1": "string",
    "ranking_id": "int64",
    "user_id": "int64",
    "num_example_per_prompt": "int64",
    "__index_level_0__": "int64",
  }
  assert table["best_image_uid"].to_pylist()[:3] == ["r", "tie", "g"]
  assert table["has_label"].to_pylist() == [True, True, True, False]
  assert table["num_example_per_prompt"].to_pylist() == [3, 1, 3, 3]
  assert table["label_1"].to_pylist()[:3] == [0.0, 0.5, 0.0]


def test_pickapic(tmp_path):
  found = sources.read(write(tmp_path / "p.parquet"))
  assert found.prompts == ["a cat", "a dog"]
  assert found.image_uids == ["b", "g", "r"]
  assert found.users == ["10", "7"]
  assert found.prompt.tolist() == [0, 1, 0]
  assert found.image_a.tolist() == [2, 1, 1]
  assert found.image_b.tolist() == [1, 0, 0]
  assert found.user.tolist() == [1, 1, 0]
  assert found.label.tolist() == [1.0, 0.5, 1.0]
  np.testing.assert_allclose(found.weight, [1 / 3, 1, 1 / 3], rtol=1e-6)
  assert {k: v for k, v in found.dropped.items() if v} == {"unlabelled": 1}
  assert [found.models[i] for i in found.image_model] == ["sd", "xl", "sd"]
  assert [found.images.read(i) for i in range(3)] == [BLUE, GREEN, RED]
  built, report = lists.build(found, "paths")
  assert [built.image_uids[i] for i in built.image] == ["r", "g", "b"]
  assert (report.judgements_total, report.judgements_used) == (4, 2)
  assert (report.unlabelled, report.ties_not_expressible) == (1, 1)


def test_rows_are_refused_for_one_reason_each(tmp_path):
  path = write(
    tmp_path / "p.parquet",
    label_0=[1.0, 1.0, 1.0, -1.0],
    label_1=[0.0, 1.0, 0.0, 2.0],
    has_label=[False, True, True, True],
    image_1_uid=["g", "b", "g", "r"],
  )
  found = sources.read(path)
  assert len(found) == 0
  assert {k: v for k, v in found.dropped.items() if v} == {
    "unlabelled": 1,
    "bad_label": 2,
    "same_image": 1,
  }
  assert found.images.count == 0

  def holes(table):
    caption = pa.array([None, "x", "x", None])
    uid = pa.array(["r", None, "g", "r"])
    table = table.set_column(table.column_names.index("caption"), "caption", caption)
    return table.set_column(table.column_names.index("image_0_uid"), "image_0_uid", uid)

  found = sources.read(rewrite(write(path), holes))
  assert (found.dropped["no_prompt"], found.dropped["no_image"]) == (2, 1)
  assert found.prompts == ["x"]


def test_only_the_needed_columns_are_required(tmp_path):
  optional = ["has_label", "user_id", "num_example_per_prompt", "model_0", "model_1"]
  path = write(tmp_path / "p.parquet", label_0=[1, 0, 0, 1])
  found = sources.read(rewrite(path, lambda table: table.drop_columns(optional)))
  assert len(found) == 4
  assert found.user.tolist() == [-1] * 4
  assert found.users == [] and found.models == []
  assert found.weight.tolist() == [1] * 4


def test_images_are_read_once_per_block_in_file_order(tmp_path, monkeypatch):
  count = 40
  uids = [f"{i * 7 % count:02d}" for i in range(count)]  # not in order of name
  data = {uid: picture((int(uid), 0, 0)) for uid in uids}
  for part in range(2):
    half = uids[part * 20 : part * 20 + 20]
    other = half[1:] + half[:1]
    sources.write_pickapic(
      tmp_path / f"train-0000{part}-of-00002.parquet",
      caption=["p"] * 20,
      image_0_uid=half,
      image_1_uid=other,
      jpg_0=[data[uid] for uid in half],
      jpg_1=[data[uid] for uid in other],
      label_0=[1] * 20,
      row_group_size=5,
    )
  reads = collections.Counter()
  opened = files.open_parquet

  class Counting:
    def __init__(self, path):
      self.path, self.file = path, opened(path)

    def __getattr__(self, name):
      return getattr(self.file, name)

    def read(self, columns):
      assert not {"jpg_0", "jpg_1"} & set(columns)
      return self.file.read(columns=columns)

    def read_row_group(self, group, columns):
      reads[self.path.name, group, *columns] += 1
      return self.file.read_row_group(group, columns=columns)

  monkeypatch.setattr(files, "open_parquet", Counting)
  found = sources.read(tmp_path)
  assert not reads
  store = found.images
  assert store.count == count
  seen = list(store.iterate())
  assert all(data[found.image_uids[index]] == value for index, value in seen)
  assert len(seen) == count
  assert len(reads) <= 2 * 4 * 2 and set(reads.values()) == {1}
  order = store.file_order()
  assert sorted(order.tolist()) == list(range(count))
  assert {found.image_uids[i] for i in order[:20]} == set(uids[:20])
  some = store.file_order(np.array([3, 1, 2]))
  assert sorted(some.tolist()) == [1, 2, 3]
  sightings = collections.Counter(index for index, _ in store.sightings())
  assert set(sightings.values()) == {2}
  sample = store.sample(10)
  assert len(set(sample.tolist())) == 10
  assert store.sample(100).tolist() == order.tolist()


def test_store_of_bytes():
  store = ImageStore.of_bytes([b"0", b"1", b"2"])
  assert store.count == 3
  assert list(store.iterate(np.array([2, 0]))) == [(0, b"0"), (2, b"2")]


def test_splits_are_not_mixed(tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  for name in ("train", "validation_unique"):
    write(folder / f"{name}-00000-of-00001-abc.parquet", caption=[name] * 4)
  with pytest.raises(UserError, match=r"several splits.*train, validation_unique"):
    sources.read(tmp_path)
  assert sources.read(tmp_path, split="train").prompts == ["train"]
  with pytest.raises(UserError, match="did you mean 'train'"):
    sources.read(tmp_path, split="trian")
  only = sources.read(str(folder / "validation_unique-*.parquet"))
  assert only.prompts == ["validation_unique"]


def test_files_are_read_in_order_of_name(tmp_path):
  write(tmp_path / "b.parquet", caption=["second"] * 4)
  write(tmp_path / "a.parquet", caption=["first"] * 4)
  found = sources.read(tmp_path)
  assert [found.prompts[i] for i in found.prompt] == ["first"] * 3 + ["second"] * 3


def test_missing_column_is_named_with_the_nearest(tmp_path):
  path = write(tmp_path / "p.parquet")

  def rename(table):
    return table.rename_columns(
      ["captions" if name == "caption" else name for name in table.column_names]
    )

  with pytest.raises(UserError, match=r"no column 'caption'.*is 'captions'"):
    sources.read(rewrite(path, rename))


def test_strange_files_are_named(tmp_path):
  path = write(tmp_path / "p.parquet")
  whole = path.read_bytes()
  empty = tmp_path / "empty.parquet"
  empty.write_bytes(b"")
  with pytest.raises(UserError, match=r"empty\.parquet cannot be read"):
    sources.read(empty)
  cut = tmp_path / "cut.parquet"
  cut.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match=r"cut\.parquet cannot be read.*truncated"):
    sources.read(cut)
  with pytest.raises(UserError, match="no rows"):
    sources.read(rewrite(path, lambda table: table.slice(0, 0)))
  pq.write_table(pa.table({"x": [1]}), path)
  with pytest.raises(UserError, match="none of the columns of any known source"):
    sources.read(path)
  with pytest.raises(UserError, match=r"'label_0' is of type.*string"):
    sources.read(
      rewrite(
        write(path),
        lambda t: t.set_column(
          t.column_names.index("label_0"), "label_0", pa.array(["first"] * 4)
        ),
      )
    )


def test_damaged_images_are_refused_with_the_file(tmp_path):
  noise = np.random.default_rng(0).bytes(20_000)
  path = write(tmp_path / "p.parquet", jpg_0=[noise] * 4)
  data = bytearray(path.read_bytes())
  at = bytes(data).find(noise[:64])
  if at < 0:  # compressed: then hit the middle of the first column chunk instead
    offset = pq.ParquetFile(path).metadata.row_group(0).column(9).data_page_offset
    at = offset + 40
  data[at - 30 : at + 400] = b"\xff" * 430
  path.write_bytes(bytes(data))
  found = sources.read(path)
  with pytest.raises(UserError, match=r"p\.parquet cannot be read"):
    [found.images.read(i) for i in range(found.images.count)]


def test_paths_without_data(tmp_path):
  with pytest.raises(UserError, match=r"data\.path is not set"):
    sources.read("")
  write(tmp_path / "pick.parquet")
  with pytest.raises(UserError, match=r"no such file.*did you mean.*pick\.parquet"):
    sources.read(tmp_path / "pikc.parquet")
  (tmp_path / "void").mkdir()
  with pytest.raises(UserError, match=r"no \.parquet, \.jsonl, \.tar or"):
    sources.read(tmp_path / "void")
  with pytest.raises(UserError, match="did you mean 'pickapic'"):
    sources.read(tmp_path, "pickapick")


RANKED = [
  {
    "prompt": "p",
    "images": [RED, GREEN, BLUE],
    "image_uids": ["r", "g", "b"],
    "ranks": [3, 1, 3],
    "scores": None,
    "weights": 0.5,
    "user_id": "u",
    "models": ["m", "n", "m"],
  },
  {
    "prompt": "a",
    "images": [RED, BLUE],
    "image_uids": ["r", "b"],
    "ranks": None,
    "scores": [0.25, 0.5],
    "weights": None,
    "user_id": None,
    "models": None,
  },
  *(
    {"prompt": "x", "images": [RED], **bad}
    for bad in (
      {"image_uids": ["r", "r"], "ranks": [0, 1]},
      {"image_uids": ["r", "g"], "ranks": [0]},
      {"image_uids": ["r", "g"]},
      {"image_uids": [], "ranks": []},
    )
  ),
]


def check_ranked(found):
  assert found.prompts == ["a", "p"]
  assert found.image_uids == ["b", "g", "r"]
  assert found.prompt.tolist() == [1, 0]
  assert found.image.tolist() == [1, 0, 2, 0, 2]
  assert found.rank.tolist() == [0, 1, 1, 0, 1]
  assert found.score.tolist() == [0, 0, 0, 0.5, 0.25]
  assert found.weight.tolist() == [0.5, 1]
  assert [found.users[i] if i >= 0 else None for i in found.user] == ["u", None]
  assert [found.models[i] for i in found.image_model] == ["m", "n", "m"]
  assert [found.images.read(i) for i in range(3)] == [BLUE, GREEN, RED]
  assert dict(found.dropped) == {
    "same_image": 1,
    "bad_label": 1,
    "unlabelled": 1,
    "no_image": 1,
  }
  built, report = lists.build(found, "paths")
  assert built.prompt.tolist() == [0, 1]
  assert (report.judgements_total, report.judgements_used) == (6, 2)


def test_lists_in_parquet(tmp_path):
  pq.write_table(pa.Table.from_pylist(RANKED), tmp_path / "l.parquet", row_group_size=2)
  check_ranked(sources.read(tmp_path / "l.parquet"))
  as_feature = [
    {**row, "images": [{"bytes": image, "path": None} for image in row["images"]]}
    for row in RANKED
  ]
  pq.write_table(pa.Table.from_pylist(as_feature), tmp_path / "f.parquet")
  check_ranked(sources.read(tmp_path / "f.parquet"))


def test_lists_in_json_lines(tmp_path):
  rows = [
    {**row, "images": [base64.b64encode(image).decode() for image in row["images"]]}
    for row in RANKED
  ]
  path = tmp_path / "l.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
  check_ranked(sources.read(path))
  path.write_text(json.dumps(rows[0]) + "\n{oops\n")
  with pytest.raises(UserError, match=r"l\.jsonl, line 2"):
    sources.read(path)
  path.write_text(json.dumps({"prompt": "p", "images": ["a"]}))
  with pytest.raises(UserError, match=r"no column 'image_uids'.*'images'"):
    sources.read(path)
  path.write_text(json.dumps({**rows[0], "ranks": ["best", "worst", "worst"]}))
  with pytest.raises(UserError, match="'ranks' is of type"):
    sources.read(path)


def test_json_lines_may_name_image_files(tmp_path):
  (tmp_path / "red.png").write_bytes(RED)
  row = {"prompt": "p", "images": ["red.png", "gone.png"], "ranks": [0, 1]}
  (tmp_path / "l.jsonl").write_text(json.dumps(row))
  found = sources.read(tmp_path)
  assert found.image_uids == ["gone.png", "red.png"]
  assert [found.images.read(i) for i in range(2)] == [b"", RED]


def test_tensorflow_datasets_round_trip(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")

  class PickAPic(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012  nothing is downloaded; do not look for checksums

    def _info(self):
      text, number = tfds.features.Text(), np.float64
      kinds = {"string": text, "binary": text, "double": number, "bool": np.bool_}
      features = {
        name: kinds.get(kind, np.int64)
        for name, kind in sources.PICKAPIC_COLUMNS.items()
        if not kind.startswith("timestamp")
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
      table = pq.read_table(tmp_path / "p.parquet").drop_columns(["created_at"])
      yield from enumerate(table.to_pylist())

  write(tmp_path / "p.parquet")
  builder = PickAPic(data_dir=str(tmp_path / "tfds"), file_format="array_record")
  builder.download_and_prepare()
  found = sources.read(builder.data_dir)
  expected = sources.read(tmp_path / "p.parquet")
  assert found.prompts == expected.prompts
  assert found.image_uids == expected.image_uids
  assert found.users == expected.users
  assert [found.images.read(i) for i in range(3)] == [BLUE, GREEN, RED]
  assert sorted(found.label.tolist()) == sorted(expected.label.tolist())
  one, report = lists.build(found, "paths")
  other, expected_report = lists.build(expected, "paths")
  assert one.list_id.tolist() == other.list_id.tolist()
  assert report == expected_report
  with pytest.raises(
    UserError, match=r"unknown data\.split 'tset'; did you mean 'test'"
  ):
    sources.read(builder.data_dir, split="tset")


def test_prompt_sets(tmp_path):
  def read(name, text):
    (tmp_path / name).write_text(text)
    return prompts.read(tmp_path / name)

  assert read("a.txt", "one\n\n two\n") == ["one", " two"]
  assert read("a.tsv", 'Prompt\tCategory\na "b\tx\nc\ty\n') == ['a "b', "c"]
  assert read("a.csv", 'id,caption\n1,"a, b"\n') == ["a, b"]
  assert read("a.json", '["a", "b"]') == ["a", "b"]
  assert read("b.json", '{"7": {"text": "a"}, "9": {"text": "b"}}') == ["a", "b"]
  assert read("a.jsonl", '{"prompt": "a"}\n"b"\n') == ["a", "b"]
  pq.write_table(pa.table({"n": [1], "caption": ["a"]}), tmp_path / "a.parquet")
  assert prompts.read(tmp_path / "a.parquet") == ["a"]
  assert prompts.read(["a", " ", "b"]) == ["a", "b"]
  for name, text, match in (
    ("e.txt", "\n", "holds no prompt"),
    ("e.tsv", "a\tb\n1\t2\n", "none of them one of Prompt"),
    ("e.json", "{", "cannot be read as .json"),
    ("e.json", "3", "holds int"),
    ("e.yaml", "", "unknown prompt file type"),
  ):
    with pytest.raises(UserError, match=match):
      read(name, text)
  with pytest.raises(UserError, match="is no file with prompts"):
    prompts.read(tmp_path / "none.txt")


def test_prompts_are_the_same_but_for_case_and_punctuation():
  assert prompts.normalise("Café, №5 — ＮＥＯＮ!") == "café no5 neon"
  assert prompts.normalise("!?") == ""
  assert prompts.overlap(["A cat.", "a dog", ""], ["a  CAT", "!"]) == ["A cat."]
