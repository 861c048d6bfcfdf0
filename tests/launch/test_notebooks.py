"""The notebooks: sound files whose commands are the public door's, and that run."""

import ast
import json
import pathlib
import re

import nbformat
import pytest

from lpo_jax import main

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = ("colab", "kaggle")


def read(name):
  notebook = nbformat.read(ROOT / "launch" / f"{name}.ipynb", as_version=4)
  nbformat.validate(notebook)
  return notebook


def code_of(notebook):
  return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_compiles_and_none_has_run(name):
  notebook = read(name)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      compile(cell.source, name, "exec")
      assert not cell.outputs and cell.execution_count is None
  (parameters,) = (
    cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
  )
  names = {node.targets[0].id for node in ast.parse(parameters.source).body}
  assert names == {"RUN", "SOURCE", "FOLDER", "MINUTES", "HUB"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_runs_are_configs_jobs_and_keys_that_there_are(name):
  (table,) = (code for code in code_of(read(name)) if code.startswith("# name ->"))
  found = {}
  exec(table, found)
  for location, jobs, changes in found["RUNS"].values():
    config = main.load_config(location)
    for key, value in changes.items():
      main.override(config, key, str(value))
    assert set(jobs) <= set(main.JOBS)
    microbatch = config.train.microbatch or config.train.images_per_update
    # One chip on Colab, eight on Kaggle.
    devices = 8 if name == "kaggle" else 1
    assert config.train.images_per_update % microbatch == 0
    assert microbatch % devices == 0


def test_the_notebooks_differ_only_in_their_place():
  colab, kaggle = (code_of(read(name)) for name in NOTEBOOKS)
  assert len(colab) == len(kaggle)
  # Parameters, sizes of runs, and where secrets and folders come from.
  assert [a == b for a, b in zip(colab, kaggle)][3:] == [True] * (len(colab) - 3)


def execute(name, folder, table, run):
  """Runs a notebook headless, with another table of runs; returns what it printed."""
  import nbclient

  notebook = read(name)
  # What a person would type into the first cell, and one more row in the table.
  first = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
  changed = {"RUN": run, "FOLDER": str(folder), "MINUTES": 30}
  for key, value in changed.items():
    first.source = re.sub(
      rf"^{key} = \S+", f"{key} = {value!r}", first.source, flags=re.M
    )
  at = notebook.cells.index(first) + 2
  notebook.cells.insert(at, nbformat.v4.new_code_cell(f"RUNS.update({table!r})"))
  client = nbclient.NotebookClient(
    notebook, timeout=900, resources={"metadata": {"path": str(ROOT / "launch")}}
  )
  client.execute()
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
  assert any("image/png" in o.get("data", {}) for o in outputs)  # the curves
  return "".join(o.get("text", "") for o in outputs)


def test_runs_headless_and_goes_on(tiny_cache, tmp_path, monkeypatch):
  """In the tiny world, through the door in a process of its own."""
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
  changes = {"data.cache": str(tiny_cache.cache)}
  table = {"tiny": (str(tiny_cache.config), ["train"], changes)}
  said = execute("colab", tmp_path, table, "tiny")
  assert f"$ python -m lpo_jax.main --config {tiny_cache.config}" in said
  assert "--job doctor" in said and "no error" in said and "\nDone." in said
  rows = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5]
  config = json.loads((tmp_path / "tiny" / "config.json").read_text())
  assert config["train"]["max_minutes"] == 30.0


@pytest.mark.slow  # the quickstart's smoke test, once more
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_form_for_cpus_runs(name, tmp_path, monkeypatch):
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  said = execute(name, tmp_path, {}, "smoke")
  assert "report.html" in said and "\nDone." in said
