"""The mesh tree: edges reach each other by hubs, whatever dies, and a change of topology is no outage."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from lab.nat import Nat
from scope_agent.inputs import ForwardingSeen

from scope.model import Role, TopologyMode
from tests.sim.world import Machine, World

SEEDS = range(1, 4)


def _set_topology(world: World, mode: TopologyMode) -> None:
    world.registry.change_mesh(lambda spec: replace(spec, topology=mode))


def _tree(seed: int, *, hubs: int = 2, edges: int = 3) -> tuple[World, list[Machine], list[Machine]]:
    """Hubs, each farther away than the one before, and edges behind NATs, all attached and long calm."""
    world = World(seed)
    _set_topology(world, TopologyMode.TREE)
    found = [world.hub(delay=0.005 + 0.02 * number) for number in range(hubs)]
    world.run(5.0)
    kinds = (Nat.SYMMETRIC, Nat.PORT_RESTRICTED, Nat.SYMMETRIC)
    peers = [world.peer(kinds[number % len(kinds)]) for number in range(edges)]
    world.until(lambda: all(edge.home is not None for edge in peers), within=5.0)
    world.run(20.0)
    return world, found, peers


@pytest.mark.parametrize("seed", SEEDS)
def test_two_edges_reach_each_other_by_one_hub_and_know_nobody_else(seed: int) -> None:
    _, (hub,), (a, b) = _tree(seed, hubs=1, edges=2)
    assert a.time_to(b, within=1.0) < 0.2 and b.time_to(a, within=1.0) < 0.2
    assert a.device.peers.keys() == b.device.peers.keys() == {hub.key}
    assert hub.passed and hub.device.peers.keys() == {a.key, b.key}


@pytest.mark.parametrize("seed", SEEDS)
def test_edges_of_different_hubs_reach_each_other_through_both(seed: int) -> None:
    world = World(seed)
    _set_topology(world, TopologyMode.TREE)
    near, far = world.hub(delay=0.005), world.hub(delay=0.005)
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.PORT_RESTRICTED)
    for edge, hub in ((a, far), (b, near)):  # each is nearer to one of them
        for link in world.network.link(edge.site, hub.site):
            link.delay = 0.05
    world.until(lambda: (a.home, b.home) == (near.name, far.name), within=30.0)
    world.run(5.0)
    marks = near.passed, far.passed
    assert a.time_to(b, within=2.0) < 0.5 and b.time_to(a, within=2.0) < 0.5
    assert near.passed > marks[0] and far.passed > marks[1]
    assert far.time_to(a, within=2.0) < 0.5 and a.time_to(far, within=2.0) < 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_registry_gone", [False, True])
def test_an_edge_whose_hub_dies_is_on_the_next_within_3_s(seed: int, is_registry_gone: bool) -> None:
    world, (first, second, _), (a, b, c) = _tree(seed, hubs=3)
    assert {a.home, b.home, c.home} == {first.name}
    if is_registry_gone:
        world.registry.go_down()
        world.run(2.0)
    a.stream(b, rate=20.0, seconds=60.0)
    world.run(world.random.uniform(0.5, 1.5))
    first.switch_off()
    died = world.now
    world.run(0.2)  # what it had sent on
    assert a.time_to(b, within=5.0) < 2.8
    assert {a.home, b.home} == {second.name}
    world.run(died + 3.0 - world.now)
    assert c.home == second.name  # which was idle all the while


@pytest.mark.parametrize("seed", SEEDS)
def test_an_edge_that_only_receives_hears_by_the_next_hub_within_3_s(seed: int) -> None:
    world, (first, second), (a, b, _) = _tree(seed)
    a.stream(b, rate=20.0, seconds=60.0, answer=False)
    world.run(world.random.uniform(5.0, 6.0))
    first.switch_off()
    died = world.now
    world.run(0.5)
    mark = len(b.received)
    world.until(lambda: len(b.received) > mark, within=5.0)
    assert world.now - died < 3.0
    assert b.home == second.name


@pytest.mark.parametrize("seed", SEEDS)
def test_hubs_whose_agents_die_are_left_only_by_all(seed: int) -> None:
    """Where no other hub is to be had, the edges stay, and the kernel goes on."""
    world, (hub,), (a, b, _) = _tree(seed, hubs=1)
    hub.crash()
    a.stream(b, rate=10.0, seconds=30.0)
    world.run(31.0)
    assert a.home == b.home == hub.name
    assert len({packet.number for _, sender, packet in b.received if sender == a.key}) >= 300


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hub_that_starts_anew_keeps_its_edges_and_loses_no_packet(seed: int) -> None:
    world, (first, _), (a, b, _) = _tree(seed)
    a.stream(b, rate=20.0, seconds=20.0)
    world.run(2.0)
    first.restart(after=0.3)
    world.run(19.0)
    assert {a.home, b.home} == {first.name}
    numbers = {packet.number for _, sender, packet in b.received if sender == a.key}
    assert numbers == set(range(len(numbers))) and len(numbers) >= 400
    assert first.disk.attachments


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hub_that_lost_its_disk_hears_of_all_edges_from_them_and_from_hubs(seed: int) -> None:
    world, (first, second), (a, b, c) = _tree(seed)
    first.crash()
    first.disk = replace(first.disk, attachments=())
    first.start()
    world.run(3.0)
    for one, other in ((a, b), (b, c), (c, a), (second, a), (a, second)):
        assert one.time_to(other, within=2.0) < 1.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lost", [False, True])
def test_an_edge_whose_clock_went_back_a_year_is_still_followed(seed: int, lost: bool) -> None:
    world, (first, second), (a, b, _) = _tree(seed)
    a.crash()
    a.clock_error = -365 * 86400.0
    if lost:
        a.disk = replace(a.disk, attachments=())
    a.start()
    world.run(3.0)
    first.switch_off()
    world.run(3.0)
    assert a.home == second.name
    assert b.time_to(a, within=2.0) < 1.0 and a.time_to(b, within=2.0) < 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_an_edge_moves_to_a_hub_that_is_clearly_nearer_and_not_for_a_wobble(seed: int) -> None:
    world, (first, second), (a, b, _) = _tree(seed)
    for link in world.network.link(a.site, first.site):
        link.delay = 0.2
    a.stream(b, rate=20.0, seconds=120.0)
    world.until(lambda: a.home == second.name, within=60.0)
    world.run(5.0)
    assert b.home == first.name
    assert b.time_to(a, within=2.0) < 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_edges_of_a_hub_that_is_to_be_none_move_and_so_does_it(seed: int) -> None:
    world, (first, second), (a, b, _) = _tree(seed)
    world.registry.assign(first, replace(world.registry.peer(first).assignment, role=Role.EDGE))
    world.run(3.0)
    assert {a.home, b.home, first.home} == {second.name}
    for one, other in ((a, b), (a, first), (first, b), (second, a), (a, second)):
        assert one.time_to(other, within=2.0) < 1.0


def test_an_edge_that_roams_is_followed() -> None:
    world, _, (a, b, _) = _tree(1)
    a.stream(b, rate=20.0, seconds=60.0)
    world.run(2.0)
    a.move(world.site(Nat.PORT_RESTRICTED))
    world.run(0.1)
    assert b.time_to(a, within=5.0) < 3.0
    assert a.time_to(b, within=5.0) < 1.0


# --- changes of topology ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_live_mesh_becomes_a_tree_and_full_again_without_a_gap_of_3_s(seed: int) -> None:
    world = World(seed)
    hubs = [world.hub(delay=0.005 + 0.02 * number) for number in range(2)]
    world.run(5.0)
    kinds = (Nat.PORT_RESTRICTED, Nat.SYMMETRIC, Nat.FULL_CONE, Nat.UDP_BLOCKED)
    machines = hubs + [world.peer(kind) for kind in kinds]
    world.run(30.0)
    gaps = _Gaps(world, machines)
    world.run(2.0)
    _set_topology(world, TopologyMode.TREE)
    world.run(20.0)
    assert gaps.longest() < 3.0
    edges = machines[2:]
    assert all(edge.device.peers.keys() == {hub.key for hub in hubs} for edge in edges)
    assert all(edge.home == hubs[0].name for edge in edges)
    _set_topology(world, TopologyMode.FULL)
    world.run(80.0)
    assert gaps.longest() < 3.0
    assert all(edge.home is None for edge in edges)
    assert world.is_direct(edges[0], edges[2])
    assert all(hub.forwarded is None for hub in hubs)


class _Gaps:
    """All machines send to all others, ten times a second: how long anyone waited for anyone."""

    def __init__(self, world: World, machines: list[Machine]) -> None:
        self._world, self._machines, self._start = world, machines, world.now
        for a in machines:
            for b in machines:
                if a is not b:
                    a.stream(b, rate=10.0, seconds=200.0, answer=False)

    def longest(self) -> float:
        """In seconds, of any pair, in either direction."""
        return max(self._gap(a, b) for a in self._machines for b in self._machines if a is not b)

    def _gap(self, a: Machine, b: Machine) -> float:
        times = [at for at, sender, _ in b.received if sender == a.key and at >= self._start]
        ends = [self._start, *times, self._world.now]
        return max(later - before for before, later in pairwise(ends))


def test_a_hub_publishes_why_what_it_forwards_is_lost_and_that_it_is_over() -> None:
    world, (hub, _), _ = _tree(1)
    why = "the foreign chain ip filter FORWARD drops IPv4 between edges"

    def published() -> str:
        report = world.registry.peer(hub).report
        assert report is not None and report.relay is not None
        return report.relay.unrouted

    assert published() == ""
    for lost in (why, ""):
        hub.give(ForwardingSeen(lost))
        world.until(lambda lost=lost: published() == lost, within=5.0)  # type: ignore[misc]
        assert hub.agent is not None
        conditions = hub.agent.status(world.now)["conditions"]
        assert isinstance(conditions, list)
        assert [each["message"] for each in conditions] == [lost] * bool(lost)
