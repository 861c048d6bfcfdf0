"""Prompts to token ids, from the files of a pipeline's own tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.pretrained import hub

Path = str | os.PathLike


class Tokenizer:
  """Turns prompts into token ids, padded and cut as the model was trained.

  Attributes:
    max_length: tokens per prompt, start and end included.
    pad_token_id: what prompts are padded with; not the same for all models.
    truncated: how many prompts so far were longer and lost their end.
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self.max_length: int = tokenizer.model_max_length
    self.pad_token_id: int = tokenizer.pad_token_id
    self.truncated = 0

  def tokenize(self, prompts: list[str]) -> np.ndarray:
    """Returns the ids of prompts.

    Args:
      prompts: N texts.

    Returns:
      [N, max_length] int32.
    """
    if not prompts:
      return np.zeros((0, self.max_length), np.int32)
    encoded = self._tokenizer(
      prompts, padding="max_length", truncation=True, max_length=self.max_length
    )
    for prompt, mask in zip(prompts, encoded["attention_mask"]):
      if all(mask):  # full, so perhaps cut
        whole = self._tokenizer(prompt, verbose=False)["input_ids"]
        self.truncated += len(whole) > self.max_length
    return np.asarray(encoded["input_ids"], np.int32)

  def lengths(self, prompts: Sequence[str]) -> np.ndarray:
    """Returns how many tokens prompts have before any is cut, start and end included.

    Args:
      prompts: N texts.

    Returns:
      [N] int64.
    """
    if not prompts:
      return np.zeros(0, np.int64)
    encoded = self._tokenizer(list(prompts), verbose=False)["input_ids"]
    return np.asarray([len(ids) for ids in encoded], np.int64)


def load_tokenizer(folder: Path, subfolder: str = "tokenizer") -> Tokenizer:
  """Reads a pipeline's CLIP tokenizer from its own files, without torch.

  Args:
    folder: a pipeline folder, or its id on the Hub.
    subfolder: "tokenizer" or "tokenizer_2".

  Raises:
    UserError: the folder or its files are not there, or they give no length.
  """
  path = hub.local_folder(folder, [subfolder]) / subfolder
  raw = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
  if not raw and not (path / "tokenizer.json").is_file():
    raise UserError(
      f"no tokenizer in {str(path)!r}: expected vocab.json and merges.txt, or "
      "tokenizer.json."
    )
  from transformers import CLIPTokenizer

  tokenizer = CLIPTokenizer.from_pretrained(str(path))
  # What transformers gives when the files say nothing is about 1e30.
  if tokenizer.model_max_length > 1_000_000:
    raise UserError(
      f"{path / 'tokenizer_config.json'} gives no model_max_length: add the number of "
      "places of the text encoder (77 for CLIP)."
    )
  return Tokenizer(tokenizer)
