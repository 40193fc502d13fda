"""Hubs: traffic through them at once, the direct path as soon as there is one, and back when it dies."""

from __future__ import annotations

import pytest
from lab.nat import Nat

from scope.model import PathKind
from tests.sim.world import Machine, World

SEEDS = range(1, 6)


def _view(a: Machine, b: Machine):
    assert a.agent is not None
    return a.agent.paths(a.world.now).pairs[b.key]


@pytest.mark.parametrize("seed", SEEDS)
def test_two_symmetric_nats_are_relayed_within_a_second_of_joining_and_told_why(seed: int) -> None:
    world = World(seed)
    hub = world.hub()
    world.run(5.0)
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    assert world.until(lambda: world.is_relayed(a, b), within=5.0) < 1.0
    a.ping(b)
    world.run(0.2)
    assert b.received and a.received and hub.relay.passed
    world.run(70.0)
    for here, there in ((a, b), (b, a)):
        view = _view(here, there)
        assert view.path is PathKind.RELAYED and view.declared
        assert view.reason == "symmetric NAT on both sides"
        assert view.hub == hub.name and not view.user_space
