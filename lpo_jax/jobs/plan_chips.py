"""What a plan may be made for: chips with their limits, and topologies by name."""

from __future__ import annotations

import dataclasses
import math
import re

from lpo_jax.errors import UserError, nearest

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can hold and do.

  Attributes:
    name: as topologies call it.
    hbm: bytes that a program may use of the chip's memory.
    peak: bf16 FLOP/s.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s that it can receive from its neighbours over all its links
      together: half of what the vendor calls bidirectional.
    cores: by which the vendor counts in names like v5p-8; chips where it is 1.
    shapes: chips -> the topology of a name without a shape, such as v5e-8.
  """

  name: str
  hbm: float
  peak: float
  hbm_bandwidth: float
  ici_bandwidth: float
  cores: int
  shapes: dict[int, str]


_FLAT = {
  1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
  256: "16x16",
}  # fmt: skip
_CUBIC = {
  4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
  256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip

# Memory is what libtpu 0.0.42.1 says of itself when it refuses a program: "exceeds
# available HBM (15.75G)"; the vendor's 16, 95 and 32 GB are before its own share. The
# other numbers are the vendor's, docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}:
#   v5e "197 TFLOPs", "16 GB, 819 GBps", ICI "bidirectional 400 GBps" (was "1600 Gbps")
#   v5p "459 TFLOPs", "95 GB, 2765 GBps", ICI "4800 Gbps"
#   v6e "918 TFLOPs", "32 GB", "1638 GBps", ICI "bidirectional 800 GBps"
CHIPS = {
  "v5e": Chip("v5e", 15.75 * GiB, 197e12, 819e9, 200e9, 1, _FLAT),
  "v5p": Chip("v5p", 95.74 * GiB, 459e12, 2765e9, 600e9, 2, _CUBIC),
  "v6e": Chip("v6e", 31.25 * GiB, 918e12, 1638e9, 400e9, 1, _FLAT),
}
CPU = "cpu"
# How jax calls a device -> its bf16 FLOP/s, the first prefix that fits. GPUs: NVIDIA's
# data sheets of the SXM modules, without sparsity (H200 and H100 989, A100 312 TFLOPS).
PEAKS = {
  "TPU v5 lite": CHIPS["v5e"].peak,
  "TPU v5e": CHIPS["v5e"].peak,
  "TPU v5": CHIPS["v5p"].peak,
  "TPU v6": CHIPS["v6e"].peak,
  "NVIDIA H200": 989e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA A100-SXM": 312e12,
}


def peak_of(kind: str) -> float | None:
  """bf16 FLOP/s of a device by `jax.Device.device_kind`; None if nobody wrote it down.

  >>> peak_of("TPU v5 lite"), peak_of("TPU v5p"), peak_of("cpu")
  (197000000000000.0, 459000000000000.0, None)
  """
  return next((peak for prefix, peak in PEAKS.items() if kind.startswith(prefix)), None)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for.

  Attributes:
    name: in full: "v5e:2x4" or "cpu:8".
    chip: a key of `CHIPS`, or "cpu".
    shape: of the torus; (n,) of so many pretended CPU devices.
  """

  name: str
  chip: str
  shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    """Number of chips."""
    return math.prod(self.shape)

  @property
  def limits(self) -> Chip | None:
    """What a chip can do; None for CPUs, of which nothing is assumed."""
    return CHIPS.get(self.chip)

  @property
  def host_bounds(self) -> tuple[int, ...]:
    """Chips of one host, as the compiler wants them: the default does not divide 1x1."""
    return tuple(min(most, n) for most, n in zip((2, 2, 1), (*self.shape, 1, 1)))


def parse(text: str) -> Topology:
  """Reads the name of one topology.

  Args:
    text: "v5e:4x4", "v5e-16" (as the vendor's accelerator types: v5p counts two cores a
      chip) or "cpu:8".

  Raises:
    UserError: no such chip, or a shape that it does not come in; with the nearest.

  >>> parse("v5p-8").name, parse("v5p-8").chips, parse("cpu:8").chips
  ('v5p:2x2x1', 4, 8)
  """
  match = re.fullmatch(r"([a-z]\w*)(?:[:=]([\dx]+)|-(\d+))", text.strip().lower())
  chip, shape, count = match.groups() if match else (text.strip(), None, None)
  if chip == CPU and (shape or count or "").isdigit() and int(shape or count):
    return Topology(f"{CPU}:{int(shape or count)}", CPU, (int(shape or count),))
  if chip not in CHIPS or match is None:
    known = [f"{c.name}:{c.shapes[8]}" for c in CHIPS.values()] + [f"{CPU}:8"]
    close = nearest(chip, [*CHIPS, CPU]) or nearest(text, known)
    raise UserError(
      f"plan.topology: {text!r} is no topology"
      + (
        f"; did you mean {next(k for k in known if k.startswith(close))!r}?"
        if close
        else "."
      )
      + f" Expected a chip and the shape of its torus, such as {', '.join(known)}."
    )
  kind = CHIPS[chip]
  if count is not None:
    chips = int(count) // kind.cores
    if chips not in kind.shapes or int(count) % kind.cores:
      offered = [n * kind.cores for n in kind.shapes]
      raise UserError(
        f"plan.topology: {text!r} does not exist; {chip}-N comes with N = "
        f"{', '.join(map(str, offered))}"
        + (f" (N counts the {kind.cores} cores of a chip)." if kind.cores > 1 else ".")
        + f" The nearest is {chip}-{min(offered, key=lambda n: abs(n - int(count)))}."
      )
    shape = kind.shapes[chips]
  sizes = tuple(int(n) for n in shape.split("x") if n)
  return _check(text, kind, sizes)


def _check(text: str, kind: Chip, sizes: tuple[int, ...]) -> Topology:
  """Refuses shapes that are not hosts of 2 x 2 chips side by side, nor one chip."""
  axes = len(next(iter(kind.shapes.values())).split("x"))
  even = len(sizes) == axes and all(n > 0 for n in sizes)
  whole = even and not (sizes[0] % 2 or sizes[1] % 2)
  if not (whole or (axes == 2 and sizes == (1, 1))):
    near = min(
      kind.shapes.items(), key=lambda item: abs(item[0] - math.prod(sizes or (1,)))
    )[1]
    raise UserError(
      f"plan.topology: {text!r}: expected {axes} sizes of the torus, the first two even "
      f"(a host has 2 x 2 chips), such as {kind.name}:{near}."
    )
  return Topology(f"{kind.name}:{'x'.join(map(str, sizes))}", kind.name, sizes)


def parse_list(text: str | tuple | list) -> list[Topology]:
  """Reads topologies separated by commas.

  Raises:
    UserError: there is none, or one that does not exist.
  """
  names = text.split(",") if isinstance(text, str) else [str(name) for name in text]
  names = [name for name in names if name.strip()]
  if not names:
    raise UserError(
      "plan.topology is empty; say what to compile for, such as "
      "--config.plan.topology=v5e:2x4, or a list, v5e-8,v5p-8,v6e-8."
    )
  return list({found.name: found for found in map(parse, names)}.values())
