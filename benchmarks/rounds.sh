#!/usr/bin/env bash
# Two rounds of LPO on the model's own digits, ranked by the taste: the table of
# docs/online.md. Draw with the last round's model, rank, train, export, again.
#
#   bash benchmarks/rounds.sh runs/rounds
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?a folder for the rounds}
DIGITS=lpo_jax/assets/digits_base
RUN="python -m lpo_jax.main --config configs/quickstart.py"
mkdir -p "$OUT"
python - "$OUT/prompts.txt" <<'PROMPTS'
import sys
from lpo_jax.scoring import digits
with open(sys.argv[1], "w") as file:
  file.write("\n".join(digits.prompts(digits.TRAIN_PHRASES)))
PROMPTS
MODEL=$DIGITS
for ROUND in 1 2; do
  HERE=$OUT/round$ROUND
  for JOB in generate cache train export; do
    $RUN --job $JOB --workdir "$HERE" --config.model.path="$MODEL" \
      --config.data.path="$HERE/lists.parquet" \
      --config.generate.prompts="$OUT/prompts.txt" \
      --config.generate.images_per_prompt=8 --config.generate.first_seed=1000000 \
      --config.generate.scorers="('digits_taste',)" \
      --config.train.total_steps=60 --config.train.checkpoint_every=60
  done
  MODEL=$HERE/export
done
$RUN --job evaluate --workdir "$OUT/evaluation" --config.model.path=$DIGITS \
  --config.eval.candidates.base=$DIGITS \
  --config.eval.candidates.round1="$OUT/round1/export" \
  --config.eval.candidates.round2="$OUT/round2/export" --config.eval.seeds=10
