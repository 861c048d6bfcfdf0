"""Prompt sets that papers report on, by name: where they are, and what they must be.

A hash is written here only where somebody saw the bytes; where nobody did, the file is
taken as it comes, and what came is in the results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import urllib.error
import urllib.request
from typing import Any

from lpo_jax.errors import UserError, unknown_name

TIMEOUT_S = 30


@dataclasses.dataclass(frozen=True)
class Published:
  """One file of a published set.

  Attributes:
    place: an https address, or the id of a data set on the Hub.
    file: its path there; "" for an address.
    revision: the commit on the Hub; "main" where none was written down.
    sha256: of its bytes; "" where nobody saw them.
    category: of all its prompts; "" if its rows say it themselves, or nobody does.
  """

  place: str
  file: str = ""
  revision: str = "main"
  sha256: str = ""
  category: str = ""


@dataclasses.dataclass(frozen=True)
class Fetched:
  """A published file on this machine.

  Attributes:
    path: where.
    category: see `Published`.
    pinned: a hash or commit was asked for, and this is it.
  """

  path: Any
  category: str
  pinned: bool


# The commit that brought the four lists of 800; later ones added images alone.
_HPDV2 = "260dbde75ab1c68e86d32a8e7739f1b49b100578"
_PICKAPIC = "data/{}.parquet"


def _hpdv2(style: str) -> Published:
  return Published("zhwang/HPDv2", f"benchmark/{style}.json", _HPDV2, category=style)


HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
SETS: dict[str, tuple[Published, ...]] = {
  # 1,632 prompts, 12 categories. The hash is of the file in that commit.
  "partiprompts": (
    Published(
      "https://raw.githubusercontent.com/google-research/parti/"
      "5a657978134374ce28973948331b319adef164bd/PartiPrompts.tsv",
      sha256="fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    ),
  ),
  # 4 styles of 800, of which 781 / 795 / 798 / 800 are unique.
  "hpdv2": tuple(_hpdv2(style) for style in HPDV2_STYLES),
  **{f"hpdv2_{style}": (_hpdv2(style),) for style in HPDV2_STYLES},
  # 200 prompts. The hash is the one under which git-lfs keeps the file.
  "drawbench": (
    Published(
      "Jialuo21/DrawBench",
      "data/test-00000-of-00001.parquet",
      "870c4ef7e6c67eafa7c6e26ba79b7c0d52c9cb16",
      sha256="951d1d0162ff983840f0dc662c52a8b73a62d3a26db87294f43641fda739fe8e",
    ),
  ),
  # 500 prompts each, without the images. The names end in hashes of the data.
  "pickapic_v2_test_unique": (
    Published(
      "yuvalkirstain/pickapic_v2_no_images",
      _PICKAPIC.format("test_unique-00000-of-00001-e852c19ead276a89"),
    ),
  ),
  "pickapic_v1_test_unique": (
    Published(
      "yuvalkirstain/pickapic_v1_no_images",
      _PICKAPIC.format("test_unique-00000-of-00001-73a51cbb6488571d"),
    ),
  ),
  "pickapic_v1_validation_unique": (
    Published(
      "yuvalkirstain/pickapic_v1_no_images",
      _PICKAPIC.format("validation_unique-00000-of-00001-847ed34b90bbafc3"),
    ),
  ),
}


def fetch(name: str) -> list[Fetched]:
  """Returns the files of a set, fetched once and then kept.

  Raises:
    UserError: no such set, no connection, or bytes with another hash.
  """
  from etils import epath

  if name not in SETS:
    raise unknown_name("prompt set", name, SETS)
  found = []
  for one in SETS[name]:
    get = _download if one.place.startswith("https:") else _from_hub
    path = get(name, one)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if one.sha256 and digest != one.sha256:
      raise UserError(
        f"prompt set {name!r}: {path} has the hash {digest}, expected {one.sha256}. It "
        "was cut short or changed: delete it and try again, or give your own file as "
        "eval.prompts."
      )
    pinned = bool(one.sha256) or one.revision != "main"
    found.append(Fetched(epath.Path(path), one.category, pinned))
  return found


def _download(name: str, one: Published) -> pathlib.Path:
  folder = pathlib.Path.home() / ".cache" / "lpo_jax" / "prompts"
  path = folder / f"{name}{pathlib.PurePosixPath(one.place).suffix}"
  if path.is_file():
    return path
  if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
    raise _unreachable(name, one, "HF_HUB_OFFLINE is set")
  try:
    with urllib.request.urlopen(one.place, timeout=TIMEOUT_S) as answer:
      data = answer.read()
  except (urllib.error.URLError, OSError) as error:
    raise _unreachable(name, one, str(error)) from None
  folder.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f".{os.getpid()}")
  partial.write_bytes(data)
  partial.replace(path)
  return path


def _from_hub(name: str, one: Published) -> pathlib.Path:
  import huggingface_hub
  from huggingface_hub import errors

  try:
    path = huggingface_hub.hf_hub_download(
      one.place, one.file, repo_type="dataset", revision=one.revision
    )
  except (errors.HTTPError, OSError, ValueError) as error:
    reason = str(error).strip().splitlines() or [""]
    raise _unreachable(name, one, f"{type(error).__name__}: {reason[0]}") from None
  return pathlib.Path(path)


def _unreachable(name: str, one: Published, reason: str) -> UserError:
  where = f"{one.file} of {one.place} on the Hub" if one.file else one.place
  return UserError(
    f"prompt set {name!r} is not on this machine and cannot be fetched ({reason}). Go "
    f"online once, or get {where} yourself and give that file as eval.prompts."
  )
