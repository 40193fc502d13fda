"""A hub and its members for the tests of the carrier: keys, certificate, programs behind UDP ports, parts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scope_agent.carrier.shell.machine import hub_certificate
from scope_dataplane.carrier_hub import HubCarrier
from scope_dataplane.carrier_peer import PeerCarrier

from scope.carrier import (
    MEMBER_PORT,
    PASSAGE_PORT,
    TICKET_LIFETIME,
    CarryingHub,
    HubPart,
    HubReport,
    Member,
    Passage,
    PeerPart,
    assign_loopbacks,
    sign_ticket,
)
from scope.model import Endpoint, GatewayOrigin, PublicKey, RelayLimits, Secret

MESH = "5f2c9a52-0000-4000-8000-00000000c0de"
HUB = PublicKey(b"\x10" * 32)
PATIENCE = 30.0  # seconds for what takes milliseconds on a machine that does nothing else


@functools.cache
def certificate(number: int = 0) -> tuple[str, Secret, bytes]:
    """A self-made certificate (PEM), its key (PEM) and its pin."""
    del number
    with tempfile.TemporaryDirectory() as folder:
        return hub_certificate(Path(folder, "certificate.pem"), now=datetime.now(UTC))


def udp() -> socket.socket:
    """A program of this machine: WireGuard, or a relay."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    made.settimeout(PATIENCE)
    return made


def tcp_port() -> int:
    """One that nobody uses now."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        probe.bind(("::", 0))
        return int(probe.getsockname()[1])


def port_of(program: socket.socket) -> int:
    return int(program.getsockname()[1])


def place(endpoint: Endpoint) -> tuple[str, int]:
    return str(endpoint.address), endpoint.port


@dataclass
class Peer:
    """A member, with a WireGuard of its own behind its carrier."""

    number: int
    wireguard: socket.socket = field(default_factory=udp)

    @property
    def key(self) -> PublicKey:
        return PublicKey(bytes([self.number]) * 32)

    @property
    def seed(self) -> Secret:
        return Secret(bytes([self.number]) * 32)

    @property
    def signing(self) -> PublicKey:
        private = Ed25519PrivateKey.from_private_bytes(self.seed.raw)
        return PublicKey(private.public_key().public_bytes_raw())

    def ticket(self, *, lifetime: int = TICKET_LIFETIME, hub: PublicKey = HUB, mesh: str = MESH) -> str:
        expires = int(time.time()) + lifetime
        return sign_ticket(mesh_uid=mesh, peer=self.key, hub=hub, expires=expires, secret=self.seed)


class Machine:
    """What a hub and its peers are told. All is on this machine, so ports and addresses are chosen to fit."""

    def __init__(self, members: int = 1) -> None:
        self.wireguard, self.relay = udp(), udp()
        self.peers = [Peer(number) for number in range(1, members + 1)]
        self.port = tcp_port()
        # Several runs of these tests at once share the loopback addresses.
        names = [os.getpid().to_bytes(4, "big") + os.urandom(4) for _ in range(3 * members)]
        self._endpoints = list(assign_loopbacks(names[:members], port=MEMBER_PORT, held={}).values())
        self._passages = list(assign_loopbacks(names[members:], port=PASSAGE_PORT, held={}).values())

    def close(self) -> None:
        for program in (self.wireguard, self.relay, *(peer.wireguard for peer in self.peers)):
            program.close()

    def hub(self, *, limits: RelayLimits = RelayLimits(), upstream: GatewayOrigin | None = None) -> HubPart:  # noqa: B008
        text, key, _ = certificate()
        return HubPart(
            mesh_uid=MESH,
            hub=HUB,
            port=self.port,
            certificate=text,
            key=key,
            wireguard_port=port_of(self.wireguard),
            first_port=port_of(self.relay),
            last_port=port_of(self.relay),
            limits=limits,
            members=tuple(
                Member(peer.key, peer.signing, endpoint)
                for peer, endpoint in zip(self.peers, self._endpoints, strict=True)
            ),
            upstream=upstream,
        )

    def member(self, number: int = 0) -> tuple[str, int]:
        """Where the hub's programs find a peer."""
        return place(self._endpoints[number])

    def passage(self, number: int = 0, *, relay: bool = False) -> tuple[str, int]:
        """Where a peer's WireGuard finds the hub's."""
        return place(self._passages[2 * number + relay])

    def peer(self, number: int = 0, *, ticket: str | None = None, pin: bytes | None = None) -> PeerPart:
        peer = self.peers[number]
        way = CarryingHub(
            hub=HUB,
            addresses=(Endpoint.parse(f"127.0.0.1:{self.port}"),),
            pin=certificate()[2] if pin is None else pin,
            ticket=peer.ticket() if ticket is None else ticket,
            passages=(
                Passage(self._passages[2 * number], port_of(self.wireguard)),
                Passage(self._passages[2 * number + 1], port_of(self.relay)),
            ),
        )
        return PeerPart(port_of(peer.wireguard), (way,))


@contextlib.contextmanager
def machine(members: int = 1) -> Iterator[Machine]:
    made = Machine(members)
    try:
        yield made
    finally:
        made.close()


@contextlib.asynccontextmanager
async def serving(part: HubPart) -> AsyncIterator[HubCarrier]:
    """A hub's carrier in this process."""
    hub = HubCarrier(mark=0)
    await hub.follow(part)
    try:
        yield hub
    finally:
        await hub.close()


@contextlib.asynccontextmanager
async def carried(part: PeerPart) -> AsyncIterator[PeerCarrier]:
    """A peer's carrier in this process."""
    peer = PeerCarrier(mark=0)
    peer.follow(part)
    try:
        yield peer
    finally:
        await peer.close()


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what happens in this process."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s: {what}"
        await asyncio.sleep(0.005)


async def connected(peer: PeerCarrier) -> None:
    await until(lambda: all(each.address is not None for each in peer.report()), "the peer is connected")


async def report_with(peer: PeerCarrier, reason: str) -> HubReport:
    await until(lambda: reason in peer.report()[0].reason, f"the reason is {reason!r}")
    return peer.report()[0]


async def heard(program: socket.socket) -> tuple[bytes, tuple[str, int]]:
    """What a program gets next, and from where."""
    return await asyncio.to_thread(program.recvfrom, 65536)


def with_way(part: PeerPart, **changes: object) -> PeerPart:
    return replace(part, hubs=(replace(part.hubs[0], **changes),))  # type: ignore[arg-type]
