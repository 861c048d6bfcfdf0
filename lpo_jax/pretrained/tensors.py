"""Files of tensors: safetensors read by slices, and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpo_jax import parallel
from lpo_jax.errors import UserError
from lpo_jax.pretrained import names

DTYPES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
}


class Weights:
  """The tensors of one network by today's names, read only when asked for."""

  def __init__(self, files: list[pathlib.Path], kind: str, stack: contextlib.ExitStack):
    from safetensors import SafetensorError, safe_open

    self.sources: dict[str, tuple[Any, str]] = {}
    for path in files:
      try:
        handle = stack.enter_context(safe_open(path, framework="numpy"))
      except SafetensorError as error:
        raise UserError(
          f"{path} is not a readable safetensors file ({error}). It may be cut short, "
          "or a git-lfs pointer: fetch it again."
        ) from None
      for old in handle.keys():  # noqa: SIM118 (not a dict)
        if not names.IGNORED.search(old):
          self.sources[names.todays_name(old, kind)] = (handle, old)

  def names(self) -> list[str]:
    return sorted(self.sources)

  def slices(self, name: str) -> Any:
    handle, old = self.sources[name]
    return handle.get_slice(old)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self.slices(name).get_shape())

  def array(self, name: str) -> np.ndarray:
    handle, old = self.sources[name]
    return handle.get_tensor(old)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a file to write that takes `path`'s place when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def order(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
  """The order of the safetensors library: wide types first, then by name."""
  return sorted(entries, key=lambda name: (-jnp.dtype(entries[name][0]).itemsize, name))


def size(dtype: str, shape: tuple[int, ...]) -> int:
  """Bytes of a tensor."""
  return jnp.dtype(dtype).itemsize * math.prod(shape)


def write(
  path: pathlib.Path,
  entries: Mapping[str, tuple[str, tuple[int, ...]]],
  read: Callable[[str], np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors one at a time, so that no second copy of the model is in memory.

  Args:
    path: the file.
    entries: (dtype, shape) by tensor name.
    read: gives a tensor when its turn has come.
    metadata: more entries of the header's own.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
  offset = 0
  for name in order(entries):
    dtype, shape = entries[name]
    end = offset + size(dtype, shape)
    header[name] = {
      "dtype": DTYPES[dtype],
      "shape": list(shape),
      "data_offsets": [offset, end],
    }
    offset = end
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)

  if not parallel.is_main_process():
    for name in order(entries):
      read(name)  # takes part in the gathering
    return
  with replacing(path) as partial, open(partial, "wb") as file:
    file.write(len(head).to_bytes(8, "little"))
    file.write(head)
    for name in order(entries):
      file.write(read(name).tobytes())
