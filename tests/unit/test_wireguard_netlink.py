"""Netlink messages against the bytes that the kernel's headers describe, and junk against the reader."""

from __future__ import annotations

import struct
from ipaddress import ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scope_agent.wireguard import netlink
from scope_agent.wireguard.netlink import NetlinkError, Reply, Request, WireGuardFamily

from scope.model import Endpoint, IPNetwork, PublicKey, Secret

KEY = PublicKey(bytes([0xAB]) * 32)
PSK = Secret(bytes([0xCD]) * 32)
FAMILY = WireGuardFamily(31)


def as_reply(request: Request) -> Reply:
    """What the kernel would answer had it stored the request: both directions share their layout."""
    (reply,) = netlink.replies(request.encoded(7))
    assert reply.sequence == 7
    return reply


def test_a_peer_is_read_as_it_was_written() -> None:
    (request,) = FAMILY.add_peer(
        "scope0",
        KEY,
        endpoint=Endpoint.parse("[2001:db8::1]:7001"),
        allowed_ips=frozenset({ip_network("10.9.0.0/24"), ip_network("fd09::/64")}),
        keepalive=25,
        psk=PSK,
    )
    device = netlink.parse_wireguard([as_reply(request)], "scope0")
    peer = device.peers[KEY]
    assert peer.endpoint == Endpoint.parse("[2001:db8::1]:7001")
    assert peer.allowed_ips == {ip_network("10.9.0.0/24"), ip_network("fd09::/64")}
    assert (peer.keepalive, peer.psk) == (25, PSK)


def test_an_ipv4_endpoint_is_sixteen_bytes_of_sockaddr() -> None:
    request = FAMILY.set_endpoint("scope0", KEY, Endpoint.parse("192.0.2.1:7001"))
    sockaddr = struct.pack("=H", 2) + struct.pack("!H", 7001) + bytes([192, 0, 2, 1]) + bytes(8)
    assert struct.pack("=HH", 20, 4) + sockaddr in request.encoded(1)


def test_a_peer_that_was_split_over_messages_is_put_together() -> None:
    prefixes: frozenset[IPNetwork] = frozenset(list(ip_network("10.64.0.0/12").subnets(new_prefix=24))[:2500])
    requests = FAMILY.add_peer(
        "scope0", KEY, endpoint=Endpoint.parse("192.0.2.1:1"), allowed_ips=prefixes, keepalive=20, psk=None
    )
    assert len(requests) == 3
    device = netlink.parse_wireguard([as_reply(request) for request in requests], "scope0")
    assert device.peers[KEY].allowed_ips == prefixes
    assert device.peers[KEY].endpoint == Endpoint.parse("192.0.2.1:1")


def test_an_address_is_read_as_it_was_written() -> None:
    for text in ("10.9.0.1/16", "fd09::1/64"):
        reply = as_reply(netlink.add_address(5, ip_interface(text)))
        assert netlink.parse_address(reply, 5) == ip_interface(text)
        assert netlink.parse_address(reply, 6) is None


def test_a_route_and_a_guard_are_told_apart_and_foreign_routes_ignored() -> None:
    prefix = ip_network("10.9.0.0/16")
    route = as_reply(netlink.add_route(5, prefix))
    assert netlink.parse_route(route) == netlink.Route(prefix, 5, netlink.ROUTE_METRIC)
    guard = as_reply(netlink.add_guard(prefix, netlink.guard_metric("scope0")))
    assert netlink.parse_route(guard) == netlink.Route(prefix, None, netlink.guard_metric("scope0"))
    foreign = Reply(route.kind, 0, 1, route.body[:5] + bytes([4]) + route.body[6:])
    assert netlink.parse_route(foreign) is None


def test_guards_of_two_devices_differ() -> None:
    assert netlink.guard_metric("scope0") != netlink.guard_metric("scope1")
    assert netlink.guard_metric("scope0") > netlink.ROUTE_METRIC


def test_the_kernels_sentence_is_read_from_an_error() -> None:
    sentence = b"Unknown device type\0"
    attribute = struct.pack("=HH", 4 + len(sentence), 1) + sentence + bytes(-len(sentence) % 4)
    body = struct.pack("=i", -95) + struct.pack("=IHHII", 64, 16, 5, 1, 0) + attribute
    assert netlink.error_of(Reply(netlink.ERROR, 0x300, 1, body)) == (95, "Unknown device type")


def test_a_request_shows_no_secret() -> None:
    for request in (FAMILY.set_psk("scope0", KEY, PSK), FAMILY.set_private_key("scope0", PSK)):
        assert PSK.raw in request.encoded(1)
        assert "\\xcd" not in repr((request, as_reply(request)))


@given(st.binary(max_size=200))
def test_junk_is_refused_with_one_kind_of_error(data: bytes) -> None:
    try:
        for reply in netlink.replies(data):
            read_every_way(reply.body)
    except NetlinkError:
        pass
    read_every_way(data)


def read_every_way(body: bytes) -> None:
    reply = Reply(0, 0x300, 0, body)
    readers = (
        netlink.parse_link,
        netlink.parse_route,
        netlink.parse_family,
        netlink.error_of,
        lambda reply: netlink.parse_address(reply, 1),
        lambda reply: netlink.parse_wireguard([reply], "scope0"),
    )
    for reader in readers:
        try:
            reader(reply)
        except NetlinkError:
            continue


@given(st.integers(min_value=0), st.binary(max_size=8))
def test_a_message_that_is_bent_anywhere_is_read_or_refused(position: int, splice: bytes) -> None:
    (request,) = FAMILY.add_peer(
        "scope0",
        KEY,
        endpoint=Endpoint.parse("192.0.2.1:7001"),
        allowed_ips=frozenset({ip_network("10.9.0.0/24")}),
        keepalive=25,
        psk=PSK,
    )
    start = position % len(request.body)
    read_every_way(request.body[:start] + splice + request.body[start + len(splice) :])


def test_a_cut_off_header_is_refused() -> None:
    with pytest.raises(NetlinkError):
        list(netlink.replies(b"\x20\0\0\0"))
