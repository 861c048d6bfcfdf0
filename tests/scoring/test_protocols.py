import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.scoring import protocols

# Two prompts of 3 and 2 images.
PROMPT = [0, 0, 0, 1, 1]
SCORES = {
  "base": {"pick": np.array([3.0, 1.0, 2.0, 8.0, 9.0]), "hps": np.arange(5.0)},
  "lpo": {"pick": np.array([1.0, 1.0, 5.0, 7.0, 6.0]), "hps": np.arange(5.0) * 10},
}


def test_same_seed_compares_every_image():
  chosen = protocols.get("same_seed")(SCORES, PROMPT)
  assert chosen.scores is SCORES
  assert list(chosen.image) == [0, 1, 2, 3, 4] and list(chosen.prompt) == PROMPT


def test_median_of_k_takes_each_scorers_own_median_image():
  chosen = protocols.get("median_of_k")(SCORES, PROMPT)
  # 3 1 2 -> 2; of 8 9 the lower. 1 1 5 -> 1, the second of the equal ones; 7 6 -> 6.
  assert list(chosen.scores["base"]["pick"]) == [2.0, 8.0]
  assert list(chosen.scores["lpo"]["pick"]) == [1.0, 6.0]
  assert list(chosen.scores["base"]["hps"]) == [1.0, 3.0]
  assert list(chosen.prompt) == [0, 1] and chosen.image is None


def test_median_of_k_by_one_scorer_reads_the_others_from_its_images():
  chosen = protocols.get("median_of_k")(SCORES, PROMPT, "pick")
  assert list(chosen.scores["base"]["pick"]) == [2.0, 8.0]
  assert list(chosen.scores["base"]["hps"]) == [2.0, 3.0]  # images 2 and 3
  assert list(chosen.scores["lpo"]["hps"]) == [10.0, 40.0]  # images 1 and 4


def test_of_one_image_per_prompt_both_protocols_are_the_same():
  one = protocols.get("median_of_k")(SCORES, range(5))
  for name, by_scorer in SCORES.items():
    for scorer, values in by_scorer.items():
      assert (one.scores[name][scorer] == values).all()


def test_of_five_the_median_is_numpys():
  values = np.random.default_rng(0).normal(size=35)
  chosen = protocols.get("median_of_k")({"a": {"s": values}}, np.arange(35) // 5)
  np.testing.assert_array_equal(
    chosen.scores["a"]["s"], np.median(values.reshape(7, 5), axis=1)
  )


def test_unknown_names_are_refused():
  with pytest.raises(UserError, match=r"eval\.protocols 'same_sed'; did you mean"):
    protocols.get("same_sed")
  with pytest.raises(UserError, match=r"eval\.median_by 'pik'; did you mean 'pick'"):
    protocols.get("median_of_k")(SCORES, PROMPT, "pik")
