"""Birthday punching by whole agents: relayed first, direct by a guessed port, and back when that is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.nat import Nat
from scope_agent.inputs import Leg
from scope_agent.paths.birthday import LINGER, PORTS
from scope_agent.paths.guesses import GUESSES
from scope_agent.paths.view import PairView

from scope.model import Endpoint, IPAddress
from scope.registry.memory import Update
from scope.wire import Guess, Message
from tests.sim.nat import Box
from tests.sim.world import Machine, World

SEEDS = range(1, 4)
HIT_WITHIN = 30.0  # relayed for five seconds, then a try of five; the mapping's class takes some seconds too


def _view(a: Machine, b: Machine) -> PairView:
    assert a.agent is not None
    return a.agent.paths(a.world.now).pairs[b.key]


class _Deaf:
    """A NAT that no guess passes."""

    def __init__(self, whole: Box, guessers: set[IPAddress]) -> None:
        self._whole, self._guessers = whole, guessers

    def outbound(self, inner: Endpoint, to: Endpoint, now: float) -> Endpoint | None:
        return self._whole.outbound(inner, to, now)

    def inbound(self, outer: Endpoint, source: Endpoint, now: float) -> Endpoint | None:
        return None if source.address in self._guessers else self._whole.inbound(outer, source, now)

    def reboot(self) -> None:
        self._whole.reboot()

    def rebind(self) -> None:
        self._whole.rebind()


def _allow(world: World, *, birthday: bool = True) -> None:
    mesh = world.registry.mesh()
    world.registry._write(Update(replace(mesh, spec=replace(mesh.spec, birthday=birthday))))


def _world(
    seed: int, kinds: tuple[Nat, Nat] = (Nat.SYMMETRIC, Nat.PORT_RESTRICTED)
) -> tuple[World, Machine, Machine]:
    """A mesh that allows it, with a hub, and a pair that only the hub connects."""
    world = World(seed)
    _allow(world)
    world.hub()
    world.run(5.0)
    a, b = (world.peer(kind) for kind in kinds)
    world.until(lambda: world.is_relayed(a, b), within=5.0)
    return world, a, b


def _hit(seed: int) -> tuple[World, Machine, Machine]:
    world, a, b = _world(seed)
    world.until(lambda: world.is_direct(a, b), within=HIT_WITHIN)
    world.run(5.0)
    assert _view(a, b).birthday and _view(b, a).birthday
    return world, a, b


@pytest.mark.parametrize("seed", SEEDS)
def test_a_relayed_pair_of_one_symmetric_nat_becomes_direct_by_a_guess_and_loses_nothing(seed: int) -> None:
    world, a, b = _world(seed)
    a.stream(b, rate=50.0, seconds=40.0, answer=False)
    b.stream(a, rate=50.0, seconds=40.0, answer=False)
    world.until(lambda: world.is_direct(a, b), within=HIT_WITHIN)
    world.run(45.0)
    assert world.is_direct(a, b)
    assert [_view(*pair).birthday for pair in ((a, b), (b, a))] == [True, True]
    for one in (a, b):
        numbers = [packet.number for _, _, packet in one.received]
        assert sorted(set(numbers)) == list(range(max(numbers) + 1)) and len(numbers) > 1900


@pytest.mark.parametrize("killed", [0, 1])
def test_an_agent_that_dies_finds_the_guessed_path_again(killed: int) -> None:
    world, a, b = _hit(1)
    one = (a, b)[killed]
    a.stream(b, rate=50.0, seconds=20.0, answer=False)
    b.stream(a, rate=50.0, seconds=20.0, answer=False)
    world.run(2.0)
    rules = a.ports
    one.crash()
    world.run(5.0)
    one.start()
    world.run(20.0)
    assert world.is_direct(a, b) and a.ports == rules
    assert _view(a, b).birthday and _view(b, a).birthday
    for machine in (a, b):
        numbers = [packet.number for _, _, packet in machine.received]
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rebooted", [0, 1])
def test_a_nat_that_forgets_sends_the_pair_back_to_the_relay_and_another_port_is_guessed(
    seed: int, rebooted: int
) -> None:
    world, a, b = _hit(seed)
    a.stream(b, rate=20.0, seconds=120.0, answer=False)
    b.stream(a, rate=20.0, seconds=120.0, answer=False)
    world.run(2.0)
    rules = a.ports
    (a, b)[rebooted].site.boxes[0].rebind()
    world.run(0.2)
    world.until(lambda: world.is_relayed(a, b), within=3.0)
    assert not _view(a, b).birthday and not _view(b, a).birthday
    world.until(lambda: world.is_direct(a, b), within=100.0)
    world.until(lambda: len(a.ports.openings) == 1, within=2 * LINGER)
    assert a.ports != rules and world.is_direct(a, b)


def test_the_rules_go_once_the_path_is_left_for_good() -> None:
    world, a, b = _hit(1)
    b.switch_off()
    a.stream(b, rate=5.0, seconds=10.0, answer=False)
    world.run(10.0 + LINGER + 5.0)
    assert a.ports.is_empty


def test_the_rules_go_when_the_mesh_does_not_allow_it_any_more() -> None:
    world, a, b = _hit(1)
    _allow(world, birthday=False)
    world.until(lambda: a.ports.is_empty, within=5.0)
    a.stream(b, rate=20.0, seconds=30.0, answer=False)
    world.until(lambda: world.is_relayed(a, b), within=30.0)


def test_nothing_is_guessed_unless_the_mesh_allows_it() -> None:
    world = World(1)
    world.hub()
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.PORT_RESTRICTED)
    world.run(60.0)
    assert world.is_relayed(a, b) and "ApplyPorts" not in a.sent
    assert _view(a, b).reason == (
        "symmetric NAT here, and the other side's NAT lets in only whom it was sent to"
    )


def test_two_symmetric_nats_stay_relayed_and_are_told_why() -> None:
    world, a, b = _world(1, (Nat.SYMMETRIC, Nat.SYMMETRIC))
    guessed = _listen(a) + _listen(b)
    world.run(60.0)
    assert world.is_relayed(a, b) and not guessed
    for view in (_view(a, b), _view(b, a)):
        assert view.reason == "symmetric NAT on both sides, so no side's ports can be guessed"


def test_a_try_that_fails_spends_no_more_than_it_may_and_is_repeated_after_a_day_only() -> None:
    world, a, b = _world(1)
    a.site.boxes[0] = _Deaf(a.site.boxes[0], {b.site.public})
    tries = _listen(a)
    world.run(60.0)
    assert world.is_relayed(a, b)
    spent, guessed = _spent(a), _spent(b)
    assert (spent["tries"], spent["hits"], spent["pings"]) == (1, 0, 2 * PORTS)
    assert GUESSES / 3 < guessed["guesses"] <= GUESSES
    assert _view(a, b).reason.endswith("none of its ports was guessed, next try in a day")
    assert len(_view(a, b).reason) <= 160
    assert a.ports.is_empty
    world.run(900.0)
    assert _spent(a)["tries"] == 1 and len(tries) < 8
    a.restart()
    world.run(900.0)
    assert world.is_relayed(a, b) and _spent(a)["tries"] == 0
    assert _view(a, b).reason.endswith("none of its ports was guessed, next try in a day")


def test_a_try_that_failed_is_repeated_at_once_after_a_network_change() -> None:
    world, a, b = _world(1)
    a.site.boxes[0] = _Deaf(a.site.boxes[0], {b.site.public})
    world.run(60.0)
    assert _spent(a)["tries"] == 1
    a.move(world.site(Nat.SYMMETRIC))
    world.until(lambda: world.is_direct(a, b) and _view(a, b).birthday, within=60.0)


def test_a_machine_without_nftables_says_so_and_guesses_nothing() -> None:
    world = World(1)
    _allow(world)
    world.hub()
    world.run(5.0)
    a = world.machine(world.site(Nat.SYMMETRIC))
    a.ports_fail = "nftables takes no rules here"
    a.join()
    b = world.peer(Nat.PORT_RESTRICTED)
    world.run(60.0)
    assert world.is_relayed(a, b) and _spent(a)["tries"] == 0
    assert _view(a, b).reason.endswith("its ports cannot be guessed: nftables takes no rules here")
    assert len(_view(a, b).reason) <= 160


def _listen(machine: Machine) -> list[Message]:
    """What it asks others to guess, from now on."""
    asked: list[Message] = []

    def listen(_: Leg, message: Message) -> None:
        if isinstance(message, Guess):
            asked.append(message)

    machine.on_send = listen
    return asked


def _spent(machine: Machine) -> dict[str, int]:
    assert machine.agent is not None
    spent = machine.agent.status(machine.world.now)["birthday"]
    assert isinstance(spent, dict)
    return spent
