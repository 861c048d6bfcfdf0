#!/usr/bin/env bash
# Runs jobs one after another, each again as long as it stops early with exit 3.
#
#   bash launch/run.sh --config FILE --workdir DIR [--jobs cache,train] [--dry-run]
#       [--config.path.to.key=value ...]
#
# PYTHON is the interpreter (default python3). TERM and INT are passed on to the job as
# TERM; what then exits with 3 is not started again. Exit: 0 when all jobs are done, else
# what the job gave.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/shared.sh
. "$here/shared.sh"

while [ $# -gt 0 ]; do
  case "$1" in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    *) take_main "$@"; shift "$taken" ;;
  esac
done
need_run

child=
stopped=
pass_on() {
  stopped=yes
  [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true
}
trap pass_on TERM INT

# Runs one job to its own end; its exit code is in `code`.
run_once() {
  "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  # A signal ends `wait` before the job has ended.
  while kill -0 "$child" 2> /dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=
}

for job in ${jobs//,/ }; do
  command=("${PYTHON:-python3}" -m lpo_jax.main --config "$config" --workdir "$workdir"
    --job "$job" ${main[@]+"${main[@]}"})
  if [ -n "$dry" ]; then
    quoted "${command[@]}"
    continue
  fi
  while true; do
    run_once "${command[@]}"
    if [ "$code" != 3 ] || [ -n "$stopped" ]; then break; fi
    echo "run.sh: the job stopped early and is saved; it goes on with the same command" >&2
  done
  [ "$code" = 0 ] || exit "$code"
done
