"""What is compared: weights of runs, LoRA files and pipelines, or folders of images."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from lpo_jax import parallel, pretrained, trees
from lpo_jax.data import image_folders
from lpo_jax.errors import UserError, nearest, unknown_name
from lpo_jax.jobs import adapters, blueprint, run_identity
from lpo_jax.pretrained import ip_adapter
from lpo_jax.pretrained import lora as lora_files

TENSORBOARD = "tensorboard"  # beside the candidates' folders
_LOCATION = re.compile(
  r"(?P<place>.+?)(?:@(?P<step>\d+))?(?::(?P<weights>[A-Za-z_]+))?"
)


@dataclasses.dataclass(frozen=True)
class Location:
  """Where a candidate is: `place`, `place@STEP`, `place:raw`, `place@STEP:raw`.

  Attributes:
    place: a folder or file, or an id on the Hub.
    step: of a run, which checkpoint; None for the latest.
    weights: of a run, a name in `blueprint.WEIGHTS`; "" for what it publishes.
  """

  place: str
  step: int | None = None
  weights: str = ""


def parse(location: str) -> Location:
  """Takes a location apart; what is there by its whole name has neither step nor choice.

  >>> parse("runs/lpo@500:raw")
  Location(place='runs/lpo', step=500, weights='raw')
  """
  match = _LOCATION.fullmatch(location)
  if match is None or pathlib.Path(location).exists():
    return Location(location)
  step = match["step"]
  return Location(match["place"], step and int(step), match["weights"] or "")


def kind(location: str) -> str:
  """Says what a candidate is: "run", "images", "lora" or "pipeline".

  Raises:
    UserError: nothing is there, or it is none of these.
  """
  where = parse(location)
  folder = pathlib.Path(where.place)
  if (folder / "checkpoints").is_dir():
    return "run"
  if where.weights or (where.step is not None and folder.exists()):
    raise UserError(
      f"candidate {location!r}: only a run has checkpoints and kinds of weights to choose "
      f"from, and {where.place!r} is no workdir of one (it has no checkpoints/)."
    )
  networks = (folder / "config.json", folder / "unet" / "config.json")
  if any(file.is_file() for file in networks):
    return "pipeline"
  if lora_files.find(folder):
    return "lora"
  if image_folders.has_images(folder):
    return "images"
  if folder.exists():
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise UserError(
      f"candidate {location!r} is none of what can be compared: a run (checkpoints/), a "
      "diffusers folder (unet/config.json), a LoRA file (.safetensors), or a folder of "
      f"images. It holds: {', '.join(inside[:12]) or 'nothing'}."
    )
  return "pipeline"


def check(candidates: Mapping[str, str], baseline: str, base_folder: str) -> None:
  """Refuses candidates that can be known to be wrong before anything is drawn.

  Raises:
    UserError: no baseline, nothing at a location, a checkpoint or weights that a run has
      not, a LoRA file without a base.
  """
  if baseline not in candidates:
    raise unknown_name("eval.baseline", baseline, candidates)
  for name, location in candidates.items():
    if not location:
      raise UserError(
        f"eval.candidates.{name} is empty: give a run, a diffusers folder, an id on the "
        "Hub, a LoRA file or a folder of images (of the base model, set model.path)."
      )
    try:
      _CHECKS[kind(location)](location, base_folder)
    except UserError as error:
      raise UserError(f"eval.candidates.{name}: {error}") from error


def _check_run(location: str, base_folder: str) -> None:
  where = parse(location)
  if where.weights not in ("", *blueprint.WEIGHTS):
    raise unknown_name("weights of a run", where.weights, blueprint.WEIGHTS)
  own = run_identity.recorded(where.place)
  if where.weights == "ema" and not own.train.ema:
    raise UserError(f"{where.place} keeps no EMA (train.ema=0); ask for ':raw'.")
  saved = blueprint.saved_steps(pathlib.Path(where.place))
  if not saved:
    raise UserError(f"{where.place} has no checkpoint yet: train first.")
  if where.step is not None and where.step not in saved:
    raise UserError(
      f"{where.place} has no checkpoint of step {where.step}; it has: "
      f"{', '.join(map(str, saved))}."
    )


def _check_lora(location: str, base_folder: str) -> None:
  if not base_folder:
    raise UserError(
      f"{location!r} is a LoRA file and needs the model it is added to: set model.path."
    )


def _check_pipeline(location: str, base_folder: str) -> None:
  folder = pathlib.Path(location)
  looks_local = location.startswith((".", "/", "~")) or location.count("/") != 1
  if not folder.exists() and looks_local:
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    close = nearest(folder.name, [path.name for path in beside])
    raise UserError(
      f"{location!r}: there is no such file or folder"
      f"{f'; did you mean {close!r}?' if close else '.'}"
    )
  pretrained.read_config(location, "unet")


# Folders of images are matched with the prompts, which tells what is wrong with them.
_CHECKS = {
  "run": _check_run,
  "lora": _check_lora,
  "pipeline": _check_pipeline,
  "images": lambda location, base_folder: None,
}


def load_params(
  location: str, mesh: jax.sharding.Mesh, base_folder: str = ""
) -> tuple[Any, str]:
  """Loads a candidate's UNet: of a run, a diffusers folder or Hub id, or a LoRA file.

  Args:
    location: see `Location`.
    mesh: where to put the parameters.
    base_folder: the pipeline that a LoRA file is added to.

  Returns:
    The parameters as global arrays, and words that identify them.

  Raises:
    UserError: what is there cannot be drawn with.
  """
  what = kind(location)
  if what not in _LOADERS:
    raise UserError(
      f"{location!r} is a folder of images, and weights are needed here: give a run, a "
      "diffusers folder, an id on the Hub, or a LoRA file."
    )
  return _LOADERS[what](location, mesh, base_folder)


def _load_run(location: str, mesh: jax.sharding.Mesh, base_folder: str):
  where = parse(location)
  folder, weights = pathlib.Path(where.place), where.weights or "published"
  own = run_identity.recorded(folder)
  params, step = blueprint.trained_params(own, folder, mesh, where.step, weights)
  chosen = f":{where.weights}" if where.weights else ""
  return params, f"{folder.resolve()}@{step}{chosen}"


def _load_lora(location: str, mesh: jax.sharding.Mesh, base_folder: str):
  return adapters.merged(location, base_folder, mesh)


def _load_pipeline(location: str, mesh: jax.sharding.Mesh, base_folder: str):
  part = pretrained.load(location, "unet")
  identity = pretrained.fingerprint(location, "unet")
  adapter = pathlib.Path(location) / ip_adapter.FILE_NAME
  if adapter.is_file():  # our export of a UNet that knows users
    part = ip_adapter.attach(part, adapter)
    identity += f"+{ip_adapter.fingerprint(adapter)}"
  shardings = parallel.param_shardings(part.params, mesh)
  return parallel.put(part.params, shardings), identity


_LOADERS = {"run": _load_run, "lora": _load_lora, "pipeline": _load_pipeline}


def refuse_other_architecture(params: Any, expected: Any, where: str) -> None:
  """Checks that a UNet is drawn by a pipeline made for its shapes.

  Raises:
    UserError: it is not, with the first parameter that differs.
  """
  mine = {name: tuple(x.shape) for name, x in trees.named_leaves(params).items()}
  theirs = {name: tuple(x.shape) for name, x in trees.named_leaves(expected).items()}
  unlike = [n for n in sorted(mine | theirs) if mine.get(n) != theirs.get(n)]
  if unlike:
    name = unlike[0]
    raise UserError(
      f"{where}: its UNet is not of model.path's architecture ({len(unlike)} parameters "
      f"differ, first {name!r}: {mine.get(name)}, expected {theirs.get(name)}). Draw its "
      "images in an evaluation of its own, and give their folder as the candidate."
    )


def folder_name(name: str) -> str:
  """Returns a candidate's name as that of a folder, whatever is in it.

  >>> folder_name("lpo, drift of dpo"), folder_name("../x")
  ('lpo, drift of dpo', '___x-d6b96a')
  """
  safe = re.sub(r"[^\w ,+=()-]|^[. ]|[. ]$", "_", name, flags=re.ASCII)[:80]
  if safe == name and name not in ("", TENSORBOARD):
    return name
  return f"{safe}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:6]}"
