"""The scorers at full size against their original stacks, from PNG files to scores.

  python benchmarks/scorer_parity.py --workdir runs/scorer_parity [--only hps_v2.1]

Random weights of the published architectures are written as the published files are, and
both sides read them, and the same photos, on a CPU. torch and jax run in processes of
their own, one after the other: the largest needs 9 GB of memory and 8 GB of disk. Prints
one row a scorer, and appends it to WORKDIR/scorer_parity.jsonl.
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = ("hps_v2.1", "pickscore", "clip_score", "aesthetic_v2", "image_reward")
PROMPTS = ("a temple in the rain", "a red flower", "people at night, oil on canvas")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def module(name: str, path: pathlib.Path):
  """Loads a module that lies in no package."""
  spec = importlib.util.spec_from_file_location(name, path)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def write_photos(folder: pathlib.Path) -> list[pathlib.Path]:
  """Saves three photos of odd sizes: wide, tall and smaller than the towers' input."""
  from PIL import Image
  from sklearn.datasets import load_sample_image

  china, flower = (load_sample_image(f"{name}.jpg") for name in ("china", "flower"))
  crops = (china[:391, :], flower[:, 200:455], china[100:281, 100:333])
  paths = [folder / f"{i}.png" for i in range(len(crops))]
  for path, pixels in zip(paths, crops):
    Image.fromarray(pixels).save(path)
  return paths


def fill(torch, network):
  """Random weights under which every part of a network moves its output."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in network.named_parameters():
      p.normal_(generator=generator)
      if p.ndim < 2:
        norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
        p.mul_(0.2).add_(1.0 if norm else 0.0)
      elif "embedding" in name:
        p.mul_(0.5)
      else:
        p.div_(p[0].numel() ** 0.5)
  return network.eval()


def clip_of_transformers(torch, name):
  """The torch network of PickScore (ViT-H/14) or of OpenAI's ViT-L/14."""
  import transformers

  from lpo_jax.pretrained import checkpoints

  size = "ViT-H-14" if name == "pickscore" else "ViT-L-14-quickgelu"
  fields = checkpoints.clip_config(checkpoints.OPEN_CLIP[size])
  config = transformers.CLIPConfig(
    text_config=fields["text_config"],
    vision_config=fields["vision_config"],
    projection_dim=fields["projection_dim"],
  )
  with torch.device("meta"):
    network = transformers.CLIPModel(config)
  network = fill(torch, network.to_empty(device="cpu"))
  for tower in (network.text_model, network.vision_model):  # buffers were empty too
    ids = tower.embeddings.position_ids
    ids.copy_(torch.arange(ids.shape[-1])[None])
  with torch.no_grad():
    network.logit_scale.fill_(4.6052)
  return network


def theirs(name: str, folder: pathlib.Path, head: str) -> list[float]:
  """Writes the files of a scorer, and scores the photos with torch."""
  import torch
  from PIL import Image

  from lpo_jax.jobs import quickstart_base
  from lpo_jax.scoring import tokens

  torch.set_num_threads(2)
  peers = module("peers", ROOT / "tests" / "scoring" / "peers.py")
  photos = sorted(folder.parent.glob("*.png"))
  if name == "image_reward":
    return image_reward(torch, peers, folder, photos)
  quickstart_base.write_tokenizer(folder, max_length=77)
  # Its ids are below the real vocabulary's; the end token is moved to the real one.
  vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
  vocabulary["<|endoftext|>"], vocabulary["<|startoftext|>"] = 49407, 49406
  (folder / "vocab.json").write_text(
    json.dumps(vocabulary, ensure_ascii=False), "utf-8"
  )
  ids = torch.tensor(tokens.ClipTokens(folder, 77, tokens.as_it_is)(PROMPTS)).long()
  with torch.no_grad():
    if name == "hps_v2.1":
      network = hps(torch, peers)
      torch.save(
        {"state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt"
      )
      images = network.encode_image(
        torch.stack([peers.letterbox(p, 224) for p in photos])
      )
      texts = network.encode_text(ids)
      return (100 * (images * texts).sum(-1)).tolist()
    network = clip_of_transformers(torch, name)
    network.save_pretrained(folder)
    if name == "aesthetic_v2":
      return aesthetic(torch, peers, network, folder, photos, head)
    from transformers.models.clip import image_processing_pil_clip

    processor = image_processing_pil_clip.CLIPImageProcessorPil()
    pixels = [processor(Image.open(p))["pixel_values"][0] for p in photos]
    output = network(pixel_values=torch.tensor(np.stack(pixels)), input_ids=ids)
    logits = output.logits_per_image.diagonal()
    return (logits if name == "pickscore" else logits / np.exp(4.6052) * 100).tolist()


def hps(torch, peers):
  """HPS v2's ViT-H/14 in torch."""
  from lpo_jax.pretrained import checkpoints

  size = checkpoints.OPEN_CLIP["ViT-H-14"]
  fields = {
    "embed_dim": size["embed_dim"],
    "vision_cfg": {**size["vision_cfg"], "image_size": 224},
    "text_cfg": {**size["text_cfg"], "context_length": 77, "vocab_size": 49408},
  }
  with torch.device("meta"):
    network = peers.OpenClip(fields)
  return fill(torch, network.to_empty(device="cpu"))


def aesthetic(torch, peers, network, folder, photos, head):
  """Scores with a head, the published one where its file is given."""
  layers = fill(torch, peers.head(768))
  if head:
    layers.load_state_dict(torch.load(head, map_location="cpu", weights_only=True))
  torch.save(layers.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
  x = torch.stack([peers.crop_late(path, 224) for path in photos])
  embeds = network.visual_projection(network.vision_model(x).pooler_output)
  return layers["layers"](torch.nn.functional.normalize(embeds, dim=-1))[:, 0].tolist()


def image_reward(torch, peers, folder, photos):
  """Scores with transformers' BLIP under the published names."""
  import transformers
  from transformers.models.blip.modeling_blip import BlipVisionModel
  from transformers.models.blip.modeling_blip_text import BlipTextModel

  from lpo_jax.models import blip
  from lpo_jax.scoring import tokens

  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
  words += [f"##{letter}" for letter in LETTERS]
  words += [f"[unused{i}]" for i in range(30522 - len(words))]
  (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
  vision = fill(
    torch, BlipVisionModel(transformers.BlipVisionConfig(**blip.VISION_DEFAULTS))
  )
  fields = {**blip.TEXT_DEFAULTS, "encoder_hidden_size": 1024, "is_decoder": True}
  text = BlipTextModel(transformers.BlipTextConfig(**fields), add_pooling_layer=False)
  text, mlp = fill(torch, text), fill(torch, peers.head(768))
  torch.save(peers.published_names(vision, text, mlp), folder / "ImageReward.pt")
  ids, seen = tokens.BertTokens(folder, 30524)(PROMPTS)
  with torch.no_grad():
    x = torch.stack([peers.crop_late(path, 224) for path in photos])
    last = text(
      input_ids=torch.tensor(ids).long(),
      attention_mask=torch.tensor(seen).long(),
      encoder_hidden_states=vision(x).last_hidden_state,
    ).last_hidden_state
    return ((mlp["layers"](last[:, 0])[:, 0] - blip.MEAN) / blip.STD).tolist()


def ours(name: str, folder: pathlib.Path, dtype: str) -> list[float]:
  """Scores the photos here."""
  from PIL import Image

  from lpo_jax.scoring import scorers

  options = {"tower": str(folder)} if name == "aesthetic_v2" else {}
  judge = scorers.get(name, path=str(folder), dtype=dtype, batch_size=3, **options)
  photos = sorted(folder.parent.glob("*.png"))
  return judge([Image.open(path) for path in photos], PROMPTS).tolist()


def measure(name: str, workdir: pathlib.Path, head: str, dtypes: list[str]) -> dict:
  """Runs both sides of a scorer, each in its own process."""
  folder = workdir / name
  folder.mkdir(parents=True, exist_ok=True)

  def side(*what: str) -> list[float]:
    command = [sys.executable, __file__, "--workdir", str(workdir), "--head", head]
    done = subprocess.run(
      [*command, "--side", *what, "--only", name],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])

  began = time.monotonic()
  torch_scores = np.array(side("theirs"))
  row = {"scorer": name, "theirs": torch_scores.tolist()}
  for dtype in dtypes:
    scores = np.array(side(dtype))
    row[dtype] = float(np.max(np.abs(scores / torch_scores - 1)))
    row[f"{dtype} scores"] = scores.tolist()
  row["seconds"] = round(time.monotonic() - began)
  shutil.rmtree(folder)
  return row


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--only", nargs="*", default=list(NAMES), choices=NAMES)
  parser.add_argument("--head", default="", help="the published head of aesthetic_v2")
  parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
  parser.add_argument("--side", help="for the processes that this one starts")
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  if args.side:
    folder = args.workdir / args.only[0]
    if args.side == "theirs":
      print(json.dumps(theirs(args.only[0], folder, args.head)))
    else:
      print(json.dumps(ours(args.only[0], folder, args.side)))
    return
  write_photos(args.workdir)
  columns = " | ".join(args.dtypes)
  print(
    f"| scorer | {columns} | scores in torch |\n|---|{'---|' * len(args.dtypes)}---|"
  )
  for name in args.only:
    row = measure(name, args.workdir, args.head, args.dtypes)
    values = ", ".join(f"{score:.4f}" for score in row["theirs"])
    errors = " | ".join(f"{row[dtype]:.1e}" for dtype in args.dtypes)
    print(f"| {name} | {errors} | {values} |", flush=True)
    with open(args.workdir / "scorer_parity.jsonl", "a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
  main()
