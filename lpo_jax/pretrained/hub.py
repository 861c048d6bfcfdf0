"""Model paths that are ids on the Hugging Face Hub: fetched once, then read locally."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from lpo_jax.errors import UserError
from lpo_jax.pretrained import files

# What a run reads of a pipeline. Only an export wants its safety checker too.
USED = (
  "unet",
  "vae",
  "text_encoder",
  "text_encoder_2",
  "tokenizer",
  "tokenizer_2",
  "scheduler",
)
ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
INDEX = "model_index.json"


def local_folder(
  path: str | os.PathLike,
  parts: Iterable[str] | None = USED,
  *,
  variant: str | None = None,
) -> pathlib.Path:
  """Returns the folder that a model path means, fetched from the Hub if need be.

  What is in the local cache of huggingface_hub is taken as it is, without asking the
  Hub: a branch that has moved since is noticed only when the cache is cleared. Name a
  revision to be sure.

  Args:
    path: a folder, or "owner/name" or "owner/name@revision" on the Hub.
    parts: the folders of the pipeline that are wanted; None for all that it has. Those
      that it has not are passed over.
    variant: which weights where there are several, e.g. "fp16".

  Returns:
    A folder on this machine.

  Raises:
    UserError: no such folder and no such id, a gated or private model, no connection, or
      weights that are only pickles.
  """
  folder = pathlib.Path(path)
  if folder.is_dir():
    return folder
  if folder.exists():
    raise UserError(
      f"{str(path)!r} is a file; expected the folder of a pipeline in diffusers' layout."
    )
  match = ID.fullmatch(os.fspath(path))
  if match is None:
    raise UserError(
      f"model folder {str(path)!r} does not exist. Give the local path of a pipeline "
      "folder in diffusers' layout, or the id of one on the Hub, such as "
      "'stable-diffusion-v1-5/stable-diffusion-v1-5'."
    )
  repository, revision = match[1], match[2] or "main"
  parts = None if parts is None else tuple(parts)
  cached = find_cached(repository, revision)
  if cached is not None and _is_complete(cached, parts, variant):
    return cached
  return _fetch(str(path), repository, revision, parts, variant)


def find_cached(repository: str, revision: str) -> pathlib.Path | None:
  """Finds the snapshot of a revision in huggingface_hub's cache; None if not there."""
  from huggingface_hub import constants

  folder = f"models--{repository.replace('/', '--')}"
  root = pathlib.Path(constants.HF_HUB_CACHE) / folder
  reference = root / "refs" / revision
  commit = reference.read_text().strip() if reference.is_file() else revision
  snapshot = root / "snapshots" / commit
  return snapshot if snapshot.is_dir() else None


def _components(folder: pathlib.Path) -> list[str] | None:
  """The parts that a pipeline says it has; None if it is none."""
  if not (folder / INDEX).is_file():
    return None
  fields = files.read_json(folder / INDEX)
  return [k for k, value in fields.items() if isinstance(value, list) and any(value)]


def _is_complete(
  folder: pathlib.Path, parts: tuple[str, ...] | None, variant: str | None
) -> bool:
  """Whether all that is wanted of a snapshot is there."""
  known = _components(folder)
  if parts is None:
    return known is not None and all(_has(folder / k, variant) for k in known)
  for part in parts:
    if known is not None and part not in known:
      continue
    alone = known is None and not (folder / part).is_dir()
    if not _has(folder if alone else folder / part, variant):
      return False
  return True


def _has(folder: pathlib.Path, variant: str | None) -> bool:
  if not folder.is_dir():
    return False
  if not (folder / "config.json").is_file():
    return any(folder.glob("*.json"))  # a tokenizer, a scheduler
  try:
    files.find(folder, files.read_json(folder / "config.json"), variant)
  except UserError:
    return False
  return True


def _fetch(
  path: str,
  repository: str,
  revision: str,
  parts: tuple[str, ...] | None,
  variant: str | None,
) -> pathlib.Path:
  """Downloads what is wanted and not in the cache."""
  import huggingface_hub

  def download(wanted: list[str]) -> pathlib.Path:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=wanted
      )
    )

  with _in_our_words(path, repository, revision):
    # Asks once; listing the tree instead takes half a minute to find out that nobody is
    # there.
    about = huggingface_hub.HfApi().model_info(repository, revision=revision)
    names = [file.rfilename for file in about.siblings or ()]
    if parts is None and INDEX in names:
      parts = tuple(_components(download([INDEX])) or ())
    return download(wanted_files(names, parts or (), variant, path))


def folder_with(
  path: str | os.PathLike, alternatives: Sequence[str], also: Sequence[str] = ()
) -> pathlib.Path:
  """Returns a folder that holds one of several files, fetched from the Hub if need be.

  Args:
    path: a folder, or "owner/name" or "owner/name@revision" on the Hub.
    alternatives: names of files, the first one that is there is fetched.
    also: patterns of small files that are fetched with it, where there are such.

  Returns:
    A folder on this machine; it may hold more.

  Raises:
    UserError: none of the files is there; or see `local_folder`.
  """
  looked = f"looked for {' or '.join(alternatives)} in {str(path)!r}"
  folder = pathlib.Path(path)
  if folder.is_dir():
    if not any((folder / name).is_file() for name in alternatives):
      inside = sorted(file.name for file in folder.iterdir())
      held = ", ".join(inside[:12]) or "nothing"
      raise UserError(f"{looked}, which holds: {held}.")
    return folder
  match = ID.fullmatch(os.fspath(path))
  if folder.exists() or match is None:
    raise UserError(
      f"{looked}, which is no folder here (looked in {os.getcwd()}) and no id on the "
      "Hub. Give the folder, or an id such as 'owner/name@revision'."
    )
  repository, revision = match[1], match[2] or "main"
  cached = find_cached(repository, revision)
  if cached is not None and any((cached / name).is_file() for name in alternatives):
    return cached
  import huggingface_hub

  with _in_our_words(str(path), repository, revision):
    about = huggingface_hub.HfApi().model_info(repository, revision=revision)
    names = {file.rfilename for file in about.siblings or ()}
    chosen = next((name for name in alternatives if name in names), None)
    if chosen is None:
      raise UserError(f"{looked} on the Hub; none is there.")
    fetched = huggingface_hub.snapshot_download(
      repository, revision=revision, allow_patterns=[chosen, *also]
    )
  return pathlib.Path(fetched)


@contextlib.contextmanager
def _in_our_words(path: str, repository: str, revision: str) -> Iterator[None]:
  """Turns what the Hub refuses into words for the person who gave `path`."""
  from huggingface_hub import errors

  try:
    yield
  except errors.GatedRepoError:
    raise UserError(
      f"{repository!r} is gated on the Hub: accept its licence at "
      f"https://huggingface.co/{repository}, and set HF_TOKEN to a token of the account "
      "that did (or run `hf auth login`)."
    ) from None
  except errors.RevisionNotFoundError:
    raise UserError(
      f"{repository!r} on the Hub has no revision {revision!r}: expected a branch, a tag "
      "or a whole commit hash after '@'."
    ) from None
  except errors.RepositoryNotFoundError:
    raise UserError(
      f"{path!r} is neither a folder here (looked in {os.getcwd()}) nor a model on the "
      "Hub. Correct the path or the id; for a private model, set HF_TOKEN."
    ) from None
  except (errors.HTTPError, OSError) as error:
    reason = str(error).strip().splitlines() or [""]
    raise UserError(
      f"{path!r} is not a folder here (looked in {os.getcwd()}), and as an id on the Hub "
      f"it cannot be fetched ({type(error).__name__}: {reason[0]}). Correct the path, or "
      "go online (with HF_HUB_OFFLINE unset), or copy the model here and give its folder."
    ) from None


def wanted_files(
  names: Collection[str], parts: Iterable[str], variant: str | None, where: str
) -> list[str]:
  """Picks what is fetched: JSON, texts, and one set of weights per network.

  No pickles, no other precision, no checkpoints of whole pipelines at the top.

  Args:
    names: of the files in the repository.
    parts: the folders that are wanted; a network that is a repository of its own lies at
      the top.
    variant: which weights where there are several.
    where: the repository, for errors.

  Raises:
    UserError: a network has no weights that can be read.
  """
  wanted = {INDEX} & set(names)
  for part in parts:
    prefix = f"{part}/"
    if not any(name.startswith(prefix) for name in names):
      if INDEX in names or "config.json" not in names:
        continue
      prefix = ""
    inside = {
      name.removeprefix(prefix)
      for name in names
      if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }
    chosen = {
      name for name in inside if re.fullmatch(r".+\.(json|txt)", name)
    } - {name for name in inside if ".safetensors.index." in name}  # fmt: skip
    if "config.json" in inside:
      chosen |= _weights(inside, variant, f"{where!r} {prefix}".strip())
    wanted |= {prefix + name for name in chosen}
  return sorted(wanted)


def _weights(inside: Collection[str], variant: str | None, where: str) -> set[str]:
  ours = any(name.startswith(files.STEMS[True]) for name in inside)
  stem = files.STEMS[ours]
  chosen = files.choose(inside, stem, variant, where)
  if not chosen.endswith(".json"):
    return {chosen}
  return {chosen, *(name for name in inside if files.is_shard(name, stem, variant))}
