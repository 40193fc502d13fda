#!/usr/bin/env bash
# Checks style, types, import contracts, that uv.lock fits pyproject.toml, and what is made from CRDs and chart these.
# Runs all of them, then fails if one did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
hack/setup.sh lint || exit
export PATH="$PWD/.venv/bin:$PATH"

failed=()
check() { # what it is called, the command
    printf '==> %s\n' "$1"
    "${@:2}" || failed+=("$1")
}

# The lock speaks of the public index, whichever one this machine uses; what it says can be checked without either.
lock() { env -u UV_INDEX_URL -u UV_INDEX -u UV_EXTRA_INDEX_URL UV_DEFAULT_INDEX=https://pypi.org/simple build/uv lock --check --offline --quiet; }

check 'ruff check' ruff check
check 'ruff format' ruff format --check
check 'mypy' mypy
check 'import contracts' env PYTHONPATH=hack lint-imports --no-logo
check 'uv.lock fits pyproject.toml' lock
check 'docs/crds.md fits crds/' python hack/crd_docs.py --check
check 'charts/scope fits its values and crds/' python hack/chart.py --check

if ((${#failed[@]})); then
    printf 'lint: failed: %s\n' "$(printf '%s; ' "${failed[@]}" | sed 's/; $//')" >&2
    exit 1
fi
