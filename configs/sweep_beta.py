"""A sweep over beta, the strength of the pull towards the reference.

Reproduces nothing published: it finds the beta that the papers leave open or that other
data need. A sweep is a config and what differs between its runs; launch/sweep.py runs
them here or through any launcher, and compares them.

  python launch/sweep.py configs/sweep_beta.py --workdir runs/sweep_beta \\
      --config.model.path=... --config.data.path=...
  python launch/sweep.py configs/sweep_beta.py:digits --workdir runs/sweep_digits

One run by itself, here with the middle beta of Diffusion-DPO's SDXL:

  python -m lpo_jax.main --config configs/sweep_beta.py --workdir runs/beta5000

Hardware and hours: four times those of configs/lpo_sd15.py, not run by us. `:digits` is
the quickstart's world on 2 CPU cores, about 3 minutes a run; `:smoke` is shorter still,
with too few images for any claim. Expected: drift falls as beta rises; where win rates
are highest is what the sweep is for.

Numbers without a source are unpublished; chosen around Diffusion-DPO's 2000 (SD1.5) and
5000 (SDXL, and the released launchers), and around the quickstart's 2000.
"""

from lpo_jax.configs import lpo_sd15, quickstart
from lpo_jax.errors import unknown_name

WORLDS = {
  "": (500.0, 2000.0, 5000.0, 8000.0),
  "digits": (500.0, 2000.0, 8000.0),
  "smoke": (500.0, 2000.0),
}


def get_config(world: str = ""):
  """Returns what the runs have in common."""
  if world not in WORLDS:
    raise unknown_name("world of the sweep", world, WORLDS)
  if not world:
    return lpo_sd15.get_config()
  config = quickstart.get_config("smoke" if world == "smoke" else "")
  config.quickstart.methods = {"lpo": config.quickstart.methods.lpo.to_dict()}
  return config


def get_sweep(world: str = "") -> dict:
  """Returns the jobs, and the runs by name with what differs in each.

  Jobs under "shared" run once, before the others; those under "each" in every run.
  """
  runs = {f"beta{beta:g}": {"objective.beta": beta} for beta in WORLDS[world]}
  if world:
    return {"shared": (), "each": ("quickstart",), "runs": runs}
  return {"shared": ("cache",), "each": ("train",), "runs": runs}
