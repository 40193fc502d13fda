"""Packets that this process sends and counts inside the lab's hosts: numbered streams, and a wiretap."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address
from typing import Protocol

from lab import Host
from lab.netns import call_in

STREAM_PORT = 9999
DRAIN_S = 1.0  # for the last packets of a stream to arrive: many times the round trip
BUFFER_BYTES = 8 << 20  # a receiver that waits for the processor loses nothing by it
RECEIVE_EVERY_S = 0.02  # so long a stream's packets lie in that buffer

_SO_RCVBUFFORCE = 33
_PACKET_OUTGOING = 4  # linux/if_packet.h
_ETH_P_ALL, _ETH_P_IP = 3, 0x0800


class Inside(Protocol):
    """A host of the lab, or whatever else is in a network namespace."""

    @property
    def namespace(self) -> str:
        """Its name below /run/netns, or its path."""
        ...


class Stream:
    """Numbered datagrams between two hosts' mesh addresses, `rate` a second in each direction.

    They are sent at fixed times, so a sender that was held up catches up. Not reusable.
    """

    def __init__(self, first: Inside, second: Inside, addresses: tuple[str, str], *, rate: float) -> None:
        self._sockets = [call_in(host.namespace, _datagram_socket) for host in (first, second)]
        self._targets = (addresses[1], addresses[0])
        self._interval = 1.0 / rate
        self._sent = 0
        self._seen: tuple[set[int], set[int]] = (set(), set())
        self._stopping = False
        # One thread for all: two would take the interpreter from each other with each packet.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> tuple[int, int]:
        """Stop, wait for what is on its way, and say how many were sent and how many did not arrive."""
        self._stopping = True
        self._thread.join()
        time.sleep(DRAIN_S)
        self._receive()
        for each in self._sockets:
            each.close()
        arrived = sum(len(seen) for seen in self._seen)
        return 2 * self._sent, 2 * self._sent - arrived

    def _run(self) -> None:
        due = time.monotonic()
        received = due
        while not self._stopping:
            for each, target in zip(self._sockets, self._targets, strict=True):
                # What the device refuses is as lost as what it drops.
                with contextlib.suppress(OSError):
                    each.sendto(struct.pack("!Q", self._sent) + bytes(92), (target, STREAM_PORT))
            self._sent += 1
            due += self._interval
            now = time.monotonic()
            if now - received > RECEIVE_EVERY_S:
                received = now
                self._receive()
            time.sleep(max(0.0, due - time.monotonic()))

    def _receive(self) -> None:
        for each, seen in zip(self._sockets, self._seen, strict=True):
            with contextlib.suppress(BlockingIOError):
                while True:
                    seen.add(struct.unpack_from("!Q", each.recv(256))[0])


class Wire(Enum):
    """What a datagram of the underlay is."""

    PROBE = "probe"
    KEEPALIVE = "keepalive"
    HANDSHAKE = "handshake"
    DATA = "data"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Sent:
    """What one host sent to one address: bytes at the IP level, headers included, by kind."""

    octets: Counter[Wire]


@contextlib.contextmanager
def wiretap(host: Host, to: IPv4Address, *, interface: str = "eth0") -> Iterator[Sent]:
    """Count what `host` sends to `to` over UDP for as long as the context lasts."""
    tap = call_in(host.namespace, lambda: _packet_socket(interface))
    sent = Sent(Counter())
    closing = threading.Event()

    def count() -> None:
        while not closing.is_set():
            if not select.select([tap], [], [], 0.1)[0]:
                continue
            packet, (_, protocol, direction, *_) = tap.recvfrom(1 << 16)
            if direction == _PACKET_OUTGOING and protocol == _ETH_P_IP:
                kind = _classify(packet, to)
                if kind is not None:
                    sent.octets[kind] += len(packet)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        closing.set()
        thread.join()
        tap.close()


def _classify(packet: bytes, to: IPv4Address) -> Wire | None:
    header = (packet[0] & 0x0F) * 4
    if packet[9] != socket.IPPROTO_UDP or packet[16:20] != to.packed:
        return None
    payload = packet[header + 8 :]
    if payload.startswith(b"SCop"):
        return Wire.PROBE
    kind = payload[:4]
    if kind in (b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0"):
        return Wire.HANDSHAKE
    if kind == b"\4\0\0\0":
        return Wire.KEEPALIVE if len(payload) == 32 else Wire.DATA
    return Wire.OTHER


def _datagram_socket() -> socket.socket:
    each = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    each.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
    each.setblocking(False)
    each.bind(("", STREAM_PORT))
    return each


def _packet_socket(interface: str) -> socket.socket:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
    tap.bind((interface, _ETH_P_ALL))
    return tap
