"""Judgements to ranked lists, by hand: every list and every drop is written out."""

import dataclasses
import time

import numpy as np
import pytest

from lpo_jax.data import lists, orders
from lpo_jax.data.judgements import Judgements
from lpo_jax.errors import UserError


def judgements(rows, *, users=None, weights=None):
  """Rows (prompt, a, b, label of a) to judgements, words in order of appearance."""
  users = ["u"] * len(rows) if users is None else users
  prompts = list(dict.fromkeys(row[0] for row in rows))
  uids = list(dict.fromkeys(uid for row in rows for uid in row[1:3]))
  names = list(dict.fromkeys(users))
  return Judgements(
    prompts=prompts,
    image_uids=uids,
    users=names,
    prompt=np.array([prompts.index(row[0]) for row in rows], np.int32),
    user=np.array([names.index(user) for user in users], np.int32),
    image_a=np.array([uids.index(row[1]) for row in rows], np.int32),
    image_b=np.array([uids.index(row[2]) for row in rows], np.int32),
    label=np.array([row[3] for row in rows], np.float32),
    weight=np.array([1.0] * len(rows) if weights is None else weights, np.float32),
  )


def wins(*pairs, prompt="p"):
  """ "ab" means a beat b, "a=b" is a tie."""
  return [(prompt, pair[0], pair[-1], 0.5 if "=" in pair else 1.0) for pair in pairs]


def readable(built):
  """Lists as text, sorted: "a > b = c"."""
  shown = []
  for i in range(len(built)):
    span = slice(built.offsets[i], built.offsets[i + 1])
    uids = [built.image_uids[j] for j in built.image[span]]
    text = uids[0]
    for rank, before, uid in zip(built.rank[span][1:], built.rank[span], uids[1:]):
      assert rank - before in (0, 1)
      text += (" = " if rank == before else " > ") + uid
    assert built.rank[span][0] == 0
    shown.append(text)
  return sorted(shown)


def build(rows, strategy, **options):
  source = judgements(rows) if isinstance(rows, list) else rows
  built, report = lists.build(source, strategy, **options)
  assert report.judgements_total == report.judgements_used + sum(
    report.dropped.values()
  )
  assert report.lists == len(built)
  return readable(built), report


@pytest.mark.parametrize(
  ("strategy", "expected"),
  [
    ("paths", ["w > a", "w > b", "w > c"]),
    ("levels", ["w > a = b = c"]),
    ("choice", ["w > a = b = c"]),
    ("pairs", ["w > a", "w > b", "w > c"]),
    ("scores", ["w > a = b = c"]),
  ],
)
def test_star_of_a_winner_that_stays(strategy, expected):
  found, report = build(wins("wa", "wb", "wc"), strategy)
  assert found == expected
  assert report.judgements_used == 3
  joined = len(expected) == 1
  assert report.share_over_two == float(joined)
  assert report.lengths == ({4: 1} if joined else {2: 3})


@pytest.mark.parametrize(
  ("strategy", "expected"),
  [
    ("paths", ["a > b > c > d"]),
    ("levels", ["a > b > c > d"]),
    ("choice", ["a > b", "b > c", "c > d"]),
    ("pairs", ["a > b", "b > c", "c > d"]),
  ],
)
def test_chain(strategy, expected):
  assert build(wins("ab", "bc", "cd"), strategy)[0] == expected


def test_paths_absorb_the_wins_they_imply():
  found, report = build(wins("ab", "bc", "ac"), "paths")
  assert found == ["a > b > c"]
  assert report.judgements_used == 3


def test_paths_take_the_longest_first_and_every_win_once():
  # a>b>c>d is longest; what is left of x>b>y is two pairs, as b>... is covered no more.
  found, report = build(wins("ab", "bc", "cd", "xb", "by"), "paths")
  assert found == ["a > b > c > d", "x > b > y"]
  assert report.judgements_used == 5
  assert report.share_over_two == 1.0


def test_paths_of_equal_length_are_chosen_by_name():
  found, _ = build(wins("am", "bm", "mx", "my"), "paths")
  assert found == ["a > m > x", "b > m > y"]


def test_levels_are_longest_chains_down():
  # d loses to a directly and to c: its chain is a > b > c > d.
  found, _ = build(wins("ab", "bc", "cd", "ad", "xd"), "levels")
  assert found == ["a = x > b > c > d"]


def test_cycle_of_equal_strength_loses_its_last_win_by_name():
  found, report = build(wins("ab", "bc", "ca"), "paths")
  assert found == ["a > b > c"]
  assert (report.cycle_cuts, report.cycles, report.judgements_used) == (1, 1, 2)


def test_cycle_is_cut_where_the_margin_is_smallest_then_the_votes_fewest():
  # a>b three votes, b>c margin 1 of 3 votes, c>a margin 1 of 1 vote: c>a is cut.
  rows = wins("ab", "ab", "ab", "bc", "bc", "cb", "ca")
  for strategy in ("paths", "levels"):
    found, report = build(rows, strategy)
    assert found == ["a > b > c"]
    assert (report.cycles, report.outvoted, report.judgements_used) == (1, 1, 5)
  # Now b>c is the one with the smaller margin: c > a > b stays.
  found, report = build(wins("ab", "ab", "bc", "ca", "ca"), "levels")
  assert found == ["c > a > b"]
  # A choice states only what was said, so a circle does no harm.
  found, report = build(wins("ab", "bc", "ca"), "choice")
  assert found == ["a > b", "b > c", "c > a"]
  assert report.cycles == 0


def test_no_more_wins_are_cut_than_cycles_need():
  # Two circles share a>b, the weakest: one cut opens both.
  rows = wins("bc", "bc", "ca", "ca", "bd", "bd", "da", "da", "ab")
  found, report = build(rows, "levels")
  assert found == ["b > c = d > a"]
  assert report.cycle_cuts == 1


def test_majority_and_contradiction():
  rows = wins("ab", "ab", "ba", "cd", "dc")
  found, report = build(rows, "paths")
  assert found == ["a > b"]
  assert (report.outvoted, report.contradictions) == (1, 2)
  assert (report.contradicted_pairs, report.repeated) == (1, 3)
  found, report = build(rows, "pairs")
  assert found == ["a > b", "a > b", "b > a", "c > d", "d > c"]
  assert (report.judgements_used, report.repeated) == (5, 3)


def test_soft_labels_sum_up():
  rows = [("p", "a", "b", 0.7), ("p", "b", "a", 0.7), ("p", "a", "c", 0.8)]
  found, report = build(rows, "paths")
  assert found == ["a > c"]
  assert report.contradictions == 2


@pytest.mark.parametrize("strategy", ["paths", "choice", "pairs"])
def test_ties_without_a_place(strategy):
  found, report = build(wins("ab", "b=c", "a=b"), strategy)
  assert found == ["a > b"]
  if strategy == "pairs":
    assert (report.ties_not_expressible, report.outvoted) == (2, 0)
  else:  # the tie of a and b is outvoted by the win
    assert (report.ties_not_expressible, report.outvoted) == (1, 1)
  assert report.ties == 2
  found, report = build(wins("ab", "b=c", "a=b"), strategy, ties="drop")
  assert (found, report.ties_dropped, report.ties) == (["a > b"], 2, 2)


def test_levels_merge_tied_images():
  found, report = build(wins("ab", "b=c", "cd"), "levels")
  assert found == ["a > b = c > d"]
  assert report.judgements_used == 3
  found, _ = build(wins("ab", "b=c", "cd"), "levels", ties="drop")
  assert found == ["a > b", "c > d"]


def test_tie_yields_where_wins_order_its_images():
  found, report = build(wins("ab", "bc", "a=c"), "levels")
  assert found == ["a > b > c"]
  assert (report.ties_yielded, report.judgements_used) == (1, 2)


def test_tie_yields_where_merging_closes_a_cycle():
  # a = d and b = c cannot both hold with a > b and c > d: the stronger tie stays.
  rows = wins("ab", "cd", "b=c", "b=c", "a=d")
  found, report = build(rows, "levels")
  assert found == ["a > b = c > d"]
  assert (report.ties_yielded, report.judgements_used) == (1, 4)
  rows = wins("ab", "cd", "b=c", "a=d", "a=d")
  assert build(rows, "levels")[0] == ["c > a = d > b"]


def test_lists_without_any_order_are_dropped():
  found, report = build(wins("a=b", "b=c", "xy"), "levels")
  assert found == ["x > y"]
  assert report.all_tied == 2
  assert report.lists_dropped == {"all tied": 1}


def test_unlabelled_and_same_image():
  rows = [("p", "a", "b", np.nan), ("p", "c", "c", 1.0), ("p", "a", "c", 0.0)]
  found, report = build(rows, "paths")
  assert found == ["c > a"]
  assert (report.unlabelled, report.same_image) == (1, 1)


def test_paths_longer_than_max_size_share_one_image():
  chain = [first + second for first, second in zip("abcdef", "bcdefg")]
  found, report = build(wins(*chain), "paths", max_size=3)
  assert found == ["a > b > c", "c > d > e", "e > f > g"]
  assert report.judgements_used == 6
  found, _ = build(wins(*chain), "paths", max_size=4)
  assert found == ["a > b > c > d", "d > e > f > g"]


def test_choice_splits_losers():
  found, report = build(wins("wa", "wb", "wc", "wd", "we"), "choice", max_size=3)
  assert found == ["w > a = b", "w > c = d", "w > e"]
  assert report.judgements_used == 5


def test_levels_wider_than_max_size_are_covered_by_connected_windows():
  found, report = build(wins("wa", "wb", "wc", "wd", "we"), "levels", max_size=3)
  assert found == ["w > a = b", "w > c = d", "w > e"]
  assert report.judgements_used == 5
  chain = [first + second for first, second in zip("abcdef", "bcdefg")]
  found, report = build(wins(*chain), "levels", max_size=3)
  assert found == ["a > b > c", "c > d > e", "e > f > g"]
  # Ten unbeaten images over one loser: no window is all tied, no judgement is lost.
  found, report = build(wins(*[f"{x}z" for x in "abcdefghij"]), "levels", max_size=4)
  assert found == ["a = b = c > z", "d = e = f > z", "g = h = i > z", "j > z"]
  assert report.judgements_used == 10


def scored(rows, **options):
  """Lists by `scores` as "a 1 > b 0.5", and the report."""
  source = judgements(rows) if isinstance(rows, list) else rows
  built, _ = lists.build(source, "scores", **options)
  found, report = build(source, "scores", **options)
  scores = {
    (built.image_uids[i], round(float(score), 6))
    for i, score in zip(built.image, built.score)
  }
  return found, dict(sorted(scores)), report


def test_scores_are_shares_of_the_win():
  found, scores, report = scored(wins("wa", "wb", "wc"))
  assert (found, report.judgements_used) == (["w > a = b = c"], 3)
  assert scores == {"w": 1, "a": 0, "b": 0, "c": 0}
  # The winner stays: c won, tied, won; a won and lost as d tied alone: both are 1/2.
  found, scores, report = scored(wins("ab", "ca", "c=d", "ce"))
  assert found == ["c > a = d > b = e"]
  assert scores == {"a": 0.5, "b": 0, "c": 0.833333, "d": 0.5, "e": 0}
  assert (report.judgements_used, report.dropped) == (3, {"ties_yielded": 1})
  # In a chain the middle won and lost once each: nobody's win of b over c is borne out.
  found, scores, report = scored(wins("ab", "bc", "cd"))
  assert (found, report.dropped) == (["a > b = c > d"], {"against_scores": 1})
  # Half of what a and b said of each other is outweighed by the others they met.
  found, scores, report = scored(wins("ba", "ac", "ad", "ae", "cb"))
  assert found == ["a > b = c > d = e"]
  assert scores == {"a": 0.75, "b": 0.5, "c": 0.5, "d": 0, "e": 0}
  assert (report.judgements_used, report.dropped) == (3, {"against_scores": 2})


def test_scores_pool_contradictions_and_circles():
  found, scores, report = scored(wins("ab", "ab", "ba"))
  assert (found, scores) == (["a > b"], {"a": 0.666667, "b": 0.333333})
  assert (report.judgements_used, report.against_scores) == (2, 1)
  assert (report.repeated, report.outvoted, report.contradictions) == (2, 0, 0)
  for rows in (wins("ab", "ba"), wins("ab", "bc", "ca"), wins("a=b", "b=c")):
    found, _, report = scored(rows)
    assert (found, report.all_tied) == ([], len(rows))
    assert report.lists_dropped == {"all tied": 1}
  # Two prompts are two sets; so are images that nothing connects.
  found, _, _ = scored(wins("ab", "cd") + wins("ba", prompt="q"))
  assert found == ["a > b", "b > a", "c > d"]


def test_scores_of_ties():
  found, scores, report = scored(wins("ab", "b=c"))
  assert (found, scores) == (["a > c > b"], {"a": 1, "b": 0.25, "c": 0.5})
  assert report.dropped == {"ties_yielded": 1}
  found, _, report = scored(wins("wa", "wb", "a=b"))
  assert (found, report.judgements_used, report.ties) == (["w > a = b"], 3, 1)
  found, _, report = scored(wins("ab", "b=c"), ties="drop")
  assert (found, report.dropped) == (["a > b"], {"ties_dropped": 1})


def test_scores_of_soft_votes_and_weights():
  rows = [("p", "a", "b", 0.7), ("p", "c", "b", 0.3)]
  found, scores, report = scored(rows)
  assert (found, scores) == (["a > b > c"], {"a": 0.7, "b": 0.5, "c": 0.3})
  assert report.judgements_used == 2
  # 0.7 and 1 - 0.3 are the same share, though not the same fp32.
  both = [("p", "a", "x", 0.7), ("p", "x", "b", 0.3)]
  assert scored(both)[0] == ["a = b > x"]
  # a is tied with the best; c is compared with a, not with b: ties do not chain.
  found, _, report = scored(rows, tie_tolerance=0.2)
  assert (found, report.dropped) == (["a = b > c"], {"against_scores": 1})
  assert scored(rows, tie_tolerance=0.19)[0] == ["a > b > c"]
  assert scored(rows, tie_tolerance=0.4)[2].all_tied == 2
  # It is the pooled shares that are compared, not the two of each judgement.
  near = [("p", "a", "b", 0.55), ("p", "b", "c", 0.7)]
  found, scores, _ = scored(near, tie_tolerance=0.1)
  assert (found, scores) == (["b = a > c"], {"a": 0.55, "b": 0.575, "c": 0.3})
  # In floating point 0.55 - 0.45 is more than 0.1.
  assert scored([("p", "a", "b", 0.55)], tie_tolerance=0.1)[2].all_tied == 1
  source = judgements(wins("ab", "ba"), weights=[3, 1])
  found, scores, report = scored(source)
  assert (found, scores) == (["a > b"], {"a": 0.75, "b": 0.25})
  found, _, report = scored(judgements(wins("ab", "bc"), weights=[1, 0]))
  assert found == ["a > c > b"]  # c lost what weighs nothing: half
  assert report.dropped == {"against_scores": 1}


def test_scores_longer_than_max_size():
  found, _, report = scored(wins("wa", "wb", "wc", "wd", "we"), max_size=3)
  assert (found, report.judgements_used) == (["w > a = b", "w > c = d", "w > e"], 5)
  # All play all: 1, 2/3, 1/3, 0. In lists of two only the neighbours meet.
  everyone = wins("ab", "ac", "ad", "bc", "bd", "cd")
  found, scores, report = scored(everyone, max_size=2)
  assert found == ["a > b", "b > c", "c > d"]
  assert scores == {"a": 1, "b": 0.666667, "c": 0.333333, "d": 0}
  assert (report.judgements_used, report.dropped) == (3, {"split_apart": 3})
  # a and d tie and are never in one list; nobody judged the images of the lower lists.
  rows = wins("wa", "wb", "wc", "wd", "a=d")
  source = judgements(rows, weights=[0.25, 0.5, 0.5, 0.25, 1])
  found, _, report = scored(source, max_size=2)
  assert found == ["d > b", "d > c", "w > a", "w > d"]
  assert report.dropped == {"ties_not_expressible": 1, "split_apart": 2}
  built, _ = lists.build(source, "scores", max_size=2, weight="num_example_per_prompt")
  assert built.weight.tolist() == [0.5, 0.5, 0.25, 0.25]
  # Too many tie for best: they are in no list, nor are the judgements among them.
  found, _, report = scored(wins("az", "bz", "cz", "dz"), max_size=3)
  assert (found, report.dropped) == (["d > z"], {"split_apart": 3})


@pytest.mark.parametrize("group_by", lists.GROUPS)
def test_scores_account_for_every_judgement(group_by):
  # Counted again without arrays: shares, and what the finished lists say of each.
  source = random_judgements(600, 20, 8)
  built, report = lists.build(source, "scores", group_by=group_by, max_size=4)
  won, total, rank_in, members = {}, {}, [], {}
  for i in range(len(source)):
    label, user = float(source.label[i]), int(source.user[i])
    if np.isnan(label):
      continue
    group = (int(source.prompt[i]), user if group_by == "prompt_user" else -1)
    for image, share in ((source.image_a[i], label), (source.image_b[i], 1 - label)):
      key = (*group, int(image))
      won[key] = won.get(key, 0) + share * float(source.weight[i])
      total[key] = total.get(key, 0) + float(source.weight[i])
  for i in range(len(built)):
    span = slice(built.offsets[i], built.offsets[i + 1])
    group = (int(built.prompt[i]), int(built.user[i]))
    ranks = dict(zip(built.image[span].tolist(), built.rank[span].tolist()))
    for image, score in zip(built.image[span].tolist(), built.score[span].tolist()):
      key = (*group, image)
      assert score == pytest.approx(won[key] / total[key], abs=1e-6)
      members.setdefault(key, set()).add(len(rank_in))
    assert sorted(ranks.values()) == list(ranks.values())
    rank_in.append(ranks)
  used = 0
  for i in range(len(source)):
    label, user = float(source.label[i]), int(source.user[i])
    group = (int(source.prompt[i]), user if group_by == "prompt_user" else -1)
    a, b = int(source.image_a[i]), int(source.image_b[i])
    both = members.get((*group, a), set()) & members.get((*group, b), set())
    margins = {rank_in[j][b] - rank_in[j][a] for j in both}
    used += any(np.sign(margin) == np.sign(label - 0.5) for margin in margins)
  assert report.judgements_used == used
  assert report.judgements_total == 600


def test_user_grouping():
  rows = wins("ab", "bc", "ba")
  source = judgements(rows, users=["x", "x", "y"])
  found, report = build(source, "paths", group_by="prompt_user")
  assert found == ["a > b > c", "b > a"]
  assert report.contradictions == 0
  built, _ = lists.build(source, "paths", group_by="prompt_user")
  assert [built.users[u] for u in built.user] == ["x", "y"]
  pooled, _ = lists.build(source, "paths")
  assert pooled.user.tolist() == [-1]
  assert readable(pooled) == ["b > c"]
  unknown = dataclasses.replace(source, users=[], user=np.full(3, -1))
  assert lists.build(unknown, "paths", group_by="prompt_user")[0].user.tolist() == [-1]


def test_weights():
  rows = wins("ab", "ab", "bc") + wins("xy", prompt="q")
  source = judgements(rows, weights=[0.5, 0.25, 0.75, 0.125])
  built, _ = lists.build(source, "paths")
  assert built.weight.tolist() == [1.0, 1.0]
  built, _ = lists.build(source, "paths", weight="num_example_per_prompt")
  assert built.weight.tolist() == [0.5, 0.125]
  built, _ = lists.build(source, "pairs", weight="num_example_per_prompt")
  assert built.weight.tolist() == [0.25, 0.5, 0.75, 0.125]


def test_list_ids_are_about_the_list_only():
  one, _ = lists.build(judgements(wins("ab", "bc")), "paths")
  more, _ = lists.build(
    judgements(wins("xy", prompt="before") + wins("ab", "bc") + wins("zz")), "paths"
  )
  assert one.list_id.dtype == np.uint32
  assert one.list_id[0] in more.list_id
  assert len(set(more.list_id.tolist())) == 2
  # The ranks do not matter, the prompt does.
  turned, _ = lists.build(judgements(wins("cb", "ba")), "paths")
  assert turned.list_id.tolist() == one.list_id.tolist()
  other, _ = lists.build(judgements(wins("ab", "bc", prompt="other")), "paths")
  assert other.list_id[0] != one.list_id[0]
  # Pinned: changing the hash would change the noise of every run.
  assert one.list_id.tolist() == [2992272710]
  repeated, _ = lists.build(judgements(wins("ab", "ab", "ba")), "pairs")
  assert len(set(repeated.list_id.tolist())) == 3


def random_judgements(count, prompts, images, seed=0):
  rng = np.random.default_rng(seed)
  prompt = rng.integers(0, prompts, count)
  first = rng.integers(0, images, count)
  second = (first + rng.integers(1, images, count)) % images
  return Judgements(
    prompts=[f"prompt {i}" for i in range(prompts)],
    image_uids=[f"{i:05d}" for i in range(prompts * images)],
    users=[f"{i}" for i in range(7)],
    prompt=prompt.astype(np.int32),
    user=rng.integers(-1, 7, count).astype(np.int32),
    image_a=(prompt * images + first).astype(np.int32),
    image_b=(prompt * images + second).astype(np.int32),
    label=rng.choice([0, 0.5, 1, np.nan], count, p=[0.4, 0.15, 0.4, 0.05]).astype("f"),
    weight=rng.random(count).astype(np.float32),
  )


def shuffled(source, seed):
  """The same judgements in other rows, other indices and with sides swapped."""
  rng = np.random.default_rng(seed)
  rows = rng.permutation(len(source))
  new = {}
  maps = {}
  for name in ("prompts", "image_uids", "users"):
    texts = getattr(source, name)
    order = rng.permutation(len(texts))
    new[name] = [texts[i] for i in order]
    maps[name] = np.append(np.argsort(order), -1).astype(np.int32)
  swap = rng.random(len(source)) < 0.5
  a, b = source.image_a[rows], source.image_b[rows]
  return dataclasses.replace(
    source,
    **new,
    prompt=maps["prompts"][source.prompt[rows]],
    user=maps["users"][source.user[rows]],
    image_a=maps["image_uids"][np.where(swap, b, a)],
    image_b=maps["image_uids"][np.where(swap, a, b)],
    label=np.where(swap, 1 - source.label[rows], source.label[rows]),
    weight=source.weight[rows],
  )


def spelled(built):
  uids = [built.image_uids[i] for i in built.image]
  users = [built.users[i] if i >= 0 else None for i in built.user]
  prompts = [built.prompts[i] for i in built.prompt]
  columns = (built.list_id, built.offsets, built.rank, built.score, built.weight)
  return prompts, uids, users, [column.tolist() for column in columns]


@pytest.mark.parametrize("group_by", lists.GROUPS)
@pytest.mark.parametrize("strategy", lists.STRATEGIES)
def test_nothing_depends_on_the_order_of_rows(strategy, group_by):
  source = random_judgements(600, 20, 8)
  options = dict(group_by=group_by, max_size=4, weight="num_example_per_prompt")
  built, report = lists.build(source, strategy, **options)
  for seed in range(3):
    again, other = lists.build(shuffled(source, seed), strategy, **options)
    assert spelled(again) == spelled(built)
    assert other == report
  assert built.lengths.max() <= 4
  assert [built.prompts[i] for i in built.prompt] == sorted(
    built.prompts[i] for i in built.prompt
  )


@pytest.mark.parametrize("max_size", [2, 3, 8])
@pytest.mark.parametrize("strategy", ["paths", "levels"])
def test_every_list_agrees_with_the_order_it_came_from(strategy, max_size):
  # Property: within a list no stated win is reversed, and every win is in some list.
  rng = np.random.default_rng(max_size)
  for _ in range(40):
    count = int(rng.integers(3, 9))
    edges = {
      tuple(sorted(rng.choice(count, 2, replace=False).tolist()))
      for _ in range(int(rng.integers(1, 14)))
    }
    ranking = rng.permutation(count).tolist()
    wins_ = [(ranking[a], ranking[b]) for a, b in sorted(edges)]
    ties = [(a, b) for a in range(count) for b in range(a) if rng.random() < 0.1]
    ties = [(b, a) for a, b in ties if (a, b) not in wins_ and (b, a) not in wins_]
    if strategy == "paths":
      ties = []
    component = orders.Component(count, wins_, ties)
    outcome = getattr(orders, strategy)(component, max_size)
    assert not outcome.cut
    stated = [i for made in outcome.lists for i in made.wins]
    assert sorted(stated) == list(range(len(wins_)))
    for made in outcome.lists:
      assert 2 <= len(made.images) <= max_size
      assert len(set(made.images)) == len(made.images)
      rank = dict(zip(made.images, made.ranks))
      assert all(rank[wins_[i][0]] < rank[wins_[i][1]] for i in made.wins)
      assert all(rank[ties[i][0]] == rank[ties[i][1]] for i in made.ties)
      assert sorted(set(made.ranks)) == list(range(max(made.ranks) + 1))


def test_order_matches_brute_force_reachability():
  rng = np.random.default_rng(0)
  for _ in range(60):
    count = 7
    order, above = orders.Order(count), np.eye(count, dtype=bool)
    group = list(range(count))
    for _ in range(25):
      a, b = rng.choice(count, 2, replace=False).tolist()
      x, y = group[a], group[b]
      if rng.random() < 0.7:
        fits = x != y and not above[y, x]
        assert order.prefer(a, b) == fits
        if fits:
          above |= np.outer(above[:, x], above[y])
      else:
        fits = x == y or not (above[x, y] or above[y, x])
        assert order.equate(a, b) == fits
        if fits:
          group = [x if g == y else g for g in group]
          above |= np.outer(above[:, x] | above[:, y], above[x] | above[y])


def test_finished_lists_are_split_and_checked():
  base, _ = lists.build(judgements(wins("ab")), "paths")
  uids = list("abcdefghij")
  ranked = dataclasses.replace(
    base,
    prompts=["q", "p"],
    prompt=np.array([0, 1, 0, 1], np.int32),
    image_uids=uids,
    user=None,
    weight=np.array([1, 2, 1, 1], np.float32),
    offsets=np.array([0, 3, 8, 9, 11]),
    image=np.array([2, 1, 0, 3, 4, 5, 6, 7, 8, 8, 9], np.int32),
    rank=np.array([1, 1, 0, 0, 1, 1, 1, 2, 0, 0, 0], np.int32),
    score=np.array([1, 2, 3, 5, 4, 3, 2, 1, 0, 1, 0], np.float32),
  )
  found, report = build(ranked, "paths")
  assert found == ["a > b = c", "d > e = f = g > h"]
  assert (report.judgements_total, report.judgements_used) == (4, 2)
  assert report.lists_dropped == {"single image": 1, "all tied": 1}
  built, _ = lists.build(ranked, "paths")
  assert built.weight.tolist() == [2, 1]  # sorted by prompt text
  assert built.score.tolist() == [5, 4, 3, 2, 1, 3, 2, 1]
  assert build(ranked, "scores")[0] == ["a > b > c", "d > e > f > g > h", "i > j"]
  assert build(ranked, "choice")[0] == ["a > b = c", "d > e = f = g = h"]
  assert len(build(ranked, "pairs")[0]) == 2 + 4 + 3
  # The best by itself, also where all tie or nothing is below.
  assert build(ranked, "winners")[0] == ["a", "d", "i", "i", "j"]
  found, report = build(ranked, "levels", max_size=3)
  assert found == ["a > b = c", "d > e = f", "d > g > h"]
  assert report.judgements_used == 2
  with pytest.raises(UserError, match="scores"):
    lists.build(dataclasses.replace(ranked, score=ranked.score * 0), "scores")


def test_pairs_of_a_long_list_are_refused_before_they_are_made():
  begin = time.process_time()
  with pytest.raises(UserError, match=r"4,498,500 lists .* 3,000 images.*'groups'"):
    orders.all_pairs(range(3000), 8)
  assert time.process_time() - begin < 1
  assert len(orders.all_pairs(range(316), 8)) == 316 * 315 // 2 == 49_770
  with pytest.raises(UserError, match="50,086 lists"):
    orders.all_pairs(range(317), 8)
  # It is the pairs that count, not the images.
  assert len(orders.all_pairs([0] + [1] * 3000, 8)) == 3000


def test_windows_keep_an_order_in_each():
  assert orders.windows([0] * 5 + [1], 3) == [([3, 4, 5], [0, 0, 1])]
  assert orders.windows([0, 1, 2, 3], 2) == [
    ([0, 1], [0, 1]),
    ([1, 2], [0, 1]),
    ([2, 3], [0, 1]),
  ]


def test_refusals():
  source = judgements(wins("ab"))
  with pytest.raises(UserError, match="did you mean 'paths'"):
    lists.build(source, "path")
  with pytest.raises(UserError, match="prompt_user"):
    lists.build(source, group_by="user")
  with pytest.raises(UserError, match="max_list_size is 1"):
    lists.build(source, max_size=1)
  with pytest.raises(UserError, match="needs ranked lists"):
    lists.build(source, "winners")
  with pytest.raises(UserError, match=r"paths, levels.*'choice', the objective sft"):
    lists.build(source, "winners")
  with pytest.raises(UserError, match="'levels', or 'scores'"):
    lists.build(source, "groups")
  built, report = lists.build(judgements(wins("a=b", "cc")), "paths")
  assert len(built) == 0 and built.offsets.tolist() == [0]
  with pytest.raises(UserError, match="1 same_image, 1 ties_not_expressible"):
    lists.refuse_empty(report)
  nothing = dataclasses.replace(source, prompts=[], image_uids=[], users=[])
  nothing = dataclasses.replace(
    nothing,
    **{name: getattr(source, name)[:0] for name in ("prompt", "user", "image_a")},
    **{name: getattr(source, name)[:0] for name in ("image_b", "label", "weight")},
  )
  for strategy in lists.STRATEGIES:
    assert len(lists.build(nothing, strategy)[0]) == 0


def test_report_is_ready_for_json():
  import json

  _, report = lists.build(judgements(wins("ab", "bc", "a=b")), "levels")
  values = json.loads(json.dumps(report.as_dict()))
  assert values["lengths"] == {"3": 1}
  assert values["dropped"] == {"outvoted": 1}
  assert values["strategy"] == "levels"


@pytest.mark.parametrize("strategy", lists.STRATEGIES)
def test_fifty_thousand_judgements_take_seconds(strategy):
  source = random_judgements(50_000, 3_000, 10)
  begin = time.process_time()
  _, report = lists.build(source, strategy)
  assert time.process_time() - begin < 15
  assert report.judgements_total == 50_000
