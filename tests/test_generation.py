"""What a generator refuses before it reads any weights."""

import pytest

from lpo_jax.errors import UserError
from lpo_jax.generation import Generator


def test_eta_is_refused_by_samplers_without_one():
  with pytest.raises(
    UserError, match=r"eval\.eta=0\.5: sampler 'euler'.*among: ddim\."
  ):
    Generator("nowhere", mesh=None, sampler="euler", eta=0.5)
  with pytest.raises(UserError, match="unknown sampler 'eular'"):
    Generator("nowhere", mesh=None, sampler="eular")
