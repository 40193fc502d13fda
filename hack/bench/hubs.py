"""Pairs that talk through hubs: how soon, and what happens when a path or a hub is gone.

Two hubs without a NAT, each 40 ms away from everybody. Pings run both ways every 10 ms; a time ends when one
that was sent after the change was answered, each way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from lab import Nat
from meshlab import Member

from bench.agents import MESH, POLL_S, REST_S, SAVED_S, SETTLE_S, BenchError, World, world
from bench.moves import answered_both_ways
from bench.packets import Stream
from bench.result import Benchmark, Row, Sample, Target

HUBS = ("one", "two")
RATE = 500.0  # packets a second each way
DEAD_S = 25.0  # a hub's agent is away for so long: each side knocks in that time
QUIET_S = 3.0  # between two changes: what the last one set off has ended
STABLE_S = 7.0  # between two ends of a carrier: one that dies sooner is started ever more rarely


def _started(attempts: int) -> Iterator[Sample]:
    with _pair(Nat.SYMMETRIC) as (here, first, second):
        for _ in range(attempts):
            time.sleep(SAVED_S)
            first.lose_power()
            time.sleep(REST_S)
            began = time.monotonic()
            first.run()
            yield answered_both_ways(here, first, second, began)


def _hub_killed(attempts: int) -> Iterator[Sample]:
    return _without_agent(attempts, signal.SIGKILL)


def _hub_frozen(attempts: int) -> Iterator[Sample]:
    return _without_agent(attempts, signal.SIGSTOP)


def _without_agent(attempts: int, number: signal.Signals) -> Iterator[Sample]:
    with _pair(Nat.SYMMETRIC) as (here, first, second):
        addresses = (here.addresses[first.name], here.addresses[second.name])
        for _ in range(attempts):
            hub = _hub_in_use(here, first, second)
            stream = Stream(first.machine, second.machine, addresses, rate=RATE)
            time.sleep(REST_S)
            assert hub.process is not None
            hub.process.send_signal(number)
            time.sleep(DEAD_S)
            _, lost = stream.finish()
            has_moved = _hub_in_use(here, first, second) is not hub
            if number is signal.SIGKILL:
                hub.process.wait()
                hub.run()
            else:
                hub.process.send_signal(signal.SIGCONT)
            if has_moved:
                raise BenchError("the pair moved to the other hub")
            yield float(lost)


def _hub_cut_off(attempts: int) -> Iterator[Sample]:
    with _pair(Nat.SYMMETRIC) as (here, first, second):
        for _ in range(attempts):
            site = _hub_in_use(here, first, second).machine.site
            time.sleep(QUIET_S)
            began = time.monotonic()
            site.block_udp()
            yield answered_both_ways(here, first, second, began)
            site.unblock_udp()
            time.sleep(QUIET_S)


def _rerouted(attempts: int) -> Iterator[Sample]:
    with _pair(Nat.PORT_RESTRICTED) as (here, first, second):
        ends = (first.machine.site, second.machine.site)
        for _ in range(attempts):
            if here.await_direct(first, second) is None or here.await_direct(second, first) is None:
                raise BenchError("the pair has no direct path")
            time.sleep(QUIET_S)
            began = time.monotonic()
            here.lab.cut(*ends)
            yield answered_both_ways(here, first, second, began)
            here.lab.heal(*ends)


def _carrier_killed(attempts: int) -> Iterator[Sample | Row]:
    """The carrier of the one that is carried and that of its hub, in turn."""
    hub_name = f"{MESH}.external.{HUBS[0]}"
    with world(spec={"hubs": {"names": [hub_name]}}) as here:
        hub = here.member(HUBS[0], Nat.NONE)
        blocked = here.member("blocked", Nat.PORT_RESTRICTED)
        blocked.machine.site.block_udp()
        for member in (hub, blocked):
            member.join(here.token, wait=True)
        _await_carried(here, hub, blocked)
        for flow in (here.flow(hub, blocked), here.flow(blocked, hub)):
            if here.await_ping(flow) is None:
                raise BenchError("no ping comes back over TCP")
        times: dict[str, list[Sample]] = {"peer": [], "hub": []}
        for _ in range(attempts):
            for whose, member in (("peer", blocked), ("hub", hub)):
                time.sleep(STABLE_S)
                began = time.monotonic()
                os.kill(member.carrier_pid(), signal.SIGKILL)
                took = answered_both_ways(here, hub, blocked, began)
                times[whose].append(took)
                yield took
        for number in range(attempts):
            yield {
                "attempt": number + 1,
                **{f"{whose}'s (s)": taken[number] for whose, taken in times.items()},
            }


def _await_carried(here: World, hub: Member, blocked: Member) -> None:
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        said = [here.ask(member) for member in (hub, blocked)]
        reaches = [reach for status in said if status is not None for reach in status.peers.values()]
        if len(reaches) == len(said) and all(reach.is_relayed and reach.carried for reach in reaches):
            return
        time.sleep(POLL_S)
    raise BenchError("the peer without UDP is not carried")


@contextlib.contextmanager
def _pair(nat: Nat) -> Iterator[tuple[World, Member, Member]]:
    """Two members behind such NATs that talk, as well as they can, and two hubs."""
    hubs = {"names": [f"{MESH}.external.{name}" for name in HUBS]}
    with world(spec={"hubs": hubs}) as here:
        for name in HUBS:
            here.member(name, Nat.NONE).join(here.token, wait=True)
        first, second = here.member("first", nat), here.member("second", nat)
        for member in (first, second):
            member.join(here.token, wait=True)
        here.settle()
        flows = [here.flow(first, second), here.flow(second, first)]
        if any(here.await_ping(flow) is None for flow in flows):
            raise BenchError("no ping comes back")
        yield here, first, second


def _hub_in_use(here: World, first: Member, second: Member) -> Member:
    """The hub through which both ends talk; BenchError when they do not agree on one."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        found = {_hub_of(here, first, second), _hub_of(here, second, first)}
        named = [member for member in here.members if found == {f"{MESH}.external.{member.name}"}]
        if named:
            return named[0]
        time.sleep(POLL_S)
    raise BenchError("the two ends do not agree on a hub")


def _hub_of(here: World, source: Member, target: Member) -> str:
    status = here.ask(source)
    reaches = status.peers.values() if status is not None else ()
    return next((reach.hub for reach in reaches if reach.address == here.addresses[target.name]), "")


BENCHMARKS = (
    Benchmark(
        "start-relayed",
        unit="s",
        what="enrolled agent started on a machine without a device, to pings answered through a hub",
        target=Target(median=0.4, p99=1.0),
        attempts=20,
        run=_started,
    ),
    Benchmark(
        "hub-killed",
        unit="packets",
        what="lost by a relayed pair in 25 s in which its hub's agent is dead",
        target=Target(worst=0.0),
        attempts=3,
        run=_hub_killed,
    ),
    Benchmark(
        "hub-frozen",
        unit="packets",
        what="lost by a relayed pair in 25 s in which its hub's agent hangs",
        target=Target(worst=0.0),
        attempts=3,
        run=_hub_frozen,
    ),
    Benchmark(
        "carrier-killed",
        unit="s",
        what="a carrier of a peer without UDP, or its hub's, killed, to pings answered both ways",
        target=Target(p99=2.0),
        attempts=5,
        run=_carrier_killed,
    ),
    Benchmark(
        "hub-cut",
        unit="s",
        what="hub of a relayed pair cut off, to pings answered both ways through the other",
        target=Target(p99=3.0),
        attempts=10,
        run=_hub_cut_off,
    ),
    Benchmark(
        "silent-death-relayed",
        unit="s",
        what="only direct path swallows everything under traffic, to pings answered both ways through a hub",
        target=Target(median=1.5, p99=3.0),
        attempts=20,
        run=_rerouted,
    ),
)
