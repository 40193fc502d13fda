"""ICMP echo through the mesh between any two machines of a lab, all from one thread of this process.

A raw socket lives in the network it was made in, so one per machine is enough, and ninety pairs cost no
ninety programs. Who answers is the other machine's kernel: a ping that comes back went through WireGuard
both ways.
"""

from __future__ import annotations

import heapq
import os
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lab import Host
from lab.netns import call_in

_ECHO_REQUEST, _ECHO_REPLY = 8, 0
# linux/icmp.h, linux/socket.h: the option that names the types a raw socket does not want, as bits.
_SOL_RAW, _ICMP_FILTER = 255, 1
_HEADER = struct.Struct("!BBHHH")
_PAYLOAD = struct.Struct("!Id")  # number of the flow, monotonic time of sending
_TICK_S = 0.05  # how soon a new flow gets its first ping


@dataclass(slots=True)
class Flow:
    """Pings from one machine to one address. Times are monotonic seconds; only `Pinger` writes."""

    number: int
    source: socket.socket
    address: str
    since: float
    next_at: float
    every_s: float | None = None  # once answered; None: at the pinger's own pace
    sent: int = 0
    answered: int = 0
    first: float | None = None  # arrival of the first answer to a ping sent after `since`
    last: float | None = None
    rtt_ms: float | None = None
    gap_s: float = 0.0  # the longest between two answers to pings sent after `since`
    stopped: bool = False

    def silent_s(self, now: float) -> float:
        """The longest time without an answer since the first one, up to now."""
        return 0.0 if self.first is None or self.last is None else max(self.gap_s, now - self.last)


class Pinger:
    """Pings at `eager_s` until the first answer, or for `patience_s`; then at `calm_s`."""

    def __init__(self, *, eager_s: float = 0.1, calm_s: float = 1.0, patience_s: float = 10.0) -> None:
        self._eager_s, self._calm_s, self._patience_s = eager_s, calm_s, patience_s
        self._sources: dict[str, socket.socket] = {}
        self._flows: dict[int, Flow] = {}
        self._due: list[tuple[float, int]] = []
        self._identifier = os.getpid() & 0xFFFF
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="pinger", daemon=True)
        self._thread.start()

    def flow(self, source: Host, address: str) -> Flow:
        """Start pinging `address` from a machine."""
        now = time.monotonic()
        with self._lock:
            sock = self._sources.get(source.namespace)
            if sock is None:
                sock = self._sources[source.namespace] = call_in(source.namespace, _icmp_socket)
                self._selector.register(sock, selectors.EVENT_READ)
            flow = Flow(len(self._flows) + 1, sock, address, since=now, next_at=now)
            self._flows[flow.number] = flow
            heapq.heappush(self._due, (now, flow.number))
        return flow

    def restart(self, flow: Flow) -> None:
        """Count anew from now on: `first` is the next answer to a ping that is still to be sent."""
        with self._lock:
            flow.since = flow.next_at = time.monotonic()
            flow.sent = flow.answered = 0
            flow.first, flow.gap_s = None, 0.0
            heapq.heappush(self._due, (flow.next_at, flow.number))

    def pace(self, flow: Flow, every_s: float | None) -> None:
        """Send so often once answered, from the next ping on; None: at the pinger's own pace."""
        with self._lock:
            flow.every_s = every_s

    def stop(self, flow: Flow) -> None:
        """Send no more."""
        with self._lock:
            flow.stopped = True

    def close(self) -> None:
        """End, and close every socket."""
        self._closing = True
        self._thread.join()
        self._selector.close()
        for sock in self._sources.values():
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _loop(self) -> None:
        while not self._closing:
            now = time.monotonic()
            with self._lock:
                while self._due and self._due[0][0] <= now:
                    self._ping(*heapq.heappop(self._due), now)
                delay = min(_TICK_S, self._due[0][0] - now) if self._due else _TICK_S
            if not self._selector.get_map():
                time.sleep(_TICK_S)
                continue
            for key, _ in self._selector.select(max(0.0, delay)):
                assert isinstance(key.fileobj, socket.socket)
                self._receive(key.fileobj)

    def _ping(self, at: float, number: int, now: float) -> None:
        flow = self._flows[number]
        if flow.stopped or at != flow.next_at:  # a restart has made another time the due one
            return
        eager = flow.first is None and now - flow.since < self._patience_s
        flow.next_at = now + (self._eager_s if eager else flow.every_s or self._calm_s)
        heapq.heappush(self._due, (flow.next_at, number))
        flow.sent += 1
        body = _PAYLOAD.pack(number, time.monotonic())
        packet = _echo(self._identifier, flow.sent & 0xFFFF, body)
        try:
            flow.source.sendto(packet, (flow.address, 0))
        except OSError:
            return  # no route, no key: it counts as sent, and is not answered

    def _receive(self, sock: socket.socket) -> None:
        try:
            packet = sock.recv(2048)
        except BlockingIOError:
            return
        arrived = time.monotonic()
        # IPv4's header length is in its first byte, in words.
        start = (packet[0] & 0x0F) * 4
        if len(packet) < start + _HEADER.size + _PAYLOAD.size:
            return
        kind, _, _, identifier, _ = _HEADER.unpack_from(packet, start)
        if kind != _ECHO_REPLY or identifier != self._identifier:
            return
        number, sent = _PAYLOAD.unpack_from(packet, start + _HEADER.size)
        with self._lock:
            flow = self._flows.get(number)
            if flow is None or sent < flow.since:
                return
            flow.answered += 1
            if flow.first is not None and flow.last is not None:
                flow.gap_s = max(flow.gap_s, arrived - flow.last)
            flow.first = flow.first or arrived
            flow.last, flow.rtt_ms = arrived, (arrived - sent) * 1e3


def _icmp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.setblocking(False)
    sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << _ECHO_REPLY) & 0xFFFF_FFFF))
    return sock


def _echo(identifier: int, sequence: int, body: bytes) -> bytes:
    unsummed = _HEADER.pack(_ECHO_REQUEST, 0, 0, identifier, sequence) + body
    return _HEADER.pack(_ECHO_REQUEST, 0, _checksum(unsummed), identifier, sequence) + body


def _checksum(data: bytes) -> int:
    """RFC 1071: the ones' complement of the ones' complement sum of 16-bit words; `data` is even."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
