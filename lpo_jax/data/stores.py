"""Encoded images by index, read from wherever they lie only when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_BLOCKS_KEPT = 2  # a Pick-a-Pic row group is some 150 MB per image column
Block = Callable[[int, int], bytes]  # (row, item) -> encoded bytes


class ImageStore:
  """Images in blocks (a parquet row group, a record, a line) that are read whole.

  The same image may be seen in many places; `read` uses the first of them. One that is
  seen nowhere is absent: no order or sample has it.

  Attributes:
    count: number of images I.
    present: [I] bool, whether an image is seen anywhere.
  """

  def __init__(
    self,
    load: Callable[[int, int], Block],
    *,
    image: np.ndarray,
    block: np.ndarray,
    column: np.ndarray | int = 0,
    row: np.ndarray | int = 0,
    item: np.ndarray | int = 0,
    count: int | None = None,
  ):
    """Takes every place where an image is seen.

    Args:
      load: (block, column) -> function that returns the bytes at (row, item) in it. May
        raise UserError for a block that cannot be read.
      image: [S] which image is seen; without `count` every index at least once.
      block: [S] in which block.
      column: [S] which column of the block.
      row: [S] which row of the block.
      item: [S] which element of the row, where rows hold several images.
      count: number of images, where some may be absent.
    """
    places = np.broadcast_arrays(image, block, column, row, item)
    order = np.lexsort(places[:0:-1])
    self._places = np.stack([place[order] for place in places], 1).astype(np.int64)
    # Places are sorted as they lie in the files: the first of each image is its own.
    images, first = np.unique(self._places[:, 0], return_index=True)
    self.count = len(images) if count is None else count
    self._first = np.full(self.count, -1, np.int64)
    self._first[images] = first
    self.present = self._first >= 0
    self._load = functools.lru_cache(maxsize=_BLOCKS_KEPT)(load)

  @classmethod
  def of_bytes(cls, data: Sequence[bytes]) -> ImageStore:
    """Wraps images that are in memory."""
    rows = np.arange(len(data))
    zeros = np.zeros_like(rows)
    return cls(lambda *_: lambda row, _: data[row], image=rows, block=zeros, row=rows)

  def read(self, index: int) -> bytes:
    """Returns the encoded bytes of one image; b"" where the source holds none.

    Raises:
      UserError: the file cannot be read.
    """
    return self._at(self._first[index]) if self.present[index] else b""

  def file_order(self, indices: np.ndarray | None = None) -> np.ndarray:
    """Sorts image indices (default: all) as they lie in the files; no absent ones.

    Reading in this order touches every block once.
    """
    indices = np.arange(self.count) if indices is None else np.asarray(indices)
    indices = indices[self.present[indices]]
    return indices[np.argsort(self._first[indices], kind="stable")]

  def iterate(self, indices: np.ndarray | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields (index, bytes) of the images (default: all) in file order."""
    for index in self.file_order(indices):
      yield int(index), self.read(index)

  def sightings(self, indices: np.ndarray | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields (index, bytes) for every place of the images (default: all of them).

    Looks only into blocks that `iterate` would read for them anyway.
    """
    indices = np.arange(self.count) if indices is None else np.asarray(indices)
    wanted = np.zeros(self.count, bool)
    wanted[indices] = True
    indices = indices[self.present[indices]]
    image, block = self._places[:, 0], self._places[:, 1]
    read = np.isin(block, block[self._first[indices]])
    for place in np.flatnonzero(wanted[image] & read):
      yield int(image[place]), self._at(place)

  def sample(self, limit: int) -> np.ndarray:
    """Chooses at most `limit` images from as few blocks, evenly spread over the files.

    Returns:
      Image indices in file order; all of them if there are no more than `limit`.
    """
    order = self.file_order()
    if limit >= len(order):
      return order
    block = self._places[self._first[order], 1]
    blocks = np.unique(block)
    needed = min(len(blocks), -(-limit * len(blocks) // len(order)))
    chosen = blocks[np.linspace(0, len(blocks) - 1, needed).astype(np.int64)]
    order = order[np.isin(block, chosen)]
    if len(order) > limit:
      order = order[np.linspace(0, len(order) - 1, limit).astype(np.int64)]
    return order

  def _at(self, place: int) -> bytes:
    _, block, column, row, item = self._places[place].tolist()
    return self._load(block, column)(row, item)
