"""Real agents change paths under 1,000 packets a second both ways: between families, and off a relay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.packets import Stream
from lab import Lab, Nat
from meshlab import PRIVATE, Member, Pinger, Registry, Watch, mesh_document

from tests.netns.change_fixture import (
    addresses,
    assert_few_changes,
    overflows,
    traced,
    wait_until_steady,
)

MESH = "change"
RATE = 1000.0  # packets a second, each way
CONVERGED_S = 120.0
STEADY = 3.0 * RATE  # packets that go over the new path alone
NO_IPV6 = (
    "table ip6 cut {\nchain in { type filter hook prerouting priority -500; meta l4proto udp drop; }\n}\n"
)


@contextlib.contextmanager
def converged(members: list[Member], registry: Registry, *, has_hubs: bool = False) -> Iterator[None]:
    """The members, joined and at their best."""
    token = registry.token(MESH)
    for member in members:
        member.join(token)
    with Pinger() as pinger, Watch(members, pinger, has_hubs=has_hubs) as watch:
        watch.until(watch.is_complete, within_s=CONVERGED_S, missing=watch.describe_unfinished)
    try:
        yield
    finally:
        for member in members:
            member.hang_up()


def assert_nothing_is_held(members: list[Member]) -> None:
    for member in members:
        assert "scope_hold" not in member.machine.run(["nft", "list", "tables"]).stdout


def test_a_change_of_families_under_full_streams_loses_nothing_and_is_over_while_they_go_on() -> None:
    """Two agents 40 ms apart are direct over IPv4, and would have IPv6 if it passed; then it does."""
    with Lab(delay_ms=10, private=PRIVATE) as lab:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH))
        ends = [
            lab.site(site, nat=Nat.PORT_RESTRICTED, ipv6=True).machine(name)
            for site, name in (("berlin", "anna"), ("lyon", "bert"))
        ]
        ends[0].run(["nft", "-f", "-"], input=NO_IPV6)
        members = [Member(end, mesh=MESH, registry=registry) for end in ends]
        with converged(members, registry), traced(ends[0]) as first, traced(ends[1]) as second:
            overflowed = sum(map(overflows, ends))
            stream = Stream(ends[0], ends[1], addresses(members), rate=RATE)
            wait_until_steady(first, second, on=lambda _: True, packets=RATE)
            ends[0].run(["nft", "delete", "table", "ip6", "cut"])
            wait_until_steady(first, second, on=lambda way: way.version == 6, packets=STEADY)
            sent, lost = stream.finish()
            assert sent > 2 * (RATE + STEADY)
            # What found a full queue, as a program waited for the processor, was not lost by the change.
            assert lost <= sum(map(overflows, ends)) - overflowed
            assert_few_changes(first, second)
            assert_nothing_is_held(members)


def test_a_pair_whose_direct_path_dies_is_relayed_and_comes_back_without_a_loss() -> None:
    """Two agents 40 ms apart, with a hub beside them; nothing passes between them for a while."""
    with Lab(delay_ms=10, private=PRIVATE) as lab:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH, hubs={"names": [f"{MESH}.external.hub"]}))
        hub = lab.site("vienna", nat=Nat.NONE, ipv6=False).machine("hub")
        sites = [lab.site(name, nat=Nat.PORT_RESTRICTED) for name in ("berlin", "lyon")]
        ends = [site.machine(name) for site, name in zip(sites, ("anna", "bert"), strict=True)]
        hubs, members = (
            [Member(machine, mesh=MESH, registry=registry) for machine in machines]
            for machines in ([hub], ends)
        )
        with converged(hubs + members, registry, has_hubs=True):
            with traced(ends[0]) as first, traced(ends[1]) as second:
                stream = Stream(ends[0], ends[1], addresses(members), rate=RATE)
                wait_until_steady(first, second, on=lambda _: True, packets=RATE)
                lab.cut(*sites)
                wait_until_steady(first, second, on=lambda way: way == hub.ipv4, packets=STEADY)
                stream.finish()
                assert_few_changes(first, second)
            with traced(ends[0]) as first, traced(ends[1]) as second:
                overflowed = sum(map(overflows, (hub, *ends)))
                stream = Stream(ends[0], ends[1], addresses(members), rate=RATE)
                wait_until_steady(first, second, on=lambda _: True, packets=RATE)
                lab.heal(*sites)
                wait_until_steady(first, second, on=lambda way: way != hub.ipv4, packets=STEADY)
                sent, lost = stream.finish()
                assert first.ways[0] == second.ways[0] == hub.ipv4
                assert sent > 2 * (RATE + STEADY)
                assert lost <= sum(map(overflows, (hub, *ends))) - overflowed
                assert_few_changes(first, second)
            assert_nothing_is_held(members)
