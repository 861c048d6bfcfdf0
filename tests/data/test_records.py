"""Shard files: random access, and what a restart redoes."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from lpo_jax.data import records
from lpo_jax.errors import UserError

KEYS = [f"k{i}" for i in range(11)]


def _produce(positions):
  for p in positions:
    if p == 4:
      yield records.Record(KEYS[p], None, "broken")
    else:
      yield records.Record(KEYS[p], f"data {p}".encode() * 50, {"place": p})


def _write(folder, produce=_produce, **share):
  share = records.Share(**{"shard_size": 3, **share})
  return list(records.write_shards(folder, "x", KEYS, produce, share))


def test_reads_any_order_and_skips_what_was_refused(tmp_path):
  _write(tmp_path)
  store = records.Records(tmp_path, "x", 4)
  assert store.keys == [k for k in KEYS if k != "k4"]
  assert store.refused == [("k4", "broken")]
  assert [a["place"] for a in store.about] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
  got = store.read([9, 0, 4, 4])
  assert got == [f"data {p}".encode() * 50 for p in (10, 0, 5, 5)]
  assert store.read([]) == []
  with pytest.raises(IndexError):
    store.read([10])
  with pytest.raises(IndexError):
    store.read([-1])
  store.close()
  assert store.read([1]) == [b"data 1" * 50]  # reopened


def test_restart_redoes_only_the_unfinished_shard(tmp_path):
  class Killed(Exception):
    pass

  def dying(positions):
    for record in _produce(positions):
      if record.key == "k7":
        raise Killed
      yield record

  with pytest.raises(Killed):
    _write(tmp_path, dying)
  assert (tmp_path / "x-00002.array_record.partial").exists()
  assert not (tmp_path / "x-00002.json").exists()
  before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("x-0000[01]*")}
  redone, told = [], []

  def counting(positions):
    redone.extend(positions)
    return _produce(positions)

  _write(tmp_path, counting, progress=lambda n, fresh: told.append((n, fresh)))
  assert redone == [6, 7, 8, 9, 10]
  assert told == [(3, False), (3, False)] + [(1, True)] * 5
  after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("x-0000[01]*")}
  assert before == after
  store = records.Records(tmp_path, "x", 4)
  assert store.keys == [k for k in KEYS if k != "k4"]
  assert not list(tmp_path.glob("*.partial"))


def test_kill_9_leaves_no_corrupt_record(tmp_path):
  """A real SIGKILL in the middle of a shard, then a restart that finishes."""
  code = textwrap.dedent(f"""
    import os, signal
    from lpo_jax.data import records
    keys = [f"k{{i}}" for i in range(11)]
    def produce(positions):
      for p in positions:
        if p == 7:
          os.kill(os.getpid(), signal.SIGKILL)
        yield records.Record(keys[p], f"data {{p}}".encode() * 50, {{"place": p}})
    share = records.Share(shard_size=3)
    with records.only_writer({str(tmp_path)!r}):
      list(records.write_shards({str(tmp_path)!r}, "x", keys, produce, share))
  """)
  died = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False)
  assert died.returncode == -signal.SIGKILL
  with pytest.raises(UserError, match=r"lacks 2 of 4 x shards.*x-00002"):
    records.Records(tmp_path, "x", 4)

  def whole(positions):
    for p in positions:
      yield records.Record(KEYS[p], f"data {p}".encode() * 50, {"place": p})

  with records.only_writer(tmp_path):  # the dead process holds no lock
    _write(tmp_path, whole)
  store = records.Records(tmp_path, "x", 4)
  assert store.keys == KEYS
  assert store.read(range(11)) == [f"data {p}".encode() * 50 for p in range(11)]


def test_processes_share_the_shards(tmp_path):
  assert [s.keys for s in _write(tmp_path, process_index=1, process_count=2)] == [
    ["k3", "k5"],
    ["k9", "k10"],
  ]
  with pytest.raises(UserError, match="lacks 2 of 4"):
    records.Records(tmp_path, "x", 4)
  _write(tmp_path, process_index=0, process_count=2)
  assert len(records.Records(tmp_path, "x", 4)) == 10


def test_cut_shard_is_refused_and_redone(tmp_path):
  _write(tmp_path)
  path = tmp_path / "x-00001.array_record"
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(UserError, match="lacks 1 of 4 x shards"):
    records.Records(tmp_path, "x", 4)
  _write(tmp_path)
  assert len(records.Records(tmp_path, "x", 4)) == 10


def test_shard_of_other_keys_is_redone(tmp_path):
  _write(tmp_path)
  other = [*KEYS[:3], "new", *KEYS[4:]]
  share = records.Share(shard_size=3)
  redone = []

  def produce(positions):
    redone.extend(positions)
    for p in positions:
      yield records.Record(other[p], b"1", None)

  list(records.write_shards(tmp_path, "x", other, produce, share))
  assert redone == [3, 4, 5]


def test_second_writer_is_refused(tmp_path):
  with (
    records.only_writer(tmp_path),
    pytest.raises(UserError, match="another process"),
    records.only_writer(tmp_path),
  ):
    pass
  with records.only_writer(tmp_path):
    pass


def test_full_disk_says_so_and_loses_nothing(tmp_path):
  """A real refusal by the kernel, through the limit on the size of a file."""
  code = textwrap.dedent(f"""
    import resource
    from lpo_jax.data import records
    from lpo_jax.errors import UserError
    def produce(positions):
      for p in positions:
        yield records.Record(f"k{{p}}", b"x" * (60_000 if p > 5 else 1000), None)
    def write():
      share = records.Share(shard_size=3)
      keys = [f"k{{i}}" for i in range(9)]
      return list(records.write_shards({str(tmp_path)!r}, "x", keys, produce, share))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, most))
    for attempt in (write, lambda: records.write_json({str(tmp_path / "big")!r}, "x" * 200_000)):
      try:
        attempt()
      except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    print(len(write()), "shards")
  """)
  run = [sys.executable, "-c", code]
  done = subprocess.run(run, capture_output=True, text=True, check=False)
  first, second, third = done.stdout.splitlines()
  assert "x-00002.array_record: write() failed: File too large" in first
  assert "make room" in first and "same command" in first
  assert "big: [Errno 27]" in second
  assert third == "3 shards"
  assert len(records.Records(tmp_path, "x", 3)) == 9
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {
    f"x-0000{i}.{kind}" for i in range(3) for kind in ("array_record", "json")
  }


def test_forbidden_folder_says_so(tmp_path):
  (tmp_path / "file").touch()
  share = records.Share(shard_size=3)
  for use in (
    lambda folder: list(records.write_shards(folder, "x", KEYS, _produce, share)),
    lambda folder: records.write_json(folder / "x.json", 1),
    lambda folder: records.only_writer(folder).__enter__(),
  ):
    with pytest.raises(
      UserError, match=r"cannot write .*file/folder.*Expected a folder"
    ):
      use(tmp_path / "file" / "folder")


def test_work_goes_on_over_the_end_of_a_shard(tmp_path):
  """One call for all that is missing, so that reading ahead does not stop there."""
  asked = []

  def produce(positions):
    asked.append(list(positions))
    yield from _produce(positions)

  _write(tmp_path, produce)
  assert asked == [list(range(11))]
  (tmp_path / "x-00001.json").unlink()
  asked.clear()
  _write(tmp_path, produce)
  assert asked == [[3, 4, 5]]
  asked.clear()
  _write(tmp_path, produce)
  assert asked == []
