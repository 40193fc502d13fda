#!/usr/bin/env bash
# Makes the base of Scope's images from Debian's packages: hack/image/base.sh SUITE ARCHIVE. Takes root.
#
# For machines that can pull no image. The packages come from where this machine takes its own, and what is made is as
# small as a base that is pulled: no documentation, no translations. ARCHIVE appears whole or not at all.
set -euo pipefail
suite=$1 archive=$2

say() { printf '==> %s\n' "$*" >&2; }

sources() { # where this machine takes packages of the suite from, as lines of sources.list; Debian's own otherwise
    local found
    found=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
        awk -v suite="$suite" '$2 ~ "^" suite "(-updates|-security)?$" && $3 == "main" { print "deb", $0 }' | sort -u)
    if [[ $found != *" $suite "* ]]; then
        found="deb http://deb.debian.org/debian $suite main
deb http://deb.debian.org/debian $suite-updates main
deb http://deb.debian.org/debian-security $suite-security main"
    fi
    printf '%s\n' "$found"
}

mkdir -p "$(dirname "$archive")"
making=$(mktemp -d "$archive.XXXXXX")
trap 'rm -rf "$making"' EXIT
root=$making/root

taken=$(sources)
mirror=$(awk -v suite="$suite" '$3 == suite { print $2; exit }' <<<"$taken")
say "Making a base of Debian's $suite once, into $archive: some minutes"
debootstrap --variant=minbase "$suite" "$root" "$mirror" |
    awk '/^I: (Retrieving|Unpacking|Configuring)/ { if (++n % 25 == 0) { print "    " n " steps done: " $0; fflush() } next } { print; fflush() }' >&2

printf '%s\n' "$taken" >"$root/etc/apt/sources.list"
# What is installed later leaves these out too.
cat >"$root/etc/dpkg/dpkg.cfg.d/no-documentation" <<'CONF'
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
CONF
# No file systems are made in a container, and no program here asks for a time zone.
say 'Bringing it up to date'
chroot "$root" sh -c 'apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get -qy upgrade &&
    apt-get -qy --allow-remove-essential purge e2fsprogs tzdata' >"$making/log" 2>&1 ||
    { cat "$making/log" >&2 && exit 1; }
find "$root/usr/share/doc" -type f ! -name copyright -delete
find "$root/usr/share/doc" -depth -type d -empty -delete
rm -rf "$root"/usr/share/{info,locale,man}/* "$root"/var/{cache/apt,lib/apt/lists,log}/* "$root"/var/cache/debconf/*-old
rm -f "$root/etc/resolv.conf" "$root/etc/hostname"
tar --sort=name --numeric-owner -C "$root" -cf "$making/base.tar" .
mv -T "$making/base.tar" "$archive"
say "Made in $SECONDS s"
