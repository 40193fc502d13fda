"""What a ScopePeer is called: whoever knows mesh, cluster and Node knows the name, and asks nobody for it."""

from __future__ import annotations

import hashlib

MAX_NAME = 253  # a DNS subdomain, the longest name that Kubernetes takes
HASH_LETTERS = 16  # 64 bits: of the names that are cut, no two meet


def peer_name(mesh: str, cluster: str, node: str) -> str:
    """The name of a Node's peer; one that would be too long is cut and ends with a hash of the whole."""
    name = f"{mesh}.{cluster}.{node}"
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:HASH_LETTERS]
    return f"{name[: MAX_NAME - len(digest) - 1].rstrip('-.')}.{digest}"
