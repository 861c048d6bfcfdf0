#!/usr/bin/env bash
# Fresh machine -> virtual environment -> the quickstart, report.html at the end.
#
#   bash launch/quickstart.sh [--workdir DIR] [--config.path.to.key=value ...]
#
# PYTHON chooses the interpreter (default python3, 3.11 to 3.13), VENV the environment
# (default .venv beside this checkout). Runs on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$here/launch/environment.sh"
make_environment "${here}[quickstart]"

workdir=runs/quickstart
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --workdir) workdir=$2; shift 2 ;;
    --workdir=*) workdir=${1#--workdir=}; shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec "$VENV/bin/python" -m lpo_jax.main --config "$here/configs/quickstart.py" \
  --workdir "$workdir" "${arguments[@]+"${arguments[@]}"}"
