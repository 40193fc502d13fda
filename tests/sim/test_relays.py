"""Hubs: traffic through them at once, the direct path as soon as there is one, and back when it dies."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from itertools import pairwise

import pytest
from lab.nat import Nat
from scope_agent.inputs import Socket
from scope_agent.paths.view import PairView

from scope.model import Endpoint, IPAddress, PathKind, PublicKey, Role
from scope.wire import AskRelay, CallMeMaybe, RefusedBecause
from tests.sim.relay import FIRST_PORT, LAST_PORT
from tests.sim.world import Machine, World

SEEDS = range(1, 4)
QUIET = 100.0  # what was warm has turned cold


def _view(a: Machine, b: Machine) -> PairView:
    assert a.agent is not None
    return a.agent.paths(a.world.now).pairs[b.key]


def _hubs(world: World, count: int) -> list[Machine]:
    """Hubs that are there already, each farther away than the one before."""
    hubs = [world.hub(delay=0.005 + 0.01 * number) for number in range(count)]
    world.run(5.0)
    return hubs


def _relayed(seed: int, *, hubs: int = 2) -> tuple[World, list[Machine], Machine, Machine]:
    """Two peers that only hubs connect, relayed over the nearest one, and long calm."""
    world = World(seed)
    found = _hubs(world, hubs)
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    world.until(lambda: world.is_relayed(a, b), within=5.0)
    world.run(30.0)
    assert _view(a, b).hub == _view(b, a).hub == found[0].name
    return world, found, a, b


def _direct(seed: int, *, hubs: int = 1) -> tuple[World, list[Machine], Machine, Machine]:
    """Two peers that were relayed at first, direct and long calm, their grants cold."""
    world = World(seed)
    found = _hubs(world, hubs)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    world.run(QUIET)
    return world, found, a, b


def _talk(a: Machine, b: Machine, *, rate: float = 20.0, seconds: float = 60.0) -> None:
    a.stream(b, rate=rate, seconds=seconds, answer=False)
    b.stream(a, rate=rate, seconds=seconds, answer=False)


def _both_hear(world: World, a: Machine, b: Machine, *, within: float) -> float:
    """Seconds until a packet sent from a tenth of a second on arrived on both sides."""
    world.run(0.1)
    marks = len(a.received), len(b.received)
    return 0.1 + world.until(lambda: len(a.received) > marks[0] and len(b.received) > marks[1], within=within)


def _heard_all(machine: Machine, count: int) -> bool:
    """Whether all of so many numbered packets arrived, each once."""
    numbers = [packet.number for _, _, packet in machine.received]
    return len(numbers) >= count and sorted(numbers) == list(range(len(numbers)))


def _cut(world: World, a: Machine, b: Machine, *, cut: bool = True) -> None:
    for link in world.network.link(a.site, b.site):
        link.cut = cut


def _port_of(hub: Machine) -> Endpoint:
    return Endpoint(hub.addresses[0], FIRST_PORT + 200)


def _knocks(machine: Machine, hub: Machine) -> list[float]:
    """When the hub hears knocks of the machine, from now on."""
    heard: list[float] = []
    arrived = hub.relay.knocked

    def note(peer: PublicKey) -> None:
        if peer == machine.key:
            heard.append(machine.world.now)
        arrived(peer)

    hub.relay.knocked = note
    return heard


# --- hub first -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_two_symmetric_nats_are_relayed_within_a_second_of_joining_and_told_why(seed: int) -> None:
    world = World(seed)
    (hub,) = _hubs(world, 1)
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


def test_a_relayed_pair_is_published_with_its_hub_and_its_reason() -> None:
    world, (hub, _), a, b = _relayed(1)
    world.run(90.0)
    report = world.registry.peer(a).report
    assert report is not None
    (link,) = (link for link in report.links if link.peer == b.name)
    assert (link.path, link.hub, link.user_space) == (PathKind.RELAYED, hub.name, False)
    assert link.reason == "symmetric NAT on both sides"
    assert (report.direct, report.relayed, report.unreachable) == (2, 1, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_ipv4_only_and_an_ipv6_only_peer_are_relayed_in_user_space(seed: int) -> None:
    world = World(seed)
    world.hub(ipv6=True)
    world.run(5.0)
    a, b = world.peer(Nat.NONE), world.peer(Nat.IPV6_ONLY)
    assert world.until(lambda: world.is_relayed(a, b), within=5.0) < 1.0
    world.run(1.0)
    assert _view(a, b).user_space and _view(b, a).user_space


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pair_that_can_be_direct_is_so_as_soon_with_a_hub_as_without_one(seed: int) -> None:
    world = World(seed)
    _hubs(world, 2)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    assert world.until(lambda: world.is_direct(a, b), within=5.0) < 1.0
    world.run(10.0)
    assert world.is_direct(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pair_whose_direct_way_is_cut_is_relayed_first_and_direct_once_it_heals(seed: int) -> None:
    world = World(seed)
    _hubs(world, 1)
    a, b = world.machine(world.site(Nat.PORT_RESTRICTED)), world.machine(world.site(Nat.PORT_RESTRICTED))
    _cut(world, a, b)
    a.join()
    b.join()
    assert world.until(lambda: world.is_relayed(a, b), within=5.0) < 1.0
    _talk(a, b, seconds=100.0)
    world.run(10.0)
    _cut(world, a, b, cut=False)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    world.run(95.0)
    assert _heard_all(a, 2000) and _heard_all(b, 2000)


def test_a_mesh_without_hubs_asks_nobody_and_knocks_nowhere() -> None:
    world = World(1)
    a = world.peer(Nat.SYMMETRIC)
    world.peer(Nat.SYMMETRIC)
    asked: list[object] = []
    a.on_send = lambda leg, message: asked.append(message) if isinstance(message, AskRelay) else None
    world.run(100.0)
    assert not asked and a.agent is not None
    assert not any(pair.hub for pair in a.agent.paths(world.now).pairs.values())


# --- deaths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dead_direct_path_is_back_on_the_relay_within_three_seconds_and_direct_when_healed(
    seed: int,
) -> None:
    world, _, a, b = _direct(seed)
    _talk(a, b)
    world.run(2.0)
    _cut(world, a, b)
    assert _both_hear(world, a, b, within=8.0) < 3.0
    world.until(lambda: world.is_relayed(a, b), within=1.0)
    world.run(20.0)
    _cut(world, a, b, cut=False)
    assert world.until(lambda: world.is_direct(a, b), within=5.0) < 2.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("speaker", [0, 1])
def test_a_path_that_died_while_only_one_side_speaks_is_back_within_three_seconds(
    seed: int, speaker: int
) -> None:
    world, _, *pair = _direct(seed)
    world.registry.go_down()  # nobody else carries a call
    world.run(5.0)
    _cut(world, *pair)
    pair[speaker].stream(pair[1 - speaker], rate=20.0, seconds=30.0)
    assert _both_hear(world, *pair, within=8.0) < 3.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_data_path_that_is_dead_while_probes_pass_is_left_for_the_relay(seed: int) -> None:
    world, _, a, b = _direct(seed)
    _talk(a, b)
    world.run(2.0)
    for link in world.network.link(a.site, b.site):
        link.drops_data = True
    assert _both_hear(world, a, b, within=15.0) < 8.0
    assert world.is_relayed(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dead_hub_is_left_for_the_second_within_three_seconds(seed: int) -> None:
    world, (first, second), a, b = _relayed(seed)
    _talk(a, b)
    world.run(2.0)
    first.switch_off()
    assert _both_hear(world, a, b, within=8.0) < 3.0
    world.until(lambda: world.is_relayed(a, b), within=1.0)
    assert _view(a, b).hub == _view(b, a).hub == second.name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hub_that_died_while_nobody_spoke_is_left_within_three_seconds_of_the_first_packet(
    seed: int,
) -> None:
    world, (first, _), a, b = _relayed(seed)
    world.run(50.0)
    first.switch_off()
    world.run(100.0)
    a.stream(b, rate=2.0, seconds=30.0)
    assert _both_hear(world, a, b, within=8.0) < 3.0


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_moves_and_nothing_is_lost_when_a_hubs_agent_dies(seed: int) -> None:
    world, (first, _), a, b = _relayed(seed)
    _talk(a, b, rate=5.0, seconds=400.0)
    changes = a.device.endpoint_changes + b.device.endpoint_changes
    first.crash()
    world.run(405.0)
    assert _heard_all(a, 2000) and _heard_all(b, 2000)
    assert a.device.endpoint_changes + b.device.endpoint_changes == changes
    assert _view(a, b).hub == first.name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_pair_goes_to_another_hub_while_ones_agent_is_dead(seed: int) -> None:
    world = World(seed)
    first, second = _hubs(world, 2)
    first.crash()
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    assert world.until(lambda: world.is_relayed(a, b), within=8.0) < 3.0
    assert _view(a, b).hub == second.name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hub_that_comes_back_relays_again(seed: int) -> None:
    world = World(seed)
    (hub,) = _hubs(world, 1)
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    world.until(lambda: world.is_relayed(a, b), within=5.0)
    _talk(a, b, rate=5.0, seconds=400.0)
    world.run(5.0)
    hub.switch_off()
    world.run(200.0)
    assert not world.is_relayed(a, b)
    hub.switch_on()
    # WireGuard's session is over by then, and it tries a new one every 5 s.
    assert world.until(lambda: world.is_relayed(a, b), within=60.0) < 25.0


# --- changes under traffic -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_from_relay_to_direct_under_a_thousand_packets_a_second_loses_none(seed: int) -> None:
    world = World(seed)
    hubs = _hubs(world, 1)
    a, b = world.machine(world.site(Nat.PORT_RESTRICTED)), world.machine(world.site(Nat.PORT_RESTRICTED))
    _cut(world, a, b)
    a.join()
    b.join()
    world.until(lambda: world.is_relayed(a, b), within=5.0)
    world.run(20.0)
    _talk(a, b, rate=1000.0, seconds=6.0)
    world.run(1.0)
    _cut(world, a, b, cut=False)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    world.run(6.5)
    assert world.is_direct(a, b)
    assert _heard_all(a, 6000) and _heard_all(b, 6000)
    assert hubs[0].relay.passed >= 1000


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pair_goes_over_from_a_hub_that_is_no_hub_any_more_and_loses_nothing(seed: int) -> None:
    world, (first, second), a, b = _relayed(seed)
    _talk(a, b, rate=200.0, seconds=20.0)
    world.run(1.0)
    peer = world.registry.peer(first)
    world.registry.assign(first, replace(peer.assignment, role=Role.EDGE))
    world.run(20.0)
    assert _view(a, b).hub == _view(b, a).hub == second.name
    assert _heard_all(a, 4000) and _heard_all(b, 4000)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_much_nearer_hub_that_appears_is_taken_without_loss(seed: int) -> None:
    world = World(seed)
    far = world.hub(delay=0.1)
    world.run(5.0)
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    world.until(lambda: world.is_relayed(a, b), within=5.0)
    assert _view(a, b).hub == far.name
    _talk(a, b, rate=50.0, seconds=60.0)
    near = world.hub(delay=0.005)
    world.run(65.0)
    assert _view(a, b).hub == _view(b, a).hub == near.name
    assert _heard_all(a, 3000) and _heard_all(b, 3000)


# --- networks that move ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 5])
def test_two_ends_agree_when_a_direct_route_answers_right_after_a_relay(seed: int) -> None:
    world = World(seed)
    world.hub(delay=0.002)
    world.run(5.0)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.ADDRESS_RESTRICTED)
    world.until(lambda: world.is_direct(a, b), within=20.0)
    _talk(a, b, seconds=100.0)
    world.run(3.0)
    for kind in (Nat.FULL_CONE, Nat.PORT_RESTRICTED, Nat.FULL_CONE):
        b.move(world.site(kind))
        world.run(8.0)
        assert world.is_direct(a, b)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mover", [0, 1])
def test_a_relayed_peer_that_roams_is_followed_within_a_second(seed: int, mover: int) -> None:
    world, _, *pair = _relayed(seed)
    _talk(*pair)
    world.run(2.0)
    pair[mover].move(world.site(Nat.SYMMETRIC))
    assert _both_hear(world, *pair, within=5.0) < 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_nat_that_rebinds_under_a_relayed_pair_is_followed_with_the_next_knock(seed: int) -> None:
    world, _, a, b = _relayed(seed)
    _talk(a, b)
    world.run(2.0)
    for box in a.site.boxes:
        box.rebind()
    assert _both_hear(world, a, b, within=8.0) < 3.0


def test_an_idle_relayed_pair_carries_its_first_packet_after_an_hour() -> None:
    world, _, a, b = _relayed(3)
    world.run(3600.0)
    before = len(b.received)
    a.ping(b)
    assert world.until(lambda: len(b.received) > before, within=1.0) < 0.1


# --- without the registry, and over restarts -------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_relayed_pair_outlives_the_registry_and_its_own_agents(seed: int) -> None:
    world, _, a, b = _relayed(seed)
    world.registry.go_down()
    _talk(a, b, seconds=60.0)
    changes = a.device.endpoint_changes + b.device.endpoint_changes
    world.run(10.0)
    a.restart()
    world.run(10.0)
    b.restart()
    world.run(50.0)
    assert _heard_all(a, 1200) and _heard_all(b, 1200)
    assert a.device.endpoint_changes + b.device.endpoint_changes == changes
    assert world.is_relayed(a, b)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sees_device_first", [False, True])
def test_grants_from_the_disk_relay_at_once_with_no_registry_and_a_dead_agent_on_the_hub(
    seed: int, sees_device_first: bool
) -> None:
    world, (first, second), a, b = _relayed(seed)
    world.registry.go_down()
    for machine in (first, second, a, b):
        machine.crash()
    for machine in (a, b):
        machine.device.delete()
    world.run(300.0)
    for machine in (a, b):
        machine.sees_device_first = sees_device_first
        machine.start()
    assert world.until(lambda: world.is_relayed(a, b), within=5.0) < 1.5


# --- what it costs, and what it must not do --------------------------------------------------------------


def test_a_stable_direct_pair_neither_knocks_nor_asks() -> None:
    world, (hub,), a, b = _direct(1)
    heard = _knocks(a, hub) + _knocks(b, hub)
    asked: list[object] = []
    a.on_send = lambda leg, message: asked.append(message) if isinstance(message, AskRelay) else None
    world.run(4000.0)
    assert not heard and not asked


def test_a_relayed_pair_knocks_every_twenty_seconds_and_asks_once_an_hour() -> None:
    world, (hub, _), a, b = _relayed(1)
    heard = _knocks(a, hub)
    asked: list[object] = []

    def note(leg: object, message: object) -> None:
        if isinstance(message, AskRelay):
            asked.append(message)

    a.on_send = b.on_send = note
    world.run(4000.0)
    gaps = [later - earlier for earlier, later in pairwise(heard)]
    assert heard and max(gaps) <= 20.1 and len(heard) < 4000 / 17
    assert 2 <= len(asked) <= 2 * 2  # two hubs, once; either side renews for both


def test_nobody_takes_a_hubs_port_for_where_a_peer_is() -> None:
    world, _, a, b = _relayed(2)
    world.peer(Nat.PORT_RESTRICTED)
    world.run(100.0)
    for machine in (a, b):
        report = world.registry.peer(machine).report
        assert report is not None
        told = [c.endpoint for c in report.endpoints] + [link.observed for link in report.links]
        assert not any(e is not None and FIRST_PORT <= e.port <= LAST_PORT for e in told)
        assert machine.disk.last_good.get(b.key if machine is a else a.key) is None


def test_a_hub_whose_ports_a_peer_publishes_as_its_own_is_not_pinged_there() -> None:
    world = World(4)
    (hub,) = _hubs(world, 1)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    claim = replace(world.registry.peer(b).spec, endpoints=(_port_of(hub),))
    world.registry.change_peer(b, claim)
    to: set[object] = set()
    a.on_send = lambda leg, message: to.add(leg.endpoint) if isinstance(leg, Socket) else None
    world.run(30.0)
    assert to and _port_of(hub) not in to


def test_a_peer_that_speaks_from_a_hubs_port_without_a_grant_is_not_taken_to_be_there() -> None:
    world, hubs, a, b = _relayed(8)
    for hub in hubs:
        hub.relay.refuses = RefusedBecause.NO_HUB
    b.crash()
    b.disk = replace(b.disk, grants=())
    b.start()
    b.on_send = lambda leg, message: to.add(leg.endpoint.port) if isinstance(leg, Socket) else None
    to: set[int] = set()
    _talk(a, b)
    world.run(30.0)
    assert to and not any(FIRST_PORT <= port <= LAST_PORT for port in to)
    assert _view(b, a).path is PathKind.NONE


def test_openers_never_go_to_a_hub() -> None:
    world = World(5)
    _hubs(world, 1)
    a, b = world.machine(world.site(Nat.SYMMETRIC)), world.machine(world.site(Nat.SYMMETRIC))
    short: list[object] = []
    a.on_send = lambda leg, message: (
        short.append(leg)
        if isinstance(leg, Socket) and leg.ttl is not None and FIRST_PORT <= leg.endpoint.port <= LAST_PORT
        else None
    )
    a.join()
    b.join()
    world.run(30.0)
    assert not short and world.is_relayed(a, b)


@pytest.mark.parametrize("reason", list(RefusedBecause))
def test_a_hub_that_refuses_is_passed_over(reason: RefusedBecause) -> None:
    world = World(6)
    first, second = _hubs(world, 2)
    first.relay.refuses = reason
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    assert world.until(lambda: world.is_relayed(a, b), within=5.0) < 2.0
    assert _view(a, b).hub == second.name


def test_a_relayed_pair_calls_through_its_hub() -> None:
    world, _, a, b = _relayed(7)
    legs: list[object] = []
    a.on_send = lambda leg, message: legs.append(leg) if isinstance(message, CallMeMaybe) else None
    world.run(700.0)
    endpoint = _view(a, b).endpoint
    assert endpoint is not None and Socket(endpoint) in legs


# --- where hubs are --------------------------------------------------------------------------------------


def _afar(world: World, a: Machine, b: Machine, seconds: float) -> None:
    """Have two machines be so much farther from each other, each way, than their sites are."""
    for link in world.network.link(a.site, b.site):
        link.delay = seconds


def test_each_pair_takes_the_hub_with_the_lowest_sum_of_latencies() -> None:
    world = World(1)
    east, west = world.hub(), world.hub()
    world.run(5.0)
    sites = {side: [world.site(Nat.SYMMETRIC) for _ in range(2)] for side in (east, west)}
    for near, far in ((east, west), (west, east)):
        for site in sites[near]:
            for link in world.network.link(site, far.site):
                link.delay = 0.1
    # One that is a little nearer to the west, so that its pairs with either side differ.
    between = world.site(Nat.SYMMETRIC)
    for link in world.network.link(between, east.site):
        link.delay = 0.03
    peers = {side: [world.machine(site) for site in found] for side, found in sites.items()}
    middle = world.machine(between)
    for machine in (*peers[east], *peers[west], middle):
        machine.join()
    expected = {
        (peers[east][0], peers[east][1]): east,
        (peers[west][0], peers[west][1]): west,
        (peers[east][0], middle): east,
        (peers[west][0], middle): west,
        (peers[east][1], peers[west][1]): None,  # as far by either
    }
    for a, b in expected:
        _talk(a, b, rate=5.0)
    world.run(30.0)
    for (a, b), hub in expected.items():
        assert _view(a, b).hub == _view(b, a).hub
        assert hub is None or _view(a, b).hub == hub.name
    assert all(
        _view(a, b).path is PathKind.RELAYED for a in world.members() for b in world.members()
        if a is not b and not {a, b} & {east, west}
    )  # fmt: skip


def test_a_pair_leaves_its_hub_for_one_that_is_clearly_nearer_and_for_no_other() -> None:
    world, (first, second), a, b = _relayed(1)
    _talk(a, b, rate=50.0, seconds=120.0)
    moves: list[str] = []

    def note() -> None:
        hub = _view(a, b).hub
        if not moves or moves[-1] != hub:
            moves.append(hub)

    for step in range(600):  # their distances wobble about each other by a few milliseconds
        for hub, shift in ((first, 0.012), (second, 0.0)):
            _afar(world, a, hub, shift + 0.002 * (step // 10 % 2 == (hub is first)))
        world.run(0.1)
        note()
    assert moves == [first.name]
    _afar(world, a, first, 0.1)
    for _ in range(300):
        world.run(0.1)
        note()
    assert moves == [first.name, second.name]
    assert _view(b, a).hub == second.name
    assert _heard_all(a, 4000) and _heard_all(b, 4000)


class _PortForward:
    """A router that forwards some ports to one machine, and lets that one out from these alone."""

    def __init__(self, public: IPAddress, inner: IPAddress, ports: Container[int]) -> None:
        self._public, self._inner, self._ports = public, inner, ports

    def outbound(self, inner: Endpoint, to: Endpoint, now: float) -> Endpoint | None:
        return Endpoint(self._public, inner.port) if inner.port in self._ports else None

    def inbound(self, outer: Endpoint, source: Endpoint, now: float) -> Endpoint | None:
        return Endpoint(self._inner, outer.port) if outer.port in self._ports else None

    def reboot(self) -> None:
        pass

    def rebind(self) -> None:
        pass


def test_a_hub_whose_ports_are_forwarded_to_it_relays() -> None:
    world = World(1)
    site = world.site(Nat.PORT_RESTRICTED)
    hub = world.machine(site, port=51820)
    ports = frozenset({51820, *range(FIRST_PORT, LAST_PORT + 1)})
    site.boxes[:] = [_PortForward(site.public, hub.addresses[0], ports)]
    world.registry.enrol(hub, role=Role.HUB)
    spec = replace(world.registry.peer(hub).spec, endpoints=(Endpoint(site.public, 51820),))
    world.registry.change_peer(hub, spec)
    hub.start()
    world.run(5.0)
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    world.until(lambda: world.is_relayed(a, b), within=5.0)
    assert _view(a, b).hub == _view(b, a).hub == hub.name
    _talk(a, b, rate=20.0, seconds=20.0)
    world.run(25.0)
    assert _heard_all(a, 400) and _heard_all(b, 400)
