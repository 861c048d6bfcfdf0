"""What of a ranking to enforce: the rank-enforcement ablation of Diffusion-LPO.

On the quickstart's digits, where simulated people rank twelve images at once: whole
lists, all pairs, neighbours, the winner against the rest, ranks without meaning, and
maximum list sizes 2, 4, 8 and 12 (`full`), each over two betas and three seeds.

  python -m lpo_jax.main --config configs/ablation_ranks.py --workdir runs/ablation_ranks

Hardware: 2 CPU cores, about half an hour with little else to do (estimated from single
runs; it says before it begins, and can be stopped and gone on with), and 2 GB of disk.
Expected: at a drift of 2.0e-3 `full`, `all_pairs`, `size8` and `size4` gain 0.12 to 0.14
of taste and cannot be told apart, `winner` 0.04 and `shuffled` nothing; at most one point
of legibility is lost. See docs/ablation.md. `:smoke` is two methods, one beta and one
seed for four updates, with too few images for any claim.

The paper has no public code and does not name its betas. Numbers without a source are
ours, the quickstart's where it has them.
"""

from lpo_jax.configs import quickstart


def get_config(size: str = ""):
  """Returns the full ablation, or the one for smoke tests."""
  config = quickstart.get_config(size)
  config.job = "ablation"
  world = config.quickstart
  with config.unlocked():
    world.judging = "rank"
    world.images_per_session = 12  # the paper's longest maximum list size
    world.sessions = 100
    # At the quickstart's 0.5 the first checkpoint wins 94 %: nothing is left to compare.
    world.temperature = 2.0
    # Arms: what differs; images an update, updates and judged images do not.
    world.methods = {
      "full": {},
      "all_pairs": {"objective": {"name": "all_pairs"}},
      # Windows of two in a ranked list: each image against the next better one.
      "adjacent": {"data": {"max_list_size": 2}},
      "winner": {"data": {"strategy": "choice"}},
      "shuffled": {"data": {"ranks": "shuffled"}},
      "size2": {"data": {"strategy": "groups", "max_list_size": 2}},
      "size4": {"data": {"strategy": "groups", "max_list_size": 4}},
      "size8": {"data": {"strategy": "groups", "max_list_size": 8}},
    }
    # Charts of the report, with the methods in each.
    world.panels = {
      "what_is_enforced": ("full", "all_pairs", "adjacent", "winner", "shuffled"),
      "maximum_list_size": ("full", "size8", "size4", "size2"),
    }
    world.betas = (500.0, 2000.0)  # the last is Diffusion-DPO's for SD1.5
    world.seeds = (0, 1, 2)
    # Images a second, and seconds a run besides (tracing, loading what was compiled), as
    # seen with single runs on 2 cores with little else to do. For the estimate alone.
    world.pace = {"trained": 200.0, "drawn": 60.0, "overhead": 15.0}
  config.data.max_list_size = 12
  config.train.images_per_update = 48  # whole lists of 12, of 8 and 4, and of 2
  config.train.total_steps = 60
  config.train.warmup_steps = 10
  config.train.learning_rate = 1.6e-4  # twice the quickstart's, for fewer updates
  config.train.ema = 0.9
  config.train.checkpoint_every = 15
  config.train.keep_last = 4  # all: a frontier is made of them
  config.eval.seeds = 5  # runs of other seeds scatter far more than a run's images
  config.eval.steps = 6  # of the candidates too
  if size == "smoke":
    with config.unlocked():
      world.sessions = 8
      world.methods = {"full": {}, "shuffled": {"data": {"ranks": "shuffled"}}}
      world.panels = {"what_is_enforced": ("full", "shuffled")}
      world.betas, world.seeds = (2000.0,), (0,)
    config.train.images_per_update = 24
    config.train.total_steps = 4
    config.train.checkpoint_every = 2
    config.eval.seeds = 1
    config.eval.batch_size = 20
    config.eval.steps = 4
  return config
