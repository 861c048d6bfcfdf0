"""The cache job on a real, tiny pipeline and a real, tiny Pick-a-Pic file."""

import io
import json
import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lpo_jax import generation, main, models, pretrained
from lpo_jax.configs import common
from lpo_jax.data import manifest, pipeline, records, sources
from lpo_jax.errors import StoppedEarly, UserError
from lpo_jax.jobs import cache, encoders, inspect

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
  config = common.get_config()
  config.model.path = str(model)
  config.data.path = str(tmp_path / "source")
  config.data.resolution = RESOLUTION
  config.data.max_bad_images = 0.0
  return config


@pytest.fixture
def no_encoding(monkeypatch):
  """Makes any call of an encoder a failure."""

  def refuse(config):
    raise AssertionError("an encoder was loaded")

  def forbid():
    monkeypatch.setattr(encoders, "image_encoder", refuse)
    monkeypatch.setattr(encoders, "prompt_encoder", refuse)

  return forbid


def _stamps(folder):
  return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.array_record")}


def test_from_parquet_to_batches(config, model, tmp_path, capsys):
  cache.run(config, str(tmp_path / "run"))
  said = capsys.readouterr().out
  assert "encoding waited for decoding" in said
  speed = manifest.read(tmp_path / "run" / "cache")["notes"]["moments"]
  assert speed["images"] == 6 and speed["images_per_second"] > 0
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
  assert lists.prompts[opened.null_prompts[0]] == ""
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
  pairs.data.strategy = "scores"  # which RankDPO and others learn from
  cache.run(pairs, str(tmp_path / "rankdpo"))
  lists = cache.open_for(pairs, "anywhere").lists
  assert lists.score.tolist() == [1, 0.5, 0.5, 0.25, 1, 0]


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
  for key, value, words in (
    ("clip_skip", 1, r"fingerprints\.text_encoder: .* clip_skip=1'"),
    ("vae_tile", 8, r"fingerprints\.vae: .* tile=8'"),
  ):
    changed = config.copy_and_resolve_references()
    changed.model[key] = value
    with pytest.raises(UserError, match=words):
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
  real = encoders.prompt_encoder

  def killed(config):
    raise KeyboardInterrupt

  monkeypatch.setattr(encoders, "prompt_encoder", killed)
  with pytest.raises(KeyboardInterrupt):
    cache.run(config, str(tmp_path))
  assert manifest.read(tmp_path / "cache") is None
  before = _stamps(tmp_path / "cache")
  assert list(before) == ["moments-00000.array_record"]
  monkeypatch.setattr(encoders, "prompt_encoder", real)
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


def _take(config, workdir, count=4, **options):
  opened = cache.open_for(config, workdir)
  defaults = {"images_per_update": 6, "seed": 0, "prefetch": 0}
  batches = pipeline.Batches(opened, **{**defaults, **options})
  return [next(batches) for _ in range(count)], batches


def _equal(a, b):
  same = jax.tree.map(np.array_equal, a, b)
  return all(jax.tree.leaves(same))


def test_records_in_bfloat16(config, tmp_path):
  config.data.cache_dtype = "bfloat16"
  cache.run(config, tmp_path)
  coarse = cache.open_for(config, tmp_path).moments(range(6))
  assert manifest.read(tmp_path / "cache")["dtype"] == "bfloat16"
  other = config.copy_and_resolve_references()
  other.data.cache_dtype = "float16"
  for use in (cache.run, cache.open_for):
    with pytest.raises(
      UserError, match="dtype: this run has 'float16', found 'bfloat16"
    ):
      use(other, tmp_path)
  cache.run(other, tmp_path / "fine")
  fine = cache.open_for(other, tmp_path / "fine").moments(range(6))
  off = np.abs(coarse - fine) / np.maximum(np.abs(fine), 1e-6)
  assert 1e-4 < off.max() < 2**-8  # bfloat16 has 8 bits
  other.data.cache_dtype = "float8"
  with pytest.raises(UserError, match=r"unknown data\.cache_dtype 'float8'"):
    cache.run(other, tmp_path / "none")


def test_mirrored_images_are_added_to_what_is_there(
  config, tmp_path, monkeypatch, capsys
):
  cache.run(config, tmp_path)
  before = _stamps(tmp_path / "cache")
  config.data.flip = "list"
  with pytest.raises(UserError, match="has no mirrored images"):
    cache.open_for(config, tmp_path)
  real = encoders.image_encoder

  def dying(config):
    def die(images):
      raise KeyboardInterrupt

    return die, real(config)[1]

  monkeypatch.setattr(encoders, "image_encoder", dying)
  with pytest.raises(KeyboardInterrupt):
    cache.run(config, tmp_path)
  plain = config.copy_and_resolve_references()
  plain.data.flip = "off"
  assert (
    len(_take(plain, tmp_path)[0]) == 4
  )  # what is finished can be read all the time
  monkeypatch.setattr(encoders, "image_encoder", real)
  monkeypatch.setattr(encoders, "prompt_encoder", lambda config: pytest.fail("again"))
  cache.run(config, tmp_path)
  after = _stamps(tmp_path / "cache")
  assert {name: after[name] for name in before} == before
  assert set(after) - set(before) == {"mirrored-00000.array_record"}
  assert "moments and mirrored" in capsys.readouterr().out
  # The mirrored record is what the VAE says about the mirrored picture.
  opened = cache.open_for(config, tmp_path)
  record = opened.lists.image_uids.index("u3")
  vae = pretrained.load(config.model.path, "vae")
  height = RESOLUTION + 12  # u3 is taller than wide: its centre is taken
  pixels = np.asarray(IMAGES["u3"], np.float32)[6 : height - 6, ::-1] / 127.5 - 1
  expected = vae.encode(vae.params, jnp.asarray(pixels)[None])
  np.testing.assert_allclose(
    opened.moments([record + 6]), np.asarray(expected), rtol=2e-3, atol=2e-4
  )
  batches, _ = _take(config, tmp_path, flip="list")
  assert not _equal(batches, _take(plain, tmp_path)[0])
  config.data.flip = "lists"
  with pytest.raises(UserError, match=r"unknown data\.flip"):
    cache.run(config, tmp_path)


def test_no_cache_gives_the_same_batches(config, tmp_path, capsys):
  _write_source(tmp_path / "source" / "train-0.parquet", bad=("u2",))
  config.data.max_bad_images = 0.5
  config.data.flip = "list"
  cache.run(config, tmp_path)
  options = {"flip": "list", "caption_dropout": 0.3, "time_ids": "original"}
  stored, _ = _take(config, tmp_path, **options)
  config.data.cache = None
  cache.run(config, tmp_path / "other")
  assert "data.cache=None: nothing is stored" in capsys.readouterr().out
  assert not (tmp_path / "other" / "cache").exists()
  live, _ = _take(config, tmp_path, **options)
  assert _equal(stored, live)  # to the bit: the same networks, the same rounding
  bad = (tmp_path / "bad_images.jsonl").read_text()
  assert json.loads(bad)["uid"] == "u2"
  # The command line can say it.
  parsed = common.get_config()
  main.override(parsed, "data.cache", "None")
  assert parsed.data.cache is None


@pytest.fixture
def mixed(config, tmp_path):
  """A mixture of the parquet file and of a ready-made list."""
  folder = tmp_path / "lists"
  folder.mkdir()
  for uid, image in IMAGES.items():
    image.save(folder / f"{uid}.png")
  row = {"prompt": "a tree", "images": ["u3.png", "u1.png"], "ranks": [1, 0]}
  (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
  people = {"share": 3, "path": config.data.path}
  with config.unlocked():
    config.data.mixture = {
      "people": people,
      "ours": {"share": 1, "path": str(folder), "strategy": "paths"},
    }
  config.data.path = ""
  return config


def test_mixture(mixed, tmp_path, no_encoding, capsys):
  cache.run(mixed, tmp_path)
  assert {p.parent.name for p in (tmp_path / "cache").glob("*/manifest.json")} == {
    "people",
    "ours",
  }
  batches, taken = _take(mixed, tmp_path, count=40)
  drawn = taken.drawn
  assert set(drawn) == {"people", "ours"}
  assert drawn["people"]["share"] == pytest.approx(0.75, abs=0.01)
  assert drawn["ours"]["epochs"] == drawn["ours"]["lists"]  # it has one list
  # A source may be without a cache, or have one of its own; the numbers are the same.
  with mixed.unlocked():
    mixed.data.mixture.ours.cache = None
    mixed.data.mixture.people.cache = str(tmp_path / "cache" / "people")
  mixed.data.cache = str(tmp_path / "nowhere")
  assert _equal(batches, _take(mixed, tmp_path, count=40)[0])
  no_encoding()
  mixed.data.mixture.ours.cache = str(tmp_path / "cache" / "ours")
  cache.run(mixed, tmp_path)
  assert capsys.readouterr().out.count("cache is up to date") == 2


def test_mixture_refusals(mixed, tmp_path):
  with mixed.unlocked():
    mixed.data.mixture.ours.pth = "x"
  with pytest.raises(UserError, match=r"key of data\.mixture\.ours 'pth'.*'path'"):
    cache.run(mixed, tmp_path)
  with mixed.unlocked():
    mixed.data.mixture.ours = {"path": "x"}
  with pytest.raises(UserError, match=r"data\.mixture\.ours has no share"):
    cache.run(mixed, tmp_path)


def test_inspect_of_a_mixture(mixed, tmp_path):
  found = inspect.run(mixed, tmp_path)
  assert found["people"]["judgements"]["judgements_total"] == 4
  assert found["ours"]["images"]["count"] == 2
  assert (tmp_path / "ours" / "data_report.html").exists()


def test_signal_stops_resumably(config, tmp_path, monkeypatch):
  monkeypatch.setattr(cache, "LOOK_EVERY_S", 0)
  real = encoders.image_encoder

  def interrupted(config):
    encode, batch_size = real(config)

    def call(images):
      os.kill(os.getpid(), signal.SIGTERM)
      return encode(images)

    return call, batch_size

  monkeypatch.setattr(encoders, "image_encoder", interrupted)
  handler = signal.getsignal(signal.SIGTERM)
  threads = threading.active_count()
  with pytest.raises(StoppedEarly, match=r"SIGTERM while encoding images: finished"):
    cache.run(config, tmp_path)
  assert signal.getsignal(signal.SIGTERM) == handler
  assert threading.active_count() == threads
  assert manifest.read(tmp_path / "cache") is None
  monkeypatch.setattr(encoders, "image_encoder", real)
  (tmp_path / "STOP").touch()
  with pytest.raises(StoppedEarly, match=r"found .*STOP while encoding images"):
    cache.run(config, tmp_path)
  cache.run(config, tmp_path)  # the file is gone: the same command goes on
  assert len(cache.open_for(config, tmp_path).lists) == 2


def test_two_jobs_on_one_folder(config, tmp_path, monkeypatch):
  with (
    records.only_writer(tmp_path / "cache"),
    pytest.raises(UserError, match="another process is writing"),
  ):
    cache.run(config, tmp_path)
  assert not list((tmp_path / "cache").glob("*.array_record"))
  # The other job may also finish between our first look and our turn.
  real = cache.lists.refuse_empty

  def other_job_finishes(report):
    real(report)
    monkeypatch.setattr(cache.lists, "refuse_empty", real)
    cache.run(config, tmp_path)
    monkeypatch.setattr(
      encoders, "image_encoder", lambda _: pytest.fail("encoded twice")
    )

  monkeypatch.setattr(cache.lists, "refuse_empty", other_job_finishes)
  cache.run(config, tmp_path)
  assert len(cache.open_for(config, tmp_path).lists) == 2


def test_folder_that_cannot_be_written(config):
  config.data.cache = "/proc/lpo_jax"
  with pytest.raises(UserError, match=r"cannot write /proc/lpo_jax.*data\.cache"):
    cache.run(config, "/proc/lpo_jax")


def test_large_images_are_bad_images(config, tmp_path):
  config.data.max_pixels = 16 * 30  # u4 has 16 x 32, u5 has 16 x 36
  config.data.max_bad_images = 0.5
  cache.run(config, tmp_path)
  lines = (tmp_path / "cache" / "bad_images.jsonl").read_text().splitlines()
  assert {json.loads(line)["uid"] for line in lines} == {"u4", "u5"}
  config.data.max_pixels = 1000
  with pytest.raises(UserError, match=r"preprocessing\.max_pixels: this run has 1000"):
    cache.run(config, tmp_path)


def test_refusals(config, tmp_path, no_encoding):
  config.data.resolution = 15
  with pytest.raises(UserError, match=r"data.resolution=15 must be a multiple of 2"):
    cache.run(config, str(tmp_path))
  no_encoding()
  only_a_tie = [("x", "u0", "u1", 0.5)]
  _write_source(tmp_path / "source" / "train-0.parquet", judgements=only_a_tie)
  with pytest.raises(UserError, match="no ranked list could be built"):
    cache.run(config, str(tmp_path / "fresh"))


def _split_source(config, tmp_path, have):
  """Moves the source's labels into one file and some of its images into a folder."""
  import pyarrow.parquet as pq

  labels, images = tmp_path / "labels" / "train-0.parquet", tmp_path / "images"
  labels.parent.mkdir()
  images.mkdir()
  table = pq.read_table(config.data.path)
  pq.write_table(table.drop_columns(["jpg_0", "jpg_1"]), labels)
  for uid in have:
    (images / f"{uid}.png").write_bytes(_png(IMAGES[uid]))
  config.data.path = str(labels.parent)
  return labels, images


def test_labels_and_images_in_different_places(config, tmp_path, capsys):
  whole = tmp_path / "whole"
  cache.run(config, str(whole))
  _, images = _split_source(config, tmp_path, [*list(IMAGES)[:3], "u5"])
  with pytest.raises(UserError, match=r"no images\. Set data\.images"):
    cache.run(config, str(tmp_path / "run"))
  config.data.images = str(images)
  capsys.readouterr()
  cache.run(config, str(tmp_path / "run"))  # max_bad_images is 0: absent is not bad
  said = capsys.readouterr().out
  assert "2 of 6 images are not in data.images; of 2 lists 1 are left" in said
  assert "records: 4 images, 3 prompts" in said
  one, other = (cache.open_for(config, str(tmp_path / "run")), None)
  assert one.lists.rank.tolist() == [0, 1, 2]
  config.data.images, config.data.path = "", str(tmp_path / "source")
  other = cache.open_for(config, str(whole))
  for uid in ("u0", "u1", "u2"):
    records_of = [[c.lists.image_uids.index(uid)] for c in (one, other)]
    np.testing.assert_array_equal(
      one.moments(records_of[0]), other.moments(records_of[1])
    )


def test_other_images_are_another_source(config, tmp_path):
  _, images = _split_source(config, tmp_path, IMAGES)
  config.data.images = str(images)
  cache.run(config, str(tmp_path / "run"))
  (images / "u5.png").write_bytes(_png(IMAGES["u0"]))
  with pytest.raises(UserError, match="image_files"):
    cache.open_for(config, str(tmp_path / "run"))


def test_what_never_trains_is_refused_before_anything_is_read(config, tmp_path):
  labels, images = _split_source(config, tmp_path, IMAGES)
  labels.rename(labels.with_name("test_unique-00000-of-00001.parquet"))
  config.data.images = str(images)
  with pytest.raises(UserError, match=r"'test_unique' is .* never trained on"):
    cache.run(config, str(tmp_path / "run"))


def test_edits_are_for_a_unet_that_edits(config, tmp_path):
  import pyarrow.parquet as pq

  def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()

  names = ("source_img", "instruction", "target_img")
  rows = [dict(zip(names, (png(40 * i), "do", png(40 * i + 20)))) for i in range(3)]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "edits.parquet")
  model = tmp_path / "model"
  shutil.copytree(config.model.path, model)
  (model / "unet").mkdir()
  config.model.path, config.data.path = str(model), str(tmp_path / "edits.parquet")
  config.data.strategy = "winners"
  unet = model / "unet" / "config.json"
  unet.write_text(json.dumps({"in_channels": 4}))
  with pytest.raises(
    UserError, match=r"takes 4 channels; expected 8\. Make an editing"
  ):
    cache.run(config, str(tmp_path / "run"))
  unet.write_text(json.dumps({"in_channels": 8}))
  cache.run(config, str(tmp_path / "run"))
  opened = cache.open_for(config, str(tmp_path / "run"))
  lists = opened.lists
  assert len(lists) == 3 and opened.image_count == 6
  # The source is the darker neighbour of the image; of its moments the mean is shown.
  source, image = (opened.moments(x) for x in (lists.source_image, lists.image))
  assert not np.array_equal(source, image)
  np.testing.assert_array_equal(
    opened.source_latents(lists.source_image), np.split(source, 2, -1)[0]
  )
  used = {*lists.source_image.tolist(), *lists.image.tolist()}
  assert used == set(range(6))
  opened.close()
