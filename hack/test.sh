#!/usr/bin/env bash
# Runs every test, or what the arguments select: hack/test.sh tests/unit -k wire.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh test

pytest=(hack/as-root.sh .venv/bin/python -m pytest --durations=10)
if (($#)); then
    exec "${pytest[@]}" "$@"
fi

# Three streams on two cores: the emulated machine of the kernel tests heeds nobody, and tests against a real API server
# mostly wait. They run beside the units and simulations, which count no seconds, and what they said is shown at the end.
declare -A beside=()
trap 'kill "${beside[@]}" 2>/dev/null || true' EXIT
for folder in kernel kube; do
    "${pytest[@]}" "tests/$folder" >"build/test-$folder.log" 2>&1 &
    beside[$folder]=$!
done
failed=0
"${pytest[@]}" tests/unit tests/sim tests/netns || failed=$?
for folder in kernel kube; do
    printf '\n==> tests/%s, which ran beside the others:\n' "$folder"
    wait "${beside[$folder]}" || failed=$?
    cat "build/test-$folder.log"
done
trap - EXIT
exit "$failed"
