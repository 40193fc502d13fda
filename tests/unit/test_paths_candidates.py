"""Which endpoints may be candidates, and which of two is better."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network

import pytest
from scope_agent.paths.candidates import MAX_PUBLISHED, misplacement, own_candidates, rank, refusal

from scope.model import Candidate, CandidateKind, Endpoint, Family

MESH = (IPv4Network("10.200.0.0/16"), IPv6Network("fd00:5c0e::/48"))
OWN = frozenset({Endpoint.parse("192.0.2.1:51820")})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("127.0.0.1:51820", "loopback"),
        ("[::1]:51820", "loopback"),
        ("0.0.0.0:51820", "unicast"),
        ("224.0.0.1:51820", "unicast"),
        ("[ff02::1]:51820", "unicast"),
        ("255.255.255.255:51820", "unicast"),
        ("169.254.1.1:51820", "link-local"),
        ("[fe80::1]:51820", "link-local"),
        ("10.200.3.4:51820", "mesh"),
        ("[fd00:5c0e::7]:51820", "mesh"),
        ("192.0.2.1:51820", "our own"),
    ],
)
def test_an_endpoint_that_cannot_be_a_peers_is_refused_with_the_reason(text: str, why: str) -> None:
    found = refusal(Endpoint.parse(text), mesh=MESH, own=OWN)
    assert found is not None and why in found


LAN = [ip_interface("192.168.1.20/24"), ip_interface("2001:db8::20/64")]


def _here(text: str, *interfaces: str, routed: str = "10.244.0.0/16") -> str | None:
    here = [*LAN, *map(ip_interface, interfaces)]
    return misplacement(Endpoint.parse(text), interfaces=here, routed=[ip_network(routed)])


def test_a_carriers_shared_range_is_tried_only_from_inside() -> None:
    reason = _here("100.64.7.9:51820")
    assert reason is not None and "carrier" in reason
    assert _here("100.127.255.1:51820") is not None
    assert _here("100.64.7.9:51820", "100.100.1.1/24") is None
    assert _here("100.63.0.1:51820") is None
    assert _here("100.128.0.1:51820") is None


def test_a_pods_address_is_not_tried_through_the_mesh_that_carries_it() -> None:
    reason = _here("10.244.3.4:51820")
    assert reason is not None and "routes" in reason
    assert _here("10.245.3.4:51820") is None
    assert _here("[fd00:244::5]:51820", routed="fd00:244::/48") is not None


def test_a_neighbour_is_tried_in_a_lan_that_a_peer_offers_to_the_mesh() -> None:
    assert _here("192.168.1.10:51820", routed="192.168.1.0/24") is None
    assert _here("192.168.1.10:51820", routed="192.168.0.0/16") is None
    assert _here("192.168.2.10:51820", routed="192.168.0.0/16") is not None


@pytest.mark.parametrize(
    "text", ["10.1.2.3:51820", "100.64.0.9:1024", "198.51.100.7:1", "[2001:db8::1]:65535", "192.0.2.1:51821"]
)
def test_every_other_unicast_endpoint_may_be_tried(text: str) -> None:
    assert refusal(Endpoint.parse(text), mesh=MESH, own=OWN) is None


def test_private_comes_before_public_and_then_the_preferred_family() -> None:
    texts = ("198.51.100.7:1", "[2001:db8::1]:1", "10.0.0.1:1", "[fd12::1]:1")
    endpoints = [Endpoint.parse(text) for text in texts]
    by_ipv6 = sorted(endpoints, key=lambda e: rank(e, Family.IPV6))
    by_ipv4 = sorted(endpoints, key=lambda e: rank(e, Family.IPV4))
    assert [str(e) for e in by_ipv6] == ["[fd12::1]:1", "10.0.0.1:1", "[2001:db8::1]:1", "198.51.100.7:1"]
    assert [str(e) for e in by_ipv4] == ["10.0.0.1:1", "[fd12::1]:1", "198.51.100.7:1", "[2001:db8::1]:1"]


def test_what_a_peer_publishes_is_refused_nowhere_named_once_and_bounded() -> None:
    interfaces = frozenset(ip_interface(f"198.51.100.{n}/24") for n in range(1, 40)) | {
        ip_interface("127.0.0.1/8"),
        ip_interface("fe80::1/64"),
    }
    static = (Endpoint.parse("203.0.113.9:4000"),)
    found = own_candidates(
        interfaces=interfaces,
        listen_port=51820,
        static=static,
        reflexive=[Endpoint.parse("198.51.100.1:51820"), Endpoint.parse("203.0.113.9:4000")],
        mesh=MESH,
    )
    assert len(found) == MAX_PUBLISHED
    assert found[0] == Candidate(static[0], CandidateKind.STATIC)
    assert len({candidate.endpoint for candidate in found}) == len(found)
    assert not [c for c in found if c.endpoint.address.is_loopback or c.endpoint.address.is_link_local]
