"""Photos on disk, tiny tokenizers, and torch networks that nothing saturates on."""

import pathlib

import numpy as np
import pytest

PROMPTS = [
  "a handwritten seven",
  "number three on white paper, seen from above",
  "someone wrote the digit two " + "very " * 30 + "boldly",  # longer than the tower
  "",
  "the DIGIT  nine in ink",
]


def _photos(folder: pathlib.Path) -> list[pathlib.Path]:
  """Saves photos of odd sizes: wide, tall, grey, transparent, and smaller than a tower."""
  from PIL import Image
  from sklearn.datasets import load_sample_image

  china, flower = (load_sample_image(f"{name}.jpg") for name in ("china", "flower"))
  clear = np.full((*flower.shape[:2], 1), 255, np.uint8)
  clear[:, 200:, 0] = np.linspace(0, 255, clear.shape[1] - 200).astype(np.uint8)
  pictures = {
    "wide": china[:213, :401],
    "tall": flower[100:420, 150:301],
    "grey": china[50:286, 100:389].mean(-1).astype(np.uint8),
    "clear": np.concatenate([flower, clear], -1)[:307, 100:409],
    "small": china[200:237, 300:353],
    "square": flower[:360, 200:560],
  }
  paths = []
  for name, pixels in pictures.items():
    paths.append(folder / f"{name}.png")
    Image.fromarray(pixels).save(paths[-1])
  return paths


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
  """Six PNG files."""
  return _photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def prompts(photos):
  """One prompt for each photo."""
  return [PROMPTS[i % len(PROMPTS)] for i in range(len(photos))]


@pytest.fixture
def opened(photos):
  """The photos as PIL images."""
  from PIL import Image

  return [Image.open(path) for path in photos]


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory):
  """A folder with a tiny tokenizer of CLIP's kind, and how many tokens it knows."""
  from lpo_jax.jobs import quickstart_base

  folder = tmp_path_factory.mktemp("tokenizer")
  return folder, quickstart_base.write_tokenizer(folder, max_length=20)


@pytest.fixture(scope="session")
def torch():
  """torch, on one thread."""
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)
  return torch


@pytest.fixture(scope="session")
def randomise(torch):
  """Fills a module with random weights under which every part moves the output."""

  def fill(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim < 2:
          norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
          p.copy_(0.2 * noise + (1.0 if norm else 0.0))
        elif "embedding" in name:
          p.copy_(0.5 * noise)
        else:
          p.copy_(noise / p[0].numel() ** 0.5)
    return module.eval()

  return fill


@pytest.fixture
def worst():
  """The largest |a - b| / |b|."""
  return lambda a, b: np.max(np.abs(np.asarray(a) - b) / np.abs(b))
