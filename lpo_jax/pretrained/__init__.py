"""Folders of diffusers and transformers <-> parameter trees."""

from lpo_jax.pretrained.folders import (
  Part,
  fingerprint,
  load,
  read_config,
  save,
  save_pipeline,
  scheduler_config,
)
from lpo_jax.pretrained.hub import local_folder
from lpo_jax.pretrained.tokenizers import Tokenizer, load_tokenizer

__all__ = [
  "Part",
  "Tokenizer",
  "fingerprint",
  "load",
  "load_tokenizer",
  "local_folder",
  "read_config",
  "save",
  "save_pipeline",
  "scheduler_config",
]
