"""Folders that go to the Hugging Face Hub, when somebody asks for it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from lpo_jax.errors import UserError
from lpo_jax.pretrained import hub


def check_id(repository: str) -> None:
  """Refuses what is no id on the Hub, before anything is written.

  Raises:
    UserError: not "owner/name".
  """
  match = hub.ID.fullmatch(repository)
  if match is None or match[2]:
    raise UserError(
      f"export.push_to={repository!r}: expected the id of a model on the Hub, "
      "'owner/name', without a revision."
    )


def push(
  folder: pathlib.Path,
  repository: str,
  *,
  private: bool,
  files: Sequence[str],
  message: str,
) -> str:
  """Makes the repository if there is none, and uploads files to it as one commit.

  Args:
    folder: what its top will hold.
    repository: "owner/name".
    private: of a repository that is made; one that exists stays what it is.
    files: patterns of what is uploaded; nothing else in the folder is.
    message: of the commit.

  Returns:
    The address of the commit.

  Raises:
    UserError: offline, no token, or a token that may not write there.
  """
  import huggingface_hub
  from huggingface_hub import errors

  check_id(repository)
  kept = f"What was exported is whole in {folder}; the same command pushes it again."
  try:
    api = huggingface_hub.HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    commit = api.upload_folder(
      repo_id=repository,
      folder_path=folder,
      allow_patterns=list(files),
      commit_message=message,
    )
  except errors.HfHubHTTPError as error:
    code = error.response.status_code if error.response is not None else None
    if code not in (401, 403, 404):
      raise UserError(
        f"the Hub did not take {repository!r} ({_first_line(error)}). {kept}"
      ) from None
    raise UserError(
      f"the Hub does not let this account write to {repository!r} (HTTP {code}). Set "
      "HF_TOKEN to a token with write access of an account that may (or run `hf auth "
      f"login`), or change export.push_to. {kept}"
    ) from None
  except (errors.HTTPError, OSError) as error:
    raise UserError(
      f"{repository!r} cannot be pushed ({type(error).__name__}: {_first_line(error)}). "
      f"Go online, with HF_HUB_OFFLINE unset and a token in HF_TOKEN. {kept}"
    ) from None
  return str(commit.commit_url)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [""])[0]
