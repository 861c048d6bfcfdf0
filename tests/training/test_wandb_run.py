"""Weights & Biases: only when asked for, the rows of metrics.jsonl, one run."""

import json
import os
import struct
import sys

import pytest

from lpo_jax.errors import UserError
from lpo_jax.training import wandb_run

ROWS = [{"step": n, "loss": 1.0 / n} for n in (1, 2, 3)]


def test_nothing_is_imported_where_no_project_is_named(tmp_path, monkeypatch):
  (tmp_path / "wandb.py").write_text("raise AssertionError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  assert wandb_run.begin("", tmp_path, {}) is None
  assert "wandb" not in sys.modules


def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="pip install wandb"):
    wandb_run.begin("project", tmp_path, {})


def records(data):
  """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
  at, parts, block = 7, [], 32768
  while at + 7 <= len(data):
    if block - at % block < 7:  # no room for a record's header: zeros
      at += block - at % block
      continue
    _, length, kind = struct.unpack("<IHB", data[at : at + 7])
    parts.append(data[at + 7 : at + 7 + length])
    at += 7 + length
    if kind in (1, 4):  # whole, or the last part
      yield b"".join(parts)
      parts = []


def sent(workdir):
  """The run's id and the rows in the files of all offline sessions, in order."""
  from wandb.proto import wandb_internal_pb2

  ids, rows = set(), []
  for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
    for data in records(file.read_bytes()):
      record = wandb_internal_pb2.Record.FromString(data)
      if record.HasField("run"):
        ids.add(record.run.run_id)
      if record.HasField("history"):
        row = {
          (item.key or item.nested_key[0]): json.loads(item.value_json)
          for item in record.history.item
        }
        rows.append({k: v for k, v in row.items() if not k.startswith("_")})
  return ids, rows


@pytest.mark.slow
def test_real_offline_sessions_are_one_run_and_every_row_once(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
  first = wandb_run.begin("project", tmp_path, {"seed": 1})  # sends what was there
  first.log(ROWS[1])
  first.close()
  lines = [json.dumps(row) + "\n" for row in ROWS[:2]]
  (tmp_path / "metrics.jsonl").write_text("".join(lines))
  second = wandb_run.begin("project", tmp_path, {"seed": 1})
  second.log(ROWS[1])  # computed again after a resume: not sent again
  second.log(ROWS[2])
  second.rewind(2)
  second.log({"step": 3, "loss": 9.0})  # after a rollback it is another row
  second.close()
  wandb.teardown()  # its own process writes the end of the file
  ids, rows = sent(tmp_path)
  assert ids == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
  assert rows == [*ROWS, {"step": 3, "loss": 9.0}]
