"""How a plan is shown: on the terminal, and as a row of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lpo_jax import console

GiB = 2**30
COLUMNS = (
  "topology", "chips", "model", "trained", "remat", "images an update", "at once a chip",
  "fsdp", "parameters", "optimizer + EMA", "reference", "temporaries", "total GiB",
  "of", "fits", "TFLOP an image", "GB moved an image", "step s", "images/s", "MFU",
  "collectives s", "chip-hours",
)  # fmt: skip


def show(plan: Mapping[str, Any]) -> None:
  """Prints a plan."""
  for line in lines(plan):
    console.say(line)


def lines(plan: Mapping[str, Any]) -> list[str]:
  """A plan in words and figures, line by line."""
  answer = plan["answer"]
  if "error" in answer:
    return [f"{plan['topology']}: {answer['error']}"]
  mesh, at_once = answer["mesh"], _at_once(plan)
  accumulation = f"{plan['images_per_update'] // plan['chips'] // at_once} x {at_once}"
  return [
    "",
    f"{plan['topology']}: {plan['chips']} chips as data {mesh['data']} x fsdp "
    f"{mesh['fsdp']}; {plan['images_per_update']} images an update, {accumulation} a "
    f"chip; remat {plan['remat']}, {plan['optimizer']}, {plan['resolution']} pixels",
    *_effort(answer),
    *_memory(plan),
    *_work(plan),
    *_collectives(answer),
    *_time(plan),
    *_edits(plan),
  ]


def _at_once(plan: Mapping[str, Any]) -> int:
  return (plan["microbatch"] or plan["images_per_update"]) // plan["chips"]


def _effort(answer: Mapping[str, Any]) -> list[str]:
  versions = ", ".join(f"{k} {v}" for k, v in answer["versions"].items())
  if "compile_seconds" not in answer:
    return [f"  traced, not compiled (plan.effort=none); {versions}"]
  seconds = console.clock(answer["compile_seconds"])
  return [f"  compiled in {seconds} with {versions}"]


def _memory(plan: Mapping[str, Any]) -> list[str]:
  answer, found = plan["answer"], plan["estimate"]
  parts = {**answer["components"], **answer.get("memory", {})}
  rows = [f"    {name:<16}{amount(size):>12}" for name, size in parts.items()]
  if answer.get("host_bytes"):
    rows.append(f"    (in the host's memory  {amount(answer['host_bytes'])} a chip)")
  if "refused" in answer:
    rows.append(f"    the compiler: {answer['refused']['message']}")
  needs, has = found["needs"], found["has"]
  total = "unknown" if needs is None else amount(needs)
  total = f"    {'total':<16}{total:>12}"
  if has is not None:
    total += f" of {amount(has)}: {FITS[found['fits']]}"
  if "memory" not in answer and "refused" not in answer:
    total += " (without temporaries, which only compiling shows)"
  return ["  memory of a chip", *rows, total]


def amount(size: float) -> str:
  """Bytes in the unit that suits them.

  >>> amount(3 * 2**30), amount(5 * 2**20), amount(-100)
  ('3.00 GiB', '5.00 MiB', '-0.10 KiB')
  """
  for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
    if abs(size) >= unit / 10:
      return f"{size / unit:.2f} {name}"
  return f"{size / 2**10:.2f} KiB"


FITS = {True: "fits", False: "DOES NOT FIT", None: "may fit"}


def _work(plan: Mapping[str, Any]) -> list[str]:
  answer, images = plan["answer"], plan["images_per_update"]
  again = answer["flops"] / answer["needed_flops"] - 1
  row = (
    f"  FLOPs: {answer['flops'] / images / 1e12:.4g} T an image, of which "
    f"{answer['needed_flops'] / images / 1e12:.4g} T are needed ({again:.0%} computed again)"
  )
  if "hbm_bytes" not in answer:
    return [row]
  moved = answer["hbm_bytes"]
  return [row, f"  memory traffic: {moved / 1e9:.4g} GB a chip and update"]


def _collectives(answer: Mapping[str, Any]) -> list[str]:
  return [
    f"  {each['count']:>6} x {each['kind']}: {each['bytes'] / 1e6:.4g} MB a chip and "
    f"update, the largest {each['largest'] / 1e6:.4g} MB"
    for each in answer.get("collectives", ())
  ]


def _time(plan: Mapping[str, Any]) -> list[str]:
  found = plan["estimate"]
  if found["seconds"] is None:
    return ["  no roofline: nothing is assumed of a CPU"]
  parts = [f"compute {found['compute']:.4g}"]
  if found["memory"] is not None:
    parts += [f"memory {found['memory']:.4g}", f"collectives {found['network']:.4g}"]
  return [
    f"  roofline, seconds: {', '.join(parts)}",
    f"  an update takes at least {found['seconds']:.4g} s: at most "
    f"{found['images_per_second']:.4g} images/s, {found['mfu']:.1%} MFU; "
    f"{plan['total_steps']} updates: at least {found['hours']:.4g} h, "
    f"{found['chip_hours']:.4g} chip-hours",
  ]


def _edits(plan: Mapping[str, Any]) -> list[str]:
  rows = [f"  {tried_line(each)}" for each in plan.get("tried", ())]
  if "set" in plan and plan["estimate"]["fits"]:
    flags = " ".join(f"--config.{k}={v}" for k, v in plan["set"].items())
    rows.append(f"  the fastest that fits: {flags}")
  if plan.get("edits") is None:
    return rows
  enough = plan["needs_after_edits"] <= plan["estimate"]["has"]
  after = f"{amount(plan['needs_after_edits'])} by estimate"
  rows.append(
    f"  what would make it fit ({after}; --config.plan.search=true compiles it):"
    if enough
    else f"  not even this would make it fit ({after}); take more or larger chips:"
  )
  return rows + [
    f"    {each['flag']}  saves {amount(each['saves'])}; {each['costs']}"
    for each in plan["edits"]
  ]


def tried_line(tried: Mapping[str, Any]) -> str:
  """What became of one candidate of a search."""
  keys = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in tried["set"].items())
  if "error" in tried:
    return f"tried {keys}: {tried['error']}"
  needs = "unknown" if tried["needs"] is None else amount(tried["needs"])
  seconds = "" if tried["seconds"] is None else f", {tried['seconds']:.4g} s"
  return f"tried {keys}: {needs}{seconds}, {FITS[tried['fits']]}"


def table(plans: Sequence[Mapping[str, Any]]) -> str:
  """Plans as a Markdown table; GiB and seconds are of a chip and update."""
  rows = [COLUMNS, ["---"] * 4 + ["--:"] * (len(COLUMNS) - 4), *map(_row, plans)]
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(plan: Mapping[str, Any]) -> list[str]:
  answer = plan["answer"]
  head = [plan["topology"], str(plan["chips"]), plan["model"].partition(" ")[0]]
  head += [plan["trained"], plan["remat"], str(plan["images_per_update"])]
  if "error" in answer:
    return [*head, answer["error"], *[""] * (len(COLUMNS) - len(head) - 1)]
  found, images = plan["estimate"], plan["images_per_update"]
  parts = {**answer["components"], **answer.get("memory", {})}

  def size(*names: str) -> str:
    return f"{sum(parts.get(name, 0) for name in names) / GiB:.2f}"

  def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)

  temporaries = size("temporaries", "padding", "program") if "memory" in answer else ""
  moved = answer.get("hbm_bytes")
  return [
    *head,
    str(_at_once(plan)),
    str(answer["mesh"]["fsdp"]),
    size("parameters"),
    size("optimizer", "EMA"),
    size("reference", "frozen base"),
    temporaries,
    number(found["needs"] and found["needs"] / GiB, ".2f"),
    number(found["has"] and found["has"] / GiB, ".2f"),
    {True: "yes", False: "no", None: "?"}[found["fits"]],
    number(answer["flops"] / images / 1e12),
    number(moved and moved * plan["chips"] / images / 1e9),
    number(found["seconds"]),
    number(found["images_per_second"]),
    number(found["mfu"], ".0%"),
    number(found["network"]),
    number(found["chip_hours"], ".4g"),
  ]
