"""The doctor: every finding by a machine or a config that has it."""

import json
import pathlib

import pytest

from lpo_jax import main
from lpo_jax.configs import common
from lpo_jax.jobs import doctor
from lpo_jax.jobs.doctor import ERROR, OK, WARNING


def config_with(**changes):
  config = common.get_config()
  for name, value in changes.items():
    main.override(config, name.replace("__", "."), str(value))
  return config


def by_name(findings):
  return {finding.name: finding for finding in findings}


def test_a_sound_machine(tiny_world, tmp_path):
  outcome = tiny_world.run(tmp_path, job="doctor")
  assert outcome.code == 0, outcome.text
  assert "no error" in outcome.text
  written = json.loads((tmp_path / "doctor.json").read_text("utf-8"))
  assert written["errors"] == 0
  found = {row["name"]: row for row in written["findings"]}
  import jax

  assert found["jax"]["value"] == jax.__version__
  assert found["devices"]["value"] == "1 x cpu (cpu)"
  assert found["processes"]["value"] == "1, this is number 0"
  assert found["data.path"]["value"] == f"{tiny_world.parquet}: there"
  assert found["model.path"]["value"] == f"{tiny_world.pipeline}: a pipeline"
  assert found["workdir"]["value"].endswith("can be written to")
  for row in written["findings"]:
    assert row["level"] in (OK, WARNING) and bool(row["fix"]) == (row["level"] != OK)
    assert row["name"] in outcome.text and row["value"] in outcome.text


def test_errors_are_listed_and_the_first_is_said_again(tiny_world, tmp_path):
  outcome = tiny_world.run(
    tmp_path, "data.path=/no/such", "eval.prompts=/no/prompts.txt", job="doctor"
  )
  assert outcome.code == 2
  assert "2 error(s)" in outcome.text
  assert "First: data.path: /no/such: not there. Fix: correct --config.data.path" in (
    outcome.text
  )
  assert json.loads((tmp_path / "doctor.json").read_text("utf-8"))["errors"] == 2


def test_versions_against_what_setup_asks_for(monkeypatch):
  real = doctor.version
  changed = {"jax": "0.5.0", "grain": None, "libtpu": "0.0.43", "tensorflow": "2.19"}
  monkeypatch.setattr(doctor, "version", lambda name: changed.get(name, real(name)))
  found = by_name(doctor.check_versions(None, None))
  assert found["jax"].level == ERROR and "jax>=0.10.1" in found["jax"].fix.replace(
    "jax<0.13,>=0.10.1", "jax>=0.10.1"
  )
  assert found["grain"].level == ERROR and found["grain"].value == "missing"
  assert found["accelerator plugins"].value == "libtpu 0.0.43"
  assert found["tensorflow"].level == WARNING
  assert found["flax"].level == OK


def test_devices_that_do_not_start(monkeypatch, tmp_path):
  import jax

  def refuse():
    raise RuntimeError("The TPU is already in use by process 7\nmore")

  monkeypatch.setattr(jax, "devices", refuse)
  (finding,) = doctor.check_devices(common.get_config(), tmp_path)
  assert finding.level == ERROR
  assert finding.value == "The TPU is already in use by process 7"


def test_a_mesh_that_does_not_fit(tmp_path):
  found = by_name(doctor.check_devices(config_with(mesh__data=3), tmp_path))
  assert found["mesh"].level == ERROR and "does not cover" in found["mesh"].value


def test_memory_and_disk(tmp_path, monkeypatch):
  file = tmp_path / "meminfo"
  file.write_text("MemTotal:  8388608 kB\nMemAvailable:  1048576 kB\n")
  assert doctor.host_memory(file) == (8 * 2**30, 2**30)
  assert doctor.host_memory(tmp_path / "none") is None
  monkeypatch.setattr(doctor, "host_memory", lambda: (8 * 2**30, 2**30))
  usage = type("Usage", (), {"free": 3 * 2**30})
  monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
  config = config_with(data__cache=tmp_path / "not" / "yet")
  found = by_name(doctor.check_host(config, tmp_path))
  assert found["memory of the host"].value == "1.0 GiB free of 8.0 GiB"
  assert {finding.level for finding in found.values()} == {WARNING}
  assert set(found) == {
    "memory of the host",
    "disk at the workdir",
    "disk at data.cache",
  }


def test_what_checkpoints_need(tmp_path):
  (tmp_path / "unet").mkdir()
  (tmp_path / "unet" / "a.safetensors").write_bytes(b"x" * 1000)
  config = config_with(model__path=tmp_path, train__keep_last=2)
  # Parameters and two moments, for two that are kept and one being written.
  assert doctor.checkpoint_bytes(config) == 1000 * 3 * 3
  config.train.ema = 0.9
  assert doctor.checkpoint_bytes(config) == 1000 * 4 * 3


def test_compilations(monkeypatch, tmp_path):
  import jax

  monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
  (finding,) = doctor.check_compilations(None, None)
  assert finding.level == WARNING and finding.value == "off"
  (tmp_path / "step").write_bytes(b"x")
  monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(tmp_path))
  (finding,) = doctor.check_compilations(None, None)
  assert finding.level == OK and finding.value == f"{tmp_path}: 1 files, 0.0 GiB"


def test_credentials_are_seen_and_not_shown(monkeypatch, tmp_path):
  monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
  monkeypatch.setattr(doctor, "google_credentials", lambda *_: None)
  found = by_name(doctor.check_credentials(common.get_config(), tmp_path))
  assert found["Hugging Face token"].value == "present"
  assert "verysecret" not in doctor.table(list(found.values()))
  assert found["Google credentials"].level == OK  # nothing needs them
  found = by_name(
    doctor.check_credentials(config_with(data__path="gs://bucket/x"), tmp_path)
  )
  assert found["Google credentials"].level == WARNING
  assert "storage.objectUser" in found["Google credentials"].fix


def test_where_google_credentials_come_from(tmp_path):
  def find(environment):
    return doctor.google_credentials(environment, tmp_path, str(tmp_path))

  assert find({}) is None
  assert find({"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "none")}) is None
  product = tmp_path / "sys" / "class" / "dmi" / "id" / "product_name"
  product.parent.mkdir(parents=True)
  product.write_text("Google Compute Engine\n")
  assert "service account" in find({})
  (tmp_path / doctor.ADC_FILE).parent.mkdir(parents=True)
  (tmp_path / doctor.ADC_FILE).write_text("{}")
  assert find({}) == "application-default login"


def test_paths_of_a_config():
  config = config_with(data__path="a", eval__prompts="p.txt", model__path="m")
  with config.unlocked():
    config.data.mixture = {"other": {"path": "b", "share": 0.5}}
  assert doctor.paths(config) == {
    "data.path": "a",
    "data.images": "",
    "data.mixture.other.path": "b",
    "model.path": "m",
    "eval.prompts": "p.txt",
  }


@pytest.mark.parametrize(
  ("path", "level", "words"),
  [
    ("{}/file", OK, "there"),
    ("{}/f*", OK, "there"),
    ("{}/none", ERROR, "not there"),
    ("{}/n*", ERROR, "not there"),
    ("memory://doctor/file", OK, "there"),
    ("memory://doctor/none", ERROR, "not there"),
    ("nonsense://x", ERROR, "nonsense"),
  ],
)
def test_a_path_here_or_elsewhere(tmp_path, path, level, words):
  import fsspec

  (tmp_path / "file").touch()
  with fsspec.open("memory://doctor/file", "w") as file:
    file.write("x")
  finding = doctor.path_finding("data.path", path.format(tmp_path))
  assert finding.level == level and words in finding.value, finding
  assert bool(finding.fix) == (level == ERROR)


def test_a_bucket_without_its_client(tmp_path, monkeypatch):
  import fsspec

  def missing(path):
    raise ImportError("Please install gcsfs")

  monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
  finding = doctor.path_finding("data.path", "gs://bucket/x")
  assert finding.level == ERROR and finding.fix == "pip install gcsfs"

  def denied(path):
    raise PermissionError("403 storage.objects.get")

  monkeypatch.setattr(fsspec.core, "url_to_fs", denied)
  finding = doctor.path_finding("data.path", "gs://bucket/x")
  assert "PermissionError: 403" in finding.value
  assert "gcloud auth application-default login" in finding.fix


def test_models(tiny_world, monkeypatch):
  assert doctor.model_finding(str(tiny_world.pipeline)).level == OK
  assert doctor.model_finding("/no/model").level == ERROR
  monkeypatch.setenv("HF_HUB_OFFLINE", "0")
  assert "fetched when it is needed" in doctor.model_finding("owner/name").value
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  finding = doctor.model_finding("owner/name")
  assert finding.level == ERROR and "unset HF_HUB_OFFLINE" in finding.fix


def test_a_workdir_that_is_a_url(tiny_world):
  outcome = tiny_world.run("gs://bucket/run", job="doctor")
  assert outcome.code == 2 and "is no folder but a URL" in outcome.text
  assert not pathlib.Path("gs:").exists()
