"""A real mesh lives through what happens to real ones: kills, removals, roaming, NATs and a registry that go.

The members of one mesh share a lab, and each test takes others of them, so that none meets what an earlier
one left behind. Real packets tell: pings through WireGuard, from the kernel of one machine to another's.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import pytest
from lab import Lab, Machine, Nat
from meshlab import PRIVATE, Member, PairRecord, Pinger, Registry, Watch, mesh_document
from scope_agent.__main__ import REMOVED

MESH = "life"
CONVERGED_S = 180.0
# What must be over within a bound of its own is asserted; this is for what merely has to come.
PATIENCE_S = 120.0
# A pair whose NATs let neither in rests for a minute, two or three times over where it had a path.
HEALED_S = 240.0
CUT_OFF_S = (
    15.0  # a removal reaches every data path; that it takes three seconds at most is shown in virtual time
)
SAVED_S = 5.0  # an agent of a small mesh has whom it heard of last on disk: it writes after a second
PING_S = 0.1  # how exactly the end of a flow is known
SITES = (
    ("open", Nat.NONE, None),
    ("home", Nat.PORT_RESTRICTED, None),
    ("dual", Nat.PORT_RESTRICTED, True),
    ("mobile", Nat.CGNAT, True),
    ("cone", Nat.FULL_CONE, None),
    ("cafe", Nat.ADDRESS_RESTRICTED, None),
)
MACHINES = (
    ("server", "open"),
    ("desk", "home"),
    ("tv", "home"),
    ("office", "dual"),
    ("phone", "mobile"),
    ("victim", "cone"),
)


@dataclass(frozen=True, slots=True)
class Life:
    """The mesh of this file."""

    lab: Lab
    registry: Registry
    watch: Watch
    members: dict[str, Member]
    token: str

    def until(self, done: Callable[[], bool], what: str | Callable[[], str]) -> float:
        """Look until it is done; how long that took. WatchError with `what` is missing."""
        missing = what if callable(what) else lambda: what
        return self.watch.until(done, within_s=PATIENCE_S, missing=missing)

    def ways(self, *names: str) -> list[PairRecord]:
        """The possible ways between these and whoever is in another site."""
        return [
            pair
            for pair in self.watch.of(*(self.members[name] for name in names))
            if pair.obstacle is None and pair.source.machine.site is not pair.target.machine.site
        ]

    def heal(self, ways: list[PairRecord]) -> None:
        """Return when pings that are sent from now on come back over direct paths."""
        self.watch.mark(ways)

        def missing() -> str:
            return "\n".join(way.describe() for way in ways if way.healed_at is None)

        self.watch.until(lambda: not missing(), within_s=HEALED_S, missing=missing)


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    with Lab(delay_ms=10, private=PRIVATE) as lab, Pinger(calm_s=PING_S) as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH))
        token = registry.token(MESH)
        for name, nat, ipv6 in SITES:
            lab.site(name, nat=nat, ipv6=ipv6)
        members = {
            name: Member(lab.sites[site].machine(name), mesh=MESH, registry=registry)
            for name, site in MACHINES
        }
        for member in members.values():
            member.join(token)
        with Watch(members.values(), pinger) as watch:
            watch.until(watch.is_complete, within_s=CONVERGED_S, missing=watch.describe_unfinished)
            yield Life(lab, registry, watch, members, token)


def ping(source: Machine, address: str, *, count: int, interval_s: float) -> tuple[int, int]:
    """How many pings were sent, and how many were answered."""
    timeout = count * interval_s + 20.0
    argv = ["ping", "-q", "-n", "-c", str(count), "-i", str(interval_s), "-W", "3", address]
    said = source.run(argv, check=False, timeout=timeout).stdout
    found = re.search(r"(\d+) packets transmitted, (\d+) received", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def is_within_lan(way: PairRecord) -> bool:
    """Whether a way leads to the target's own address."""
    endpoint = way.reach.endpoint if way.reach is not None else None
    return endpoint is not None and ip_address(endpoint.rpartition(":")[0]) == way.target.machine.ipv4


def address_of(life: Life, name: str) -> str:
    status = life.members[name].status()
    assert status is not None
    assert status.address is not None
    return status.address


# A pair waits 0.2 s for a better route than the first that answers, and moves to one that answers later.
def test_a_pair_with_ipv6_on_both_sides_takes_it(life: Life) -> None:
    pairs = (("server", "office"), ("server", "phone"), ("office", "phone"))
    ways = [life.watch.pairs[names] for a, b in pairs for names in ((a, b), (b, a))]

    def taken() -> bool:
        return all(way.reach is not None and way.reach.family == "IPv6" for way in ways)

    life.until(taken, lambda: "\n".join(way.describe() for way in ways))


def test_two_machines_of_one_lan_stay_within_it(life: Life) -> None:
    ways = [life.watch.pairs["desk", "tv"], life.watch.pairs["tv", "desk"]]
    life.until(lambda: all(map(is_within_lan, ways)), lambda: "\n".join(way.describe() for way in ways))


def test_killing_and_starting_an_agent_loses_no_packet(life: Life) -> None:
    member, other = life.members["office"], life.members["server"]
    address = address_of(life, "office")
    argv = ["ping", "-q", "-n", "-c", "300", "-i", "0.02", "-W", "3", address]
    with (other.machine.directory / "ping").open("w+") as said:
        pinging = other.machine.popen(argv, stdout=said)
        time.sleep(1.0)  # some go before, some while it is dead, some after
        member.kill(signal.SIGKILL)
        time.sleep(1.0)
        member.run()
        assert pinging.wait(30.0) == 0
        said.seek(0)
        assert "300 received" in said.read()
    life.until(lambda: life.members["office"].status() is not None, "an agent that answers")


def test_roaming_to_another_nat_heals(life: Life) -> None:
    member = life.members["phone"]
    member.machine.move(life.lab.sites["cafe"])
    life.heal(life.ways("phone"))


def test_a_nat_that_takes_other_ports_heals(life: Life) -> None:
    life.lab.sites["home"].rebind()
    life.heal(life.ways("desk", "tv"))


def test_a_removed_peer_is_cut_off_from_the_data_path_and_stays_so(life: Life) -> None:
    member = life.members["victim"]
    ways = life.watch.of(member)
    assert all(way.is_pinged for way in ways)
    victim = life.watch.statuses["victim"].peer
    life.watch.members.remove(member)  # it is no longer to be alive, and its flows go on
    life.registry.scopectl("peer", "remove", victim)
    removed = time.monotonic()
    others = [other for name, other in life.members.items() if name != "victim"]

    def forgotten() -> bool:
        known = [life.watch.statuses[other.name].peers for other in others]
        return all(victim not in peers for peers in known)

    life.until(forgotten, "everybody has forgotten the removed peer")
    until = removed + 2 * CUT_OFF_S
    while time.monotonic() < until:
        time.sleep(PING_S)
    for way in ways:
        assert way.flow is not None
        assert way.flow.last is not None
        assert way.flow.last - removed < CUT_OFF_S, (way.source.name, way.target.name)
    # Its own agent ends, and one that is started again gets no further.
    assert member.process is not None
    assert member.process.wait(PATIENCE_S) == REMOVED
    member.run()
    assert member.process.wait(PATIENCE_S) == REMOVED
    member.hang_up()
    way = life.watch.pairs["server", "victim"]
    assert way.flow is not None
    assert ping(way.source.machine, way.flow.address, count=5, interval_s=0.2) == (5, 0)
    life.watch.add(member)
    life.watch.drop(member)


def test_a_used_one_time_token_lets_nobody_else_in(life: Life) -> None:
    token = life.registry.token(MESH, single_use=True)
    newcomers = [
        Member(life.lab.sites["cafe"].machine(name), mesh=MESH, registry=life.registry)
        for name in ("guest", "stranger")
    ]
    newcomers[0].join(token, wait=True)
    newcomers[1].join(token)
    assert newcomers[1].process is not None
    assert newcomers[1].process.wait(PATIENCE_S) == 1
    assert "token" in newcomers[1].log.read_text()
    life.members["guest"] = newcomers[0]
    life.watch.add(newcomers[0])
    life.until(lambda: not life.watch.unfinished() and newcomers[0].status() is not None, "the guest's paths")


def test_without_the_registry_agents_restart_and_nats_change_and_the_mesh_goes_on(life: Life) -> None:
    time.sleep(SAVED_S)
    life.registry.kill()
    for name in ("desk", "office"):
        life.members[name].kill()
    for name in ("desk", "office"):
        life.members[name].run()
    life.lab.sites["home"].rebind()
    life.heal(life.ways("desk", "tv", "office"))
    life.registry.start()
    life.until(
        lambda: all(status.connected for status in life.watch.statuses.values()),
        "every agent is connected to the registry again",
    )
