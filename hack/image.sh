#!/usr/bin/env bash
# Builds Scope's two images, tries them, and writes them to build/image, each as an archive and with a list of all that
# is in it (CycloneDX): hack/image.sh; with --untried they are built alone. Dockerfile says what is done; here is
# what a machine may lack for it.
#
#   BASE_IMAGE=NAME  the base to use; otherwise the one that Dockerfile names or, where that cannot be pulled, one made
#                    of Debian's packages (kept in the cache for the next time)
#
# Where no Docker daemon answers, root starts one for as long as this takes, with all that it keeps in the cache. The
# package indexes are those that pip and uv use on this machine; nothing of that is in the images.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/scope-mesh"
OUT=build/image
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf '==> %s\n' "$*" >&2; }
stop() {
    printf 'image: %s\n' "$@" >&2
    exit 1
}

hack/setup.sh image
uv=build/uv
mkdir -p "$OUT" "$CACHE"
exec 8>"$CACHE/image.lock"
flock --nonblock 8 || { say 'Waiting for another build of images' && flock 8; }

work=$(mktemp -d)
daemon=
finish() {
    if [[ -n $daemon ]]; then
        kill "$daemon" && wait "$daemon" || true
        umount "$work/run/netns/default" 2>/dev/null || true # it forgets this one
    fi
    rm -rf "$work"
}
trap finish EXIT

network=()
if ! docker info >/dev/null 2>&1; then
    [[ $EUID == 0 ]] || stop 'no Docker daemon answers: start it, or run this as root, which starts one of its own.'
    say "Starting a Docker daemon for this build; what it keeps is in $CACHE/docker"
    export DOCKER_HOST=unix://$work/docker.sock
    # It changes nothing of this machine's network: builds use it as it is.
    dockerd --host "$DOCKER_HOST" --data-root "$CACHE/docker" --exec-root "$work/run" --pidfile "$work/pid" \
        --bridge none --iptables=false --ip6tables=false --ip-forward=false >"$work/dockerd.log" 2>&1 8>&- &
    daemon=$!
    for ((left = 600; left; left--)); do
        if docker info >/dev/null 2>&1; then break; fi
        kill -0 "$daemon" 2>/dev/null || { daemon='' && stop "$(tail -n 3 "$work/dockerd.log")" 'the Docker daemon did not start: see above.'; }
        sleep 0.1
    done
    ((left)) || stop "$(tail -n 3 "$work/dockerd.log")" 'the Docker daemon does not answer after a minute: see above.'
    network=(--network host)
fi
# Without its builder of today the client has the earlier one, which does all that Dockerfile asks for.
if ! docker buildx version >/dev/null 2>&1; then export DOCKER_BUILDKIT=0; fi

build() { # target, image, further arguments
    say "Building $2"
    local began=$SECONDS
    docker build "${network[@]}" --target "$1" --tag "$2" --build-arg "BASE_IMAGE=$base" \
        --build-arg "BUILD_IMAGE=$maker" "${@:3}" . >"$OUT/$1.log" 2>&1 &
    local builder=$! shown=0 line
    while kill -0 "$builder" 2>/dev/null; do
        sleep 1
        line=$(grep -aE '^(Step [0-9]+/|#[0-9]+ \[)' "$OUT/$1.log" | tail -n 1) || true
        if [[ -n $line && $line != "$shown" ]]; then
            shown=$line
            printf '    %4d s  %.100s\n' "$((SECONDS - began))" "$line" >&2
        fi
    done
    wait "$builder" || { tail -n 30 "$OUT/$1.log" >&2 && stop "$2 was not built: see above, and $OUT/$1.log."; }
}

# --- the base -------------------------------------------------------------------------------------------------

named=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)
base=${BASE_IMAGE:-$named}
if [[ -z ${BASE_IMAGE:-} ]] && ! docker image inspect "$base" >/dev/null 2>&1 && ! timeout 300 docker pull "$base" 2>"$work/pull"; then
    say "$named cannot be pulled: $(tail -n 1 "$work/pull")"
    [[ $EUID == 0 ]] || stop 'a base can be made here, by root. Run this as root, or name an image that is here with BASE_IMAGE.'
    suite=${named#debian:} suite=${suite%-slim}
    base=scope-base:$suite
    if ! docker image inspect "$base" >/dev/null 2>&1; then
        if [[ ! -e $CACHE/base-$suite.tar ]]; then
            hack/setup.sh image-base
            hack/image/base.sh "$suite" "$CACHE/base-$suite.tar"
        fi
        docker import --change 'CMD ["bash"]' "$CACHE/base-$suite.tar" "$base" >/dev/null
    fi
    say "Using $base, made on $(date -r "$CACHE/base-$suite.tar" +%F); without $CACHE/base-$suite.tar and that image a new one is made"
fi

# --- what builds, with this machine's settings for package indexes ---------------------------------------------

settings=()
index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-${PIP_INDEX_URL:-$(python3 -m pip config get global.index-url 2>/dev/null || true)}}}
if [[ -n $index ]]; then settings+=("PIP_INDEX_URL=$index" "UV_DEFAULT_INDEX=$index"); fi
for name in http_proxy https_proxy no_proxy; do
    if [[ -n ${!name:-} ]]; then settings+=("$name=${!name}"); fi
done
# Whom this machine trusts to be such an index.
trusted=${SSL_CERT_FILE:-${PIP_CERT:-$(python3 -m pip config get global.cert 2>/dev/null || true)}}
if [[ -n $trusted ]]; then settings+=(SSL_CERT_FILE=/trusted.crt PIP_CERT=/trusted.crt); fi
maker=$base
if ((${#settings[@]})); then
    maker=scope-maker
    mkdir "$work/maker"
    printf 'FROM %s\n' "$base" >"$work/maker/Dockerfile"
    if [[ -n $trusted ]]; then
        cat "$trusted" >"$work/maker/trusted.crt"
        # A context is compared by its content; a fixed time keeps what was built from it before.
        printf 'COPY trusted.crt /trusted.crt\n' >>"$work/maker/Dockerfile"
    fi
    printf 'ENV %s\n' "${settings[@]}" >>"$work/maker/Dockerfile"
    docker build --quiet --tag "$maker" "$work/maker" >/dev/null 2>"$work/maker.log" || stop "$(cat "$work/maker.log")"
fi

# --- the images ------------------------------------------------------------------------------------------------

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# Of its own, and not ours: it stands in the label of that stage.
wireguard=$(sed -n '/AS wireguard/,/^FROM/s/.*image.version="\([^"]*\)".*/\1/p' Dockerfile)
build wireguard "scope-wireguard:$wireguard"
build scope "scope-mesh:$version" --build-arg "VERSION=$version"

"$uv" export --quiet --frozen --no-dev --all-extras --format cyclonedx1.5 --output-file "$work/locked.json" >/dev/null ||
    stop 'uv could not list uv.lock as CycloneDX: its reason stands above.'
for image in "scope-wireguard:$wireguard" "scope-mesh:$version"; do
    docker run --rm --interactive --network none "$image" sh <hack/image/inventory.sh >"$work/inventory"
    python3 hack/image/sbom.py "${image%%:*}" "${image##*:}" "$work/locked.json" <"$work/inventory" >"$OUT/${image%%:*}.cdx.json"
    archive=$OUT/${image%%:*}.tar
    docker save --output "$archive.new" "$image"
    mv "$archive.new" "$archive"
    say "$image: $(docker image inspect --format '{{.Size}}' "$image" | awk '{ printf "%.0f MB", $1 / 1e6 }'), in $archive; for a Node: ctr -n k8s.io images import $archive"
done

if [[ ${1:-} == --untried ]]; then exit; fi
say 'Trying them'
SCOPE_IMAGE="scope-mesh:$version" SCOPE_WIREGUARD_IMAGE="scope-wireguard:$wireguard" \
    .venv/bin/python -m pytest -q -p no:cacheprovider hack/image
