#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster, as a JobSet: fills in launch/gke.yaml and applies
# it with kubectl.
#
#   bash launch/gke.sh --name NAME --image IMAGE --accelerator tpu-v6e-slice
#       --topology 4x4 --bucket BUCKET --config configs/X.py --workdir /bucket/runs/NAME
#       [--jobs cache,train] [--chips 4] [--service-account default] [--spot]
#       [--namespace default] [--config.path.to.key=value ...] [--dry-run]
#
# --image: made by launch/Dockerfile. --chips: of each host (default 4, or all where the
# topology has fewer). --bucket is mounted at /bucket on every host: the workdir, the data
# and the cache go there. A token for gated models is the secret lpo-jax, key hf-token.
# Stop it with kubectl delete jobset NAME: it saves itself; the same command goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/shared.sh
. "$here/launch/shared.sh"

name='' image='' accelerator='' topology='' bucket='' chips='' spot=''
service_account=default namespace=default
while [ $# -gt 0 ]; do
  case "$1" in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --name) name=${2:?--name has no value}; shift 2 ;;
    --image) image=${2:?--image has no value}; shift 2 ;;
    --accelerator) accelerator=${2:?--accelerator has no value}; shift 2 ;;
    --topology) topology=${2:?--topology has no value}; shift 2 ;;
    --bucket) bucket=${2:?--bucket has no value}; bucket=${bucket#gs://}; shift 2 ;;
    --chips) chips=${2:?--chips has no value}; shift 2 ;;
    --service-account) service_account=${2:?$1 has no value}; shift 2 ;;
    --namespace) namespace=${2:?--namespace has no value}; shift 2 ;;
    --spot) spot=yes; shift ;;
    *) take_main "$@"; shift "$taken" ;;
  esac
done
need_run
for flag in name image accelerator topology bucket; do
  [ -n "${!flag}" ] || refuse "--$flag is missing. See --help."
done
case "$workdir" in
  /bucket/*) ;;
  *) refuse "--workdir $workdir would be lost with the pod; expected a folder in /bucket." ;;
esac
[[ "$topology" =~ ^[0-9]+(x[0-9]+)+$ ]] || refuse "--topology $topology: expected 4x4 or 2x2x2."
total=$((${topology//x/*}))
chips=${chips:-$((total < 4 ? total : 4))}
[ $((total % chips)) = 0 ] || refuse "--topology $topology is not whole hosts of $chips chips."

# Words as items of a YAML list.
listed() {
  local word
  for word in "$@"; do
    word=${word//\\/\\\\}
    printf '                    - "%s"\n' "${word//\"/\\\"}"
  done
}

render() {
  local text spot_lines command
  text=$(cat "$here/launch/gke.yaml")
  command=$(listed bash launch/run.sh --config "$config" --workdir "$workdir" \
    --jobs "$jobs" ${main[@]+"${main[@]}"})
  spot_lines='                # on demand'
  [ -z "$spot" ] || spot_lines='                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule'
  text=${text//@NAME@/"$name"}
  text=${text//@HOSTS@/"$((total / chips))"}
  text=${text//@CHIPS@/"$chips"}
  text=${text//@IMAGE@/"$image"}
  text=${text//@ACCELERATOR@/"$accelerator"}
  text=${text//@TOPOLOGY@/"$topology"}
  text=${text//@BUCKET@/"$bucket"}
  text=${text//@SERVICE_ACCOUNT@/"$service_account"}
  text=${text//@SPOT@/"$spot_lines"}
  printf '%s\n' "${text//@COMMAND@/"$command"}"
}

need kubectl "Install it with gcloud components install kubectl, and log in with gcloud container clusters get-credentials CLUSTER."
if [ -n "$dry" ]; then
  quoted kubectl apply --namespace="$namespace" -f -
  render
else
  render | kubectl apply --namespace="$namespace" -f -
  echo "its log: kubectl logs --namespace=$namespace --follow job/$name-slice-0"
fi
