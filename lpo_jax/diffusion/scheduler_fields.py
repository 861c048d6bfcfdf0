"""Fields of a `scheduler_config.json` that change how its sampler runs.

What the forward process and the grid are is `schedule.from_config`'s. Here is the rest,
sampler by sampler: a field is honoured, or it is refused by its name. Fields that a
sampler's counterpart in diffusers does not have are not looked at: diffusers' own
`from_config` of another class does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpo_jax.errors import UserError

FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
# field -> values with which our sampler is diffusers'; the first is diffusers' default.
_NO_OTHER_SIGMAS = {
  "use_exponential_sigmas": (False, None),
  "use_beta_sigmas": (False, None),
  "final_sigmas_type": ("zero",),
}
# `lower_order_final` and `euler_at_final` are not here: to sigma = 0 the last step is
# of first order in any case.
_DPM_SOLVER = {
  **_NO_OTHER_SIGMAS,
  # Between these two eval.sampler decides.
  "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
  "solver_order": (2,),
  "solver_type": ("midpoint",),
  "use_lu_lambdas": (False, None),
  "use_flow_sigmas": (False, None),
  "use_dynamic_shifting": (False, None),
  "lambda_min_clipped": (float("-inf"), None),
  # Only a learned variance would be another network's.
  "variance_type": (None, *FIXED_VARIANCES),
}
_EULER = {
  **_NO_OTHER_SIGMAS,
  "interpolation_type": ("linear",),
  "sigma_min": (None,),
  "sigma_max": (None,),
  "timestep_type": ("discrete",),
}
EXPECTED: Mapping[str, Mapping[str, tuple]] = {
  "ddim": {},
  "ddpm": {"variance_type": ("fixed_small", None)},
  "dpmpp_2m": _DPM_SOLVER,
  "dpmpp_2m_sde": _DPM_SOLVER,
  "euler": _EULER,
  "euler_ancestral": {},
}


def refuse_others(sampler: str, config: Mapping[str, Any]) -> None:
  """Refuses fields with which diffusers would draw other images than `sampler` does.

  Args:
    sampler: a name in `samplers.SAMPLERS`.
    config: the parsed `scheduler_config.json`; absent fields mean diffusers' defaults.

  Raises:
    UserError: names the first such field, its value and what would do.
  """
  for field, values in EXPECTED[sampler].items():
    value = config.get(field, values[0])
    if value not in values:
      could = " or ".join(repr(v) for v in values)
      raise UserError(
        f"scheduler_config.json has {field}={value!r}, which sampler {sampler!r} does "
        f"not do; expected {could}. Take another eval.sampler, or change the field in "
        "your copy of the pipeline."
      )


def sigmas(config: Mapping[str, Any]) -> str:
  """The noise levels that the file asks for: a name in `samplers.SIGMAS`."""
  return "karras" if config.get("use_karras_sigmas") else "schedule"
