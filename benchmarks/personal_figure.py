"""Draws docs/personal.png: the same prompt and seed for nobody and for different people.

  python benchmarks/personal_figure.py --workdir runs/personal --out docs/personal.png

`runs/personal` is a finished personal quickstart.
"""

import argparse
import pathlib

from PIL import Image, ImageDraw

from lpo_jax.jobs import personal_report
from lpo_jax.scoring import digit_people

SCALE, GAP, HEAD = 3, 6, 34


def main() -> None:
  """Reads the evaluation's images and writes one picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  flags = parser.parse_args()
  import pyarrow.parquet as parquet

  folder = flags.workdir / "judgements"
  people = digit_people.read(folder / "people.json")
  asked = parquet.read_table(folder / "prompts.parquet").to_pylist()
  new = sorted({row["user"] for row in asked if row["category"] == "held_out"})
  place = {(row["user"], row["prompt"]): i for i, row in enumerate(asked)}
  prompts = list(dict.fromkeys(row["prompt"] for row in asked))
  columns = {"nobody": (personal_report.COMMON, new[0])}
  columns |= {
    words: (personal_report.PERSONAL, user)
    for words, user in personal_report.clearest(people, new).items()
  }
  side = SCALE * 32 + GAP
  page = Image.new("RGB", (side * len(columns), HEAD + side * len(prompts)), "white")
  pen = ImageDraw.Draw(page)
  for x, (words, (candidate, user)) in enumerate(columns.items()):
    pen.multiline_text((x * side + 2, 3), words.replace(" and ", "\nand "), "black")
    for y, prompt in enumerate(prompts):
      file = f"{place[user, prompt]:05d}.png"
      image = Image.open(flags.workdir / "evaluation" / candidate / file)
      image = image.resize((SCALE * 32,) * 2, Image.Resampling.BICUBIC)
      page.paste(image, (x * side, HEAD + y * side))
  page.convert("L").save(flags.out, optimize=True)
  print({words: user for words, (_, user) in columns.items()})


if __name__ == "__main__":
  main()
