"""Runs a quickstart with several seeds and prints the table of docs/quickstart.md.

  python benchmarks/quickstart_seeds.py --workdir runs/quickstart_seeds --seeds 0 1 2

`--config dro_quickstart` does the same for docs/online.md, `--config edit_quickstart`
for docs/editing.md, `--config personal_quickstart` for docs/personal.md: there the rows
have people as units.

A seed changes the candidates, the people's noise, and the order and noise of training;
the evaluation's prompts and seeds stay. Runs that are done are not run again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_seed(
  config: str, workdir: pathlib.Path, seed: int
) -> tuple[list[dict], dict[str, float]]:
  """Runs one quickstart; returns the rows of its summary and its stages' seconds."""
  command = [
    sys.executable,
    "-m",
    "lpo_jax.main",
    f"--config={ROOT / 'configs' / f'{config}.py'}",
    f"--workdir={workdir}",
    f"--config.seed={seed}",
  ]
  subprocess.run(command, check=True)
  rows = json.loads((workdir / "summary.json").read_text("utf-8"))
  people = workdir / "evaluation" / "people.json"
  if people.exists():
    rows = [row for row in json.loads(people.read_text("utf-8")) if row["category"]]
    rows = [
      {**row, "candidate": f"{row['category']}: {row['candidate']}"} for row in rows
    ]
  return rows, json.loads((workdir / "timings.json").read_text("utf-8"))


def main() -> None:
  """Runs all seeds, then prints one Markdown table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--config", default="quickstart")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  flags = parser.parse_args()
  results = {
    seed: run_seed(flags.config, flags.workdir / f"seed{seed}", seed)
    for seed in flags.seeds
  }
  lines = ["| seed | comparison | scorer | win rate | 95 % interval | means |"]
  lines.append("|--:|---|---|--:|---|---|")
  for seed, (rows, _) in results.items():
    for row in rows:
      # The cut-back checkpoint is whichever method drifted further: one name for both.
      names = [row[k].replace(", drift of ", " at the drift of ") for k in SIDES]
      lines.append(
        f"| {seed} | {names[0]} over {names[1]} | {row['scorer']} | "
        f"{row['win_rate']:.3f} | {row['ci_low']:.3f} to {row['ci_high']:.3f} | "
        f"{row['mean_candidate']:.3f} / {row['mean_baseline']:.3f} |"
      )
  print("\n".join(lines))
  for seed, (_, seconds) in results.items():
    print(f"seed {seed}: {sum(seconds.values()):.0f} s in all")


SIDES = ("candidate", "baseline")

if __name__ == "__main__":
  main()
