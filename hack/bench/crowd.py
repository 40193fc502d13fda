"""A hundred agents on one machine: one joins the others, and all are started at once.

Twenty sites of five machines, each site behind a port-restricted NAT, without delay: the processors, shared
by a hundred agents and as many WireGuard processes, are what holds it back.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

from lab import Nat
from meshlab import Flow, Member, Pinger

from bench.agents import POLL_S, REST_S, BenchError, World, world
from bench.result import Benchmark, Sample, Target

SITES, MACHINES = 20, 5
JOINING_AT_ONCE = 4  # while the mesh is built: more would only wait for each other
FORMING_S = 1500.0  # for 4,950 pairs to find each other on two processors before anything is measured
PATIENCE_S = 180.0
SAVED_S = 8.0  # an agent of a hundred writes what it learned to disk within five seconds
LOOK_S = 1.0  # between two questions to a hundred agents, each of which answers about a hundred
NEWCOMER_PING_S = 0.1  # ninety-nine flows of pings
SWEEP_S = 1.0  # between two pings of a flow while every pair is tried


def _join_running(attempts: int) -> Iterator[Sample]:
    with _crowd(SITES * MACHINES - 1) as here, _pings(NEWCOMER_PING_S) as pinger:
        newcomer = here.member_on(here.lab.sites["site-1"].machine("newcomer"))
        for _ in range(attempts):
            yield _join_one(here, newcomer, pinger)
            time.sleep(SAVED_S)
            newcomer.leave()
            # The others have taken it in when none of them speaks of it any more.
            time.sleep(REST_S * 5)


def _join_one(here: World, newcomer: Member, pinger: Pinger) -> Sample:
    others = [member for member in here.members if member is not newcomer]
    waiting = {here.addresses[other.name] for other in others}
    flows: list[Flow] = []
    began = time.monotonic()
    newcomer.join(here.token)
    while waiting and time.monotonic() - began < PATIENCE_S:
        status = newcomer.status()
        if status is not None and status.address is not None:
            flows = flows or [pinger.flow(newcomer.machine, address) for address in sorted(waiting)]
            waiting -= {reach.address for reach in status.peers.values() if reach.is_direct and reach.address}
        time.sleep(POLL_S * 5)
    direct_at = time.monotonic()
    arrived = _await_all(flows, deadline=began + PATIENCE_S)
    for flow in flows:
        pinger.stop(flow)
    if waiting or arrived is None:
        return None
    return max(direct_at, arrived) - began


def _start_all(attempts: int) -> Iterator[Sample]:
    with _crowd(SITES * MACHINES) as here:
        for _ in range(attempts):
            time.sleep(SAVED_S)
            for member in here.members:
                member.lose_power()
            began = time.monotonic()
            for member in here.members:
                member.run()
            everyone = here.members
            if not _await_whole(here, everyone, others=len(everyone) - 1, deadline=began + PATIENCE_S):
                yield None
                continue
            with _pings(SWEEP_S) as pinger:
                pairs = itertools.combinations(here.members, 2)
                flows = [pinger.flow(a.machine, here.addresses[b.name]) for a, b in pairs]
                arrived = _await_all(flows, deadline=began + PATIENCE_S)
            yield None if arrived is None else arrived - began


@contextlib.contextmanager
def _crowd(count: int) -> Iterator[World]:
    """So many agents that are all direct to each other."""
    with world(delay_ms=0.0) as here:
        sites = [here.lab.site(f"site-{number}", nat=Nat.PORT_RESTRICTED) for number in range(1, SITES + 1)]
        machines = [
            site.machine(f"{site.name}-{number}") for number in range(1, MACHINES + 1) for site in sites
        ]
        members = [here.member_on(machine) for machine in machines[:count]]
        for start in range(0, len(members), JOINING_AT_ONCE):
            group = members[start : start + JOINING_AT_ONCE]
            for member in group:
                member.join(here.token)
            for member in group:
                member.await_joined()
            # Nothing is measured yet, and a crowd that forms by and by asks less of the processors.
            _await_whole(here, group, others=start + len(group) - 1, deadline=time.monotonic() + FORMING_S)
        if not _await_whole(here, members, others=count - 1, deadline=time.monotonic() + FORMING_S):
            raise BenchError(f"{count} agents are not all direct after {FORMING_S:.0f} s")
        yield here


@contextlib.contextmanager
def _pings(interval_s: float) -> Iterator[Pinger]:
    with Pinger(eager_s=interval_s, calm_s=3600.0, patience_s=float("inf")) as pinger:
        yield pinger


def _await_whole(here: World, members: Sequence[Member], *, others: int, deadline: float) -> bool:
    """Whether each of these agents says in time that it is direct to so many others."""
    waiting = list(members)
    while waiting and time.monotonic() < deadline:
        waiting = [member for member in waiting if not _is_whole(here, member, others)]
        time.sleep(LOOK_S if waiting else 0.0)
    return not waiting


def _is_whole(here: World, member: Member, others: int) -> bool:
    member.check_alive()
    status = here.ask(member)
    return status is not None and sum(reach.is_direct for reach in status.peers.values()) >= others


def _await_all(flows: Sequence[Flow], *, deadline: float) -> float | None:
    """When the last of the flows got its first answer; None when one gets none in time."""
    while any(flow.first is None for flow in flows) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    answers = [flow.first for flow in flows if flow.first is not None]
    return max(answers) if answers and len(answers) == len(flows) else None


BENCHMARKS = (
    Benchmark(
        "join-hundred",
        unit="s",
        what="one agent joins a running mesh of 99, to direct and pinged with each",
        target=Target(median=3.0),
        attempts=5,
        run=_join_running,
    ),
    Benchmark(
        "start-hundred",
        unit="s",
        what="100 enrolled agents started at once without devices, to every pair direct and pinged",
        target=Target(median=60.0),
        attempts=3,
        run=_start_all,
    ),
)
