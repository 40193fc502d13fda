#!/usr/bin/env bash
# Tries Scope on clusters that really run: hack/e2e.sh, as root. KEEP=1 leaves them up and says how to reach them.
# KUBECONFIGS=FILE,FILE takes clusters that are there, CLUSTERS=kind has kind make them; otherwise they are the lab's,
# in which an API server is away for OUTAGE seconds (120).
#
# The images are those of this tree, built once for what they are made of and kept in the cache for a day.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/scope-mesh"

hack/setup.sh e2e
made_of=(Dockerfile .dockerignore LICENSE pyproject.toml uv.lock hack/uv.txt hack/image hack/image.sh scope operator nodeagent)
content=$(find "${made_of[@]}" -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
images=$CACHE/images-$content
if [[ ! -d $images ]]; then
    hack/image.sh --untried
    making=$(mktemp -d "$images.XXXXXX")
    cp build/image/*.tar "$making"
    mv -T "$making" "$images" 2>/dev/null || rm -rf "$making" # somebody else was first
fi
touch "$images"
find "$CACHE" -maxdepth 1 -name 'images-*' -mtime +0 -exec rm -rf {} +

if [[ ${KEEP:-0} != 0 ]]; then set -- --keep "$@"; fi
if [[ -n ${OUTAGE:-} ]]; then set -- --outage "$OUTAGE" "$@"; fi
if [[ -n ${KUBECONFIGS:-} ]]; then set -- --kubeconfigs "$KUBECONFIGS" "$@"; fi
case ${CLUSTERS:-} in
'') ;;
kind) set -- --kind "$@" ;;
*) echo "e2e: CLUSTERS is kind, or left out: it is $CLUSTERS" >&2 && exit 2 ;;
esac
exec hack/as-root.sh .venv/bin/python -m e2e --images "$images" "$@"
