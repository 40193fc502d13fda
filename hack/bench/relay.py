"""A hub's kernel relay against plain forwarding by the same kernel, and what grants cost the hub.

Two servers of the lab send through its middle, which forwards their packets as any router does, or relays
them by its rules. The flood is of full WireGuard datagrams, one by one, as they come from a wire; the turns
alternate, so that what drifts with the machine drifts out. For the latency one datagram at a time goes there
and back.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

from lab import Lab
from lab.netns import call_in
from lab.plan import CORE_IPV4, CORE_IPV6
from scope_agent.relay.granting import Granting
from scope_agent.relay.shell.rules import KernelRelay

from bench.agents import BenchError
from bench.flood import ENDED_S, rate
from bench.result import Benchmark, Row, Sample, Target
from scope.model import Forwarding, PublicKey, RelayLimits
from scope.relay import Grant, knock
from scope.wire import AskRelay

PLAIN_PORT = 5000
PORTS = (26000, 26255)
PAIRS = 1000  # on one hub
PEERS = 64  # of that many peers: 2016 pairs
ROUND_TRIPS = 2000
_DATA = b"\4\0\0\0" + bytes(124)


def _ratios(attempts: int) -> Iterator[Sample | Row]:
    with Lab() as lab:
        sender, receiver = lab.server("sender"), lab.server("receiver")
        with _hub(lab, pairs=1) as (grant,):
            for version in (4, 6):
                address = str(receiver.ipv4 if version == 4 else receiver.ipv6)
                hub = str(CORE_IPV4 if version == 4 else CORE_IPV6)
                straight = [address, str(PLAIN_PORT)]
                ends = [[hub, str(side.port), side.token.hex()] for side in grant.sides]
                plain, relayed = [rate(sender, receiver, sends=straight, receives=straight)], list[float]()
                for _ in range(attempts):
                    relayed.append(rate(sender, receiver, sends=ends[0], receives=ends[1]))
                    plain.append(rate(sender, receiver, sends=straight, receives=straight))
                    yield relayed[-1] / fmean(plain[-2:])
                yield {
                    "IP": version,
                    "plain (Gbit/s)": fmean(plain) * 8e-9,
                    "relayed (Gbit/s)": fmean(relayed) * 8e-9,
                    "ratio": fmean(relayed) / fmean(plain),
                }


def _latencies(attempts: int) -> Iterator[Sample]:
    with Lab() as lab:
        hosts = lab.server("sender"), lab.server("receiver")
        with _hub(lab, pairs=PAIRS) as grants, contextlib.ExitStack() as opened:
            ends = [opened.enter_context(host.socket()) for host in hosts]
            for end in ends:
                end.bind(("", PLAIN_PORT))
                end.settimeout(ENDED_S)
            sides = grants[-1].sides
            ways = [(str(CORE_IPV4), side.port) for side in sides]
            straight = [(str(host.ipv4), PLAIN_PORT) for host in reversed(hosts)]
            for _ in range(attempts):
                for end, side, way in zip(ends, sides, ways, strict=True):
                    end.sendto(knock(side.token), way)
                before = _round_trip(ends, straight)
                relayed = _round_trip(ends, ways)
                yield (relayed - (before + _round_trip(ends, straight)) / 2) / 2 * 1000


def _grants(attempts: int) -> Iterator[Sample | Row]:
    for _ in range(attempts):
        granting, keys = _granting()
        pairs = iter([(first, second) for n, first in enumerate(keys) for second in keys[n + 1 :]])
        with Lab() as lab:
            relay = KernelRelay("bench", seed=1)
            slab = _slab()
            _apply(lab, granting, relay)
            for count in (10, 100, PAIRS):
                for _ in range(count - 10 - len(granting.grants().grants)):
                    _ask(granting, next(pairs))
                _apply(lab, granting, relay)
                times = [_grant_one(lab, granting, relay, next(pairs)) for _ in range(10)]
                yield {
                    "pairs": len(granting.grants().grants),
                    "one more grant (ms)": median(times),
                    "kernel memory (MiB)": (_slab() - slab) / 1024,
                }
            yield median(times)


def _grant_one(lab: Lab, granting: Granting, relay: KernelRelay, pair: tuple[PublicKey, PublicKey]) -> float:
    """Milliseconds from an ask to its rules."""
    began = time.monotonic()
    _ask(granting, pair)
    _apply(lab, granting, relay)
    return (time.monotonic() - began) * 1000


def _apply(lab: Lab, granting: Granting, relay: KernelRelay) -> None:
    call_in(lab.core, lambda: relay.apply(granting.grants(), time.time()))


@contextlib.contextmanager
def _hub(lab: Lab, *, pairs: int) -> Iterator[tuple[Grant, ...]]:
    """The lab's middle is a hub that has granted so much."""
    granting, keys = _granting()
    wanted = [(first, second) for n, first in enumerate(keys) for second in keys[n + 1 :]][:pairs]
    for pair in wanted:
        _ask(granting, pair)
    relay = KernelRelay("bench", seed=secrets.randbits(32))
    _apply(lab, granting, relay)
    try:
        yield granting.grants().grants
    finally:
        call_in(lab.core, relay.remove)


def _granting() -> tuple[Granting, list[PublicKey]]:
    keys = [PublicKey(secrets.token_bytes(32)) for _ in range(PEERS)]
    granting = Granting(random=secrets.token_bytes)
    granting.configure(
        is_hub=True,
        ports=PORTS,
        limits=RelayLimits(),
        listen_port=0,
        members={key: PublicKey(secrets.token_bytes(32)) for key in keys},
        wall=time.time(),
    )
    granting.forwards(Forwarding.KERNEL, "", time.time())
    return granting, keys


def _ask(granting: Granting, pair: tuple[PublicKey, PublicKey]) -> None:
    if not granting.ask(pair[0], AskRelay(pair[1]), time.time()):
        raise BenchError("the hub does not answer")


def _round_trip(ends: list[socket.socket], ways: list[tuple[str, int]]) -> float:
    """The median of many, in seconds."""
    times = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        ends[0].sendto(_DATA, ways[0])
        ends[1].recv(2048)
        ends[1].sendto(_DATA, ways[1])
        ends[0].recv(2048)
        times.append(time.perf_counter() - began)
    return median(times)


def _slab() -> int:
    """Memory that the machine's kernel has allocated for itself, in KiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Slab:"))


BENCHMARKS = (
    Benchmark(
        "relay",
        unit="ratio",
        what="a hub's relay in its kernel, against plain forwarding by the same kernel",
        target=Target(median=0.8, more_is_better=True),
        attempts=5,
        run=_ratios,
    ),
    Benchmark(
        "relay-latency",
        unit="ms",
        what="what a hub's kernel adds to the way of a datagram, with 1,000 pairs granted",
        target=Target(median=0.2),
        attempts=10,
        run=_latencies,
    ),
    Benchmark(
        "relay-grants",
        unit="ms",
        what="one more grant on a hub that has 1,000, from the ask to the rules",
        target=Target(median=100.0),
        attempts=3,
        run=_grants,
    ),
)
