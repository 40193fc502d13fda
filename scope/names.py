"""What a ScopePeer and a ScopeService are called: who knows whose it is knows the name, and asks nobody."""

from __future__ import annotations

import hashlib

MAX_NAME = 253  # a DNS subdomain, the longest name that Kubernetes takes
HASH_LETTERS = 16  # 64 bits: of the names that are cut, no two meet


def peer_name(mesh: str, cluster: str, node: str) -> str:
    """The name of a Node's peer; one that would be too long is cut and ends with a hash of the whole."""
    return _shortened(f"{mesh}.{cluster}.{node}")


def service_name(mesh: str, cluster: str, namespace: str, service: str) -> str:
    """The name of the record of a cluster's exported Service, at most 255 characters before it is cut."""
    return _shortened(f"{mesh}.{cluster}.{namespace}.{service}")


def imported_name(service: str, cluster: str) -> str:
    """What a Service of that cluster is called in the others; perhaps longer than a Service's name may be."""
    return f"{service}-{cluster}"


def _shortened(name: str) -> str:
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:HASH_LETTERS]
    return f"{name[: MAX_NAME - len(digest) - 1].rstrip('-.')}.{digest}"
