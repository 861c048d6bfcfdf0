"""A world in which a step takes a millisecond: a linear network on 2 x 2 latents.

Also run by path (`runpy`) in processes with several devices.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpo_jax import objectives, parallel, tables
from lpo_jax.diffusion import noising, schedule
from lpo_jax.training import optimizer, state, step
from lpo_jax.types import Batch, Conditioning, Ranking

TABLES = schedule.from_config(
  {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
# Lists of 5, 4 and 3 images in 12 slots: they straddle any microbatch.
LISTS = (5, 4, 3)
RANKS = ((0, 1, 2, 3, 4), (2, 0, 1, 1, 0), (0, 1, 1, 0, 0))
# Every objective, with a beta that this world's errors of about 1 do not saturate.
HYPER = {
  name: {"beta": 3.0} if "beta" in tables.options_of(fn) else {}
  for name, fn in objectives.OBJECTIVES.items()
}
HYPER |= {"dpo": {"beta": 30.0}, "lpo": {"beta": 30.0}}
HYPER["poly_dpo"] |= {"alpha": 0.5}
# Its published 1000 multiplies every rounding by as much.
HYPER["mapo"] |= {"sharpness": 10.0}
HYPER["lair"] |= {"temperature": 0.2, "penalty": 1.0}


def unet(params, latents, timesteps, prompt_embeds, pooled=None, time_ids=None):
  """Linear in everything, and different for every slot."""
  del pooled, time_ids
  text = prompt_embeds.mean(1) @ params["text"]["kernel"]
  time = timesteps[:, None].astype(jnp.float32) / 1000 * params["time"]["scale"]
  x = latents @ params["out"]["kernel"] + params["out"]["bias"]
  return x + (text + time)[:, None, None, :]


def make_params(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)

  return {
    "out": {"kernel": draw(4, 4), "bias": draw(4)},
    "text": {"kernel": draw(3, 4)},
    "time": {"scale": draw(4)},
  }


def make_batch(seed=0, lists=LISTS, ranks=RANKS):
  """Lists one after the other in the slots."""
  rng, slots, most = np.random.default_rng(seed), sum(lists), max(lists)
  starts = np.cumsum([0, *lists[:-1]])
  valid = np.arange(most) < np.asarray(lists)[:, None]
  rank = np.asarray(ranks, np.int32)[:, :most]
  return Batch(
    moments=rng.standard_normal((slots, 2, 2, 8)).astype(np.float32),
    conditioning=Conditioning(rng.standard_normal((slots, 2, 3)).astype(np.float32)),
    identity=np.stack(
      [np.repeat(np.arange(len(lists)) + 100, lists), np.full(slots, seed)], 1
    ).astype(np.uint32),
    item=np.concatenate([np.arange(n) for n in lists]).astype(np.uint32),
    slot=np.where(valid, starts[:, None] + np.arange(most), 0).astype(np.int32),
    ranking=Ranking(
      rank=rank,
      valid=valid,
      score=np.where(valid, 1 / (1 + rank), 0).astype(np.float32),
      weight=np.asarray([1.0, 2.0, 0.5, 1.5], np.float32)[: len(lists)],
    ),
  )


def make_method(objective="lpo", **fields):
  defaults = {
    "unet": unet,
    "schedule": TABLES,
    "noising": noising.get("forward"),
    "objective": objectives.get(objective, **HYPER[objective]),
    "seed": 3,
    "scaling_factor": 0.5,
  }
  return step.Method(**{**defaults, **fields})


def every_objective(microbatch):
  """Compiles (params, ref_params, batch) -> losses of all objectives, and gradients."""
  method = make_method(microbatch=microbatch)

  def losses(params, ref_params, batch):
    noised = method.noising(batch, method.schedule, 3, scaling_factor=0.5)
    scalars = step.slot_scalars(method, params, ref_params, noised, batch.conditioning)
    denoising = step.to_lists(scalars, batch.slot)
    every = [objectives.get(name, **hyper) for name, hyper in HYPER.items()]
    return jnp.stack([fn(denoising, batch.ranking)[0] for fn in every])

  return jax.jit(lambda *args: (losses(*args), jax.jacrev(losses)(*args)))


class Run:
  """A compiled step with its state, as the train job puts them together."""

  def __init__(
    self,
    *,
    method=None,
    params=None,
    ref_params=None,
    mesh=None,
    ema_decay=None,
    batch=None,
    optimizer_name="adamw",
    **optimizer_args,
  ):
    self.mesh = mesh or parallel.make_mesh(devices=jax.devices()[:1])
    self.method = method or make_method()
    params = make_params(0) if params is None else params
    ref_params = make_params(1) if ref_params is None else ref_params
    self.optimizer = optimizer.build(
      optimizer_name, params, **{"learning_rate": 0.01, **optimizer_args}
    )
    shardings = parallel.param_shardings(params, self.mesh)
    like = state.placement(
      self.mesh,
      params,
      self.optimizer,
      with_ema=ema_decay is not None,
      shardings=shardings,
    )
    self.state = state.place(like, parallel.put(params, shardings), self.optimizer)
    self.ref_params = None
    if self.method.has_reference:
      self.ref_params = parallel.put(ref_params, shardings)
    self.compiled = step.compile_train_step(
      self.mesh,
      self.state,
      self.ref_params,
      self.place(batch or make_batch()),
      method=self.method,
      optimizer=self.optimizer,
      ema_decay=ema_decay or 0.0,
    )

  def place(self, batch):
    return parallel.global_batch(self.mesh, batch)

  def __call__(self, batch=None):
    """One update; returns its metrics as floats."""
    self.state, metrics = self.compiled(
      self.state, self.ref_params, self.place(batch or make_batch())
    )
    return {name: float(x) for name, x in metrics.items()}

  @property
  def params(self):
    """Copies: a view of a buffer would change when it is donated."""
    return jax.tree.map(np.array, parallel.fetch(self.state.params))


@pytest.fixture(scope="session")
def world():
  """The names of this file."""
  return types.SimpleNamespace(**globals())


@pytest.fixture(scope="session")
def value_and_grad(world):
  """Loss, metrics and gradient of a method made of these options, on a batch."""

  @functools.cache
  def compiled(objective, **fields):
    method = world.make_method(objective, **fields)
    return jax.jit(
      jax.value_and_grad(
        lambda p, r, b: step.loss_and_metrics(method, p, r, b), has_aux=True
      ),
      compiler_options=step.COMPILER_OPTIONS,
    )

  def run(objective, batch=None, **fields):
    has_reference = make_method(objective).has_reference
    ref_params = make_params(1) if has_reference else None
    (loss, metrics), gradient = compiled(objective, **fields)(
      make_params(0), ref_params, batch or make_batch()
    )
    return float(loss), metrics, jax.tree.map(np.asarray, gradient)

  return run
