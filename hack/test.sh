#!/usr/bin/env bash
# Runs every test, or what the arguments select: hack/test.sh tests/unit -k wire.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh test

run() { hack/as-root.sh .venv/bin/python -m pytest --durations=10 "$@"; }
if (($#)); then
    run "$@"
    exit
fi

# The emulated machine of the kernel tests keeps one core busy for minutes and heeds no other: it runs beside the
# rest, and what it said is shown at the end.
run tests/kernel >build/test-kernel.log 2>&1 &
kernel=$!
trap 'kill "$kernel" 2>/dev/null || true' EXIT
failed=0
run --ignore=tests/kernel || failed=$?
printf '\n==> The tests in the virtual machine, which ran beside the others:\n'
wait "$kernel" || failed=$?
trap - EXIT
cat build/test-kernel.log
exit "$failed"
