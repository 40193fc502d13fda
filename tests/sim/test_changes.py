"""A pair that changes from one living path to another under traffic: few endpoint changes, and no loss."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from lab.nat import Nat

from scope.model import Endpoint, Family
from tests.sim.network import Link
from tests.sim.world import Machine, World

MOST_CHANGES = 4  # of one end's endpoint in one change of paths
MOST_OVERTAKEN = 8  # where packets overtake each other by more than a round trip: each may lead an end back
SEEDS = (1, 2)
# Round trips of the path that is left and the one that is taken, in seconds.
ROUND_TRIPS = ((0.02, 0.02), (0.1, 0.04), (0.04, 0.1))
JITTERS = (0.0, 0.03)  # seconds more at most, for each packet anew: they overtake each other
REACHED = 30.0  # a better path that heals is tried every 20 s


@dataclass(slots=True)
class Change:
    """A pair with two paths; the better one, cut at first, is IPv6 or a line between the private networks."""

    world: World
    a: Machine
    b: Machine
    better: list[Link]
    is_better_used: bool = False

    def run(self, *, rate: float, back: float, within: float = REACHED) -> tuple[int, int]:
        """Heal the better path under traffic, and wait until it is taken; how often each endpoint changed."""
        world, ends = self.world, (self.a, self.b)
        self.a.stream(self.b, rate=rate, seconds=2 * within, answer=False)
        if back:
            self.b.stream(self.a, rate=back, seconds=2 * within, answer=False)
        world.run(2.0)
        before = [end.device.endpoint_changes for end in ends]
        olds = self.endpoints()
        for link in self.better:
            link.cut = False
        world.until(
            lambda: all(now != old for now, old in zip(self.endpoints(), olds, strict=True)), within=within
        )
        world.run(3.0)
        after = [end.device.endpoint_changes for end in ends]
        world.run(2.0)
        assert after == [end.device.endpoint_changes for end in ends], "the ends still chase each other"
        assert all(now != old for now, old in zip(self.endpoints(), olds, strict=True))
        return after[0] - before[0], after[1] - before[1]

    def endpoints(self) -> tuple[Endpoint | None, Endpoint | None]:
        """Where each end sends to."""
        return self.a.endpoint_of(self.b), self.b.endpoint_of(self.a)

    def lost(self) -> list[int]:
        """Numbers of packets that did not arrive, though they had a second for it."""
        missing: list[int] = []
        for end in (self.a, self.b):
            numbers = {packet.number for at, _, packet in end.received}
            old = [packet.number for at, _, packet in end.received if at < self.world.now - 1.0]
            missing += set(range(max(old, default=0))) - numbers
        return missing


def prepare(seed: int, kind: str, *, left: float = 0.04, taken: float = 0.04, jitter: float = 0.0) -> Change:
    """A pair on the path that is to be left; `left` and `taken` are the paths' round trips."""
    world = World(seed)
    is_ipv6 = kind == "IPv6"
    a_site, b_site = (world.site(Nat.PORT_RESTRICTED, ipv6=is_ipv6, delay=0.0) for _ in range(2))
    worse = world.network.link(a_site, b_site, Family.IPV4)
    better = (
        world.network.link(a_site, b_site, Family.IPV6) if is_ipv6 else world.network.line(a_site, b_site)
    )
    for links, round_trip in ((worse, left), (better, taken)):
        for link in links:
            link.delay, link.jitter = round_trip / 2, jitter
    change = Change(world, world.machine(a_site), world.machine(b_site), better)
    change.a.join()
    change.b.join()
    if is_ipv6:
        for link in better:
            link.cut = True
    else:  # a private address of another site is tried again only where it has worked once
        world.until(lambda: _uses(change.a, change.b, b_site.public) is False, within=5.0)
        world.run(3.0)
        change.a.stream(change.b, rate=20.0, seconds=10.0)
        for link in better:
            link.cut = True
        world.until(lambda: _uses(change.a, change.b, b_site.public) is True, within=10.0)
        world.run(10.0)
    world.until(lambda: world.is_direct(change.a, change.b), within=5.0)
    for end in (change.a, change.b):
        end.received.clear()
    return change


def _uses(machine: Machine, other: Machine, address: object) -> bool | None:
    endpoint = machine.endpoint_of(other)
    return None if endpoint is None or not machine.reaches(other) else endpoint.address == address


@pytest.mark.parametrize("kind", ["IPv6", "line"])
@pytest.mark.parametrize("rate", [1.0, 20.0, 1000.0])
@pytest.mark.parametrize(("left", "taken"), ROUND_TRIPS)
@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_change_under_traffic_both_ways_takes_at_most_four_endpoint_changes_and_loses_nothing(
    seed: int, jitter: float, left: float, taken: float, rate: float, kind: str
) -> None:
    change = prepare(seed, kind, left=left, taken=taken, jitter=jitter)
    changes = change.run(rate=rate, back=rate)
    assert max(changes) <= (MOST_OVERTAKEN if jitter > min(left, taken) else MOST_CHANGES)
    assert change.lost() == []


@pytest.mark.parametrize("kind", ["IPv6", "line"])
@pytest.mark.parametrize("lower_sends", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_change_under_a_stream_one_way_takes_at_most_four_endpoint_changes(
    seed: int, lower_sends: bool, kind: str
) -> None:
    change = prepare(seed, kind, left=0.1)
    if (change.a.key < change.b.key) is not lower_sends:
        change.a, change.b = change.b, change.a
    assert max(change.run(rate=1000.0, back=0.0)) <= MOST_CHANGES
    assert change.lost() == []


@pytest.mark.parametrize("able", [0, 1])
def test_one_end_that_can_hold_its_endpoint_ends_the_chase_for_both(able: int) -> None:
    change = prepare(3, "IPv6", left=0.1, taken=0.04, jitter=0.03)
    (change.a, change.b)[able].can_hold = False
    changes = change.run(rate=1000.0, back=1000.0)
    # The other end is led to and fro while packets of both paths arrive: some 60 ms of them.
    assert min(changes) <= MOST_CHANGES < max(changes) < 150
    assert change.lost() == []


def test_where_no_end_can_hold_its_endpoint_nothing_is_lost_and_both_settle_when_traffic_pauses() -> None:
    change = prepare(8, "IPv6")
    world, ends = change.world, (change.a, change.b)
    for end, other in (ends, ends[::-1]):
        end.can_hold = False
        end.stream(other, rate=1000.0, seconds=12.0, answer=False)
    world.run(2.0)
    for link in change.better:
        link.cut = False
    world.run(12.0)
    assert change.lost() == []
    for end, other in (ends, ends[::-1]):
        end.stream(other, rate=2.0, seconds=60.0, answer=False)
    world.run(10.0)
    assert {endpoint.family for endpoint in change.endpoints() if endpoint} == {Family.IPV6}
    before = [end.device.endpoint_changes for end in ends]
    world.run(40.0)
    assert before == [end.device.endpoint_changes for end in ends]


@pytest.mark.parametrize("loss", [0.1, 0.3])
@pytest.mark.parametrize("seed", range(1, 6))
def test_offers_and_answers_that_get_lost_still_end_in_one_path(seed: int, loss: float) -> None:
    change = prepare(seed, "IPv6", left=0.1, taken=0.04, jitter=0.01)
    for link in change.better:
        link.loss = loss
    change.run(rate=200.0, back=200.0, within=4 * REACHED)


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_path_that_dies_while_it_is_offered_is_not_taken_for_long(seed: int) -> None:
    change = prepare(seed, "IPv6", left=0.1, taken=0.04)
    world = change.world
    change.a.stream(change.b, rate=100.0, seconds=60.0, answer=False)
    change.b.stream(change.a, rate=100.0, seconds=60.0, answer=False)
    world.run(2.0)
    for link in change.better:
        link.cut = False
    offering = min((change.a, change.b), key=lambda end: end.key)
    world.until(lambda: bool(offering.holds), within=REACHED)
    for link in change.better:
        link.cut = True
    world.run(4.0)
    assert {endpoint.family for endpoint in change.endpoints() if endpoint} == {Family.IPV4}
    marks = len(change.a.received), len(change.b.received)
    world.run(1.0)
    assert len(change.a.received) - marks[0] >= 95 and len(change.b.received) - marks[1] >= 95


def test_an_idle_pair_changes_without_a_hold() -> None:
    change = prepare(1, "IPv6")
    change.world.run(0.5)
    for link in change.better:
        link.cut = False
    change.world.run(30.0)
    assert {endpoint.family for endpoint in change.endpoints() if endpoint} == {Family.IPV6}
    assert not change.a.holds and not change.b.holds
