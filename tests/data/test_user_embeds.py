"""Embeddings of people: their file, whose list is whose, and who is withheld."""

import dataclasses
import pathlib
import runpy
import types

import numpy as np
import pytest

from lpo_jax.data import few_shot, held_out, lists, user_embeds
from lpo_jax.data.judgements import Judgements
from lpo_jax.data.user_embeds import UserEmbeds
from lpo_jax.errors import UserError


def beside(name):
  """The names of another file of tests."""
  return types.SimpleNamespace(**runpy.run_path(pathlib.Path(__file__).with_name(name)))


test_pipeline, test_mixture = beside("test_pipeline.py"), beside("test_mixture.py")
VALUES = np.arange(1, 13, dtype=np.float32).reshape(3, 2, 2)
PEOPLE = UserEmbeds(("ann", "bob", "cy/1"), VALUES, "here")


def of_people(lengths, users=("ann", "bob"), **options):
  """A cache whose lists are these people's in turn, the last one nobody's."""
  cache = test_pipeline.MemoryCache(lengths, **options)
  user = np.arange(len(lengths)) % len(users)
  user[-1] = -1
  cache.lists = dataclasses.replace(
    cache.lists, user=user.astype(np.int32), users=list(users)
  )
  return cache


@pytest.mark.parametrize("form", ["ours", "names", "flat", "parquet"])
def test_files_of_every_form_are_read_alike(tmp_path, form):
  path = tmp_path / f"people.{'parquet' if form == 'parquet' else 'npz'}"
  wanted = VALUES
  if form == "ours":
    user_embeds.write(path, PEOPLE)
  elif form == "parquet":
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"user": list(PEOPLE.users), "user_embeds": VALUES.tolist()}
    parquet.write_table(pa.table(columns), path)
  else:
    wanted = VALUES if form == "names" else VALUES[:, :1]
    arrays = wanted if form == "names" else wanted[:, 0]
    np.savez(path, **dict(zip(PEOPLE.users, arrays, strict=True)))
  found = user_embeds.read(path)
  assert found.users == PEOPLE.users and found.values.dtype == np.float32
  np.testing.assert_array_equal(found.values, wanted)
  other = dataclasses.replace(found, values=found.values + 1)
  assert found.fingerprint() != other.fingerprint()


def test_files_that_are_none(tmp_path):
  with pytest.raises(UserError, match=r"expected a file of \.npz or \.parquet"):
    user_embeds.read(tmp_path / "people.csv")
  with pytest.raises(UserError, match="--job users makes one"):
    user_embeds.read(tmp_path / "people.npz")
  np.savez(tmp_path / "mixed.npz", ann=np.zeros(2), bob=np.zeros(3))
  with pytest.raises(UserError, match="of one shape for everybody"):
    user_embeds.read(tmp_path / "mixed.npz")
  np.savez(tmp_path / "nan.npz", ann=np.array([0.0, np.nan]))
  with pytest.raises(UserError, match="not finite"):
    user_embeds.read(tmp_path / "nan.npz")
  (tmp_path / "cut.npz").write_bytes(b"PK")
  with pytest.raises(UserError, match="cannot be read as embeddings"):
    user_embeds.read(tmp_path / "cut.npz")


def test_people_are_looked_up_and_the_empty_name_is_nobody():
  np.testing.assert_array_equal(
    PEOPLE.of(["bob", "", "ann"]), [VALUES[1], 0 * VALUES[0], VALUES[0]]
  )
  with pytest.raises(UserError, match=r"no embedding of 1 people \(first 'zoe'\)"):
    PEOPLE.of(["ann", "zoe"])


def test_lists_without_an_embedding_are_refused_or_nobodys():
  cache = of_people([2, 2, 2, 2, 2], users=("bob", "zoe"))
  with pytest.raises(UserError, match=r"1 people \(first 'zoe'\) with 3 of 5 lists"):
    user_embeds.join(PEOPLE, cache.lists, "refuse")
  found, counts = user_embeds.join(PEOPLE, cache.lists, "nobody")
  np.testing.assert_array_equal(found.row, [2, 0, 2, 0, 0])
  assert counts == {"lists": 3, "people": 1, "unknown": 1}
  np.testing.assert_array_equal(found.table, [0 * VALUES[0], *VALUES])
  with pytest.raises(UserError, match="did you mean 'nobody'"):
    user_embeds.join(PEOPLE, cache.lists, "nobdy")
  nameless = dataclasses.replace(cache.lists, user=None)
  with pytest.raises(UserError, match="group_by='prompt_user'"):
    user_embeds.join(PEOPLE, nameless, "nobody")


def batches_of(cache, slots=9, **options):
  users, _ = user_embeds.join(PEOPLE, cache.lists, "nobody")
  return test_pipeline._batches(cache, slots=slots, users=users, **options)


def test_every_slot_is_told_whose_list_it_is_of():
  cache = of_people([2, 3, 2, 4], users=("cy/1", "ann"))
  batches = batches_of(cache, slots=11)
  batch = next(batches)
  index_of = {int(key): i for i, key in enumerate(cache.lists.list_id)}
  wanted = [[2, 0, 2, None][index_of[int(key)]] for key, _ in batch.identity]
  wanted = [0 * VALUES[0] if w is None else VALUES[w] for w in wanted]
  told = batch.conditioning.user_embeds
  np.testing.assert_array_equal(told, wanted)
  assert batches.batch_spec.conditioning.user_embeds.shape == told.shape == (11, 2, 2)
  # In shares, each process holds its slots.
  half = next(batches_of(cache, slots=11 + 1, process_index=1, process_count=2))
  whole = next(batches_of(cache, slots=12)).conditioning.user_embeds
  np.testing.assert_array_equal(half.conditioning.user_embeds, whole[6:])
  assert next(test_pipeline._batches(cache)).conditioning.user_embeds is None


def test_users_are_withheld_by_a_coin_of_their_own():
  cache = of_people([2] * 600, users=("ann",))
  batch = next(
    batches_of(cache, slots=1200, user_dropout=0.3, caption_dropout=0.5, flip="list")
  )
  nobody = ~batch.conditioning.user_embeds.any((1, 2))
  wordless = batch.conditioning.prompt_embeds[:, 0, 0] == 0
  assert (nobody[0::2] == nobody[1::2]).all()  # of the list
  assert 0.25 < nobody.mean() < 0.35 and 0.4 < wordless.mean() < 0.6
  assert 0.2 < nobody[wordless].mean() < 0.4  # whatever becomes of the text
  # Neither text nor views change with it.
  plain = next(batches_of(cache, slots=1200, caption_dropout=0.5, flip="list"))
  np.testing.assert_array_equal(plain.moments, batch.moments)
  np.testing.assert_array_equal(
    plain.conditioning.prompt_embeds, batch.conditioning.prompt_embeds
  )
  with pytest.raises(UserError, match=r"and 0 without data\.user_embeds"):
    test_pipeline._batches(cache, user_dropout=0.1)


def test_a_mixture_knows_whose_each_list_is():
  mixed, shelves = test_mixture._mixed()
  assert mixed.lists.user is None and not mixed.lists.users
  for shelf, names in zip(shelves[:2], (("bob", "ann"), ("cy/1", "bob")), strict=True):
    count = len(shelf.lists)
    user = (np.arange(count) % 3 - 1).astype(np.int32)
    shelf.lists = dataclasses.replace(shelf.lists, user=user, users=list(names))
  caches = dict(zip(test_mixture.NAMES, shelves, strict=True))
  joined = test_mixture.mixture.Mixture(caches, dict.fromkeys(caches, 1)).lists
  named = [joined.users[u] if u >= 0 else "" for u in joined.user]
  wanted = []
  for shelf in shelves:
    own = shelf.lists
    wanted += [
      own.users[u] if u >= 0 else ""
      for u in (np.full(len(own), -1) if own.user is None else own.user)
    ]
  assert named == wanted and {"ann", "bob", "cy/1", ""} == set(named)


def test_people_who_are_held_out_are_never_trained_on():
  users = [f"p{i}" for i in range(40)]
  own = of_people([2] * 121, users=users).lists
  trained, held = held_out.split(own, 0.0, 0, people=0.25)
  assert sorted([*trained, *held]) == list(range(121))
  sides = [{own.user[i] for i in side} for side in (trained, held)]
  assert not sides[0] & sides[1] and 4 <= len(sides[1]) <= 16
  assert -1 in sides[0]  # nobody known is nobody held out
  chosen = {u for u in range(40) if held_out.is_held_out_person(f"p{u}", 0.25, seed=0)}
  assert sides[1] == chosen
  both = held_out.split(own, 0.3, 0, people=0.25)[1]
  assert set(held) < set(both) > set(held_out.split(own, 0.3, 0)[1])
  with pytest.raises(UserError, match=r"held_out_users=1\.0: expected a share of the"):
    held_out.split(own, 0.0, 0, people=1.0)
  with pytest.raises(UserError, match="no list says whose"):
    held_out.split(dataclasses.replace(own, user=None), 0.0, 0, people=0.1)


def judged(rows):
  """(person, prompt, a, b, label) -> judgements."""
  words = [sorted({row[k] for row in rows}) for k in (0, 1)]
  uids = sorted({uid for row in rows for uid in row[2:4]})
  column = lambda k, known: np.array([known.index(r[k]) for r in rows], np.int32)  # noqa: E731
  return Judgements(
    prompts=words[1],
    image_uids=uids,
    users=words[0],
    prompt=column(1, words[1]),
    user=column(0, words[0]),
    image_a=column(2, uids),
    image_b=column(3, uids),
    label=np.array([r[4] for r in rows], np.float32),
    weight=np.ones(len(rows), np.float32),
  )


ROWS = [
  (user, f"prompt {p}", f"{user}{p}a", f"{user}{p}{b}", label)
  for user in ("ann", "bob")
  for p in range(6)
  for b, label in (("b", 1.0), ("c", 0.0), ("d", 0.5))
]


def test_whole_sessions_describe_a_person_whatever_the_order_of_rows():
  source = judged(ROWS)
  found = few_shot.choose(source, 3)
  for user in ("ann", "bob"):
    rows = found.examples[user]
    assert len(rows) == 3 and all(ROWS[r][0] == user for r in rows)
    assert all(ROWS[r][4] != 0.5 for r in rows)  # clear ones
    prompts = {ROWS[r][1] for r in rows}
    assert len(prompts) == 2  # two a session
    held = {ROWS[r][1] for r in np.flatnonzero(found.held) if ROWS[r][0] == user}
    assert held == prompts
  assert found.held.sum() == 2 * 2 * 3  # all that was said in these sessions
  # Images of one side are never on the other.
  sides = [
    {u for r, h in zip(ROWS, found.held) if h == s for u in r[2:4]} for s in (0, 1)
  ]
  assert not sides[0] & sides[1]
  swapped = [(u, p, b, a, 1 - x) for u, p, a, b, x in reversed(ROWS)]
  again = few_shot.choose(judged(swapped), 3)

  def said(source, rows):
    winners, losers = few_shot.winner_and_loser(source, rows)
    return [
      (source.image_uids[w], source.image_uids[x]) for w, x in zip(winners, losers)
    ]

  for user in ("ann", "bob"):
    assert said(judged(swapped), again.examples[user]) == said(
      source, found.examples[user]
    )
  best = said(source, found.examples["ann"])[0]
  assert {best[0][-1], best[1][-1]} in ({"a", "b"}, {"a", "c"})
  assert ("c" if "c" in best[0][-1] + best[1][-1] else "a") == best[0][-1]


def test_what_describes_people_is_in_no_list_and_counted():
  source = judged(ROWS)
  built, report = lists.build(source, "levels", group_by="prompt_user")
  fewer, told = lists.build(source, "levels", group_by="prompt_user", few_shot=3)
  assert len(built) == 12 and len(fewer) == 8
  assert told.dropped == {"few_shot": 12}
  assert told.judgements_total == report.judgements_total == len(ROWS)
  held = few_shot.choose(source, 3).held
  names = {uid for row, h in zip(ROWS, held) if h for uid in row[2:4]}
  assert not names & {fewer.image_uids[i] for i in fewer.image}
  with pytest.raises(UserError, match="by people with names"):
    lists.build(built, few_shot=3)
  nameless = dataclasses.replace(source, user=np.full(len(ROWS), -1, np.int32))
  with pytest.raises(UserError, match="by people with names"):
    lists.build(nameless, few_shot=3)
