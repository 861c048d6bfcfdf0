#!/usr/bin/env bash
# A run on a Cloud TPU VM, on all of its workers: asks for the machine as a queued
# resource, installs a wheel of this checkout, and starts the run in the background.
#
#   bash launch/tpu_vm.sh --name NAME --zone ZONE --type v6e-8 --config configs/X.py
#       --workdir bucket/runs/NAME --bucket BUCKET [--jobs cache,train] [--spot]
#       [--watch] [--project P] [--runtime VERSION] [--install 'lpo_jax[tpu]==0.1.0']
#       [--hf-token-file FILE] [--pause SECONDS] [--config.path.to.key=value ...]
#       [--dry-run]
#   bash launch/tpu_vm.sh --existing NAME --zone ZONE --config ... --workdir ...
#   bash launch/tpu_vm.sh --existing NAME --zone ZONE --status | --log | --stop | --delete
#
# --name makes the machine if it is not there, and again if it was preempted; --existing
# takes one that is. Calling it again is safe: what is there and what runs is left alone.
# --bucket is mounted on every worker as `bucket`, and a --workdir in it outlives the
# machine; several workers and --spot need that. --watch stays, makes a preempted machine
# again and goes on, and ends with the run's exit code. --runtime defaults by --type.
# --stop saves the run; the machine costs until --delete. Relative paths are relative to
# lpo_jax_run in the home folder of the worker. --pause: between two looks (default 60).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/shared.sh
. "$here/launch/shared.sh"

name='' existing='' zone='' type='' runtime='' bucket='' spot='' watch='' project=''
requirement='' token_file='' action=begin pause=60
while [ $# -gt 0 ]; do
  case "$1" in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --name) name=${2:?--name has no value}; shift 2 ;;
    --existing) name=${2:?--existing has no value}; existing=yes; shift 2 ;;
    --zone) zone=${2:?--zone has no value}; shift 2 ;;
    --type) type=${2:?--type has no value}; shift 2 ;;
    --runtime) runtime=${2:?--runtime has no value}; shift 2 ;;
    --bucket) bucket=${2:?--bucket has no value}; bucket=${bucket#gs://}; shift 2 ;;
    --project) project=${2:?--project has no value}; shift 2 ;;
    --install) requirement=${2:?--install has no value}; shift 2 ;;
    --hf-token-file) token_file=${2:?$1 has no value}; shift 2 ;;
    --pause) pause=${2:?--pause has no value}; shift 2 ;;
    --spot) spot=yes; shift ;;
    --watch) watch=yes; shift ;;
    --status | --log | --stop | --delete) action=${1#--}; shift ;;
    *) take_main "$@"; shift "$taken" ;;
  esac
done
[ -n "$name" ] || refuse "--name NAME, or --existing NAME, is missing."
[ -n "$zone" ] || refuse "--zone is missing; gcloud compute tpus locations list shows them."
need gcloud "Install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then gcloud init."
place=(--zone="$zone" ${project:+"--project=$project"})

if [ "$action" = begin ]; then
  need_run
  if [ -z "$existing" ]; then
    [ -n "$type" ] || refuse "--type is missing: v4-8, v5litepod-8, v5p-8, v6e-8 ..."
    case "${runtime:-$type}" in
      v4-*) runtime=tpu-ubuntu2204-base ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      "$type") refuse "no runtime is known for --type $type; give --runtime." ;;
    esac
  fi
  if [ -n "$spot" ] && [ -z "$bucket" ]; then
    refuse "--spot without --bucket: the checkpoints would go with the machine."
  fi
  if [ -n "$bucket" ] && [[ "$workdir" != bucket/* ]]; then
    refuse "--workdir $workdir is not in the bucket; expected bucket/..., where it is mounted."
  fi
fi

# on WORKERS COMMAND...: runs a part of tpu_worker.sh over there.
on() {
  local workers=$1
  shift
  step gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$workers" \
    --command="$(quoted "$@")"
}

state_of_machine() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2> /dev/null || echo NONE
}

create() {
  step gcloud compute tpus queued-resources create "$name" --node-id="$name" \
    "${place[@]}" --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot}
}

delete() {
  step gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Waits until the machine is there, and makes it if need be.
have_machine() {
  local state
  if [ -n "$dry" ]; then
    quoted gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format='value(state.state)'
    create
    return
  fi
  while true; do
    state=$(state_of_machine)
    case "$state" in
      ACTIVE) return ;;
      NONE) create ;;
      # What was preempted keeps its name until it is deleted.
      SUSPENDED | FAILED) delete ;;
      *) echo "$name is $state; looking again in $pause s" >&2; sleep "$pause" ;;
    esac
  done
}

begin() {
  local files config_file=${config%%:*} argument=$config wheel=''
  cd "$here"
  if [ -z "$requirement" ]; then
    # What an earlier build left there would go into the wheel too.
    step rm -rf build/lib
    step "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir dist .
    wheel=dist/lpo_jax-$(sed -n 's/^__version__ = "\(.*\)"/\1/p' lpo_jax/__init__.py)-py3-none-any.whl
  fi
  files=(launch/tpu_worker.sh launch/run.sh launch/shared.sh ${wheel:+"$wheel"})
  if [ -f "$config_file" ]; then
    files+=("$config_file")
    argument=${config##*/}
  fi
  on all mkdir -p lpo_jax_run
  step gcloud compute tpus tpu-vm scp "${files[@]}" "$name:lpo_jax_run/" "${place[@]}" \
    --worker=all
  if [ -n "$token_file" ]; then
    on all mkdir -p -m 700 .cache/huggingface
    step gcloud compute tpus tpu-vm scp "$token_file" "$name:.cache/huggingface/token" \
      "${place[@]}" --worker=all
  fi
  [ -z "$wheel" ] || requirement="./${wheel##*/}[tpu]"
  on all bash lpo_jax_run/tpu_worker.sh install "$requirement"
  [ -z "$bucket" ] || on all bash lpo_jax_run/tpu_worker.sh mount "$bucket"
  on all bash lpo_jax_run/tpu_worker.sh start --config "$argument" \
    --workdir "$workdir" --jobs "$jobs" ${main[@]+"${main[@]}"}
}

# Stays until the run has ended, on a machine that may be taken away in between.
watch() {
  local state answer code
  while true; do
    sleep "$pause"
    state=ACTIVE
    [ -n "$existing" ] || state=$(state_of_machine)
    if [ "$state" != ACTIVE ]; then
      echo "$name is $state; it is made again" >&2
      have_machine
      begin
      continue
    fi
    answer=$(on 0 bash lpo_jax_run/tpu_worker.sh status) || continue
    code=${answer##*exit }
    case "$answer" in
      *running*) ;;
      *"exit 3") begin ;;
      *"exit "*) exit "$code" ;;
      *) echo "nothing runs on $name; beginning again" >&2; begin ;;
    esac
  done
}

case "$action" in
  begin)
    [ -n "$existing" ] || have_machine
    begin
    if [ -n "$watch" ] && [ -z "$dry" ]; then watch; fi
    ;;
  status) on all bash lpo_jax_run/tpu_worker.sh status ;;
  stop) on all bash lpo_jax_run/tpu_worker.sh stop ;;
  log) on 0 tail -n 100 -f lpo_jax_run/run.log ;;
  delete) delete ;;
esac
