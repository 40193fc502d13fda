"""A tree whose edges have no UDP, and keys in it: carried to hubs over TCP, keyed with these, and rotated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from lab.nat import Nat

from scope.model import PathKind, PostQuantum, PostQuantumMode, TopologyMode
from tests.sim.world import Machine, World

SEEDS = (1, 2)


def _tree(
    seed: int,
    *,
    hubs: int = 2,
    kinds: tuple[Nat, ...] = (Nat.UDP_BLOCKED, Nat.PORT_RESTRICTED),
    mode: PostQuantumMode = PostQuantumMode.OFF,
    interval: float = 3600.0,
) -> tuple[World, list[Machine], list[Machine]]:
    """Hubs, each farther away than the one before, and edges, all attached and calm."""
    world = World(seed)
    world.registry.change_mesh(
        lambda spec: replace(spec, topology=TopologyMode.TREE, post_quantum=PostQuantum(mode, interval))
    )
    found = [world.hub(delay=0.005 + 0.02 * number) for number in range(hubs)]
    world.run(20.0)
    edges = [world.peer(kind) for kind in kinds]
    world.until(lambda: all(edge.home is not None for edge in edges), within=10.0)
    world.run(20.0)
    return world, found, edges


def _lost(a: Machine, b: Machine, *, seconds: float, rate: float = 20.0) -> int:
    """How many of packets both ways are lost, sent from now on for so long."""
    marks = len(a.received), len(b.received)
    for here, there in ((a, b), (b, a)):
        here.stream(there, rate=rate, seconds=seconds + 0.5 / rate, answer=False)
    a.world.run(seconds + 2.0)
    arrived = [
        {packet.number for _, sender, packet in machine.received[mark:] if sender == other.key}
        for machine, other, mark in ((a, b, marks[0]), (b, a, marks[1]))
    ]
    return sum(int(rate * seconds) + 1 - len(numbers) for numbers in arrived)


def _epoch(machine: Machine, other: Machine) -> int:
    assert machine.agent is not None
    status: Any = machine.agent.status(machine.world.now)
    (found,) = [peer["psk"]["epoch"] for peer in status["peers"] if peer["name"] == other.name]
    return int(found or 0)


def _is_keyed(a: Machine, b: Machine, epoch: int = 1) -> bool:
    """Whether both show the same proved key, from `epoch` on, and both devices have it."""
    if b.key not in a.device.peers or a.key not in b.device.peers:
        return False
    psk = a.device.peers[b.key].psk
    return psk is not None and psk == b.device.peers[a.key].psk and _epoch(a, b) == _epoch(b, a) >= epoch


@pytest.mark.parametrize("seed", SEEDS)
def test_an_edge_without_udp_attaches_over_tcp_and_reaches_every_other(seed: int) -> None:
    world, hubs, (blocked, open_, another) = _tree(
        seed, kinds=(Nat.UDP_BLOCKED, Nat.PORT_RESTRICTED, Nat.UDP_BLOCKED)
    )
    assert blocked.agent is not None
    pairs = blocked.agent.paths(world.now).pairs
    assert pairs.keys() == {hub.key for hub in hubs}
    home = next(hub for hub in hubs if hub.name == blocked.home)
    assert pairs[home.key].path is PathKind.RELAYED and pairs[home.key].carried
    for a, b in ((blocked, open_), (blocked, another)):
        assert _lost(a, b, seconds=5.0) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_carried_edge_leaves_a_dead_hub_within_three_seconds(seed: int) -> None:
    world, hubs, (blocked, other) = _tree(seed, hubs=3)
    blocked.stream(other, rate=20.0, seconds=60.0)
    world.run(world.random.uniform(4.5, 5.5))
    home = next(hub for hub in hubs if hub.name == blocked.home)
    home.switch_off()
    world.run(0.2)  # what it had sent on
    assert other.time_to(blocked, within=10.0) < 2.8
    assert blocked.home != home.name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_carrier_that_dies_leads_a_carried_edge_back_within_two_seconds(seed: int) -> None:
    world, hubs, (blocked, other) = _tree(seed, hubs=1)
    for machine in (blocked, hubs[0]):
        machine.carrier.kill()
        world.run(0.1)
        assert other.time_to(blocked, within=5.0) < 2.0
        world.run(20.0)


@pytest.mark.parametrize("mode", [PostQuantumMode.PREFERRED, PostQuantumMode.REQUIRED])
def test_edges_have_keys_with_their_hubs_and_their_rotation_loses_nothing(mode: PostQuantumMode) -> None:
    world, hubs, edges = _tree(3, mode=mode, interval=300.0)
    pairs = [(edge, hub) for edge in edges for hub in hubs] + [(hubs[0], hubs[1])]
    world.until(lambda: all(_is_keyed(a, b) for a, b in pairs), within=400.0)
    before = min(_epoch(a, b) for a, b in pairs)
    assert _lost(*edges, seconds=700.0, rate=2.0) == 0
    assert all(_is_keyed(a, b, before + 1) for a, b in pairs)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_keyed_and_carried_edge_leaves_a_dead_hub_within_three_seconds(seed: int) -> None:
    world, hubs, (blocked, other) = _tree(seed, hubs=3, mode=PostQuantumMode.REQUIRED)
    pairs = [(edge, hub) for edge in (blocked, other) for hub in hubs]
    world.until(lambda: all(_is_keyed(a, b) for a, b in pairs), within=60.0)
    other.stream(blocked, rate=20.0, seconds=60.0)
    world.run(world.random.uniform(4.5, 5.5))
    home = next(hub for hub in hubs if hub.name == blocked.home)
    home.switch_off()
    world.run(0.2)
    assert other.time_to(blocked, within=10.0) < 2.8
