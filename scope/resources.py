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
"""

from __future__ import annotations

import base64
import binascii
import enum
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from itertools import pairwise
from typing import TypeVar, assert_never

from scope import model
from scope.model import (
    Addressing,
    AgentTokens,
    Assignment,
    Candidate,
    CandidateKind,
    Cluster,
    ClusterTrust,
    Condition,
    ConfigError,
    Curve,
    DeviceKind,
    EcKey,
    Endpoint,
    Family,
    IPAddress,
    IPInterface,
    IPNetwork,
    JoinToken,
    Kind,
    LabelSelector,
    Link,
    Mesh,
    MeshCounts,
    MeshSpec,
    MeshStatus,
    Meta,
    Operator,
    PathKind,
    Peer,
    PeerKeys,
    PeerReport,
    PeerSpec,
    PublicKey,
    Reflector,
    Requirement,
    Resource,
    Role,
    RsaKey,
    ServiceAccount,
    StatusPart,
    Timers,
    TokenKey,
    TokenSpec,
    Tombstone,
    kind_of,
)

GROUP = "scope.ltgc.cc"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
PLURALS = {Kind.MESH: "scopemeshes", Kind.PEER: "scopepeers", Kind.TOKEN: "jointokens"}

MAX_NAME = 253  # a DNS subdomain, the longest name that Kubernetes takes
MAX_LABEL = 63  # a DNS label; a mesh's name is part of a socket path, which holds 107 bytes
MAX_UID = 64  # a UUID has 36 characters, a hash in hexadecimal 64
MAX_LINKS = 16  # with MAX_CANDIDATES, what a status of MAX_STATUS_BYTES holds of ordinary names
MAX_CANDIDATES = 16  # as many as one call-me-maybe carries
MAX_ROUTES = 64  # the pod, Service and site prefixes of one node; each is an allowed IP on every peer
MAX_ADDRESSES = 4  # one of each family, and as many while a mesh moves to new prefixes
MAX_REFLECTORS = 16  # a mapping class needs two; more than a few add nothing
MAX_CONDITIONS = 16  # one of each type; the design names five
MAX_CLUSTERS = 64  # in one mesh; each is a line of its status, one that joined some kilobytes
MAX_TOKEN_KEYS = 4  # of one cluster: the one in use, the one before it, and room for another change of keys
MAX_KEY_ID = 128  # API servers name a key by 43 characters
MAX_ISSUER = 512  # a URL
RSA_BITS = range(2048, 8193)  # what is broken soon, to what costs more to check than a request is worth
MAX_EXPONENT = 2**32 - 1  # 65537 everywhere; libraries take no larger one
MAX_REQUIREMENTS = 16  # of a selector, labels and expressions each; nobody reads a longer one
MAX_VALUES = 64  # of one requirement: as many Nodes as a person lists by name
MAX_USED_BY = 10_000  # machines joined with one token: the largest mesh that Scope is measured with
MAX_COUNT = 50_000_000  # pairs in a mesh of 10,000 peers
MAX_REASON = 160  # a line on a terminal, beside the peer's name
MAX_MESSAGE = 1024  # a paragraph for a condition
MAX_ENDPOINT = 47  # "[" 39 characters of IPv6 "]:65535"
MAX_CIDR = 43  # 39 characters of IPv6 and "/128"
MAX_STATUS_BYTES = 2048  # an agent's part of a status as compact JSON: 10,000 peers are 20 MB in etcd
MAX_PROBLEMS = 20  # more help nobody, and a hostile document must not buy a long answer
SHOWN_VALUE = 60  # characters of a refused value that are repeated in the refusal

MIN_PROBE = 0.1  # ten pings a second towards every peer is the most that is polite
MAX_PROBE = 60.0  # NAT mappings for UDP may last no longer than two minutes (RFC 4787, REQ-5)
MAX_TIMER = 3600.0  # a peer that is unreachable for an hour has been so for long enough to say it
MIN_EXPIRY = 60.0  # below this a reboot would make a peer expire
MAX_EXPIRY = 3650 * 86400.0
MIN_MTU = 1280  # IPv6 needs it (RFC 8200, section 5)
MAX_MTU = 9000  # jumbo frames
MAX_TIME = 253_402_300_799  # the last second that RFC 3339 can write
MAX_LATENCY = 600.0  # seconds; a link slower than ten minutes is not one

# Where a mesh's addresses may come from: ranges that are nobody's on the Internet. 100.64.0.0/10 is shared
# address space (RFC 6598), which overlays use because sites rarely do.
IPV4_RANGES = tuple(
    IPv4Network(prefix) for prefix in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
IPV6_RANGE = IPv6Network("fc00::/7")
IPV4_LENGTHS = range(8, 31)  # /30 is the smallest that two peers fit in
IPV6_LENGTHS = range(32, 121)  # /48 is what RFC 4193 hands out; /120 still holds 255 peers
# A route shorter than these would pull the underlay, and with it WireGuard's own datagrams, into the mesh.
MIN_ROUTE_LENGTH = {4: 8, 6: 16}

T = TypeVar("T")
E = TypeVar("E", bound=enum.StrEnum)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a document: where, what was found, what is allowed, and perhaps what was meant."""

    path: str
    found: str
    allowed: str
    hint: str = ""

    def __str__(self) -> str:
        return "; ".join(
            part for part in (f"{self.path}: {self.found}", f"allowed: {self.allowed}", self.hint) if part
        )


class InvalidResource(ConfigError):
    """A document that is not a resource. The text has a line for each of its `problems`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems[:MAX_PROBLEMS])
        more = len(problems) - len(self.problems)
        lines = [str(problem) for problem in self.problems] + ([f"and {more} more"] if more else [])
        super().__init__("\n".join(lines))


# --- parsing -----------------------------------------------------------------------------------------------


def parse(document: object, *, ignore_unknown: bool = False) -> Resource:
    """Read a resource of any kind. Raises InvalidResource with every problem of the document."""
    kind = document.get("kind") if isinstance(document, Mapping) else None
    match kind:
        case Kind.PEER:
            return parse_peer(document, ignore_unknown=ignore_unknown)
        case Kind.TOKEN:
            return parse_token(document, ignore_unknown=ignore_unknown)
        case Kind.MESH:
            return parse_mesh(document, ignore_unknown=ignore_unknown)
    root = _Fields.of(document, ignore_unknown=True)
    root.required("kind", lambda value: _choice(Kind, value), Kind.MESH)
    root.done()
    raise AssertionError("an unknown kind is a problem")


def parse_mesh(document: object, *, ignore_unknown: bool = False) -> Mesh:
    """Read a ScopeMesh. Raises InvalidResource."""
    root = _Fields.of(document, ignore_unknown=ignore_unknown)
    meta = _read_meta(root, Kind.MESH)
    spec = _read_mesh_spec(root.sub("spec", required=True))
    status = _read_mesh_status(root.sub("status"))
    root.done()
    return Mesh(meta, spec, status)


def parse_peer(document: object, *, ignore_unknown: bool = False) -> Peer:
    """Read a ScopePeer. Raises InvalidResource."""
    root = _Fields.of(document, ignore_unknown=ignore_unknown)
    meta = _read_meta(root, Kind.PEER)
    spec = _read_peer_spec(root.sub("spec", required=True))
    status = root.sub("status")
    report = _read_report(status) if _REPORT_FIELDS & status.present() else None
    assignment = _read_assignment(status)
    if report is None:
        status.expected |= _REPORT_FIELDS
    root.done()
    return Peer(meta, spec, report, assignment)


def parse_token(document: object, *, ignore_unknown: bool = False) -> JoinToken:
    """Read a join token at rest. Raises InvalidResource."""
    root = _Fields.of(document, ignore_unknown=ignore_unknown)
    meta = _read_meta(root, Kind.TOKEN)
    spec = root.sub("spec", required=True)
    token = TokenSpec(
        mesh=spec.required("mesh", _label, ""),
        secret_hash=spec.required("secretHash", lambda value: _base64(value, size=32), b""),
        role=spec.optional("role", lambda value: _choice(Role, value), Role.AUTO),
        expires=spec.required("expires", _time, 0.0),
        single_use=spec.optional("singleUse", _boolean, False),
        used_by=spec.items("usedBy", _uid, limit=MAX_USED_BY),
    )
    root.done()
    return JoinToken(meta, token)


def parse_status(kind: Kind, document: object, *, ignore_unknown: bool = False) -> StatusPart:
    """Read one writer's part of a status. Of a peer's, one with any of the agent's fields is a PeerReport.

    Paths in the refusals start at `status`. Raises InvalidResource.
    """
    fields = _Fields.of(document, path="status", ignore_unknown=ignore_unknown)
    part: StatusPart
    match kind:
        case Kind.MESH:
            part = _read_mesh_status(fields)
        case Kind.PEER:
            part = _read_report(fields) if _REPORT_FIELDS & fields.present() else _read_assignment(fields)
        case Kind.TOKEN:
            raise InvalidResource([Problem("kind", f"{kind} has no status", "ScopeMesh, ScopePeer")])
        case _:
            assert_never(kind)
    fields.done()
    return part


def parse_tombstone(document: object) -> Tombstone:
    """Read a tombstone that stands alone (on an agent's disk). Raises InvalidResource."""
    fields = _Fields.of(document, path="tombstone", ignore_unknown=True)
    tombstone = _read_tombstone(fields)
    fields.done()
    return tombstone


def tombstone_to_dict(tombstone: Tombstone) -> dict[str, object]:
    """The document of a tombstone."""
    return {
        "meshUID": tombstone.mesh_uid,
        "peerUID": tombstone.peer_uid,
        "key": str(tombstone.key),
        "signer": str(tombstone.signer),
        "signature": base64.b64encode(tombstone.signature).decode(),
    }


def parse_cluster(document: object) -> Cluster:
    """Read the entry of a cluster as it stands in a mesh's status. Raises InvalidResource."""
    fields = _Fields.of(document, path="cluster", ignore_unknown=False)
    cluster = _read_cluster(fields)
    fields.done()
    return cluster


def cluster_to_dict(cluster: Cluster) -> dict[str, object]:
    """The document of a cluster."""
    trust = cluster.trust
    joined = {"signingKey": str(trust.signing_key), **tokens_to_dict(trust.tokens)} if trust else {}
    return {"name": cluster.name, "uid": cluster.uid, **joined}


def parse_tokens(document: object) -> AgentTokens:
    """Read by what a cluster's agents are known. Raises InvalidResource."""
    fields = _Fields.of(document, path="tokens", ignore_unknown=False)
    tokens = _read_tokens(fields)
    fields.done()
    return tokens


def tokens_to_dict(tokens: AgentTokens) -> dict[str, object]:
    """The document of what a cluster's agents are known by."""
    account = tokens.service_account
    return {
        "issuer": tokens.issuer,
        "keys": [_token_key_dict(key) for key in tokens.keys],
        "serviceAccount": {"namespace": account.namespace, "name": account.name},
    }


def parse_jwks(document: object) -> tuple[TokenKey, ...]:
    """Read what an API server answers at /openid/v1/jwks. Raises InvalidResource."""
    fields = _Fields.of(document, path="jwks", ignore_unknown=True)
    keys = _read_token_keys(fields)
    fields.done()
    return keys


def overlapping(mesh: Mesh, others: Sequence[Mesh]) -> tuple[Problem, ...]:
    """The prefixes of `mesh` that another mesh uses too: a peer of both could not route."""
    return tuple(
        Problem(
            f"spec.addressing.ipv{ours.version}",
            f"{ours} overlaps {theirs} of ScopeMesh {other.meta.name}",
            "a prefix that no other mesh uses",
        )
        for other in others
        if other.meta.name != mesh.meta.name
        for ours in prefixes_of(mesh.spec.addressing)
        for theirs in prefixes_of(other.spec.addressing)
        if ours.version == theirs.version and ours.overlaps(theirs)
    )


def forbidden_changes(stored: Resource, asked: Resource) -> tuple[Problem, ...]:
    """What `asked` changes in the spec of `stored` that never changes: whom a peer is, and of which mesh."""
    if not isinstance(stored, Peer) or not isinstance(asked, Peer):
        return ()
    had, wanted = _peer_spec_dict(stored.spec), _peer_spec_dict(asked.spec)
    return tuple(
        Problem(
            f"spec.{name}",
            f"{_shown(wanted.get(name, ''))} is another than {_shown(had.get(name, ''))}",
            "no change: another mesh or Node is another peer",
            "delete this ScopePeer and create another",
        )
        for name in ("mesh", "cluster", "nodeName", "nodeUID")
        if had.get(name) != wanted.get(name)
    )


def prefixes_of(addressing: Addressing) -> tuple[IPNetwork, ...]:
    """The one or two prefixes of a mesh."""
    return tuple(prefix for prefix in (addressing.ipv4, addressing.ipv6) if prefix is not None)


def fit_report(report: PeerReport, limit: int = MAX_STATUS_BYTES) -> PeerReport:
    """The report with as many of its first links as `limit` bytes of compact JSON hold; counts stay whole."""
    links = report.links[:MAX_LINKS]
    while links and status_bytes(replace(report, links=links)) > limit:
        links = links[:-1]
    return replace(report, links=links)


def status_bytes(part: StatusPart) -> int:
    """The size of a part of a status as compact JSON."""
    return len(json.dumps(status_to_dict(part), separators=(",", ":"), ensure_ascii=False).encode())


# --- formatting --------------------------------------------------------------------------------------------


def to_dict(resource: Resource) -> dict[str, object]:
    """The resource as a dictionary of JSON values; `parse` reads it back to an equal value."""
    spec: dict[str, object]
    status: dict[str, object] = {}
    match resource:
        case Mesh():
            spec, status = _mesh_spec_dict(resource.spec), status_to_dict(resource.status)
        case Peer():
            spec, status = _peer_spec_dict(resource.spec), status_to_dict(resource.assignment)
            if resource.report is not None:
                status = status_to_dict(resource.report) | status
        case JoinToken():
            spec = _token_spec_dict(resource.spec)
        case _:
            assert_never(resource)
    document: dict[str, object] = {
        "apiVersion": API_VERSION,
        "kind": str(kind_of(resource)),
        "metadata": _meta_dict(resource.meta),
        "spec": spec,
    }
    if status:
        document["status"] = status
    return document


def status_to_dict(part: StatusPart) -> dict[str, object]:
    """One writer's part of a status as a dictionary; `parse_status` reads it back to an equal value."""
    match part:
        case MeshStatus():
            return _mesh_status_dict(part)
        case PeerReport():
            return _report_dict(part)
        case Assignment():
            return _assignment_dict(part)
        case _:
            assert_never(part)


# --- text forms that others need too -----------------------------------------------------------------------

_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}  # milliseconds
_DURATION = re.compile(r"(?:[0-9]{1,12}ms|[0-9]{1,9}[smhd])+")
_DURATION_PART = re.compile(r"([0-9]+)(ms|s|m|h|d)")
_DAY, _CLOCK = r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = re.compile(rf"({_DAY})T({_CLOCK}:[0-5][0-9])(\.[0-9]{{1,9}})?(Z|[+-]{_CLOCK})")
MAX_DURATION_TEXT = 32  # "365d23h59m59s999ms" and then some


def parse_duration(text: str) -> float:
    """Seconds of "500ms", "2s", "1h30m" or "30d". Raises ValueError."""
    if len(text) > MAX_DURATION_TEXT or not _DURATION.fullmatch(text):
        raise ValueError("a duration is a whole number with its unit: ms, s, m, h or d")
    return sum(int(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text)) / 1000


def format_duration(seconds: float) -> str:
    """The duration in the largest unit that divides it, to the millisecond."""
    milliseconds = round(seconds * 1000)
    unit = max((u for u, size in _UNITS.items() if milliseconds % size == 0), key=lambda u: _UNITS[u])
    return f"{milliseconds // _UNITS[unit]}{unit}" if milliseconds else "0s"


def parse_time(text: str) -> float:
    """Seconds since the Unix epoch of an RFC 3339 time. Raises ValueError."""
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError("a time is RFC 3339, as 2026-01-31T12:00:00Z")
    day, clock, fraction, zone = found.groups()
    whole = int(datetime.fromisoformat(f"{day}T{clock}{zone}").timestamp())
    if not 0 <= whole <= MAX_TIME:
        raise ValueError("a time is in the years 1970 to 9999")
    return float(f"{whole}{fraction or ''}")


def format_time(wall: float) -> str:
    """RFC 3339 in UTC with as many digits as bring the same float back (nanoseconds at most)."""
    whole, _, fraction = f"{Decimal(repr(wall)):.9f}".partition(".")
    fraction = fraction.rstrip("0")
    text = datetime.fromtimestamp(int(whole), UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


# --- the parts of a resource, read -------------------------------------------------------------------------

# Bookkeeping of Kubernetes that comes with every object and that Scope does not use.
_FOREIGN_METADATA = frozenset(
    {
        *("labels", "annotations", "managedFields", "finalizers", "ownerReferences", "selfLink"),
        *("generateName", "deletionTimestamp", "deletionGracePeriodSeconds"),
    }
)
_REPORT_FIELDS = frozenset(
    {
        *("keys", "endpoints", "mapping", "device", "links", "direct", "relayed", "unreachable"),
        *("heldAddresses", "protocol"),
    }
)
# Stand-ins for values that are missing: the document is refused, so they never leave this module.
_NO_KEY = PublicKey(bytes(model.KEY_BYTES))
_NO_ENDPOINT = Endpoint(ip_address("0.0.0.0"), 1)  # noqa: S104


def _read_meta(root: _Fields, kind: Kind) -> Meta:
    root.required("apiVersion", lambda value: _constant(API_VERSION, value), "")
    root.required("kind", lambda value: _constant(kind, value), "")
    fields = root.sub("metadata", required=True)
    fields.ignored = _FOREIGN_METADATA
    return Meta(
        name=fields.required("name", _label if kind is Kind.MESH else _subdomain, ""),
        uid=fields.optional("uid", _uid, ""),
        revision=fields.optional("resourceVersion", _revision, 0),
        generation=fields.optional("generation", lambda value: _integer(value, 0, 2**63 - 1), 1),
        created=fields.optional("creationTimestamp", _time, 0.0),
    )


_USUAL_EXPIRY = MeshSpec(Addressing()).peer_expiry


def _read_mesh_spec(fields: _Fields) -> MeshSpec:
    addressing = fields.sub("addressing", required=True)
    ipv4 = addressing.optional("ipv4", _mesh_ipv4, None)
    ipv6 = addressing.optional("ipv6", _mesh_ipv6, None)
    if fields.is_mapping("addressing") and not addressing.present() & {"ipv4", "ipv6"}:
        addressing.refuse("no prefix", "ipv4, ipv6 or both", 'for example ipv6: "fd5c:0be1:7a30::/64"')
    return MeshSpec(
        addressing=Addressing(ipv4, ipv6),
        prefer=fields.optional("prefer", lambda value: _choice(Family, value), Family.IPV6),
        timers=_read_timers(fields.sub("timers")),
        listen_port=fields.optional("listenPort", lambda value: _integer(value, 0, 65535), 0),
        mtu=fields.optional("mtu", _mtu, None),
        peer_expiry=fields.optional(
            "peerExpiry", lambda value: _duration(value, MIN_EXPIRY, MAX_EXPIRY), _USUAL_EXPIRY
        ),
        node_selector=_read_selector(fields.sub("nodeSelector")),
    )


def _read_selector(fields: _Fields) -> LabelSelector:
    return LabelSelector(
        match_labels=fields.optional("matchLabels", _labels, ()),
        match_expressions=fields.parts("matchExpressions", _read_requirement, limit=MAX_REQUIREMENTS),
    )


def _read_requirement(fields: _Fields) -> Requirement:
    requirement = Requirement(
        key=fields.required("key", _label_key, ""),
        operator=fields.required("operator", lambda value: _choice(Operator, value), Operator.EXISTS),
        values=fields.items("values", _label_value, limit=MAX_VALUES),
    )
    compares = requirement.operator in (Operator.IN, Operator.NOT_IN)
    if compares != bool(fields.values.get("values")) and not fields.refused("operator", "values"):
        found = "no value" if compares else "values that nothing is compared with"
        allowed = "one value or more" if compares else "none"
        fields.refuse(f"{found} for {requirement.operator}", allowed, at="values")
    return requirement


def _read_timers(fields: _Fields) -> Timers:
    usual = Timers()

    def timer(name: str, default: float) -> float:
        return fields.optional(name, lambda value: _duration(value, MIN_PROBE, MAX_TIMER), default)

    steps = {
        "probeInterval": fields.optional(
            "probeInterval", lambda value: _duration(value, MIN_PROBE, MAX_PROBE), usual.probe_interval
        ),
        "addressFallback": timer("addressFallback", usual.address_fallback),
        "report": timer("report", usual.report),
        "connectBack": timer("connectBack", usual.connect_back),
        "hubFallback": timer("hubFallback", usual.hub_fallback),
    }
    for earlier, later in pairwise(steps):
        if steps[later] < steps[earlier] and not fields.refused(earlier, later):
            fields.refuse(
                f"{format_duration(steps[later])} is before {earlier} ({format_duration(steps[earlier])})",
                f"{format_duration(steps[earlier])} or later",
                at=later,
            )
    return Timers(*steps.values())


def _read_mesh_status(fields: _Fields) -> MeshStatus:
    counts = fields.sub("counts")
    return MeshStatus(
        signing_key=fields.optional("signingKey", _key, None),
        reflectors=fields.parts("reflectors", _read_reflector, limit=MAX_REFLECTORS),
        counts=MeshCounts(*(counts.optional(name, _count, 0) for name in _COUNTS)),
        conditions=_read_conditions(fields),
        observed_generation=fields.optional(
            "observedGeneration", lambda value: _integer(value, 0, 2**63 - 1), 0
        ),
        clusters=_each_once(
            fields,
            "clusters",
            fields.parts("clusters", _read_cluster, limit=MAX_CLUSTERS),
            key=lambda cluster: cluster.name,
        ),
    )


_COUNTS = ("peers", "online", "direct", "relayed", "unreachable")


def _read_reflector(fields: _Fields) -> Reflector:
    return Reflector(
        probe_key=fields.required("probeKey", _key, _NO_KEY),
        endpoints=fields.items("endpoints", _endpoint, limit=MAX_CANDIDATES),
    )


def _read_cluster(fields: _Fields) -> Cluster:
    name = fields.required("name", _cluster_name, "")
    uid = fields.required("uid", _object_uid, "")
    if not _TRUST_FIELDS & fields.present():
        fields.expected |= _TRUST_FIELDS
        return Cluster(name, uid)
    return Cluster(
        name, uid, ClusterTrust(fields.required("signingKey", _key, _NO_KEY), _read_tokens(fields))
    )


_TRUST_FIELDS = frozenset({"signingKey", "issuer", "keys", "serviceAccount"})


def _read_tokens(fields: _Fields) -> AgentTokens:
    account = fields.sub("serviceAccount", required=True)
    return AgentTokens(
        issuer=fields.required("issuer", lambda value: _some_text(value, MAX_ISSUER), ""),
        keys=_read_token_keys(fields),
        service_account=ServiceAccount(
            namespace=account.required("namespace", _label, ""), name=account.required("name", _subdomain, "")
        ),
    )


def _read_token_keys(fields: _Fields) -> tuple[TokenKey, ...]:
    keys = fields.parts("keys", _read_token_key, limit=MAX_TOKEN_KEYS)
    if not keys and not fields.refused("keys"):
        fields.refuse("no key", f"1 to {MAX_TOKEN_KEYS} public keys, as /openid/v1/jwks has them", at="keys")
    return _each_once(fields, "keys", keys, key=lambda each: each.id)


def _read_token_key(fields: _Fields) -> TokenKey:
    kind = fields.required("kty", lambda value: _one_of(("RSA", "EC"), value), "")
    name = fields.required("kid", lambda value: _some_text(value, MAX_KEY_ID), "")
    fields.optional("use", lambda value: _constant("sig", value), "")
    if kind == "EC":
        curve = fields.required("crv", lambda value: _choice(Curve, value), Curve.P256)
        fields.optional("alg", lambda value: _constant(ALGORITHMS[curve], value), "")
        size = _COORDINATE_BYTES[curve]
        coordinates = [fields.required(each, lambda value: _coordinate(value, size), 0) for each in "xy"]
        return EcKey(name, curve, *coordinates)
    fields.optional("alg", lambda value: _constant(RSA_ALGORITHM, value), "")
    return RsaKey(
        name,
        fields.required("n", _modulus, 0) if kind else 0,
        fields.required("e", _exponent, 0) if kind else 0,
    )


RSA_ALGORITHM = "RS256"  # what an API server signs with: its key decides, never a token's header
ALGORITHMS = {Curve.P256: "ES256", Curve.P384: "ES384", Curve.P521: "ES512"}
_COORDINATE_BYTES = {Curve.P256: 32, Curve.P384: 48, Curve.P521: 66}


def _read_conditions(fields: _Fields) -> tuple[Condition, ...]:
    conditions = fields.parts("conditions", _read_condition, limit=MAX_CONDITIONS)
    return _each_once(fields, "conditions", conditions, key=lambda condition: condition.type)


def _each_once(
    fields: _Fields, name: str, values: tuple[T, ...], *, key: Callable[[T], str]
) -> tuple[T, ...]:
    """The values of a list that is a map by `key`, as Kubernetes reads it."""
    seen: set[str] = set()
    for i, value in enumerate(values):
        if key(value) and key(value) in seen:  # an empty one is a stand-in, and was refused
            fields.refuse(f"a second {_shown(key(value))}", "each one once", at=f"{name}[{i}]")
        seen.add(key(value))
    return values


def _read_condition(fields: _Fields) -> Condition:
    return Condition(
        type=fields.required("type", _condition_type, ""),
        status=fields.required("status", lambda value: _one_of(("True", "False", "Unknown"), value), ""),
        reason=fields.optional("reason", lambda value: _text(value, MAX_REASON), ""),
        message=fields.optional("message", lambda value: _text(value, MAX_MESSAGE), ""),
        changed=fields.optional("lastTransitionTime", _time, 0.0),
    )


def _read_peer_spec(fields: _Fields) -> PeerSpec:
    node = _NODE_FIELDS & fields.present()
    if node and node != _NODE_FIELDS:
        fields.refuse(
            f"{', '.join(sorted(node))} without {', '.join(sorted(_NODE_FIELDS - node))}",
            "all three for the peer of a Kubernetes Node, none for an external peer",
        )
    return PeerSpec(
        mesh=fields.required("mesh", _label, ""),
        role=fields.optional("role", lambda value: _choice(Role, value), Role.AUTO),
        routes=fields.items("routes", _route, limit=MAX_ROUTES),
        endpoints=fields.items("endpoints", _static_endpoint, limit=MAX_CANDIDATES),
        cluster=fields.optional("cluster", _cluster_name, ""),
        node_name=fields.optional("nodeName", _subdomain, ""),
        node_uid=fields.optional("nodeUID", _object_uid, ""),
    )


_NODE_FIELDS = frozenset({"cluster", "nodeName", "nodeUID"})


def _read_report(fields: _Fields) -> PeerReport:
    keys = fields.sub("keys", required=True)
    return PeerReport(
        keys=PeerKeys(
            wireguard=keys.required("wireGuard", _key, _NO_KEY),
            probe=keys.required("probe", _key, _NO_KEY),
            signing=keys.required("signing", _key, _NO_KEY),
        ),
        endpoints=fields.parts("endpoints", _read_candidate, limit=MAX_CANDIDATES),
        mapping=fields.optional(
            "mapping", lambda value: _choice(model.Mapping, value), model.Mapping.UNKNOWN
        ),
        device=fields.optional("device", lambda value: _choice(DeviceKind, value), None),
        links=fields.parts("links", _read_link, limit=MAX_LINKS),
        direct=fields.optional("direct", _count, 0),
        relayed=fields.optional("relayed", _count, 0),
        unreachable=fields.optional("unreachable", _count, 0),
        held_addresses=fields.items("heldAddresses", _address, limit=MAX_ADDRESSES),
        protocol=fields.optional("protocol", lambda value: _integer(value, 1, 255), 1),
    )


def _read_candidate(fields: _Fields) -> Candidate:
    return Candidate(
        endpoint=fields.required("endpoint", _endpoint, _NO_ENDPOINT),
        kind=fields.required("kind", lambda value: _choice(CandidateKind, value), CandidateKind.HOST),
    )


def _read_link(fields: _Fields) -> Link:
    return Link(
        peer=fields.required("peer", _subdomain, ""),
        path=fields.required("path", lambda value: _choice(PathKind, value), PathKind.NONE),
        endpoint=fields.optional("endpoint", _endpoint, None),
        observed=fields.optional("observed", _endpoint, None),
        latency=fields.optional("latencyMs", _latency, None),
        reason=fields.optional("reason", lambda value: _text(value, MAX_REASON), ""),
    )


def _read_assignment(fields: _Fields) -> Assignment:
    return Assignment(
        addresses=fields.items("addresses", _interface, limit=MAX_ADDRESSES),
        role=fields.optional("role", lambda value: _choice(Role, value), Role.EDGE),
        online=fields.optional("online", _boolean, False),
        last_seen=fields.optional("lastSeen", _time, 0.0),
        conditions=_read_conditions(fields),
        tombstone=_read_tombstone(fields.sub("tombstone")) if "tombstone" in fields.present() else None,
    )


def _read_tombstone(fields: _Fields) -> Tombstone:
    return Tombstone(
        mesh_uid=fields.required("meshUID", _uid, ""),
        peer_uid=fields.required("peerUID", _uid, ""),
        key=fields.required("key", _key, _NO_KEY),
        signer=fields.required("signer", _key, _NO_KEY),
        signature=fields.required("signature", lambda value: _base64(value, size=64), b""),
    )


# --- single values: each returns the value or raises _Refused with what was found and what is allowed ------


class _Refused(Exception):
    """A value that is not allowed where it stands; `_Fields` turns it into a Problem with the path."""

    def __init__(self, found: str, allowed: str, hint: str = "") -> None:
        super().__init__(found)
        self.found, self.allowed, self.hint = found, allowed, hint


def _shown(value: object) -> str:
    """A refused value as JSON, cut to SHOWN_VALUE characters; what it is where it is no single value."""
    match value:
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case int() if abs(value) > 2**64:
            return "a huge number"
        case bool() | int() | float() | str():
            text = json.dumps(value[:SHOWN_VALUE] if isinstance(value, str) else value)
            return text if len(text) <= SHOWN_VALUE + 2 else text[:SHOWN_VALUE] + "..."
        case _:
            return f"a {type(value).__name__}"


def _refusal(value: object, allowed: str, hint: str = "") -> _Refused:
    return _Refused(f"{_shown(value)} is not allowed", allowed, hint)


def _text(value: object, limit: int, allowed: str = "") -> str:
    """A string of printable characters: what reaches a terminal carries no escape sequence."""
    if not isinstance(value, str) or not value.isprintable():
        raise _refusal(value, allowed or "text without control characters")
    if len(value) > limit:
        found = f"{_shown(value)} has {len(value)} characters"
        raise _Refused(found, allowed or f"at most {limit} characters")
    return value


def _some_text(value: object, limit: int) -> str:
    allowed = f"1 to {limit} characters"
    text = _text(value, limit, allowed)
    if not text:
        raise _refusal(value, allowed)
    return text


def _condition_type(value: object) -> str:
    return _some_text(value, MAX_LABEL)


_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# As Kubernetes reads one, the names of Nodes included: the length of each label is left to DNS.
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")


def _label(value: object) -> str:
    allowed = f"a DNS label: a-z, 0-9 and -, at most {MAX_LABEL}"
    text = _text(value, MAX_LABEL, allowed)
    if not _LABEL.fullmatch(text):
        raise _refusal(value, allowed, _name_hint(text))
    return text


def _subdomain(value: object) -> str:
    allowed = f"DNS labels (a-z, 0-9 and -) joined by dots, at most {MAX_NAME}"
    text = _text(value, MAX_NAME, allowed)
    if not _SUBDOMAIN.fullmatch(text):
        raise _refusal(value, allowed, _name_hint(text))
    return text


EXTERNAL = "external"  # stands in the names of peers off Kubernetes where others have their cluster


def _cluster_name(value: object) -> str:
    name = _label(value)
    if name == EXTERNAL:
        raise _refusal(value, "any other DNS label", "the names of external peers begin with it")
    return name


_LABEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"(?:(?P<prefix>{_SUBDOMAIN.pattern})/)?{_LABEL_NAME.pattern}")
MAX_LABEL_KEY = MAX_NAME + 1 + MAX_LABEL  # a DNS subdomain, a slash and a name


def _label_key(value: object) -> str:
    allowed = "the key of a label, as topology.kubernetes.io/zone"
    text = _text(value, MAX_LABEL_KEY, allowed)
    found = _LABEL_KEY.fullmatch(text)
    if not found or len(found["prefix"] or "") > MAX_NAME:
        raise _refusal(value, allowed)
    return text


def _label_value(value: object) -> str:
    allowed = f"the value of a label: letters, digits and ._-, at most {MAX_LABEL}"
    text = _text(value, MAX_LABEL, allowed)
    if text and not _LABEL_NAME.fullmatch(text):
        raise _refusal(value, allowed)
    return text


def _labels(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise _refusal(value, "an object of label keys and values")
    if len(value) > MAX_REQUIREMENTS:
        raise _Refused(f"{len(value)} labels", f"at most {MAX_REQUIREMENTS}")
    return tuple(sorted((_label_key(key), _label_value(wanted)) for key, wanted in value.items()))


def _name_hint(text: str) -> str:
    lower = text.lower().replace("_", "-")
    return f'did you mean "{lower}"?' if lower != text and _LABEL.fullmatch(lower) else ""


_UID = re.compile(r"[A-Za-z0-9._:+/=-]*")


def _uid(value: object) -> str:
    allowed = f"letters, digits and ._:+/=-, at most {MAX_UID}"
    text = _text(value, MAX_UID, allowed)
    if not _UID.fullmatch(text):
        raise _refusal(value, allowed)
    return text


def _object_uid(value: object) -> str:
    """The UID of an object of Kubernetes, which is never empty."""
    if value == "":
        raise _refusal(value, f"a UID: letters, digits and ._:+/=-, 1 to {MAX_UID}")
    return _uid(value)


def _revision(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,19}", value):
        raise _refusal(value, "a whole number as a string")
    return int(value)


def _constant(wanted: str, value: object) -> str:
    if value != wanted:
        raise _refusal(value, wanted)
    return wanted


def _one_of(choices: Sequence[str], value: object) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise _refusal(value, ", ".join(choices), _meant(value, choices))


def _choice(kinds: type[E], value: object) -> E:
    if isinstance(value, str):
        try:
            return kinds(value)
        except ValueError:
            pass
    return kinds(_one_of([str(kind) for kind in kinds], value))


def _meant(value: object, choices: Sequence[str]) -> str:
    """A guess at what was meant, or nothing."""
    if not isinstance(value, str) or len(value) > MAX_LABEL:
        return ""
    for choice in choices:
        if choice.lower() == value.lower():
            return f'did you mean "{choice}"?'
    from difflib import get_close_matches  # only a refusal needs it

    close = get_close_matches(value, choices, n=1)
    return f'did you mean "{close[0]}"?' if close else ""


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _refusal(value, "true, false")
    return value


def _integer(value: object, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise _refusal(value, f"a whole number from {lowest} to {highest}")
    return value


def _count(value: object) -> int:
    return _integer(value, 0, MAX_COUNT)


def _mtu(value: object) -> int | None:
    if value == "Auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_MTU <= value <= MAX_MTU:
        raise _refusal(value, f"Auto, or a whole number from {MIN_MTU} to {MAX_MTU}")
    return value


def _latency(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_LATENCY * 1000:
        raise _refusal(value, f"milliseconds, from 0 to {MAX_LATENCY * 1000:.0f}")
    return round(value * 1000) / 1_000_000


def _duration(value: object, lowest: float, highest: float) -> float:
    allowed = f"{format_duration(lowest)} to {format_duration(highest)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise _refusal(value, allowed, 'a duration has a unit, as "2s"')
    text = _text(value, MAX_DURATION_TEXT, allowed)
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise _refusal(value, allowed, str(error)) from None
    if not lowest <= seconds <= highest:
        raise _refusal(value, allowed)
    return seconds


def _time(value: object) -> float:
    text = _text(value, MAX_LABEL, "RFC 3339, as 2026-01-31T12:00:00Z")
    try:
        return parse_time(text)
    except ValueError as error:
        raise _refusal(value, "RFC 3339, as 2026-01-31T12:00:00Z", str(error)) from None


def _base64(value: object, *, size: int) -> bytes:
    allowed = f"{size} bytes in base64"
    text = _text(value, 4 * (size + 2) // 3 + 4, allowed)
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _refusal(value, allowed) from None
    if len(raw) != size or base64.b64encode(raw).decode() != text:
        raise _refusal(value, allowed)
    return raw


def _base64url(value: object, *, longest: int, allowed: str) -> bytes:
    """At most `longest` bytes in canonical unpadded base64url (RFC 7515, section 2)."""
    text = _text(value, 4 * longest // 3 + 2, allowed)
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _refusal(value, allowed) from None
    if not 0 < len(raw) <= longest or _as_base64url(raw) != text:
        raise _refusal(value, allowed)
    return raw


def _as_base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _coordinate(value: object, size: int) -> int:
    allowed = f"{size} bytes in base64url"
    raw = _base64url(value, longest=size, allowed=allowed)
    if len(raw) != size:
        raise _refusal(value, allowed)
    return int.from_bytes(raw, "big")


def _modulus(value: object) -> int:
    allowed = f"a modulus of {RSA_BITS[0]} to {RSA_BITS[-1]} bits in base64url"
    number = int.from_bytes(_base64url(value, longest=RSA_BITS[-1] // 8, allowed=allowed), "big")
    if number.bit_length() not in RSA_BITS or number % 2 == 0:
        raise _refusal(value, allowed)
    return number


def _exponent(value: object) -> int:
    allowed = f"an odd number from 3 to {MAX_EXPONENT} in base64url, as AQAB"
    number = int.from_bytes(_base64url(value, longest=4, allowed=allowed), "big")
    if number < 3 or number % 2 == 0:
        raise _refusal(value, allowed)
    return number


def _key(value: object) -> PublicKey:
    return PublicKey(_base64(value, size=model.KEY_BYTES))


_ENDPOINT_FORM = "ADDRESS:PORT, IPv6 as [ADDRESS]:PORT, port 1 to 65535"


def _endpoint(value: object) -> Endpoint:
    text = _unzoned(value, MAX_ENDPOINT, _ENDPOINT_FORM)
    if ":0" in text[text.rfind(":") :]:
        raise _refusal(value, _ENDPOINT_FORM, "a port has no leading zero")
    try:
        endpoint = _parsed_endpoint(text)
    except ValueError as error:
        raise _refusal(value, _ENDPOINT_FORM, str(error)) from None
    if endpoint.family is Family.IPV4 and text.startswith("["):
        raise _refusal(value, _ENDPOINT_FORM, f'did you mean "{endpoint}"?')
    return endpoint


# Every peer's links name the endpoints of the same others: a mesh has far fewer endpoints than links.
@lru_cache(maxsize=16384)
def _parsed_endpoint(text: str) -> Endpoint:
    return Endpoint.parse(text)


_BROADCAST = ip_address("255.255.255.255")


def _static_endpoint(value: object) -> Endpoint:
    endpoint = _endpoint(value)
    address = endpoint.address
    if address.is_unspecified or address.is_multicast or address.is_loopback or address == _BROADCAST:
        raise _refusal(value, "an address that other peers can send to")
    return endpoint


def _address(value: object) -> IPAddress:
    allowed = "an IPv4 or IPv6 address"
    try:
        return _unmapped(ip_address(_unzoned(value, MAX_CIDR, allowed)))
    except ValueError:
        raise _refusal(value, allowed) from None


def _interface(value: object) -> IPInterface:
    allowed = "an address with the length of its mesh's prefix, as 100.64.0.7/16"
    text = _unzoned(value, MAX_CIDR, allowed)
    if not _LENGTH.search(text):
        raise _refusal(value, allowed, "its length is missing")
    try:
        interface = ip_interface(text)
        _unmapped(interface.ip)
    except ValueError:
        raise _refusal(value, allowed) from None
    return interface


def _prefix(value: object) -> IPNetwork:
    allowed = "a prefix, as 100.64.0.0/16 or fd5c:be1:7a30::/64"
    text = _unzoned(value, MAX_CIDR, allowed)
    if not _LENGTH.search(text):
        raise _refusal(value, allowed, "its length is missing")
    try:
        network = ip_network(text, strict=False)
        _unmapped(network.network_address)
    except ValueError as error:
        raise _refusal(value, allowed, str(error)) from None
    if ip_interface(text).ip != network.network_address:
        raise _Refused(f"{_shown(value)} has bits set beyond its length", str(network))
    return network


def _mesh_ipv4(value: object) -> IPv4Network:
    network = _prefix(value)
    allowed = "a prefix inside " + ", ".join(map(str, IPV4_RANGES))
    if not isinstance(network, IPv4Network) or not any(network.subnet_of(known) for known in IPV4_RANGES):
        raise _refusal(value, allowed)
    if network.prefixlen not in IPV4_LENGTHS:
        raise _refusal(value, f"a length from /{IPV4_LENGTHS[0]} to /{IPV4_LENGTHS[-1]}")
    return network


def _mesh_ipv6(value: object) -> IPv6Network:
    network = _prefix(value)
    if not isinstance(network, IPv6Network) or not network.subnet_of(IPV6_RANGE):
        raise _refusal(value, f"a unique local prefix inside {IPV6_RANGE} (RFC 4193)")
    if network.prefixlen not in IPV6_LENGTHS:
        raise _refusal(value, f"a length from /{IPV6_LENGTHS[0]} to /{IPV6_LENGTHS[-1]}")
    return network


def _route(value: object) -> IPNetwork:
    network = _prefix(value)
    shortest = MIN_ROUTE_LENGTH[network.version]
    if network.prefixlen < shortest:
        raise _refusal(value, f"a length of /{shortest} or more", "a wider one would swallow the underlay")
    if network.is_multicast or network.is_loopback or network.is_link_local:
        raise _refusal(value, "a prefix of unicast addresses that can be routed")
    return network


# A length is written as a number, not as a netmask.
_LENGTH = re.compile(r"/(?:0|[1-9][0-9]{0,2})\Z")


def _unmapped(address: IPAddress) -> IPAddress:
    """The address, unless it is IPv4 written as IPv6, a second spelling of it. Raises ValueError."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    if mapped is not None:
        raise ValueError(f"write {mapped}")
    return address


def _unzoned(value: object, limit: int, allowed: str) -> str:
    """Text without a zone: `%eth0` means something on one machine only."""
    text = _text(value, limit, allowed)
    if "%" in text:
        raise _refusal(value, allowed, "a zone (%) means nothing to other machines")
    return text


# --- a mapping under inspection ----------------------------------------------------------------------------


class _Fields:
    """One object of a document. What is asked of it is what it may hold; problems land in one shared list."""

    def __init__(
        self, values: Mapping[object, object], *, path: str, problems: list[Problem], parts: list[_Fields]
    ) -> None:
        self.values = values
        self.path = path
        self.problems = problems
        self.expected: set[str] = set()
        self.ignored: frozenset[str] = frozenset()
        self.inspected = parts
        self.ignore_unknown = False
        parts.append(self)

    @classmethod
    def of(cls, document: object, *, path: str = "", ignore_unknown: bool) -> _Fields:
        """The outermost object of a document."""
        problems: list[Problem] = []
        if not isinstance(document, Mapping):
            problems.append(Problem(path or "document", f"{_shown(document)} is not allowed", "an object"))
            raise InvalidResource(problems)
        fields = cls(document, path=path, problems=problems, parts=[])
        fields.ignore_unknown = ignore_unknown
        return fields

    def present(self) -> set[str]:
        """Names of the fields that have a value."""
        return {name for name, value in self.values.items() if isinstance(name, str) and value is not None}

    def is_mapping(self, name: str) -> bool:
        """Whether the field holds an object."""
        return isinstance(self.values.get(name), Mapping)

    def optional(self, name: str, read: Callable[[object], T], default: T) -> T:
        """The field's value, or the default when it is absent (or refused, which is noted)."""
        self.expected.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        return self._read(name, value, read, default)

    def required(self, name: str, read: Callable[[object], T], stand_in: T) -> T:
        """The field's value; a missing one is noted, and the stand-in never leaves this module."""
        if self.values.get(name) is None:
            self.expected.add(name)
            self.problems.append(Problem(self._at(name), "missing", _allowed_by(read)))
            return stand_in
        return self.optional(name, read, stand_in)

    def items(self, name: str, read: Callable[[object], T], *, limit: int) -> tuple[T, ...]:
        """The values of a list field."""
        values = self._list(name, limit)
        found = [self._read(f"{name}[{i}]", value, read, None) for i, value in enumerate(values)]
        return tuple(value for value in found if value is not None)

    def parts(self, name: str, read: Callable[[_Fields], T], *, limit: int) -> tuple[T, ...]:
        """The objects of a list field."""
        values = self._list(name, limit)
        return tuple(read(self._child(f"{self._at(name)}[{i}]", value)) for i, value in enumerate(values))

    def sub(self, name: str, *, required: bool = False) -> _Fields:
        """The object in a field; an empty one where it is absent."""
        self.expected.add(name)
        value = self.values.get(name)
        if value is None and required:
            self.problems.append(Problem(self._at(name), "missing", "an object"))
        return self._child(self._at(name), {} if value is None else value, silent=value is None and required)

    def refused(self, *names: str) -> bool:
        """Whether one of the fields has a problem already."""
        return any(problem.path == self._at(name) for problem in self.problems for name in names)

    def refuse(self, found: str, allowed: str, hint: str = "", *, at: str = "") -> None:
        """Note a problem of this object, or of its field `at`."""
        self.problems.append(Problem(self._at(at) if at else self.path, found, allowed, hint))

    def done(self) -> None:
        """Raise InvalidResource when anything was noted or, unless they are ignored, a field is unknown."""
        if not self.ignore_unknown:
            for fields in self.inspected:
                fields._note_unknown()
        if self.problems:
            raise InvalidResource(self.problems)

    def _note_unknown(self) -> None:
        known = sorted(self.expected)
        for name in self.values:
            if name in self.expected or name in self.ignored or len(self.problems) > 2 * MAX_PROBLEMS:
                continue
            shown = name if isinstance(name, str) and name.isprintable() else _shown(name)
            allowed = ", ".join(known)
            self.problems.append(
                Problem(self._at(shown[:SHOWN_VALUE]), "unknown field", allowed, _meant(name, known))
            )

    def _read(self, name: str, value: object, read: Callable[[object], T], default: T) -> T:
        try:
            return read(value)
        except _Refused as refused:
            self.problems.append(Problem(self._at(name), refused.found, refused.allowed, refused.hint))
            return default

    def _list(self, name: str, limit: int) -> Sequence[object]:
        self.expected.add(name)
        values = self.values.get(name)
        if values is None:
            return ()
        if not isinstance(values, list | tuple):
            self.refuse(f"{_shown(values)} is not allowed", "a list", at=name)
            return ()
        if len(values) > limit:
            self.refuse(f"{len(values)} items", f"at most {limit}", at=name)
            return ()
        return values

    def _child(self, path: str, value: object, *, silent: bool = False) -> _Fields:
        if isinstance(value, Mapping):
            problems = [] if silent else self.problems
            return _Fields(value, path=path, problems=problems, parts=self.inspected)
        self.problems.append(Problem(path, f"{_shown(value)} is not allowed", "an object"))
        return _Fields({}, path=path, problems=[], parts=self.inspected)

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _allowed_by(read: Callable[[object], object]) -> str:
    """What a reader would have taken: it says so when it refuses."""
    try:
        read(None)
    except _Refused as refused:
        return refused.allowed
    raise AssertionError("no reader takes null")


# --- the parts of a resource, written ----------------------------------------------------------------------


def _meta_dict(meta: Meta) -> dict[str, object]:
    return {
        "name": meta.name,
        **({"uid": meta.uid} if meta.uid else {}),
        **({"resourceVersion": str(meta.revision)} if meta.revision else {}),
        "generation": meta.generation,
        **({"creationTimestamp": format_time(meta.created)} if meta.created else {}),
    }


def _mesh_spec_dict(spec: MeshSpec) -> dict[str, object]:
    timers = spec.timers
    return {
        "addressing": {f"ipv{prefix.version}": str(prefix) for prefix in prefixes_of(spec.addressing)},
        "prefer": str(spec.prefer),
        "timers": {
            "probeInterval": format_duration(timers.probe_interval),
            "addressFallback": format_duration(timers.address_fallback),
            "report": format_duration(timers.report),
            "connectBack": format_duration(timers.connect_back),
            "hubFallback": format_duration(timers.hub_fallback),
        },
        "listenPort": spec.listen_port,
        "mtu": "Auto" if spec.mtu is None else spec.mtu,
        "peerExpiry": format_duration(spec.peer_expiry),
        **({"nodeSelector": selector} if (selector := _selector_dict(spec.node_selector)) else {}),
    }


def _selector_dict(selector: LabelSelector) -> dict[str, object]:
    expressions = [
        {"key": each.key, "operator": str(each.operator), **_unless_empty("values", each.values)}
        for each in selector.match_expressions
    ]
    return {
        **({"matchLabels": dict(selector.match_labels)} if selector.match_labels else {}),
        **({"matchExpressions": expressions} if expressions else {}),
    }


def _peer_spec_dict(spec: PeerSpec) -> dict[str, object]:
    return {
        "mesh": spec.mesh,
        "role": str(spec.role),
        **_unless_empty("routes", spec.routes),
        **_unless_empty("endpoints", spec.endpoints),
        **({"cluster": spec.cluster} if spec.cluster else {}),
        **({"nodeName": spec.node_name} if spec.node_name else {}),
        **({"nodeUID": spec.node_uid} if spec.node_uid else {}),
    }


def _token_spec_dict(spec: TokenSpec) -> dict[str, object]:
    return {
        "mesh": spec.mesh,
        "secretHash": base64.b64encode(spec.secret_hash).decode(),
        "role": str(spec.role),
        "expires": format_time(spec.expires),
        "singleUse": spec.single_use,
        **_unless_empty("usedBy", spec.used_by),
    }


def _mesh_status_dict(status: MeshStatus) -> dict[str, object]:
    # A zero is written out: kubectl shows what is not there as a blank, which could mean anything.
    counts = {name: getattr(status.counts, name) for name in _COUNTS} if status != MeshStatus() else {}
    reflectors = [
        {"probeKey": str(reflector.probe_key), **_unless_empty("endpoints", reflector.endpoints)}
        for reflector in status.reflectors
    ]
    return {
        **({"signingKey": str(status.signing_key)} if status.signing_key else {}),
        **({"reflectors": reflectors} if reflectors else {}),
        **({"counts": counts} if counts else {}),
        **_conditions_dict(status.conditions),
        **({"observedGeneration": status.observed_generation} if status.observed_generation else {}),
        **({"clusters": [cluster_to_dict(each) for each in status.clusters]} if status.clusters else {}),
    }


def _token_key_dict(key: TokenKey) -> dict[str, object]:
    match key:
        case RsaKey(name, modulus, exponent):
            return {"kty": "RSA", "kid": name, "n": _number(modulus), "e": _number(exponent)}
        case EcKey(name, curve, x, y):
            size = _COORDINATE_BYTES[curve]
            point = {"x": _number(x, size), "y": _number(y, size)}
            return {"kty": "EC", "kid": name, "crv": str(curve), **point}
    assert_never(key)


def _number(number: int, size: int = 0) -> str:
    return _as_base64url(number.to_bytes(size or (number.bit_length() + 7) // 8, "big"))


def _report_dict(report: PeerReport) -> dict[str, object]:
    keys = report.keys
    return {
        "keys": {"wireGuard": str(keys.wireguard), "probe": str(keys.probe), "signing": str(keys.signing)},
        **(
            {"endpoints": [{"endpoint": str(c.endpoint), "kind": str(c.kind)} for c in report.endpoints]}
            if report.endpoints
            else {}
        ),
        "mapping": str(report.mapping),
        **({"device": str(report.device)} if report.device else {}),
        **({"links": [_link_dict(link) for link in report.links]} if report.links else {}),
        "direct": report.direct,
        "relayed": report.relayed,
        "unreachable": report.unreachable,
        **_unless_empty("heldAddresses", report.held_addresses),
        "protocol": report.protocol,
    }


def _link_dict(link: Link) -> dict[str, object]:
    latency = None if link.latency is None else round(link.latency * 1_000_000) / 1000
    return {
        "peer": link.peer,
        "path": str(link.path),
        **({"endpoint": str(link.endpoint)} if link.endpoint else {}),
        **({"observed": str(link.observed)} if link.observed else {}),
        **({"latencyMs": latency} if latency is not None else {}),
        **({"reason": link.reason} if link.reason else {}),
    }


def _assignment_dict(assignment: Assignment) -> dict[str, object]:
    tombstone = assignment.tombstone
    document: dict[str, object] = {
        **_unless_empty("addresses", assignment.addresses),
        "role": str(assignment.role),
        "online": assignment.online,
        **({"lastSeen": format_time(assignment.last_seen)} if assignment.last_seen else {}),
        **_conditions_dict(assignment.conditions),
    }
    if tombstone is not None:
        document["tombstone"] = tombstone_to_dict(tombstone)
    return document


def _conditions_dict(conditions: Sequence[Condition]) -> dict[str, object]:
    if not conditions:
        return {}
    return {
        "conditions": [
            {
                "type": condition.type,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message,
                **({"lastTransitionTime": format_time(condition.changed)} if condition.changed else {}),
            }
            for condition in conditions
        ]
    }


def _unless_empty(name: str, values: Sequence[object]) -> dict[str, object]:
    return {name: [str(value) for value in values]} if values else {}
