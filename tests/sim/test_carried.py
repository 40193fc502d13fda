"""Peers whose network lets no UDP out: carried over TCP to hubs, and from these to everybody."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.nat import Nat
from scope_agent.paths.view import PairView

from scope.carrier import is_carried
from scope.model import PathKind
from tests.sim.nat import FlowNat
from tests.sim.world import Machine, World

SEEDS = range(1, 4)


def _view(a: Machine, b: Machine) -> PairView:
    assert a.agent is not None
    return a.agent.paths(a.world.now).pairs[b.key]


def _blocked(seed: int, *, hubs: int = 1) -> tuple[World, list[Machine], Machine, Machine]:
    """Hubs, an ordinary peer, and one without UDP that is carried and reaches it."""
    world = World(seed)
    found = [world.hub(delay=0.005 + 0.01 * number) for number in range(hubs)]
    other = world.peer(Nat.PORT_RESTRICTED)
    world.run(20.0)
    blocked = world.peer(Nat.UDP_BLOCKED)
    world.until(lambda: world.is_relayed(blocked, other), within=10.0)
    world.run(10.0)
    return world, found, other, blocked


def _is_carried(machine: Machine) -> bool:
    return machine.carrier.carrier is not None


def _unblock(world: World, machine: Machine) -> None:
    """The network lets UDP out from now on."""
    machine.site.boxes[:] = [FlowNat(machine.site.public, random=world.random.random)]


def _block(machine: Machine) -> None:
    for link in machine.world.network.sites:
        for each in machine.world.network.link(machine.site, link):
            each.cut = True


def _lost(a: Machine, b: Machine, *, rate: float, seconds: float) -> int:
    """How many of packets both ways are lost, sent from now on for so long."""
    marks = len(a.received), len(b.received)
    for here, there in ((a, b), (b, a)):
        here.stream(there, rate=rate, seconds=seconds + 0.5 / rate, answer=False)
    a.world.run(seconds + 2.0)
    sent = int(rate * seconds) + 1
    return 2 * sent - (len(a.received) - marks[0]) - (len(b.received) - marks[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_peer_without_udp_reaches_its_hub_and_everybody_else_within_seconds(seed: int) -> None:
    world = World(seed)
    hub = world.hub()
    other = world.peer(Nat.PORT_RESTRICTED)
    world.run(20.0)
    blocked = world.peer(Nat.UDP_BLOCKED)
    world.until(lambda: world.is_relayed(blocked, hub), within=5.0)
    world.until(lambda: world.is_relayed(blocked, other), within=2.0)
    assert _lost(blocked, other, rate=20.0, seconds=5.0) == 0
    for here, there in ((blocked, other), (other, blocked), (blocked, hub), (hub, blocked)):
        view = _view(here, there)
        assert view.path is PathKind.RELAYED and view.carried and view.hub == hub.name
    assert _view(blocked, other).user_space


@pytest.mark.parametrize("seed", SEEDS)
def test_two_peers_without_udp_reach_each_other(seed: int) -> None:
    world, hubs, _, blocked = _blocked(seed, hubs=2)
    another = world.peer(Nat.UDP_BLOCKED)
    world.until(lambda: world.is_relayed(blocked, another), within=10.0)
    assert _lost(blocked, another, rate=20.0, seconds=5.0) == 0
    assert _view(blocked, another).hub in {hub.name for hub in hubs}


def test_two_peers_that_different_hubs_carry_reach_each_other() -> None:
    world = World(2)
    hubs = [world.hub() for _ in range(8)]
    world.run(20.0)
    blocked = [world.peer(Nat.UDP_BLOCKED) for _ in range(6)]
    pairs = [(a, b) for number, a in enumerate(blocked) for b in blocked[:number]]
    world.until(lambda: all(world.is_relayed(a, b) for a, b in pairs), within=20.0)
    carried_by = [
        {hub.key for hub in hubs if machine.carrier.is_connected_to(hub.key)} for machine in blocked
    ]
    assert len(set(map(frozenset, carried_by))) > 1, "the same hubs carry all of them: nothing is shown"
    assert max(map(len, carried_by)) <= 8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("who", ["blocked", "hub", "other"])
def test_nothing_is_lost_when_agents_start_anew(seed: int, who: str) -> None:
    world, (hub,), other, blocked = _blocked(seed)
    machine = {"blocked": blocked, "hub": hub, "other": other}[who]
    world.after(2.0, lambda: machine.restart(after=3.0))
    assert _lost(blocked, other, rate=20.0, seconds=30.0) == 0
    assert _view(blocked, hub).carried and world.is_relayed(blocked, other)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_carrier_that_dies_is_back_within_two_seconds(seed: int) -> None:
    world, (hub,), other, blocked = _blocked(seed)
    for machine in (blocked, hub):
        blocked.stream(other, rate=20.0, seconds=20.0, answer=False)
        world.run(2.0)
        machine.carrier.kill()
        world.run(0.1)
        mark = len(other.received)
        assert world.until(lambda mark=mark: len(other.received) > mark, within=5.0) < 2.0  # type: ignore[misc]
        world.run(20.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_carried_peer_leaves_a_hub_that_is_gone_for_another_one(seed: int) -> None:
    world, hubs, other, blocked = _blocked(seed, hubs=3)
    by_name = {hub.name: hub for hub in hubs}
    blocked.stream(other, rate=20.0, seconds=60.0)
    world.run(5.0)
    by_name[_view(blocked, other).hub].switch_off()
    world.run(0.1)
    mark = len(blocked.received)
    assert world.until(lambda: len(blocked.received) > mark, within=10.0) < 3.0


@pytest.mark.parametrize("seed", SEEDS)
def test_once_udp_is_let_out_better_paths_win_and_the_carrier_is_let_go(seed: int) -> None:
    world, (hub,), other, blocked = _blocked(seed)
    world.run(120.0)
    _unblock(world, blocked)
    blocked.stream(other, rate=20.0, seconds=200.0, answer=False)
    world.until(lambda: world.is_direct(blocked, other) and world.is_direct(blocked, hub), within=30.0)
    world.run(30.0)
    assert _is_carried(blocked), "it is let go before it is known whether UDP stays"
    world.run(60.0)
    assert not _is_carried(blocked)
    assert world.is_direct(blocked, other) and not _view(other, blocked).carried
    numbers = [packet.number for _, _, packet in other.received]
    assert numbers == list(range(len(numbers))), "packets are lost or out of order where a path got better"


def test_a_peer_whose_network_begins_to_block_udp_is_carried_within_seconds() -> None:
    world = World(1)
    hub = world.hub()
    other, blocked = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    world.until(lambda: world.is_direct(blocked, other), within=10.0)
    world.run(30.0)
    _block(blocked)
    blocked.stream(other, rate=20.0, seconds=60.0)
    world.run(1.0)
    mark = len(blocked.received)
    assert world.until(lambda: len(blocked.received) > mark, within=20.0) < 12.0
    assert _view(blocked, other).carried and _view(blocked, other).hub == hub.name


def test_nobody_is_carried_while_udp_answers() -> None:
    world = World(1)
    world.hub()
    peers = [world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)]
    world.run(300.0)
    world.registry.go_down()
    world.run(300.0)
    assert not any(map(_is_carried, peers))


def test_nobody_is_carried_where_hubs_are_to_listen_nowhere() -> None:
    world = World(1)
    world.registry.change_mesh(lambda spec: replace(spec, hubs=replace(spec.hubs, carrier_port=0)))
    hub = world.hub()
    blocked = world.peer(Nat.UDP_BLOCKED)
    world.run(30.0)
    assert not _is_carried(blocked) and hub.carrier.carrier is None
    report = world.registry.peer(hub).report
    assert report is not None and report.relay is not None and report.relay.carrier is None


def test_a_carried_link_is_published_without_the_endpoint_of_our_own_carrier() -> None:
    world, (hub,), other, blocked = _blocked(1)
    world.run(60.0)
    for machine, peer in ((blocked, other), (other, blocked), (blocked, hub), (hub, blocked)):
        report = world.registry.peer(machine).report
        assert report is not None
        (link,) = (link for link in report.links if link.peer == peer.name)
        assert (link.path, link.carried, link.hub) == (PathKind.RELAYED, True, hub.name)
        assert link.endpoint is None or not is_carried(link.endpoint)
        assert not any(is_carried(candidate.endpoint) for candidate in report.endpoints)
    assert _view(blocked, other).reason == "no reflector answers: is UDP blocked here?"
