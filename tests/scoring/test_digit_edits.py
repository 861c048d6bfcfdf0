"""The editing quickstart's world: what is asked, and what people think of an edit."""

import numpy as np
import pytest

from lpo_jax.errors import UserError
from lpo_jax.scoring import digit_edits, digits, scorers


@pytest.fixture(scope="module")
def sources():
  return digits.real_digits()[0][:40]


def test_edits_do_what_they_say(sources):
  def done(text, by=1.0):
    return digit_edits.edit(sources, [text] * len(sources), by)

  bold, lean = digits.boldness, digits.slant
  assert np.all(bold(done("make it bold")) > bold(sources) * 1.2)
  assert np.all(bold(done("make it thin")) < bold(sources) * 0.9)
  # The slant of a shear is added: a row is moved TILT columns per row climbed.
  for text, sign in (("tilt it right", 1), ("tilt it left", -1)):
    moved = lean(done(text)) - lean(sources)
    np.testing.assert_allclose(moved, sign * digit_edits.TILT, atol=0.02)
    half = lean(done(text, 0.5)) - lean(sources)
    np.testing.assert_allclose(half, sign * digit_edits.TILT / 2, atol=0.02)
    np.testing.assert_allclose(bold(done(text)), bold(sources), rtol=0.02)
  for text in digit_edits.EDITS:
    assert np.abs(done(text, 0.0).astype(int) - sources).max() <= 1
  with pytest.raises(UserError, match="did you mean 'make it bold'"):
    digit_edits.edit(sources[:1], ["make it bolt"])


def test_the_match_is_dices_overlap(sources):
  asked = list(digit_edits.EDITS) * 10
  judge = scorers.get("digits_edit")
  exact = digit_edits.edit(sources, asked)
  np.testing.assert_allclose(judge(exact, asked, sources=[*sources]), 1.0)
  untouched = judge(sources, asked, sources=[*sources])
  other = judge(np.roll(exact, 4, axis=0), asked, sources=[*sources])
  assert np.all(untouched < 0.95) and other.mean() < untouched.mean()
  # By hand: half of the page's ink where twice as much is wanted.
  page = np.full((1, 32, 32, 3), 255, np.uint8)
  wanted = page.copy()
  wanted[0, :, :, :] = 0
  mine = page.copy()
  mine[0, :16] = 0
  score = digit_edits.match(mine, ["make it bold"], wanted)
  assert score == pytest.approx(2 * 0.5 / 1.5)


def test_the_reader_reads_edits_as_their_sources(sources):
  asked = list(digit_edits.EDITS) * 10
  judge = scorers.get("digits_kept")
  exact = digit_edits.edit(sources, asked)
  assert judge(exact, asked, sources=[*sources]).mean() > 0.95
  assert judge(np.roll(exact, 4, axis=0), asked, sources=[*sources]).mean() < 0.5
  with pytest.raises(UserError, match="needs the sources"):
    judge(exact, asked)
