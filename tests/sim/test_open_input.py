"""NATs that take an unsolicited packet for one of their own connections, and then move the port of a peer.

The entry that such a packet leaves in the far NAT takes the port that the far peer's own packets would leave
by; while both sides go on sending, it never expires.
"""

from __future__ import annotations

from functools import partial

import pytest
from lab.nat import Nat
from scope_agent.paths.path import NOWHERE

from scope.model import Mapping
from tests.sim.world import World

OPEN = Nat.PORT_RESTRICTED_OPEN_INPUT
KINDS = (OPEN, Nat.PORT_RESTRICTED, OPEN, Nat.CGNAT, OPEN, Nat.ADDRESS_RESTRICTED, OPEN, Nat.NONE)


@pytest.mark.parametrize("seed", range(12))
def test_many_peers_that_start_at_once_on_busy_machines_are_all_direct(seed: int) -> None:
    world = World(seed)
    for number in range(14):
        site = world.site(KINDS[number % len(KINDS)], delay=world.random.uniform(0.005, 0.05))
        machine = world.machine(site)
        world.after(world.random.uniform(0.0, 2.0), machine.join)
        for _ in range(3):
            start, stall = world.random.uniform(0.0, 4.0), world.random.uniform(0.1, 1.5)
            world.after(start, partial(machine.stall, stall))
    world.run(6.0)
    world.until(world.is_converged, within=6.0)


def test_peers_that_start_again_out_of_step_heal_within_the_ladder() -> None:
    for seed in range(3):
        world = World(seed)
        machines = [world.peer(kind) for kind in KINDS]
        world.until(world.is_converged, within=5.0)
        for machine in machines:
            machine.crash()
            machine.device.delete()
        world.run(300.0)  # the NATs have forgotten, and each early ping to a last good endpoint moves a port
        for machine in machines:
            world.after(world.random.uniform(0.0, 6.0), machine.start)
        world.run(6.0)
        for machine in machines:
            for other in machines:
                machine.ping(other)  # WireGuard's handshakes keep a moved port where it is
        world.until(world.is_converged, within=65.0)


def test_a_port_that_the_data_itself_moved_is_given_back_after_the_ladder() -> None:
    world = World(1)
    a, b = world.peer(OPEN), world.peer(OPEN)
    world.until(partial(world.is_direct, a, b), within=3.0)
    a.stream(b, rate=5.0, seconds=200.0)
    world.run(3.0)
    for box in b.site.boxes:
        box.reboot()
    for link in world.network.link(b.site, a.site, both=False):
        link.cut = True  # what A sends comes first, and moves B's port
    world.run(3.0)
    for link in world.network.link(b.site, a.site, both=False):
        link.cut = False
    world.run(3.0)
    assert not world.is_direct(a, b)
    world.until(partial(world.is_direct, a, b), within=150.0)


def test_a_mapping_stays_endpoint_independent_where_a_port_was_moved_for_one_peer() -> None:
    world = World(2)
    reflecting, behind = world.peer(Nat.NONE), world.peer(OPEN)
    world.until(partial(world.is_direct, reflecting, behind), within=3.0)
    behind.crash()
    behind.device.delete()
    for box in behind.site.boxes:
        box.reboot()
    reflecting.ping(behind)
    world.run(5.0)
    behind.start()
    world.run(30.0)
    assert world.is_direct(reflecting, behind)
    assert behind.agent is not None
    endpoint = behind.agent.paths(world.now)
    assert endpoint.mapping is Mapping.ENDPOINT_INDEPENDENT


def test_an_agent_that_restarts_while_its_pair_rests_still_knows_the_last_good_endpoint() -> None:
    world = World(3)
    a, b = world.peer(OPEN), world.peer(OPEN)
    world.until(partial(world.is_direct, a, b), within=3.0)
    world.run(3.0)
    good = a.endpoint_of(b)
    for link in world.network.link(a.site, b.site):
        link.cut = True
    a.stream(b, rate=5.0, seconds=90.0)
    world.run(75.0)
    assert a.endpoint_of(b) == NOWHERE
    a.restart()
    for link in world.network.link(a.site, b.site):
        link.cut = False
    world.run(5.0)
    assert a.disk.last_good[b.key] == good
    world.until(partial(world.is_direct, a, b), within=75.0)
