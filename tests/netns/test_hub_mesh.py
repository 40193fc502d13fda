"""Two peers that cannot reach each other directly talk through hubs, whatever happens to these.

Both are behind symmetric NATs; two machines without a NAT are hubs. Real packets tell: pings through
WireGuard, from the kernel of one machine to another's. What is relayed must not notice that a hub's agent is
dead or hangs, and must leave a hub that is cut off for the other one.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from lab import Lab, Nat
from meshlab import PRIVATE, Member, Registry, mesh_document

from tests.netns.members_fixture import SHORT_TIMERS, Members

MESH = "relayed"
HUBS = ("one", "two")
EDGES = ("left", "right")
RELAYED_S = 90.0  # far above what is seen, from the last join
MOVED_S = 20.0  # a relay that is cut off is left; that this takes three seconds is shown in virtual time


@dataclass(frozen=True, slots=True)
class Relayed(Members):
    """The mesh of this file."""

    def is_relayed(self) -> bool:
        return all(
            (reach := self.reach(name, other)) is not None and reach.path == "Relayed" and reach.hub != ""
            for name, other in (EDGES, EDGES[::-1])
        )

    def hub(self) -> str:
        """The name of the machine that relays."""
        reach = self.reach(*EDGES)
        assert reach is not None
        return reach.hub.removeprefix(f"{MESH}.external.")

    def ping(self, *options: str) -> subprocess.Popen[str]:
        """Ping from one side to the other."""
        return self.ping_from(*EDGES, *options)


@pytest.fixture(scope="module")
def relayed() -> Iterator[Relayed]:
    with Lab(delay_ms=10, private=PRIVATE) as lab:
        registry = Registry(lab.server("registry"))
        hubs = {"names": [f"{MESH}.external.{name}" for name in HUBS]}
        registry.apply(mesh_document(MESH, hubs=hubs, timers=SHORT_TIMERS))
        token = registry.token(MESH)
        members = {}
        for name in HUBS + EDGES:
            site = lab.site(f"site-{name}", nat=Nat.NONE if name in HUBS else Nat.SYMMETRIC)
            members[name] = Member(site.machine(name), mesh=MESH, registry=registry)
            members[name].join(token)
        mesh = Relayed(lab, MESH, members, RELAYED_S)
        mesh.until(mesh.is_relayed, "a relay")
        said, _ = mesh.ping("-c", "1", "-w", "30").communicate()  # and WireGuard has a session
        assert "1 received" in said
        yield mesh
        for member in members.values():
            member.hang_up()


def answers(said: str) -> list[float]:
    """When each answer came: seconds since the epoch."""
    return [float(at) for at in re.findall(r"^\[([0-9.]+)\] \d+ bytes from", said, re.MULTILINE)]


def test_two_symmetric_nats_talk_through_a_hub_and_say_why(relayed: Relayed) -> None:
    said, _ = relayed.ping("-c", "20", "-i", "0.05").communicate(timeout=30.0)
    assert "20 received" in said

    def is_explained() -> bool:
        both = [relayed.reach(*pair) for pair in (EDGES, EDGES[::-1])]
        return all(reach is not None and reach.reason == "symmetric NAT on both sides" for reach in both)

    relayed.until(is_explained, "the reason on both sides")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_hubs_whose_agents_are_dead_or_hang_go_on_relaying(relayed: Relayed, number: signal.Signals) -> None:
    relayed.until(relayed.is_relayed, "a relay")
    hubs = {name: relayed.members.pop(name) for name in HUBS}
    pinging = relayed.ping("-c", "1250", "-i", "0.02")  # 25 s: every side knocks in that time
    time.sleep(1.0)  # some go before, the rest while they are dead
    for hub in hubs.values():
        assert hub.process is not None
        hub.process.send_signal(number)
    try:
        said, _ = pinging.communicate(timeout=60.0)
        assert relayed.is_relayed()
    finally:
        for hub in hubs.values():
            assert hub.process is not None
            if number is signal.SIGSTOP:
                hub.process.send_signal(signal.SIGCONT)
            else:
                hub.process.wait()
                hub.run()
        relayed.members.update(hubs)
    # That nothing is lost and nothing moves is shown in virtual time; a busy machine may lose some by itself.
    assert len(answers(said)) >= 0.98 * 1250, said[-300:]
    relayed.until(
        lambda: all(hub.status() is not None for hub in hubs.values()), "the hubs' agents answer again"
    )


def test_a_hub_that_is_cut_off_is_left_for_the_other(relayed: Relayed) -> None:
    relayed.until(relayed.is_relayed, "a relay")
    name = relayed.hub()
    pinging = relayed.ping("-c", "1500", "-i", "0.02")
    assert pinging.stdout is not None
    try:
        for _ in range(100):  # some go before
            pinging.stdout.readline()
        relayed.lab.sites[f"site-{name}"].block_udp()
        cut = time.time()
        after = next((at for line in pinging.stdout for at in answers(line) if at > cut + 0.1), None)
        assert after is not None, "no answer after the cut"
        assert after - cut < MOVED_S
        relayed.until(lambda: relayed.is_relayed() and relayed.hub() != name, "the other hub")
    finally:
        relayed.lab.sites[f"site-{name}"].unblock_udp()
        pinging.kill()
        pinging.communicate()


def test_a_hub_that_loses_power_is_left_for_the_other_and_relays_again_when_it_is_back(
    relayed: Relayed,
) -> None:
    relayed.until(relayed.is_relayed, "a relay")
    name = relayed.hub()
    hub = relayed.members.pop(name)
    pinging = relayed.ping("-i", "0.02")
    assert pinging.stdout is not None
    try:
        for _ in range(100):  # some go before
            pinging.stdout.readline()
        cut = time.time()
        hub.lose_power()
        after = next((at for line in pinging.stdout for at in answers(line) if at > cut + 2.0), None)
        assert after is not None, "no answer after the loss"
        assert after - cut < MOVED_S
        relayed.until(lambda: relayed.is_relayed() and relayed.hub() != name, "the other hub")
        hub.run_again()
        relayed.members[name] = hub
        relayed.until(lambda: hub.status() is not None, "the hub's agent answers again")
        other = relayed.hub()
        relayed.lab.sites[f"site-{other}"].block_udp()
        relayed.until(lambda: relayed.is_relayed() and relayed.hub() == name, "the hub that is back")
    finally:
        for each in HUBS:
            relayed.lab.sites[f"site-{each}"].unblock_udp()
        pinging.kill()
        pinging.communicate()
