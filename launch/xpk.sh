#!/usr/bin/env bash
# A run on a TPU slice of a cluster that XPK made.
#
#   bash launch/xpk.sh --name NAME --cluster CLUSTER --zone ZONE --type v6e-16
#       --image IMAGE --storage STORAGE --config configs/X.py --workdir /bucket/runs/NAME
#       [--jobs cache,train] [--project P] [--restarts 100]
#       [--config.path.to.key=value ...] [--dry-run]
#
# --image: made by launch/Dockerfile. --storage: a bucket known to the cluster, attached
# once with: xpk storage attach STORAGE --type=gcsfuse --bucket=BUCKET
# --mount-point=/bucket --auto-mount=false --readonly=false --size=1 --cluster=CLUSTER
# Preempted or exit 3: XPK starts it again, up to --restarts times, and it goes on.
# Stop it with xpk workload delete --workload NAME --cluster CLUSTER.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/shared.sh
. "$here/launch/shared.sh"

name='' cluster='' zone='' type='' image='' storage='' restarts=100
more=()
while [ $# -gt 0 ]; do
  case "$1" in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --name) name=${2:?--name has no value}; shift 2 ;;
    --cluster) cluster=${2:?--cluster has no value}; shift 2 ;;
    --zone) zone=${2:?--zone has no value}; shift 2 ;;
    --type) type=${2:?--type has no value}; shift 2 ;;
    --image) image=${2:?--image has no value}; shift 2 ;;
    --storage) storage=${2:?--storage has no value}; shift 2 ;;
    --restarts) restarts=${2:?--restarts has no value}; shift 2 ;;
    --project) more+=("--project=${2:?--project has no value}"); shift 2 ;;
    *) take_main "$@"; shift "$taken" ;;
  esac
done
need_run
for flag in name cluster zone type image storage; do
  [ -n "${!flag}" ] || refuse "--$flag is missing. See --help."
done
case "$workdir" in
  /bucket/*) ;;
  *) refuse "--workdir $workdir would be lost with the pod; expected a folder in /bucket." ;;
esac
need xpk "Install it with pip install xpk, on a machine that has gcloud and kubectl."

step xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" \
  ${more[@]+"${more[@]}"} --tpu-type="$type" --num-slices=1 --docker-image="$image" \
  --storage="$storage" --env=LPO_JAX_DISTRIBUTED=auto --max-restarts="$restarts" \
  --restart-on-exit-codes=3 --termination-grace-period-seconds=120 \
  --command="$(quoted bash launch/run.sh --config "$config" --workdir "$workdir" \
    --jobs "$jobs" ${main[@]+"${main[@]}"})"
