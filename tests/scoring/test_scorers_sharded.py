"""Scores do not depend on how many devices there are."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from . import peers  # noqa: E402 (needs torch)

PROGRAM = """
import json, pathlib, sys
import jax
from PIL import Image
from lpo_jax import parallel
from lpo_jax.scoring import scorers

folder, tokenizer = sys.argv[1:3]
prompts = json.loads(sys.argv[3])
images = [Image.open(path) for path in sys.argv[4:]]
found = {}
for data, fsdp, dtype in ((1, 1, "float32"), (2, 4, "float32"), (2, 4, "bfloat16")):
  mesh = parallel.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
  judge = scorers.get(
    "hps_v2", path=folder, tokenizer=tokenizer, mesh=mesh, batch_size=4, dtype=dtype
  )
  found[f"{dtype} on {mesh.size}"] = judge(images, prompts).tolist()
  widest = judge.network.params["vision_model"]["encoder"]["layers"]["each"]["mlp"]
  kernel = widest["fc1"]["kernel"]
  assert len(kernel.sharding.device_set) == mesh.size
  assert kernel.addressable_shards[0].data.size * fsdp == kernel.size
  assert kernel.dtype == dtype
print(json.dumps(found))
"""


def test_one_device_and_eight_give_the_same(
  on_devices, tmp_path, photos, prompts, clip_tokenizer, randomise
):
  tokenizer, vocabulary = clip_tokenizer
  fields = {
    "embed_dim": 16,
    "vision_cfg": {
      **{"width": 32, "layers": 1, "head_width": 16, "patch_size": 14},
      "image_size": 28,
    },
    "text_cfg": {
      **{"width": 16, "layers": 1, "heads": 2, "context_length": 20},
      "vocab_size": vocabulary,
    },
  }
  model = randomise(peers.OpenClip(fields), 7)
  torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS_v2_compressed.pt")
  (tmp_path / "open_clip_config.json").write_text(json.dumps(fields))
  arguments = (tmp_path, tokenizer, json.dumps(prompts), *photos)
  scores = json.loads(on_devices(8, PROGRAM, *arguments).splitlines()[-1])
  one, eight = np.array(scores["float32 on 1"]), np.array(scores["float32 on 8"])
  # Of cosines x 100 in fp32: sums over split axes end in other last bits.
  assert np.abs(eight - one).max() < 3e-5
  assert one.std() > 1
  # Activations of 8 bits: a small part of the scores' own spread.
  assert np.abs(np.array(scores["bfloat16 on 8"]) - one).max() < 0.05 * one.std()
