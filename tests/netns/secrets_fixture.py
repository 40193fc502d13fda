"""Every secret that agents keep on their disks, and the forms in which one might be printed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

_KEYS = ("psk", "chain", "confirm_d", "confirm_e")


def secrets_in(files: Iterable[Path]) -> set[bytes]:
    """Every private key and pre-shared key that lies in these files of agents."""
    found: set[bytes] = set()
    for path in files:
        document = json.loads(path.read_text()) if path.suffix == ".json" else {}
        holders: list[tuple[dict[str, str], tuple[str, ...]]] = []
        if path.name == "enrolment.json":
            holders = [(document["keys"], ("wireGuard", "probe", "signing"))]
        elif path.name == "identity.json":
            holders = [(document, ("ed448", "mldsa"))]
        elif path.name == "probe.json":
            holders = [(document, ("probe",))]
        elif path.parent.name == "psk":
            holders = [(document[slot], _KEYS) for slot in ("current", "next") if document[slot] is not None]
        found |= {
            base64.b64decode(holder[name], validate=True) for holder, names in holders for name in names
        }
    return found


def forms(secret: bytes) -> tuple[str, ...]:
    """How a secret would look in a text."""
    return (
        base64.b64encode(secret).decode().rstrip("="),
        base64.urlsafe_b64encode(secret).decode().rstrip("="),
        secret.hex(),
        repr(secret)[2:-1],
    )
