"""The quickstart's base model: real digits, an autoencoder, a UNet by `sft`.

Reproduces lpo_jax/assets/digits_base, the 3 MB pipeline that ships:

  python -m lpo_jax.main --config configs/quickstart_base.py --workdir runs/quickstart_base

Hardware: 2 CPU cores, about 20 minutes. Expected: an independent reader recognises at
least 85 % of its samples (the figure reached is in the model card it writes).
`:smoke` runs the same code for a few steps.

The networks have the fields of the real config.json files. Unpublished sizes; chosen
because XLA's convolutions on a CPU are fast and attention over many tokens is not:
attention only where the latents are 4 x 4, two heads wide enough to be one matmul each.
"""

from lpo_jax.configs import quickstart

NETWORKS = {
  "unet": {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,  # the number of heads, as in all SD 1.x configs
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
  },
  "vae": {
    "_class_name": "AutoencoderKL",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
  },
  "text_encoder": {
    "architectures": ("CLIPTextModel",),
    "model_type": "clip_text_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
  },
  # SD 1.5's forward process; "trailing" starts sampling at pure noise (Lin et al. 2024).
  "scheduler": {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
  },
}


def get_config(size: str = ""):
  """Returns the config that made the shipped base, or `smoke` for a few steps of it."""
  config = quickstart.get_config(size)
  with config.unlocked():
    config.quickstart = {
      "make": "base",
      "base": {
        "networks": NETWORKS,
        "autoencoder": {
          "seed": 0,
          "steps": 800,
          "batch_size": 32,
          "learning_rate": 2e-3,
          "kl_weight": 1e-3,
        },
      },
    }
    config.objective = {"name": "sft"}
  config.data.strategy = "winners"
  config.train.images_per_update = 64
  config.train.total_steps = 3000
  config.train.learning_rate = 2e-3
  config.train.warmup_steps = 100
  config.train.ema = 0.999
  config.train.optimizer_args = {"weight_decay": 0.0}
  config.train.checkpoint_every = 500
  config.train.keep_last = 1
  config.eval.seeds = 20
  if size == "smoke":
    config.quickstart.base.autoencoder.steps = 4
    config.train.total_steps = 4
    config.train.checkpoint_every = 4
    config.train.warmup_steps = 2
    config.eval.seeds = 1
  return config
