#!/usr/bin/env bash
# Runs every test, or what the arguments select: hack/test.sh tests/unit -k wire.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh test
exec hack/as-root.sh .venv/bin/python -m pytest --durations=10 "$@"
