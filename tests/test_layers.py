"""The house stands: imports go downhill, and the mathematics stays light."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import lpo_jax

PACKAGE = pathlib.Path(lpo_jax.__file__).resolve().parent
ROOT = PACKAGE.parent

# A module may import lower layers and its own room (the first name after lpo_jax).
LAYERS = {
  0: ("errors", "hardware", "pods", "tables", "trees", "types", "parallel", "console"),
  1: ("diffusion", "objectives", "models"),
  2: ("pretrained", "generation", "data", "scoring", "pages"),
  3: ("training", "configs"),
  4: ("jobs",),
  5: ("main",),
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
# Layer 0 is one tool box. Generation and scorers run what pretrained loads.
SAME_LAYER = {("generation", "pretrained"), ("scoring", "pretrained")}

# Never imported by the mathematics, not even inside of a function.
HEAVY = {
  "PIL",
  "apache_beam",
  "diffusers",
  "grain",
  "orbax",
  "pyarrow",
  "sklearn",
  "tensorflow_datasets",
  "torch",
  "transformers",
}


def modules():
  """Yields (dotted name below lpo_jax, syntax tree) of every module."""
  for folder in (PACKAGE, PACKAGE / "configs"):  # configs may be a link: not followed
    for file in sorted(folder.rglob("*.py")):
      parts = file.relative_to(PACKAGE).with_suffix("").parts
      if parts[-1] == "__init__":
        parts = parts[:-1]
      yield ".".join(parts), ast.parse(file.read_text("utf-8"), str(file))


MODULES = dict(modules())


def imports(tree, package):
  """Returns the dotted names that a module imports, lazily or not.

  `from a import b` counts as a.b: what is meant may be a module or a name in one, and
  the room is the same either way.
  """
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        above = ["lpo_jax", *package.split(".")][: -node.level]
        base = ".".join([*above, base]).rstrip(".")
      names |= {f"{base}.{alias.name}" for alias in node.names}
  return names


def rooms_imported(tree, package):
  """Returns the rooms of lpo_jax that a module imports ("" is lpo_jax itself)."""
  rooms = set()
  for name in imports(tree, package):
    top, _, rest = name.partition(".")
    if top == "lpo_jax":
      room = rest.partition(".")[0]
      rooms.add("" if room == "__version__" else room)
  return rooms


def test_every_module_has_a_layer():
  rooms = {name.partition(".")[0] for name in MODULES} - {""}
  assert rooms == set(LAYER_OF), "new rooms get a layer, removed ones lose it"


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_downhill(name):
  room = name.partition(".")[0]
  wrong = {
    other
    for other in rooms_imported(MODULES[name], name) - {room, ""}
    if other not in LAYER_OF
    or LAYER_OF[other] > LAYER_OF[room]
    or (
      LAYER_OF[other] == LAYER_OF[room]
      and LAYER_OF[room] > 0
      and (room, other) not in SAME_LAYER
    )
  }
  assert not wrong, f"{name} (layer {LAYER_OF[room]}) imports {sorted(wrong)}"


def test_the_root_imports_nothing():
  assert not imports(MODULES[""], "") - {"__future__.annotations"}


def test_every_exception_is_needed():
  for room, other in SAME_LAYER:
    users = [n for n in MODULES if n.partition(".")[0] == room]
    assert any(other in rooms_imported(MODULES[n], n) for n in users), (room, other)


@pytest.mark.parametrize(
  "name", [n for n in MODULES if n and LAYER_OF.get(n.partition(".")[0], 9) <= 1]
)
def test_the_mathematics_is_light(name):
  found = {i.partition(".")[0] for i in imports(MODULES[name], name)} & HEAVY
  assert not found, f"{name} imports {sorted(found)}"


def test_the_reader_of_imports_reads():
  tree = ast.parse(
    "import lpo_jax.data.cache\nfrom lpo_jax import trees, __version__\n"
    "def f():\n  from lpo_jax.models import unet\n  from . import noising\n"
  )
  assert rooms_imported(tree, "diffusion.schedule") == {
    "data",
    "trees",
    "",
    "models",
    "diffusion",
  }


def test_the_step_runs_without_the_worlds_edges():
  code = (
    "import sys, lpo_jax.objectives, lpo_jax.models, lpo_jax.training.step\n"
    "print(*{name.partition('.')[0] for name in sys.modules})"
  )
  loaded = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.split()
  assert "lpo_jax" in loaded and "optax" in loaded
  assert not set(loaded) & HEAVY


def test_no_module_is_called_after_nothing():
  # A name that says nothing collects everything.
  word = "util"
  bad = [
    n for n in MODULES if set(n.split(".")) & {word, word + "s", "helpers", "misc"}
  ]
  assert not bad


def test_no_path_of_a_machine():
  # Written apart, so that this file does not find itself.
  homes = "|".join(["work", "home", "root", "Users"])
  pattern = re.compile(rf"(?<![\w.~}}/])/({homes})/|\b[A-Z]:\\Users")
  found = []
  for folder in (PACKAGE, ROOT / "configs", ROOT / "tests", ROOT / "benchmarks"):
    for file in sorted(folder.rglob("*")):
      if file.suffix in (".py", ".j2", ".json", ".sh", ".md") and file.is_file():
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
          if pattern.search(line):
            found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
  assert not found, found
