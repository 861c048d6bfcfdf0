#!/usr/bin/env bash
# The table of docs/tpu.md: Stable Diffusion 1.5 and SDXL, all weights and factors, for
# three slices of 8 and a pod's part of 64.
#
#   bash benchmarks/tpu_plans.sh WORKDIR [further --config... overrides]
#
# Needs the extra `tpu` and no TPU; minutes of a processor for each row. What is done is
# kept in WORKDIR, and the same command goes on from there.
set -uo pipefail
work=${1:?usage: bash benchmarks/tpu_plans.sh WORKDIR}
shift
python=${PYTHON:-python}
sd15=stable-diffusion-v1-5/stable-diffusion-v1-5
sdxl=stabilityai/stable-diffusion-xl-base-1.0

# plan NAME IMAGES_AT_ONCE_A_CHIP CONFIG [overrides]: v5p-8 has 4 chips
plan() {
  local name=$1 at_once=$2 config=$3 target chips
  shift 3
  for target in v5e-8 v5p-8 v6e-8 v5e-64; do
    case $target in v5p-8) chips=4 ;; v5e-64) chips=64 ;; *) chips=8 ;; esac
    "$python" -m lpo_jax.main --job plan --workdir "$work/$name-$target" \
      --config "configs/$config.py" --config.plan.topology=$target \
      --config.mesh.data=1 --config.mesh.fsdp=-1 \
      --config.train.microbatch=$((at_once * chips)) "$@" >&2
  done
}

plan 1-sd15 16 lpo_sd15 --config.model.path=$sd15 "$@"
plan 2-sdxl-lora 2 lpo_sdxl_lora --config.model.path=$sdxl \
  --config.train.images_per_update=256 "$@"
plan 3-sdxl 2 lpo_sdxl "$@"
plan 4-sd15-lora 16 lpo_sd15 --config.model.path=$sd15 --config.model.lora.rank=8 "$@"

tables=("$work"/*/plan.md)
head -n 2 "${tables[0]}"
tail -q -n +3 "${tables[@]}"
