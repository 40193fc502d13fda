"""The reflector answers members alone, says where they were seen, and never sends more than it got."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

import pytest
from scope_operator.gateway.advertised import Advertised, reflector_at
from scope_operator.gateway.reflector import HEARD_SECONDS, Leg, Reflector, ReflectorSockets

from scope.channel import Channel, Confirmed, Received
from scope.model import (
    Assignment,
    ConfigError,
    Endpoint,
    Meta,
    Peer,
    PeerKeys,
    PeerReport,
    PeerSpec,
    PublicKey,
    Secret,
    Tombstone,
    endpoint_at,
)
from scope.wire import CallMeMaybe, Forward, Forwarded, Message, Ping, Pong

PING = Ping(transaction=7, has_session=True, received=5)
HOME = Endpoint.parse("198.51.100.7:40000")
AWAY = Endpoint.parse("[2001:db8::7]:40001")
BURIED = Assignment(
    tombstone=Tombstone("mesh", "peer", PublicKey(bytes([1]) * 32), PublicKey(bytes(32)), bytes(64))
)


class Member:
    """A peer's side of the protocol, in one mesh."""

    def __init__(self, seed: int, reflector: PublicKey, *, mesh: str = "home", boot: int = 1) -> None:
        self.channel = Channel(secret=Secret(bytes([seed]) * 32), boot_id=bytes([boot]) * 16)
        self.channel.set_correspondents(frozenset({reflector}))
        self.reflector = reflector
        keys = PeerKeys(PublicKey(bytes([seed]) * 32), self.channel.public_key, PublicKey(bytes([seed]) * 32))
        self.peer = Peer(Meta(f"{mesh}.external.p{seed}", uid=f"u{seed}"), PeerSpec(mesh), PeerReport(keys))

    def seal(self, message: Message) -> bytes:
        return self.channel.seal(self.reflector, message)


class Bench:
    """A reflector that knows some members, and what it answers to them."""

    def __init__(self) -> None:
        self.reflector = Reflector(Channel(secret=Secret(bytes([99]) * 32), boot_id=bytes(16)))
        self.now = 1000.0

    def member(self, seed: int, *, mesh: str = "home") -> Member:
        return Member(seed, self.reflector.probe_key, mesh=mesh)

    def exchange(self, member: Member, message: Message, remote: Endpoint) -> object:
        """What the member makes of the answer to one message; None where there is none."""
        data = member.seal(message)
        outgoing = self.reflector.receive(data, Leg(0, None, remote), self.now)
        if outgoing is None:
            return None
        assert outgoing.leg.remote == remote
        assert len(outgoing.data) <= len(data)
        return member.channel.open(outgoing.data)

    def greet(self, member: Member, remote: Endpoint) -> None:
        """Exchange boot ids, and be heard."""
        assert isinstance(self.exchange(member, PING, remote), Confirmed)
        assert isinstance(self.exchange(member, PING, remote), Received)


@pytest.mark.parametrize("remote", [HOME, AWAY])
def test_a_member_is_told_the_endpoint_it_was_seen_from(remote: Endpoint) -> None:
    bench = Bench()
    member = bench.member(1)
    bench.reflector.set_peers([member.peer])
    assert isinstance(bench.exchange(member, PING, remote), Confirmed)
    answer = bench.exchange(member, PING, remote)
    assert isinstance(answer, Received)
    assert answer.message == Pong(7, observed=remote, has_session=False, received=0)


def test_a_stranger_and_a_removed_peer_are_told_nothing() -> None:
    bench = Bench()
    stranger, member = bench.member(1), bench.member(2)
    bench.reflector.set_peers([member.peer])
    assert bench.exchange(stranger, PING, HOME) is None
    bench.greet(member, HOME)
    removed = Peer(member.peer.meta, member.peer.spec, member.peer.report, BURIED)
    bench.reflector.set_peers([removed])
    assert bench.exchange(member, PING, HOME) is None


def test_a_replayed_datagram_earns_nothing() -> None:
    bench = Bench()
    member = bench.member(1)
    bench.reflector.set_peers([member.peer])
    bench.greet(member, HOME)
    data = member.seal(PING)
    assert bench.reflector.receive(data, Leg(0, None, HOME), bench.now) is not None
    assert bench.reflector.receive(data, Leg(0, None, AWAY), bench.now) is None


def test_garbage_is_dropped() -> None:
    bench = Bench()
    for data in (b"", b"SCop", bytes(1232), b"\x04" + bytes(147)):
        assert bench.reflector.receive(data, Leg(0, None, HOME), bench.now) is None


def test_a_call_passes_between_members_that_were_heard() -> None:
    bench = Bench()
    caller, called = bench.member(1), bench.member(2)
    bench.reflector.set_peers([caller.peer, called.peer])
    bench.greet(caller, HOME)
    bench.greet(called, AWAY)
    caller.channel.set_correspondents(frozenset({bench.reflector.probe_key, called.channel.public_key}))
    inner = caller.channel.seal(called.channel.public_key, CallMeMaybe(()))
    data = caller.seal(Forward(called.channel.public_key, inner))
    outgoing = bench.reflector.receive(data, Leg(0, None, HOME), bench.now)
    assert outgoing is not None
    assert outgoing.leg.remote == AWAY
    assert len(outgoing.data) <= len(data)
    opened = called.channel.open(outgoing.data)
    assert isinstance(opened, Received)
    assert opened.message == Forwarded(caller.channel.public_key, inner)


@pytest.mark.parametrize("hindrance", ["never heard", "heard too long ago", "of another mesh"])
def test_a_call_goes_nowhere_else(hindrance: str) -> None:
    bench = Bench()
    caller = bench.member(1)
    called = bench.member(2, mesh="other" if hindrance == "of another mesh" else "home")
    bench.reflector.set_peers([caller.peer, called.peer])
    if hindrance != "never heard":
        bench.greet(called, AWAY)
    if hindrance == "heard too long ago":
        bench.now += HEARD_SECONDS + 1
    bench.greet(caller, HOME)
    caller.channel.set_correspondents(frozenset({bench.reflector.probe_key, called.channel.public_key}))
    inner = caller.channel.seal(called.channel.public_key, CallMeMaybe(()))
    data = caller.seal(Forward(called.channel.public_key, inner))
    assert bench.reflector.receive(data, Leg(0, None, HOME), bench.now) is None


def test_a_source_that_sends_too_much_is_dropped() -> None:
    bench = Bench()
    member = bench.member(1)
    bench.reflector.set_peers([member.peer])
    bench.greet(member, HOME)
    answers = [bench.exchange(member, PING, HOME) for _ in range(1100)]
    assert answers.count(None) >= 100
    bench.now += 1.0
    assert bench.exchange(member, PING, HOME) is not None


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_two_sockets_answer_with_what_they_saw_from_where_they_were_asked(address: str) -> None:
    async def body() -> None:
        bench = Bench()
        member = bench.member(1)
        bench.reflector.set_peers([member.peer])
        sockets = ReflectorSockets(bench.reflector, now=time.monotonic)
        try:
            any_address = ip_address("0.0.0.0" if ":" not in address else "::")
            bound = sockets.open([(any_address, 0), (any_address, 0)])
            assert bound[0].port != bound[1].port
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as own:
                own.setblocking(False)
                own.bind((address, 0))
                seen = []
                for target in (bound[0], bound[0], bound[1]):
                    data, source = await asked(own, member.seal(PING), (address, target.port))
                    assert source[:2] == (address, target.port)
                    seen.append(member.channel.open(data))
                here = endpoint_at(*own.getsockname()[:2])
            assert isinstance(seen[0], Confirmed)
            for answer in seen[1:]:
                assert isinstance(answer, Received)
                assert answer.message == Pong(7, observed=here, has_session=False, received=0)
        finally:
            sockets.close()

    asyncio.run(limited(body))


def test_a_taken_port_is_said() -> None:
    async def body() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            sockets = ReflectorSockets(Bench().reflector, now=time.monotonic)
            try:
                with pytest.raises(ConfigError, match="reflector-ports"):
                    sockets.open([(ip_address("127.0.0.1"), other.getsockname()[1])])
            finally:
                sockets.close()

    asyncio.run(limited(body))


def test_a_reflector_is_every_advertised_address_with_every_port_of_its_family() -> None:
    listening = [Endpoint.parse(text) for text in ("0.0.0.0:7478", "0.0.0.0:7479", "[::]:7478")]
    addresses = [ip_address("192.0.2.1"), ip_address("2001:db8::1")]
    reflector = reflector_at(PublicKey(bytes(32)), addresses, listening)
    assert [str(endpoint) for endpoint in reflector.endpoints] == [
        "192.0.2.1:7478",
        "192.0.2.1:7479",
        "[2001:db8::1]:7478",
    ]


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("registry.example", "https://registry.example:7443"),
        ("registry.example:443", "https://registry.example:443"),
        ("192.0.2.1", "https://192.0.2.1:7443"),
        ("2001:db8::1", "https://[2001:db8::1]:7443"),
        ("[2001:db8::1]", "https://[2001:db8::1]:7443"),
        ("[2001:db8::1]:443", "https://[2001:db8::1]:443"),
    ],
)
def test_an_advertised_host_makes_a_url(text: str, url: str) -> None:
    assert Advertised.parse(text).url(7443) == url


@pytest.mark.parametrize("text", ["", "a b", "host:0", "host:99999", "[2001:db8::1", "http://host", "host/x"])
def test_a_damaged_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Advertised.parse(text)


async def asked(own: socket.socket, data: bytes, to: tuple[str, int]) -> tuple[bytes, tuple[str, int]]:
    """The answer to a datagram, and where it came from."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendto(own, data, to)
    return await loop.sock_recvfrom(own, 2048)


async def limited(body: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(60):
        await body()
