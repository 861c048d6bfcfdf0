"""Objectives on ordered pairs that read more of a pair than a_w - a_l."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lpo_jax import tables
from lpo_jax.objectives.lists import (
  bounded_square,
  calibrate,
  differences,
  implicit_logits,
  is_better,
  mean_of_pairs,
  rewards_of,
)
from lpo_jax.types import Array, Denoising, Metrics, Ranking


def _inverse_mean_exponential(x: Array) -> Array:
  """x / (e^x - 1), finite with its gradient for all x, and 1 at 0."""
  small = jnp.abs(x) < 0.3
  near = jnp.where(small, x, 0.0)
  s = jnp.square(near)
  series = 1.0 - near / 2 + s / 12 - s**2 / 720 + s**3 / 30240
  far = jnp.where(small, 1.0, x)
  y = jnp.abs(far)
  # phi(-y) = phi(y) + y, and phi(y) in terms of e^-y cannot overflow.
  direct = y * jnp.exp(-y) / -jnp.expm1(-y) + jnp.maximum(-far, 0.0)
  return jnp.where(small, series, direct)


def mapo(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float = 0.1,
  snr_value: float = 0.5,
  sharpness: float = 1000.0,
) -> tuple[Array, Metrics]:
  r"""MaPO: margin-aware and without a reference, supervised learning on the winner.

  L = m_w - beta log sigmoid( 1000 [ phi(m_w) - phi(m_l) ] ),   phi(l) = s l / (e^{s l} - 1)

      code               paper
      denoising.err      m = ||eps - eps_theta||^2 / D
      snr_value          s
      sharpness          1000, of the released code
      beta               beta of the released code; 1/beta in the text

  Intuition: draw the winner well (first term), and better than the loser (second); phi
  falls from 1 as the error grows. No reference: half the network passes and no anchor.
  Step 0 gives the error plus beta log 2 where all errors are equal.

  Args:
    denoising: `err` [B, N] is read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: weight of the margin; 0.1 is the released default.
    snr_value: s; 0.5 is the released default.
    sharpness: of the sigmoid. The text has an exponent on phi instead, whose reading is
      uncertain; this is what was run.

  Returns:
    Scalar loss and no extra metrics.

  Reference: Hong et al. 2024 (arXiv:2406.06424), and its released code.
  """
  err = jnp.where(ranking.valid, denoising.err, 0.0)
  margin = differences(_inverse_mean_exponential(snr_value * err))
  losses = err[:, :, None] - beta * jax.nn.log_sigmoid(sharpness * margin)
  return mean_of_pairs(losses, is_better(ranking), ranking), {}


def _dspo_sd15(c: Array, winner: Denoising, _: Callable[[Array], Array]) -> Array:
  inner = 0.5 * (winner.err + winner.drift - winner.ref_err)
  return winner.err - 2.0 * c * inner + jnp.square(c) * winner.drift


def _dspo_sdxl(
  doubt: Array, winner: Denoising, mean: Callable[[Array], Array]
) -> Array:
  moved = mean(winner.drift) >= 0.1
  return jnp.square(doubt) * jnp.where(moved, winner.drift, 1.0)


# The two branches of the released code are different losses.
DSPO_FORMS: Mapping[str, Callable[..., Array]] = {
  "sd15": _dspo_sd15,
  "sdxl": _dspo_sdxl,
}


def dspo(
  denoising: Denoising,
  ranking: Ranking,
  *,
  beta: float = 0.001,
  form: str = "sd15",
  detach: bool = False,
) -> tuple[Array, Metrics]:
  r"""DSPO: match the score of the winner, moved by what the preference says.

  L = mean( [ (eps_theta^w - eps) - c (eps_theta^w - eps_ref^w) ]^2 ),
  c = beta (1 - sigmoid(a_w - a_l))

      code               paper
      denoising.err      ||eps_theta - eps||^2 / D
      denoising.ref_err  ||eps_ref - eps||^2 / D
      denoising.drift    ||eps_theta - eps_ref||^2 / D
      beta               beta, both in c and in a = -beta/2 (m - r)

  With e = eps_theta - eps and q = eps_theta - eps_ref, e - q = eps_ref - eps, so that
  <e, q> = (err + drift - ref_err) / 2 and the loss is err - 2 c <e, q> + c^2 drift:
  the three scalars are enough.

  Intuition: denoise the winner, to a target that lies beyond it, away from the
  reference, by as much as the pair is still in doubt. Step 0 gives the plain error.

  sigmoid(a_w - a_l) is *not* detached, as in the released code: the loser is pushed
  through it alone (with beta = 0.001 very little). `detach=True` makes c a weight, and
  the loser then has no gradient at all.

  `form="sdxl"` is the released code's other branch, a different loss, kept for
  reproduction: with p = sigmoid(a_w - a_l), (1 - p)^2 drift_w where the mean drift of
  the winners of the update is at least 0.1, and (1 - p)^2 below. It jumps there.

  Args:
    denoising: all of [B, N] err, ref_err and drift are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: 0.001 (0.01 and 0.05 were tried) for "sd15"; 1000 to 5000 for "sdxl".
    form: a name in `DSPO_FORMS`.
    detach: no gradient through c (through 1 - p in "sdxl").

  Returns:
    Scalar loss and no extra metrics.

  Raises:
    UserError: an unknown form.

  Reference: Zhu et al., ICLR 2025 (OpenReview xyfb9HHvMe); formula of the released
  code.
  """
  ordered, valid = is_better(ranking), ranking.valid
  logits = implicit_logits(denoising, ranking, beta)
  doubt = jax.nn.sigmoid(-jnp.where(ordered, differences(logits), 0.0))
  doubt = jax.lax.stop_gradient(doubt) if detach else doubt
  winner = jax.tree.map(
    lambda x: jnp.broadcast_to(jnp.where(valid, x, 0.0)[:, :, None], ordered.shape),
    denoising,
  )
  pair_loss = tables.bind("form", DSPO_FORMS, form, {})
  factor = doubt if form == "sdxl" else beta * doubt
  losses = pair_loss(factor, winner, lambda x: mean_of_pairs(x, ordered, ranking))
  return mean_of_pairs(losses, ordered, ranking), {}


def linear_dpo(
  denoising: Denoising, ranking: Ranking, *, beta: float, eta: float = 1e-3
) -> tuple[Array, Metrics]:
  r"""Linear-DPO: the difference of errors, weighted by a clipped line, not a sigmoid.

  L = w (m_w - m_l),   w = stopgrad clip( 0.2 beta [(m_w - r_w) - (m_l - r_l)] + 0.5, eta, 1 - eta )

      code               paper
      denoising.err      m = ||eps - eps_theta||^2 / D
      denoising.ref_err  r = ||eps - eps_ref||^2 / D
      eta                eta
      beta               beta of the released code; 0.2 beta there is 0.4 a here

  Intuition: DPO's gradient is (m_w - m_l)' times a sigmoid; replace that by a line that
  never quite vanishes. Step 0 has weight 1/2; the *loss* is no measure of progress (0
  for equal errors, and below 0 later).

  The published recipe also moves the reference (an average of the policy), which is
  the trainer's business and not the objective's.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B]; pairs of equal rank say nothing.
    beta: 100 for SD1.5 and 500 for SDXL are published.
    eta: least weight of a pair; 0.001 is published.

  Returns:
    Scalar loss and no extra metrics.

  Reference: Linear-DPO, arXiv:2605.21123, and its released code.
  """
  err = jnp.where(ranking.valid, denoising.err, 0.0)
  behind = -differences(implicit_logits(denoising, ranking, beta))
  weight = jax.lax.stop_gradient(jnp.clip(0.4 * behind + 0.5, eta, 1.0 - eta))
  return mean_of_pairs(weight * differences(err), is_better(ranking), ranking), {}


def capo(
  denoising: Denoising, ranking: Ranking, *, beta: float, rewards: str = "score"
) -> tuple[Array, Metrics]:
  r"""CaPO: the policy's advantage should equal the calibrated reward's.

  L = ( [R_ca(w) - R_ca(l)] - [a_w - a_l] )^2,   R_ca(i) = mean_{j != i} sigmoid(R_i - R_j)

      code               paper
      ranking.score      R_i, a reward model's score
      a_w - a_l          beta [R_theta(w) - R_theta(l)]
      denoising.err      m in a = -beta/2 (m - r)
      denoising.ref_err  r in a = -beta/2 (m - r)
      beta               beta, in Diffusion-DPO's code units

  Intuition: reward models have arbitrary scales; the win rate against the other images
  of the same prompt has not. Regress on its differences. Step 0 gives the mean square of
  the calibrated differences; beta only scales a.

  Scores decide how far and ranks only which pairs count. Pareto pairs over several
  rewards are a matter of the lists, the weight sigmoid(-lambda_t + b) one of noising.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks, validity and scores [B, N], weights [B]; pairs of equal rank say
      nothing.
    beta: inverse temperature; not known to us.
    rewards: "score", or "wins" where there are only ranks.

  Returns:
    Scalar loss and no extra metrics.

  Raises:
    UserError: an unknown source of rewards.

  Reference: CaPO, arXiv:2502.02588 (known to us by its formula).
  """
  aim = calibrate(rewards_of(ranking, rewards), ranking.valid)
  gap = differences(aim - implicit_logits(denoising, ranking, beta))
  return mean_of_pairs(bounded_square(gap), is_better(ranking), ranking), {}


def dro(
  denoising: Denoising, ranking: Ranking, *, margin: float = 0.001
) -> tuple[Array, Metrics]:
  r"""Diffusion-DRO: the expert's image should improve more than the policy's own.

  L = max( d_E - d_P + margin, 0 ),   d = m - r

      code               paper
      denoising.err      m = ||f_phi(x_t) - target||^2 / D
      denoising.ref_err  r = ||f_ref(x_t) - target||^2 / D
      rank == 0          E: the demonstration, target = the noise that was added
      other ranks        P: the policy's sample, target = the noise it predicted there
      margin             -m of the text (whose loss differs by a constant)

  Intuition: imitation by contrast: once what an expert drew is denoised better than what
  the policy draws by itself, there is nothing left to learn from the pair. No beta.
  Step 0 gives the margin.

  The targets are the noising's business. Several samples to one expert are averaged;
  two samples are never compared with each other, whatever their ranks.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B].
    margin: in units of mean squared error; 0.001 is published.

  Returns:
    Scalar loss and no extra metrics.

  Reference: Diffusion-DRO, NeurIPS 2025 (arXiv:2510.18353), and its released code.
  """
  d = jnp.where(ranking.valid, denoising.err - denoising.ref_err, 0.0)
  expert = is_better(ranking) & (ranking.rank == 0)[:, :, None]
  return mean_of_pairs(jax.nn.relu(differences(d) + margin), expert, ranking), {}
