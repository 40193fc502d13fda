#!/usr/bin/env bash
# Shows a mesh come up through eight or more NATs. KEEP=1 leaves the lab standing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh demo
if [[ ${KEEP:-0} != 0 ]]; then set -- --keep "$@"; fi
exec hack/as-root.sh .venv/bin/python -m demo "$@"
