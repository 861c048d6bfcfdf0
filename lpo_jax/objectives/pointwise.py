"""Objectives that look at one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lpo_jax import tables
from lpo_jax.objectives.lists import mean_over_lists
from lpo_jax.types import Array, Denoising, Metrics, Ranking


def sft(denoising: Denoising, ranking: Ranking) -> tuple[Array, Metrics]:
  r"""Supervised fine-tuning: denoise the best image of each list.

  L = mean over lists of  (1 / |W|) sum_{i in W} ||eps_theta(x_t^i, t, c) - eps||^2

      code               paper
      denoising.err      ||eps_theta(x_t, t, c) - eps||^2 / D
      rank == 0          x^w, the preferred image(s) W

  Intuition: imitate what won, ignore by how much and over what. A plain data set of
  images is lists of one.

  Args:
    denoising: `err` [B, N] is read.
    ranking: ranks and validity [B, N], weights [B].

  Returns:
    Scalar loss and no extra metrics.

  Reference: Ho et al. 2020, eq. 14; as a preference baseline Wallace et al. 2023, 5.1.
  """
  best = ranking.valid & (ranking.rank == 0)
  count = jnp.sum(best, axis=1)
  error = jnp.sum(jnp.where(best, denoising.err, 0.0), axis=1)
  return mean_over_lists(error / jnp.maximum(count, 1), count > 0, ranking), {}


# Losses -U(x), up to a constant, by the shape of the utility U.
UTILITIES: Mapping[str, Callable[[Array], Array]] = {
  # U = sigmoid, Kahneman and Tversky: both gains and losses saturate. 1 - sigmoid(x).
  "sigmoid": lambda x: jax.nn.sigmoid(-x),
  # U = log sigmoid(x), concave: losses hurt without bound.
  "loss_averse": lambda x: -jax.nn.log_sigmoid(x),
  # U = -log sigmoid(-x), convex: gains please without bound, the loss has no minimum.
  "risk_seeking": lambda x: jax.nn.log_sigmoid(-x),
}


def kto(
  denoising: Denoising, ranking: Ranking, *, beta: float, utility: str = "sigmoid"
) -> tuple[Array, Metrics]:
  r"""Diffusion-KTO: each image is liked or not, against what is usual.

  L = mean_i [ 1 - U( y_i beta (g_i - z) ) ],   g_i = r_i - m_i,   U = sigmoid

      code               paper
      denoising.err      m_i = ||eps - eps_theta||^2 / D
      denoising.ref_err  r_i = ||eps - eps_ref||^2 / D
      rank == 0          y_i = +1, desirable; all other ranks -1, undesirable
      baseline           z = max(mean g, 0), the Q_ref of the text, in units of g
      beta               beta, in the released code's units

  Intuition: no pairs; an image is a gain or a loss relative to how much the policy
  has improved on everything, and a saturating utility stops caring about both ends.
  Step 0 gives 1/2. There is no factor 1/2 on beta here: KTO's 5000 is DPO's 10000.

  The baseline is one number for the whole update, over every valid item of the lists of
  positive weight, on all devices and microbatches, and carries no gradient. An
  undesirable image alone is a list of one with rank 1. Images count equally within a
  list, and lists by weight: with lists of one this is the released mean over images.

  Args:
    denoising: `err` and `ref_err` [B, N] are read.
    ranking: ranks and validity [B, N], weights [B].
    beta: inverse temperature; 5000 in the paper (the released script defaults to 1000).
    utility: a name in `UTILITIES`; the paper found "sigmoid" best of the three.

  Returns:
    Scalar loss, and `kto_baseline`: z.

  Raises:
    UserError: an unknown utility.

  Reference: Li et al. 2024 (arXiv:2404.04465), and its released code for z.
  """
  valid = ranking.valid
  gain = jnp.where(valid, denoising.ref_err - denoising.err, 0.0)
  counted = valid & (ranking.weight > 0)[:, None]
  mean = jnp.sum(jnp.where(counted, gain, 0.0)) / jnp.maximum(jnp.sum(counted), 1)
  baseline = jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
  sign = jnp.where(ranking.rank == 0, 1.0, -1.0)
  loss_of = tables.bind("utility", UTILITIES, utility, {})
  losses = jnp.where(valid, loss_of(sign * beta * (gain - baseline)), 0.0)
  count = jnp.sum(valid, axis=1)
  per_list = jnp.sum(losses, axis=1) / jnp.maximum(count, 1)
  loss = mean_over_lists(per_list, count > 0, ranking)
  return loss, {"kto_baseline": baseline}
