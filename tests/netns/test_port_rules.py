"""The packet filter's rules for ports beside WireGuard's own, with real packets between two machines."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from scope_agent.wireguard.port_rules import Opening, PortRules, Search
from scope_agent.wireguard.shell import PortTable, SendResult
from scope_agent.wireguard.shell.probe_socket import RawProbeSocket

from tests.netns.device_fixture import Namespace, connect
from tests.netns.test_raw_socket import (
    A_PORT,
    B_PORT,
    PROBE,
    STATEFUL,
    at,
    load_nft,
    opened,
    receive_one,
    receive_whole,
)

FIRST, LAST = 27000, 27255
A_AT, B_AT = "192.0.2.1", "192.0.2.2"
PORT_UNREACHABLE = bytes([3, 3])


@pytest.fixture
def ends() -> Iterator[tuple[Namespace, Namespace]]:
    """Two machines on one wire."""
    a, b = Namespace(), Namespace()
    connect(a, b, [f"{A_AT}/24"], [f"{B_AT}/24"])
    yield a, b
    a.close()
    b.close()


def apply(namespace: Namespace, rules: PortRules) -> None:
    with namespace.entered():
        PortTable("scope0").apply(rules)


def refusals(listener: socket.socket) -> int:
    """How often "port unreachable" came since it was last asked."""
    count = 0
    while True:
        try:
            count += listener.recv(2048)[20:22] == PORT_UNREACHABLE
        except BlockingIOError:
            return count


def test_ports_of_a_search_are_heard_and_nobody_is_told_that_they_are_closed(
    ends: tuple[Namespace, Namespace],
) -> None:
    a, b = ends
    with opened(a, RawProbeSocket, A_PORT) as asker, opened(b, RawProbeSocket, B_PORT) as searcher:
        with a.entered():
            listener = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        listener.setblocking(False)
        with listener:
            for rules, refused in (
                (PortRules(), True),
                (PortRules(B_PORT, (), Search(at(A_AT, A_PORT), FIRST, LAST)), False),
            ):
                searcher.hear(range(FIRST, LAST + 1))
                apply(b, rules)
                for port in (FIRST, LAST):
                    assert asker.send(at(B_AT, port), PROBE) is SendResult.SENT
                    arrived = receive_whole(searcher)
                    assert (arrived.source, arrived.port) == (at(A_AT, A_PORT), port)
                # What was refused has come by now: a probe went back by the same wire after it.
                assert searcher.send(at(A_AT, A_PORT), PROBE, port=FIRST) is SendResult.SENT
                assert receive_one(asker)[0] == at(B_AT, FIRST)
                assert (refusals(listener) > 0) is refused


def test_a_port_that_was_found_takes_the_place_of_wireguards_towards_one_endpoint_alone(
    ends: tuple[Namespace, Namespace],
) -> None:
    a, b = ends
    load_nft(b, STATEFUL)  # what the firewall of the machine itself remembers is the port that was found
    with (
        opened(a, RawProbeSocket, A_PORT) as peer,
        opened(a, RawProbeSocket, A_PORT + 1000) as other,
        opened(b, RawProbeSocket, B_PORT) as own,
    ):
        apply(b, PortRules(B_PORT, (Opening(at(A_AT, A_PORT), FIRST),)))
        assert own.send(at(A_AT, A_PORT), PROBE) is SendResult.SENT
        assert receive_one(peer)[0] == at(B_AT, FIRST)
        assert peer.send(at(B_AT, FIRST), PROBE) is SendResult.SENT
        assert receive_whole(own).port == B_PORT
        assert own.send(at(A_AT, A_PORT + 1000), PROBE) is SendResult.SENT
        assert receive_one(other)[0] == at(B_AT, B_PORT)
        assert other.send(at(B_AT, B_PORT), PROBE) is SendResult.SENT
        assert receive_whole(own).source == at(A_AT, A_PORT + 1000)


def test_rules_are_read_again_put_right_and_taken_away(ends: tuple[Namespace, Namespace]) -> None:
    rules = PortRules(B_PORT, (Opening(at(A_AT, A_PORT), FIRST), Opening(at(A_AT, 7), LAST)))
    with ends[1].entered():
        first, second = PortTable("scope0"), PortTable("scope0")
        assert second.read() == ()
        first.apply(rules)
        assert set(second.read()) == set(rules.openings)
        assert not first.check()
    load_nft(ends[1], "flush ruleset\n")
    with ends[1].entered():
        assert first.check() and not first.check()
        assert set(second.read()) == set(rules.openings)
        second.remove()
        assert second.read() == ()
