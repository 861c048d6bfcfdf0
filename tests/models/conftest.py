"""Parity with torch: random weights that nothing saturates on, read through a folder."""

import json

import numpy as np
import pytest

from lpo_jax import pretrained, trees


class Peer:
  """A torch model, its folder, and the same model here."""

  def __init__(self, torch, module, root, name, **options):
    self.torch, self.module, self.root, self.name = torch, module.eval(), root, name
    module.save_pretrained(root / name)
    if not (root / name / "config.json").is_file():
      raise AssertionError("save_pretrained wrote no config.json")
    self.part = pretrained.load(root, name, **options)

  def gradients(self, scalar):
    """Returns torch's gradients of `scalar` in our names and layout, by name."""
    torch = self.torch
    scalar.backward()
    values = {k: p.detach().clone() for k, p in self.module.named_parameters()}
    with torch.no_grad():
      for p in self.module.parameters():
        p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    self.module.save_pretrained(self.root / "gradients" / self.name)
    with torch.no_grad():
      for k, p in self.module.named_parameters():
        p.copy_(values[k])
    part = pretrained.load(self.root / "gradients", self.name)
    return {k: np.asarray(v) for k, v in trees.named_leaves(part.params).items()}


def _randomise(torch, module, seed):
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in module.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if p.ndim < 2:
        norm = "norm" in name and name.endswith("weight")
        p.copy_(0.2 * noise + (1.0 if norm else 0.0))
      elif "embedding.weight" in name:
        p.copy_(0.5 * noise)
      else:
        p.copy_(noise / p[0].numel() ** 0.5)
  return module


@pytest.fixture
def peer(tmp_path):
  """Makes a `Peer`: peer(torch module, name, **options of pretrained.load)."""
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)

  def make(module, name, **options):
    return Peer(torch, _randomise(torch, module, 0), tmp_path, name, **options)

  return make


@pytest.fixture
def relative_error():
  """|a - b| / |b| over whole arrays."""

  def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)

  return error


@pytest.fixture
def config_of():
  """Reads the config.json in a folder."""
  return lambda folder: json.loads((folder / "config.json").read_text())
