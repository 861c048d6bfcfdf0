"""What a compiled program moves, read from its text: memory and collectives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set

from lpo_jax.errors import UserError

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
# What moves nothing by itself.
FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
  "conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "domain",
  "async-start", "async-update", "async-done", "iota",
}  # fmt: skip
# kind -> bytes that a chip receives, of `size` bytes that it gives, among `n` chips that
# pass parts around a ring.
COLLECTIVES = {
  "all-gather": lambda size, n: size * (n - 1),
  "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
  "reduce-scatter": lambda size, n: size * (n - 1) / n,
  "all-to-all": lambda size, n: size * (n - 1) / n,
  "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
  "collective-permute": lambda size, n: size,
  "collective-broadcast": lambda size, n: size,
}
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_CALLS = re.compile(
  r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: of its result.
    type: of its result, as written.
    opcode: what it does.
    arguments: what stands in its brackets: names, or the number of a parameter.
    rest: its attributes, as written.
    is_root: whether its result is the computation's.
  """

  name: str
  type: str
  opcode: str
  arguments: str
  rest: str
  is_root: bool

  @property
  def operands(self) -> list[str]:
    """Names of what it reads."""
    return _NAME.findall(self.arguments)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of one chip.

  Attributes:
    kind: a key of `COLLECTIVES`.
    bytes: that the chip gives each time.
    group: number of chips that take part together.
    times: how often it runs in a step.
  """

  kind: str
  bytes: float
  group: int
  times: int

  @property
  def received(self) -> float:
    """Bytes that the chip receives in a step."""
    return self.times * COLLECTIVES[self.kind](self.bytes, self.group)


def array_bytes(text: str, *, in_hbm: bool = False) -> float:
  """Sums the sizes of the arrays of a type.

  Args:
    text: "(f32[8,4]{1,0}, bf16[2]{0:T(8,128)S(1)})".
    in_hbm: leave out what lies in faster memory, the S(1) of the TPU's compiler.

  >>> array_bytes("(f32[8,4]{1,0}, bf16[2]{0:T(8,128)S(1)})")
  132.0
  """
  total = 0.0
  for dtype, shape, layout in _ARRAY.findall(text):
    if in_hbm and "S(" in layout:
      continue
    bits = re.search(r"\d+", dtype)
    size = SIZES.get(dtype, int(bits[0]) / 8 if bits else 4)
    total += size * math.prod(int(n) for n in shape.split(",") if n)
  return total


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, of one chip.

  Attributes:
    computations: by name, callees before callers.
    times: how often each of them runs in a step.
    fused: those that are within fusions.
  """

  computations: Mapping[str, Computation]
  times: Mapping[str, int]
  fused: Set[str]


def read(text: str) -> Program:
  """Reads a program's text, as `jax.stages.Compiled.as_text` has it.

  Raises:
    UserError: it is not such a text.
  """
  computations: dict[str, Computation] = {}
  current, entry = None, ""
  for line in text.splitlines():
    if current is None:
      head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line)
      if head:
        current = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif re.match(r"\}(, [a-z_]+=.*)?$", line):  # a kernel's attributes have lines too
      current = None
    else:
      found = _read_line(line)
      if found is not None:
        current[found.name] = found
  if not entry:
    raise UserError(
      "a compiled program's text has no ENTRY; jax or XLA has changed it."
    )
  return Program(computations, *_counts(computations, entry))


def _read_line(line: str) -> Instruction | None:
  match = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
  if match is None:
    return None
  start = match.end()
  end = _close(line, start) if line[start] == "(" else line.find(" ", start)
  kind = re.match(r"\s*([\w-]+)\(", line[end:])
  if kind is None:
    return None
  opened = end + kind.end() - 1
  closed = _close(line, opened)
  arguments = line[opened + 1 : closed - 1]
  return Instruction(
    match[2], line[start:end], kind[1], arguments, line[closed:], bool(match[1])
  )


def _close(line: str, start: int) -> int:
  """The place after the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(line)):
    depth += {"(": 1, ")": -1}.get(line[place], 0)
    if depth == 0:
      return place + 1
  return len(line)


def _callees(instruction: Instruction) -> Iterator[tuple[str, str]]:
  """(how, name) of the computations that an instruction runs."""
  for how, name in _CALLS.findall(instruction.rest):
    if how != "to_apply" or instruction.opcode == "call":  # else a sum of two numbers
      yield how, name
  for names in _BRANCHES.findall(instruction.rest):
    yield from (("branch", name) for name in _NAME.findall(names))


def trip_count(loop: Instruction, computations: Mapping[str, Computation]) -> int:
  """How often a loop turns: as written beside it, or what its counter is held against.

  jax's loops count from 0 in steps of 1. A loop that does neither counts once.
  """
  written = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
  if written:
    return int(written[1])
  condition = computations.get(dict(_callees(loop)).get("condition", ""), {})
  for test in condition.values():
    if test.opcode == "compare" and "direction=LT" in test.rest:
      for operand in test.operands:
        bound = condition.get(operand)
        if bound is not None and bound.opcode == "constant":
          return int(bound.arguments)
  return 1


def _counts(
  computations: Mapping[str, Computation], entry: str
) -> tuple[dict[str, int], set[str]]:
  """How often each computation runs in a step, and which of them are within fusions."""
  times = dict.fromkeys(computations, 0)
  times[entry] = 1
  fused: set[str] = set()
  for name in reversed(list(computations)):  # callers before callees
    for instruction in computations[name].values():
      turns = 1
      if instruction.opcode == "while":
        turns = trip_count(instruction, computations)
      for _, callee in _callees(instruction):
        if callee in times:
          times[callee] += times[name] * turns
          if name in fused or instruction.opcode == "fusion":
            fused.add(callee)
  return times, fused


def collectives(program: Program) -> list[Collective]:
  """Finds what the chips of a program send each other in a step.

  A collective that is started, carried on within a fusion and ended is written several
  times with the same channel; it counts once.
  """
  times = program.times
  found: dict[str, Collective] = {}
  for where, computation in program.computations.items():
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind not in COLLECTIVES or not times[where]:
        continue
      if where.startswith("all-reduce-scatter"):  # and a slice of it: libtpu's word
        kind = "reduce-scatter"
      given = sum(
        array_bytes(computation[name].type)
        for name in instruction.operands
        if name in computation
      )
      channel = re.search(r"channel_id=(\d+)", instruction.rest)
      # libtpu gives one channel to collectives of two kinds.
      key = f"{kind}/{channel[1]}" if channel else f"{where}/{instruction.name}"
      often = max(times[where], found[key].times if key in found else 0)
      found[key] = Collective(kind, given, group_size(instruction.rest), often)
  return [each for each in found.values() if each.group > 1]


def group_size(attributes: str) -> int:
  """Number of chips in one group of a collective.

  >>> group_size("replica_groups={{0,1,2,3},{4,5,6,7}}"), group_size("[2,4]<=[8]")
  (4, 4)
  >>> group_size("replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y'},")
  4
  """
  mesh = re.search(
    r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", attributes
  )
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
  iota = re.search(r"\[(\d+),(\d+)\]<=\[", attributes)
  if iota:
    return int(iota[2])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  if listed:
    return listed[1].count(",") + 1
  # Pairs (from, to): all that matters is that something is sent.
  return 2 if "source_target_pairs={{" in attributes else 1


def hbm_bytes(program: Program) -> float:
  """Bytes that one chip reads from and writes to its main memory in a step.

  Every instruction reads what it is given and writes its result, as often as it runs; of
  an array that is only sliced, the slice. What stays in a chip's faster memory is left
  out. Kernels may read their arguments more than once, which cannot be seen here.
  """
  known, times = program.computations, program.times
  return sum(
    times[where]
    * sum(_moved(each, computation, known) for each in computation.values())
    for where, computation in known.items()
    if times[where] and where not in program.fused
  )


def _moved(
  instruction: Instruction,
  computation: Computation,
  computations: Mapping[str, Computation],
) -> float:
  opcode = instruction.opcode
  if opcode in FREE:
    return 0.0
  arrays = [computation[name] for name in instruction.operands if name in computation]
  reads = [array_bytes(x.type, in_hbm=True) for x in arrays]
  writes = array_bytes(instruction.type, in_hbm=True)
  if opcode.endswith("-done"):
    return writes
  if opcode.endswith("-start"):
    return sum(reads)
  if opcode in ("dynamic-slice", "slice", "gather"):
    return writes + min(reads[0], array_bytes(instruction.type))
  if opcode in ("dynamic-update-slice", "scatter"):
    changed = array_bytes(arrays[-1 if opcode == "scatter" else 1].type)
    return 2 * min(changed, writes)
  if opcode == "fusion":
    inner = computations.get(dict(_callees(instruction)).get("calls", ""), {})
    shares = _parameter_bytes(inner)
    reads = [min(whole, shares.get(i, whole)) for i, whole in enumerate(reads)]
    writes = _result_bytes(instruction.type, inner) if inner else writes
  return sum(reads) + writes


def _parameter_bytes(fusion: Computation) -> dict[int, float]:
  """Of a fusion's parameters that are only sliced or updated in part: how much of them."""
  shares = {}
  for parameter in fusion.values():
    if parameter.opcode != "parameter":
      continue
    users = list(_users(parameter, fusion))
    if users and all(share is not None for share in users):
      shares[int(parameter.arguments)] = sum(users)
  return shares


def _users(source: Instruction, fusion: Computation) -> Iterable[float | None]:
  """Bytes that each user reads of `source`; None for all of it."""
  for user in fusion.values():
    if source.name not in user.operands:
      continue
    first = user.operands[0] == source.name
    if user.opcode == "bitcast" and not user.is_root:
      yield from _users(user, fusion)
    elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
      yield array_bytes(user.type)
    elif user.opcode == "dynamic-update-slice" and first:
      yield 0.0  # written in place
    else:
      yield None


def _result_bytes(type_: str, fusion: Computation) -> float:
  """What a fusion writes to main memory: of an array updated in place, the update."""
  (root,) = (each for each in fusion.values() if each.is_root)
  parts = [fusion[name] for name in root.operands] if root.opcode == "tuple" else [root]
  arrays = [match[0] for match in _ARRAY.finditer(type_)]
  if len(arrays) != len(parts):
    return array_bytes(type_, in_hbm=True)
  total = 0.0
  for array, part in zip(arrays, parts):
    while part.opcode == "bitcast" and part.operands[0] in fusion:
      part = fusion[part.operands[0]]
    size = array_bytes(array, in_hbm=True)
    if part.opcode == "dynamic-update-slice":
      size = min(size, array_bytes(fusion[part.operands[1]].type))
    total += 0.0 if part.opcode == "parameter" else size  # it is handed through
  return total
