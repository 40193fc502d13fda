#!/usr/bin/env bash
# Shows a mesh come up through eight or more NATs. REGISTRY=kubernetes keeps it in a cluster; KEEP=1 leaves the lab
# standing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
registry=${REGISTRY:-embedded}
case $registry in
embedded) hack/setup.sh demo ;;
kubernetes) hack/setup.sh demo-kubernetes ;;
*)
    echo "demo: there is no registry '$registry': say REGISTRY=embedded or REGISTRY=kubernetes" >&2
    exit 2
    ;;
esac
if [[ ${KEEP:-0} != 0 ]]; then set -- --keep "$@"; fi
exec hack/as-root.sh .venv/bin/python -m demo --registry "$registry" "$@"
