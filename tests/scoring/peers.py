"""The original stacks in torch, at any size, from a PNG file to a score."""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


class Block(nn.Module):
  """open_clip's ResidualAttentionBlock: torch's own attention, with its fused in_proj."""

  def __init__(self, width, heads):
    super().__init__()
    self.ln_1 = nn.LayerNorm(width)
    self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
    self.ln_2 = nn.LayerNorm(width)
    self.mlp = nn.Sequential()
    self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
    self.mlp.add_module("gelu", nn.GELU())
    self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

  def forward(self, x, mask):
    y = self.ln_1(x)
    x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
    return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
  def __init__(self, width, heads, layers):
    super().__init__()
    self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

  def forward(self, x, mask=None):
    for block in self.resblocks:
      x = block(x, mask)
    return x


class Visual(nn.Module):
  def __init__(self, embed, *, width, layers, head_width, patch_size, image_size):
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
    self.class_embedding = nn.Parameter(torch.zeros(width))
    places = (image_size // patch_size) ** 2 + 1
    self.positional_embedding = nn.Parameter(torch.zeros(places, width))
    self.ln_pre = nn.LayerNorm(width)
    self.transformer = Blocks(width, width // head_width, layers)
    self.ln_post = nn.LayerNorm(width)
    self.proj = nn.Parameter(torch.zeros(width, embed))

  def forward(self, x):
    x = self.conv1(x).flatten(2).transpose(1, 2)
    first = self.class_embedding.expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + self.positional_embedding
    return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
  """open_clip's CLIP, under the names of its files."""

  def __init__(self, fields):
    super().__init__()
    embed, text = fields["embed_dim"], fields["text_cfg"]
    width, places = text["width"], text["context_length"]
    self.visual = Visual(embed, **fields["vision_cfg"])
    self.transformer = Blocks(width, text["heads"], text["layers"])
    self.token_embedding = nn.Embedding(text["vocab_size"], width)
    self.positional_embedding = nn.Parameter(torch.zeros(places, width))
    self.ln_final = nn.LayerNorm(width)
    self.text_projection = nn.Parameter(torch.zeros(width, embed))
    self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))

  def encode_image(self, x):
    return nn.functional.normalize(self.visual(x), dim=-1)

  def encode_text(self, ids):
    mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
    x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
    x = self.ln_final(self.transformer(x, mask))
    x = x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection
    return nn.functional.normalize(x, dim=-1)


def letterbox(path, size):
  """HPS v2's preprocessing of a file."""
  pixels = np.array(Image.open(path).convert("RGB"), np.float32) / 255
  x = torch.tensor(pixels).permute(2, 0, 1)
  scale = size / max(x.shape[1:])
  new = [round(n * scale) for n in x.shape[1:]]
  x = nn.functional.interpolate(
    x[None], size=new, mode="bicubic", antialias=True, align_corners=False
  )[0]
  h, w = size - new[0], size - new[1]
  x = nn.functional.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
  return (x - MEAN) / STD


def crop_late(path, size):
  """torchvision's Resize, CenterCrop, RGB, ToTensor and Normalize of a file."""
  picture = Image.open(path)
  w, h = picture.size
  other = int(size * max(w, h) / min(w, h))
  picture = picture.resize((size, other) if w <= h else (other, size), Image.BICUBIC)
  w, h = picture.size
  top, left = round((h - size) / 2.0), round((w - size) / 2.0)
  picture = picture.crop((left, top, left + size, top + size)).convert("RGB")
  x = torch.tensor(np.array(picture)).permute(2, 0, 1) / 255
  return (x - MEAN) / STD


def head(width, widths=(1024, 128, 64, 16)):
  """The head that LAION's aesthetic v2 and ImageReward share: no activations."""
  a, b, c, d = widths
  layers = nn.Sequential(
    *(nn.Linear(width, a), nn.Dropout(0.2), nn.Linear(a, b), nn.Dropout(0.2)),
    *(nn.Linear(b, c), nn.Dropout(0.1), nn.Linear(c, d), nn.Linear(d, 1)),
  )
  return nn.ModuleDict({"layers": layers})


def published_names(vision, text, mlp):
  """The state of transformers' BLIP under the names of ImageReward.pt."""
  renamed = (
    *(("embeddings.class_embedding", "cls_token"), ("encoder.layers.", "blocks.")),
    *(("embeddings.position_embedding", "pos_embed"), ("post_layernorm.", "norm.")),
    *(("embeddings.patch_embedding.", "patch_embed.proj."), ("layer_norm", "norm")),
    *(("self_attn.qkv.", "attn.qkv."), ("self_attn.projection.", "attn.proj.")),
  )
  state = {
    "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    "blip.vision_proj.weight": torch.zeros(3, 4),
    "blip.text_proj.bias": torch.zeros(3),
  }
  for name, value in vision.state_dict().items():
    for theirs, published in renamed:
      name = name.replace(theirs, published)
    state[f"blip.visual_encoder.{name}"] = value
  state |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
  state |= {f"mlp.{k}": v for k, v in mlp.state_dict().items()}
  return state
