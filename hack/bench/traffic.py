"""What a pair costs on the wire: bytes a second that one peer sends to another, at the IP level.

Idle: probes and WireGuard's keepalives, once a path has been idle for a while. Active: probes alone, under
traffic. WireGuard's own handshakes, one in two minutes, are the same without Scope and are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from lab import Nat

from bench.agents import BenchError, world
from bench.packets import Stream, Wire, wiretap
from bench.result import Benchmark, Sample, Target

REST_S = 30.0  # until a new path is no longer watched more closely
IDLE_S = 120.0  # six keepalives
ACTIVE_S = 30.0  # fifteen probe intervals
RATE = 50.0  # packets a second each way


def _idle(attempts: int) -> Iterator[Sample]:
    return _octets(attempts, IDLE_S, active=False)


def _active(attempts: int) -> Iterator[Sample]:
    return _octets(attempts, ACTIVE_S, active=True)


def _octets(attempts: int, seconds: float, *, active: bool) -> Iterator[Sample]:
    with world() as here:
        first, second = here.member("first", Nat.PORT_RESTRICTED), here.member("second", Nat.PORT_RESTRICTED)
        for member in (first, second):
            member.join(here.token)
        here.settle()
        public = second.machine.site.plan.public_ipv4
        if public is None:
            raise BenchError("the site has no public address")
        time.sleep(REST_S)
        addresses = (here.addresses[first.name], here.addresses[second.name])
        for _ in range(attempts):
            stream = Stream(first.machine, second.machine, addresses, rate=RATE) if active else None
            time.sleep(5.0 if active else 0.0)
            began = time.monotonic()
            with wiretap(first.machine, public) as sent:
                time.sleep(seconds)
                elapsed = time.monotonic() - began
            if stream is not None:
                stream.finish()
            counted = (Wire.PROBE,) if active else (Wire.PROBE, Wire.KEEPALIVE)
            yield sum(sent.octets[kind] for kind in counted) / elapsed


BENCHMARKS = (
    Benchmark(
        "traffic-idle",
        unit="B/s",
        what="probes and keepalives to one idle peer",
        target=Target(median=4.0),
        attempts=3,
        run=_idle,
    ),
    Benchmark(
        "traffic-active",
        unit="B/s",
        what="probes to one peer under traffic",
        target=Target(median=150.0),
        attempts=5,
        run=_active,
    ),
)
