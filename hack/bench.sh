#!/usr/bin/env bash
# Runs the benchmarks, or the one named, and writes build/bench/NAME.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh bench
exec hack/as-root.sh .venv/bin/python -m bench "$@"
