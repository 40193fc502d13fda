#!/usr/bin/env bash
# Runs every test, or what the arguments select: hack/test.sh tests/unit -k wire.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh test

pytest=(hack/as-root.sh .venv/bin/python -m pytest --durations=10)
if (($#)); then
    exec "${pytest[@]}" "$@"
fi

# Tests against a real API server mostly wait for it, so they run beside the others, and what they said is shown at
# the end. The emulated machine of the kernel tests keeps the cores busy and heeds no other: it comes last.
"${pytest[@]}" tests/kube >build/test-kube.log 2>&1 &
kube=$!
trap 'kill "$kube" 2>/dev/null || true' EXIT
failed=0
"${pytest[@]}" tests/unit tests/sim tests/netns tests/kernel || failed=$?
printf '\n==> The tests against a real API server, which ran beside the others (build/test-kube.log):\n'
wait "$kube" || failed=$?
trap - EXIT
cat build/test-kube.log
exit "$failed"
