#!/usr/bin/env bash
# Runs every test, or what the arguments select: hack/test.sh tests/unit -k wire.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh test

pytest=(hack/as-root.sh .venv/bin/python -m pytest --durations=10)
if (($#)); then
    exec "${pytest[@]}" "$@"
fi

# Two streams, one for each of two cores, of which the second shows at the end what it said. The emulated machine of the
# kernel tests keeps a core busy, so it goes beside those that count no seconds; tests against a real API server mostly
# wait, so they go beside those with real packets.
beside=build/test-beside.log
"${pytest[@]}" tests/kernel tests/kube >"$beside" 2>&1 &
child=$!
trap 'kill "$child" 2>/dev/null || true' EXIT
failed=0
"${pytest[@]}" tests/unit tests/sim tests/netns || failed=$?
printf '\n==> The virtual machine and the API server, which ran beside the others (%s):\n' "$beside"
wait "$child" || failed=$?
trap - EXIT
cat "$beside"
exit "$failed"
