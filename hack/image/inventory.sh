#!/bin/sh
# Lists what is installed, run inside an image: Debian's packages, then Python's. sbom.py reads it.
set -eu
dpkg-query -W -f 'deb ${Package} ${Version} ${Architecture}\n'
[ -x /opt/scope/bin/python ] || exit 0
exec /opt/scope/bin/python -c '
from importlib.metadata import distributions
for each in sorted(distributions(path=__import__("site").getsitepackages()), key=lambda each: each.name):
    print("pypi", each.name, each.version)'
