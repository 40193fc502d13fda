"""A live mesh becomes a tree and full again, with real packets: who forwards shows in their time to live.

Two machines behind NATs are edges, two without a NAT are hubs. What an edge sends to the other arrives with
one hop less for each hub that forwarded it.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from itertools import pairwise
from pathlib import Path

import pytest
from lab import Lab, Machine, Nat, Server
from lab.netns import call_in
from meshlab import PRIVATE, Member, Registry, mesh_document

from tests.netns.members_fixture import SHORT_TIMERS

MESH = "wood"
HUBS = ("oak", "elm")
EDGES = ("left", "right")
DONE_S = 120.0  # far above what is seen
GAP_S = 20.0  # that no change takes three seconds is shown in virtual time
TABLE = "scope_tree_scope0"
FORWARDING = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")


@dataclass(slots=True)
class Wood:
    """The mesh of this file."""

    lab: Lab
    server: Server
    registry: Registry
    members: dict[str, Member] = field(default_factory=dict)

    def apply(self, topology: str) -> None:
        hubs = {"names": [f"{MESH}.external.{name}" for name in HUBS]}
        self.registry.apply(mesh_document(MESH, hubs=hubs, timers=SHORT_TIMERS, topology=topology))

    def address(self, name: str) -> str:
        """Inside the mesh, once its agent knows it."""
        end = time.monotonic() + DONE_S
        while (status := self.members[name].status()) is None or status.address is None:
            self.members[name].check_alive()
            assert time.monotonic() < end, f"{name}: {self.members[name].log.read_text()}"
            time.sleep(0.1)
        return status.address

    def is_routed(self) -> bool:
        """Whether both edges say that hubs forward between them: each moves by itself."""
        statuses = [(self.members[edge].status(), other) for edge, other in (EDGES, EDGES[::-1])]
        return all(
            status is not None
            and (reach := status.peers.get(f"{MESH}.external.{other}")) is not None
            and reach.path == "Routed"
            for status, other in statuses
        )

    @contextmanager
    def pinging(self) -> Iterator[Pings]:
        """From one edge to the other, ten times a second, until the block ends."""
        machine, to = self.members["left"].machine, self.address("right")
        log = machine.directory / "pings.log"
        with log.open("w") as out:
            process = machine.popen(["ping", "-D", "-O", "-n", "-i", "0.1", to], stdout=out)
        try:
            yield Pings(log)
        finally:
            process.terminate()
            process.wait()


@dataclass(frozen=True, slots=True)
class Pings:
    """What was answered so far."""

    log: Path

    def answers(self) -> list[tuple[float, int]]:
        """When each answer came, in seconds since the epoch, and its time to live."""
        found = re.findall(r"^\[([0-9.]+)\] \d+ bytes from .* ttl=(\d+)", self.log.read_text(), re.MULTILINE)
        return [(float(at), int(ttl)) for at, ttl in found]

    def hops(self) -> int | None:
        """How many machines forwarded the last answer; None before any."""
        answers = self.answers()
        return 64 - answers[-1][1] if answers else None

    def longest_gap(self) -> float:
        return max(later - before for (before, _), (later, _) in pairwise(self.answers()))

    def until(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DONE_S
        while not done():
            assert time.monotonic() < end, f"not within {DONE_S:g} s: {what}; {self.log.read_text()[-400:]}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def wood() -> Iterator[Wood]:
    with Lab(delay_ms=10, private=PRIVATE) as lab:
        server = lab.server("registry")
        mesh = Wood(lab, server, Registry(server))
        mesh.apply("Full")
        token = mesh.registry.token(MESH)
        for name in HUBS + EDGES:
            site = lab.site(f"site-{name}", nat=Nat.NONE if name in HUBS else Nat.PORT_RESTRICTED)
            machine = site.machine(name)
            for setting in FORWARDING if name in HUBS else ():
                machine.run(["sysctl", "-q", "-w", f"{setting}=0"])
            mesh.members[name] = Member(machine, mesh=MESH, registry=mesh.registry)
            mesh.members[name].join(token, wait=True)
        with mesh.pinging() as pings:
            pings.until(lambda: pings.hops() == 0, "a direct path between the edges")
        yield mesh
        for member in mesh.members.values():
            member.hang_up()


def _tables(machine: Machine) -> str:
    return machine.run(["nft", "list", "tables"]).stdout


def _home(wood: Wood) -> str:
    """The hub by which an edge is reached."""
    status = wood.members["right"].status()
    assert status is not None
    return status.peers[f"{MESH}.external.left"].hub.removeprefix(f"{MESH}.external.")


def test_a_live_mesh_becomes_a_tree_loses_a_hub_and_becomes_full_again(wood: Wood) -> None:
    with wood.pinging() as pings:
        pings.until(lambda: pings.hops() == 0, "the direct path")
        wood.apply("Tree")
        pings.until(lambda: (pings.hops() or 0) >= 1, "a path by hubs")
        time.sleep(1.0)  # what the change does to it shows within that
        assert pings.longest_gap() < GAP_S
        pings.until(wood.is_routed, "both edges say that it is routed")
        pings.until(lambda: all(TABLE in _tables(wood.members[hub].machine) for hub in HUBS), "the rules")

        home = _home(wood)
        cut = time.time()
        wood.lab.sites[f"site-{home}"].block_udp()
        try:
            pings.until(lambda: any(at > cut + 0.2 for at, _ in pings.answers()), "the other hub")
            first = min(at for at, _ in pings.answers() if at > cut + 0.2)
            assert first - cut < GAP_S
        finally:
            wood.lab.sites[f"site-{home}"].unblock_udp()
    with wood.pinging() as pings:
        pings.until(lambda: (pings.hops() or 0) >= 1, "a path by hubs")
        wood.apply("Full")
        pings.until(lambda: pings.hops() == 0, "a direct path again")
        time.sleep(1.0)
        assert pings.longest_gap() < GAP_S


# Gives an address to the peer that has the whole mesh, as whoever rules a machine can.
STRAY = """
import socket, sys
def ask(text):
    with socket.socket(socket.AF_UNIX) as control:
        control.connect("/var/run/wireguard/scope0.sock")
        control.sendall(text.encode())
        said = b""
        while not said.endswith(b"\\n\\n"):
            said += control.recv(65536)
    return said.decode()
for line in ask("get=1\\n\\n").splitlines():
    name, _, value = line.partition("=")
    if name == "public_key":
        peer = value
    if line == "allowed_ip=100.80.0.0/16":
        assert "errno=0" in ask(f"set=1\\npublic_key={peer}\\nallowed_ip={sys.argv[1]}/32\\n\\n")
        break
else:
    sys.exit("no peer has the mesh")
"""


def test_a_hub_forwards_nothing_to_where_the_mesh_is_not(wood: Wood) -> None:
    wood.apply("Tree")
    with wood.pinging() as pings:
        pings.until(lambda: (pings.hops() or 0) >= 1 and wood.is_routed(), "a path by hubs")
    wood.members["left"].kill()
    left, outside = wood.members["left"].machine, str(_ipv4(wood.server))
    left.run([sys.executable, "-c", STRAY, outside])
    left.run(["ip", "route", "add", f"{outside}/32", "dev", "scope0"])
    heard = call_in(wood.server.namespace, _icmp_socket)
    ping = left.popen(["ping", "-n", "-i", "0.1", outside], stdout=subprocess.DEVNULL)
    try:
        assert not _hears(heard, within_s=2.0)
        # Without the rules, and without who would put them back: nothing else holds it back.
        for hub in HUBS:
            _signal(wood.members[hub], signal.SIGSTOP)
            wood.members[hub].machine.run(["nft", "delete", "table", "inet", TABLE])
        assert _hears(heard, within_s=DONE_S)
        for hub in HUBS:
            _signal(wood.members[hub], signal.SIGCONT)
        end = time.monotonic() + DONE_S
        # One hub's rules hold it back, and each is to have its own again.
        while not all(TABLE in _tables(wood.members[hub].machine) for hub in HUBS):
            assert time.monotonic() < end, "the rules are not put back"
            time.sleep(0.1)
        while _hears(heard, within_s=2.0):
            assert time.monotonic() < end, "the rules do not hold it back"
    finally:
        ping.terminate()
        ping.wait()
        heard.close()
        left.run(["ip", "route", "del", f"{outside}/32", "dev", "scope0"])
        wood.members["left"].run_again()


def test_a_hub_that_leaves_takes_its_rules_and_settings_along(wood: Wood) -> None:
    hub = wood.members.pop(HUBS[1])
    assert TABLE in _tables(hub.machine)
    hub.leave()
    assert TABLE not in _tables(hub.machine)
    for setting in FORWARDING:
        assert hub.machine.run(["sysctl", "-n", setting]).stdout.strip() == "0"


def _signal(member: Member, number: signal.Signals) -> None:
    assert member.process is not None
    member.process.send_signal(number)


def _ipv4(server: Server) -> IPv4Address:
    return next(address for address in server.addresses() if isinstance(address, IPv4Address))


def _icmp_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


def _hears(heard: socket.socket, *, within_s: float) -> bool:
    """Whether something comes from an address of the mesh."""
    end = time.monotonic() + within_s
    while (left := end - time.monotonic()) > 0:
        heard.settimeout(left)
        try:
            _, (source, _) = heard.recvfrom(2048)
        except TimeoutError:
            return False
        if source.startswith("100.80."):
            return True
    return False
