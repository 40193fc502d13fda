"""The ladder's bounds, each read from the ScopeMesh's timers: with the defaults, and all of them halved."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from lab.nat import Nat
from scope_agent.inputs import Courier, Socket
from scope_agent.paths.view import PairView

from scope.model import Endpoint, Family, PathKind, Timers
from scope.wire import CallMeMaybe, Ping
from tests.sim.world import Machine, World

DEFAULTS = Timers()
HALVED = Timers(probe_interval=1.0, address_fallback=4.0, report=8.0, connect_back=10.0, hub_fallback=30.0)
BOTH = pytest.mark.parametrize("timers", [DEFAULTS, HALVED], ids=["defaults", "halved"])


def _view(machine: Machine, other: Machine) -> PairView:
    assert machine.agent is not None
    return machine.agent.paths(machine.world.now).pairs[other.key]


def _apart(timers: Timers, *, ipv6: bool = False) -> tuple[World, Machine, Machine, Machine]:
    """Two peers that cannot reach each other, and one that reaches both."""
    world = World(11, timers=timers)
    sites = [world.site(Nat.NONE, ipv6=ipv6) for _ in range(3)]
    for link in world.network.link(sites[0], sites[1]):
        link.cut = True
    a, b, c = (world.machine(site) for site in sites)
    for machine in (a, b, c):
        machine.join()
    return world, a, b, c


@BOTH
def test_a_peer_that_does_not_answer_is_pinged_at_the_probe_interval(timers: Timers) -> None:
    world, a, b, _ = _apart(timers)
    world.run(3.0)
    pings: list[float] = []
    a.on_send = lambda leg, message: (
        pings.append(world.now)
        if isinstance(message, Ping) and isinstance(leg, Socket) and leg.endpoint.address in b.addresses
        else None
    )
    world.run(timers.address_fallback - 3.0 + timers.probe_interval * 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(pings)]
    assert gaps and max(gaps) <= timers.probe_interval + 0.01


@BOTH
def test_the_other_family_is_in_use_before_the_fallback_bound(timers: Timers) -> None:
    world = World(12, timers=timers)
    a, b = (world.machine(world.site(Nat.NONE, ipv6=True)) for _ in range(2))
    for link in world.network.link(a.site, b.site, Family.IPV6):
        link.cut = True
    a.join()
    b.join()
    took = world.until(lambda: world.is_direct(a, b), within=timers.address_fallback)
    assert took < 1.5  # nothing waits for a bound when it knows the answer
    world.run(timers.address_fallback)
    assert {e.family for e in (a.endpoint_of(b), b.endpoint_of(a)) if e is not None} == {Family.IPV4}


@BOTH
def test_the_preferred_family_is_no_longer_searched_after_the_fallback_bound(timers: Timers) -> None:
    world = World(13, timers=timers)
    a, b = (world.machine(world.site(Nat.NONE, ipv6=True)) for _ in range(2))
    for link in world.network.link(a.site, b.site, Family.IPV6):
        link.cut = True
    a.join()
    b.join()
    world.run(timers.address_fallback + 3.0)
    tried: list[Endpoint] = []
    a.on_send = lambda leg, message: (
        tried.append(leg.endpoint)
        if isinstance(message, Ping) and isinstance(leg, Socket) and leg.endpoint.address in b.addresses
        else None
    )
    world.run(20.0)
    assert not [endpoint for endpoint in tried if endpoint.family is Family.IPV6]


@BOTH
def test_endpoint_and_latency_of_a_new_peer_stand_in_every_report_before_the_bound(timers: Timers) -> None:
    world = World(14, timers=timers)
    old = [world.peer(Nat.PORT_RESTRICTED) for _ in range(3)]
    world.run(200.0)  # a calm mesh writes seldom
    new = world.peer(Nat.PORT_RESTRICTED)
    world.run(timers.report)
    for machine in old:
        report = world.registry.peer(machine).report
        assert report is not None
        link = next(link for link in report.links if link.peer == new.name)
        assert link.path is PathKind.DIRECT and link.endpoint == machine.endpoint_of(new)
        assert link.latency == pytest.approx(0.04, abs=0.005)
    report = world.registry.peer(new).report
    assert report is not None and {link.peer for link in report.links} == {m.name for m in old}


@BOTH
def test_a_fall_back_to_the_other_family_stands_in_the_report_before_the_bound(timers: Timers) -> None:
    world = World(15, timers=timers)
    a, b = (world.machine(world.site(Nat.NONE, ipv6=True)) for _ in range(2))
    for link in world.network.link(a.site, b.site):
        link.cut = True
    a.join()
    b.join()
    world.run(timers.address_fallback)
    for link in world.network.link(a.site, b.site, Family.IPV4):
        link.cut = False
    world.run(timers.report - timers.address_fallback)
    for machine in (a, b):
        report = world.registry.peer(machine).report
        assert report is not None and [link.path for link in report.links] == [PathKind.DIRECT]


@BOTH
def test_peers_that_heard_nothing_connect_back_and_call_at_the_bound(timers: Timers) -> None:
    world, a, b, _ = _apart(timers)
    calls: list[float] = []
    pings: list[float] = []

    def note(leg: object, message: object) -> None:
        if isinstance(message, CallMeMaybe):
            calls.append(world.now)
        elif isinstance(message, Ping) and isinstance(leg, Socket) and leg.endpoint.address in b.addresses:
            pings.append(world.now)

    a.on_send = note
    world.run(timers.connect_back - 1.0)
    calls.clear()
    pings.clear()
    world.run(2.0)
    assert calls
    assert len(pings) > 4  # a punch, not the interval


@BOTH
def test_a_pair_without_a_path_is_declared_unreachable_with_its_reason_at_the_last_bound(
    timers: Timers,
) -> None:
    world, a, b, _ = _apart(timers)
    world.run(timers.hub_fallback - 1.0)
    assert not _view(a, b).declared
    world.run(2.0)
    for here, there in ((a, b), (b, a)):
        assert _view(here, there).declared
        assert _view(here, there).path is PathKind.NONE
        assert "no answer" in _view(here, there).reason
    world.run(timers.report)
    report = world.registry.peer(a).report
    assert report is not None and report.unreachable == 1
    assert next(link for link in report.links if link.peer == b.name).reason


def test_a_declared_pair_is_tried_again_after_a_minute_and_then_ever_more_seldom() -> None:
    world, a, b, _ = _apart(DEFAULTS)
    world.run(62.0)
    calls: list[float] = []
    a.on_send = lambda leg, message: (
        calls.append(world.now)
        if isinstance(message, Ping) and isinstance(leg, Socket) and leg.endpoint.address in b.addresses
        else None
    )
    world.run(4000.0)
    bursts = [t for t, before in zip(calls, [0.0, *calls], strict=False) if t - before > 30.0]
    gaps = [later - earlier for earlier, later in itertools.pairwise(bursts)]
    assert 45.0 < bursts[0] - 60.0 < 75.0
    assert all(later > earlier * 0.8 for earlier, later in itertools.pairwise(gaps))
    assert 500.0 < gaps[-1] < 700.0


def test_a_declared_pair_is_direct_at_once_when_the_network_changes() -> None:
    world, a, b, _ = _apart(DEFAULTS)
    world.run(100.0)
    for link in world.network.link(a.site, b.site):
        link.cut = False
    a.move(world.site(Nat.NONE))
    assert world.until(lambda: world.is_direct(a, b), within=10.0) < 1.0


def test_without_a_reflector_the_call_goes_over_the_gateway() -> None:
    world = World(16)
    world.registry.reflecting = False
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.NONE)
    legs: list[object] = []
    a.on_send = lambda leg, message: legs.append(leg) if isinstance(message, CallMeMaybe) else None
    world.until(lambda: world.is_direct(a, b), within=5.0)
    assert legs and all(isinstance(leg, Courier) for leg in legs)


def test_changed_timers_hold_from_when_the_mesh_says_so() -> None:
    world, a, b, _ = _apart(DEFAULTS)
    world.run(5.0)
    world.registry.change_mesh(lambda spec: replace(spec, timers=HALVED))
    world.run(HALVED.hub_fallback - 3.0)
    assert _view(a, b).declared
