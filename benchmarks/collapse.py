"""The quickstart's LPO run made to collapse: what the alarms see, and when.

  JAX_PLATFORMS=cpu python benchmarks/collapse.py --workdir runs/collapse \\
    --plot docs/collapse.png

Trains on the digits with the learning rate of the quickstart times each factor, without
EMA, so that the samples are of the weights that the metrics are of, and draws them after
every update. Alarms warn; --policy stop ends such a run with them.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from lpo_jax import console
from lpo_jax.configs import quickstart as world
from lpo_jax.errors import UserError
from lpo_jax.jobs import cache, quickstart, train
from lpo_jax.training.report import read_metrics

TRAINED, UNSEEN = "digits_taste", "digits_legibility"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--factors", type=float, nargs="+", default=[1, 100])
  parser.add_argument("--updates", type=int, default=20)
  parser.add_argument("--policy", default="warn", help="of winner_worse")
  parser.add_argument("--plot", type=pathlib.Path, help="where to draw it, PNG")
  options = parser.parse_args()
  config = world.get_config("smoke")
  config.model.path = str(quickstart.base_folder(config))
  config.data.path = str(quickstart.make_judgements(config, options.workdir))
  folders = {}
  for factor in options.factors:
    own = quickstart.method_config(config, options.workdir, "lpo")
    folders[factor] = options.workdir / f"{options.policy}_x{factor:g}"
    run(own, options, factor, folders[factor])
  if options.plot:
    plot(folders, options.plot)


def run(own: Any, options: Any, factor: float, folder: pathlib.Path) -> None:
  """Trains once; an alarm that stops the run is what was asked for."""
  full = world.get_config()
  own.train.learning_rate = full.train.learning_rate * factor
  own.train.warmup_steps = full.train.warmup_steps
  own.train.total_steps = own.train.checkpoint_every = options.updates
  own.train.ema = 0.0
  own.train.on_runaway = "off"
  own.train.alarms.winner_worse = options.policy
  own.train.alarms.trained_scorer = TRAINED
  own.train.alarms.unseen_scorer = UNSEEN
  own.data.held_out = 0.1
  own.eval.every, own.eval.held_out, own.eval.batch_size = 1, 8, 16
  cache.run(own, str(options.workdir))
  try:
    train.run(own, folder)
  except UserError as e:
    console.say(f"stopped: {e}")


def plot(folders: dict[float, pathlib.Path], path: pathlib.Path) -> None:
  """Draws winners, drift and scores of the runs, and the steps of the alarms."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
  for factor, folder in folders.items():
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    shares = (
      [-row["winner_gain"] / row["ref_err"] for row in rows],
      [row["drift"] / row["ref_err"] for row in rows],
      [row.get(f"score/{UNSEEN}") for row in rows],
    )
    for panel, values in zip(panels, shares, strict=True):
      panel.plot(steps, values, label=f"learning rate x {factor:g}")
    alarms = folder / "alarms.jsonl"
    for row in read_metrics(alarms) if alarms.exists() else []:
      for panel in panels:
        panel.axvline(row["step"], color="grey", lw=0.7, ls=":")
      panels[2].annotate(
        row["alarm"], (row["step"], 0.02), rotation=90, fontsize=7, color="grey"
      )
  bounds = world.get_config().train.alarms
  titles = (
    "winner worse than the reference, share of its error",
    "drift, share of the reference's error",
    "share of samples that a reader recognises",
  )
  for panel, title in zip(panels, titles, strict=True):
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("update")
  for panel, bound in zip(
    panels, (bounds.winner_worse_above, bounds.drift_above), strict=False
  ):
    panel.set_yscale("symlog", linthresh=0.01)
    panel.axhline(bound, color="red", lw=0.7)
  panels[2].set_ylim(0, 1.05)
  panels[0].legend(fontsize=7)
  figure.savefig(path, dpi=90)
  console.say(f"plot: {path}")


if __name__ == "__main__":
  main()
