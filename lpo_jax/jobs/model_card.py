"""The model card of an export: README.md, filled from what is known and no more."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from lpo_jax import __version__, pages, pretrained
from lpo_jax.data import cache as caches
from lpo_jax.data import records
from lpo_jax.errors import UserError
from lpo_jax.jobs import cache_places
from lpo_jax.pretrained import hub
from lpo_jax.scoring import typeset

README, THUMBNAILS = "README.md", "thumbnails.png"
NOT_KNOWN = "not known"
PACKAGES = ("jax", "flax", "optax", "numpy")
PROMPTS_SHOWN, THUMBNAIL = 4, 192
DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
TRAIN_KEYS = (
  *("optimizer", "learning_rate", "warmup_steps", "clip_norm", "ema", "ema_schedule"),
)


@dataclasses.dataclass(frozen=True)
class Exported:
  """What a card is about.

  Attributes:
    folder: gets the card.
    kind: a name of `KINDS`.
    step: completed updates of what was exported.
    checked: what was compared after writing, in words.
    file: name of the LoRA file in the folder; "" if there is none.
  """

  folder: pathlib.Path
  kind: str
  step: int
  checked: str
  file: str = ""


def write(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, exported: Exported
) -> pathlib.Path:
  """Writes README.md and, if images were drawn, thumbnails.png beside it.

  Args:
    config: the run's; `export.licence`, `export.evaluation` and `export.push_to` are
      read besides what was trained and on what.
    workdir: the run's; its cache, summary.json, evaluation/ and samples/ are looked for.
    exported: what was written.

  Returns:
    The card.

  Raises:
    UserError: `export.evaluation` has no evaluation.
  """
  workdir = pathlib.Path(workdir)
  measured = evaluation_folder(config, workdir)
  objective, base = config.objective.name, base_name(config)
  text = pages.render(
    "model_card.md.j2",
    front_matter=_markup(front_matter(config, exported)),
    title=_safe(f"{base} tuned with {objective}"),
    what=_safe(
      f"{KINDS[exported.kind]} of {base} after {exported.step} updates of preference "
      f"tuning with the objective {objective}, made with lpo_jax."
    ),
    usage=_markup(usage(config, exported)),
    training=[(_safe(k), _safe(v)) for k, v in training(config, exported)],
    data=[[(_safe(k), _safe(v)) for k, v in rows] for rows in data(config, workdir)],
    evaluation=_markup(evaluation(measured)),
    thumbnails=_safe(thumbnails(measured, workdir, exported.folder)),
    limitations=[_safe(said) for said in limitations(config, exported)],
    versions=versions(),
  )
  card = exported.folder / README
  card.write_text(text.rstrip() + "\n", encoding="utf-8")
  return card


def _markup(text: str) -> Any:
  """Text that is Markdown already."""
  from markupsafe import Markup

  return Markup(text)


def _safe(text: Any) -> Any:
  """Text that is not: names and paths are strangers'."""
  return _markup(typeset.markdown(text))


KINDS = {
  "pipeline": "The whole pipeline, with the UNet",
  "unet": "The UNet",
  "lora": "LoRA factors for the UNet",
  "ip_adapter": "What the UNet is told of people with (an IP-Adapter)",
}


def base_name(config: ml_collections.ConfigDict) -> str:
  """The base's id on the Hub, or the name of its folder; no path of this machine."""
  path = config.model.path
  if hub.ID.fullmatch(path) and not pathlib.Path(path).is_dir():
    return path
  return pathlib.Path(path).name


def front_matter(config: ml_collections.ConfigDict, exported: Exported) -> str:
  """What the Hub reads: YAML between two lines of dashes."""
  from huggingface_hub import ModelCardData

  known: dict[str, Any] = {}
  licence = base_licence(config)
  if config.export.licence or licence:
    known["license"] = config.export.licence or licence
  base = base_name(config)
  if hub.ID.fullmatch(base):
    known["base_model"] = base.partition("@")[0]
  found = (DATASET.match(str(place.path)) for place in _sources(config))
  datasets = sorted({match[1] for match in found if match})
  if datasets:
    known["datasets"] = datasets
  tags = [task(config), "preference-tuning", config.objective.name, "lpo_jax"]
  tags += [exported.kind] if exported.kind in ("lora", "ip_adapter") else []
  fields = ModelCardData(
    library_name="diffusers", pipeline_tag=tags[0], tags=tags, **known
  )
  return f"---\n{fields.to_yaml()}\n---\n"


def base_licence(config: ml_collections.ConfigDict) -> str:
  """The licence that the base's own card names; "" where that is not at hand."""
  return card_field(pretrained.local_folder(config.model.path), "license")


def card_field(folder: pathlib.Path, name: str) -> str:
  """One field of a folder's card; "" without a card, or one that cannot be read."""
  import yaml
  from huggingface_hub import ModelCard

  try:
    card = ModelCard((folder / README).read_text("utf-8"), ignore_metadata_errors=True)
  except (OSError, ValueError, yaml.YAMLError):
    return ""
  value = getattr(card.data, name, None)
  return value if isinstance(value, str) else ""


def _sources(config: ml_collections.ConfigDict) -> list[Any]:
  return [place.config.data for place in cache_places.places(config, "")]


def training(
  config: ml_collections.ConfigDict, exported: Exported
) -> list[tuple[str, Any]]:
  """How it was trained, as far as a config says."""
  train, lora = config.train, config.model.lora
  licence = base_licence(config)
  rows = [
    ("base model", base_name(config)),
    ("licence of the base", licence or f"{NOT_KNOWN}: its card was not at hand"),
    ("objective", _options(config.objective)),
    ("noising", _options(config.noising)),
    ("weighting of timesteps", _options(config.weighting)),
    ("updates", exported.step),
    ("images an update", train.images_per_update),
    *((key.replace("_", " "), train[key]) for key in TRAIN_KEYS),
    ("resolution", config.data.resolution),
    ("caption dropout", config.data.caption_dropout),
    ("dtype of activations", config.model.dtype),
    ("seed", config.seed),
  ]
  if config.online:
    rows.append(("rollouts", _options(config.online)))
  if lora.path:
    rows.append(("LoRA", "ranks and alphas of the file it went on from"))
  elif lora.rank:
    alpha = lora.rank if lora.alpha is None else lora.alpha
    rows.append(("LoRA", f"rank {lora.rank}, alpha {alpha:g}"))
  return [*rows, ("compared after writing", exported.checked)]


def _options(section: Mapping[str, Any]) -> str:
  """A section that binds a function: its name, then the options."""
  options = [f"{key} {value}" for key, value in section.items() if key != "name"]
  return ", ".join([section["name"], *options] if "name" in section else options)


def data(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[list[tuple[str, Any]]]:
  """Where the judgements are from and what became of them, source by source."""
  described = []
  for place in cache_places.places(config, workdir):
    source = place.config.data
    match = DATASET.match(source.path)
    licence = card_field(pathlib.Path(source.path), "license")
    rows = [
      ("source", match[1] if match else pathlib.Path(source.path).name or NOT_KNOWN),
      ("licence of the data", licence or NOT_KNOWN),
      ("strategy", source.strategy),
      ("ties", source.ties),
    ]
    if place.name:
      rows.insert(0, ("part of the mixture", f"{place.name}, share {place.share}"))
    described.append(rows + _lists(place))
  return described


def _lists(place: cache_places.Place) -> list[tuple[str, Any]]:
  """What the cache says of the lists of one source."""
  key = caches.lists_key(cache_places.list_settings(place.config))
  if place.folder is None or not (place.folder / f"lists-{key}.json").is_file():
    return [("lists", f"{NOT_KNOWN}: the cache was not at hand")]
  found = caches.lists_manifest(place.folder, key)
  report, manifest = found["report"], records.read_json(place.folder / "manifest.json")
  rows = [("lists", found["lists"]), ("images in lists", found["items"])]
  if "judgements_total" in report:
    used = f"{report['judgements_used']} of {report['judgements_total']}"
    rows.append(("judgements used", used))
  dropped = {**report.get("dropped", {}), **found["lost"]}
  said = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in dropped.items() if n)
  rows.append(("dropped", said or "nothing"))
  if "counts" in manifest:
    rows.append(("images that could not be read", manifest["counts"]["bad_images"]))
  return rows


def evaluation_folder(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path | None:
  """Where the card's evaluation is: `export.evaluation`, else the run's workdir.

  Raises:
    UserError: one was named, and there is no summary.json in it.
  """
  named = config.export.evaluation
  folder = pathlib.Path(named or workdir)
  if (folder / "summary.json").is_file():
    return folder
  if named:
    raise UserError(
      f"export.evaluation={named!r} has no summary.json; expected the workdir of "
      "--job evaluate."
    )
  return None


def evaluation(folder: pathlib.Path | None) -> str:
  """The table of win rates with intervals, as Markdown; or that there is none."""
  rows = json.loads((folder / "summary.json").read_text("utf-8")) if folder else []
  if not rows:
    return f"{NOT_KNOWN.capitalize()}: no evaluation was at hand when this was written."
  first = rows[0]
  keys = ("sampler", "steps", "guidance_scale", "images_per_prompt", "prompt_set")
  how = "; ".join(f"{k.replace('_', ' ')} {first[k]}" for k in keys if k in first)
  weights = {r["candidate"]: r.get("weights_candidate", NOT_KNOWN) for r in rows}
  said = "; ".join(f"{name}: {identity}" for name, identity in weights.items())
  return "\n\n".join(
    [
      typeset.markdown_table(rows, typeset.brief(rows)),
      f"Ties count half. Intervals are 95 % bootstraps over prompts of one comparison, "
      f"not widened for many. {typeset.markdown(how)}.",
      f"Weights that were evaluated: {typeset.markdown(said)}.",
    ]
  )


def thumbnails(
  measured: pathlib.Path | None, workdir: pathlib.Path, target: pathlib.Path
) -> str:
  """Writes a small grid of images; returns what is in it, or "" without any."""
  from PIL import Image

  table = measured and measured / "evaluation" / "per_image.parquet"
  drawn = sorted((workdir / "samples").glob("step_*.png"))
  if table and table.is_file():
    rows, said = _evaluated(measured)
    if rows:
      grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
      Image.fromarray(grid).save(target / THUMBNAILS)
      return said
  if drawn:
    image = Image.open(drawn[-1]).convert("RGB")
    image.thumbnail((THUMBNAIL * 4, THUMBNAIL * 16))
    image.save(target / THUMBNAILS)
    return f"Drawn while training: {drawn[-1].stem.replace('_', ' ')}."
  return ""


def _evaluated(folder: pathlib.Path) -> tuple[list[list[np.ndarray]], str]:
  """The first images of the first prompts: one row a prompt, one column a candidate."""
  from PIL import Image
  from pyarrow import parquet

  account = records.read_json(folder / "evaluation" / "about.json")["candidates"]
  places = {name: one["folder"] for name, one in account.items() if "folder" in one}
  table = parquet.read_table(folder / "evaluation" / "per_image.parquet").to_pylist()
  files: dict[str, dict[str, str]] = {}
  for row in table:
    files.setdefault(row["prompt"], {}).setdefault(row["candidate"], row["file"])
  rows, shown = [], []
  for prompt, of in list(files.items())[:PROMPTS_SHOWN]:
    paths = [folder / "evaluation" / places[name] / of[name] for name in places]
    if not paths or not all(path.is_file() for path in paths):
      continue
    side = (THUMBNAIL, THUMBNAIL)
    images = (Image.open(path).convert("RGB").resize(side) for path in paths)
    rows.append([np.asarray(image) for image in images])
    shown.append(prompt)
  columns, prompts = ", ".join(places), "; ".join(shown)
  return rows, f"Columns, with the same seeds: {columns}. Rows: {prompts}."


def limitations(config: ml_collections.ConfigDict, exported: Exported) -> list[str]:
  """What a careful reader should know."""
  said = [
    "Limitations, biases and licence terms of the base model hold for this one too.",
    "It follows what the people behind the data chose; whom it does not suit was not "
    "looked at.",
    "Safety was not evaluated.",
  ]
  if exported.kind == "lora" and not (config.model.lora.rank or config.model.lora.path):
    said.append(
      "The factors are the nearest to a full fine-tune's change: kept.json says which "
      "share of it they hold."
    )
  return said


def versions() -> list[tuple[str, str]]:
  """What wrote it."""
  found = [("lpo_jax", __version__), ("python", platform.python_version())]
  return found + [(name, importlib.metadata.version(name)) for name in PACKAGES]


# What a pipeline is asked, by its task on the Hub.
CALLS = {
  "text-to-image": 'image = pipeline("a prompt").images[0]',
  "image-to-image": 'image = pipeline("an instruction", image=source).images[0]',
}


def task(config: ml_collections.ConfigDict) -> str:
  """What the base does: a key of `CALLS`."""
  index = pretrained.local_folder(config.model.path) / "model_index.json"
  name = json.loads(index.read_text("utf-8"))["_class_name"] if index.is_file() else ""
  return "image-to-image" if "InstructPix2Pix" in name else "text-to-image"


def usage(config: ml_collections.ConfigDict, exported: Exported) -> str:
  """Python that draws with what was written."""
  where = config.export.push_to or "path/to/this/folder"
  return USAGE[exported.kind](
    where, base_name(config), exported.file, CALLS[task(config)]
  )


def _use_pipeline(where: str, base: str, file: str, call: str) -> str:
  return (
    "from diffusers import DiffusionPipeline\n\n"
    f"pipeline = DiffusionPipeline.from_pretrained({where!r})\n{call}"
  )


def _use_unet(where: str, base: str, file: str, call: str) -> str:
  return (
    "from diffusers import DiffusionPipeline, UNet2DConditionModel\n\n"
    f'unet = UNet2DConditionModel.from_pretrained({where!r}, subfolder="unet")\n'
    f"pipeline = DiffusionPipeline.from_pretrained({base!r}, unet=unet)\n{call}"
  )


def _use_lora(where: str, base: str, file: str, call: str) -> str:
  return (
    "from diffusers import DiffusionPipeline\n\n"
    f"pipeline = DiffusionPipeline.from_pretrained({base!r})\n"
    f"pipeline.load_lora_weights({where!r}, weight_name={file!r})\n{call}"
  )


def _use_ip_adapter(where: str, base: str, file: str, call: str) -> str:
  told = call.replace(").images", ", ip_adapter_image_embeds=[people]).images")
  return (
    "import torch\nfrom diffusers import DiffusionPipeline\n\n"
    f"pipeline = DiffusionPipeline.from_pretrained({base!r})\n"
    f"pipeline.load_ip_adapter({where!r}, subfolder='', weight_name={file!r}, "
    "image_encoder_folder=None)\n"
    "# [1, K, D] of a person (docs/personal.md), behind zeros: nobody, for guidance\n"
    f"people = torch.cat([torch.zeros_like(person), person])\n{told}"
  )


USAGE: dict[str, Callable[[str, str, str, str], str]] = {
  "pipeline": _use_pipeline,
  "unet": _use_unet,
  "lora": _use_lora,
  "ip_adapter": _use_ip_adapter,
}


def files_to_push(exported: Exported) -> Sequence[str]:
  """Patterns of what belongs to an export; the folder may hold other things too."""
  own = {
    "unet": ("unet/*", "ip_adapter.safetensors"),
    "lora": (exported.file, "kept.json"),
    "ip_adapter": (exported.file,),
    "pipeline": ("*",),
  }
  return (*own[exported.kind], README, THUMBNAILS)
