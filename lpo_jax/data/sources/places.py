"""What a path means: this machine, a bucket, or a data set on the hub."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from lpo_jax.errors import UserError

if TYPE_CHECKING:
  from etils import epath

REMOTE = ("gs://", "s3://", "hf://")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(path: str | os.PathLike) -> epath.Path:
  """Returns the place that a path names.

  ``hf://owner/name[/folder]`` is a data set of the Hugging Face hub, read over the
  network row group by row group; nothing else of it is fetched.

  Raises:
    UserError: a scheme that is not known, or a place that cannot be asked.
  """
  from etils import epath

  text = os.fspath(path)
  if text.startswith("file://"):
    text = text.removeprefix("file://")
  scheme = text.partition("://")[0] + "://" if "://" in text else ""
  if scheme and scheme not in REMOTE:
    raise UserError(
      f"{text!r}: paths are local, or start with one of {', '.join(REMOTE)}. Copy the "
      "data to one of these."
    )
  if scheme == "hf://" and not text.startswith("hf://datasets/"):
    text = "hf://datasets/" + text.removeprefix("hf://")
  place = epath.Path(text)
  if scheme:
    _ask(place, text)
  elif _HUB_ID.fullmatch(text) and not place.exists() and not place.parent.exists():
    raise UserError(
      f"{text!r}: there is no such file or folder. If it is a data set of the Hugging "
      f"Face hub, write hf://{text}; without a network fetch it elsewhere with `hf "
      f"download {text} --repo-type dataset --local-dir DIR` and give DIR."
    )
  return place


def _ask(place: epath.Path, text: str) -> None:
  """Refuses a remote place that cannot be reached, in its own words."""
  asked = place.parent if "*" in place.name else place
  try:
    asked.stat()  # exists() says no where there is no network
  except Exception as error:  # each of these file systems has errors of its own
    if isinstance(error, FileNotFoundError) and not text.startswith("hf://"):
      return  # the reader says so, with the nearest name
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    remedy = (
      "check the network and your credentials, or copy the data here (gcloud storage cp "
      "-r, aws s3 cp --recursive)"
    )
    if text.startswith("hf://"):
      name = "/".join(text.removeprefix("hf://datasets/").split("/")[:2])
      remedy = (
        f"on a machine with a network run `hf download {name} --repo-type dataset "
        "--local-dir DIR`, copy DIR here and give it as the path"
      )
    elif isinstance(error, ImportError):
      package = {"gs://": "gcsfs", "s3://": "s3fs"}[text[:5]]
      remedy = f"pip install {package}"
    raise UserError(
      f"{text} cannot be reached ({type(error).__name__}: {reason}); {remedy}."
    ) from error
