"""Two real agents change from IPv4 to IPv6 under 1,000 packets a second both ways, and lose none."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from bench.packets import Stream
from lab import Host, Lab, Machine, Nat
from lab.netns import call_in
from meshlab import PRIVATE, Member, Pinger, Registry, Watch, mesh_document

pytestmark = pytest.mark.timeout(240)
MESH = "change"
RATE = 1000.0  # packets a second, each way
CONVERGED_S, CHANGED_S = 60.0, 60.0
STEADY_S = 3.0  # of traffic over the new path alone
MOST_CHANGES = 4  # of one end's endpoint
NO_IPV6 = (
    "table ip6 cut {\nchain in { type filter hook prerouting priority -500; meta l4proto udp drop; }\n}\n"
)
_PACKET_OUTGOING, _ETH_P_ALL = 4, 3  # linux/if_packet.h, linux/if_ether.h
_DATA = b"\4\0\0\0"
_UDP_PAYLOAD = {0x0800: 28, 0x86DD: 48}  # by Ethernet type: where it begins, without options


@dataclass(slots=True)
class Trace:
    """By which family a machine's WireGuard sent: one entry for each change."""

    families: list[int] = field(default_factory=list)
    last: int = 0  # how many packets since the last change

    def note(self, family: int) -> None:
        """One more packet."""
        if not self.families or self.families[-1] != family:
            self.families.append(family)
            self.last = 0
        self.last += 1


@contextlib.contextmanager
def traced(host: Host) -> Iterator[Trace]:
    """Watch what leaves a machine's interface for as long as the context lasts."""
    tap = call_in(host.namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
    tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    tap.settimeout(0.1)
    tap.bind(("eth0", _ETH_P_ALL))
    trace, closing = Trace(), threading.Event()

    def watch() -> None:
        while not closing.is_set():
            with contextlib.suppress(TimeoutError):
                packet, (_, protocol, direction, *_) = tap.recvfrom(96)
                begin = _UDP_PAYLOAD.get(protocol)
                if direction == _PACKET_OUTGOING and begin and packet[begin : begin + 4] == _DATA:
                    trace.note(protocol)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield trace
    finally:
        closing.set()
        thread.join()
        tap.close()


@pytest.fixture
def members() -> Iterator[list[Member]]:
    """Two agents 40 ms apart that are direct over IPv4, and would have IPv6 if it passed."""
    with Lab(delay_ms=10, private=PRIVATE) as lab, Pinger() as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH))
        token = registry.token(MESH)
        machines = [
            lab.site(site, nat=Nat.PORT_RESTRICTED, ipv6=True).machine(name)
            for site, name in (("berlin", "anna"), ("lyon", "bert"))
        ]
        machines[0].run(["nft", "-f", "-"], input=NO_IPV6)
        found = [Member(machine, mesh=MESH, registry=registry) for machine in machines]
        for member in found:
            member.join(token)
        with Watch(found, pinger) as watch:
            watch.until(watch.is_complete, within_s=CONVERGED_S, missing=watch.describe_unfinished)
        yield found
        for member in found:
            member.hang_up()


def test_a_change_of_families_under_full_streams_loses_nothing_and_is_over_while_they_go_on(
    members: list[Member],
) -> None:
    machines: list[Machine] = [member.machine for member in members]
    with traced(machines[0]) as first, traced(machines[1]) as second:
        overflowed = sum(map(overflows, machines))
        stream = Stream(machines[0], machines[1], addresses(members), rate=RATE)
        wait_until(lambda: first.last > RATE and second.last > RATE, first, second)
        machines[0].run(["nft", "delete", "table", "ip6", "cut"])
        wait_until(lambda: is_steady(first) and is_steady(second), first, second)
        sent, lost = stream.finish()
    assert sent > 2 * (1.0 + STEADY_S) * RATE
    # What found a full queue, since a program waited too long for the processor, was not lost by the change.
    assert lost <= sum(map(overflows, machines)) - overflowed
    assert len(first.families) - 1 <= MOST_CHANGES, first.families
    assert len(second.families) - 1 <= MOST_CHANGES, second.families
    for machine in machines:
        tables = machine.run(["nft", "list", "tables"]).stdout
        assert "scope_hold" not in tables


def wait_until(holds: Callable[[], bool], *traces: Trace) -> None:
    deadline = time.monotonic() + CHANGED_S
    while not holds():
        assert time.monotonic() < deadline, traces
        time.sleep(0.05)


def overflows(machine: Machine) -> int:
    """Datagrams that found a full buffer of a socket or a full queue of an interface, since the start."""
    sockets = machine.run(["cat", "/proc/net/snmp", "/proc/net/snmp6"]).stdout.splitlines()
    names, values = (line.split() for line in sockets if line.startswith("Udp: "))
    v6 = next(line.split()[1] for line in sockets if line.startswith("Udp6RcvbufErrors"))
    # After two lines of titles: name, then eight figures of what came in, and eight of what left.
    interfaces = [line.split() for line in machine.run(["cat", "/proc/net/dev"]).stdout.splitlines()[2:]]
    dropped = sum(int(fields[4]) + int(fields[12]) for fields in interfaces)
    return int(values[names.index("RcvbufErrors")]) + int(v6) + dropped


def is_steady(trace: Trace) -> bool:
    return trace.families[-1:] == [0x86DD] and trace.last > STEADY_S * RATE


def addresses(members: list[Member]) -> tuple[str, str]:
    found = [member.status() for member in members]
    first, second = (status.address for status in found if status is not None)
    assert first is not None and second is not None
    return first, second
