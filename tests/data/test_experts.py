"""Who is an expert: wins counted by hand, and the choice of the best."""

import numpy as np
import pytest

from lpo_jax.data import experts
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.ranked import RankedLists
from lpo_jax.errors import UserError

UIDS = ["d", "a", "c", "b"]


def judged():
  """Two prompts in reverse order; image "a" was judged for both."""
  rows = [  # prompt, first, second, label of the first
    ("sea", "a", "b", 1.0),
    ("sea", "b", "c", 0.0),
    ("sea", "c", "a", 0.5),
    ("sea", "a", "c", np.nan),  # nobody judged: nobody won
    ("cat", "a", "d", 0.0),
  ]
  prompts = ["sea", "cat"]
  return Judgements(
    prompts=prompts,
    image_uids=UIDS,
    users=[],
    prompt=np.array([prompts.index(row[0]) for row in rows], np.int32),
    user=np.full(len(rows), -1, np.int32),
    image_a=np.array([UIDS.index(row[1]) for row in rows], np.int32),
    image_b=np.array([UIDS.index(row[2]) for row in rows], np.int32),
    label=np.array([row[3] for row in rows], np.float32),
    weight=np.ones(len(rows), np.float32),
  )


def ranked(score=(0.0, 0.0, 0.0, 0.0, 0.0)):
  """For the sea: a, then b and c tied. For the cat: d, a."""
  image = [UIDS.index(uid) for uid in "abcda"]
  return RankedLists(
    prompt=np.array([0, 1], np.int32),
    list_id=np.array([1, 2], np.uint32),
    weight=np.ones(2, np.float32),
    offsets=np.array([0, 3, 5]),
    image=np.array(image, np.int32),
    rank=np.array([0, 1, 1, 0, 1], np.int32),
    score=np.array(score, np.float32),
    prompts=["sea", "cat"],
    image_uids=UIDS,
  )


def named(source, values):
  """(prompt, uid) -> value, in the candidates' order."""
  found = experts.candidates(source)
  keys = [
    (source.prompts[p], source.image_uids[i])
    for p, i in zip(found.prompt, found.image, strict=True)
  ]
  return dict(zip(keys, values(found), strict=True))


def test_wins_of_judgements_are_counted_by_hand():
  wins = named(judged(), experts.by_wins)
  assert list(wins) == sorted(wins)  # by prompt and name, not by row
  assert wins == {
    ("cat", "a"): 0.0,
    ("cat", "d"): 1.0,
    ("sea", "a"): 1.5,
    ("sea", "b"): 0.0,
    ("sea", "c"): 1.5,
  }


def test_wins_in_lists_are_the_images_below():
  assert named(ranked(), experts.by_wins) == {
    ("cat", "a"): 0.0,
    ("cat", "d"): 1.0,
    ("sea", "a"): 2.0,
    ("sea", "b"): 0.5,
    ("sea", "c"): 0.5,
  }


def test_scores_are_the_sources_own():
  scores = named(ranked((0.1, 0.2, 0.3, 0.4, 0.5)), experts.by_score)
  by_hand = {("cat", "a"): 0.5, ("cat", "d"): 0.4, ("sea", "a"): 0.1}
  assert {k: pytest.approx(scores[k]) for k in by_hand} == by_hand
  for source in (ranked(), judged()):
    with pytest.raises(UserError, match="Name a scorer in select"):
      experts.by_score(experts.candidates(source))


def test_the_best_are_chosen_and_the_cut_is_told():
  values = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
  chosen, equal = experts.top(values, 3)
  assert chosen.tolist() == [1, 3, 2] and equal == 2
  chosen, equal = experts.top(values, 10)
  assert len(chosen) == 6 and equal == 0


def test_given_names_are_found_wherever_they_were_judged():
  source = judged()
  found = experts.candidates(source)
  assert experts.named(source, found, ["a", "c"]).tolist() == [0, 2, 4]
  with pytest.raises(UserError, match=r"1 of 2 image uids.*'nobody'"):
    experts.named(source, found, ["a", "nobody"])
