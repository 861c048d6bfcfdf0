# Sourced by the launchers: words, refusals, dry runs, and what goes on to lpo_jax.main.
# shellcheck shell=bash
# What is set here is read by those who source it.
# shellcheck disable=SC2034

dry=
main=()
workdir=
config=
jobs=train

# Prints the comment that a launcher begins with.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
}

refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# need TOOL HINT: refuses to go on without a tool. A dry run needs none.
need() {
  [ -n "$dry" ] || command -v "$1" > /dev/null || refuse "$1 is not installed here. $2"
}

# Prints words as a shell would read them again.
quoted() {
  local word line=
  for word in "$@"; do
    case "$word" in
      *[!A-Za-z0-9_@%+=:,./-]* | '') word="'${word//\'/\'\\\'\'}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or says it in a dry run.
step() {
  if [ -n "$dry" ]; then quoted "$@"; else "$@"; fi
}

# take_main WORD [NEXT]: takes what is for lpo_jax.main, as one word, into `main`; the
# number of words that it took is in `taken`.
take_main() {
  case "$1" in
    --workdir=* | --config=* | --jobs=* | --job=* | --config.*=*) taken=1 ;;
    --workdir | --config | --jobs | --job | --config.*)
      [ $# -gt 1 ] || refuse "$1 has no value."
      taken=2
      set -- "$1=$2"
      ;;
    *) refuse "unknown flag $1. See --help." ;;
  esac
  case "$1" in
    --workdir=*) workdir=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --jobs=* | --job=*) jobs=${1#*=} ;;
    *) main+=("$1") ;;
  esac
}

# Refuses a command line without a run in it.
need_run() {
  [ -n "$config" ] || refuse "--config is missing: expected --config configs/X.py."
  [ -n "$workdir" ] || refuse "--workdir is missing: expected where the run lives."
  case "$workdir" in
    *://*)
      refuse "--workdir $workdir is a URL; expected a folder, of a mounted bucket for example."
      ;;
  esac
}
