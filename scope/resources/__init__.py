"""Resources as dictionaries, the form they have in YAML files, on HTTP and on disk, to and from model values.

This is the edge at which everything written by people and machines is checked, once: `parse` returns a frozen
value of `scope.model` or raises `InvalidResource`, which lists *every* problem of the document, each with the
path of the field, what was found and what is allowed. `to_dict` is its inverse, exact for every value that
`parse` can return:

    {"apiVersion": "scope.ltgc.cc/v1alpha1", "kind": "ScopeMesh",
     "metadata": {"name", "uid", "resourceVersion": "17", "generation": 1, "creationTimestamp": RFC 3339},
     "spec": {...}, "status": {...}}

Fields that a person may leave out have the defaults of the model. `null` means absent. A field nobody knows
is refused, because in a file it is a typing error; `ignore_unknown=True` is for those who read resources
written by a newer version, where it is not.

A peer's status has two writers, so it has two parts that never share a field: `PeerReport` (the agent; it
always has `keys`) and `Assignment` (the registry side). They travel alone as `status_to_dict(part)` and
`parse_status(kind, document)`, and lie side by side in the `status` of a ScopePeer.

In dictionaries durations are strings ("500ms", "2s", "30d", whole milliseconds), wall-clock times RFC 3339 in
UTC, latencies milliseconds (whole microseconds), keys and hashes base64, endpoints "192.0.2.1:51820" or
"[2001:db8::1]:51820", prefixes CIDR.

Inside, each kind of resource is a file that reads and writes it (`mesh` with `hubs` and `cluster`, `peer`,
`service`, `token`), over what all have in common (`meta`, `selector`). `fields` asks an object for its
fields, `values` and `addresses` read one value each, `limits` says how much is allowed, and `problems` what
was wrong.
"""

from __future__ import annotations

from scope.resources.addresses import parse_route
from scope.resources.cluster import (
    ALGORITHMS,
    RSA_ALGORITHM,
    cluster_to_dict,
    parse_cluster,
    parse_jwks,
    parse_tokens,
    tokens_to_dict,
)
from scope.resources.document import fit_report, parse, parse_status, status_bytes, status_to_dict, to_dict
from scope.resources.limits import (
    FIRST_PORT,
    IPV4_LENGTHS,
    IPV4_RANGES,
    IPV6_LENGTHS,
    IPV6_RANGE,
    MAX_ADDRESSES,
    MAX_BACKENDS,
    MAX_CANDIDATES,
    MAX_CIDR,
    MAX_CLUSTERS,
    MAX_CONDITIONS,
    MAX_COUNT,
    MAX_DURATION_TEXT,
    MAX_ENDPOINT,
    MAX_EXPIRY,
    MAX_EXPONENT,
    MAX_HUBS,
    MAX_INTERFACE,
    MAX_ISSUER,
    MAX_KEY_ID,
    MAX_LABEL,
    MAX_LABEL_KEY,
    MAX_LATENCY,
    MAX_LINKS,
    MAX_MESSAGE,
    MAX_MTU,
    MAX_NAME,
    MAX_ORIGIN,
    MAX_PROBE,
    MAX_PROBLEMS,
    MAX_RATE,
    MAX_REASON,
    MAX_REFLECTORS,
    MAX_REQUIREMENTS,
    MAX_ROUTES,
    MAX_SERVICE_ENDPOINTS,
    MAX_SERVICE_PORTS,
    MAX_SERVICES,
    MAX_STATUS_BYTES,
    MAX_TIME,
    MAX_TIMER,
    MAX_TOKEN_KEYS,
    MAX_UID,
    MAX_USED_BY,
    MAX_VALUES,
    MIN_EXPIRY,
    MIN_MTU,
    MIN_PORTS,
    MIN_PROBE,
    MIN_ROUTE_LENGTH,
    NODE_PORTS,
    RSA_BITS,
    SHOWN_VALUE,
)
from scope.resources.mesh import overlapping, parse_mesh, prefixes_of
from scope.resources.meta import API_VERSION, GROUP, PLURALS, VERSION
from scope.resources.peer import forbidden_changes, parse_peer, parse_tombstone, tombstone_to_dict
from scope.resources.problems import InvalidResource, Problem
from scope.resources.service import parse_service
from scope.resources.times import format_duration, format_time, parse_duration, parse_time
from scope.resources.token import parse_token
from scope.resources.values import EXTERNAL, as_reason

__all__ = [
    "ALGORITHMS",
    "API_VERSION",
    "EXTERNAL",
    "FIRST_PORT",
    "GROUP",
    "IPV4_LENGTHS",
    "IPV4_RANGES",
    "IPV6_LENGTHS",
    "IPV6_RANGE",
    "MAX_ADDRESSES",
    "MAX_BACKENDS",
    "MAX_CANDIDATES",
    "MAX_CIDR",
    "MAX_CLUSTERS",
    "MAX_CONDITIONS",
    "MAX_COUNT",
    "MAX_DURATION_TEXT",
    "MAX_ENDPOINT",
    "MAX_EXPIRY",
    "MAX_EXPONENT",
    "MAX_HUBS",
    "MAX_INTERFACE",
    "MAX_ISSUER",
    "MAX_KEY_ID",
    "MAX_LABEL",
    "MAX_LABEL_KEY",
    "MAX_LATENCY",
    "MAX_LINKS",
    "MAX_MESSAGE",
    "MAX_MTU",
    "MAX_NAME",
    "MAX_ORIGIN",
    "MAX_PROBE",
    "MAX_PROBLEMS",
    "MAX_RATE",
    "MAX_REASON",
    "MAX_REFLECTORS",
    "MAX_REQUIREMENTS",
    "MAX_ROUTES",
    "MAX_SERVICES",
    "MAX_SERVICE_ENDPOINTS",
    "MAX_SERVICE_PORTS",
    "MAX_STATUS_BYTES",
    "MAX_TIME",
    "MAX_TIMER",
    "MAX_TOKEN_KEYS",
    "MAX_UID",
    "MAX_USED_BY",
    "MAX_VALUES",
    "MIN_EXPIRY",
    "MIN_MTU",
    "MIN_PORTS",
    "MIN_PROBE",
    "MIN_ROUTE_LENGTH",
    "NODE_PORTS",
    "PLURALS",
    "RSA_ALGORITHM",
    "RSA_BITS",
    "SHOWN_VALUE",
    "VERSION",
    "InvalidResource",
    "Problem",
    "as_reason",
    "cluster_to_dict",
    "fit_report",
    "forbidden_changes",
    "format_duration",
    "format_time",
    "overlapping",
    "parse",
    "parse_cluster",
    "parse_duration",
    "parse_jwks",
    "parse_mesh",
    "parse_peer",
    "parse_route",
    "parse_service",
    "parse_status",
    "parse_time",
    "parse_token",
    "parse_tokens",
    "parse_tombstone",
    "prefixes_of",
    "status_bytes",
    "status_to_dict",
    "to_dict",
    "tokens_to_dict",
    "tombstone_to_dict",
]
