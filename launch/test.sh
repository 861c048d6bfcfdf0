#!/usr/bin/env bash
# Fresh machine -> virtual environment -> tests.
#
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$here/launch/environment.sh"
# The peers to compare with come first: a CPU build of torch where one is to be had.
make_environment "${here}[test]"
cd "$here"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# Tests mostly trace and compile, on one core each. Files stay whole: they share compiles.
cores=$(getconf _NPROCESSORS_ONLN)
exec "$VENV/bin/python" -m pytest -n $((cores < 4 ? cores : 4)) --dist loadfile "$@"
