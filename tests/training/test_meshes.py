"""One device, eight, and several processes: the same updates, and exactly 0 at step 0.

Also what the compiled step sends around. More meshes, by `pytest -m slow`.
"""

import collections
import json
import math
import os
import pickle
import re
import runpy
import socket
import subprocess
import sys

import numpy as np
import pytest

from lpo_jax.jobs import plan_hlo

SCRIPT = "tests/training/meshes.py"
meshes = runpy.run_path(SCRIPT)
FAMILIES = meshes["FAMILIES"]
TIMEOUT_S = 900
# Of losses, and of parameters by their norm. Adam divides by the size of the gradient:
# where that is nearly 0, another order of summing decides the sign of a whole step. So
# the difference is larger compared with how far the parameters have moved.
TOLERANCE = 1e-5
TOLERANCE_OF_MOVE = 1e-3


def run(cases, folder, *, processes=1, devices=1):
  """Runs cases of `meshes.py` in so many processes with so many devices each."""
  together = {}
  if processes > 1:
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      together["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{probe.getsockname()[1]}"
    together["JAX_NUM_PROCESSES"] = str(processes)
  flags = f"--xla_force_host_platform_device_count={devices}"
  file = folder / "out.pickle"
  logs = [folder / f"{index}.log" for index in range(processes)]
  started = []
  for index, log in enumerate(logs):
    own = {"XLA_FLAGS": flags, "PYTHONPATH": ".", "JAX_PROCESS_ID": str(index)}
    with log.open("w") as stream:
      command = [sys.executable, SCRIPT, json.dumps(cases), str(file)]
      environment = {**os.environ, **together, **own}
      started.append(
        subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
      )
  try:
    codes = [process.wait(timeout=TIMEOUT_S) for process in started]
  finally:
    for process in started:
      process.kill()
  assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
  return pickle.loads(file.read_bytes())


def assert_equal_training(case, one):
  """Every update of every family as on one device."""
  assert case["families"]
  for name, mine in case["families"].items():
    theirs = one["families"][name]
    for key in ("loss", "err", "ref_err", "drift"):
      a, b = ([row[key] for row in rows["rows"]] for rows in (mine, theirs))
      scale = np.abs(b).max()  # drift begins at 0
      if (name, key) == ("lair", "loss"):
        scale = max(scale, 0.1)  # begins at 0 as well: terms of about 1 that cancel
      assert np.abs(np.subtract(a, b)).max() <= TOLERANCE * scale, (name, key)
    norm, difference = meshes["norm"], meshes["difference"]
    for tree in ("params", "ema"):
      off = norm(difference(mine[tree], theirs[tree]))
      assert off <= TOLERANCE * norm(theirs[tree]), (name, tree)
      moved = norm(difference(theirs[tree], one["start"]))
      assert off <= TOLERANCE_OF_MOVE * moved, (name, tree)
      assert moved > 0.01 * norm(one["start"])  # it does train


def assert_nothing_has_moved(case):
  for family in case["families"].values():
    first, *rest = family["rows"]
    assert first["margin"] == first["drift"] == first["err"] - first["ref_err"] == 0
    assert first["winner_gain"] == first["loser_gain"] == 0
    assert all(row["drift"] > 0 for row in rest)


ONE = {"devices": 1}
FSDP = {"data": 2, "fsdp": 4, "reference": "sharded"}
ZERO1 = {"data": 2, "fsdp": 4, "parameters": "replicated", "reference": "replicated"}
SOME = ["kto", "lpo"]
START = {"families": ["lpo"], "steps": 2}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  """Cases on eight devices, by name; "one" is on the first of them."""
  cases = {
    "one": ONE,
    "fsdp": FSDP,
    "zero1": {**ZERO1, "families": SOME},
    "bfloat16": {**FSDP, **START, "dtype": "bfloat16"},
  }
  done = run([*cases.values()], tmp_path_factory.mktemp("eight"), devices=8)
  return dict(zip(cases, done, strict=True))


def test_eight_devices_train_as_one(eight):
  assert set(eight["one"]["families"]) == set(FAMILIES)
  for name in ("fsdp", "zero1"):
    assert_equal_training(eight[name], eight["one"])


def test_margins_begin_at_exactly_zero(eight):
  for case in eight.values():
    assert_nothing_has_moved(case)


def test_two_processes_train_as_one(eight, tmp_path):
  """Four devices, no two of a process in a row; lists straddle all there is."""
  case = {"fsdp": 2, "order": "interleaved", "microbatch": 8, "families": SOME}
  (done,) = run([case], tmp_path, processes=2, devices=2)
  assert_equal_training(done, eight["one"])
  assert_nothing_has_moved(done)


def shape_of(type_text):
  return tuple(int(n) for n in re.search(r"\[([\d,]*)\]", type_text)[1].split(",") if n)


def sent(text):
  """Kind -> counter of the shapes of the arrays that collectives give out."""
  found = collections.defaultdict(collections.Counter)
  for computation in plan_hlo.read(text).computations.values():
    for each in computation.values():
      kind = each.opcode.removesuffix("-start")
      if kind in plan_hlo.COLLECTIVES:
        arrays = re.findall(r"\w+\[[\d,]*\]", each.type)
        found[kind].update(shape_of(array) for array in arrays)
  return found


# Of no use to anybody but the objective: three scalars of 16 images, as lists.
SCALARS = 3 * 20


# Nobody asks for the gradient of what goes into the network.
INPUTS = {(3, 3, 4, 32), (40, 32)}


def test_parameters_are_gathered_and_activations_are_not(eight):
  """Once for each use: the policy's two passes, and the reference's."""
  program = eight["fsdp"]["program"]
  collectives, split = sent(program["text"]), set(program["split"])
  assert split > INPUTS and len(split) == len(program["split"]) == 6
  assert set(collectives) <= {"all-gather", "all-reduce", "reduce-scatter"}
  gathered = collectives["all-gather"]
  large = {shape: n for shape, n in gathered.items() if math.prod(shape) > SCALARS}
  assert large == {shape: 2 if shape in INPUTS else 3 for shape in split}


def test_gradients_are_summed_once(eight):
  """On CPUs a reduce-scatter is an all-reduce and a slice; then the slices over "data"."""
  program = eight["fsdp"]["program"]
  expected = collections.Counter()
  for shape in program["split"]:
    longest = max(range(len(shape)), key=lambda i: (shape[i], i))
    part = (n // 4 if i == longest else n for i, n in enumerate(shape))
    # Which axis comes first is the compiler's affair.
    expected.update([tuple(sorted(shape)), tuple(sorted(part))])
  summed = collections.Counter()
  for shape, count in sent(program["text"])["all-reduce"].items():
    summed[tuple(sorted(shape))] += count
  assert {shape: summed[shape] for shape in expected} == expected


def test_zero1_gathers_each_update_once(eight):
  program = eight["zero1"]["program"]
  assert not program["split"]
  collectives = sent(program["text"])
  assert set(collectives) <= {"all-gather", "all-reduce", "reduce-scatter"}
  kernels = {tuple(shape) for shape in eight["fsdp"]["program"]["split"]}
  gathered = {s: n for s, n in collectives["all-gather"].items() if s in kernels}
  expected = collections.Counter(eight["fsdp"]["program"]["split"])
  assert gathered == expected


def test_the_whole_state_is_updated_in_place(eight):
  for name, case in eight.items():
    program = case["program"]
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", program["text"])[1]
    assert aliases.count("alias)") == program["leaves"], name
    assert program["in_place"] == program["bytes"], name


WHERE = {
  "fsdp=8": {"fsdp": 8, "reference": "sharded"},
  "4 x 2, microbatches": {"data": 4, "fsdp": 2, "microbatch": 8},
  "data=8": {"data": 8},
  "zero1, microbatches": {**ZERO1, "microbatch": 8},
  "offload": {**FSDP, "offload": ["ema", "reference"]},
  "offload, microbatches": {
    "data": 4,
    "fsdp": 2,
    "offload": ["ema", "reference"],
    "microbatch": 8,
  },
}


@pytest.mark.slow
def test_every_mesh_of_eight_devices(eight, tmp_path):
  for case in run([*WHERE.values()], tmp_path, devices=8):
    assert_equal_training(case, eight["one"])
    assert_nothing_has_moved(case)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1), (4, 2)])
def test_every_family_on_processes(eight, tmp_path, processes, devices):
  count = processes * devices
  cases = [
    {"fsdp": count, "reference": "sharded"},
    {"fsdp": 2, "microbatch": 8, "order": "interleaved"},
    {**START, "fsdp": count, "dtype": "bfloat16"},
    {**START, "fsdp": 2, "dtype": "bfloat16", "microbatch": 8},
  ]
  done = run(cases, tmp_path, processes=processes, devices=devices)
  for case in done[:2]:
    assert_equal_training(case, eight["one"])
  for case in done:
    assert_nothing_has_moved(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_margins_begin_at_exactly_zero_on_every_mesh(tmp_path, dtype):
  cases = [
    {**START, **where, "dtype": dtype, "microbatch": microbatch, "factors": factors}
    for where in (ONE, FSDP, ZERO1, {"fsdp": 8}, {"data": 8})
    for microbatch in (0, 8)
    for factors in (False, True)
  ]
  for case in run(cases, tmp_path, devices=8):
    assert_nothing_has_moved(case)
