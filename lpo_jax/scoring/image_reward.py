"""ImageReward: a network that reads the prompt while it looks at the image."""

from __future__ import annotations

from lpo_jax.models import blip
from lpo_jax.pretrained import checkpoints
from lpo_jax.scoring import preprocessing, tokens
from lpo_jax.scoring.networks import Network, NetworkScorer, Place

PUBLISHED = "THUDM/ImageReward"
FILES = ("ImageReward.pt",)
TOKENIZER = "google-bert/bert-base-uncased"
WAY = "crop_late"


class ImageReward(NetworkScorer):
  """(head(BLIP(image, prompt)) - 0.16717) / 1.03334.

  Args:
    place: where it runs.
    path: a file, a folder or an id on the Hub; empty: the published id.
    tokenizer: a folder or an id; empty: beside the weights, or else the published id.
  """

  name = "image_reward"
  version = "ImageReward-v1.0"
  measures = (
    "What people of ImageRewardDB preferred: ImageReward, in standard deviations; SD 1.5 "
    "gets about 0.1, SDXL about 0.8."
  )
  scale = "standard deviations of its training data, about -2.3 to 2.1"
  preprocessing = preprocessing.describe(WAY, 224)

  def __init__(self, place: Place, path: str, tokenizer: str):
    super().__init__(place)
    self._path, self._tokenizer = path or PUBLISHED, tokenizer

  def find(self) -> checkpoints.Checkpoint:
    return checkpoints.image_reward(self._path, FILES)

  def prepare(self, network: Network) -> None:
    model = network.model
    vision, text = blip.tower_fields(model.config)
    folder = tokens.find(
      self._tokenizer, self.checkpoint.file, TOKENIZER, tokens.BERT_FILES
    )
    self._size = vision["image_size"]
    self._tokens = tokens.BertTokens(folder, text["vocab_size"])
    self._rewards = network.jit(
      lambda params, *arrays: model.apply(params, *arrays).reward
    )

  def score(self, images, prompts, told):
    network = self.network
    ids, seen = self._tokens(prompts)
    return network.run(
      self._rewards,
      len(images),
      lambda rows: (
        preprocessing.prepare(images[rows], WAY, self._size),
        ids[rows],
        seen[rows],
      ),
      f"scoring with {self.name}",
      "images",
    )
