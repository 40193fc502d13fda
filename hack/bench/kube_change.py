"""One agent publishes another endpoint: how long until all others know.

The informers of a mesh's agents are in this process, each with connections of its own. A sample is the time
from before the write until the last of them has told. What a thousand would take is the straight line through
what fewer take, since all share the processors with the API server here.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import cycle, islice

from bench.agents import BenchError
from bench.kube_cluster import MESHES, NAMESPACE, PATIENCE_S, SIZES, Cluster, cluster, end, signing_seed
from bench.result import Benchmark, Row, Sample, Target
from scope.credentials import PeerCredential
from scope.model import Endpoint, Kind, Peer, Resource
from scope.registry.follow import follow
from scope.registry.http import HttpRegistry
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import Deleted, Disconnected, Listed, Put

INFORMERS = 100  # the samples' number of them
CROWDS = (30, INFORMERS, 300)  # what a thousand are extrapolated from
FAR = 1_000
CHANGES = 100  # for a p99 that is not the worst
PAUSE_S = 0.05  # between two changes
OPENING = 8  # informers that list at once


def _change(attempts: int) -> Iterator[Sample | Row]:
    for size in SIZES:
        samples, rows = asyncio.run(_changes(size, attempts))
        yield from rows
        if size == SIZES[-1]:
            yield from samples


async def _changes(size: int, attempts: int) -> tuple[list[float], list[Row]]:
    """The samples with `INFORMERS` informers, and what is in the table of all there were."""
    measured: dict[int, list[float]] = {}
    rows: list[Row] = []
    async with cluster(size) as here:
        await here.apply_meshes()
        await here.settle()
        async with _Audience(here, from_gateway=False) as audience:
            for crowd in CROWDS if size == SIZES[-1] else (INFORMERS,):
                await audience.grow(crowd)
                measured[crowd], figures = await _spread(here, audience, attempts)
                rows.append({"peers": size, "informers": crowd, **figures})
        if len(measured) > 1:
            rows.append({"peers": size, "informers, extrapolated": FAR, **_extrapolated(measured)})
        async with _Audience(here, from_gateway=True) as audience:
            crowd = await audience.grow(INFORMERS)
            _, figures = await _spread(here, audience, attempts)
            rows.append({"peers": size, "fed by the gateway": crowd, **figures})
    return measured[INFORMERS], rows


async def _spread(here: Cluster, audience: _Audience, attempts: int) -> tuple[list[float], Row]:
    """How long each of so many changes, one after the other, takes until all know it."""
    before = here.spent()
    samples = []
    for name in islice(cycle(audience.members), attempts):
        endpoint = here.fleet.next_endpoint()
        audience.expect(name, endpoint)
        began = time.monotonic()
        await here.fleet.publish(name, endpoint)
        samples.append(await audience.all_know() - began)
        await asyncio.sleep(PAUSE_S)
    spent = here.spent().since(before)
    return samples, {
        "median, s": statistics.median(samples),
        "p99, s": Target().quantile(samples, 0.99),
        "operator's processor for each change, ms": 1e3 * spent.operator / attempts,
        "API server's and etcd's for each change, ms": 1e3 * spent.server / attempts,
        "informers' for each change, ms": 1e3 * spent.agents / attempts,
    }


def _extrapolated(measured: dict[int, list[float]]) -> Row:
    crowds = list(measured)
    figures = {
        "median, s": [statistics.median(samples) for samples in measured.values()],
        "p99, s": [Target().quantile(samples, 0.99) or 0.0 for samples in measured.values()],
    }
    row: dict[str, Sample] = {}
    for name, values in figures.items():
        slope, start = statistics.linear_regression(crowds, values)
        row[name] = start + slope * FAR
    return row


class _Audience:
    """Informers of the agents of one mesh, and who of them does not know yet what is expected."""

    def __init__(self, here: Cluster, *, from_gateway: bool) -> None:
        mesh = next(iter(MESHES))
        self._here = here
        self._from_gateway = from_gateway
        self.members = sorted(name for name, peer in here.fleet.peers.items() if peer.spec.mesh == mesh)
        self._mesh = mesh
        self._informers: list[asyncio.Task[None]] = []
        self._listed: set[tuple[int, Kind]] = set()
        self._expected: tuple[str, Endpoint] | None = None
        self._waiting: set[int] = set()
        self._last = 0.0
        self._all_know = asyncio.Event()

    async def __aenter__(self) -> _Audience:
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(*self._informers)

    async def grow(self, size: int) -> int:
        """Open informers until there are so many, each of which has listed both kinds: how many there are.

        A gateway serves one stream to each peer, so from it no more than those.
        """
        size = min(size, len(self.members)) if self._from_gateway else size
        deadline = time.monotonic() + PATIENCE_S
        while len(self._informers) < size:
            for _ in range(min(OPENING, size - len(self._informers))):
                self._informers.append(asyncio.create_task(self._inform(len(self._informers))))
            while len(self._listed) < 2 * len(self._informers):
                self._check()
                if time.monotonic() > deadline:
                    raise BenchError(f"{size} informers have not listed within {PATIENCE_S:.0f} s")
                await asyncio.sleep(0.01)
        return size

    def expect(self, name: str, endpoint: Endpoint) -> None:
        """Wait from now on until all know this endpoint of that peer."""
        self._expected = (name, endpoint)
        self._waiting = set(range(len(self._informers)))
        self._all_know.clear()

    async def all_know(self) -> float:
        """When the last of them came to know it. Raises BenchError."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._all_know.wait()
        except TimeoutError:
            self._check()
            raise BenchError(f"{len(self._waiting)} informers do not hear of a change") from None
        return self._last

    def _check(self) -> None:
        for informer in self._informers:
            if informer.done():
                informer.result()

    async def _inform(self, number: int) -> None:
        name = self.members[number % len(self.members)]
        async with self._registry(name) as registry, asyncio.TaskGroup() as kinds:
            for kind in (Kind.MESH, Kind.PEER):
                kinds.create_task(self._follow(registry, kind, number))

    @asynccontextmanager
    async def _registry(self, name: str) -> AsyncIterator[KubeRegistry | HttpRegistry]:
        """What the agent of that peer has for its registry."""
        here = self._here
        if not self._from_gateway:
            async with here.client() as client:
                yield KubeRegistry(client, namespace=NAMESPACE, mesh=self._mesh, own=name)
            return
        if here.operator.gateway is None:
            raise BenchError("the gateway does not serve")
        uid, pin = here.fleet.peers[name].meta.uid, await here.gateway_pin()
        credential = PeerCredential(name, uid, await here.registry_id(), signing_seed(name))
        async with HttpRegistry(
            here.operator.gateway, pin=pin, credential=credential, for_agent=True
        ) as registry:
            yield registry

    async def _follow(self, registry: KubeRegistry | HttpRegistry, kind: Kind, number: int) -> None:
        async for fact in follow(registry, kind, sleep=asyncio.sleep, uniform=random.uniform):
            match fact:
                case Listed(resources=resources):
                    self._listed.add((number, kind))
                    for resource in resources:
                        self._know(resource, number)
                case Put(resource):
                    self._know(resource, number)
                case Deleted() | Disconnected():
                    pass

    def _know(self, resource: Resource, number: int) -> None:
        if self._expected is None or resource.meta.name != self._expected[0]:
            return
        if not isinstance(resource, Peer) or resource.report is None:
            return
        if any(each.endpoint == self._expected[1] for each in resource.report.endpoints):
            self._waiting.discard(number)
            if not self._waiting and not self._all_know.is_set():
                self._last = time.monotonic()
                self._all_know.set()


BENCHMARKS = (
    Benchmark(
        "kube-change",
        unit="s",
        what="an endpoint changes among 1,000 peers, until 100 informers know it",
        target=Target(p99=1.0),
        attempts=CHANGES,
        run=_change,
    ),
)
