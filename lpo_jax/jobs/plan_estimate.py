"""From what was counted of a step to whether it fits, how long it takes, what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lpo_jax.jobs.plan_chips import Chip, Topology
from lpo_jax.training import flops

# FLOPs of an image's update in forward passes, by `remat`: docs/performance.md, SDXL's.
# Accumulation computes the policy's pass once more, except where `full` does so anyway.
PASSES = {"none": 4.0, "dots": 4.1, "blocks": 4.7, "full": 5.0}
# Temporaries of a microbatch by `remat`, as shares of those with `none`: what PyTorch
# saves of SD 1.5 for its backward pass is 0.94 GB an image and 0.16 with a checkpoint
# for each block; `dots` lies between. `full` keeps as much as `none` when its turn comes.
KEEPS = {"none": 1.0, "full": 1.0, "dots": 0.5, "blocks": 0.17}
# How much of a component an edit leaves, where the config alone says it.
BFLOAT16_MOMENT = 0.75  # m and v of AdamW: 4 + 4 bytes a parameter become 2 + 4
ADAFACTOR = 0.01
FACTORS = 0.02  # rank 8 of attention's kernels
LEAST_GAIN = 0.02  # share of what a chip has that an edit must save to be worth a line
SPLIT = ("parameters", "optimizer", "EMA", "reference", "frozen base", "snapshot")


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a plan says of a topology; None for what is not known.

  Attributes:
    needs: bytes on the chip that needs most; the least that it can be if not compiled.
    has: bytes that a program may use.
    fits: whether it does.
    compute: seconds of an update at the chips' peak.
    memory: seconds at the bandwidth of their memory.
    network: seconds that the collectives take at the bandwidth between chips.
    seconds: an update, at best: the longer of compute and memory.
    images_per_second: of all chips.
    mfu: share of the peak that goes into FLOPs which no way of computing avoids.
    hours: of the whole run.
    chip_hours: hours times chips.
  """

  needs: float | None
  has: float | None
  fits: bool | None
  compute: float | None = None
  memory: float | None = None
  network: float | None = None
  seconds: float | None = None
  images_per_second: float | None = None
  mfu: float | None = None
  hours: float | None = None
  chip_hours: float | None = None


def needs(answer: Mapping[str, Any]) -> float | None:
  """Bytes that the step needs of the chip that needs most; None if nobody said."""
  if "refused" in answer:
    return answer["refused"]["needs"]
  return sum(answer["components"].values()) + sum(answer.get("memory", {}).values())


def estimate(
  answer: Mapping[str, Any],
  chip: Chip | None,
  *,
  chips: int,
  images: int,
  updates: int,
) -> Estimate:
  """Judges what `plan_step.measure` counted.

  seconds = max(FLOPs / (chips peak), bytes of a chip / its bandwidth); collectives are
  apart, since they may run beside both.

  Args:
    answer: of `plan_step.measure`.
    chip: its limits; None for CPUs.
    chips: number of them.
    images: of an update.
    updates: of the run.
  """
  required = needs(answer)
  if chip is None:
    return Estimate(required, None, None)
  fits: bool | None = required is not None and required <= chip.hbm
  if "refused" in answer:
    fits = False
  elif "memory" not in answer and fits:
    fits = None  # what the step itself takes is not known
  compute = answer["flops"] / (chips * chip.peak)
  memory = network = None
  if "hbm_bytes" in answer:
    memory = answer["hbm_bytes"] / chip.hbm_bandwidth
    network = sum(x["received"] for x in answer["collectives"]) / chip.ici_bandwidth
  seconds = max(compute, memory or 0.0)
  hours = updates * seconds / 3600
  return Estimate(
    required,
    chip.hbm,
    fits,
    compute,
    memory,
    network,
    seconds,
    images / seconds,
    flops.utilisation(answer["needed_flops"], seconds, chips, chip.peak),
    hours,
    hours * chips,
  )


@dataclasses.dataclass(frozen=True)
class Edit:
  """A change of the config that makes a step smaller.

  Attributes:
    key: of the config.
    value: to set it to.
    shares: of the components that it leaves.
    costs: what it costs, in words.
    saves: bytes of a chip, by estimate, after the edits before it.
    also: what goes with it on the command line.
  """

  key: str
  value: Any
  shares: Mapping[str, float]
  costs: str
  saves: float = 0.0
  also: str = ""

  @property
  def flag(self) -> str:
    """As on the command line."""
    return f"--config.{self.key}={self.value}{self.also}"


@dataclasses.dataclass(frozen=True)
class Room:
  """What fills a chip.

  Attributes:
    parts: bytes by component.
    has: bytes that the chip has.
    at_once: images of a chip that go through the networks together.
    fsdp: chips among which one copy of the parameters is split.
  """

  parts: Mapping[str, float]
  has: float
  at_once: int
  fsdp: int

  @property
  def needs(self) -> float:
    """Bytes in all."""
    return sum(self.parts.values())

  def after(self, edits: Iterable[Edit]) -> Room:
    """What edits leave of it."""
    parts = dict(self.parts)
    for edit in edits:
      parts |= {k: parts[k] * share for k, share in edit.shares.items() if k in parts}
    return dataclasses.replace(self, parts=parts)


def room(
  config: Any, topology: Topology, answer: Mapping[str, Any], has: float
) -> Room:
  """What a plan found to fill a chip; of a refused step, temporaries are the rest."""
  parts = {**answer["components"], **answer.get("memory", {})}
  if "refused" in answer and answer["refused"]["needs"]:
    known = sum(answer["components"].values())
    parts["temporaries"] = max(answer["refused"]["needs"] - known, 0)
  train = config.train
  at_once = (train.microbatch or train.images_per_update) // topology.chips
  return Room(parts, has, at_once, answer["mesh"]["fsdp"])


def suggest(config: Any, topology: Topology, full: Room) -> tuple[list[Edit], float]:
  """Finds the edits that would make a step fit, those first that cost least.

  Args:
    config: the run's.
    topology: that it does not fit.
    full: what fills a chip.

  Returns:
    The edits, and the bytes that are needed with all of them, by estimate.
  """
  chosen: list[Edit] = []
  for rule in RULES:
    now = full.after(chosen)
    if now.needs <= full.has:
      break
    edit = rule(config, topology, now)
    if edit is not None:
      saves = now.needs - now.after([edit]).needs
      if saves > LEAST_GAIN * full.has:
        chosen.append(dataclasses.replace(edit, saves=saves))
  # What the later ones made needless is not asked for.
  for edit in list(chosen):
    others = [other for other in chosen if other is not edit]
    if full.after(others).needs <= full.has:
      chosen = others
  return chosen, full.after(chosen).needs


def _fsdp(config: Any, topology: Topology, now: Room) -> Edit | None:
  if now.fsdp >= topology.chips:
    return None
  shares = dict.fromkeys(SPLIT, now.fsdp / topology.chips)
  costs = "the chips gather each other's weights; the same result"
  also = "" if config.mesh.data == -1 else " --config.mesh.data=-1"
  return Edit("mesh.fsdp", topology.chips, shares, costs, also=also)


def _remat(config: Any, topology: Topology, now: Room) -> Edit | None:
  remat = config.model.remat
  if KEEPS["blocks"] >= KEEPS[remat]:
    return None
  costs = f"{PASSES['blocks'] / PASSES[remat] - 1:.0%} more FLOPs, the same result"
  shares = {"temporaries": KEEPS["blocks"] / KEEPS[remat]}
  return Edit("model.remat", "blocks", shares, costs)


def _microbatch(config: Any, topology: Topology, now: Room) -> Edit | None:
  temporaries = now.parts.get("temporaries", 0.0)
  each = config.train.images_per_update // topology.chips
  smaller = [n for n in range(1, now.at_once) if each % n == 0]
  if not smaller:
    return None
  left = now.has - (now.needs - temporaries)
  fitting = [n for n in smaller if temporaries * n <= left * now.at_once]
  at_once = max(fitting, default=smaller[0])
  costs = "the same result"
  if not config.train.microbatch and config.model.remat != "full":
    costs = f"{1 / PASSES[config.model.remat]:.0%} more FLOPs, the same result"
  shares = {"temporaries": at_once / now.at_once}
  return Edit("train.microbatch", at_once * topology.chips, shares, costs)


def _moment(config: Any, topology: Topology, now: Room) -> Edit | None:
  if config.train.optimizer != "adamw" or config.train.optimizer_args.get("mu_dtype"):
    return None
  costs = "the mean of the gradients is rounded to 8 bits"
  shares = {"optimizer": BFLOAT16_MOMENT}
  return Edit("train.optimizer_args.mu_dtype", "bfloat16", shares, costs)


def _factored(config: Any, topology: Topology, now: Room) -> Edit | None:
  if config.train.optimizer == "adafactor":
    return None
  costs = "another optimizer, as SDXL's DPO; its optimizer_args differ from adamw's"
  return Edit("train.optimizer", "adafactor", {"optimizer": ADAFACTOR}, costs)


def _no_mean(config: Any, topology: Topology, now: Room) -> Edit | None:
  if not config.train.ema:
    return None
  costs = "the last weights are exported, not their running mean"
  return Edit("train.ema", 0.0, {"EMA": 0.0}, costs)


def _factors(config: Any, topology: Topology, now: Room) -> Edit | None:
  if config.model.lora.rank or config.model.lora.path:
    return None
  costs = "factors are trained beside the frozen weights: another method"
  shares = {"optimizer": FACTORS, "EMA": FACTORS, "reference": 0.0}
  return Edit("model.lora.rank", 8, shares, costs)


# In the order in which they are tried: what changes no result comes first.
RULES = (_fsdp, _remat, _microbatch, _moment, _factored, _no_mean, _factors)


def candidates(config: Any, topology: Topology) -> list[dict[str, Any]]:
  """Ways to compute the same run, fastest first by FLOPs.

  Args:
    config: the run's.
    topology: the run's.

  Returns:
    Values of config keys, each with all keys that are tried.
  """
  train, chips = config.train, topology.chips
  each = train.images_per_update // chips
  at_once = [n for n in range(min(each, 64), 0, -1) if each % n == 0]
  optimizers = [{}]
  if train.optimizer == "adamw" and not train.optimizer_args.get("mu_dtype"):
    optimizers.append({"train.optimizer_args.mu_dtype": "bfloat16"})
  found = [
    {
      "model.remat": remat,
      "train.microbatch": 0 if n == each else n * chips,
      "mesh.fsdp": fsdp,
      "mesh.data": -1,
      **optimizer,
    }
    for optimizer in optimizers
    for remat in ("none", "dots", "blocks")
    for fsdp in dict.fromkeys((1, chips))
    for n in at_once
  ]
  return sorted(found, key=lambda c: (len(c), passes(c), c["mesh.fsdp"]))


def passes(candidate: Mapping[str, Any]) -> float:
  """FLOPs of a candidate, in forward passes."""
  remat, microbatch = candidate["model.remat"], candidate["train.microbatch"]
  return PASSES[remat] + (microbatch > 0 and remat != "full")


def smaller_than(
  candidate: Mapping[str, Any], refused: Mapping[str, Any], images: int
) -> bool:
  """Whether a candidate needs less of something than one that did not fit."""
  least = {"none": 2, "dots": 1, "blocks": 0}

  def size(of: Mapping[str, Any]) -> tuple:
    return (
      least[of["model.remat"]],
      of["train.microbatch"] or images,
      -of["mesh.fsdp"],
      0 if "train.optimizer_args.mu_dtype" in of else 1,
    )

  return any(a < b for a, b in zip(size(candidate), size(refused)))


def untried(
  config: Any, topology: Topology, refused: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
  """Candidates that may fit, given those (which may grow meanwhile) that did not."""
  images = config.train.images_per_update
  for candidate in candidates(config, topology):
    if all(smaller_than(candidate, no, images) for no in refused):
      yield candidate
