"""Tensors out of torch's `.pt`, `.pth` and `.bin` files, without torch and without risk.

Such a file is a zip archive: a pickle that says how tensors lie in storages, and the
storages as plain bytes. A pickle is a program, and unpickling runs it. Here it may call
nothing but what rebuilds a tensor; every other name that it asks for is refused.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lpo_jax.errors import UserError

# torch's classes of storages -> what their bytes are.
STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
  "ComplexFloatStorage": "complex64",
  "ComplexDoubleStorage": "complex128",
}
# How files of before torch 1.6 begin: a magic number as a pickle, or a tar archive.
OLD_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
CONVERT = (
  "Where you trust it, convert it once, with torch: `safetensors.torch.save_file("
  "torch.load(FILE, 'cpu', weights_only=True), 'model.safetensors')`."
)


# Named tuples, not dataclasses: a pickle cannot set anything on one.
class Tensor(NamedTuple):
  """A tensor of the file, read when asked for.

  Attributes:
    shape: its sizes.
    dtype: what NumPy, or ml_dtypes, calls its numbers.
    read: gives it as an array in C order.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class _Allowed:
  """A callable that a pickle may name: nothing on it can be set or looked into."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable[..., Any]):
    object.__setattr__(self, "_call", call)

  def __setattr__(self, name: str, value: Any) -> None:
    raise pickle.UnpicklingError(f"the pickle sets {name!r} of what it may only call")

  def __call__(self, *args: Any) -> Any:
    return self._call(*args)


class _Kind(NamedTuple):
  dtype: str


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  count: int


class _Archive:
  """The storages of one file, mapped into memory."""

  def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile, root: str):
    self.path, self.archive, self.root = path, archive, root

  @functools.lru_cache(maxsize=4)  # noqa: B019 (lives as long as the tensors)
  def array(self, storage: _Storage) -> np.ndarray:
    entry = self.archive.getinfo(f"{self.root}data/{storage.key}")
    size = storage.count * storage.dtype.itemsize
    if entry.compress_type != zipfile.ZIP_STORED:
      return np.frombuffer(self.archive.read(entry)[:size], storage.dtype)
    with open(self.path, "rb") as file:
      file.seek(entry.header_offset + 26)
      name, extra = np.frombuffer(file.read(4), "<u2")
    start = entry.header_offset + 30 + int(name) + int(extra)
    data = np.memmap(self.path, np.uint8, mode="r", offset=start, shape=(size,))
    return data.view(storage.dtype)

  def storage(self, identity: Any) -> _Storage:
    """Turns a pickle's persistent id into a storage."""
    tag, kind, key, _, count = identity
    entry = f"{self.root}data/{key}"
    if tag != "storage" or not isinstance(kind, _Kind):
      raise pickle.UnpicklingError(f"unknown persistent id {identity!r}")
    dtype = jnp.dtype(kind.dtype)
    if self.archive.getinfo(entry).file_size < count * dtype.itemsize or count < 0:
      raise pickle.UnpicklingError(f"{entry} is shorter than the pickle says")
    return _Storage(str(key), dtype, int(count))

  def tensor(
    self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
  ) -> Tensor:
    """Rebuilds a view of a storage; grad flags and hooks mean nothing here."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if not isinstance(storage, _Storage) or len(size) != len(stride):
      raise pickle.UnpicklingError("a tensor that is no view of a storage")
    if min((offset, *size, *stride)) < 0:
      raise pickle.UnpicklingError("a tensor with negative sizes")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and last >= storage.count:
      raise pickle.UnpicklingError("a tensor that reaches beyond its storage")

    def read() -> np.ndarray:
      data = self.array(storage)[offset:]
      steps = tuple(step * storage.dtype.itemsize for step in stride)
      view = np.lib.stride_tricks.as_strided(data, size, steps, writeable=False)
      return np.array(view, order="C", copy=None)

    return Tensor(size, storage.dtype, read)


class _Unpickler(pickle.Unpickler):
  def __init__(self, stream: Any, archive: _Archive):
    super().__init__(stream)
    self.persistent_load = archive.storage
    self.allowed: dict[tuple[str, str], Any] = {
      ("torch._utils", "_rebuild_tensor_v2"): _Allowed(archive.tensor),
      ("torch._utils", "_rebuild_parameter"): _Allowed(lambda data, *_: data),
      ("torch", "Size"): _Allowed(tuple),
      # Fresh ones: a pickle may set attributes of an instance, never of a class.
      ("collections", "OrderedDict"): _Allowed(collections.OrderedDict),
      **{("torch", name): _Kind(dtype) for name, dtype in STORAGES.items()},
    }

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in self.allowed:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}")
    return self.allowed[module, name]


def read(path: str | os.PathLike) -> Any:
  """Reads what `torch.save` wrote: tensors in dicts, lists and tuples.

  Args:
    path: a file that torch 1.6 or later wrote.

  Returns:
    The same containers, with a `Tensor` in the place of every tensor and parameter.

  Raises:
    UserError: no such file, an older or broken one, or a pickle that asks for anything
      but tensors: the name that it asked for is in the message.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"expected a file {path}, and there is none.")
  with open(path, "rb") as file:
    start = file.read(512)
  if start[:4] != b"PK\x03\x04":
    old = start.startswith(OLD_PICKLE) or b"ustar" in start or _is_old_tar(start)
    kind = "is of before torch 1.6" if old else "is not a file of torch.save"
    raise UserError(f"{path} {kind}; expected a zip archive of torch.save. {CONVERT}")
  try:
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    root = next(name for name in names if name.endswith("data.pkl"))[: -len("data.pkl")]
    order = f"{root}byteorder"
    if order in names and archive.read(order) != b"little":
      raise pickle.UnpicklingError("its numbers are big-endian")
    with archive.open(f"{root}data.pkl") as stream:
      return _Unpickler(stream, _Archive(path, archive, root)).load()
  except pickle.UnpicklingError as error:
    raise UserError(
      f"{path} is refused: {error}, and only tensors, dicts, lists, tuples, numbers and "
      f"texts are read. A pickle can run any program. {CONVERT}"
    ) from None
  except (zipfile.BadZipFile, StopIteration):
    raise UserError(
      f"{path} is no whole archive of torch.save. It may be cut short, or a "
      "TorchScript program: fetch it again, or save its state_dict()."
    ) from None
  except Exception as error:  # whatever a pickle that is none can provoke
    raise UserError(
      f"{path} cannot be read ({type(error).__name__}: {error}). {CONVERT}"
    ) from None


def _is_old_tar(start: bytes) -> bool:
  return start[257:262] == b"ustar" or start.startswith((b"sys_info", b"pickle\0"))


def state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
  """Reads the tensors of a network, wherever in the file they are.

  They may be at the top, or below "state_dict", "model" or "params"; and
  `DistributedDataParallel` may have put "module." before their names.

  Raises:
    UserError: see `read`; or there are no tensors.
  """
  found = read(path)
  for key in ("state_dict", "model", "params"):
    if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
      found = found[key]
  values = found if isinstance(found, Mapping) else {}
  tensors = {str(name): v for name, v in values.items() if isinstance(v, Tensor)}
  if not tensors:
    raise UserError(
      f"{path} holds no tensors by name; expected a state_dict, or one below the key "
      f"'state_dict'. It holds: {sorted(map(str, values))[:8] or type(found).__name__}."
    )
  if all(name.startswith("module.") for name in tensors):
    tensors = {name.removeprefix("module."): v for name, v in tensors.items()}
  return tensors
