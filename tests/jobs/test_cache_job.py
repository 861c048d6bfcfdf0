"""The cache job on a real, tiny pipeline and a real, tiny Pick-a-Pic file."""

import io
import json

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from lpo_jax import generation, models, pretrained
from lpo_jax.data import cache as cache_lib
from lpo_jax.data import pipeline, sources
from lpo_jax.errors import UserError
from lpo_jax.jobs import cache

pa = pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

RESOLUTION = 16
VAE = {
  "_class_name": "AutoencoderKL",
  "block_out_channels": [8, 8],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "mid_block_add_attention": False,
}
TEXT = {
  "architectures": ["CLIPTextModel"],
  "model_type": "clip_text_model",
  "vocab_size": 514,
  "hidden_size": 12,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "max_position_embeddings": 16,
  "bos_token_id": 512,
  "eos_token_id": 513,
}
# (prompt, image_0, image_1, label_0): a chain of three, a tie, and a pair.
JUDGEMENTS = [
  ("a red cat", "u0", "u1", 1.0),
  ("a red cat", "u1", "u2", 1.0),
  ("a red cat", "u2", "u3", 0.5),
  ("two dogs", "u4", "u5", 0.0),
]
IMAGES = {}
for _i in range(6):
  _pixels = np.random.default_rng(_i).integers(
    0, 256, (RESOLUTION + 4 * _i, RESOLUTION, 3)
  )
  IMAGES[f"u{_i}"] = Image.fromarray(_pixels.astype(np.uint8))


def _png(image):
  stream = io.BytesIO()
  image.save(stream, "PNG")
  return stream.getvalue()


def _save(folder, name, config, seed=0):
  model = models.build(config)
  pretrained.save(folder, pretrained.Part(name, config, model.init(seed), model))


def _write_tokenizer(folder):
  from tokenizers import pre_tokenizers

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [*letters, *(f"{letter}</w>" for letter in letters)]
  words += ["<|startoftext|>", "<|endoftext|>"]
  folder.mkdir(parents=True)
  vocab = {word: i for i, word in enumerate(words)}
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}
  settings |= {"bos_token": words[-2], "eos_token": words[-1]}
  settings |= {"pad_token": words[-1], "unk_token": words[-1]}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_source(path, bad=(), judgements=JUDGEMENTS):
  import pyarrow.parquet as pq

  def image(uid):
    return b"junk" if uid in bad else _png(IMAGES[uid])

  rows = {
    "caption": [j[0] for j in judgements],
    "image_0_uid": [j[1] for j in judgements],
    "image_1_uid": [j[2] for j in judgements],
    "jpg_0": [image(j[1]) for j in judgements],
    "jpg_1": [image(j[2]) for j in judgements],
    "label_0": [j[3] for j in judgements],
    "label_1": [1 - j[3] for j in judgements],
    "has_label": [True] * len(judgements),
  }
  columns = {
    name: pa.array(rows.get(name, [None] * len(judgements)), pa.type_for_alias(kind))
    if "[" not in kind
    else pa.array([None] * len(judgements), pa.timestamp("ns"))
    for name, kind in sources.PICKAPIC_COLUMNS.items()
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model")
  _save(folder, "vae", VAE)
  _save(folder, "text_encoder", TEXT)
  _write_tokenizer(folder / "tokenizer")
  return folder


@pytest.fixture
def config(model, tmp_path):
  _write_source(tmp_path / "source" / "train-0.parquet")
  return ml_collections.ConfigDict(
    {
      "model": {"path": str(model), "dtype": "bfloat16"},
      "data": {
        "path": str(tmp_path / "source"),
        "source": "auto",
        "cache": "",
        "strategy": "levels",
        "max_list_size": 8,
        "group_by": "prompt",
        "ties": "keep",
        "resolution": RESOLUTION,
        "max_bad_images": 0.0,
      },
    }
  )


@pytest.fixture
def no_encoding(monkeypatch):
  """Makes any call of an encoder a failure."""

  def refuse(config):
    raise AssertionError("an encoder was loaded")

  def forbid():
    monkeypatch.setattr(cache, "_image_encoder", refuse)
    monkeypatch.setattr(cache, "_prompt_encoder", refuse)

  return forbid


def _stamps(folder):
  return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.array_record")}


def test_from_parquet_to_batches(config, model, tmp_path, capsys):
  cache.run(config, str(tmp_path / "run"))
  said = capsys.readouterr().out
  assert "records: 6 images, 3 prompts; moments 8x8x8 float16" in said
  assert "lists: 2 of 3.00 images on average (strategy levels" in said
  assert "4 of 4 judgements used" in said
  opened = cache.open_for(config, str(tmp_path / "run"))
  assert opened.folder == tmp_path / "run" / "cache"
  lists = opened.lists
  by_prompt = {
    lists.prompts[lists.prompt[b]]: {
      lists.image_uids[lists.image[i]]: int(lists.rank[i])
      for i in range(lists.offsets[b], lists.offsets[b + 1])
    }
    for b in range(len(lists))
  }
  assert by_prompt == {
    "a red cat": {"u0": 0, "u1": 1, "u2": 2, "u3": 2},
    "two dogs": {"u5": 0, "u4": 1},
  }
  # Records are what the networks say about the centre crop, to half precision.
  vae = pretrained.load(model, "vae")
  record = lists.image_uids.index("u0")  # 16 x 16: taken as it is
  pixels = np.asarray(IMAGES["u0"], np.float32) / 127.5 - 1
  expected = vae.encode(vae.params, jnp.asarray(pixels)[None])
  np.testing.assert_allclose(
    opened.moments([record]), np.asarray(expected), rtol=2e-3, atol=2e-4
  )
  prompts = ["two dogs", ""]
  states, pooled = generation.TextConditioner(model).encode(prompts)
  assert pooled is None
  got = opened.prompt_embeds([lists.prompts.index(p) for p in prompts])
  np.testing.assert_allclose(got, states, rtol=2e-3, atol=2e-4)
  assert lists.prompts[opened.null_prompt] == ""
  batches = pipeline.Batches(opened, images_per_update=6, seed=0, prefetch=1)
  batch = next(batches)
  assert batch.moments.shape == (6, 8, 8, 8) and batches.utilisation == 1.0
  batches.close()


def test_second_run_does_nothing(config, tmp_path, no_encoding, monkeypatch, capsys):
  cache.run(config, str(tmp_path))
  before = _stamps(tmp_path / "cache")
  no_encoding()
  monkeypatch.setattr(sources, "read", lambda *a, **k: pytest.fail("source was read"))
  cache.run(config, str(tmp_path))
  assert "cache is up to date" in capsys.readouterr().out
  assert _stamps(tmp_path / "cache") == before
  # The images need not even be there any more.
  (tmp_path / "source").rename(tmp_path / "gone")
  cache.run(config, str(tmp_path))


def test_other_lists_share_the_records(config, tmp_path, no_encoding):
  config.data.cache = str(tmp_path / "shared")
  cache.run(config, str(tmp_path / "lpo"))
  before = _stamps(tmp_path / "shared")
  no_encoding()
  pairs = config.copy_and_resolve_references()
  pairs.data.strategy = "pairs"
  cache.run(pairs, str(tmp_path / "dpo"))
  assert _stamps(tmp_path / "shared") == before
  assert len(cache.open_for(config, "anywhere").lists) == 2
  lists = cache.open_for(pairs, "anywhere").lists
  assert len(lists) == 3 and set(lists.lengths) == {2}


def test_other_model_size_or_source_is_refused_by_name(config, model, tmp_path):
  cache.run(config, str(tmp_path))
  other = tmp_path / "other"
  _save(other, "vae", VAE, seed=1)
  _save(other, "text_encoder", TEXT)
  (other / "tokenizer").symlink_to(model / "tokenizer")
  changed = config.copy_and_resolve_references()
  changed.model.path = str(other)
  for use in (cache.run, cache.open_for):
    with pytest.raises(UserError) as refusal:
      use(changed, str(tmp_path))
    assert "fingerprints.vae" in str(refusal.value)
    assert "fingerprints.text_encoder" not in str(refusal.value)
    assert "point data.cache elsewhere" in str(refusal.value)
  changed = config.copy_and_resolve_references()
  changed.data.resolution = 32
  with pytest.raises(UserError, match=r"preprocessing\.resolution: this run has 32"):
    cache.run(changed, str(tmp_path))
  _write_source(tmp_path / "source" / "train-1.parquet")
  with pytest.raises(UserError, match=r"source\.files"):
    cache.run(config, str(tmp_path))


def test_bad_image_is_dropped_and_recorded(config, tmp_path, capsys):
  _write_source(tmp_path / "source" / "train-0.parquet", bad=("u2", "u4"))
  with pytest.raises(UserError, match=r"2 of 6 images cannot be used.*max_bad_images"):
    cache.run(config, str(tmp_path))
  config.data.max_bad_images = 0.5
  cache.run(config, str(tmp_path))
  folder = tmp_path / "cache"
  lines = (folder / "bad_images.jsonl").read_text().splitlines()
  assert {json.loads(line)["uid"] for line in lines} == {"u2", "u4"}
  lists = cache.open_for(config, str(tmp_path)).lists
  # "two dogs" lost one of two; the chain lost its third and closes up.
  assert [lists.image_uids[i] for i in lists.image] == ["u0", "u1", "u3"]
  assert lists.rank.tolist() == [0, 1, 2]
  assert "1 lists lost to bad images" in capsys.readouterr().out


def test_stopped_job_continues(config, tmp_path, monkeypatch, no_encoding):
  real = cache._prompt_encoder

  def killed(config):
    raise KeyboardInterrupt

  monkeypatch.setattr(cache, "_prompt_encoder", killed)
  with pytest.raises(KeyboardInterrupt):
    cache.run(config, str(tmp_path))
  assert cache_lib.read_manifest(tmp_path / "cache") is None
  before = _stamps(tmp_path / "cache")
  assert list(before) == ["moments-00000.array_record"]
  monkeypatch.setattr(cache, "_prompt_encoder", real)
  cache.run(config, str(tmp_path))
  after = _stamps(tmp_path / "cache")
  assert after["moments-00000.array_record"] == before["moments-00000.array_record"]
  assert len(cache.open_for(config, str(tmp_path)).lists) == 2


def test_ready_made_lists(config, tmp_path):
  """Ranked lists from JSON lines with image files take the same way."""
  folder = tmp_path / "lists"
  folder.mkdir()
  for uid, image in IMAGES.items():
    image.save(folder / f"{uid}.png")
  row = {"prompt": "a red cat", "images": ["u3.png", "u1.png"], "ranks": [1, 0]}
  (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
  config.data.path = str(folder / "train.jsonl")
  cache.run(config, str(tmp_path))
  opened = cache.open_for(config, str(tmp_path))
  assert opened.manifest["counts"] == {"images": 2, "bad_images": 0, "prompts": 2}
  assert [opened.lists.image_uids[i] for i in opened.lists.image] == [
    "u1.png",
    "u3.png",
  ]


def test_refusals(config, tmp_path, no_encoding):
  config.data.resolution = 15
  with pytest.raises(UserError, match=r"data.resolution=15 must be a multiple of 2"):
    cache.run(config, str(tmp_path))
  no_encoding()
  only_a_tie = [("x", "u0", "u1", 0.5)]
  _write_source(tmp_path / "source" / "train-0.parquet", judgements=only_a_tie)
  with pytest.raises(UserError, match="no ranked list could be built"):
    cache.run(config, str(tmp_path / "fresh"))
