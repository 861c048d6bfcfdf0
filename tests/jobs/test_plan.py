"""The plan job: the tiny world's step planned for eight devices, and what is made of it."""

import contextlib
import importlib.util
import json
import math
import subprocess
import sys

import jax
import pytest

from lpo_jax import main, models, parallel, pretrained
from lpo_jax.data.pipeline import Batches
from lpo_jax.errors import UserError
from lpo_jax.jobs import (
  blueprint,
  plan,
  plan_chips,
  plan_estimate,
  plan_models,
  plan_page,
  plan_step,
)
from lpo_jax.jobs import cache as cache_job

GiB = 2**30
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
# A chip that fills up: 1 GiB, 1 TFLOP/s, 100 GB/s, 10 GB/s between chips.
SMALL = plan_chips.Chip("small", GiB, 1e12, 1e11, 1e10, 1, {4: "2x2"})
FOUR = plan_chips.Topology("v5e:2x2", "v5e", (2, 2))


@pytest.fixture(scope="module")
def planned(tiny_world, tmp_path_factory):
  """The workdir of a plan for 8 CPU devices, and what was printed."""
  workdir = tmp_path_factory.mktemp("plan")
  outcome = tiny_world.run(
    workdir, "plan.topology=cpu:8", "mesh.fsdp=4", "mesh.reference=sharded", job="plan"
  )
  assert outcome.code == 0, outcome.text
  (answer,) = json.loads((workdir / "plan.json").read_text("utf-8")).values()
  return workdir, outcome.text, answer


def by_hand(unet, ways):
  """Elements of a parameter tree on one of `ways` devices: kernels that divide are split."""
  total = 0
  for name, leaf in unet.named_shapes().items():
    size = math.prod(leaf.shape)
    is_vector = name.rpartition(".")[2] in ("bias", "scale")
    divides = size >= 1024 and any(n % ways == 0 for n in leaf.shape)
    total += size // ways if divides and not is_vector else size
  return total


def test_memory_by_component(tiny_world, planned):
  parts = planned[2]["components"]
  unet = models.build(pretrained.read_config(tiny_world.pipeline, "unet"))
  elements = by_hand(unet, ways=4)
  whole = sum(math.prod(leaf.shape) for leaf in unet.named_shapes().values())
  assert whole / 4 < elements < whole / 2
  assert parts["parameters"] == parts["EMA"] == parts["reference"] == 4 * elements
  counters = parts["optimizer"] - 2 * parts["parameters"]  # besides both moments
  assert 0 < counters <= 16
  images = 16 // 8  # a device; latents are 8 x 8 x 4, prompts 16 x 16
  slots = images * (8 * 8 * 8 * 4 + 16 * 16 * 4 + 2 * 4 + 4)
  lists = 8 * (8 * (4 + 4 + 1 + 4) + 4)  # slot, rank, valid, score; weight: everywhere
  assert parts["batch"] == slots + lists


def test_what_is_compiled_has_that_memory(planned):
  answer = planned[2]
  assert answer["mesh"] == {"data": 2, "fsdp": 4}
  # The compiler drops what nothing reads (an LPO step no scores) and pads nothing here.
  assert -1000 < answer["memory"]["padding"] < 100
  assert answer["memory"]["temporaries"] > 0
  assert answer["host_bytes"] == 0


def test_nothing_is_computed_twice(planned):
  answer = planned[2]
  assert answer["flops"] == answer["needed_flops"] > 1e8  # remat none, one microbatch


def test_what_the_devices_send(planned):
  kinds = {each["kind"]: each for each in planned[2]["collectives"]}
  assert kinds["all-gather"]["count"] > 10  # a kernel or so for each
  assert kinds["all-reduce"]["bytes"] > 0  # gradients, over "data"


def test_the_page(planned):
  workdir, text, _ = planned
  assert "cpu:8: 8 chips as data 2 x fsdp 4; 16 images an update, 1 x 2 a chip" in text
  assert "no roofline: nothing is assumed of a CPU" in text
  head, _, row = (workdir / "plan.md").read_text("utf-8").splitlines()
  assert head.count("|") == row.count("|") and row.startswith("| cpu:8 | 8 | ")


def test_what_is_known_is_not_compiled_again(tiny_world, planned):
  workdir, _, _ = planned
  again = tiny_world.run(
    workdir,
    "plan.topology=cpu:8",
    "mesh.fsdp=4",
    "mesh.reference=sharded",
    "train.total_steps=7",  # does not reach the step
    job="plan",
  )
  assert again.code == 0, again.text
  assert "cpu:8: compiled before" in again.text


def test_a_topology_that_the_config_does_not_go_with(tiny_world, tmp_path):
  outcome = tiny_world.run(
    tmp_path, "plan.topology=cpu:3", "plan.effort=none", job="plan"
  )
  assert outcome.code == 2
  assert "train.images_per_update=16 does not divide over 3 devices" in outcome.text


def test_the_batch_is_the_trainers(tiny_cache):
  config = main.load_config(str(tiny_cache.config))
  config.data.cache = str(tiny_cache.cache)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  with contextlib.closing(cache_job.open_for(config, tiny_cache.folder)) as cache:
    batches = Batches(cache, images_per_update=16, seed=0, prefetch=0)
    with contextlib.closing(batches):
      real = batches.batch_spec
  config.data.max_list_size = 5  # as long as the longest
  guessed = plan_step.abstract_batch(config, mesh, 16)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), guessed) == jax.tree.map(
    lambda x: (x.shape, x.dtype), real
  )


def test_the_step_is_unrolled_by_where_it_will_run(tiny_world):
  config = main.load_config(str(tiny_world.config))
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  assert blueprint.make_blueprint(config, mesh).method.unroll


ANSWER = {
  "components": {"parameters": 200e6, "optimizer": 400e6, "EMA": 200e6, "batch": 1e6},
  "memory": {"padding": 0, "temporaries": 500e6, "program": 0},
  "mesh": {"data": 4, "fsdp": 1},
  "flops": 8e12,
  "needed_flops": 6e12,
  "hbm_bytes": 5e10,
  "collectives": [{"kind": "all-gather", "received": 3e9}],
}


def test_roofline_by_hand():
  found = plan_estimate.estimate(ANSWER, SMALL, chips=4, images=16, updates=1800)
  assert found.compute == 2.0 and found.memory == 0.5 and found.network == 0.3
  assert found.seconds == 2.0 and found.images_per_second == 8.0
  assert found.mfu == 6e12 / (2.0 * 4 * 1e12)
  assert found.hours == 1.0 and found.chip_hours == 4.0
  assert found.needs == 1301e6 and found.fits is False


def test_a_step_that_waits_for_memory():
  slow = {**ANSWER, "hbm_bytes": 4e11}
  found = plan_estimate.estimate(slow, SMALL, chips=4, images=16, updates=1)
  assert found.seconds == 4.0 and found.mfu == 0.375


def test_fits_and_may_fit():
  def fits(**changes):
    answer = {k: v for k, v in (ANSWER | changes).items() if v is not None}
    return plan_estimate.estimate(answer, SMALL, chips=4, images=16, updates=1).fits

  assert fits(memory={"temporaries": 1e8}) is True
  assert fits(memory=None) is None  # not compiled
  assert fits(memory=None, components={"parameters": 2e9}) is False
  assert fits(memory=None, refused={"needs": None, "message": ""}) is False


def config_with(**train):
  config = main.load_config("lpo_sd15.py")
  config.train.images_per_update = 64
  config.train.microbatch = 0
  config.model.remat = "none"
  with config.unlocked():
    config.train.update(train)
  return config


def suggestions(config, **changes):
  full = plan_estimate.room(config, FOUR, ANSWER | changes, GiB)
  edits, needs = plan_estimate.suggest(config, FOUR, full)
  return {edit.key: edit.value for edit in edits}, needs


def test_what_changes_no_result_is_suggested_first():
  edits, needs = suggestions(config_with(ema=0.9))
  # Parameters, moments and EMA to a quarter: 200 + 500 + 1 MB.
  assert edits == {"mesh.fsdp": 4} and needs == pytest.approx(701e6)
  config = config_with(ema=0.9)
  config.mesh.data = 4
  full = plan_estimate.room(config, FOUR, ANSWER, GiB)
  ((edit,), _) = plan_estimate.suggest(config, FOUR, full)
  assert edit.flag == "--config.mesh.fsdp=4 --config.mesh.data=-1"


def test_activations_are_made_smaller_where_they_are_what_is_large():
  large = {"temporaries": 4e9, "padding": 0, "program": 0}
  edits, needs = suggestions(config_with(ema=0.9), memory=large)
  # Blocks leave 17 % of 4 GB, which with 801 MB of state is too much; split, it fits.
  assert edits == {"mesh.fsdp": 4, "model.remat": "blocks"}
  assert needs == pytest.approx(200e6 + 1e6 + 0.17 * 4e9)
  edits, needs = suggestions(config_with(ema=0.9), memory={"temporaries": 40e9})
  # 201 MB of state leave room for 873 MB: of 6.8 GB for 16 images at once, 2 of them.
  assert edits["train.microbatch"] == 2 * 4 and needs <= GiB


def test_a_needless_edit_is_not_asked_for():
  """Split parameters alone do not help here, and the microbatch alone does."""
  small = {"parameters": 30e6, "batch": 1e6}
  edits, _ = suggestions(
    config_with(), components=small, memory={"temporaries": 1.05 * GiB}
  )
  assert edits == {"model.remat": "blocks"}


def test_the_last_resort_is_another_method():
  config = config_with(microbatch=4, ema=0.0)
  config.model.remat = "blocks"
  parts = {"parameters": 0.5 * GiB, "optimizer": 3 * GiB, "reference": 0.45 * GiB}
  edits, needs = suggestions(
    config,
    components=parts,
    mesh={"data": 1, "fsdp": 4},
    memory={"temporaries": 0.3 * GiB},
  )
  assert "model.lora.rank" in edits and needs < GiB


def test_nothing_is_enough_for_a_model_that_is_too_large():
  _, needs = suggestions(config_with(), components={"parameters": 100e9})
  assert needs > GiB


def test_what_the_compiler_says_when_it_refuses():
  # libtpu 0.0.42.1, of a program with 1 GiB each of arguments and results.
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (23.00G) exceeds available HBM (15.75G)."
  )
  assert plan_step.refusal(message)["needs"] == 23 * GiB
  refused = {**ANSWER, "refused": {"needs": 23 * GiB, "message": message}}
  full = plan_estimate.room(config_with(), FOUR, refused, GiB)
  assert full.needs == 23 * GiB and full.parts["parameters"] == 200e6
  unknown = plan_step.refusal("RESOURCE_EXHAUSTED: something new")
  assert unknown["needs"] is None


def test_the_page_of_a_step_that_was_refused():
  facts = {"versions": {"jax": "1"}, "compile_seconds": 75.0}
  refused = {"needs": 23 * GiB, "message": "Ran out of memory"}
  answer = {k: ANSWER[k] for k in ("components", "mesh", "flops", "needed_flops")}
  shown = plan.judge(config_with(), FOUR, "m", {**answer, **facts, "refused": refused})
  text = "\n".join(plan_page.lines(shown))
  assert "23.00 GiB of 15.75 GiB: DOES NOT FIT" in text and "Ran out of memory" in text
  # 22.25 GiB of 23 are temporaries; blocks leave 17 % of them.
  assert "    --config.model.remat=blocks  saves 18." in text
  assert "what would make it fit" in text and "mesh.fsdp" not in text
  assert "at least 0.01015 s: at most 6304 images/s" in text  # 8e12 / (4 x 197e12)
  row = plan_page.table([shown]).splitlines()[-1].split(" | ")
  assert row[12:15] == ["23.00", "15.75", "no"]


# A search: temporaries grow with the images at once, and `blocks` keeps a tenth.
def measure(config):
  chips, train = 4, config.train
  assert config.mesh.data == -1  # filled with what is left beside fsdp
  at_once = (train.microbatch or train.images_per_update) // chips
  keeps = {"none": 1.0, "dots": 0.5, "blocks": 0.1, "full": 1.0}[config.model.remat]
  fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else chips
  passes = plan_estimate.passes(
    {"model.remat": config.model.remat, "train.microbatch": train.microbatch}
  )
  return {
    "components": {"parameters": 16 * GiB / fsdp},
    "memory": {"temporaries": 3 * GiB * at_once * keeps},
    "mesh": {"data": chips // fsdp, "fsdp": fsdp},
    "flops": 1e12 * passes * train.images_per_update,
    "needed_flops": 4e12 * train.images_per_update,
    "hbm_bytes": 0.0,
    "collectives": [],
    "versions": {},
  }


def test_a_search_finds_the_fastest_that_fits():
  config = config_with()
  found = plan.search(config, FOUR, "a model", measure)
  # Of 15.75 GiB, everything at once (16 images) fits only with `blocks` and split
  # parameters: 4 + 4.8; `dots` would need 4 + 24. Accumulation is a pass more.
  assert found["set"] == {
    "model.remat": "blocks",
    "train.microbatch": 0,
    "mesh.fsdp": 4,
    "mesh.data": -1,
  }
  assert found["estimate"]["fits"]
  assert [each["set"] for each in found["tried"]].count(found["set"]) == 1
  # The config itself comes first; what by its measurement is far too large is left out.
  assert [each["fits"] for each in found["tried"]] == [False, True]


def test_a_search_keeps_a_config_that_is_the_fastest():
  config = config_with(images_per_update=4)
  config.mesh.fsdp, config.mesh.data = -1, 1
  found = plan.search(config, FOUR, "a model", measure)  # one image a chip: 4 + 3 GiB
  assert found["set"]["model.remat"] == "none" and len(found["tried"]) == 1


@pytest.mark.parametrize(
  "text, message",
  [
    ("v5f:2x4", r"did you mean 'v5p:2x2x2'\?"),
    ("v5e:3x3", "the first two even"),
    ("v5e:2x2x2", "expected 2 sizes of the torus"),
    ("v5p-7", "N counts the 2 cores of a chip"),
    ("v6e-9", "The nearest is v6e-8"),
    ("cpu", r"did you mean 'cpu:8'\?"),
    ("", "plan.topology is empty"),
  ],
)
def test_topologies_that_do_not_exist(text, message):
  with pytest.raises(UserError, match=message):
    plan_chips.parse_list(text)


def test_names_of_topologies():
  found = plan_chips.parse_list("v5e-8,v5p-8, v6e:8x8,v5e:2x4,v5e-1")
  assert [each.name for each in found] == ["v5e:2x4", "v5p:2x2x1", "v6e:8x8", "v5e:1x1"]
  assert [each.chips for each in found] == [8, 4, 64, 1]
  # The compiler's default of 2 x 2 chips a host does not divide a single one.
  assert [each.host_bounds for each in found[-2:]] == [(2, 2, 1), (1, 1, 1)]


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed here")
def test_without_a_compiler_for_tpus(tiny_world, tmp_path):
  outcome = tiny_world.run(tmp_path, "plan.topology=v5e-8", job="plan")
  assert outcome.code == 2 and "pip install 'lpo_jax[tpu]'" in outcome.text


def test_a_plan_needs_no_workdir(front_door):
  """It may come before there is a run; every other job is one."""
  flags = ["--config", "lpo_sd15.py", "--config.plan.topology=v5e-8"]
  assert str(main.parse([*flags, "--job", "plan"])[1]) == "runs/plan"
  outcome = front_door(*flags)
  assert outcome.code == 2 and "required: --workdir" in outcome.text


def test_an_unknown_effort_or_model(tiny_world, tmp_path):
  def refused(*overrides):
    outcome = tiny_world.run(tmp_path, "plan.topology=cpu:2", *overrides, job="plan")
    assert outcome.code == 2
    return outcome.text

  assert "did you mean 'quick'?" in refused("plan.effort=quik")
  text = refused("model.path=nobody/no-such-model")
  assert "stabilityai/stable-diffusion-xl-base-1.0" in text
  assert "model.path is not set" in refused("model.path=")


@pytest.mark.parametrize("name", plan_models.IDS)
def test_models_that_come_with_the_package(name, tmp_path):
  folder, words = plan_models.config_folder(name, tmp_path / "model")
  assert "not fetched" in words
  unet = pretrained.read_config(folder, "unet")
  assert models.build(pretrained.read_config(folder, "vae")).config
  width = pretrained.read_config(folder, "text_encoder")["hidden_size"]
  if "text_encoder_2" in plan_models.IDS[name].networks:
    width += pretrained.read_config(folder, "text_encoder_2")["hidden_size"]
  assert unet["cross_attention_dim"] == width
  is_v = "stable-diffusion-2-1" in name
  kind = pretrained.scheduler_config(folder)["prediction_type"]
  assert kind == ("v_prediction" if is_v else "epsilon")


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, resolution, teraflops",
  [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 3.23),
    ("stabilityai/stable-diffusion-xl-base-1.0", 1024, 27.0),
  ],
)
def test_flops_of_the_real_models(name, resolution, teraflops, front_door, tmp_path):
  """As docs/performance.md: four forward passes, counted on PyTorch too."""
  outcome = front_door(
    "--config=lpo_sd15.py",
    f"--workdir={tmp_path}",
    "--job=plan",
    f"--config.model.path={name}",
    f"--config.data.resolution={resolution}",
    "--config.train.images_per_update=8",
    "--config.train.microbatch=0",
    "--config.plan.topology=cpu:2",
    "--config.plan.effort=none",
  )
  assert outcome.code == 0, outcome.text
  (answer,) = json.loads((tmp_path / "plan.json").read_text("utf-8")).values()
  assert answer["needed_flops"] / 8 / 1e12 == pytest.approx(teraflops, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(
  not HAS_LIBTPU, reason="libtpu is not installed: pip install '.[tpu]'"
)
def test_a_tpu(tiny_world, tmp_path):
  outcome = tiny_world.run(
    tmp_path,
    "plan.topology=v5e-8,v5p-8",
    "mesh.fsdp=4",
    "data.resolution=128",  # 32 x 32 latents: attention over 1024
    "model.dtype=bfloat16",
    job="plan",
  )
  assert outcome.code == 0, outcome.text
  answers = json.loads((tmp_path / "plan.json").read_text("utf-8"))
  assert len(answers) == 2
  for answer in answers.values():
    assert answer["memory"]["temporaries"] > 0 and answer["hbm_bytes"] > 0
  assert outcome.text.count(": fits") == 2


@pytest.mark.slow
@pytest.mark.skipif(
  not HAS_LIBTPU, reason="libtpu is not installed: pip install '.[tpu]'"
)
def test_attention_and_loops_are_the_targets(tiny_world):
  """On a machine without TPUs: the kernel for TPUs, and no unrolled loop."""
  code = f"""
from lpo_jax import main
from lpo_jax.jobs import plan_chips, plan_step
config = main.load_config({str(tiny_world.config)!r})
config.data.resolution, config.model.dtype = 128, "bfloat16"
made = plan_step.Step(config, plan_step.make_mesh(config, plan_chips.parse("v5e:2x4")))
print(made.blueprint.method.unroll, "pallas_call" in str(made.trace().jaxpr))
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=plan.environment(plan_chips.parse("v5e:2x4")),
    capture_output=True,
    text=True,
  )
  assert done.stdout.split()[-2:] == ["False", "True"], done.stderr[-2000:]
