"""torch's files read without torch: the same bytes, and nothing else gets through."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.pretrained import pickles


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


def tensors(torch):
  """Every kind of view and number that a checkpoint may hold."""
  base = torch.arange(24.0).reshape(4, 6) / 7
  return {
    "whole": base,
    "transposed": base.t(),
    "strided": base[1:3, ::2],
    "late": base.reshape(-1)[17:],
    "expanded": base[0, :1].expand(3, 2),
    "scalar": base[2, 3],
    "empty": base[:0],
    "parameter": torch.nn.Parameter(base.clone()),
    "half": base.half(),
    "bfloat16": base.bfloat16().t(),
    "double": base.double(),
    "long": torch.arange(5),
    "int": torch.arange(5, dtype=torch.int32),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([[True], [False]]),
    "complex": torch.complex(base, -base),
  }


def raw(torch, tensor):
  """The bytes of a tensor in C order."""
  tensor = tensor.detach().contiguous()
  return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_byte_exact_with_torch(torch, tmp_path):
  path = tmp_path / "file.pt"
  torch.save({"epoch": 3, "all": [tensors(torch), ("a", None, 2.5)]}, path)
  theirs = torch.load(path, weights_only=True)
  ours = pickles.read(path)
  assert ours["epoch"] == 3 and ours["all"][1] == ("a", None, 2.5)
  assert ours["all"][0].keys() == theirs["all"][0].keys()
  for name, tensor in ours["all"][0].items():
    array, other = tensor.read(), theirs["all"][0][name]
    assert array.dtype == tensor.dtype and str(array.dtype) == str(other.dtype)[6:], (
      name
    )
    assert array.shape == tensor.shape == tuple(other.shape), name
    other = other.reshape(1) if other.ndim == 0 else other
    assert array.tobytes() == raw(torch, other), name


def test_storages_are_shared_in_the_file(torch, tmp_path):
  base = torch.zeros(1000)
  torch.save(
    {"a": base, "b": base[10:20], "c": base.view(10, 100).t()}, tmp_path / "s.pt"
  )
  assert os.path.getsize(tmp_path / "s.pt") < 2 * 4000
  found = pickles.state_dict(tmp_path / "s.pt")
  assert {k: v.shape for k, v in found.items()} == {"a": (1000,), "b": (10,), "c": (100, 10)}  # fmt: skip


def test_a_module_s_state_and_where_it_may_lie(torch, tmp_path):
  module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  state = module.state_dict()  # an OrderedDict with attributes of its own
  wrapped = {f"module.{name}": value for name, value in state.items()}
  for i, content in enumerate(
    (state, {"state_dict": wrapped, "epoch": 2}, {"model": state})
  ):
    torch.save(content, tmp_path / f"{i}.pt")
    found = pickles.state_dict(tmp_path / f"{i}.pt")
    assert found.keys() == state.keys()
    for name, value in state.items():
      assert np.array_equal(found[name].read(), value.numpy()), name
  torch.save({"epoch": 2}, tmp_path / "none.pt")
  with pytest.raises(UserError, match="holds no tensors by name"):
    pickles.state_dict(tmp_path / "none.pt")


class Evil:
  """What a pickle can do to whoever loads it."""

  def __init__(self, *call):
    self.call = call

  def __reduce__(self):
    return self.call[0], self.call[1:]


@pytest.mark.parametrize(
  ("call", "words"),
  [
    ((os.system, "touch {}"), r"asks for (posix|nt)\.system"),
    ((eval, "open('{}', 'w')"), r"asks for (builtins|__builtin__)\.eval"),
    ((getattr, os, "sep"), r"asks for (builtins|__builtin__)\.getattr"),
  ],
  ids=["system", "eval", "getattr"],
)
def test_refuses_to_call_anything(torch, tmp_path, call, words):
  mark = tmp_path / "was_here"
  call = tuple(c.format(mark) if isinstance(c, str) and "{}" in c else c for c in call)
  if call[0] is getattr:
    call = (getattr, Evil(os.getenv, "HOME"), "lower")
    words = r"asks for (builtins|__builtin__)\.getattr|asks for os\.getenv"
  torch.save({"state_dict": {"w": torch.zeros(2)}, "x": Evil(*call)}, tmp_path / "e.pt")
  with pytest.raises(UserError, match=words) as refusal:
    pickles.read(tmp_path / "e.pt")
  assert "weights_only=True" in str(refusal.value)
  assert not mark.exists()


def test_refuses_a_whole_module_by_its_class(torch, tmp_path):
  torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
  with pytest.raises(UserError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
    pickles.read(tmp_path / "module.pt")


def archive(path, program, data=bytes(16)):
  """Writes an archive around a handwritten pickle."""
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("archive/data.pkl", program)
    file.writestr("archive/data/0", data)


def view(offset, size, stride, count=4):
  """A pickle of one tensor over storage 0, which has 16 bytes."""

  class Storage(pickle.Pickler):
    def persistent_id(self, obj):
      return obj.identity if isinstance(obj, Identity) else None

  class Identity:
    pass

  import io

  import torch

  identity = Identity()
  identity.identity = ("storage", torch.FloatStorage, "0", "cpu", count)
  stream = io.BytesIO()
  arguments = (identity, offset, size, stride, False, None)
  Storage(stream, 2).dump({"w": Evil(torch._utils._rebuild_tensor_v2, *arguments)})
  return stream.getvalue()


@pytest.mark.parametrize(
  ("program", "words"),
  [
    ((1, (4,), (1,)), "reaches beyond its storage"),
    ((0, (2, 2), (3, 1)), "reaches beyond its storage"),
    ((0, (2,), (-1,)), "negative"),
    ((0, (4,), (1,), 5), "shorter than the pickle says"),
    ((0, (4,), ()), "no view of a storage"),
  ],
  ids=["offset", "stride", "negative", "storage", "rank"],
)
def test_refuses_views_outside_of_their_storage(torch, tmp_path, program, words):
  archive(tmp_path / "good.pt", view(0, (2, 2), (2, 1)))
  assert pickles.state_dict(tmp_path / "good.pt")["w"].read().shape == (2, 2)
  archive(tmp_path / "bad.pt", view(*program))
  with pytest.raises(UserError, match=words):
    pickles.read(tmp_path / "bad.pt")


def test_a_pickle_cannot_change_what_reads_it(tmp_path):
  # BUILD, which sets attributes, on the function that rebuilds tensors.
  program = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00_callK\x01s\x86b."
  )
  archive(tmp_path / "b.pt", program)
  with pytest.raises(UserError, match="sets '_call'"):
    pickles.read(tmp_path / "b.pt")


def test_refuses_files_of_before_and_what_is_none(torch, tmp_path):
  torch.save(
    {"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
  )
  (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
  (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
  for name, words in (
    ("old", "before torch 1.6.*save_file"),
    ("cut", "no whole archive"),
    ("pointer", "not a file of torch.save"),
    ("missing", "there is none"),
  ):
    with pytest.raises(UserError, match=words):
      pickles.read(tmp_path / f"{name}.pt")


def test_compressed_archives_are_read_too(torch, tmp_path):
  torch.save({"w": torch.arange(4.0)}, tmp_path / "plain.pt")
  small = zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED)
  with zipfile.ZipFile(tmp_path / "plain.pt") as plain, small:
    for name in plain.namelist():
      small.writestr(name, plain.read(name))
  assert pickles.state_dict(tmp_path / "small.pt")["w"].read().tolist() == [0, 1, 2, 3]
