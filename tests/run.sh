#!/usr/bin/env bash
# Sets up what the tests need and runs them all, a worker a core (-n 0: one after the other); arguments go to pytest:
# ./tests/run.sh tests/test_loss.py -k ln_2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$(./fast_train.sh --setup)"
NEEDED='import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ("pytest", "xdist", "hypothesis", "trl", "matplotlib", "bitsandbytes"))))'
if ! "$PYTHON" -c "$NEEDED"; then
  echo "installing tests/requirements.txt for $PYTHON" >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
fi
exec "$PYTHON" -m pytest "$@"
