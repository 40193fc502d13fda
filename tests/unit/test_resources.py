"""Resources: what is read is what was written, and every refusal says where, what and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope import model, resources
from scope.model import (
    Addressing,
    AgentTokens,
    Assignment,
    Candidate,
    CandidateKind,
    Cluster,
    ClusterTrust,
    Condition,
    Curve,
    DeviceKind,
    EcKey,
    Endpoint,
    Family,
    Forwarding,
    GatewayOrigin,
    HubCarrier,
    HubChoice,
    HubMode,
    Hubs,
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
    RelayLimits,
    RelayReport,
    Requirement,
    Resource,
    Role,
    RsaKey,
    ServiceAccount,
    Timers,
    TokenSpec,
    Tombstone,
    kind_of,
)
from scope.resources import InvalidResource

_MODULUS = "gA" + "A" * 339 + "Q"  # 2**2047 + 1
_EVEN = "gA" + "A" * 340  # 2**2047

# --- every value there can be ------------------------------------------------------------------------------

ADDRESSES = st.ip_addresses().filter(lambda address: getattr(address, "ipv4_mapped", None) is None)
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
UIDS = st.text("abcdef0123456789-", max_size=resources.MAX_UID)
KEYS = st.binary(min_size=32, max_size=32).map(PublicKey)
WALL = st.just(0.0) | st.floats(2.0**24, 2.0**35)
COUNTS = st.integers(0, resources.MAX_COUNT)
REASONS = st.text(st.characters().filter(str.isprintable), max_size=resources.MAX_REASON)
ENDPOINTS = st.builds(Endpoint, ADDRESSES, st.integers(1, 65535))
STATIC = ENDPOINTS.filter(
    lambda e: (
        not (e.address.is_unspecified or e.address.is_multicast or e.address.is_loopback)
        and str(e.address) != "255.255.255.255"
    )
)
MILLISECONDS = st.integers(100, 60_000).map(lambda n: n / 1000)
METAS = st.builds(Meta, NAMES, UIDS, st.integers(0, 10**18), st.integers(0, 2**62), WALL)
MESH_METAS = st.builds(Meta, LABELS, UIDS, st.integers(0, 10**18), st.integers(0, 2**62), WALL)
CONDITIONS = st.lists(
    st.builds(Condition, LABELS, st.sampled_from(("True", "False", "Unknown")), REASONS, REASONS, WALL),
    max_size=4,
    unique_by=lambda condition: condition.type,
).map(tuple)
CLUSTER_NAMES = LABELS.filter(lambda name: name != "external")
OBJECT_UIDS = UIDS.filter(bool)
RSA_KEYS = st.builds(
    RsaKey,
    LABELS,
    st.sampled_from((2**2047 + 1, 3 * 2**3000 + 1, 2**8191 + 1)),
    st.integers(1, 2**31 - 1).map(lambda n: 2 * n + 1),
)
EC_KEYS = st.sampled_from(((Curve.P256, 256), (Curve.P384, 384), (Curve.P521, 521))).flatmap(
    lambda of: st.builds(
        EcKey, LABELS, st.just(of[0]), st.integers(0, 2 ** of[1] - 1), st.integers(0, 2 ** of[1] - 1)
    )
)
TRUSTS = st.builds(
    ClusterTrust,
    KEYS,
    st.builds(
        AgentTokens,
        REASONS.filter(bool),
        st.lists(RSA_KEYS | EC_KEYS, min_size=1, max_size=4, unique_by=lambda key: key.id).map(tuple),
        st.builds(ServiceAccount, LABELS, NAMES),
    ),
)
CLUSTERS = st.lists(
    st.builds(Cluster, CLUSTER_NAMES, OBJECT_UIDS, st.none() | TRUSTS),
    max_size=3,
    unique_by=lambda cluster: cluster.name,
).map(tuple)
LABEL_KEYS = st.from_regex(
    r"([a-z0-9]{1,9}\.[a-z]{1,9}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True
)
LABEL_VALUES = st.just("") | st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True)
REQUIREMENTS = st.builds(
    Requirement,
    LABEL_KEYS,
    st.sampled_from((Operator.IN, Operator.NOT_IN)),
    st.lists(LABEL_VALUES, min_size=1, max_size=3).map(tuple),
) | st.builds(Requirement, LABEL_KEYS, st.sampled_from((Operator.EXISTS, Operator.DOES_NOT_EXIST)))
SELECTORS = st.builds(
    LabelSelector,
    st.dictionaries(LABEL_KEYS, LABEL_VALUES, max_size=3).map(lambda labels: tuple(sorted(labels.items()))),
    st.lists(REQUIREMENTS, max_size=3).map(tuple),
)


@st.composite
def _prefix(draw: st.DrawFn, parents: tuple[str, ...], lengths: range) -> IPv4Network | IPv6Network:
    parent = ip_network(draw(st.sampled_from(parents)))
    length = draw(st.sampled_from([n for n in lengths if n >= parent.prefixlen]))
    host = draw(st.integers(0, parent.num_addresses - 1))
    return ip_network((int(parent.network_address) + host, length), strict=False)


IPV4 = _prefix(tuple(map(str, resources.IPV4_RANGES)), resources.IPV4_LENGTHS)
IPV6 = _prefix(("fc00::/7",), resources.IPV6_LENGTHS)
ROUTES = _prefix(("10.0.0.0/8", "203.0.113.0/24"), range(8, 33)) | _prefix(("2001:db8::/32",), range(16, 129))
TIMERS = st.lists(MILLISECONDS, min_size=5, max_size=5).map(lambda steps: Timers(*sorted(steps)))
# Below and above the ports of Services of type NodePort.
PORTS = st.tuples(st.integers(1024, 29_900), st.integers(15, 99)) | st.tuples(
    st.integers(32_768, 65_000), st.integers(15, 535)
)


def _with_hubs(spec: MeshSpec) -> st.SearchStrategy[MeshSpec]:
    asked = st.builds(
        Hubs,
        st.sampled_from(HubMode),
        st.lists(NAMES, max_size=3, unique=True).map(tuple),
        st.none() | SELECTORS,
        PORTS.map(lambda of: (of[0], of[0] + of[1])),
        st.builds(RelayLimits, st.integers(0, resources.MAX_RATE), st.integers(0, resources.MAX_RATE)),
        st.integers(0, 65535),
    ).filter(lambda hubs: not hubs.ports[0] <= spec.listen_port <= hubs.ports[1])
    return st.just(spec) | asked.map(lambda hubs: replace(spec, hubs=hubs))


ORIGINS = st.builds(
    GatewayOrigin,
    st.builds("https://{}{}".format, LABELS, st.just("") | st.integers(1, 65535).map(":{}".format)),
    st.none() | st.binary(min_size=32, max_size=32),
)
MESHES = st.builds(
    Mesh,
    MESH_METAS,
    st.builds(
        MeshSpec,
        st.builds(Addressing, IPV4, IPV6) | st.builds(Addressing, IPV4) | st.builds(Addressing, ipv6=IPV6),
        st.sampled_from(Family),
        TIMERS,
        st.integers(0, 65535),
        st.none() | st.integers(1280, 9000),
        st.integers(60_000, 3650 * 86_400_000).map(lambda n: n / 1000),
        SELECTORS,
    ).flatmap(_with_hubs),
    st.builds(
        MeshStatus,
        st.none() | KEYS,
        st.lists(st.builds(Reflector, KEYS, st.lists(ENDPOINTS, max_size=3).map(tuple)), max_size=3).map(
            tuple
        ),
        st.none() | ORIGINS,
        st.builds(MeshCounts, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS),
        CONDITIONS,
        st.integers(0, 2**62),
        CLUSTERS,
        st.lists(st.builds(HubChoice, NAMES, st.booleans(), REASONS, WALL), max_size=3).map(tuple),
    ),
)
LINKS = st.builds(
    Link,
    NAMES,
    st.sampled_from(PathKind),
    st.none() | ENDPOINTS,
    st.none() | ENDPOINTS,
    st.none() | st.integers(0, 600_000_000).map(lambda n: n / 1_000_000),
    REASONS,
    st.just("") | NAMES,
    st.booleans(),
    st.booleans(),
)
CARRIERS = st.builds(HubCarrier, st.integers(1, 65535), st.binary(min_size=32, max_size=32), REASONS)
REPORTS = st.builds(
    PeerReport,
    st.builds(PeerKeys, KEYS, KEYS, KEYS),
    st.lists(st.builds(Candidate, ENDPOINTS, st.sampled_from(CandidateKind)), max_size=16).map(tuple),
    st.sampled_from(model.Mapping),
    st.none() | st.sampled_from(DeviceKind),
    st.lists(LINKS, max_size=16).map(tuple),
    COUNTS,
    COUNTS,
    COUNTS,
    st.lists(ADDRESSES, max_size=resources.MAX_ADDRESSES).map(tuple),
    st.integers(1, 255),
    st.none()
    | st.builds(RelayReport, st.sampled_from(Forwarding), COUNTS, COUNTS, REASONS, st.none() | CARRIERS),
)
INTERFACES = st.builds(
    lambda a, n: ip_interface((a, n if a.version == 4 else 4 * n)), ADDRESSES, st.integers(0, 32)
)
TOMBSTONES = st.builds(Tombstone, UIDS, UIDS, KEYS, KEYS, st.binary(min_size=64, max_size=64))
ASSIGNMENTS = st.builds(
    Assignment,
    st.lists(INTERFACES, max_size=resources.MAX_ADDRESSES).map(tuple),
    st.sampled_from(Role),
    st.booleans(),
    WALL,
    CONDITIONS,
    st.none() | TOMBSTONES,
)
PEER_SPEC = partial(
    st.builds,
    PeerSpec,
    LABELS,
    st.sampled_from(Role),
    st.lists(ROUTES, max_size=4).map(tuple),
    st.lists(STATIC, max_size=4).map(tuple),
)
PEER_SPECS = PEER_SPEC() | PEER_SPEC(CLUSTER_NAMES, NAMES, OBJECT_UIDS)
PEERS = st.builds(Peer, METAS, PEER_SPECS, st.none() | REPORTS, ASSIGNMENTS)
TOKENS = st.builds(
    JoinToken,
    METAS,
    st.builds(
        TokenSpec,
        LABELS,
        st.binary(min_size=32, max_size=32),
        st.sampled_from(Role),
        WALL,
        st.booleans(),
        st.lists(UIDS, max_size=3).map(tuple),
    ),
)


def _through_json(document: dict[str, object]) -> object:
    return json.loads(json.dumps(document))


@given(MESHES | PEERS | TOKENS)
def test_what_is_read_is_what_was_written(resource: Resource) -> None:
    assert resources.parse(_through_json(resources.to_dict(resource))) == resource


@given(MESHES | PEERS | TOKENS)
def test_a_newer_reader_reads_the_same(resource: Resource) -> None:
    document = cast("dict[str, object]", _through_json(resources.to_dict(resource)))
    assert resources.parse(document | {"later": 1}, ignore_unknown=True) == resource
    with pytest.raises(InvalidResource, match="later: unknown field; allowed: apiVersion"):
        resources.parse(document | {"later": 1})


@given(REPORTS | ASSIGNMENTS)
def test_a_writers_part_of_a_peers_status_travels_alone(part: PeerReport | Assignment) -> None:
    assert resources.parse_status(Kind.PEER, _through_json(resources.status_to_dict(part))) == part


@given(MESHES)
def test_the_status_of_a_mesh_travels_alone(mesh: Mesh) -> None:
    assert (
        resources.parse_status(Kind.MESH, _through_json(resources.status_to_dict(mesh.status))) == mesh.status
    )


def _refusal_if_any(document: object) -> str:
    try:
        resources.parse(document)
    except InvalidResource as error:
        return str(error)
    return ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(MESHES | PEERS | TOKENS, st.data())
def test_a_spoilt_document_is_refused_or_read_and_never_crashes(
    resource: Resource, data: st.DataObject
) -> None:
    document = cast("dict[str, object]", _through_json(resources.to_dict(resource)))
    place: object = document
    while isinstance(place, dict) and place:
        name = data.draw(st.sampled_from(sorted(place)))
        inner = place[name]
        if not isinstance(inner, dict) or data.draw(st.booleans()):
            place[name] = data.draw(JSON)
            break
        place = inner
    refusal = _refusal_if_any(document)
    assert all(line.isprintable() for line in refusal.splitlines())


@given(JSON)
def test_any_json_at_all_is_refused_with_a_sentence(document: object) -> None:
    with pytest.raises(InvalidResource, match="allowed: "):
        resources.parse(document)


# --- refusals ----------------------------------------------------------------------------------------------


def _mesh(**spec: object) -> dict[str, object]:
    return {
        "apiVersion": "scope.ltgc.cc/v1alpha1",
        "kind": "ScopeMesh",
        "metadata": {"name": "home"},
        "spec": {"addressing": {"ipv6": "fd5c:be1:7a30::/64"}} | spec,
    }


def _peer(status: Mapping[str, object] | None = None, **spec: object) -> dict[str, object]:
    return {
        "apiVersion": "scope.ltgc.cc/v1alpha1",
        "kind": "ScopePeer",
        "metadata": {"name": "home.nas"},
        "spec": {"mesh": "home"} | spec,
        "status": status,
    }


def _refusal(document: object) -> list[str]:
    with pytest.raises(InvalidResource) as caught:
        resources.parse(document)
    return str(caught.value).splitlines()


def test_a_short_mesh_file_gets_the_defaults() -> None:
    mesh = resources.parse_mesh(_mesh())
    assert mesh == Mesh(Meta("home"), MeshSpec(Addressing(ipv6=IPv6Network("fd5c:be1:7a30::/64"))))
    assert kind_of(mesh) is Kind.MESH


def test_a_typing_error_is_named_with_what_was_meant() -> None:
    assert _refusal(_mesh(timers={"reprot": "16s"})) == [
        "spec.timers.reprot: unknown field; "
        'allowed: addressFallback, connectBack, hubFallback, probeInterval, report; did you mean "report"?'
    ]


def test_all_problems_of_a_document_are_told_at_once() -> None:
    document = _mesh(
        addressing={"ipv4": "10.0.0.1/24", "ipv6": "2001:db8::/64"}, mtu=99, listenPort="51820", prefer="ipv4"
    ) | {"apiVersion": "v1"}
    assert _refusal(document) == [
        'apiVersion: "v1" is not allowed; allowed: scope.ltgc.cc/v1alpha1',
        'spec.addressing.ipv4: "10.0.0.1/24" has bits set beyond its length; allowed: 10.0.0.0/24',
        'spec.addressing.ipv6: "2001:db8::/64" is not allowed; '
        "allowed: a unique local prefix inside fc00::/7 (RFC 4193)",
        'spec.prefer: "ipv4" is not allowed; allowed: IPv4, IPv6; did you mean "IPv4"?',
        'spec.listenPort: "51820" is not allowed; allowed: a whole number from 0 to 65535',
        "spec.mtu: 99 is not allowed; allowed: Auto, or a whole number from 1280 to 9000",
    ]


def test_a_document_with_endless_problems_gets_a_short_answer() -> None:
    document = _mesh(**{f"field{n}": n for n in range(10_000)})
    assert len(_refusal(document)) == resources.MAX_PROBLEMS + 1


@pytest.mark.parametrize(
    ("addressing", "refusal"),
    [
        ({}, "spec.addressing: no prefix; allowed: ipv4, ipv6 or both"),
        (None, "spec.addressing: missing; allowed: an object"),
        ([], "spec.addressing: a list is not allowed; allowed: an object"),
        ({"ipv4": "203.0.113.0/24"}, "allowed: a prefix inside 10.0.0.0/8, 172.16.0.0/12"),
        ({"ipv4": "100.0.0.0/8"}, "allowed: a prefix inside 10.0.0.0/8"),
        ({"ipv4": "10.0.0.0/31"}, "allowed: a length from /8 to /30"),
        ({"ipv4": "10.0.0.0"}, "its length is missing"),
        ({"ipv4": "fd00::/64"}, "allowed: a prefix inside 10.0.0.0/8"),
        ({"ipv4": 10}, "spec.addressing.ipv4: 10 is not allowed; allowed: text"),
        ({"ipv6": "fd00::/16"}, "allowed: a length from /32 to /120"),
        ({"ipv6": "fd00::1/64"}, "allowed: fd00::/64"),
        ({"ipv6": "fd00::%eth0/64"}, "a zone"),
        ({"ipv5": "fd00::/64", "ipv6": "fd00::/64"}, "spec.addressing.ipv5: unknown field"),
    ],
)
def test_an_address_space_that_cannot_work_is_refused(addressing: object, refusal: str) -> None:
    [line] = _refusal(_mesh(addressing=addressing))
    assert refusal in line.replace("a prefix, as 100.64.0.0/16 or fd5c:be1:7a30::/64", "text")


@pytest.mark.parametrize(
    ("hubs", "refusal"),
    [
        (
            {"ports": {"first": 29990, "last": 30010}},
            "spec.hubs.ports: 29990 to 30010 overlaps 30000 to 32767; "
            "allowed: ports below 30000 or above 32767; "
            "Kubernetes gives these to Services of type NodePort, and would take what is relayed there",
        ),
        (
            {"ports": {"first": 26000, "last": 26014}},
            "26000 to 26014 is too short; allowed: 16 ports or more",
        ),
        ({"ports": {"first": 40000}}, "40000 to 26255 is too short"),
        (
            {"ports": {"first": 26300, "last": 26399}},
            "spec.hubs.ports: 26300 to 26399 holds 26345; allowed: a range without spec.listenPort; "
            "WireGuard of the hub itself listens there",
        ),
        ({"names": ["home.a", "home.a"]}, 'spec.hubs.names[1]: a second "home.a"; allowed: each one once'),
        ({"mode": "automatic"}, 'spec.hubs.mode: "automatic" is not allowed; allowed: Declared, Auto'),
        (
            {"limits": {"pairBytePerSecond": 1}},
            "spec.hubs.limits.pairBytePerSecond: unknown field; allowed: pairBytesPerSecond, "
            'totalBytesPerSecond; did you mean "pairBytesPerSecond"?',
        ),
    ],
)
def test_hubs_that_could_not_work_are_refused_with_the_reason(hubs: object, refusal: str) -> None:
    [line] = _refusal(_mesh(hubs=hubs, listenPort=26345))
    assert refusal in line


def test_no_hubs_are_asked_for_unless_someone_asks() -> None:
    specs: tuple[dict[str, object], ...] = ({}, {"hubs": None}, {"hubs": {}})
    for spec in specs:
        parsed = resources.parse_mesh(_mesh(**spec))
        assert parsed.spec.hubs == Hubs()
        assert "hubs" not in cast("dict[str, object]", resources.to_dict(parsed)["spec"])


def test_a_selector_of_hubs_without_requirements_is_another_than_none() -> None:
    every = resources.parse_mesh(_mesh(hubs={"selector": {}}))
    assert every.spec.hubs.selector == LabelSelector()
    assert resources.parse_mesh(resources.to_dict(every)) == every


def test_a_mesh_that_asks_for_no_hubs_may_have_wireguard_where_hubs_usually_are_reached() -> None:
    mesh = resources.parse_mesh(_mesh(listenPort=26100))
    assert resources.parse_mesh(resources.to_dict(mesh)) == mesh


@pytest.mark.parametrize(
    ("timers", "refusal"),
    [
        (
            {"report": 16},
            'spec.timers.report: 16 is not allowed; allowed: 100ms to 1h; a duration has a unit, as "2s"',
        ),
        ({"report": "16"}, "a duration is a whole number with its unit"),
        ({"report": "0s"}, 'spec.timers.report: "0s" is not allowed; allowed: 100ms to 1h'),
        ({"probeInterval": "2m"}, "allowed: 100ms to 1m"),
        ({"report": "30s"}, "spec.timers.connectBack: 20s is before report (30s); allowed: 30s or later"),
    ],
)
def test_timers_are_durations_within_bounds_and_in_order(timers: object, refusal: str) -> None:
    [line] = _refusal(_mesh(timers=timers))
    assert refusal in line


def test_a_refused_timer_is_not_blamed_twice() -> None:
    assert len(_refusal(_mesh(timers={"report": "soon", "connectBack": "10s"}))) == 1


@pytest.mark.parametrize("name", ["Home", "my_mesh", "-a", "a" * 64, "a.b", "", "a\n", "../etc", 7])
def test_a_meshs_name_is_a_dns_label(name: object) -> None:
    [line] = _refusal(_mesh() | {"metadata": {"name": name}})
    assert line.startswith("metadata.name: ")


def test_a_name_in_capitals_gets_its_mending() -> None:
    [line] = _refusal(_mesh() | {"metadata": {"name": "My_Mesh"}})
    assert line.endswith('did you mean "my-mesh"?')


def test_an_object_as_kubernetes_prints_it_is_read() -> None:
    metadata = {
        "name": "home",
        "uid": "5d1c",
        "resourceVersion": "17",
        "generation": 2,
        "creationTimestamp": "2026-01-31T12:00:00Z",
        "labels": {"a": "b"},
        "managedFields": [{"manager": "kubectl"}],
    }
    mesh = resources.parse_mesh(_mesh() | {"metadata": metadata, "status": {}})
    assert mesh.meta == Meta("home", "5d1c", 17, 2, 1769860800.0)


@pytest.mark.parametrize(
    ("route", "refusal"),
    [
        ("0.0.0.0/0", "a wider one would swallow the underlay"),
        ("::/0", "allowed: a length of /16 or more"),
        ("127.0.0.0/8", "unicast"),
        ("224.0.0.0/24", "unicast"),
        ("fe80::/64", "unicast"),
        ("10.1.2.3/16", "allowed: 10.1.0.0/16"),
        ("10.1.0.0/255.255.0.0", "its length is missing"),
        ("10.1.0.0/016", "its length is missing"),
        ("::ffff:10.1.0.0/112", "write 10.1.0.0"),
        ("lan", "allowed: a prefix, as"),
    ],
)
def test_a_route_that_would_break_the_mesh_is_refused(route: str, refusal: str) -> None:
    [line] = _refusal(_peer(routes=["10.9.0.0/16", route]))
    assert line.startswith("spec.routes[1]: ")
    assert refusal in line


@pytest.mark.parametrize(
    "endpoint",
    [
        *("192.0.2.1", "192.0.2.1:0", "2001:db8::1:51820", "0.0.0.0:1", "[fe80::1%e]:1", "255.255.255.255:1"),
        *("192.0.2.1:051820", "[192.0.2.1]:1", "[::ffff:192.0.2.1]:1", "192.0.2.1:70000", "192.0.2.1:"),
    ],
)
def test_a_static_endpoint_that_nobody_can_send_to_is_refused(endpoint: str) -> None:
    [line] = _refusal(_peer(endpoints=[endpoint]))
    assert line.startswith("spec.endpoints[0]: ")


def test_lists_are_bounded() -> None:
    many = {"links": [{"peer": "a", "path": "Direct"}] * 17, "keys": _KEYS, "endpoints": [_CANDIDATE] * 17}
    assert _refusal(_peer(many, routes=["10.0.0.0/8"] * 65)) == [
        "spec.routes: 65 items; allowed: at most 64",
        "status.endpoints: 17 items; allowed: at most 16",
        "status.links: 17 items; allowed: at most 16",
    ]


def test_a_report_without_keys_is_no_report() -> None:
    assert _refusal(_peer({"direct": 1})) == ["status.keys: missing; allowed: an object"]


def test_a_report_that_carries_the_registrys_fields_is_refused() -> None:
    with pytest.raises(InvalidResource, match=r"^status\.addresses: unknown field"):
        resources.parse_status(Kind.PEER, {"keys": _KEYS, "addresses": ["10.0.0.1/8"]})


def test_a_key_in_another_spelling_is_refused() -> None:
    """One key has one spelling, or a removal by key could be evaded by another."""
    crooked = "A" * 42 + "B="
    [line] = _refusal(_peer({"keys": _KEYS | {"probe": crooked}}))
    assert line == f'status.keys.probe: "{crooked}" is not allowed; allowed: 32 bytes in base64'


def test_a_refusal_carries_no_escape_sequence_to_the_terminal() -> None:
    lines = _refusal(_mesh(**{"\x1b[2J": 1, "prefer": "\x1b[2J"}))
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_a_huge_number_is_refused_without_printing_it() -> None:
    [line] = _refusal(_mesh(listenPort=10**10_000))
    assert line == "spec.listenPort: a huge number is not allowed; allowed: a whole number from 0 to 65535"


def test_the_kind_is_asked_for() -> None:
    assert _refusal({}) == ["kind: missing; allowed: ScopeMesh, ScopePeer, ScopeService, JoinToken"]
    assert _refusal({"kind": "scopemesh"})[0].endswith('did you mean "ScopeMesh"?')


@pytest.mark.parametrize(
    ("selector", "refusal"),
    [
        ([], "spec.nodeSelector: a list is not allowed; allowed: an object"),
        (
            {"matchLabels": {"-": "a"}},
            'spec.nodeSelector.matchLabels: "-" is not allowed; allowed: the key of',
        ),
        ({"matchLabels": {"A.b/c": ""}}, "allowed: the key of a label"),
        ({"matchLabels": {"a": "a b"}}, "allowed: the value of a label"),
        ({"matchLabels": {"a": True}}, "true is not allowed; allowed: the value of a label"),
        ({"matchLabels": {f"a{n}": "" for n in range(17)}}, "17 labels; allowed: at most 16"),
        (
            {"matchExpressions": [{"key": "a", "operator": "in", "values": ["b"]}]},
            'spec.nodeSelector.matchExpressions[0].operator: "in" is not allowed; '
            'allowed: In, NotIn, Exists, DoesNotExist; did you mean "In"?',
        ),
        (
            {"matchExpressions": [{"key": "a", "operator": "In"}]},
            "spec.nodeSelector.matchExpressions[0].values: no value for In; allowed: one value or more",
        ),
        (
            {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]},
            "values: values that nothing is compared with for Exists; allowed: none",
        ),
        ({"matchExpressions": [{"operator": "Exists"}]}, "matchExpressions[0].key: missing"),
    ],
)
def test_a_selector_that_kubernetes_would_not_take_is_refused(selector: object, refusal: str) -> None:
    [line] = _refusal(_mesh(nodeSelector=selector))
    assert refusal in line


def test_no_selector_and_an_empty_one_select_every_node() -> None:
    selectors: tuple[object, ...] = (None, {}, {"matchLabels": {}, "matchExpressions": []})
    for selector in selectors:
        assert resources.parse_mesh(_mesh(nodeSelector=selector)).spec.node_selector == LabelSelector()


def test_the_peer_of_a_node_names_cluster_name_and_uid_of_the_node() -> None:
    node: dict[str, object] = {"cluster": "fra", "nodeName": "n1.example.net", "nodeUID": "0d3f"}
    spec = resources.parse_peer(_peer(None, **node)).spec
    assert (spec.cluster, spec.node_name, spec.node_uid) == ("fra", "n1.example.net", "0d3f")
    for missing in node:
        [line] = _refusal(_peer(None, **(node | {missing: None})))
        others = ", ".join(sorted(set(node) - {missing}))
        assert line == (
            f"spec: {others} without {missing}; "
            "allowed: all three for the peer of a Kubernetes Node, none for an external peer"
        )


def test_no_cluster_is_called_as_external_peers_are() -> None:
    [line] = _refusal(_peer(cluster="external", nodeName="n1", nodeUID="0d3f"))
    assert line.startswith('spec.cluster: "external" is not allowed')


def test_clusters_and_conditions_stand_once_each() -> None:
    clusters = [{"name": "fra", "uid": "1"}, {"name": "ber", "uid": "2"}, {"name": "fra", "uid": "3"}]
    assert _refusal(_mesh() | {"status": {"clusters": clusters}}) == [
        'status.clusters[2]: a second "fra"; allowed: each one once'
    ]
    ready = {"type": "Ready", "status": "True"}
    assert _refusal(_peer({"conditions": [ready, ready]})) == [
        'status.conditions[1]: a second "Ready"; allowed: each one once'
    ]


def test_the_keys_of_an_api_server_are_read_as_it_shows_them() -> None:
    point = {"crv": "P-256", "x": "A" * 43, "y": "A" * 42 + "E"}
    jwks = {
        "keys": [
            {"use": "sig", "kty": "RSA", "kid": "first", "alg": "RS256", "n": _MODULUS, "e": "AQAB"},
            {"use": "sig", "kty": "EC", "kid": "second", "alg": "ES256", **point},
        ]
    }
    assert resources.parse_jwks(jwks) == (
        RsaKey("first", 2**2047 + 1, 65537),
        EcKey("second", Curve.P256, 0, 1),
    )


@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        ({"kty": "oct", "k": "c2VjcmV0"}, 'cluster.keys[0].kty: "oct" is not allowed; allowed: RSA, EC'),
        ({"alg": "HS256"}, 'cluster.keys[0].alg: "HS256" is not allowed; allowed: RS256'),
        ({"alg": "none"}, 'cluster.keys[0].alg: "none" is not allowed; allowed: RS256'),
        ({"use": "enc"}, 'cluster.keys[0].use: "enc" is not allowed; allowed: sig'),
        ({"n": "A" * 170 + "E"}, "a modulus of 2048 to 8192 bits"),
        ({"n": _EVEN}, "a modulus of 2048 to 8192 bits"),
        ({"n": "g" + "A" * 1366 + "B"}, "a modulus of 2048 to 8192 bits"),
        ({"e": "AQ"}, "an odd number from 3"),
        ({"e": "AQABAQAB"}, "an odd number from 3"),
        ({"kid": ""}, "1 to 128 characters"),
        ({"kid": None}, "cluster.keys[0].kid: missing"),
        ({"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA"}, "32 bytes in base64url"),
        ({"kty": "EC", "crv": "secp256k1"}, "P-256, P-384, P-521"),
    ],
)
def test_a_key_that_no_token_should_be_trusted_for_is_refused(wrong: dict[str, object], refusal: str) -> None:
    entry = _cluster_entry()
    entry["keys"] = [{"kty": "RSA", "kid": "first", "n": _MODULUS, "e": "AQAB"} | wrong]
    with pytest.raises(InvalidResource) as refused:
        resources.parse_cluster(entry)
    assert refusal in str(refused.value)


@pytest.mark.parametrize("count", [0, 5])
def test_a_cluster_has_one_to_four_keys(count: int) -> None:
    entry = _cluster_entry()
    keys = [{"kty": "RSA", "kid": f"k{n}", "n": _MODULUS, "e": "AQAB"} for n in range(count)]
    with pytest.raises(InvalidResource, match=r"keys: (no key|5 items)"):
        resources.parse_cluster(entry | {"keys": keys})


def test_a_cluster_that_joined_has_all_that_its_agents_are_known_by() -> None:
    entry = _cluster_entry()
    for missing in ("signingKey", "issuer", "keys", "serviceAccount"):
        with pytest.raises(InvalidResource, match=rf"cluster\.{missing}: "):
            resources.parse_cluster({name: value for name, value in entry.items() if name != missing})


def _cluster_entry() -> dict[str, object]:
    return {
        "name": "fra",
        "uid": "0d3f",
        "signingKey": "A" * 43 + "=",
        "issuer": "https://kubernetes.default.svc.cluster.local",
        "keys": [{"kty": "RSA", "kid": "first", "n": _MODULUS, "e": "AQAB"}],
        "serviceAccount": {"namespace": "scope-system", "name": "scope-agent"},
    }


@pytest.mark.parametrize("address", ["10.0.0.7", "10.0.0.7/255.0.0.0", "::ffff:10.0.0.7/104", "10.0.0.7/08"])
def test_an_assigned_address_has_a_length_and_one_spelling(address: str) -> None:
    [line] = _refusal(_peer({"addresses": [address]}))
    assert line.startswith("status.addresses[0]: ")


def test_whom_a_peer_is_never_changes() -> None:
    node: dict[str, object] = {"cluster": "fra", "nodeName": "n1", "nodeUID": "0d3f"}
    stored = resources.parse_peer(_peer(None, **node))
    later = resources.parse_peer(_peer(None, **node, role="Hub", routes=["10.9.0.0/16"]))
    assert resources.forbidden_changes(stored, later) == ()
    [problem] = resources.forbidden_changes(
        stored, resources.parse_peer(_peer(None, **node | {"nodeUID": "7a"}))
    )
    assert str(problem) == (
        'spec.nodeUID: "7a" is another than "0d3f"; allowed: no change: '
        "another mesh or Node is another peer; delete this ScopePeer and create another"
    )
    external = resources.parse_peer(_peer(None, mesh="other"))
    changed = [problem.path for problem in resources.forbidden_changes(stored, external)]
    assert changed == ["spec.mesh", "spec.cluster", "spec.nodeName", "spec.nodeUID"]


# --- sizes, durations, times, overlap ----------------------------------------------------------------------

_KEYS: dict[str, object] = dict.fromkeys(("wireGuard", "probe", "signing"), "A" * 43 + "=")
_CANDIDATE = {"endpoint": "192.0.2.1:51820", "kind": "Host"}


@given(REPORTS)
def test_a_fitted_report_is_at_most_two_kilobytes_and_keeps_its_first_links(report: PeerReport) -> None:
    fitted = resources.fit_report(report)
    assert resources.status_bytes(fitted) <= 2048
    assert report.links[: len(fitted.links)] == fitted.links
    assert (fitted.endpoints, fitted.direct, fitted.keys) == (report.endpoints, report.direct, report.keys)
    assert (fitted.relay is None) == (report.relay is None)


def test_sixteen_ordinary_links_fit_whole() -> None:
    key = PublicKey(bytes(32))
    links = tuple(
        Link(f"prod.fra.node-{n:02}", PathKind.DIRECT, Endpoint.parse(f"203.0.113.{n}:51820"), latency=0.0234)
        for n in range(16)
    )
    candidates = tuple(
        Candidate(Endpoint.parse(f"10.0.0.{n}:51820"), CandidateKind.HOST) for n in range(1, 4)
    )
    report = PeerReport(PeerKeys(key, key, key), candidates, links=links, direct=16)
    assert resources.fit_report(report) == report


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("2s", 2.0),
        ("90s", 90.0),
        ("1h", 3600.0),
        ("30d", 2592000.0),
        ("1h30m", 5400.0),
        ("0s", 0.0),
    ],
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert resources.parse_duration(text) == seconds
    assert resources.parse_duration(resources.format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "2", "2 s", "-2s", "1.5s", "2S", "1e3s", "9" * 40 + "s", "٢s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is"):
        resources.parse_duration(text)


def test_times_are_read_in_any_zone_and_written_in_utc() -> None:
    assert resources.parse_time("2026-01-31T13:00:00+01:00") == 1769860800.0
    assert resources.format_time(1769860800.25) == "2026-01-31T12:00:00.25Z"


@pytest.mark.parametrize(
    "text", ["2026-02-30T00:00:00Z", "2026-01-31", "1969-12-31T23:59:59Z", "9999-12-31T23:59:59-23:59"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|day|offset"):
        resources.parse_time(text)


def test_two_meshes_that_share_addresses_are_noticed() -> None:
    ours = resources.parse_mesh(_mesh(addressing={"ipv4": "10.1.0.0/16", "ipv6": "fd00::/64"}))
    wide = resources.parse_mesh(_mesh(addressing={"ipv4": "10.0.0.0/8"}) | {"metadata": {"name": "wide"}})
    [problem] = resources.overlapping(ours, [ours, wide])
    assert str(problem) == (
        "spec.addressing.ipv4: 10.1.0.0/16 overlaps 10.0.0.0/8 of ScopeMesh wide; "
        "allowed: a prefix that no other mesh uses"
    )
