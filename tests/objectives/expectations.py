"""What the battery cannot know of an objective: options, step-0 value, worked examples."""

import dataclasses
import math
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Worked:
  """One batch and its loss by hand: lists of `item`s, None = not valid."""

  lists: tuple
  loss: float
  weight: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Expect:
  """What the battery cannot know by itself.

  Attributes:
    hyper: options to test with.
    step_zero: loss of a list of m different ranks where err = ref_err = 0.25.
    ties_are_silent: whether a list of ties alone is left out of the mean.
    worked: examples with their values in plain arithmetic.
    stops_gradient: the gradient is not the slope of the loss, on purpose; what is
      frozen is restated in test_published.py, and the slope taken there.
    couples_lists: a list's loss depends on the other lists of the update.
  """

  hyper: Mapping[str, float]
  step_zero: Callable[[int], float]
  ties_are_silent: bool
  worked: tuple[Worked, ...]
  stops_gradient: bool = False
  couples_lists: bool = False


def log_sum_exp(*logits):
  return math.log(sum(math.exp(x) for x in logits))


def softplus(x):
  return math.log(1 + math.exp(x))


# beta = 4: a logit is -2 (err - ref_err). Rewards of the items below are 2, -1 and 0.5
# times beta / 2, so logits are 4, -2 and 1.
BEST, WORST, MIDDLE = (1.0, 3.0), (4.0, 3.0), (0.5, 1.0)


def item(scalars, rank, score=0.0, drift=0.0):
  return (*scalars, rank, score, drift)


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def phi(x):
  """MaPO's, of s * error."""
  return x / (math.exp(x) - 1)


def swap_cost(gains, places):
  """DCG weight of a pair, from 2^phi and tau."""
  return abs(gains[0] - gains[1]) * abs(
    1 / math.log(1 + places[0]) - 1 / math.log(1 + places[1])
  )


def pairs_of(m):
  return m * (m - 1) // 2


def weights_by_wins(m):
  """Sum of RankDPO's weights where item j of m beats m - 1 - j others."""
  gains = [2 ** ((m - 1 - j) / (m - 1)) for j in range(m)]
  return sum(
    swap_cost((gains[i], gains[k]), (i + 1, k + 1)) for i in range(m) for k in range(i)
  )


def calibrated_gap_by_wins(m):
  """Mean square of CaPO's calibrated differences, rewards as above."""
  reward = [(m - 1 - j) / (m - 1) for j in range(m)]
  rate = [
    sum(sigmoid(r - q) for k, q in enumerate(reward) if k != j) / (m - 1)
    for j, r in enumerate(reward)
  ]
  gaps = [(rate[i] - rate[k]) ** 2 for i in range(m) for k in range(i)]
  return sum(gaps) / pairs_of(m)


# Three images, best first, with scores 2, 1, 0: logits 4, 1, -2 at beta = 4.
SCORED = (item(BEST, 0, 2.0), item(MIDDLE, 1, 1.0), item(WORST, 2, 0.0))
# The same with the policy's order reversed: logits -2, 1, 4.
REVERSED = (item(WORST, 0, 2.0), item(MIDDLE, 1, 1.0), item(BEST, 2, 0.0))


EXPECT = {
  "sft": Expect(
    hyper={},
    step_zero=lambda m: 0.25,
    ties_are_silent=False,
    worked=(
      Worked(((item(BEST, 0), item(WORST, 1)),), 1.0),
      Worked(((item(BEST, 1), item(WORST, 0)),), 4.0),
      Worked(((item(BEST, 0), item(WORST, 0), item(MIDDLE, 1)),), (1.0 + 4.0) / 2),
      Worked(((item(MIDDLE, 0), None),), 0.5),
      Worked(((item(BEST, 0), None), (item(WORST, 0), item(MIDDLE, 1))), (1 + 4) / 2),
      Worked(((item(BEST, 0),), (item(WORST, 0),)), (3 * 1 + 1 * 4) / 4, (3.0, 1.0)),
    ),
  ),
  "dpo": Expect(
    hyper={"beta": 4.0},
    step_zero=lambda m: math.log(2),
    ties_are_silent=True,
    worked=(
      # -log sigmoid(4 - -2), and the same pair the other way round.
      Worked(((item(BEST, 0), item(WORST, 1)),), softplus(-6.0)),
      Worked(((item(WORST, 0), item(BEST, 1)),), softplus(6.0)),
      # A list of three is the mean of its three pairs.
      Worked(
        ((item(WORST, 2), item(BEST, 0), item(MIDDLE, 1)),),
        (softplus(-6.0) + softplus(-3.0) + softplus(-3.0)) / 3,
      ),
      # The tied pair is no pair.
      Worked(
        ((item(BEST, 0), item(WORST, 1), item(MIDDLE, 1)),),
        (softplus(-6.0) + softplus(-3.0)) / 2,
      ),
      # Weights are of lists; a list of one image says nothing.
      Worked(
        (
          (item(BEST, 0), None, item(WORST, 1)),
          (item(MIDDLE, 1), item(WORST, 0), None),
          (item(BEST, 0), None, None),
        ),
        (0.5 * softplus(-6.0) + 2 * softplus(3.0)) / 2.5,
        (0.5, 2.0, 9.0),
      ),
    ),
  ),
  "lpo": Expect(
    hyper={"beta": 4.0},
    step_zero=lambda m: math.log(math.factorial(m)),
    ties_are_silent=True,
    worked=(
      Worked(((item(BEST, 0), item(WORST, 1)),), softplus(-6.0)),
      Worked(((item(WORST, 0), item(BEST, 1)),), softplus(6.0)),
      # First the best of three, then the better of two.
      Worked(
        ((item(WORST, 2), item(BEST, 0), item(MIDDLE, 1)),),
        (log_sum_exp(4, 1, -2) - 4) + (log_sum_exp(1, -2) - 1),
      ),
      # A star: one choice among all.
      Worked(
        ((item(BEST, 0), item(WORST, 1), item(MIDDLE, 1)),), log_sum_exp(4, -2, 1) - 4
      ),
      # Two winners: each is chosen over the loser, and not over the other.
      Worked(
        ((item(BEST, 0), item(WORST, 1), item(MIDDLE, 0)),),
        (log_sum_exp(4, -2) - 4) + (log_sum_exp(1, -2) - 1),
      ),
      # Weights are of lists; a list of one image says nothing.
      Worked(
        (
          (item(BEST, 0), None, item(WORST, 1)),
          (item(MIDDLE, 1), item(WORST, 0), None),
          (item(BEST, 0), None, None),
        ),
        (0.5 * softplus(-6.0) + 2 * softplus(3.0)) / 2.5,
        (0.5, 2.0, 9.0),
      ),
    ),
  ),
  "kto": Expect(
    hyper={"beta": 2.0},
    step_zero=lambda m: 0.5,
    ties_are_silent=False,
    couples_lists=True,
    stops_gradient=True,
    worked=(
      # g = 2 and -1, z = 1/2: desirable is 1.5 above, undesirable 1.5 below.
      Worked(((item(BEST, 0), item(WORST, 1)),), sigmoid(-3.0)),
      Worked(((item(BEST, 1), item(WORST, 0)),), sigmoid(3.0)),
      # A negative mean is not a baseline; an image alone is enough, of either kind.
      Worked(((item(WORST, 0), None),), sigmoid(2.0)),
      Worked(((item(WORST, 1), None),), sigmoid(-2.0)),
      # z = (2 - 1 + 0.5) / 3 over both lists, whatever their weights above 0.
      Worked(
        ((item(BEST, 0), None), (item(WORST, 1), item(MIDDLE, 0))),
        (3 * sigmoid(-3.0) + (sigmoid(-3.0) + 0.5) / 2) / 4,
        (3.0, 1.0),
      ),
    ),
  ),
  "ipo": Expect(
    hyper={"beta": 0.4},
    step_zero=lambda m: 0.25,
    ties_are_silent=True,
    worked=(
      # Logits 0.4, -0.2, 0.1.
      Worked(((item(BEST, 0), item(WORST, 1)),), (0.6 - 0.5) ** 2),
      Worked(((item(BEST, 1), item(WORST, 0)),), (-0.6 - 0.5) ** 2),
      Worked((SCORED,), (0.1**2 + 0.2**2 + 0.2**2) / 3),
    ),
  ),
  "dpo_hinge": Expect(
    hyper={"beta": 0.5},
    step_zero=lambda m: 1.0,
    ties_are_silent=True,
    worked=(
      # Logits 0.5, -0.25, 0.125.
      Worked(((item(BEST, 0), item(WORST, 1)),), 0.25),
      Worked(((item(BEST, 1), item(WORST, 0)),), 1.75),
      Worked(((item((0.0, 8.0), 0), item(WORST, 1)),), 0.0),
    ),
  ),
  "dspo": Expect(
    hyper={"beta": 0.05},
    step_zero=lambda m: 0.25,
    ties_are_silent=True,
    worked=(
      # c = 0.05 sigmoid(-0.075), <e, q> = (1 + 4 - 3) / 2.
      Worked(
        ((item(BEST, 0, drift=4.0), item(WORST, 1)),),
        1 - 2 * 0.05 * sigmoid(-0.075) * 1 + 4 * (0.05 * sigmoid(-0.075)) ** 2,
      ),
    ),
  ),
  "mapo": Expect(
    hyper={"beta": 0.1, "sharpness": 10.0},
    step_zero=lambda m: 0.25 + 0.1 * math.log(2),
    ties_are_silent=True,
    worked=(
      Worked(
        ((item(BEST, 0), item(WORST, 1)),),
        1 + 0.1 * softplus(-10 * (phi(0.5) - phi(2.0))),
      ),
      Worked(
        ((item((0.0, 9.0), 1), item(MIDDLE, 0)),),
        0.5 + 0.1 * softplus(-10 * (phi(0.25) - 1)),
      ),
    ),
  ),
  "dmpo": Expect(
    hyper={"beta": 4.0, "alpha": 0.01},
    step_zero=lambda m: 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01),
    ties_are_silent=True,
    worked=(
      # p = sigmoid(3); and p = q, where it is 0.
      Worked(
        ((item(BEST, 0), item(MIDDLE, 1)),),
        sigmoid(3) * math.log(sigmoid(3) / 0.99)
        + sigmoid(-3) * math.log(sigmoid(-3) / 0.01),
      ),
      Worked(((item((0.0, math.log(99) / 2), 0), item((1.0, 1.0), 1)),), 0.0),
    ),
  ),
  "poly_dpo": Expect(
    hyper={"beta": 4.0, "alpha": 8.0},
    step_zero=lambda m: math.log(2) + 4.0,
    ties_are_silent=True,
    worked=(
      Worked(
        ((item(BEST, 0), item(WORST, 1)),), softplus(-6.0) + 8 * (1 - sigmoid(6.0))
      ),
    ),
  ),
  "linear_dpo": Expect(
    hyper={"beta": 1.0, "eta": 0.05},
    step_zero=lambda m: 0.0,
    ties_are_silent=True,
    stops_gradient=True,
    worked=(
      # Differences -1.5 of the implicit errors: 0.2 * -1.5 + 0.5; then both clips.
      Worked(((item(BEST, 0), item(MIDDLE, 1)),), 0.2 * (1 - 0.5)),
      Worked(((item(BEST, 0), item(WORST, 1)),), 0.05 * (1 - 4)),
      Worked(((item(BEST, 1), item(WORST, 0)),), 0.95 * (4 - 1)),
    ),
  ),
  "capo": Expect(
    hyper={"beta": 0.4, "rewards": "wins"},
    step_zero=calibrated_gap_by_wins,
    ties_are_silent=True,
    worked=(
      # Rewards 1 and 0, logits 0.4 and -0.2.
      Worked(((item(BEST, 0), item(WORST, 1)),), (sigmoid(1) - sigmoid(-1) - 0.6) ** 2),
    ),
  ),
  "dro": Expect(
    hyper={"margin": 3.0},
    step_zero=lambda m: 3.0,
    ties_are_silent=True,
    worked=(
      # d = -2, 1 and -0.5.
      Worked(((item(BEST, 0), item(WORST, 1)),), 0.0),
      Worked(((item(BEST, 1), item(WORST, 0)),), 6.0),
      # One expert, two samples; the samples are not compared.
      Worked((SCORED,), (1.5 + 0.0) / 2),
    ),
  ),
  "all_pairs": Expect(
    hyper={"beta": 4.0},
    step_zero=lambda m: pairs_of(m) * math.log(2),
    ties_are_silent=True,
    worked=(
      Worked(((item(BEST, 0), item(WORST, 1)),), softplus(-6.0)),
      Worked((SCORED,), 2 * softplus(-3.0) + softplus(-6.0)),
    ),
  ),
  "rankdpo": Expect(
    hyper={"beta": 4.0, "rewards": "wins"},
    step_zero=lambda m: weights_by_wins(m) * math.log(2),
    ties_are_silent=True,
    worked=(
      # Wins 1 and 0 of one other: gains 2 and 1, whatever the score.
      Worked(
        ((item(BEST, 0, 7.0), item(WORST, 1, 9.0)),),
        swap_cost((2, 1), (1, 2)) * softplus(-6.0),
      ),
    ),
  ),
  "lambda": Expect(
    hyper={"beta": 4.0, "rewards": "wins"},
    # Equal a are placed by the true order.
    step_zero=lambda m: weights_by_wins(m) * math.log(2),
    ties_are_silent=True,
    stops_gradient=True,
    worked=(
      Worked(
        (REVERSED,),
        # Gains 2, sqrt 2, 1 by wins; the policy has them in places 3, 2, 1.
        swap_cost((2, 2**0.5), (3, 2)) * softplus(3.0)
        + swap_cost((2, 1), (3, 1)) * softplus(6.0)
        + swap_cost((2**0.5, 1), (2, 1)) * softplus(3.0),
      ),
    ),
  ),
  "lair": Expect(
    hyper={"beta": 4.0, "temperature": 0.5, "penalty": 0.01, "rewards": "wins"},
    step_zero=lambda m: 0.0,
    ties_are_silent=True,
    worked=(
      # p = softmax(1 / 0.5, 0), s = 4, -2.
      Worked(
        ((item(BEST, 0), item(WORST, 1)),),
        -(sigmoid(2) - 0.5) * 4 - (sigmoid(-2) - 0.5) * -2 + 0.01 / 2 * (16 + 4),
      ),
    ),
  ),
}
