"""Which lists are never trained on, by identity."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from lpo_jax.data import held_out
from lpo_jax.data.draws import Part
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError


def lists_of(prompts):
  """Two images a list, one list for each of `prompts` (texts, with repeats)."""
  texts = sorted(set(prompts))
  count = len(prompts)
  return RankedLists(
    prompt=np.array([texts.index(p) for p in prompts], np.int32),
    list_id=np.arange(count, dtype=np.uint32),
    weight=np.ones(count, np.float32),
    offsets=np.arange(count + 1) * 2,
    image=np.arange(2 * count, dtype=np.int32),
    rank=np.tile([0, 1], count).astype(np.int32),
    score=np.zeros(2 * count, np.float32),
    prompts=texts,
    image_uids=[str(i) for i in range(2 * count)],
  )


def test_all_lists_of_a_prompt_are_on_one_side():
  prompts = [f"prompt {i % 40}" for i in range(200)]
  trained, held = held_out.split(lists_of(prompts), 0.25, seed=0)
  assert sorted([*trained, *held]) == list(range(200))
  assert not {prompts[i] for i in trained} & {prompts[i] for i in held}
  assert len(held) == 5 * len({prompts[i] for i in held})


def test_the_side_hangs_on_the_prompt_and_the_seed_alone():
  few, many = [f"prompt {i}" for i in range(30)], [f"prompt {i}" for i in range(300)]

  def held(prompts, share=0.3, seed=0):
    return {prompts[i] for i in held_out.split(lists_of(prompts), share, seed)[1]}

  assert held(few) == held(many) & set(few) == held(few[::-1])
  assert held(many, share=0.1) < held(many, share=0.3)
  assert held(many, seed=1) != held(many)
  assert 0.2 * 300 < len(held(many)) < 0.4 * 300


def test_a_share_of_nothing_holds_nothing_out():
  trained, held = held_out.split(lists_of(["a", "b"]), 0.0, seed=0)
  assert list(trained) == [0, 1] and not len(held)


def test_shares_that_leave_a_side_empty_are_refused():
  with pytest.raises(UserError, match="expected a share of the prompts from 0 to"):
    held_out.split(lists_of(["a"]), 1.0, seed=0)
  with pytest.raises(UserError, match=r"of 1 prompts leaves (none to train|none held)"):
    held_out.split(lists_of(["a"]), 0.5, seed=0)


def test_sources_count_what_is_left_of_them():
  parts = (Part("a", 3, Fraction(2)), Part("b", 2), Part("c", 5))
  left = held_out.parts_of(parts, np.array([0, 2, 4, 5, 6, 9]))
  assert [part.count for part in left] == [2, 1, 3]
  assert left[0] == dataclasses.replace(parts[0], count=2)
  with pytest.raises(UserError, match="no list of 'b'"):
    held_out.parts_of(parts, np.array([0, 2, 5]))
