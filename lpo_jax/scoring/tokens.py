"""Prompts to token ids for scorers, each cleaned and padded as its network was trained."""

from __future__ import annotations

import html
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.pretrained import checkpoints, hub, tokenizers

CLIP_FILES = ("tokenizer.json", "vocab.json")
BERT_FILES = ("vocab.txt", "tokenizer.json")
# ImageReward reads no more of a prompt.
BERT_PLACES = 35

Clean = Callable[[str], str]


def as_it_is(text: str) -> str:
  """Leaves the cleaning to the tokenizer, as transformers does."""
  return text


def as_open_clip(text: str) -> str:
  """Mends encodings, resolves HTML entities, joins white space, lowers.

  What OpenAI's CLIP and open_clip do before they split. It makes curly quotes straight
  and "&amp;" an ampersand, so that ids differ from transformers'.
  """
  import ftfy

  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return re.sub(r"\s+", " ", text).strip().lower()


class ClipTokens:
  """Turns prompts into ids for CLIP's text tower.

  Args:
    folder: has the tokenizer's files.
    places: of the text tower; longer prompts lose their end, not the end token.
    clean: what is done to a prompt first.
  """

  def __init__(self, folder: pathlib.Path, places: int, clean: Clean):
    self._tokenizer = tokenizers.load_tokenizer(folder, ".")
    self._tokenizer.max_length = places
    self._clean = clean

  def __call__(self, prompts: Sequence[str]) -> np.ndarray:
    """Returns [n, places] int32.

    Behind the end token there is whatever the tokenizer pads with; open_clip would put
    zeros. The tower looks only back, and is read at the end token: it makes no
    difference.
    """
    return self._tokenizer.tokenize([self._clean(prompt) for prompt in prompts])


class BertTokens:
  """Turns prompts into ids for ImageReward's text tower.

  Args:
    folder: has `vocab.txt` of bert-base-uncased.

  Raises:
    UserError: another vocabulary than the network's.
  """

  def __init__(self, folder: pathlib.Path, vocabulary: int):
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(str(folder))
    # BLIP's two: numbered after all others, and so the last rows of its embedding.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != vocabulary:
      raise UserError(
        f"the tokenizer in {str(folder)!r} has {len(tokenizer)} tokens with [DEC] and "
        f"[ENC], and ImageReward {vocabulary}. Give that of bert-base-uncased."
      )
    self._tokenizer = tokenizer

  def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids [n, 35] int32, and [n, 35] bool where they are no padding."""
    encoded = self._tokenizer(
      list(prompts), padding="max_length", truncation=True, max_length=BERT_PLACES
    )
    ids = np.asarray(encoded["input_ids"], np.int32)
    return ids, np.asarray(encoded["attention_mask"], bool)


def find(
  asked: str, beside: pathlib.Path, published: str, alternatives: Sequence[str]
) -> pathlib.Path:
  """Finds a tokenizer's folder.

  Args:
    asked: a folder or an id on the Hub; empty for what lies beside the weights, or else
      the published one.
    beside: the file of the weights.
    published: an id on the Hub.
    alternatives: files, one of which a tokenizer has.

  Raises:
    UserError: none is there, or it cannot be fetched.
  """
  if not asked and any((beside.parent / name).is_file() for name in alternatives):
    return beside.parent
  return hub.folder_with(asked or published, alternatives, checkpoints.BESIDE)
