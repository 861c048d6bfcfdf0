"""Every family of data sets: which row becomes which judgement or list."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpo_jax.data import lists, sources
from lpo_jax.errors import UserError


def struct(*names):
  return [{"bytes": name.encode(), "path": f"{name}.jpg"} for name in names]


def parquet(path, rows, **options):
  pq.write_table(pa.Table.from_pylist(rows), path, **options)
  return path


def write_tar(path, members):
  with tarfile.open(path, "w") as archive:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def write_json(path, rows):
  path.write_text(json.dumps(rows))
  for name in "abcd":
    (path.parent / f"{name}.jpg").write_bytes(name.encode())
  return path


def pairs(source):
  """(prompt, a, b, label) of each judgement; reads every image."""
  made = [
    (source.prompts[p], source.image_uids[a], source.image_uids[b], round(float(y), 4))
    for p, a, b, y in zip(source.prompt, source.image_a, source.image_b, source.label)
  ]
  return made, {u: source.images.read(i) for i, u in enumerate(source.image_uids)}


def ranked(source):
  """(prompt, uids, ranks, user) of each list."""
  made = []
  for i in range(len(source)):
    span = slice(source.offsets[i], source.offsets[i + 1])
    uids = [source.image_uids[j] for j in source.image[span]]
    user = source.users[source.user[i]] if source.user[i] >= 0 else None
    made.append(
      (source.prompts[source.prompt[i]], uids, source.rank[span].tolist(), user)
    )
  return made


def opened(path, name, **more):
  """Opens by columns alone and checks what was recognised."""
  found = sources.open(path, **more)
  assert found.name == name
  assert found.kind.licence and found.kind.splits
  return found.read()


def images(source):
  return {u: source.images.read(i) for i, u in enumerate(source.image_uids)}


def test_best_of_four(tmp_path):
  row = {f"image_{i}_uid": uid for i, uid in enumerate("abcd", 1)}
  row |= {"prompt": "p", "ranking_id": 1, "user_id": 7}
  rows = [{**row, "best_image_uid": "c"}, {**row, "best_image_uid": "x"}]
  found = opened(parquet(tmp_path / "r.parquet", rows), "pickapic_rankings")
  assert ranked(found) == [("p", ["c", "a", "b", "d"], [0, 1, 1, 1], "7")]
  assert dict(found.dropped) == {"unlabelled": 1} and found.images is None


def test_hpdv2(tmp_path):
  rows = [
    {"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
    {"prompt": "p", "file_path": ["c.jpg", "b.jpg"], "human_preference": [1, 1]},
  ]
  found = opened(write_json(tmp_path / "train.json", rows), "hpdv2")
  made, data = pairs(found)
  assert made == [("p", "a.jpg", "b.jpg", 0.0)]
  assert data == {"a.jpg": b"a", "b.jpg": b"b"}
  assert found.dropped["bad_label"] == 1
  row = {
    "prompt": "q",
    "image_path": ["a.jpg", "b.jpg", "c.jpg"],
    "rank": [1.5, 1.5, 3.0],
    "raw_annotations": [
      {"rank": [1, 2, 3], "user_hash": "x"},
      {"rank": [2, 1, 3], "user_hash": "y"},
    ],
  }
  path = write_json(tmp_path / "test.json", [row])
  mean = opened(path, "hpdv2_ranks")
  assert ranked(mean) == [("q", ["a.jpg", "b.jpg", "c.jpg"], [0, 0, 1], None)]
  assert mean.score.tolist() == [-1.5, -1.5, -3.0]
  each = sources.read(path, "hpdv2_annotations")
  assert ranked(each) == [
    ("q", ["a.jpg", "b.jpg", "c.jpg"], [0, 1, 2], "x"),
    ("q", ["b.jpg", "a.jpg", "c.jpg"], [0, 1, 2], "y"),
  ]
  assert images(each) == {"a.jpg": b"a", "b.jpg": b"b", "c.jpg": b"c"}
  write_json(path, [{**row, "rank": 3}])
  with pytest.raises(UserError, match=r"test\.json, row 0: rank is 3, expected a list"):
    sources.read(path)


def test_hpdv3(tmp_path):
  rows = [
    {"prompt": "p", "path1": "a.jpg", "path2": "b.jpg", "choice_dist": [12, 7]},
    {"prompt": "p", "path1": "c.jpg", "path2": "d.jpg", "model1": "m", "model2": "n"},
    {"prompt": "p", "path1": "a.jpg", "path2": "d.jpg", "choice_dist": [0, 0]},
  ]
  rows = [{"choice_dist": None, "model1": None, "model2": None, **row} for row in rows]
  found = opened(write_json(tmp_path / "train.json", rows), "hpdv3")
  made, _ = pairs(found)
  assert made == [("p", "a.jpg", "b.jpg", 0.6316), ("p", "c.jpg", "d.jpg", 1.0)]
  assert found.dropped["unlabelled"] == 1
  assert [found.models[m] if m >= 0 else "" for m in found.image_model] == [
    "",
    "",
    "m",
    "n",
  ]


FLAT = {"prompt_id": "1", "prompt": "p", "overall_rating": 5}


def test_imagereward(tmp_path):
  ranks = {"a": 1, "b": 3, "c": 3, "d": 5}  # ties and gaps
  rows = [{**FLAT, "image": struct(n)[0], "rank": r} for n, r in ranks.items()]
  rows.insert(1, {**FLAT, "prompt_id": "2", "image": struct("e")[0], "rank": 1})
  flat = opened(parquet(tmp_path / "f.parquet", rows, row_group_size=2), "imagereward")
  assert ranked(flat) == [
    ("p", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], [0, 1, 1, 2], None),
    ("p", ["e.jpg"], [0], None),
  ]
  assert images(flat) == {f"{n}.jpg": n.encode() for n in "abcde"}
  _, report = lists.build(flat, "levels")
  assert (report.lists, report.single_image, report.ties) == (1, 1, 1)
  row = {"prompt_id": "1", "prompt": "p", "image": struct(*"ab"), "rank": [2, 1]}
  row["overall_rating"] = [1, 7]
  group = opened(parquet(tmp_path / "g.parquet", [row]), "imagereward")
  assert ranked(group) == [("p", ["g/0/1", "g/0/0"], [0, 1], None)]
  assert images(group) == {"g/0/0": b"a", "g/0/1": b"b"}
  row = {"prompt": "p", "img_better": struct("b")[0], "img_worse": struct("a")[0]}
  pair = opened(parquet(tmp_path / "p.parquet", [row]), "imagereward_pairs")
  assert pairs(pair) == ([("p", "b.jpg", "a.jpg", 1.0)], {"a.jpg": b"a", "b.jpg": b"b"})
  rows = [{**FLAT, "image_path": f"{n}.jpg", "rank": r} for n, r in ranks.items()]
  raw = opened(write_json(tmp_path / "train_1.json", rows), "imagereward")
  assert ranked(raw) == ranked(flat)[:1] and images(raw)["d.jpg"] == b"d"


def test_rapidata(tmp_path):
  sides = {"prompt": "p", "image1": struct("a")[0], "image2": struct("b")[0]}
  votes = [(19, 7), (13, 13), (0, 0)]
  rows = [
    {**sides, "votes_image1": a, "votes_image2": b, "model1": "m"} for a, b in votes
  ]
  found = opened(parquet(tmp_path / "v.parquet", rows), "rapidata")
  made, data = pairs(found)
  assert made == [("p", "a.jpg", "b.jpg", 0.7308), ("p", "a.jpg", "b.jpg", 0.5)]
  assert data == {"a.jpg": b"a", "b.jpg": b"b"} and found.dropped["unlabelled"] == 1
  names = [f"weighted_results_image{i}_preference" for i in (1, 2)]
  row = {
    **sides,
    **dict(zip(names, (0.3, 0.7))),
    "image1_path": "x/a",
    "image2_path": "y",
  }
  found = opened(parquet(tmp_path / "w.parquet", [row]), "rapidata_weighted")
  assert pairs(found) == ([("p", "x/a", "y", 0.3)], {"x/a": b"a", "y": b"b"})


EDITS = {
  "instructpix2pix": ("original_image", "edit_prompt", "edited_image"),
  "instructpix2pix_samples": ("input_image", "edit_prompt", "edited_image"),
  "magicbrush": ("source_img", "instruction", "target_img"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_with_one_result(tmp_path, name):
  source, text, result = EDITS[name]
  row = {source: struct("a")[0], text: "make it b", result: struct("b")[0]}
  found = opened(parquet(tmp_path / "e.parquet", [row]), name)
  assert ranked(found) == [("make it b", ["b.jpg"], [0], None)]
  assert [found.image_uids[i] for i in found.source_image] == ["a.jpg"]
  assert images(found) == {"a.jpg": b"a", "b.jpg": b"b"}
  built, _ = lists.build(found, "winners")
  assert [built.image_uids[i] for i in built.source_image] == ["a.jpg"]


def test_edits_both_ways_and_with_votes(tmp_path):
  row = {"input_image": struct("a")[0], "output_image": struct("b")[0]}
  row |= {"edit": "to b", "inverse_edit": "to a", "input": "an a", "output": "a b"}
  found = opened(parquet(tmp_path / "h.parquet", [row]), "hq_edit")
  assert ranked(found) == [
    ("to b", ["b.jpg"], [0], None),
    ("to a", ["a.jpg"], [0], None),
  ]
  assert [found.image_uids[i] for i in found.source_image] == ["a.jpg", "b.jpg"]
  sides = {"source_image": struct("s")[0], "instruct_prompt": "p"}
  sides |= {"left_output_image": struct("l")[0], "right_output_image": struct("r")[0]}
  votes = ("leftvote", "rightvote", "tievote", "bothbad_vote", "what")
  rows = [{**sides, "vote_type": vote} for vote in votes]
  found = opened(parquet(tmp_path / "v.parquet", rows), "genai_edit")
  assert [(uids, ranks) for _, uids, ranks, _ in ranked(found)] == [
    (["l.jpg", "r.jpg"], [0, 1]),
    (["r.jpg", "l.jpg"], [0, 1]),
    (["l.jpg", "r.jpg"], [0, 0]),
    (["l.jpg", "r.jpg"], [0, 0]),
  ]
  assert dict(found.dropped) == {"unlabelled": 1}
  assert images(found)["s.jpg"] == b"s"


def test_edits_in_turns(tmp_path):
  row = {"source_image": "a.jpg", "instruction_1": "1", "edit_image_1": "b.jpg"}
  row |= {"instruction_2": "2", "edit_image_2": "c.jpg"}
  write_json(tmp_path / "x.json", [])
  (tmp_path / "seed.jsonl").write_text(json.dumps(row))
  found = opened(tmp_path / "seed.jsonl", "seed_edit")
  assert ranked(found) == [("1", ["b.jpg"], [0], None), ("2", ["c.jpg"], [0], None)]
  assert [found.image_uids[i] for i in found.source_image] == ["a.jpg", "b.jpg"]
  assert images(found) == {f"{n}.jpg": n.encode() for n in "abc"}


def test_canonical_rows_with_votes_and_a_source_image(tmp_path):
  row = {"prompt": "p", "image_uids": ["a", "b"], "images": [b"a", b"b"]}
  row |= {"votes": [3, 9], "cond_image": b"s", "instruction": "do"}
  found = opened(parquet(tmp_path / "l.parquet", [row]), "lists")
  assert ranked(found) == [("do", ["b", "a"], [0, 1], None)]
  assert found.score.tolist() == [9, 3]
  assert images(found) == {"a": b"a", "b": b"b", "a/cond_image": b"s"}


def test_folders(tmp_path):
  for name, files in (
    ("cat", ("0-x.png", "1-y.jpg", "1-z.webp")),
    ("dog", ("best.png", "0-x.png")),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / "prompt.txt").write_text(f"a {name}\n")
    for file in files:
      (tmp_path / name / file).write_bytes(f"{name}/{file}".encode())
  found = opened(tmp_path, "folder")
  uids = ["cat/0-x.png", "cat/1-y.jpg", "cat/1-z.webp"]
  assert ranked(found) == [("a cat", uids, [0, 1, 1], None)]
  assert images(found) == {uid: uid.encode() for uid in uids}
  assert dict(found.dropped) == {"unlabelled": 1}
  with pytest.raises(UserError, match=r"holds no folder with a prompt\.txt"):
    sources.read(tmp_path / "cat", "folder")


def test_webdataset(tmp_path):
  row = json.dumps({"prompt": "p", "ranks": [1, 0], "user_id": 3}).encode()
  bad = json.dumps({"prompt": "p", "ranks": [1, 2]}).encode()
  write_tar(
    tmp_path / "0.tar",
    [("x/1.json", row), ("x/1.0.png", b"zero"), ("x/1.1.png", b"one"), ("2.txt", b"")],
  )
  write_tar(tmp_path / "1.tar", [("x/1.0.png", b"other"), ("x/1.json", bad)])
  found = opened(tmp_path, "webdataset")
  assert ranked(found) == [("p", ["x/1.1", "x/1.0"], [0, 1], "3")]
  assert images(found) == {"x/1.0": b"zero", "x/1.1": b"one"}
  assert dict(found.dropped) == {"bad_label": 1}
  write_tar(tmp_path / "1.tar", [("3.json", b"[1]")])
  with pytest.raises(UserError, match=r"1\.tar, 3\.json: expected a JSON object"):
    sources.read(tmp_path)
  write_tar(tmp_path / "n.tar", [("2.txt", b"")])
  with pytest.raises(UserError, match=r"n\.tar: no rows"):
    sources.read(tmp_path / "n.tar")


def test_labels_of_json_need_no_images(tmp_path):
  rows = [{"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]}]
  (tmp_path / "train.json").write_text(json.dumps(rows))
  assert sources.read(tmp_path).images is None
  write_tar(tmp_path / "images.tar", [("a.jpg", b"a")])
  assert sources.read(tmp_path / "train.json").images.present.tolist() == [True, False]


def test_several_sources_are_opened_side_by_side(tmp_path):
  rows = [{"prompt": "p", "image_uids": ["a", "b"], "ranks": [0, 1]}]
  paths = [parquet(tmp_path / f"{i}.parquet", rows * (i + 1)) for i in range(2)]
  found = [sources.open(path) for path in paths]
  assert [len(source.read()) for source in found] == [1, 2]


@pytest.mark.parametrize("how", ["split", "file", "folder", "stem"])
def test_the_benchmark_split_never_trains(tmp_path, how):
  rows = [{"prompt": "p", "image_uids": ["a", "b"], "ranks": [0, 1]}]
  folder = tmp_path / ("test_unique" if how == "folder" else "data")
  folder.mkdir()
  name = "x" if how == "folder" else "test_unique"
  name += "-00000-of-00001" if how != "stem" else ""
  path = parquet(folder / f"{name}.parquet", rows)
  where = {"split": folder, "folder": folder}.get(how, path)
  split = "test_unique" if how == "split" else None
  with pytest.raises(
    UserError, match=r"the split 'test_unique' is .* never trained on"
  ):
    sources.refuse_training(sources.open(where, split=split))
  other = parquet(folder.parent / "train-00000-of-00001.parquet", rows)
  sources.refuse_training(sources.open(other))


def test_unknown_columns_are_met_with_the_nearest(tmp_path):
  path = parquet(tmp_path / "x.parquet", [{"captions": "p", "jpg": b""}])
  with pytest.raises(UserError, match="'captions' may be 'caption' of pickapic"):
    sources.read(path)
  rows = [{"prompt": "p", "path1": "a", "path_2": "b"}]
  write_json(tmp_path / "x.json", rows)
  with pytest.raises(
    UserError, match="no column 'path2'; the nearest one there is 'path_2'"
  ):
    sources.read(tmp_path / "x.json")


def test_scores_within_the_tolerance_are_ties(tmp_path):
  row = {"prompt": "p", "image_uids": list("abcd"), "scores": [0.0, 1.9, 1.2, 0.6]}
  source = sources.read(parquet(tmp_path / "s.parquet", [row]))

  def ranks(tolerance):
    built, _ = lists.build(source, "scores", tie_tolerance=tolerance)
    return dict(zip([built.image_uids[i] for i in built.image], built.rank.tolist()))

  assert ranks(0.0) == {"b": 0, "c": 1, "d": 2, "a": 3}
  assert ranks(1.0) == {"b": 0, "c": 0, "d": 1, "a": 1}  # groups do not chain
  row["scores"] = [0.0, 1.0, 3.0, 4.5]
  parquet(tmp_path / "s.parquet", [row])
  source = sources.read(tmp_path / "s.parquet")
  assert ranks(1.0) == {"d": 0, "c": 1, "b": 2, "a": 2}  # exactly so far is near
  with pytest.raises(UserError, match=r"Set data\.strategy='scores'"):
    lists.build(source, "levels", tie_tolerance=1.0)
  with pytest.raises(UserError, match="tie_tolerance is -1"):
    lists.build(source, "scores", tie_tolerance=-1)


def test_shares_within_the_tolerance_are_ties(tmp_path):
  def share(first):
    path = tmp_path / "p.parquet"
    sources.write_pickapic(
      path,
      caption=["p", "p"],
      image_0_uid=["a", "a"],
      image_1_uid=["b", "c"],
      jpg_0=[b"a", b"a"],
      jpg_1=[b"b", b"c"],
      label_0=[first, 1.0],
    )
    built, report = lists.build(sources.read(path), "levels", tie_tolerance=0.1)
    return dict(
      zip([built.image_uids[i] for i in built.image], built.rank.tolist())
    ), report

  near, report = share(0.55)
  assert near == {"a": 0, "b": 0, "c": 1} and report.ties == 1
  far, report = share(0.56)
  assert far == {"a": 0, "b": 1, "c": 1} and report.ties == 0
  assert np.isclose(report.judgements_used, 2)
