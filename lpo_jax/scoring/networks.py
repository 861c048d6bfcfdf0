"""What scorers that are networks have in common: weights on a mesh, batches, progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax import console, models, parallel
from lpo_jax.errors import UserError, unknown_name
from lpo_jax.pretrained.checkpoints import Checkpoint
from lpo_jax.scoring.scorer import Scorer
from lpo_jax.types import Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where and how a network runs.

  Attributes:
    mesh: batches are split over all its devices, parameters as training splits them.
    dtype: of the activations, a name of `DTYPES`.
    batch_size: images at a time, rounded up to a multiple of the devices.
  """

  mesh: jax.sharding.Mesh
  dtype: str
  batch_size: int

  @classmethod
  def of(cls, mesh: jax.sharding.Mesh | None, dtype: str, batch_size: int) -> Place:
    """Checks the options of a scorer.

    Raises:
      UserError: an unknown dtype, or no images at a time.
    """
    if dtype not in DTYPES:
      raise unknown_name("dtype of a scorer", dtype, DTYPES)
    if batch_size < 1:
      raise UserError(f"batch_size of a scorer is {batch_size}; expected at least 1.")
    mesh = parallel.make_mesh() if mesh is None else mesh
    return cls(mesh, dtype, -(-batch_size // mesh.size) * mesh.size)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A model with its parameters on the mesh.

  Attributes:
    model: the structure.
    params: global arrays.
    place: where they are.
  """

  model: Any
  params: Params
  place: Place

  @classmethod
  def load(cls, checkpoint: Checkpoint, place: Place) -> Network:
    """Reads a checkpoint.

    Raises:
      UserError: weights that are not those of the config, by name.
    """
    model = models.build(checkpoint.config, dtype=DTYPES[place.dtype])
    shardings = parallel.param_shardings(model.abstract_params, place.mesh)
    params = checkpoint.load(model, sharding=shardings)
    if place.dtype != "float32":
      params = model.narrow(params)
    return cls(model, params, place)

  def jit(self, fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Compiles fn(params, *arrays); every process gets the whole result."""
    return jax.jit(fn, out_shardings=parallel.replicated(self.place.mesh))

  def run(
    self,
    fn: Callable[..., jax.Array],
    count: int,
    rows: Callable[[slice], tuple[np.ndarray, ...]],
    label: str,
    unit: str,
  ) -> np.ndarray:
    """Runs a jitted function in batches of one size.

    Args:
      fn: from `jit`.
      count: how many there are.
      rows: gives the arrays of some of them, when their turn has come.
      label: for the progress line.
      unit: what is counted.

    Returns:
      The results of all, as fp32.
    """
    size, slots = self.place.batch_size, parallel.by_slot(self.place.mesh)
    progress = console.Progress(label, count, unit) if count > size else None
    results = []
    with jax.set_mesh(self.place.mesh):
      for start in range(0, count, size):
        arrays = rows(slice(start, min(start + size, count)))
        here = len(arrays[0])
        padded = tuple(
          np.concatenate([a, a[-1:].repeat(size - here, 0)]) for a in arrays
        )
        placed = parallel.put(padded, (slots,) * len(padded))
        results.append(parallel.fetch(fn(self.params, *placed))[:here])
        if progress is not None:
          progress.update(start + here)
    return np.concatenate(results)


class NetworkScorer(Scorer):
  """A scorer that is a network and the checkpoint that it is read from.

  Args:
    place: where it runs.
  """

  def __init__(self, place: Place):
    self.place = place
    self._checkpoint: Checkpoint | None = None
    self._network: Network | None = None
    self._identity = ""

  def find(self) -> Checkpoint:
    """Finds the weights, without reading them."""
    raise NotImplementedError

  @property
  def checkpoint(self) -> Checkpoint:
    if self._checkpoint is None:
      self._checkpoint = self.find()
    return self._checkpoint

  @property
  def network(self) -> Network:
    if self._network is None:
      self._network = Network.load(self.checkpoint, self.place)
      self.prepare(self._network)
    return self._network

  def prepare(self, network: Network) -> None:
    """Compiles what the scorer calls."""
    raise NotImplementedError

  def fingerprint(self) -> str:
    """Identifies all weights: hex digits."""
    return self.checkpoint.fingerprint()

  @property
  def identity(self) -> str:
    if not self._identity:
      rounded = "" if self.place.dtype == "float32" else f" {self.place.dtype}"
      self._identity = self.fingerprint() + rounded
    return self._identity

  def release(self) -> None:
    self._network = None
