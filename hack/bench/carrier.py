"""How much two carriers carry over one machine's loopback: TLS and WebSocket both ways of it, no network.

A flood of full WireGuard datagrams goes in at one end's loopback endpoint, one by one or 44 with one call,
and is counted where it comes out at the other's. What the connection does not take, the carrier drops. The
sender, both carriers and the receiver share the machine's processors.
"""

from __future__ import annotations

import errno
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scope_agent.carrier.shell.machine import hub_certificate
from scope_agent.wireguard.shell.process import DataplaneProcess

from bench.agents import BenchError
from bench.processes import memory, pid_behind, processor_time
from bench.result import Benchmark, Row, Sample, Target
from scope.carrier import (
    MEMBER_PORT,
    PASSAGE_PORT,
    TICKET_LIFETIME,
    Carrier,
    CarryingHub,
    HubPart,
    Member,
    Passage,
    PeerPart,
    assign_loopbacks,
    encode_carrier,
    sign_ticket,
)
from scope.model import Endpoint, PublicKey, RelayLimits, Secret

SEGMENT = 1452  # a full WireGuard datagram over IPv4 in an MTU of 1480
SECONDS, START_S, END_S = 3.0, 20.0, 5.0
MESH, PEER, HUB = "bench", PublicKey(b"\1" * 32), PublicKey(b"\2" * 32)
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104


@dataclass(frozen=True, slots=True)
class _End:
    """A WireGuard that is none, and where it finds the other one."""

    socket: socket.socket
    other: tuple[str, int]


def _floods(attempts: int) -> Iterator[Sample | Row]:
    with (
        tempfile.TemporaryDirectory() as folder,
        _wireguard() as at_peer,
        _wireguard() as at_hub,
    ):
        to_peer, to_hub = _endpoints()
        carriers = _start(Path(folder), at_peer=at_peer, at_hub=at_hub, to_peer=to_peer, to_hub=to_hub)
        try:
            peer = _End(at_peer, (str(to_hub.address), to_hub.port))
            hub = _End(at_hub, (str(to_peer.address), to_peer.port))
            _connected(peer, hub)
            pids = [pid_behind(carrier.file.with_suffix(".sock")) for carrier in carriers]
            for batch in (1, 44):
                for sender, receiver in ((peer, hub), (hub, peer)):
                    before = [processor_time(pid) for pid in pids]
                    rates = [_rate(sender, receiver, batch) for _ in range(attempts)]
                    if batch == 1:
                        yield from rates
                    gigabits = sum(rates) * SECONDS
                    yield {
                        "datagrams with one call": batch,
                        "from the peer": float(sender is peer),
                        "carried (Gbit/s)": sum(rates) / attempts,
                        **{
                            f"{name}'s processor time (s/Gbit)": (processor_time(pid) - spent) / gigabits
                            for name, pid, spent in zip(("peer", "hub"), pids, before, strict=True)
                        },
                        "hub's memory (MiB)": memory(pids[1]),
                    }
        finally:
            for carrier in carriers:
                carrier.end(END_S, terminate=True)


def _rate(sender: _End, receiver: _End, batch: int) -> float:
    """Gigabits a second that arrive."""
    arrived = 0

    def receive() -> None:
        nonlocal arrived
        buffer = bytearray(1 << 16)
        while True:
            try:
                arrived += receiver.socket.recv_into(buffer)
            except TimeoutError:
                return

    data = (struct.pack("<I", 4) + b"\xff" * (SEGMENT - 4)) * batch
    segments = [] if batch == 1 else [(_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", SEGMENT))]
    receiver.socket.settimeout(0.5)
    receiving = threading.Thread(target=receive)
    receiving.start()
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        try:
            sender.socket.sendmsg([data], segments, 0, sender.other)
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                raise
    receiving.join()
    return arrived * 8e-9 / SECONDS


def _connected(peer: _End, hub: _End) -> None:
    hub.socket.settimeout(0.2)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        peer.socket.sendto(b"there", peer.other)
        try:
            hub.socket.recv(100)
        except TimeoutError:
            continue
        return
    raise BenchError("the carriers did not connect")


def _wireguard() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(_SOL_UDP, _UDP_GRO, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    made.bind(("127.0.0.1", 0))
    return made


def _endpoints() -> tuple[Endpoint, Endpoint]:
    """Where the hub finds the peer, and the peer the hub."""
    name = secrets.token_bytes(8)
    return (
        assign_loopbacks([name], port=MEMBER_PORT, held={})[name],
        assign_loopbacks([name], port=PASSAGE_PORT, held={})[name],
    )


def _start(
    folder: Path, *, at_peer: socket.socket, at_hub: socket.socket, to_peer: Endpoint, to_hub: Endpoint
) -> list[DataplaneProcess]:
    """The peer's carrier and the hub's."""
    seed = Secret(secrets.token_bytes(32))
    signing = Ed25519PrivateKey.from_private_bytes(seed.raw).public_key().public_bytes_raw()
    certificate, key, pin = hub_certificate(folder / "certificate.pem", now=datetime.now(UTC))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    at_hub_port = int(at_hub.getsockname()[1])
    hub = HubPart(
        mesh_uid=MESH,
        hub=HUB,
        port=port,
        certificate=certificate,
        key=key,
        wireguard_port=at_hub_port,
        first_port=at_hub_port,
        last_port=at_hub_port,
        limits=RelayLimits(),
        members=(Member(PEER, PublicKey(signing), to_peer),),
        upstream=None,
    )
    expires = int(time.time()) + TICKET_LIFETIME
    way = CarryingHub(
        hub=HUB,
        addresses=(Endpoint.parse(f"127.0.0.1:{port}"),),
        pin=pin,
        ticket=sign_ticket(mesh_uid=MESH, peer=PEER, hub=HUB, expires=expires, secret=seed),
        passages=(Passage(to_hub, at_hub_port),),
    )
    peer = PeerPart(int(at_peer.getsockname()[1]), (way,))
    started = []
    for name, carrier in (("peer", Carrier(peer=peer)), ("hub", Carrier(hub=hub))):
        file = folder / f"{name}.json"
        process = DataplaneProcess("carrier", file, "--file", str(file))
        process.write(encode_carrier(carrier))
        process.ensure_running()
        started.append(process)
    return started


BENCHMARKS = (
    Benchmark(
        "carrier",
        unit="Gbit/s",
        what="datagrams over TCP, from one carrier to another on the same machine",
        target=Target(median=0.3, more_is_better=True),  # what others relay in user space, over UDP
        attempts=3,
        run=_floods,
    ),
)
