"""What tests of changing paths share: where a machine's WireGuard sends to, and what the machine lost."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address

from bench.packets import BUFFER_BYTES, Inside
from lab import Machine
from lab.netns import call_in
from meshlab import Member

from scope.model import IPAddress

# Of one end, for one change of path: four, and on a busy machine what is under way when a hold ends
# leads back once or twice more. Ends that chase each other change twenty times a second.
MOST_CHANGES = 12
CHANGED_S = 120.0  # far above what is seen
_ETH_P_ALL = 3  # linux/if_ether.h
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_READ_EVERY_S = 0.02  # so long packets wait in the tap's buffer
_HEADERS_BYTES = 96
# Of what leaves the first bytes, and of all else nothing: linux/filter.h, linux/if_packet.h.
_OUTGOING = ctypes.create_string_buffer(
    b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x30, 0, 0, 0xFFFF_F004),  # load the direction
            (0x15, 0, 1, 4),  # is it PACKET_OUTGOING?
            (0x06, 0, 0, _HEADERS_BYTES),
            (0x06, 0, 0, 0),
        )
    )
)
_DATA, _KEEPALIVE_BYTES = b"\4\0\0\0", 8 + 32  # of WireGuard; the length with UDP's header
# By Ethernet type: where the destination stands, and where the payload of UDP begins, without options.
_LAYOUT = {0x0800: (slice(16, 20), 28), 0x86DD: (slice(24, 40), 48)}


@dataclass(slots=True)
class Trace:
    """To whom a machine's WireGuard sent data: one entry for each change."""

    ways: list[IPAddress] = field(default_factory=list)
    last: int = 0  # how many packets since the last change
    _packed: bytes = b""  # the way that is the last one

    def note(self, way: bytes) -> None:
        """One more packet."""
        if way != self._packed:
            self._packed = way
            self.ways.append(ip_address(way))
            self.last = 0
        self.last += 1


@contextlib.contextmanager
def traced(host: Inside) -> Iterator[Trace]:
    """Watch what leaves a machine's interface for as long as the context lasts."""
    tap = call_in(host.namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
    tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
    tap.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 4, ctypes.addressof(_OUTGOING)))
    tap.setblocking(False)
    tap.bind(("eth0", _ETH_P_ALL))
    trace, closing = Trace(), threading.Event()

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, (_, protocol, *_) = tap.recvfrom(_HEADERS_BYTES)
                if protocol not in _LAYOUT:
                    continue
                destination, payload = _LAYOUT[protocol]
                length = int.from_bytes(packet[payload - 4 : payload - 2], "big")
                if packet[payload : payload + 4] == _DATA and length > _KEEPALIVE_BYTES:
                    trace.note(packet[destination])

    def watch() -> None:
        # At times: a thread that wakes up for each packet takes the interpreter from the one that sends them.
        while not closing.wait(_READ_EVERY_S):
            read()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield trace
    finally:
        closing.set()
        thread.join()
        tap.close()


def wait_until_steady(*traces: Trace, on: Callable[[IPAddress], bool], packets: float) -> None:
    """Return once so many packets of each went the same way lately, and that way is one of those."""
    deadline = time.monotonic() + CHANGED_S
    while not all(trace.last > packets and on(trace.ways[-1]) for trace in traces):
        assert time.monotonic() < deadline, traces
        time.sleep(0.05)


def assert_few_changes(*traces: Trace, paths: int = 1) -> None:
    """Packets under way may lead an end back, but not on and on. `paths`: so often the pair changed them."""
    for trace in traces:
        assert len(trace.ways) - 1 <= paths * MOST_CHANGES, trace.ways


def overflows(machine: Machine) -> int:
    """Datagrams that found a full buffer of a socket or a full queue of an interface, since the start."""
    sockets = machine.run(["cat", "/proc/net/snmp", "/proc/net/snmp6"]).stdout.splitlines()
    names, values = (line.split() for line in sockets if line.startswith("Udp: "))
    v6 = next(line.split()[1] for line in sockets if line.startswith("Udp6RcvbufErrors"))
    # After two lines of titles: name, then eight figures of what came in, and eight of what left.
    interfaces = [line.split() for line in machine.run(["cat", "/proc/net/dev"]).stdout.splitlines()[2:]]
    dropped = sum(int(fields[4]) + int(fields[12]) for fields in interfaces)
    return int(values[names.index("RcvbufErrors")]) + int(v6) + dropped


def addresses(members: list[Member]) -> tuple[str, str]:
    """The addresses of two members inside the mesh."""
    found = [member.status() for member in members]
    first, second = (status.address for status in found if status is not None)
    assert first is not None and second is not None
    return first, second
