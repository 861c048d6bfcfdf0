"""Prompt sets: formats, what is counted, and published ones without a network."""

import hashlib
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from lpo_jax.data import prompts, published_prompts
from lpo_jax.errors import UserError
from lpo_jax.types import Prompt

TEXTS = ["a cat", 'two "dogs", one tail', "a\u2028line"]
STYLES = ["animals", "animals", ""]


def write_tsv(path):
  rows = zip(TEXTS, STYLES, strict=True)
  lines = [
    "Prompt\tCategory\tChallenge\tNote",
    *(f"{t}\t{s}\tBasic\t" for t, s in rows),
  ]
  path.write_text("\n".join(lines) + "\n", "utf-8")


def write_csv(path):
  quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
  rows = [f"{s},{t}" for t, s in zip(quoted, STYLES, strict=True)]
  path.write_text("\r\n".join(["style,caption", *rows]) + "\r\n", "utf-8")


def write_jsonl(path):
  rows = [{"prompt": t, "category": s} for t, s in zip(TEXTS, STYLES, strict=True)]
  path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def write_parquet(path):
  parquet.write_table(pa.table({"style": STYLES, "caption": TEXTS}), path)


WRITERS = {
  ".tsv": write_tsv,
  ".csv": write_csv,
  ".jsonl": write_jsonl,
  ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables_have_prompts_and_categories(tmp_path, suffix):
  path = tmp_path / f"set{suffix}"
  WRITERS[suffix](path)
  found = prompts.load(path)
  assert list(found.texts) == TEXTS == prompts.read(path)
  assert list(found.categories) == STYLES
  assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert found.facts()["categories"] == {"animals": 2, "": 1}
  assert not found.pinned and found.source == str(path)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("set.txt", "\ufeffa cat\r\ntwo dogs\n"),
    ("set.json", '["a cat", "two dogs"]'),
    ("set.json", '{"0": "a cat", "1": {"prompt": "two dogs"}}'),
  ],
)
def test_lists_of_texts_have_no_categories(tmp_path, name, content):
  path = tmp_path / name
  path.write_text(content, "utf-8")
  found = prompts.load(path)
  assert found.texts == ("a cat", "two dogs") and found.categories == ()
  assert found.facts()["categories"] == {}


def test_what_is_odd_is_counted_and_only_half_characters_are_changed(tmp_path):
  path = tmp_path / "set.json"
  texts = ["a cat", " ", "a cat", "bell\x07", "\u202ertl", "half \ud800", "", "a cat"]
  path.write_text(json.dumps(texts), "utf-8")
  found = prompts.load(path)
  assert found.texts == (
    "a cat",
    "a cat",
    "bell\x07",
    "\u202ertl",
    "half \ufffd",
    "a cat",
  )
  facts = found.facts()
  assert (facts["blank"], facts["repeated"], facts["controls"]) == (2, 2, 2)
  assert facts["surrogates"] == 1 and facts["prompts"] == 6
  given = prompts.load(texts)
  assert given.texts == found.texts and given.source == "given"


def test_a_set_must_have_the_hash_that_is_asked_for(tmp_path):
  path = tmp_path / "set.txt"
  path.write_text("a cat\n")
  digest = hashlib.sha256(b"a cat\n").hexdigest()
  assert prompts.load(path, sha256=digest).pinned
  with pytest.raises(
    UserError, match=rf"has the hash {digest}, and eval.prompts_sha256"
  ):
    prompts.load(path, sha256="0" * 64)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("set.txt", "\n \n", "holds no prompt"),
    ("set.json", "[1, 2]", "entry 0 is int"),
    ("set.json", '"a cat"', "holds str, not a list"),
    ("set.json", "[", "cannot be read as .json"),
    ("set.txt", b"\xff\xfe", "cannot be read as .txt"),
    ("set.tsv", "words\tother\na\tb\n", "none of them one of Prompt, prompt"),
    ("set.jsonl", '{"words": "a"}\n', "none of them one of Prompt, prompt"),
    ("set.parquet", b"PAR1", "cannot be read as .parquet"),
    ("set.text", "a", "did you mean '.txt'"),
  ],
)
def test_what_is_no_prompt_set_says_why(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=message):
    prompts.load(path)


def test_the_list_of_published_sets_is_part_of_the_refusal():
  with pytest.raises(UserError, match=r"'nowhere' is no file.*partiprompts, hpdv2,"):
    prompts.load("nowhere")


@pytest.fixture
def offline_home(tmp_path, monkeypatch):
  """A home folder whose cache holds nothing, and no network."""
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  return tmp_path / ".cache" / "lpo_jax" / "prompts"


def test_a_published_set_is_what_its_hash_says(offline_home, monkeypatch):
  content = b"Prompt\tCategory\na cat\tAnimals\n"
  digest = hashlib.sha256(content).hexdigest()
  file = published_prompts.Published("https://example.invalid/set.tsv", sha256=digest)
  monkeypatch.setitem(published_prompts.SETS, "partiprompts", (file,))
  with pytest.raises(
    UserError, match=r"'partiprompts' is not on this machine.*set\.tsv"
  ):
    prompts.load("partiprompts")
  offline_home.mkdir(parents=True)
  (offline_home / "partiprompts.tsv").write_bytes(content)
  found = prompts.load("partiprompts")
  assert found.texts == ("a cat",) and found.categories == ("Animals",)
  assert found.pinned and found.sha256 == digest
  (offline_home / "partiprompts.tsv").write_bytes(content + b"more")
  with pytest.raises(
    UserError, match=rf"expected {digest}. It was cut short or changed"
  ):
    prompts.load("partiprompts")


def test_several_files_are_one_set_with_a_category_each(offline_home, monkeypatch):
  files = tuple(
    published_prompts.Published(f"https://example.invalid/{style}.json", category=style)
    for style in ("anime", "photo")
  )
  monkeypatch.setitem(published_prompts.SETS, "hpdv2", files)
  contents = {"anime": '["one", "two"]', "photo": '["two"]'}

  def get(name, one):
    path = offline_home.parent / f"{one.category}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents[one.category])
    return path

  monkeypatch.setattr(published_prompts, "_download", get)
  found = prompts.load("hpdv2")
  assert found.texts == ("one", "two", "two")
  assert found.categories == ("anime", "anime", "photo")
  assert found.repeated == 1 and not found.pinned
  hashes = [hashlib.sha256(text.encode()).hexdigest() for text in contents.values()]
  assert found.sha256 == hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def test_a_set_on_the_hub_offline_says_what_to_get(offline_home):
  with pytest.raises(
    UserError, match=r"get benchmark/anime\.json of zhwang/HPDv2 on the"
  ):
    prompts.load("hpdv2_anime")
  with pytest.raises(UserError, match="prompt set 'hpdv'; did you mean 'hpdv2'"):
    published_prompts.fetch("hpdv")


def test_every_pin_is_a_whole_hash():
  for name, files in published_prompts.SETS.items():
    for file in files:
      assert len(file.sha256) in (0, 64), name
      assert file.revision == "main" or len(file.revision) == 40, name


# What published sets call instruction, source, right edit and captions.
EDITS = {
  "canonical": ("instruction", "cond_image", "target_image", "source_caption", "target_caption"),
  "instructpix2pix": (
    *("edit_prompt", "original_image", "edited_image"),
    *("original_prompt", "edited_prompt"),
  ),
  "magicbrush": ("instruction", "source_img", "target_img", "source_caption", "target_caption"),
  "hq_edit": ("edit", "input_image", "output_image", "input", "output"),
}  # fmt: skip


@pytest.mark.parametrize("kind", EDITS)
def test_edits_come_with_their_pictures_and_captions(tmp_path, kind):
  """Bytes, or as the Hub's sets have images: bytes with the name they had."""
  names = EDITS[kind]
  pictures = [b"s", b"t"]
  if kind != "canonical":
    pictures = [{"bytes": data, "path": "../x.jpg"} for data in pictures]
  values = ["make it bold", *pictures, "a seven", "a bold seven"]
  path = tmp_path / "set.parquet"
  table = pa.table({n: [v] for n, v in zip(names, values, strict=True)})
  parquet.write_table(table, path)
  found = prompts.load(path)
  assert found.rows == (
    Prompt("make it bold", "", b"s", b"t", "a seven", "a bold seven"),
  )
  assert found.facts()["edits"] == 1 and "'s'" not in repr(found)


def test_pictures_beside_the_file_are_part_of_its_hash(tmp_path):
  (tmp_path / "a.png").write_bytes(b"one")
  path = tmp_path / "set.jsonl"
  rows = [{"instruction": "x", "prompt": "y", "cond_image": "a.png"}] * 2
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = prompts.load(path)
  assert [row.source for row in found.rows] == [b"one"] * 2 and found.texts == (
    "x",
  ) * 2
  assert found.repeated == 1
  (tmp_path / "a.png").write_bytes(b"two")
  again = prompts.load(path)
  assert again.sha256 != found.sha256
  assert again.rows[0].key != found.rows[0].key
  with pytest.raises(UserError, match="has the hash"):
    prompts.load(path, sha256=found.sha256)
  # Without a picture an instruction is no column of prompts.
  path.write_text('{"instruction": "x", "prompt": "y"}\n')
  assert prompts.load(path).rows == (Prompt("y"),)
  for name, message in (("b.png", "cannot be read"), ("../a.png", "outside")):
    path.write_text(json.dumps({"instruction": "x", "cond_image": name}) + "\n")
    with pytest.raises(UserError, match=message):
      prompts.load(path)
