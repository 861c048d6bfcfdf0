"""The Beam pipeline gives the lists, the account and the images of one machine."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from lpo_jax.configs import common
from lpo_jax.data import (
  beam_steps,
  builder,
  judgements,
  lists,
  prepared,
  ranked,
  sources,
)
from lpo_jax.errors import UserError

FILES = 3


def write_file(path, number, count):
  """Judgements with stars, circles, ties, contradictions, and every refused kind.

  Prompts and images are spread over the files; images 0 to 3 belong to all prompts.
  Another file shows another picture, and another generator, under the same uid.
  """
  rng = np.random.default_rng(number)
  prompt = rng.integers(0, 60, count)
  a, b = rng.integers(0, 9, (2, count))
  label = rng.choice([1.0, 0.0, 0.5, np.nan], count, p=[0.5, 0.3, 0.15, 0.05])

  def uids(images):
    return [str(i) if i < 4 else f"{p}-{i}" for p, i in zip(prompt, images)]

  caption = [f"prompt {p} {'é' * (p % 3)}" for p in prompt]
  caption[0] = None
  sources.write_pickapic(
    path,
    caption=caption,
    image_0_uid=uids(a),
    image_1_uid=uids(b),
    jpg_0=[f"{number}:{uid}".encode() for uid in uids(a)],
    jpg_1=[f"{number}:{uid}".encode() for uid in uids(b)],
    label_0=label,
    user_id=rng.integers(0, 4, count),
    model_0=[f"model {number}"] * count,
    model_1=["model 1"] * count,
    row_group_size=100,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("judged")
  for number in range(FILES):
    write_file(folder / f"train-{number:05d}-of-{FILES:05d}.parquet", number, 1000)
  empty = pq.read_table(folder / "train-00000-of-00003.parquet").slice(0, 0)
  pq.write_table(empty, folder / "train-99999-of-00003.parquet")
  return folder


def spelled(built, *, images=False):
  """Every list in words, in canonical order."""
  found = []
  for i in range(len(built)):
    span = slice(built.offsets[i], built.offsets[i + 1])
    image = built.image[span].tolist()
    row = [
      built.prompts[built.prompt[i]],
      built.users[built.user[i]] if built.user[i] >= 0 else "",
      [built.image_uids[j] for j in image],
      built.rank[span].tolist(),
      int(built.list_id[i]),
      float(built.weight[i]),
      built.score[span].tolist(),
    ]
    if images:
      row.append([built.images.read(j) for j in image])
      row.append([built.models[built.image_model[j]] for j in image])
    found.append(row)
  return sorted(found)


@pytest.mark.parametrize("group_by", lists.GROUPS)
@pytest.mark.parametrize("strategy", lists.STRATEGIES)
def test_parts_build_what_the_whole_builds(folder, strategy, group_by):
  settings = dict(
    strategy=strategy,
    group_by=group_by,
    max_size=4,
    ties="drop" if strategy == "paths" else "keep",
    weight="num_example_per_prompt",
  )
  whole, expected = lists.build(sources.read(folder), **settings)
  pieces = {}
  for file in builder.plan(folder, **settings).files[:FILES]:
    for part, piece in beam_steps.deal(sources.read(file), 7):
      pieces.setdefault(part, []).append(piece)
  assert sorted(pieces) == list(range(7))
  made = [lists.build(judgements.concatenate(pieces[i]), **settings) for i in range(7)]
  together = sorted(row for built, _ in made for row in spelled(built))
  assert together == spelled(whole)
  report = ranked.add_reports(report for _, report in made)
  # An image of several prompts may be in several parts, and counts in each.
  assert report.images > expected.images
  assert dataclasses.replace(report, images=expected.images) == expected
  keys = [key for built, _ in made for key, _ in beam_steps.rows(built)]
  assert sorted(keys) == sorted(key for key, _ in beam_steps.rows(whole))
  assert len(set(keys)) == len(whole)


def test_a_prompt_goes_where_its_text_says(folder):
  source = sources.read(folder)
  parts = dict(beam_steps.deal(source, 5))
  assert sum(len(piece) for piece in parts.values()) == len(source)
  assert not set(parts[1].prompts) & set(parts[2].prompts)
  assert parts[0].dropped == source.dropped and parts[1].dropped == {}
  # Nothing was judged of the others, but what was refused still has to be counted.
  one = judgements.take(source, np.flatnonzero(source.prompt == source.prompt[0]))
  assert {i: len(piece) for i, piece in beam_steps.deal(one, 1)} == {0: len(one)}
  assert (
    sum(piece.dropped == source.dropped for _, piece in beam_steps.deal(one, 50)) == 1
  )


def test_pieces_of_judgements_make_the_whole_again():
  source = judgements.Judgements(
    prompts=["q", "p"],
    image_uids=["c", "b", "a"],
    users=["u", "t"],
    prompt=np.array([0, 1, 1], np.int32),
    user=np.array([-1, 1, -1], np.int32),
    image_a=np.array([0, 1, 0], np.int32),
    image_b=np.array([1, 2, 2], np.int32),
    label=np.array([1, 0, 0.5], np.float32),
    weight=np.array([1, 2, 3], np.float32),
    dropped={"unlabelled": 2},
  )
  first, second = (judgements.take(source, np.array(rows)) for rows in ([0, 1], [2]))
  assert (first.users, first.user.tolist()) == (["t"], [-1, 0])
  assert (second.users, second.user.tolist()) == ([], [-1])
  assert second.image_uids == ["c", "a"] and second.prompts == ["p"]
  whole = judgements.concatenate([first, second])
  assert (whole.prompts, whole.image_uids) == (["p", "q"], ["a", "b", "c"])
  assert whole.prompt.tolist() == [1, 0, 0] and whole.user.tolist() == [-1, 0, -1]
  assert whole.image_a.tolist() == [2, 1, 2] and whole.image_b.tolist() == [1, 0, 0]
  assert whole.label.tolist() == [1, 0, 0.5] and whole.weight.tolist() == [1, 2, 3]
  assert whole.dropped == {"unlabelled": 4}  # `take` keeps it; `deal` gives it to one


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
  """What one run of the pipeline wrote."""
  pytest.importorskip("apache_beam", reason="Apache Beam is not installed: [beam]")
  out = tmp_path_factory.mktemp("made")
  work = builder.plan(folder, parts=4, **SETTINGS)
  assert len(work.files) == FILES + 1
  path, report = builder.prepare(work, out)
  return out, path, report


SETTINGS = dict(strategy="scores", group_by="prompt_user", max_size=5)


def test_the_pipeline_writes_what_one_machine_builds(folder, made):
  out, path, report = made
  whole, expected = lists.build(sources.read(folder), **SETTINGS)
  assert report == expected
  assert json.loads((out / builder.REPORT).read_text()) == expected.as_dict()
  assert sorted(p.name for p in out.iterdir()) == [builder.REPORT, builder.NAME]
  found = sources.read(path)
  assert spelled(found, images=True) == spelled(whole, images=True)
  # As the cache job builds them again from the finished lists, in its own order.
  assert found.score.any()
  again, _ = lists.build(found, "levels", max_size=5)
  assert spelled(again) == spelled(whole)


def test_labels_are_read_from_beside_the_records(made, monkeypatch):
  _, path, _ = made
  opened = prepared.open_split(sources_path(path), None)
  names = ["prompt", "image_uids", "ranks", "scores", "weights", "user_id", "models"]
  beside = prepared.read_columns(opened, names)
  assert len(beside) == len(opened)

  def refuse(*_):
    raise AssertionError("a record was read")

  # The columns of other records are none of ours: then every record is read.
  other = dataclasses.replace(opened, shard_lengths=[1, len(opened) - 1])
  with monkeypatch.context() as patched:
    patched.setattr(prepared.Prepared, "parse", refuse)
    sources.read(path)
    with pytest.raises(AssertionError, match="a record was read"):
      prepared.read_columns(other, names)
  from_records = prepared.read_columns(other, names)
  assert from_records.to_pylist() == beside.to_pylist()


def sources_path(path):
  from etils import epath

  return epath.Path(path)


def test_refusals(folder, made, tmp_path):
  out, path, _ = made
  work = builder.plan(folder, **SETTINGS)
  with pytest.raises(UserError, match=r"there is a data set .* already"):
    builder.prepare(work, out)
  # A worker's refusal reaches the user as it was said.
  broken = folder / "train-00000-of-00003.parquet"
  cut = tmp_path / "cut.parquet"
  pq.write_table(pq.read_table(broken).drop_columns(["label_1"]), cut)
  with pytest.raises(UserError, match=r"^\S+cut\.parquet has no column 'label_1'"):
    builder.prepare(builder.plan(cut, "pickapic", **SETTINGS), tmp_path / "out")
  assert list((tmp_path / "out").iterdir()) in ([], [tmp_path / "out" / "ranked_lists"])
  with pytest.raises(UserError, match="Ranked lists need no building"):
    next(beam_steps.read_file((0, path), source="tfds", parts=1))


def test_the_command(tmp_path, capsys, folder):
  assert builder.main(["--path", str(tmp_path / "x"), "--out", "y", "--strategy=pairs"])
  assert "there is no such file or folder" in capsys.readouterr().err
  command = ["--path", str(folder), "--out", "y"]
  assert builder.main([*command, "--strategy", "path"]) == 2
  assert "did you mean 'paths'" in capsys.readouterr().err
  assert builder.main([*command, "--strategy=paths", "--parts=0"]) == 2
  capsys.readouterr()
  assert builder.main([*command, "--strategy=paths", "--images", "z"]) == 2
  assert "--job cache takes data.images" in capsys.readouterr().err
  flags = builder.parser().parse_args([*command, "--strategy=paths"])
  data = common.get_config().data
  names = ("max_list_size", "group_by", "ties", "weight", "tie_tolerance", "source")
  for name in (*names, "split"):
    assert getattr(flags, name) == data[name], name


def test_what_only_measures_is_not_built(tmp_path):
  write_file(tmp_path / "test_unique-00000-of-00001.parquet", 0, 5)
  with pytest.raises(UserError, match=r"'test_unique' is .* never trained on"):
    builder.plan(tmp_path, strategy="paths")


def test_lists_carry_their_scores():
  source = judgements.Judgements(
    *(["p"], list("abc"), [], np.zeros(2, np.int32), np.full(2, -1)),
    *(np.array([0, 1]), np.array([1, 2]), np.array([0.7, 0.7]), np.ones(2)),
  )
  for strategy, scores in (("scores", [0.7, 0.5, 0.3]), ("paths", [])):
    ((_, row),) = beam_steps.rows(lists.build(source, strategy)[0])
    assert row["image_uids"] == ["a", "b", "c"] and row["ranks"] == [0, 1, 2]
    assert row["scores"] == pytest.approx(scores)


def test_images_that_are_missing_beside_the_labels(tmp_path):
  rows = [{"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [1, 0]}]
  path = tmp_path / "train.json"
  path.write_text(json.dumps(rows))
  (tmp_path / "a.png").write_bytes(b"image")
  pytest.importorskip("apache_beam", reason="Apache Beam is not installed: [beam]")
  with pytest.raises(UserError, match=r"1 of the 2 images .*'b\.png'.*--job cache"):
    list(beam_steps.read_file((0, str(path)), source="hpdv2", parts=1))
