# Sourced by the launchers: makes a virtual environment with lpo_jax in it, once.
# shellcheck shell=bash

VENV=${VENV:-$here/.venv}

# make_environment REQUIREMENT [pip arguments ...]: REQUIREMENT is what pip installs,
# editable, so that the checkout is what runs. Nothing is done when setup.py has not
# changed since the last time.
make_environment() {
  local python=${PYTHON:-python3} stamp
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    echo "lpo_jax needs Python 3.11 to 3.13; $python is $("$python" -V 2>&1). Set PYTHON." >&2
    exit 2
  fi
  stamp="$VENV/.lpo_jax-$(cksum < "$here/setup.py" | tr ' ' -)-$(printf %s "$*" | cksum | tr ' ' -)"
  [ -e "$stamp" ] && return
  echo "installing lpo_jax and what it needs into $VENV (a minute or two)" >&2
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
  # setuptools greets every editable install with a warning that is not for users.
  PYTHONWARNINGS=ignore "$VENV/bin/python" -m pip install --quiet --editable "$@"
  touch "$stamp"
}
