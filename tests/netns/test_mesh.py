"""Real agents behind each pair of NAT kinds, with a real registry and a hub: nobody is without a path.

One lab holds two sites of every kind, so all pairs, a kind with itself included, are found at once, as in a
mesh that is powered up. One of the machines without a NAT is a hub. The table of the lab says what to expect
of each pair: a direct path, or a relayed one and why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import combinations_with_replacement

import pytest
from lab import GRID_KINDS, Lab, Nat
from meshlab import PRIVATE, Member, PairRecord, Pinger, Registry, Watch, WatchError, mesh_document

# Eighteen agents start, join and search at once on two cores.
MESH = "grid"
CONVERGED_S = 180.0


@pytest.fixture(scope="module")
def grid() -> Iterator[Watch]:
    """Two machines behind every kind of NAT, joined; every pair with a way has had the time to find it."""
    with Lab(delay_ms=10, private=PRIVATE) as lab, Pinger() as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH, hubs={"names": [HUB]}))
        token = registry.token(MESH)
        machines = [
            lab.site(name := name_of(kind, number), nat=kind).machine(f"m-{name}")
            for number in (1, 2)
            for kind in GRID_KINDS
        ]
        members = [Member(machine, mesh=MESH, registry=registry) for machine in machines]
        for member in members:
            member.join(token)
        with Watch(members, pinger, has_hubs=True) as watch:
            # What is missing then fails as the pair that it is.
            with contextlib.suppress(WatchError):
                watch.until(
                    lambda: is_settled(watch), within_s=CONVERGED_S, missing=watch.describe_unfinished
                )
            yield watch


def is_settled(watch: Watch) -> bool:
    """Whether all is found: paths, what is in the way of the others, each agent's own NAT, and no change."""
    return (
        watch.is_complete()
        and all(way.reach is not None and (way.is_direct or way.reach.reason) for way in watch.pairs.values())
        and all(watch.statuses[name].mapping == mapping for name, mapping in MAPPINGS.items())
        and all(family_of(way) == family_of(watch.pairs[b, a]) for (a, b), way in watch.pairs.items())
    )


def name_of(kind: Nat, number: int) -> str:
    """The name of a kind's first or second site."""
    return f"{kind.name.lower().replace('_', '-')}-{number}"


def mapping_of(kind: Nat) -> str:
    """What an agent behind a kind tells of its mapping."""
    match kind:
        case Nat.NONE | Nat.IPV6_ONLY:
            return "None"
        case Nat.SYMMETRIC:
            return "EndpointDependent"
        case Nat.UDP_BLOCKED:
            return "Unknown"
        case _:
            return "EndpointIndependent"


HUB = f"{MESH}.external.m-{name_of(Nat.NONE, 1)}"
MAPPINGS = {f"m-{name_of(kind, number)}": mapping_of(kind) for kind in GRID_KINDS for number in (1, 2)}


def family_of(way: PairRecord) -> str | None:
    """The family of a direct path; None where there is none."""
    return way.reach.family if way.reach is not None and way.is_direct else None


def ways(watch: Watch, a: Nat, b: Nat) -> list[PairRecord]:
    """Both ways between a first machine of one kind and a second of another."""
    names = f"m-{name_of(a, 1)}", f"m-{name_of(b, 2)}"
    return [watch.pairs[names], watch.pairs[names[::-1]]]


PAIRS = list(combinations_with_replacement(GRID_KINDS, 2))
IDS = [f"{a.name}-{b.name}" for a, b in PAIRS]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=IDS)
def test_a_pair_is_direct_or_else_relayed_and_says_why(grid: Watch, a: Nat, b: Nat) -> None:
    for way in ways(grid, a, b):
        assert way.reach is not None
        if way.obstacle is None:
            assert way.is_direct, way.describe()
            assert way.reach.reason == ""
        else:
            assert way.is_relayed, way.describe()
            assert way.reach.hub == HUB
            assert way.reach.carried == (Nat.UDP_BLOCKED in (a, b))
            assert way.reach.reason != ""
        assert way.is_pinged, way.describe()
        assert way.reach.rtt_ms is not None


@pytest.mark.parametrize("name", MAPPINGS)
def test_an_agent_tells_its_mapping_class(grid: Watch, name: str) -> None:
    assert grid.statuses[name].mapping == MAPPINGS[name]


def test_both_ends_of_a_pair_use_one_family(grid: Watch) -> None:
    for (a, b), way in grid.pairs.items():
        assert family_of(way) == family_of(grid.pairs[b, a])
