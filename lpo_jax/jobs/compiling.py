"""Saying that something is compiled, how long that took last time, and where it goes."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator

import jax

from lpo_jax import console, parallel


@contextlib.contextmanager
def said(workdir: pathlib.Path, what: str) -> Iterator[None]:
  """Says before and after compiling, and remembers the seconds for the next time.

  Args:
    workdir: keeps compile.json: what -> seconds.
    what: e.g. "train step".
  """
  file = workdir / "compile.json"
  took = _read(file)
  place = jax.config.jax_compilation_cache_dir
  console.say(
    f"compiling the {what} "
    + (f"(last time {took[what]:.0f} s); " if what in took else "(once); ")
    + (f"compiled programs are kept in {place}" if place else "nothing of it is kept")
  )
  began = time.monotonic()
  yield
  seconds = time.monotonic() - began
  console.say(f"compiled in {seconds:.0f} s")
  if parallel.is_main_process():
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**took, what: round(seconds, 1)}) + "\n", "utf-8")
    os.replace(partial, file)


def _read(file: pathlib.Path) -> dict[str, float]:
  """What was remembered; nothing if that is not readable: it is a courtesy."""
  try:
    return {str(k): float(v) for k, v in json.loads(file.read_text("utf-8")).items()}
  except (OSError, ValueError, AttributeError, TypeError):
    return {}
