"""From the start of an agent's process to a direct path: two port-restricted NATs, 40 ms round trip apart.

Taken from just before the process is executed until both agents say that the path is direct and a ping each
way, of one every 10 ms through the mesh's addresses, was answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.agents import REST_S, SAVED_S, BenchError, pair
from bench.result import Benchmark, Sample, Target


def _kept(attempts: int) -> Iterator[Sample]:
    with pair() as (world, first, second):
        for _ in range(attempts):
            time.sleep(SAVED_S)
            first.kill()
            time.sleep(REST_S)
            yield world.time_to_direct(first, second, first.run)


def _rebooted(attempts: int) -> Iterator[Sample]:
    with pair() as (world, first, second):
        for _ in range(attempts):
            time.sleep(SAVED_S)
            first.lose_power()
            # The pings go on, so that the other side has noticed and what it says is news.
            if world.await_path(second, first, direct=False) is None:
                raise BenchError("the other side did not notice that the machine was gone")
            time.sleep(REST_S)
            yield world.time_to_direct(first, second, first.run)


def _joined(attempts: int) -> Iterator[Sample]:
    with pair() as (world, first, second):
        for _ in range(attempts):
            first.leave()
            if world.await_path(second, first, direct=False) is None:
                raise BenchError("the other side did not notice that its peer had left")
            time.sleep(REST_S)
            yield world.time_to_direct(first, second, lambda: first.join(world.token))


BENCHMARKS = (
    Benchmark(
        "start-kept",
        unit="s",
        what="enrolled agent started, device kept, to direct both ways",
        target=Target(median=0.5, p99=2.0),
        attempts=20,
        run=_kept,
    ),
    Benchmark(
        "start-rebooted",
        unit="s",
        what="enrolled agent started on a machine without a device, to direct both ways",
        target=Target(median=0.5, p99=2.0),
        attempts=20,
        run=_rebooted,
    ),
    Benchmark(
        "start-joined",
        unit="s",
        what="join started to direct both ways",
        target=Target(median=1.0),
        attempts=10,
        run=_joined,
    ),
)
