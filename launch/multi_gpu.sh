#!/usr/bin/env bash
# A run on the NVIDIA GPUs of one machine: makes the environment once, then one process
# that drives all of them.
#
#   bash launch/multi_gpu.sh --config FILE --workdir DIR [--jobs cache,train]
#       [--gpus 0,1] [--config.mesh.fsdp=8 ...] [--dry-run]
#
# --gpus: which ones (default all). Parameters are whole on each GPU unless
# --config.mesh.fsdp=N splits them among N. Ctrl-C saves and exits with 3; the same
# command goes on. PYTHON chooses the interpreter, VENV the environment.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/shared.sh
. "$here/launch/shared.sh"
# shellcheck source=launch/environment.sh
. "$here/launch/environment.sh"

gpus=
while [ $# -gt 0 ]; do
  case "$1" in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --gpus) gpus=${2:?--gpus has no value}; shift 2 ;;
    *) take_main "$@"; shift "$taken" ;;
  esac
done
need_run
need nvidia-smi "Install the NVIDIA driver; on a machine without GPUs use python -m lpo_jax.main."

[ -n "$dry" ] || make_environment "${here}[cuda]"
variables=(PYTHON="${dry:+.venv/bin/python}")
[ -n "$dry" ] || variables=(PYTHON="$VENV/bin/python")
[ -z "$gpus" ] || variables+=(CUDA_VISIBLE_DEVICES="$gpus")
script=launch/run.sh
[ -n "$dry" ] || script=$here/launch/run.sh
step exec env "${variables[@]}" bash "$script" --config "$config" --workdir "$workdir" \
  --jobs "$jobs" ${main[@]+"${main[@]}"}
