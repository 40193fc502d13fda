"""The agent ends and starts again while packets flow: how many are lost.

500 numbered datagrams a second in each direction, from before the end until the new process says that the
path is direct, and three seconds on.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from meshlab import Member

from bench.agents import BenchError, World, pair
from bench.packets import Stream
from bench.result import Benchmark, Sample, Target

RATE = 500.0  # packets a second each way
BEFORE_S = 1.0
AWAY_S = 1.0  # between the end of one process and the start of the next
AFTER_S = 3.0

ROOT = Path(__file__).parents[2]
PACKAGES = ("scope", "nodeagent/scope_agent", "nodeagent/scope_dataplane")


def _killed(attempts: int) -> Iterator[Sample]:
    return _outages(attempts, lambda _, member: _restart(member, signal.SIGKILL))


def _restarted(attempts: int) -> Iterator[Sample]:
    return _outages(attempts, lambda _, member: _restart(member, signal.SIGTERM))


def _upgraded(attempts: int) -> Iterator[Sample]:
    def upgrade(world: World, member: Member) -> None:
        target = _another_installation(world.lab.directory)
        member.kill(signal.SIGTERM)
        time.sleep(AWAY_S)
        with member.log.open("a") as log:
            member.process = member.machine.popen(
                [sys.executable, "-m", "scope_agent", "run"],
                env={**os.environ, "PYTHONPATH": str(target)},
                stdout=log,
                stderr=log,
            )

    return _outages(attempts, upgrade)


def _outages(attempts: int, end_and_start: Callable[[World, Member], None]) -> Iterator[Sample]:
    with pair() as (world, first, second):
        addresses = (world.addresses[first.name], world.addresses[second.name])
        for _ in range(attempts):
            stream = Stream(first.machine, second.machine, addresses, rate=RATE)
            time.sleep(BEFORE_S)
            end_and_start(world, first)
            if world.await_direct(first, second) is None:
                raise BenchError("the agent was started again and found no direct path")
            time.sleep(AFTER_S)
            _, lost = stream.finish()
            yield float(lost)


def _restart(member: Member, number: signal.Signals) -> None:
    member.kill(number)
    time.sleep(AWAY_S)
    member.run()


def _another_installation(directory: Path) -> Path:
    """A copy of the packages in a directory of its own: what an upgrade puts in the place of the old one."""
    target = directory / f"installation-{time.monotonic_ns()}"
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, target / Path(package).name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return target


def _benchmark(name: str, what: str, run: Callable[[int], Iterator[Sample]]) -> Benchmark:
    return Benchmark(name, unit="packets", what=what, target=Target(worst=0.0), attempts=5, run=run)


BENCHMARKS = (
    _benchmark("agent-killed", "lost while the agent is killed and started again", _killed),
    _benchmark("agent-restarted", "lost while the agent is stopped and started again", _restarted),
    _benchmark("agent-upgraded", "lost while the agent is replaced by another installation", _upgraded),
)
