#!/usr/bin/env bash
# Runs a command as root in the project's environment: network namespaces and raw sockets need it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin" PYTHONPATH="$root/hack"
if [[ $EUID == 0 ]]; then exec "$@"; fi
if ! command -v sudo >/dev/null; then
    echo "This needs root, and sudo is not here: run the same command as root." >&2
    exit 1
fi
# Bytecode that root writes beside the sources could not be replaced or removed by the user who owns them.
exec sudo -E env PATH="$PATH" PYTHONPATH="$PYTHONPATH" PYTHONPYCACHEPREFIX="$root/build/pycache" "$@"
