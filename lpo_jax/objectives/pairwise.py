"""Objectives on ordered pairs that see a pair as one number, a_w - a_l.

A longer list counts as all its ordered pairs. `pairwise_errors` has those that read more
of a pair than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpo_jax.errors import UserError
from lpo_jax.objectives.lists import (
  bounded_square,
  differences,
  implicit_logits,
  is_better,
  mean_of_pairs,
)
from lpo_jax.types import Array, Denoising, Metrics, Ranking

PairLoss = Callable[[Array], Array]


def expect_labels_wrong(
  pair_loss: PairLoss, label_smoothing: float = 0.0, flip_noise: float = 0.0
) -> PairLoss:
  """The loss of a pair whose label may be wrong; orthogonal to which loss it is.

  Args:
    pair_loss: f(a_w - a_l).
    label_smoothing: e of (1 - e) f(x) + e f(-x): the expected loss if a share e of the
      labels is flipped. Conservative: it keeps the policy from being sure.
    flip_noise: e of [ (1 - e) f(x) - e f(-x) ] / (1 - 2e): in expectation over labels
      of which a share e *was* flipped, the loss on the clean ones.

  Raises:
    UserError: outside 0..1/2.

  Reference: Mitchell 2023 (a note on DPO with noisy preferences); Chowdhury, Kini &
  Natarajan 2024 (arXiv:2403.00409), eq. 12.
  """
  for name, value in (("label_smoothing", label_smoothing), ("flip_noise", flip_noise)):
    if not 0 <= value < 0.5:
      raise UserError(f"objective.{name}={value}: expected a share in [0, 0.5).")
  if not (label_smoothing or flip_noise):
    return pair_loss

  def loss(inside: Array) -> Array:
    right, wrong = pair_loss(inside), pair_loss(-inside)
    e = label_smoothing
    # Both are mixtures of the two labels, so that their order does not matter.
    right, wrong = (1 - e) * right + e * wrong, (1 - e) * wrong + e * right
    return ((1 - flip_noise) * right - flip_noise * wrong) / (1 - 2 * flip_noise)

  return loss


def mean_over_pairs(
  pair_loss: PairLoss,
  logits: Array,
  ranking: Ranking,
  *,
  label_smoothing: float = 0.0,
  flip_noise: float = 0.0,
) -> Array:
  """Mean over each list's ordered pairs of pair_loss(a_w - a_l), then over lists.

  Args:
    pair_loss: elementwise function of the [B, N, N] differences a_w - a_l.
    logits: [B, N] fp32, 0 where invalid.
    ranking: says which pairs are ordered.
    label_smoothing: of `expect_labels_wrong`.
    flip_noise: of `expect_labels_wrong`.
  """
  ordered = is_better(ranking)
  inside = jnp.where(ordered, differences(logits), 0.0)
  pair_loss = expect_labels_wrong(pair_loss, label_smoothing, flip_noise)
  return mean_of_pairs(pair_loss(inside), ordered, ranking)


def dpo(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  flip_noise: float = 0.0,
) -> tuple[Array, Metrics]:
  r"""Diffusion-DPO: the winner's denoising should improve more than the loser's.

  L = -log sigmoid( -beta/2 [ (m_w - r_w) - (m_l - r_l) ] )

      code               paper
      denoising.err      m = ||eps - eps_theta||^2 / D
      denoising.ref_err  r = ||eps - eps_ref||^2 / D
      beta               beta T omega(lambda_t), in the released code's units

  Intuition: logistic regression on who won, with the improvement over the reference as
  the score. Step 0 gives log 2.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: inverse temperature; 2000 to 5000 in published SD1.5 and SDXL runs.
    label_smoothing: share of labels expected to be wrong; see `expect_labels_wrong`.
    flip_noise: the same, corrected for instead of hedged against.

  Returns:
    Scalar loss and no extra metrics.

  Reference: Wallace et al. 2023, eq. 14 (arXiv:2311.12908).
  """
  loss = mean_over_pairs(
    lambda inside: -jax.nn.log_sigmoid(inside),
    implicit_logits(denoising, ranking, beta),
    ranking,
    label_smoothing=label_smoothing,
    flip_noise=flip_noise,
  )
  return loss, {}


def ipo(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  flip_noise: float = 0.0,
) -> tuple[Array, Metrics]:
  r"""IPO: the winner's advantage should reach a fixed margin, and stop there.

  L = ( beta h - 1/2 )^2  =  beta^2 ( h - 1 / (2 beta) )^2,   beta h = a_w - a_l

      code               paper
      a_w - a_l          beta h = beta [log pi_w/ref_w - log pi_l/ref_l]
      denoising.err      m in a = -beta/2 (m - r)
      denoising.ref_err  r in a = -beta/2 (m - r)
      beta               tau, in Diffusion-DPO's code units

  Intuition: regression to a margin instead of a race: a pair that everyone agrees on
  cannot push the policy ever further. Step 0 gives 1/4.

  The printed loss is this over beta^2. The minimum is the same; but beta is thousands
  here and h thousandths, so that the printed gradients are about beta^2 below DPO's
  and would drown in Adam's epsilon.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: inverse temperature; the margin on h is 1 / (2 beta). No published diffusion
      run is known to us (diffusers' `--loss_type ipo` stops with an error).
    label_smoothing: share of labels expected to be wrong; see `expect_labels_wrong`.
    flip_noise: the same, corrected for instead of hedged against.

  Returns:
    Scalar loss and no extra metrics.

  Reference: Azar et al. 2023, eq. 17 (arXiv:2310.12036).
  """
  loss = mean_over_pairs(
    lambda inside: bounded_square(inside - 0.5),
    implicit_logits(denoising, ranking, beta),
    ranking,
    label_smoothing=label_smoothing,
    flip_noise=flip_noise,
  )
  return loss, {}


def dpo_hinge(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  flip_noise: float = 0.0,
) -> tuple[Array, Metrics]:
  r"""Hinge DPO: pairs won by a margin of 1 are done.

  L = max( 0, 1 - (a_w - a_l) )

      code               paper
      a_w - a_l          beta [log pi_w/ref_w - log pi_l/ref_l]
      denoising.err      m in a = -beta/2 (m - r)
      denoising.ref_err  r in a = -beta/2 (m - r)
      beta               gamma, in Diffusion-DPO's code units

  Intuition: a support vector machine where DPO is a logistic regression: no gradient
  from what is already clear. Step 0 gives 1.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: inverse temperature; diffusers' `--loss_type hinge` has no factor 1/2, so that
      its 2500 is 5000 here.
    label_smoothing: share of labels expected to be wrong; see `expect_labels_wrong`.
    flip_noise: the same, corrected for instead of hedged against.

  Returns:
    Scalar loss and no extra metrics.

  Reference: Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425); Liu et al. 2023
  (arXiv:2309.06657), eq. 11.
  """
  loss = mean_over_pairs(
    lambda inside: jax.nn.relu(1.0 - inside),
    implicit_logits(denoising, ranking, beta),
    ranking,
    label_smoothing=label_smoothing,
    flip_noise=flip_noise,
  )
  return loss, {}


def poly_dpo(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float,
  alpha: float,
  label_smoothing: float = 0.0,
  flip_noise: float = 0.0,
) -> tuple[Array, Metrics]:
  r"""Poly-DPO: DPO with one more term of its expansion around certainty.

  L = -log p + alpha (1 - p),   p = sigmoid(a_w - a_l)

      code               paper
      denoising.err      m in a = -beta/2 (m - r)
      denoising.ref_err  r in a = -beta/2 (m - r)
      alpha              alpha
      beta               beta, in Diffusion-DPO's code units

  Intuition: the gradient is DPO's times (1 + alpha p): positive alpha trusts pairs the
  policy already leans to (noisy labels), negative alpha presses on those it loses.
  alpha = 0 is DPO. Step 0 gives log 2 + alpha / 2.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: inverse temperature, as for DPO.
    alpha: 8 on noisy Pick-a-Pic v2, near 0 on clean labels, below 0 on easy ones; below
      -1 pairs that are all but won are pushed apart again.
    label_smoothing: share of labels expected to be wrong; see `expect_labels_wrong`.
    flip_noise: the same, corrected for instead of hedged against.

  Returns:
    Scalar loss and no extra metrics.

  Reference: ViPO, arXiv:2604.24953 (known to us by its formula).
  """

  def pair_loss(inside: Array) -> Array:
    return -jax.nn.log_sigmoid(inside) + alpha * jax.nn.sigmoid(-inside)

  loss = mean_over_pairs(
    pair_loss,
    implicit_logits(denoising, ranking, beta),
    ranking,
    label_smoothing=label_smoothing,
    flip_noise=flip_noise,
  )
  return loss, {}


def dmpo(
  denoising: Denoising, ranking: Ranking, *, beta: float, alpha: float = 0.01
) -> tuple[Array, Metrics]:
  r"""DMPO: the policy's belief in the label should be the smoothed label itself.

  L = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),   p = sigmoid(a_w - a_l),  q = 1 - alpha

      code               paper
      denoising.err      m in a = -beta/2 (m - r)
      denoising.ref_err  r in a = -beta/2 (m - r)
      alpha              alpha, the label's doubt
      beta               beta, in Diffusion-DPO's code units

  Intuition: the *reverse* KL divergence to the label: it seeks a mode, has its minimum
  0 at a finite margin log(q / alpha), and gives up on pairs that are lost by far, where
  its gradient goes to 0. Step 0 gives 1/2 log(1/2 / q) + 1/2 log(1/2 / alpha).

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: inverse temperature; 2000 for SD1.5 and 6000 for SDXL are published.
    alpha: share of labels expected to be wrong, above 0; 0.01 is published.

  Returns:
    Scalar loss and no extra metrics.

  Raises:
    UserError: alpha outside 0..1.

  Reference: Diffusion-DMPO, arXiv:2507.07510; formula of the code released with
  Diffusion-SDPO (arXiv:2511.03317).
  """
  if not 0 < alpha < 1:
    raise UserError(f"objective.alpha={alpha}: expected a share in (0, 1), as 0.01.")

  def pair_loss(inside: Array) -> Array:
    won, lost = jax.nn.log_sigmoid(inside), jax.nn.log_sigmoid(-inside)
    p = jax.nn.sigmoid(inside)
    return p * (won - math.log1p(-alpha)) + (1.0 - p) * (lost - math.log(alpha))

  logits = implicit_logits(denoising, ranking, beta)
  return mean_over_pairs(pair_loss, logits, ranking), {}
