"""People through the front door: their embeddings, a run of an adapter, and what follows."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lpo_jax import main, parallel, pretrained, trees
from lpo_jax.data import sources, user_embeds
from lpo_jax.jobs import blueprint, candidates
from lpo_jax.models import users
from lpo_jax.pretrained import ip_adapter
from lpo_jax.training.report import read_metrics

PEOPLE = ("0", "1", "2")
TOTAL = 3
# The adapter alone: the base is frozen, and checkpoints are as small.
ADAPTER = f"train.trainable=(({users.ADAPTER!r}, True), ('.*', False))"


@dataclasses.dataclass(frozen=True)
class Personal:
  """The tiny world with people: who judged, who they are, a UNet that knows them."""

  world: object
  folder: pathlib.Path
  settings: tuple[str, ...]

  def run(self, workdir, *overrides, job="train"):
    outcome = self.world.run(workdir, *self.settings, *overrides, job=job)
    assert outcome.code == 0, outcome.text
    return outcome

  def config(self, workdir):
    return main.parse(self.world.arguments(workdir, *self.settings))[0]


@pytest.fixture(scope="module")
def personal(tiny_world, tmp_path_factory):
  """Four prompts each; one session of each person describes them and is in no list."""
  folder = tmp_path_factory.mktemp("personal")
  rows = tiny_world.judgements
  user = [int(caption.split()[-1]) % 3 for caption in rows["caption"]]
  sources.write_pickapic(folder / "judged.parquet", **rows, user_id=user)
  common = (
    f"data.path={folder / 'judged.parquet'}",
    f"data.cache={folder / 'cache'}",
    "data.group_by=prompt_user",
    "data.few_shot=2",
    f"data.user_embeds={folder / 'people.npz'}",
    "users.encoder=pixels",
  )
  made = Personal(tiny_world, folder, common)
  made.run(folder / "w", "users.form=pairs", job="users")
  base = f"export.path={folder / 'base'}"
  options = ("widen.kind=users", "widen.user_dim=128")
  made.run(folder / "w", *options, base, job="widen")
  made = dataclasses.replace(
    made, settings=(*common, f"model.path={folder / 'base'}", ADAPTER)
  )
  made.run(folder / "w", job="cache")
  return made


@pytest.fixture(scope="module")
def trained(personal, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("adapter")
  personal.run(
    workdir, f"train.total_steps={TOTAL}", "train.learning_rate=0.01",
    "data.user_dropout=0.2",
  )  # fmt: skip
  return workdir


def test_people_are_known_by_judgements_that_are_in_no_list(personal):
  found = user_embeds.read(personal.folder / "people.npz")
  assert sorted(found.users) == sorted(PEOPLE)
  assert found.values.shape == (3, 2, 128)  # pairs of 8 x 8 grey levels side by side
  np.testing.assert_allclose(np.mean(np.square(found.values)), 1.0, rtol=1e-5)
  about = json.loads((personal.folder / "people.json").read_text())
  assert (about["encoder"], about["form"], about["few_shot"]) == ("pixels", "pairs", 2)
  cache = blueprint_cache(personal)
  told = {
    name for rows in about["examples"].values() for row in rows for name in row.values()
  }
  held = {
    (user, row["prompt"]) for user, rows in about["examples"].items() for row in rows
  }
  lists = cache.lists
  named = {(lists.users[u], lists.prompts[p]) for u, p in zip(lists.user, lists.prompt)}
  assert held and not held & named
  assert not told & {lists.image_uids[i] for i in lists.image}
  cache.close()


def blueprint_cache(personal):
  from lpo_jax.jobs import cache as cache_job

  return cache_job.open_for(personal.config(personal.folder / "w"), personal.folder)


def test_margins_begin_at_exactly_zero_and_only_the_adapter_is_kept(personal, trained):
  first, second, *_ = read_metrics(trained / "metrics.jsonl")
  assert first["margin"] == first["drift"] == 0 and first["implicit_acc"] == 0.5
  assert second["drift"] > 0
  plan, kept, step = blueprint.restore_published(
    personal.config(trained), trained, parallel.make_mesh()
  )
  assert step == TOTAL
  names = set(trees.named_leaves(kept))
  every = trees.named_leaves(plan.model.abstract_params)
  assert names == {name for name in every if users.is_adapter(name)}
  base = trees.named_leaves(pretrained.load(personal.folder / "base", "unet").params)
  params, _ = candidates.load_params(str(trained), parallel.make_mesh())
  moved = {
    n for n, x in trees.named_leaves(params).items() if not np.array_equal(x, base[n])
  }
  assert moved <= names and any("to_v_ip" in name for name in moved)


def test_the_adapter_goes_out_to_diffusers_and_comes_back(personal, trained):
  outcome = personal.run(trained, "export.kind=ip_adapter", job="export")
  assert "equal to the bit" in outcome.text
  assert "diffusers predicts the same" in outcome.text
  file = trained / "ip_adapter" / ip_adapter.FILE_NAME
  plain = pretrained.load(personal.world.pipeline, "unet")
  back = ip_adapter.attach(plain, file)
  params, _ = candidates.load_params(str(trained), parallel.make_mesh())
  assert jax.tree.all(jax.tree.map(np.array_equal, back.params, params))
  # A whole pipeline has the file beside it, and is a candidate like the run.
  outcome = personal.run(trained, job="export")
  assert "diffusers predicts the same" in outcome.text
  again, _ = candidates.load_params(str(trained / "export"), parallel.make_mesh())
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
  assert "user_dim" not in pretrained.read_config(trained / "export", "unet")
  assert ip_adapter.FILE_NAME in (trained / "ip_adapter" / "README.md").read_text()


def test_the_same_prompt_and_seed_is_drawn_for_each_person(personal, trained, tmp_path):
  prompts = ["picture number 0", "picture number 1"]
  rows = [(p, u, "new" if u == "2" else "old") for p in prompts for u in PEOPLE]
  columns = dict(zip(("prompt", "user", "category"), map(list, zip(*rows))))
  asked = tmp_path / "asked.parquet"
  parquet.write_table(pa.table(columns), asked)
  people = {user: {"bold": (-1.0) ** int(user), "upright": 0.5} for user in PEOPLE}
  (tmp_path / "people.json").write_text(json.dumps(people))
  workdir = tmp_path / "w"
  where = {
    "own": trained, "other": trained, "plain": trained, "base": personal.folder / "base"
  }  # fmt: skip
  personal.run(
    workdir,
    f"eval.prompts={asked}",
    "eval.scorers=('digits_person',)",
    f"eval.scorer_paths.digits_person={tmp_path / 'people.json'}",
    *(f"eval.candidates.{name}={place}" for name, place in where.items()),
    "eval.told.other=another", "eval.told.plain=nobody", "eval.told.base=nobody",
    "eval.baseline=plain",
    "eval.steps=2", "eval.batch_size=2", "eval.gallery_mb=0", "eval.guidance_scale=2.0",
    job="evaluate",
  )  # fmt: skip
  images = {
    name: [
      (workdir / "evaluation" / name / f"{i:05d}.png").read_bytes() for i in range(6)
    ]
    for name in where
  }
  # Rows 0 to 2 are one prompt and seed, for three people; told of nobody, one image.
  assert len(set(images["own"][:3])) == 3 and len(set(images["plain"][:3])) == 1
  assert len(set(images["base"])) == 2
  # Another person's embedding gives the image of that person.
  assert set(images["other"][:3]) == set(images["own"][:3])
  assert all(a != b for a, b in zip(images["other"], images["own"]))
  found = json.loads((workdir / "evaluation" / "people.json").read_text())
  assert {row["category"] for row in found} == {"", "old", "new"}
  row = next(
    r for r in found
    if (r["candidate"], r["baseline"], r["category"]) == ("own", "plain", "")
  )  # fmt: skip
  assert (row["unit"], row["units"], row["n"]) == ("person", 3, 6)
  assert sorted(row["by_person"]) == sorted(PEOPLE)
  np.testing.assert_allclose(np.mean(list(row["by_person"].values())), row["win_rate"])


def refusal(personal, tmp_path, *overrides, job="train"):
  outcome = personal.world.run(tmp_path, *personal.settings, *overrides, job=job)
  assert outcome.code == 2, outcome.text
  return outcome.text


def test_refusals(personal, trained, tmp_path):
  plain = f"model.path={personal.world.pipeline}"
  said = refusal(personal, tmp_path, plain)
  assert "width 128" in said and "takes no users" in said and "user_dim=128" in said
  said = refusal(personal, tmp_path, "data.user_dropout=1.5")
  assert "a probability between 0 and 1" in said
  said = refusal(personal, tmp_path, "data.user_embeds=nowhere.npz")
  assert "--job users makes one" in said
  said = refusal(personal, tmp_path, "data.few_shot=0", job="users")
  assert "expected at least 1" in said
  said = refusal(personal, tmp_path, "users.form=mean", job="users")
  assert "did you mean 'means'" in said
  assert "knows users already" in refusal(
    personal, tmp_path, "widen.kind=users", "widen.user_dim=3", job="widen"
  )
  said = refusal(personal, trained, "export.kind=lora", job="export")
  assert "what a UNet has for its users" in said
  # The embeddings are part of what a run is: others are another run's.
  other = user_embeds.read(personal.folder / "people.npz")
  mine = (personal.folder / "people.npz").read_bytes()
  user_embeds.write(
    personal.folder / "people.npz", dataclasses.replace(other, values=other.values + 1)
  )
  try:
    more = (
      "train.total_steps=9", "train.learning_rate=0.01", "data.user_dropout=0.2"
    )  # fmt: skip
    assert "data.user_embeds" in refusal(personal, trained, *more)
  finally:
    (personal.folder / "people.npz").write_bytes(mine)
