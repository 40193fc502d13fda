"""Writes what is in an image as CycloneDX 1.5: `image/sbom.py NAME VERSION LOCKED < INVENTORY > SBOM`.

INVENTORY is what `inventory.sh` printed inside the image: a line `deb NAME VERSION ARCHITECTURE` for each of
Debian's packages and `pypi NAME VERSION` for each Python package. LOCKED is uv's CycloneDX export of uv.lock,
which has where each Python package comes from, its hashes, and who needs whom. A Python package that is
installed and not locked, or in another version, is an error: the image is not made of the lock then.

Neither a time nor a random number stands in the result, so that equal images have equal ones.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

OURS: Final = "scope-mesh"


class NotLocked(Exception):
    """The image has a Python package that uv.lock does not name so."""


def describe(name: str, version: str, inventory: Iterable[str], locked: dict[str, Any]) -> dict[str, Any]:
    """The SBOM of the image `name:version`. Raises NotLocked, and ValueError for a line of another form."""
    known = {(each["name"], each["version"]): each for each in locked["components"]}
    components: list[dict[str, Any]] = []
    for line in inventory:
        kind, *fields = line.split()
        if kind == "deb":
            components.append(_debian(*fields))
        elif kind == "pypi":
            package, installed = _normalized(fields[0]), fields[1]
            if package == OURS:
                continue
            if (package, installed) not in known:
                raise NotLocked(
                    f"{package} {installed} is in {name} and not in uv.lock: build the image anew"
                )
            components.append(known[package, installed])
        else:
            raise ValueError(f"{line!r} is no line of an inventory")
    components.sort(key=lambda each: str(each["purl"]))
    root = f"{name}@{version}"
    references = {str(each["bom-ref"]) for each in components}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {"type": "container", "bom-ref": root, "name": name, "version": version},
        },
        "components": components,
        "dependencies": [
            {"ref": root, "dependsOn": sorted(references)},
            *(_within(each, references) for each in locked["dependencies"] if each["ref"] in references),
        ],
    }


def _debian(name: str, version: str, architecture: str) -> dict[str, Any]:
    purl = f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='')}?arch={architecture}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # as PyPI compares names


def _within(dependency: dict[str, Any], references: set[str]) -> dict[str, Any]:
    needed = [each for each in dependency.get("dependsOn", []) if each in references]
    return {"ref": dependency["ref"], "dependsOn": needed}


def main() -> None:
    """Read the inventory from standard input, and write the SBOM to standard output."""
    parser = argparse.ArgumentParser(description="Write what is in an image as CycloneDX.")
    parser.add_argument("name")
    parser.add_argument("version")
    parser.add_argument("locked", type=Path, help="`uv export --format cyclonedx1.5`")
    options = parser.parse_args()
    try:
        sbom = describe(
            options.name,
            options.version,
            sys.stdin.read().splitlines(),
            json.loads(options.locked.read_text()),
        )
    except NotLocked as error:
        raise SystemExit(f"sbom: {error}") from None
    json.dump(sbom, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
