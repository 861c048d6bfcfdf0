"""Folders of images by others: which file is of which prompt and seed."""

import json

import numpy as np
import pytest
from PIL import Image

from lpo_jax.data import image_folders
from lpo_jax.data.image_folders import Case
from lpo_jax.errors import UserError
from lpo_jax.types import Prompt

CASES = [
  Case(index, row, Prompt(prompt), seed)
  for index, (row, prompt, seed) in enumerate(
    [
      (0, "a cat", 5),
      (0, "a cat", 6),
      (1, 'a <dog>, "two"', 5),
      (1, 'a <dog>, "two"', 6),
    ]
  )
]


def draw(path, grey=100):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(path)
  return path


def test_files_are_found_by_their_number(tmp_path):
  for name in ("0.png", "00001.jpg", "2.webp", "0003.png", "7.png", "cover.png"):
    draw(tmp_path / name)
  (tmp_path / "notes.txt").write_text("x")
  assert image_folders.has_images(tmp_path)
  found = image_folders.match(tmp_path, CASES)
  names = {index: path.name for index, path in found.paths.items()}
  assert names == {0: "0.png", 1: "00001.jpg", 2: "2.webp", 3: "0003.png"}
  assert not found.lacking()
  assert found.account()["unused"] == 2  # number 7 and the cover


def test_what_is_missing_or_broken_is_known_by_name(tmp_path):
  draw(tmp_path / "0.png")
  whole = draw(tmp_path / "2.png").read_bytes()
  (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
  (tmp_path / "3.png").write_bytes(b"<html>not found</html>")
  found = image_folders.match(tmp_path, CASES)
  assert found.missing == [1] and set(found.unreadable) == {2, 3}
  assert found.lacking() == {1, 2, 3}
  with pytest.raises(
    UserError,
    match=r"candidates.x: of the 4.* 1 are missing .* 2 cannot be read \(first: number 1; 2.png",
  ):
    image_folders.refuse("x", tmp_path, found, len(CASES))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_an_index_says_which_file_is_which(tmp_path, kind):
  rows = [(case.prompt, case.seed, f"sub/{3 - case.index}.png") for case in CASES]
  for _, _, name in rows:
    draw(tmp_path / name)
  if kind == "jsonl":
    keys = ("prompt", "seed", "file")
    text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
  else:
    comma = {"csv": ",", "tsv": "\t"}[kind]
    cells = [
      ['"' + prompt.replace('"', '""') + '"', str(seed), name]
      for prompt, seed, name in rows
    ]
    text = "\n".join(comma.join(row) for row in [["prompt", "seed", "file"], *cells])
  (tmp_path / f"index.{kind}").write_text(text)
  found = image_folders.match(tmp_path, CASES)
  names = {index: path.name for index, path in found.paths.items()}
  assert names == {0: "3.png", 1: "2.png", 2: "1.png", 3: "0.png"}
  assert not found.lacking()


def index(folder, *rows):
  folder.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "index.jsonl").write_text(text)
  return folder


def test_without_seeds_a_prompts_rows_are_its_images_in_turn(tmp_path):
  names = ["x.png", "y.png", "z.png"]
  for name in names:
    draw(tmp_path / name)
  index(tmp_path, *({"prompt": "a cat", "file": name} for name in names))
  found = image_folders.match(tmp_path, CASES)
  assert {i: path.name for i, path in found.paths.items()} == {0: "x.png", 1: "y.png"}
  assert found.missing == [2, 3] and found.account()["unused"] == 1


def test_an_index_stays_in_its_folder(tmp_path):
  draw(tmp_path / "secret.png")
  row = {"prompt": "a cat", "seed": 5, "file": "../secret.png"}
  with pytest.raises(UserError, match="outside of its folder"):
    image_folders.match(index(tmp_path / "images", row), CASES)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([{"prompt": "a cat", "seed": 5}], "KeyError: 'file'"),
    ([{"prompt": "a cat", "seed": "x", "file": "a.png"}], "'x' is no whole number"),
    (
      [{"prompt": "a cat", "seed": 5, "file": "a.png"}] * 2,
      "two images of 'a cat', seed 5",
    ),
    ([["a cat", 5, "a.png"]], "cannot be read"),
  ],
)
def test_an_index_that_makes_no_sense(tmp_path, rows, message):
  with pytest.raises(UserError, match=message):
    image_folders.match(index(tmp_path, *rows), CASES)


def test_two_files_of_one_number(tmp_path):
  draw(tmp_path / "1.png")
  draw(tmp_path / "001.png")
  with pytest.raises(
    UserError, match=r"two images of number 1: '001\.png' and '1\.png'"
  ):
    image_folders.match(tmp_path, CASES)


def test_a_folder_without_images(tmp_path):
  (tmp_path / "notes.txt").write_text("x")
  assert not image_folders.has_images(tmp_path)
  assert not image_folders.has_images(tmp_path / "nowhere")
