"""NATs that take an unsolicited packet for one of their own connections, and then move the port of a peer.

The entry that such a packet leaves in the far NAT takes the port that the far peer's own packets would leave
by; while both sides go on sending, it never expires.
"""

from __future__ import annotations

from functools import partial

import pytest
from lab.nat import Nat

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
