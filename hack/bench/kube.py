"""How the registry on Kubernetes grows: with 100, 300 and 1,000 peers of two meshes, on a real API server.

The samples of each benchmark are those of the largest size; its table has all of them. Each size has a
control plane of its own, so none finds the traces of another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from bench import kube_change, kube_operator
from bench.kube_cluster import CLUSTER, MESHES, SIZES, Spent, cluster
from bench.result import Benchmark, Row, Sample, Target

AWAY_S = 2.0  # between the operator's end and its next start
FIRST_MESH = next(iter(MESHES))


def _apply(attempts: int) -> Iterator[Sample | Row]:
    for size in SIZES:
        is_largest = size == SIZES[-1]
        for attempt in range(attempts if is_largest else 1):
            seconds, row = asyncio.run(_apply_once(size))
            if attempt == 0:
                yield row
            if is_largest:
                yield seconds


async def _apply_once(size: int) -> tuple[float, Row]:
    async with cluster(size) as here:
        before, began = here.spent(), time.monotonic()
        await here.apply_meshes()
        await here.await_addressed()
        seconds = time.monotonic() - began
        return seconds, {
            "peers": size,
            "from apply to all addressed, s": seconds,
            "the same for each peer, ms": 1e3 * seconds / size,
            **_processor(here.spent().since(before), per=size, of="peer"),
        }


def _restart(attempts: int) -> Iterator[Sample | Row]:
    for size in SIZES:
        is_largest = size == SIZES[-1]
        samples, row = asyncio.run(_restarts(size, attempts if is_largest else 1))
        yield row
        if is_largest:
            yield from samples


async def _restarts(size: int, attempts: int) -> tuple[list[float], Row]:
    samples: list[float] = []
    row: Row = {}
    async with cluster(size) as here:
        await here.apply_meshes()
        await here.settle()
        for attempt in range(attempts):
            await here.operator.program.stop()
            # Work that came while it was away: being ready is one thing, having done it another.
            await here.add_node(node := f"late-{attempt}")
            await asyncio.sleep(AWAY_S)
            began = time.monotonic()
            await here.operator.start()
            ready = time.monotonic() - began
            late, fleet = f"{FIRST_MESH}.{CLUSTER}.{node}", here.fleet
            await here.until(lambda: late in fleet.addressed, f"{late} has an address")  # noqa: B023
            addressed = time.monotonic() - began
            await here.await_steady()
            samples.append(time.monotonic() - began)
            row = row or {
                "peers": size,
                "to ready, s": ready,
                "to the address of a Node that came meanwhile, s": addressed,
                "to nothing left to do now, s": samples[-1],
                "operator's processor, s": here.operator.program.cpu_seconds(),
            }
    return samples, row


def _processor(spent: Spent, *, per: int, of: str) -> Row:
    return {
        f"operator's processor for each {of}, ms": 1e3 * spent.operator / per,
        f"API server's and etcd's for each {of}, ms": 1e3 * spent.server / per,
        f"simulated agents' for each {of}, ms": 1e3 * spent.agents / per,
    }


BENCHMARKS = (
    Benchmark(
        "kube-apply",
        unit="s",
        what="from `kubectl apply` of two meshes to an address for each of 1,000 Nodes",
        target=Target(worst=20.0),
        attempts=3,
        run=_apply,
    ),
    *kube_change.BENCHMARKS,
    *kube_operator.BENCHMARKS,
    Benchmark(
        "kube-restart",
        unit="s",
        what="operator of 1,000 peers restarted, until a Node that came meanwhile is a peer",
        target=Target(worst=10.0),
        attempts=3,
        run=_restart,
    ),
)
