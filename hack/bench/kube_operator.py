"""What the operator costs at rest, and while a hundred agents a second publish another endpoint.

Bytes are counted on the way between each client and the API server, both directions, TLS included. One
informer is measured: what all agents of a cluster ask of an API server is as many times that.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from kubelab import Audited

from bench.kube_cluster import MESHES, NAMESPACE, SIZES, Cluster, Spent, cluster, end
from bench.meter import Meter
from bench.result import Benchmark, Row, Sample, Target
from scope.model import Kind
from scope.registry.follow import follow
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import Registry

REST_S = 60.0  # an operator's period: it plans everything anew and lists Leases twice in it
CALM_S = 10.0  # the meshes' counts are written once more, five seconds after the last change
STORM_S, PER_SECOND = 20.0, 100
KIB = 1024.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What happened within `seconds`: processor time, and bytes by whose they were."""

    seconds: float
    spent: Spent
    traffic: Mapping[str, int]

    def each_ms(self, per_second: float) -> float:
        """The operator's processor time for each of so many things a second."""
        return 1e3 * self.spent.operator / self.seconds / per_second

    def figures(self, when: str) -> Row:
        share = 100.0 / self.seconds
        return {
            f"operator's processor {when}, % of a core": share * self.spent.operator,
            f"API server's and etcd's {when}, % of a core": share * self.spent.server,
            **{f"{whose} {when}, KiB/s": n / KIB / self.seconds for whose, n in self.traffic.items()},
        }


def _memory(_: int) -> Iterator[Sample | Row]:
    for size in SIZES:
        row = _operated(size)
        yield row
        if size == SIZES[-1]:
            yield row["operator's memory after the storm, MiB"]


def _idle(_: int) -> Iterator[Sample | Row]:
    for size in SIZES:
        row = _operated(size)
        yield {name: row[name] for name in ("peers", "operator's processor at rest, % of a core")}
        if size == SIZES[-1]:
            yield row["operator's processor at rest, % of a core"]


@functools.cache
def _operated(size: int) -> Row:
    """Everything about an operator of so many peers: measured once, for both benchmarks that tell of it."""
    return asyncio.run(_operate(size))


async def _operate(size: int) -> Row:
    async with cluster(size) as here:
        await here.apply_meshes()
        await here.settle()
        with Meter(here.plane.url) as to_informer:
            async with _informer(here, to_informer.url):
                meters = {
                    "operator's bytes": here.to_operator,
                    "one informer's bytes": to_informer,
                    "all agents' writes": here.to_agents,
                }
                await asyncio.sleep(CALM_S)
                memory = here.operator.memory_mib
                mark = here.plane.audit.mark()
                rest, _ = await _stretch(here, meters, asyncio.sleep(REST_S))
                written = sum(map(_is_told, here.plane.audit.since(mark)))
                storm, rate = await _stretch(
                    here, meters, here.fleet.storm(per_second=PER_SECOND, seconds=STORM_S)
                )
                return {
                    "peers": size,
                    "operator's memory at rest, MiB": memory,
                    "operator's memory after the storm, MiB": here.operator.memory_mib,
                    **rest.figures("at rest"),
                    "operator's writes at rest, but Leases": written,
                    "changes in the storm, 1/s": rate,
                    **storm.figures("in the storm"),
                    "operator's processor for each change, ms": storm.each_ms(rate),
                }


def _is_told(request: Audited) -> bool:
    """Whether it is a write of the operator of which watchers hear."""
    is_operators = request.user.endswith(":scope-operator")
    return is_operators and request.is_write and request.resource != "leases"


async def _stretch(here: Cluster, meters: Mapping[str, Meter], during: Awaitable[T]) -> tuple[_Stretch, T]:
    before = {whose: meter.total for whose, meter in meters.items()}
    spent, began = here.spent(), time.monotonic()
    result = await during
    seconds = time.monotonic() - began
    traffic = {whose: meter.total - before[whose] for whose, meter in meters.items()}
    return _Stretch(seconds, here.spent().since(spent), traffic), result


@asynccontextmanager
async def _informer(here: Cluster, url: str) -> AsyncIterator[None]:
    """What an agent of the first mesh has of its registry, once it has listed everything."""
    mesh = next(iter(MESHES))
    own = next(name for name, peer in here.fleet.peers.items() if peer.spec.mesh == mesh)
    async with here.client(url=url) as client:
        registry = KubeRegistry(client, namespace=NAMESPACE, mesh=mesh, own=own)
        works = [asyncio.create_task(_follow(registry, kind)) for kind in (Kind.MESH, Kind.PEER)]
        try:
            yield
            for work in works:
                if work.done():
                    work.result()
        finally:
            await end(*works)


async def _follow(registry: Registry, kind: Kind) -> None:
    async for _ in follow(registry, kind, sleep=asyncio.sleep, uniform=random.uniform):
        pass


BENCHMARKS = (
    Benchmark(
        "kube-operator",
        unit="MiB",
        what="memory of an operator of 1,000 peers, and bytes at rest and in a storm",
        target=Target(worst=200.0),
        attempts=1,
        run=_memory,
    ),
    Benchmark(
        "kube-operator-idle",
        unit="% of a core",
        what="processor time of an operator of 1,000 peers at rest",
        target=Target(worst=1.0),
        attempts=1,
        run=_idle,
    ),
)
