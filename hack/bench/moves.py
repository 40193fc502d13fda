"""A pair whose network changes under it: roaming, a new NAT mapping, a path that dies and one that heals.

Pings run both ways every 10 ms. A time ends when one that was sent after the change was answered, each way.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from lab import Machine, Nat, Site
from lab.netns import load_nft
from meshlab import Member

from bench.agents import REST_S, BenchError, World, pair
from bench.result import Benchmark, Sample, Target

QUIET_S = 3.0  # between two changes: what the last one set off has ended
DEAD_S = 10.0  # how long a path stays dead before it heals: searches have slowed down by then
REROUTED_S = 20.0  # for a pair to be whole again between two attempts


def _roamed(attempts: int) -> Iterator[Sample]:
    with pair() as (world, roaming, still):
        sites = [roaming.machine.site, world.lab.site("elsewhere", nat=Nat.PORT_RESTRICTED)]
        for site in itertools.islice(itertools.cycle(reversed(sites)), attempts):
            time.sleep(QUIET_S)
            began = time.monotonic()
            roaming.machine.move(site)
            yield answered_both_ways(world, roaming, still, began)


def _rebound(attempts: int) -> Iterator[Sample]:
    with pair() as (world, first, second):
        for _ in range(attempts):
            time.sleep(QUIET_S)
            began = time.monotonic()
            _site(first).rebind()
            yield answered_both_ways(world, first, second, began)


def _healed(attempts: int) -> Iterator[Sample]:
    with pair() as (world, first, second):
        ends = (_site(first), _site(second))
        for _ in range(attempts):
            time.sleep(QUIET_S)
            world.lab.cut(*ends)
            for source, target in ((first, second), (second, first)):
                if world.await_path(source, target, direct=False) is None:
                    raise BenchError(f"{source.name} did not notice that the path was cut")
            time.sleep(DEAD_S)
            yield world.time_to_direct(first, second, lambda: world.lab.heal(*ends))


def _rerouted(attempts: int) -> Iterator[Sample]:
    with pair(ipv6=True) as (world, first, second):
        for _ in range(attempts):
            _cut_family(world, first, second, None)
            time.sleep(QUIET_S + REST_S)
            family = _family_in_use(first, second)
            began = time.monotonic()
            _cut_family(world, first, second, family)
            yield answered_both_ways(world, first, second, began)


def answered_both_ways(world: World, first: Member, second: Member, began: float) -> Sample:
    """Seconds since `began` until a ping each way, sent from now on, is answered."""
    flows = [world.flow(first, second), world.flow(second, first)]
    for flow in flows:
        world.pinger.restart(flow)
    answers = [world.await_ping(flow) for flow in flows]
    arrived = [answer for answer in answers if answer is not None]
    return max(arrived) - began if len(arrived) == len(flows) else None


def _family_in_use(first: Member, second: Member) -> str:
    """The family of the path that both use; BenchError when they do not agree on one."""
    deadline = time.monotonic() + REROUTED_S
    while time.monotonic() < deadline:
        statuses = [member.status() for member in (first, second)]
        reaches = [reach for status in statuses if status for reach in status.peers.values()]
        families = {reach.family for reach in reaches if reach.is_direct and reach.family}
        if len(reaches) == 2 and all(reach.is_direct for reach in reaches) and len(families) == 1:
            return families.pop()
        time.sleep(0.1)
    raise BenchError("the two ends do not agree on a path again")


def _cut_family(world: World, first: Member, second: Member, family: str | None) -> None:
    """Swallow one family between the two sites, and nothing else any more; with None nothing at all."""
    table = "inet bench_cut"
    script = f"table {table}\ndelete table {table}\n"
    if family is not None:
        ports = f'{{ "{_site(first).port}", "{_site(second).port}" }}'
        script += (
            f"table {table} {{\n chain forward {{\n  type filter hook forward priority filter;\n"
            f"  iifname {ports} oifname {ports} meta nfproto {family.lower()} drop\n }}\n}}\n"
        )
    load_nft(script, inside=world.lab.core)


def _site(member: Member) -> Site:
    machine: Machine = member.machine
    return machine.site


BENCHMARKS = (
    Benchmark(
        "roaming",
        unit="s",
        what="machine plugged into another site, to pings answered both ways",
        target=Target(median=1.0),
        attempts=10,
        run=_roamed,
    ),
    Benchmark(
        "rebinding",
        unit="s",
        what="NAT gives another mapping, to pings answered both ways",
        target=Target(median=2.0),
        attempts=10,
        run=_rebound,
    ),
    Benchmark(
        "healing",
        unit="s",
        what="only path dead for 10 s and whole again, to direct both ways",
        target=Target(median=2.0),
        attempts=10,
        run=_healed,
    ),
    Benchmark(
        "silent-death",
        unit="s",
        what="one of two paths swallows everything under traffic, to pings answered both ways",
        target=Target(median=1.5, p99=3.0),
        attempts=20,
        run=_rerouted,
    ),
)
