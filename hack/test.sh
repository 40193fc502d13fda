#!/usr/bin/env bash
# Runs every test, or what the arguments select: hack/test.sh tests/unit -k wire.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hack/setup.sh test

# Tests start programs by the hundred, some of them in an emulated machine that can keep nothing: what these import is
# compiled once, before all of them, also where the user's environment keeps Python from doing so by itself.
unset PYTHONDONTWRITEBYTECODE
.venv/bin/python -m compileall -q -j 0 .venv/lib scope operator nodeagent hack tests

pytest=(hack/as-root.sh .venv/bin/python -m pytest --durations=10)
if (($#)); then
    exec "${pytest[@]}" "$@"
fi

# Five streams on two cores, and what those beside say is shown at the end. Tests against a real API server mostly wait.
# The emulated machine of the kernel tests and the simulations count no seconds: they take what the others leave, and one
# that waits for a processor does not hang. The simulated lives are as long as all other simulations together.
declare -A beside=()
lives=tests/sim/test_lives.py
beside() {
    local stream=$1
    shift
    "$@" >"build/test-$stream.log" 2>&1 &
    beside[$stream]=$!
}
trap 'kill "${beside[@]}" 2>/dev/null || true' EXIT
patient=(nice -n 10 "${pytest[@]}")
beside kernel "${patient[@]}" tests/kernel
beside lives "${patient[@]}" "$lives"
beside sim "${patient[@]}" tests/sim --ignore="$lives"
beside kube "${pytest[@]}" tests/kube
failed=0
"${pytest[@]}" tests/unit tests/netns || failed=$?
for stream in "${!beside[@]}"; do
    printf '\n==> %s, which ran beside the others:\n' "$stream"
    wait "${beside[$stream]}" || failed=$?
    cat "build/test-$stream.log"
done
trap - EXIT
exit "$failed"
