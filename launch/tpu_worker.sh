#!/usr/bin/env bash
# What launch/tpu_vm.sh does on every worker of a TPU VM. Each part may be done again.
#
#   bash tpu_worker.sh install REQUIREMENT   Python 3.12 and REQUIREMENT[tpu], in ~/lpo_jax_run
#   bash tpu_worker.sh mount BUCKET          the bucket at ~/lpo_jax_run/bucket
#   bash tpu_worker.sh start ARGUMENTS       launch/run.sh in the background, if it does not run
#   bash tpu_worker.sh status                running | exit CODE | nothing
#   bash tpu_worker.sh stop                  TERM: it saves itself
set -euo pipefail
cd "$HOME/lpo_jax_run"
venv=$HOME/lpo_jax_run/venv

install() {
  local requirement=$1 stamp
  stamp=.installed-$({
    printf %s "$requirement"
    cat ./*.whl 2> /dev/null || true
  } | cksum | tr ' ' -)
  [ ! -e "$stamp" ] || return 0
  # The images of TPU VMs have older Pythons; uv brings one.
  python3 -m pip install --quiet --user uv 2> /dev/null ||
    python3 -m pip install --quiet --user --break-system-packages uv
  [ -x "$venv/bin/python" ] || python3 -m uv venv --quiet --python 3.12 "$venv"
  # The wheel's version need not have changed for its contents to.
  python3 -m uv pip install --quiet --python "$venv/bin/python" \
    --reinstall-package lpo_jax "$requirement"
  touch "$stamp"
}

mount() {
  local bucket=$1 list=/etc/apt/sources.list.d/gcsfuse.list
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  mkdir -p bucket
  ! mountpoint -q bucket || return 0
  if ! command -v gcsfuse > /dev/null; then
    curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
      sudo tee "$list" > /dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  # No cached metadata: a worker must see at once what another has written.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" bucket
}

running() {
  [ ! -e exit_code ] && [ -e pid ] && kill -0 "$(cat pid)" 2> /dev/null
}

start() {
  if running; then
    [ "$*" = "$(cat arguments)" ] && echo "already running" && return
    echo "another run is going on here: $(cat arguments). Stop it first, with --stop." >&2
    exit 2
  fi
  rm -f exit_code
  printf %s "$*" > arguments
  # Relative to here: that is where the configs and the bucket are.
  PYTHON=$venv/bin/python LPO_JAX_DISTRIBUTED=auto PYTHONUNBUFFERED=1 \
    setsid nohup bash tpu_worker.sh go_on "$@" >> run.log 2>&1 < /dev/null &
  echo $! > pid
  echo "started"
}

# Runs until the end and leaves the exit code, and the log where it outlives the machine.
go_on() {
  local code=0 runner='' argument workdir=
  trap '[ -z "$runner" ] || kill -TERM "$runner"' TERM
  bash run.sh "$@" &
  runner=$!
  wait "$runner" || code=$?
  while kill -0 "$runner" 2> /dev/null; do
    code=0
    wait "$runner" || code=$?
  done
  for argument in "$@"; do
    [ "${workdir:-}" != next ] || workdir=$argument
    [ "$argument" != --workdir ] || workdir=next
  done
  if [ -d "$workdir" ]; then
    mkdir -p "$workdir/logs"
    cp run.log "$workdir/logs/$(hostname).log"
  fi
  echo "$code" > .exit_code
  mv .exit_code exit_code
}

status() {
  if running; then
    echo running
  elif [ -e exit_code ]; then
    echo "exit $(cat exit_code)"
  else
    echo nothing
  fi
}

stop() {
  ! running || kill -TERM "$(cat pid)"
}

"$@"
