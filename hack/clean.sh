#!/usr/bin/env bash
# Removes what the other targets made in this tree. uv's download cache and system packages stay.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
made=(.venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache)
mapfile -t bytecode < <(find . -name __pycache__ -type d -not -path './.venv/*' -prune)
if rm -rf "${made[@]}" "${bytecode[@]}" 2>/dev/null; then exit; fi
# Tests run through sudo leave files of root's.
sudo rm -rf "${made[@]}" "${bytecode[@]}"
