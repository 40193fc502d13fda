"""Probe sockets beside a real WireGuard device: one port, one NAT mapping, one firewall state for both."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from scope_agent.wireguard.shell import ProbeSocket, SendResult
from scope_agent.wireguard.shell.probe_socket import Arrived, RawProbeSocket, RewrittenProbeSocket

from scope.model import Endpoint, IPAddress
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
PROBE = b"SCop" + bytes(60)
A_PORT, B_PORT = 47001, 47002

OPENERS: dict[str, Callable[[int], ProbeSocket]] = {"raw": RawProbeSocket, "rewritten": RewrittenProbeSocket}
both_ways = pytest.mark.parametrize("way", OPENERS)

# The strictest kinds: a random port for every destination; nothing comes in that was not asked for.
SYMMETRIC = """
table ip nat {
  chain post { type nat hook postrouting priority 100; oifname "up0" masquerade fully-random; }
}
"""
STATEFUL = """
table inet host { chain in { type filter hook input priority 0; policy drop;
  iifname "lo" accept
  ct state established,related accept
  icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; }
}
"""


@pytest.fixture
def ends() -> Iterator[tuple[Namespace, Namespace]]:
    """Two machines on one wire, of both families."""
    a, b = Namespace(), Namespace()
    connect(a, b, ["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"])
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def natted(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """A machine behind a symmetric NAT and one on the other side, each with a device that knows the other."""
    a, router, b = Namespace(), Namespace(), Namespace()
    connect(router, b, ["192.0.2.1/24"], ["192.0.2.2/24"])
    router.ip("link", "add", "lan0", "type", "veth", "peer", "name", "up0", "netns", a.path())
    router.ip("address", "add", "10.0.0.1/24", "dev", "lan0")
    router.ip("link", "set", "lan0", "up")
    a.ip("address", "add", "10.0.0.2/24", "dev", "up0")
    a.ip("link", "set", "up0", "up")
    a.ip("route", "add", "default", "via", "10.0.0.1")
    load_nft(router, SYMMETRIC)
    with router.entered():
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    with machine(a, tmp_path / "a") as left, machine(b, tmp_path / "b") as right:
        right.agree(
            desired_device(
                right.device.name,
                B,
                peer_at(A, None, "10.9.0.1/32"),
                port=B_PORT,
                addresses=("10.9.0.2/16",),
            )
        )
        yield left, right
    for namespace in (a, router, b):
        namespace.close()


def test_probes_cross_in_both_families_with_source_and_local_address(
    ends: tuple[Namespace, Namespace],
) -> None:
    with opened(ends[0], RawProbeSocket, A_PORT) as a, opened(ends[1], RawProbeSocket, B_PORT) as b:
        for here, there in (("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")):
            payload = PROBE + there.encode()
            assert a.send(at(there, B_PORT), payload) is SendResult.SENT
            assert receive_one(b) == (at(here, A_PORT), ip_address(there), payload)
            assert b.send(at(here, A_PORT), PROBE) is SendResult.SENT
            assert receive_one(a) == (at(there, B_PORT), ip_address(here), PROBE)


@both_ways
def test_probes_and_wireguard_share_one_mapping(natted: tuple[Machine, Machine], way: str) -> None:
    left, right = natted
    with (
        opened(left.namespace, OPENERS[way], A_PORT) as a,
        opened(right.namespace, RawProbeSocket, B_PORT) as b,
    ):
        assert a.send(at("192.0.2.2", B_PORT), PROBE) is SendResult.SENT
        mapping, _, _ = receive_one(b)
        assert mapping.address == ip_address("192.0.2.1")
        assert mapping.port != A_PORT, "the NAT was to choose another port"
        start_wireguard(left)
        wait_until(
            lambda: run(right.device.observe()).peers[A.public].endpoint is not None, "there is no handshake"
        )
        assert run(right.device.observe()).peers[A.public].endpoint == mapping
        assert b.send(mapping, PROBE) is SendResult.SENT
        assert receive_one(a) == (at("192.0.2.2", B_PORT), ip_address("10.0.0.2"), PROBE)


@both_ways
def test_what_wireguard_opened_in_the_hosts_own_firewall_is_open_to_probes(
    natted: tuple[Machine, Machine], way: str
) -> None:
    left, right = natted
    load_nft(left.namespace, STATEFUL)
    start_wireguard(left)
    wait_until(lambda: run(right.device.observe()).peers[A.public].rx > 0, "there is no handshake")
    endpoint = run(right.device.observe()).peers[A.public].endpoint
    assert endpoint is not None
    with (
        opened(left.namespace, OPENERS[way], A_PORT) as a,
        opened(right.namespace, RawProbeSocket, B_PORT) as b,
    ):
        assert b.send(endpoint, PROBE) is SendResult.SENT
        assert receive_one(a)[2] == PROBE


def test_only_probes_for_the_port_arrive_and_none_from_before(ends: tuple[Namespace, Namespace]) -> None:
    a, b = ends
    with opened(a, RawProbeSocket, A_PORT) as sender, opened(b, RawProbeSocket, B_PORT) as earlier:
        sender.send(at("192.0.2.2", B_PORT), PROBE + b"early")
        assert receive_one(earlier)[2] == PROBE + b"early"
        with opened(b, RawProbeSocket, B_PORT) as receiver:
            sender.send(at("192.0.2.2", B_PORT + 1), PROBE)
            sender.send(at("192.0.2.2", B_PORT), b"\4\0\0\0 WireGuard's own")
            sender.send(at("192.0.2.2", B_PORT), PROBE + b"last")
            assert receive_one(receiver)[2] == PROBE + b"last"
            assert list(receiver.receive()) == []


@both_ways
def test_a_probe_socket_follows_wireguard_to_another_port(
    ends: tuple[Namespace, Namespace], way: str
) -> None:
    with opened(ends[0], RawProbeSocket, A_PORT) as a, opened(ends[1], OPENERS[way], B_PORT) as b:
        with ends[1].entered():
            b.move(B_PORT + 5)
        assert b.port == B_PORT + 5
        for there in ("192.0.2.2", "2001:db8::2"):
            a.send(at(there, B_PORT), PROBE + b"old")
            a.send(at(there, B_PORT + 5), PROBE + b"new")
            assert receive_one(b)[2] == PROBE + b"new"
        assert b.send(at("192.0.2.1", A_PORT), PROBE) is SendResult.SENT
        assert receive_one(a)[0] == at("192.0.2.2", B_PORT + 5)


@both_ways
def test_a_hop_limit_ends_a_datagram_on_its_way(natted: tuple[Machine, Machine], way: str) -> None:
    left, right = natted
    with (
        opened(left.namespace, OPENERS[way], A_PORT) as a,
        opened(right.namespace, RawProbeSocket, B_PORT) as b,
    ):
        assert a.send(at("192.0.2.2", B_PORT), PROBE + b"short", ttl=1) is SendResult.SENT
        assert a.send(at("192.0.2.2", B_PORT), PROBE + b"long") is SendResult.SENT
        assert receive_one(b)[2] == PROBE + b"long"


@both_ways
def test_a_datagram_that_cannot_leave_is_an_answer_and_no_error(
    ends: tuple[Namespace, Namespace], way: str
) -> None:
    with opened(ends[0], OPENERS[way], A_PORT) as a:
        assert a.send(at("203.0.113.1", B_PORT), PROBE) is SendResult.UNREACHABLE
        assert a.send(at("2001:db8:ffff::1", B_PORT), PROBE) is SendResult.UNREACHABLE
        assert a.send(at("192.0.2.2", B_PORT), b"SCop" + bytes(66000)) is SendResult.TOO_LARGE
        load_nft(
            ends[0], "table inet f {\nchain out { type filter hook output priority 0; policy drop; }\n}\n"
        )
        assert a.send(at("192.0.2.2", B_PORT), PROBE) is SendResult.REFUSED


def test_probes_are_routed_by_the_devices_mark(ends: tuple[Namespace, Namespace]) -> None:
    a, b = ends
    b.ip("address", "add", "203.0.113.2/32", "dev", "lo")
    a.ip("rule", "add", "fwmark", "0x51", "table", "51")
    a.ip("route", "add", "203.0.113.2/32", "via", "192.0.2.2", "table", "51")
    with (
        opened(a, RawProbeSocket, A_PORT) as plain,
        opened(a, lambda port: RawProbeSocket(port, fwmark=0x51), A_PORT) as marked,
        opened(b, RawProbeSocket, B_PORT) as receiver,
    ):
        assert plain.send(at("203.0.113.2", B_PORT), PROBE) is SendResult.UNREACHABLE
        assert marked.send(at("203.0.113.2", B_PORT), PROBE) is SendResult.SENT
        assert receive_one(receiver)[:2] == (at("192.0.2.1", A_PORT), ip_address("203.0.113.2"))


def test_rules_that_a_crash_left_behind_are_replaced_and_closing_removes_them(
    ends: tuple[Namespace, Namespace],
) -> None:
    a, b = ends
    with b.entered():
        crashed = RewrittenProbeSocket(B_PORT)
        for descriptor in crashed.descriptors:
            assert descriptor > 0
        crashed._close_sockets()
    with opened(a, RawProbeSocket, A_PORT) as sender, opened(b, RewrittenProbeSocket, B_PORT) as receiver:
        sender.send(at("192.0.2.2", B_PORT), PROBE)
        assert receive_one(receiver)[0] == at("192.0.2.1", A_PORT)
    with b.entered():
        listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    assert "scope_probe" not in listed.stdout


def test_rules_that_another_tool_flushed_stop_neither_a_move_nor_the_end(
    ends: tuple[Namespace, Namespace],
) -> None:
    _, b = ends
    with b.entered():
        probe = RewrittenProbeSocket(B_PORT)
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        probe.move(A_PORT)
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        probe.close()
        listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    assert "scope_probe" not in listed.stdout


@pytest.mark.parametrize(
    ("dropped", "outcome"),
    [
        ((), "RawProbeSocket"),
        (("net_raw",), "RewrittenProbeSocket"),
        (("net_raw", "net_admin"), "CAP_NET_RAW"),
    ],
)
def test_what_is_missing_decides_the_way_and_is_named(
    ends: tuple[Namespace, Namespace], dropped: tuple[str, ...], outcome: str
) -> None:
    script = (
        "from scope_agent.wireguard.shell import open_probe_socket\n"
        "opened = open_probe_socket(47001)\n"
        "print(type(opened).__name__)\n"
        "opened.close()\n"
    )
    without = ",".join(f"-{name}" for name in dropped)
    prefix = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"] if dropped else []
    with ends[0].entered():
        done = subprocess.run(
            [*prefix, sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
    assert outcome in (done.stderr if len(dropped) == 2 else done.stdout), done.stderr


class opened:  # noqa: N801 - reads as the built-in it stands for
    """A probe socket inside a namespace, for the length of a block."""

    def __init__(self, namespace: Namespace, opener: Callable[[int], ProbeSocket], port: int) -> None:
        self._namespace, self._opener, self._port = namespace, opener, port

    def __enter__(self) -> ProbeSocket:
        with self._namespace.entered():
            self._socket = self._opener(self._port)
        # Sends ask routing on a socket of their own, which must be made inside, too.
        return _Inside(self._namespace, self._socket)

    def __exit__(self, *_: object) -> None:
        with self._namespace.entered():
            self._socket.close()


class _Inside:
    """A probe socket whose every call runs inside its namespace."""

    def __init__(self, namespace: Namespace, inner: ProbeSocket) -> None:
        self._namespace, self._inner = namespace, inner

    @property
    def port(self) -> int:
        return self._inner.port

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._inner.descriptors

    def send(
        self, endpoint: Endpoint, data: bytes, *, ttl: int | None = None, port: int | None = None
    ) -> SendResult:
        with self._namespace.entered():
            return self._inner.send(endpoint, data, ttl=ttl, port=port)

    def receive(self) -> Iterator[Arrived]:
        return self._inner.receive()

    def hear(self, ports: range) -> None:
        self._inner.hear(ports)

    def move(self, port: int) -> None:
        with self._namespace.entered():
            self._inner.move(port)

    def close(self) -> None:
        with self._namespace.entered():
            self._inner.close()


def receive_one(probes: ProbeSocket) -> tuple[Endpoint, IPAddress, bytes]:
    """Source, local address and payload of the next probe; fails when none comes."""
    arrived = receive_whole(probes)
    return arrived.source, arrived.own, arrived.data


def receive_whole(probes: ProbeSocket) -> Arrived:
    """The next probe; fails when none comes."""
    deadline = time.monotonic() + PATIENCE
    while True:
        for arrived in probes.receive():
            return arrived
        left = deadline - time.monotonic()
        assert left > 0, "no probe arrives"
        select.select(probes.descriptors, [], [], left)


def start_wireguard(left: Machine) -> None:
    """Let the machine behind the NAT begin a handshake."""
    peer = peer_at(B, f"192.0.2.2:{B_PORT}", "10.9.0.2/32", keepalive=20)
    left.agree(desired_device(left.device.name, A, peer, port=A_PORT))


def at(address: str, port: int) -> Endpoint:
    return Endpoint(ip_address(address), port)


def load_nft(namespace: Namespace, rules: str) -> None:
    with namespace.entered():
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
