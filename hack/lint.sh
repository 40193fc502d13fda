#!/usr/bin/env bash
# Checks style, types, import contracts, that uv.lock fits pyproject.toml, that nothing in it has a known weakness, and
# that what is made from CRDs and chart is made of these.
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

# Of what is shipped. uv ends with 1 where there is one, and with 2 where the database of them cannot be asked.
weaknesses() {
    local said
    said=$(UV_HTTP_RETRIES=1 timeout 120 build/uv audit --frozen --no-dev --preview-features audit-command 2>&1)
    case $? in
        0) ;;
        1) printf '%s\n' "$said" && return 1 ;;
        *) printf '    nobody was asked: %s\n' "$(tail -n 1 <<<"$said" | sed 's/^ *//')" ;;
    esac
}

check 'ruff check' ruff check
check 'ruff format' ruff format --check
check 'mypy' mypy
check 'import contracts' env PYTHONPATH=hack lint-imports --no-logo
check 'uv.lock fits pyproject.toml' lock
check 'known weaknesses' weaknesses
check 'docs/crds.md fits crds/' python hack/crd_docs.py --check
check 'charts/scope fits its values and crds/' python hack/chart.py --check

if ((${#failed[@]})); then
    printf 'lint: failed: %s\n' "$(printf '%s; ' "${failed[@]}" | sed 's/; $//')" >&2
    exit 1
fi
