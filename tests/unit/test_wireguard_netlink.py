"""Netlink messages against the bytes that the kernel's headers describe, and junk against the reader."""

from __future__ import annotations

import struct
from ipaddress import ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scope_agent.wireguard import netlink
from scope_agent.wireguard.netlink import NetlinkError, Reply, Request


def as_reply(request: Request) -> Reply:
    """What the kernel would answer had it stored the request: both directions share their layout."""
    (reply,) = netlink.replies(request.encoded(7))
    assert reply.sequence == 7
    return reply


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
        netlink.error_of,
        lambda reply: netlink.parse_address(reply, 1),
        netlink.parse_any_address,
    )
    for reader in readers:
        try:
            reader(reply)
        except NetlinkError:
            continue


@given(st.integers(min_value=0), st.binary(max_size=8))
def test_a_message_that_is_bent_anywhere_is_read_or_refused(position: int, splice: bytes) -> None:
    request = netlink.add_route(5, ip_network("10.9.0.0/24"))
    start = position % len(request.body)
    read_every_way(request.body[:start] + splice + request.body[start + len(splice) :])


def test_a_cut_off_header_is_refused() -> None:
    with pytest.raises(NetlinkError):
        list(netlink.replies(b"\x20\0\0\0"))
