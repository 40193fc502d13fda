"""A peer whose network lets no UDP out, with real packets: carried to a hub over TCP, and on from there.

Pings go from one kernel to another through WireGuard. They do not notice that an agent dies, and come through
again soon when a carrier does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from lab import Lab, Nat
from meshlab import PRIVATE, Member, Registry, mesh_document

from tests.netns.members_fixture import Members

MESH = "carried"
EDGES = ("left", "blocked")
BLOCKED = ("blocked", "locked")
WITHIN_S = 120.0  # far above what is seen, on a machine that does ten other things


@dataclass(frozen=True, slots=True)
class Carried(Members):
    """The mesh of this file."""

    registry: Registry

    def is_carried(self, name: str = EDGES[0], other: str = EDGES[1]) -> bool:
        both = [self.reach(*pair) for pair in ((name, other), (other, name))]
        return all(reach is not None and reach.is_relayed and reach.carried for reach in both)

    def ping(self, *options: str, source: str = EDGES[0], target: str = EDGES[1]) -> subprocess.Popen[str]:
        return self.ping_from(source, target, *options)


@pytest.fixture(scope="module")
def carried() -> Iterator[Carried]:
    with Lab(private=PRIVATE) as lab:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH, hubs={"names": [f"{MESH}.external.hub"]}))
        token = registry.token(MESH)
        members = {}
        for name in ("hub", "left", *BLOCKED):
            site = lab.site(f"site-{name}", nat=Nat.NONE if name == "hub" else Nat.PORT_RESTRICTED)
            if name in BLOCKED:
                site.block_udp()
            if name == "locked":  # reaches nothing but its own network and the hub's TCP port
                lab.cut(site, registry.server)
                _await_carrier(registry)
                token = registry.token(MESH, hub=f"{MESH}.external.hub")
            members[name] = Member(site.machine(name), mesh=MESH, registry=registry)
            members[name].join(token, wait=True)
        mesh = Carried(lab, MESH, members, WITHIN_S, registry)
        mesh.until(lambda: mesh.is_carried() and mesh.is_carried("hub", "blocked"), "carried")
        said, _ = mesh.ping("-c", "1", "-w", "20").communicate()  # and WireGuard has a session
        assert "1 received" in said
        yield mesh
        for member in members.values():
            member.hang_up()


def _await_carrier(registry: Registry) -> None:
    """Return once the hub has told where it carries."""
    end = time.monotonic() + WITHIN_S
    while "pin:" not in registry.scopectl("get", "peers", "-o", "yaml"):
        assert time.monotonic() < end, "the hub does not carry"
        time.sleep(0.5)


def test_a_peer_without_udp_is_reached_by_hub_and_peer_and_the_way_is_told(carried: Carried) -> None:
    for source in ("left", "hub"):
        said, _ = carried.ping("-c", "20", "-i", "0.05", source=source).communicate(timeout=30.0)
        assert "20 received" in said
    reach = carried.reach("blocked", "left")
    assert reach is not None
    assert reach.hub == f"{MESH}.external.hub" and "is UDP blocked here?" in reach.reason
    listed = carried.registry.scopectl("get", "peers", "-o", "yaml")
    assert "carried: true" in listed and "carrier:" in listed and "127.83." not in listed


@pytest.mark.parametrize("name", ["blocked", "hub"])
def test_nothing_is_lost_when_an_agent_dies_and_starts_again(carried: Carried, name: str) -> None:
    carried.until(carried.is_carried, "carried")
    pinging = carried.ping("-c", "300", "-i", "0.02")
    time.sleep(1.0)  # some go before
    member = carried.members.pop(name)
    member.kill()
    time.sleep(2.0)  # some while it is dead
    member.run_again()
    said, _ = pinging.communicate(timeout=60.0)
    carried.members[name] = member
    carried.until(lambda: member.status() is not None, "the agent answers again")
    assert "300 received" in said


@pytest.mark.parametrize("name", ["blocked", "hub"])
def test_a_carrier_that_dies_is_started_again_and_carries(carried: Carried, name: str) -> None:
    carried.until(carried.is_carried, "carried")
    member = carried.members[name]
    killed = member.carrier_pid()
    os.kill(killed, signal.SIGKILL)
    carried.until(lambda: _is_answered(carried), "a ping comes back")  # how soon, the benchmarks say
    assert member.carrier_pid() != killed


def _is_answered(carried: Carried) -> bool:
    said, _ = carried.ping("-c", "1", "-w", "2").communicate(timeout=60.0)
    return "1 received" in said


def test_a_machine_that_reaches_the_hub_alone_has_joined_through_it_and_reaches_another_without_udp(
    carried: Carried,
) -> None:
    carried.until(lambda: carried.is_carried(*BLOCKED), "two without UDP")
    # By a carrier that may just have been started anew.
    carried.until(lambda: _is_connected(carried.members["locked"]), "connected to the registry")
    said, _ = carried.ping("-c", "20", "-i", "0.05", source="locked").communicate(timeout=30.0)
    assert said.count(" bytes from ") >= 19  # WireGuard's first handshake may cost one


def test_once_udp_is_let_out_a_pair_is_direct_and_loses_nothing(carried: Carried) -> None:
    carried.until(carried.is_carried, "carried")
    pinging = carried.ping("-c", "3000", "-i", "0.02")
    time.sleep(1.0)  # some go before
    carried.lab.sites["site-blocked"].unblock_udp()
    carried.until(lambda: _is_direct(carried), "direct")
    time.sleep(2.0)  # and some after
    pinging.send_signal(signal.SIGINT)
    said, _ = pinging.communicate(timeout=60.0)
    found = re.search(r"(\d+) packets transmitted, (\d+) received", said)
    assert found is not None
    assert int(found[1]) - int(found[2]) <= 1, said[-600:]  # the last may be under way at the end


def _is_direct(carried: Carried) -> bool:
    reach = carried.reach("blocked", "left")
    return reach is not None and reach.is_direct


def _is_connected(member: Member) -> bool:
    status = member.status()
    return status is not None and status.connected
