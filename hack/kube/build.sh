#!/usr/bin/env bash
# Builds the programs that a go.mod names as tools: hack/kube/build.sh GO MODULE DIRECTORY.
#
# GO is a Go toolchain, used with the settings this machine has for it; MODULE is the folder of the go.mod, hack/kube or
# one in it; DIRECTORY appears whole or not at all. Two builds of the same directory wait for each other, and the
# second finds the work done.
set -euo pipefail
go=$1 module=$2 directory=$3
cd "$module"

mkdir -p "$(dirname "$directory")"
exec 8>"$directory.lock"
flock --nonblock 8 || { printf '==> Waiting for another build of %s\n' "$module" >&2 && flock 8; }
if [[ -d $directory ]]; then exit; fi

making=$(mktemp -d "$directory.XXXXXX")
trap 'rm -rf "$making"' EXIT

version_of() { sed -n "s|^\(require \)\?\s*$1 v\([0-9.]*\).*|\2|p" go.mod; } # a Go module that go.mod requires
stamp() { # a name for each -X that the linker is given: value, then names
    local name
    for name in "${@:2}"; do printf ' -X %s=%s' "$name" "$1"; done
}

mapfile -t programs < <(sed -n 's/^tool //p' go.mod)
flags='-s -w'
if [[ ${programs[0]} == helm.sh/* ]]; then
    what="Helm $(version_of helm.sh/helm/v3)" cost='a minute or two'
    flags+=$(stamp "v${what#* }" helm.sh/helm/v3/internal/version.version)
    # Which Kubernetes a chart is rendered for where no cluster is asked: that of its client.
    minor=$(version_of k8s.io/client-go | cut -d. -f2)
    flags+=$(stamp 1 helm.sh/helm/v3/pkg/{chartutil,lint/rules}.k8sVersionMajor)
    flags+=$(stamp "$minor" helm.sh/helm/v3/pkg/{chartutil,lint/rules}.k8sVersionMinor)
elif [[ ${programs[0]} == */coredns ]]; then
    what="CoreDNS $(version_of github.com/coredns/coredns)" cost='a minute or two'
else
    what="Kubernetes $(version_of k8s.io/kubernetes)" cost='some minutes and 2 GB of memory'
    version=${what#* }
    # A client reads the version off the server and refuses one that does not look like Kubernetes'.
    flags+=$(stamp "v$version" k8s.io/component-base/version.gitVersion)
    flags+=$(stamp "${version%%.*}" k8s.io/component-base/version.gitMajor)
    flags+=$(stamp "$(cut -d. -f2 <<<"$version")" k8s.io/component-base/version.gitMinor)
fi

printf '==> Building %s once, into %s: %s\n' "$what" "$directory" "$cost" >&2
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
    { printf 'setup: %s was not built: the reason stands above. Then run the same command again.\n' "$what" >&2 && exit 1; }
chmod 755 "$making"
mv -T "$making" "$directory"
printf '==> Built in %d s\n' "$SECONDS" >&2
