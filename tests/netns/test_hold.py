"""Holding an endpoint against packets of another path: real WireGuard, real rules, both kinds of change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from scope_agent.wireguard.device import HoldEndpoint, SetEndpoint
from scope_agent.wireguard.hold_rules import Divert, load
from scope_agent.wireguard.shell import EndpointHolds, SendResult
from scope_agent.wireguard.shell.nft import run_nft
from scope_agent.wireguard.shell.probe_socket import RawProbeSocket

from scope.model import Endpoint
from tests.netns.device_fixture import (
    PATIENCE,
    Machine,
    Namespace,
    connect,
    desired_device,
    machine,
    make_keys,
    peer_at,
    run,
    wait_until,
)

A, B = make_keys(1), make_keys(2)
A_PORT = B_PORT = 47001  # as where the mesh names the port
ECHO_PORT = 7007
A_MESH, B_MESH = ip_address("10.9.0.1"), ip_address("10.9.0.2")
LONG, SHORT = 3 * PATIENCE, 0.4  # seconds of a hold: none ends during a test unless it is to
COUNT = 300
_SO_RCVBUFFORCE = 33

# Three paths between two machines on one wire: two of IPv4, which end at one address here and two there.
OLD = Endpoint.parse(f"192.0.2.2:{B_PORT}")
NEW = {
    "one family": Endpoint.parse(f"198.51.100.2:{B_PORT}"),
    "two families": Endpoint.parse(f"[2001:db8::2]:{B_PORT}"),
}
ONLY_ANSWERS = """
table inet host { chain in { type filter hook input priority 0; policy drop;
  ct state established,related accept
  icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
  iifname != { "lo", "up0" } accept; }
}
"""
both_kinds = pytest.mark.parametrize("kind", NEW)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two machines with a session over the old path; `a` holds, `b` sends to `a` by the old path."""

    a: Machine
    b: Machine

    def endpoint(self) -> Endpoint | None:
        """Where A's WireGuard sends to."""
        return run(self.a.device.observe()).peers[B.public].endpoint

    def send(self, count: int) -> None:
        """Numbered datagrams from B to A, which sends nothing."""
        with self.b.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(count):
                sender.sendto(str(number).encode(), (str(A_MESH), ECHO_PORT))
                if number % 20 == 19:
                    time.sleep(0.002)  # no burst that a receive buffer cannot take

    def listen(self) -> socket.socket:
        """Where A's machine gets them."""
        with self.a.namespace.entered():
            opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 22)  # all COUNT of them, read late
        opened.bind((str(A_MESH), ECHO_PORT))
        opened.settimeout(PATIENCE)
        return opened


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    here, there = Namespace(), Namespace()
    connect(
        here,
        there,
        ["192.0.2.1/24", "2001:db8::1/64"],
        ["192.0.2.2/24", "198.51.100.2/24", "2001:db8::2/64"],
    )
    here.ip("route", "add", "198.51.100.0/24", "dev", "up0", "src", "192.0.2.1")
    with machine(here, tmp_path / "a") as a, machine(there, tmp_path / "b") as b:
        a.agree(
            desired_device(
                a.device.name,
                A,
                peer_at(B, str(OLD), f"{B_MESH}/32"),
                port=A_PORT,
                addresses=(f"{A_MESH}/16",),
            )
        )
        b.agree(
            desired_device(
                b.device.name,
                B,
                peer_at(A, f"192.0.2.1:{A_PORT}", f"{A_MESH}/32"),
                port=B_PORT,
                addresses=(f"{B_MESH}/16",),
            )
        )
        made = Pair(a, b)
        with made.listen() as listener:
            made.send(1)
            listener.recv(64)
        assert made.endpoint() == OLD
        yield made
    here.close()
    there.close()


def hold(pair: Pair, endpoint: Endpoint, against: Endpoint, *, seconds: float = LONG) -> HoldEndpoint:
    return HoldEndpoint(B.public, endpoint, frozenset({against}), seconds)


@both_kinds
def test_data_of_the_old_path_arrives_and_does_not_move_an_endpoint_that_is_held(
    pair: Pair, kind: str
) -> None:
    async def change() -> tuple[set[int], set[Endpoint | None]]:
        seen: set[Endpoint | None] = set()
        arrived: set[int] = set()
        listener.settimeout(0)
        with contextlib.closing(EndpointHolds()) as holds:
            await holds.set(hold(pair, NEW[kind], OLD), port=A_PORT)
            await pair.a.device.apply(SetEndpoint(B.public, NEW[kind]))
            sending = asyncio.ensure_future(asyncio.to_thread(pair.send, COUNT))
            deadline = time.monotonic() + PATIENCE
            while len(arrived) < COUNT and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        arrived.add(int(listener.recv(64)))
                seen.add((await pair.a.device.observe()).peers[B.public].endpoint)
            await sending
        return arrived, seen

    with pair.listen() as listener, pair.a.namespace.entered():
        arrived, seen = asyncio.run(change())
    assert arrived == set(range(COUNT))
    assert seen == {NEW[kind]}


@both_kinds
def test_wireguard_answers_by_the_path_that_is_held(pair: Pair, kind: str) -> None:
    """The source that it learned leads out of the right interface from the right address."""

    async def change() -> None:
        with contextlib.closing(EndpointHolds()) as holds:
            await holds.set(hold(pair, NEW[kind], OLD), port=A_PORT)
            await pair.a.device.apply(SetEndpoint(B.public, NEW[kind]))
            await asyncio.to_thread(pair.send, 1)
            await asyncio.to_thread(listener.recv, 64)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"back", (str(B_MESH), ECHO_PORT))
            assert (await asyncio.to_thread(far.recv, 64)) == b"back"

    with pair.b.namespace.entered():
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    far.bind((str(B_MESH), ECHO_PORT))
    far.settimeout(PATIENCE)
    with far, pair.listen() as listener, pair.a.namespace.entered():
        asyncio.run(change())
    expected = {4: "192.0.2.1", 6: "2001:db8::1"}[NEW[kind].address.version]
    wait_until(
        lambda: (
            run(pair.b.device.observe()).peers[A.public].endpoint == Endpoint(ip_address(expected), A_PORT)
        ),
        "the far side does not see the new path",
    )


@both_kinds
def test_a_machine_whose_firewall_lets_in_answers_only_loses_nothing(pair: Pair, kind: str) -> None:
    """What is put back in belongs to the connection that probes have opened on the path that is held."""

    async def change() -> None:
        with contextlib.closing(EndpointHolds()) as holds:
            await holds.set(hold(pair, NEW[kind], OLD), port=A_PORT)
            await asyncio.to_thread(pair.send, 1)
            await asyncio.to_thread(listener.recv, 64)
        assert (await pair.a.device.observe()).peers[B.public].endpoint == NEW[kind]

    with pair.listen() as listener, pair.a.namespace.entered():
        subprocess.run(["nft", "-f", "-"], input=ONLY_ANSWERS, text=True, check=True)
        with contextlib.closing(RawProbeSocket(A_PORT)) as probes:
            for endpoint in (OLD, NEW[kind]):
                assert probes.send(endpoint, b"SCop" + bytes(60)) is SendResult.SENT
        asyncio.run(change())


@both_kinds
def test_a_hold_ends_by_itself_and_leaves_nothing_behind(pair: Pair, kind: str) -> None:
    async def change() -> None:
        with contextlib.closing(EndpointHolds()) as holds:
            await holds.set(hold(pair, NEW[kind], OLD), port=A_PORT)
            assert "scope_hold" in tables(pair)  # a short one might be over before this has looked
        with contextlib.closing(EndpointHolds()) as holds:
            await holds.set(hold(pair, NEW[kind], OLD, seconds=SHORT), port=A_PORT)
            deadline = time.monotonic() + PATIENCE
            while "scope_hold" in tables(pair):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    with pair.a.namespace.entered():
        asyncio.run(change())
    run(pair.a.device.apply(SetEndpoint(B.public, NEW[kind])))
    with pair.listen() as listener:
        pair.send(1)
        listener.recv(64)
    assert pair.endpoint() == OLD


def test_a_hold_ends_by_itself_when_its_agent_was_killed(pair: Pair) -> None:
    """Then nobody takes what is diverted: it is lost until the rule expires, and not a moment longer."""
    with pair.a.namespace.entered():
        run_nft(load(A_PORT, [Divert(OLD, 9, SHORT)]))
    arrived = 0
    deadline = time.monotonic() + PATIENCE
    with pair.listen() as listener:
        listener.settimeout(0.05)
        while not arrived:
            assert time.monotonic() < deadline, "the rule does not expire"
            pair.send(1)
            try:
                arrived += len(listener.recv(64))
            except TimeoutError:
                continue
    assert pair.endpoint() == OLD


@both_kinds
def test_a_hold_takes_the_place_of_the_one_before_it(pair: Pair, kind: str) -> None:
    """First the old path is held against the new one, then the new one against the old one."""

    async def change() -> None:
        with contextlib.closing(EndpointHolds()) as holds:
            await holds.set(hold(pair, OLD, NEW[kind]), port=A_PORT)
            await holds.set(hold(pair, NEW[kind], OLD), port=A_PORT)
            await asyncio.to_thread(pair.send, 1)
            await asyncio.to_thread(listener.recv, 64)
            assert (await pair.a.device.observe()).peers[B.public].endpoint == NEW[kind]
        assert "scope_hold" not in tables(pair)

    with pair.listen() as listener, pair.a.namespace.entered():
        asyncio.run(change())


def test_without_nft_nothing_happens_and_the_log_says_so_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def change() -> None:
        with contextlib.closing(EndpointHolds()) as holds:
            for _ in range(2):
                await holds.set(hold(pair, NEW["one family"], OLD), port=A_PORT)

    monkeypatch.setenv("PATH", "/nonexistent")
    with pair.a.namespace.entered(), caplog.at_level(logging.WARNING):
        asyncio.run(change())
    assert [record.getMessage()[:16] for record in caplog.records] == ["hold.unavailable"]
    with pair.listen() as listener:
        pair.send(1)
        listener.recv(64)
    assert pair.endpoint() == OLD


def tables(pair: Pair) -> str:
    with pair.a.namespace.entered():
        return subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout
