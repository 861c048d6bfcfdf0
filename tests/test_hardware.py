"""Signs of accelerators, and the refusal to compute on the CPU beside one."""

import pytest

from lpo_jax import hardware
from lpo_jax.errors import UserError
from lpo_jax.hardware import Accelerator, find_accelerator


def machine(root, *files, pci=()):
  """A root folder with device files and PCI devices (vendor, device)."""
  for file in files:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).touch()
  for number, (vendor, device) in enumerate(pci):
    folder = root / "sys" / "bus" / "pci" / "devices" / f"0000:00:{number:02d}.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor + "\n")
    (folder / "device").write_text(device + "\n")
  return root


TPU, NETWORK = ("0x1ae0", "0x006f"), ("0x1ae0", "0x0042")


@pytest.mark.parametrize(
  ("files", "pci", "environment", "found"),
  [
    ((), (), {}, None),
    (("dev/accel0", "dev/accel1"), (), {}, Accelerator("TPU", "/dev/accel0")),
    # Other makers' chips are files in a folder of that name.
    (("dev/accel/accel0",), (), {}, None),
    (("dev/vfio/vfio", "dev/vfio/0"), (TPU,), {}, Accelerator("TPU", "/dev/vfio/0")),
    # Passed through to a guest, or Google's network card.
    (("dev/vfio/0",), (("0x10de", "0x2331"), NETWORK), {}, None),
    (("dev/vfio/vfio",), (TPU,), {}, None),
    (
      (),
      (),
      {"TPU_WORKER_HOSTNAMES": "a,b"},
      Accelerator("TPU", "the variable TPU_WORKER_HOSTNAMES"),
    ),
    (("dev/nvidia0",), (), {}, Accelerator("NVIDIA GPU", "/dev/nvidia0")),
    (("dev/nvidiactl",), (), {}, None),
    (("dev/nvidia0",), (), {"CUDA_VISIBLE_DEVICES": ""}, None),
    (("dev/nvidia0",), (), {"CUDA_VISIBLE_DEVICES": "-1"}, None),
    (
      ("dev/nvidia0",),
      (),
      {"CUDA_VISIBLE_DEVICES": "1"},
      Accelerator("NVIDIA GPU", "/dev/nvidia0"),
    ),
    (("dev/nvidia0",), (), {"NVIDIA_VISIBLE_DEVICES": "void"}, None),
    (("dev/nvidia0", "dev/accel0"), (), {}, Accelerator("TPU", "/dev/accel0")),
  ],
)
def test_signs(tmp_path, files, pci, environment, found):
  assert find_accelerator(environment, machine(tmp_path, *files, pci=pci)) == found


GPU = Accelerator("NVIDIA GPU", "/dev/nvidia0")


def refuse(job="train", backend="cpu", platforms=None, accelerator=GPU):
  hardware.refuse_silent_cpu(
    job, backend=backend, platforms=platforms, accelerator=accelerator
  )


def test_a_silent_fallback_is_refused_with_the_fix():
  for platforms in (None, "", "cuda,cpu"):
    with pytest.raises(UserError) as refusal:
      refuse(platforms=platforms)
    for word in ("NVIDIA GPU (/dev/nvidia0)", "lpo_jax[cuda]", "JAX_PLATFORMS=cpu"):
      assert word in str(refusal.value)
  with pytest.raises(UserError, match=r"lpo_jax\[tpu\]"):
    refuse(accelerator=Accelerator("TPU", "/dev/accel0"))


def test_what_is_meant_or_harmless_is_not_refused():
  refuse(platforms="cpu")
  refuse(backend="gpu")
  refuse(accelerator=None)
  for job in hardware.JOBS_FOR_ANY_MACHINE:
    refuse(job=job)


def test_the_front_door_refuses(tiny_world, tmp_path, monkeypatch):
  import jax

  monkeypatch.setattr(hardware, "find_accelerator", lambda environment: GPU)
  assert tiny_world.run(tmp_path, job="doctor").code == 0  # JAX_PLATFORMS=cpu here
  monkeypatch.setattr(type(jax.config), "jax_platforms", None)
  for job in ("train", "cache", "evaluate", "export"):
    outcome = tiny_world.run(tmp_path, job=job)
    assert outcome.code == 2 and "but jax computes on the CPU" in outcome.text
  outcome = tiny_world.run(tmp_path, job="doctor")
  assert outcome.code == 2 and "there is a NVIDIA GPU (/dev/nvidia0)" in outcome.text
