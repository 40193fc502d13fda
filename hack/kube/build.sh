#!/usr/bin/env bash
# Builds the Kubernetes programs that go.mod names as tools: hack/kube/build.sh GO DIRECTORY.
#
# GO is a Go toolchain, used with the settings this machine has for it; DIRECTORY appears whole or not at all. Two
# builds of the same directory wait for each other, and the second finds the work done.
set -euo pipefail
go=$1 directory=$2
cd "$(dirname "${BASH_SOURCE[0]}")"

mkdir -p "$(dirname "$directory")"
exec 8>"$directory.lock"
flock --nonblock 8 || { echo '==> Waiting for another build of Kubernetes' >&2 && flock 8; }
if [[ -d $directory ]]; then exit; fi

making=$(mktemp -d "$directory.XXXXXX")
trap 'rm -rf "$making"' EXIT

version=$(sed -n 's/^\s*k8s.io\/kubernetes v\([0-9.]*\).*/\1/p' go.mod)
mapfile -t programs < <(sed -n 's/^tool //p' go.mod)
stamp=k8s.io/component-base/version
# A client reads the version off the server and refuses one that does not look like Kubernetes'.
flags="-s -w -X $stamp.gitVersion=v$version -X $stamp.gitMajor=${version%%.*} -X $stamp.gitMinor=$(cut -d. -f2 <<<"$version")"

printf '==> Building Kubernetes %s once, into %s: some minutes and 2 GB of memory\n' "$version" "$directory" >&2
# Without C the programs need no compiler of this machine and run on any of its kind.
export CGO_ENABLED=0 GOWORK=off
"$go" mod download >&2
total=$("$go" list -trimpath -deps "${programs[@]}" | wc -l)

progress() { # the names of compiled packages, one a line; anything else is an error message
    local count=0 line
    while IFS= read -r line; do
        if [[ $line == *' '* ]]; then printf '%s\n' "$line" >&2 && continue; fi
        if ((++count % 100 == 0)); then printf '    %d of at most %d packages\n' "$count" "$total" >&2; fi
    done
}
# The machine stays usable meanwhile.
nice "$go" build -v -trimpath -mod=readonly -ldflags "$flags" -o "$making/" "${programs[@]}" 2>&1 | progress ||
    { echo 'setup: Kubernetes was not built: the reason stands above. Then run the same command again.' >&2 && exit 1; }
chmod 755 "$making"
mv -T "$making" "$directory"
printf '==> Built in %d s\n' "$SECONDS" >&2
