"""The reconciler keeps a running registry as it should be, through conflicts, outages and lost watches."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from scope_operator.reconcile import Reconciler

from scope.model import Kind, Peer, Resource, Revision, StatusPart
from scope.registry.memory import Change, MemoryRegistry
from scope.registry.port import Gone, Unavailable
from tests.unit.registry_conformance import MESH, created, peer, report, resource_of


class Faulty(MemoryRegistry):
    """A memory registry that fails the next so many calls of a verb."""

    def __init__(self) -> None:
        numbers = itertools.count(1)
        super().__init__(
            "memory",
            wall=lambda: 1_700_000_000.0,
            now=time.monotonic,
            new_uid=lambda: f"uid-{next(numbers)}",
            new_signal=asyncio.Event,
        )
        self.failing: dict[str, int] = {}
        self.before_write: Callable[[str], Awaitable[None]] | None = None
        self.writes: list[str] = []

    def _fail(self, verb: str, error: Exception) -> None:
        if self.failing.get(verb, 0) > 0:
            self.failing[verb] -= 1
            raise error

    async def watch(self, kind: Kind, since: Revision) -> AsyncIterator[Change]:
        self._fail("watch", Gone("too old"))
        async for change in super().watch(kind, since):
            yield change
            self._fail("watch", Unavailable("the connection broke"))

    async def update_status(
        self, kind: Kind, name: str, part: StatusPart, *, uid: str, if_revision: int | None = None
    ) -> Resource:
        self.writes.append(name)
        self._fail("update_status", Unavailable("the disk is full"))
        if self.before_write is not None:
            await self.before_write(name)
        return await super().update_status(kind, name, part, uid=uid, if_revision=if_revision)


@asynccontextmanager
async def reconciled(registry: Faulty) -> AsyncIterator[Reconciler]:
    """A reconciler that runs beside its block; backoffs are a hundredth of their length."""
    reconciler = Reconciler(
        registry,
        liveness=registry,
        now=time.monotonic,
        wall=lambda: 1_700_000_000.0,
        uniform=lambda low, high: low / 100,
    )
    task = asyncio.create_task(reconciler.follow())
    try:
        yield reconciler
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def addressed(registry: Faulty, name: str) -> Peer:
    """The peer once it has its addresses."""
    since = registry.store.revision
    found = await registry.get(Kind.PEER, name)
    if isinstance(found, Peer) and found.assignment.addresses:
        return found
    async for fact in MemoryRegistry.watch(registry, Kind.PEER, since):
        found = resource_of(fact)
        if isinstance(found, Peer) and found.meta.name == name and found.assignment.addresses:
            return found
    raise AssertionError("the registry closed")


def run(body: Callable[[Faulty, Reconciler], Awaitable[None]], *, registry: Faulty | None = None) -> None:
    async def within() -> None:
        used = registry or Faulty()
        async with asyncio.timeout(60), reconciled(used) as reconciler:
            await body(used, reconciler)

    asyncio.run(within())


def test_a_new_peer_has_its_addresses_within_milliseconds() -> None:
    async def body(registry: Faulty, reconciler: Reconciler) -> None:
        await created(registry, MESH)
        await addressed(registry, (await created(registry, peer(1))).meta.name)
        took = []
        for seed in range(2, 12):
            began = time.perf_counter()
            await addressed(registry, (await created(registry, peer(seed))).meta.name)
            took.append(time.perf_counter() - began)
        assert min(took) < 0.02
        assert reconciler.health.listed
        assert reconciler.health.last_error == ""
        assert reconciler.health.trouble == ""

    run(body)


def test_a_write_that_meets_another_is_planned_anew_and_undoes_nothing() -> None:
    async def body(registry: Faulty, reconciler: Reconciler) -> None:
        await created(registry, MESH)
        meddled: list[str] = []

        async def meddle(name: str) -> None:
            if name != "home" and name not in meddled:
                meddled.append(name)
                stored = await registry.get(Kind.PEER, name)
                await MemoryRegistry.update_status(
                    registry, Kind.PEER, name, report(1, port=9), uid=stored.meta.uid
                )

        registry.before_write = meddle
        found = await addressed(registry, (await created(registry, peer(1))).meta.name)
        assert meddled == [found.meta.name]
        assert found.report == report(1, port=9)

    run(body)


def test_an_outage_of_the_disk_is_said_and_outlasted() -> None:
    async def body(registry: Faulty, reconciler: Reconciler) -> None:
        await created(registry, MESH)
        registry.failing["update_status"] = 6
        await addressed(registry, (await created(registry, peer(1))).meta.name)
        health = reconciler.health
        assert health.last_error == "the disk is full"
        assert health.error_age is not None
        assert health.trouble == "the reconciler cannot write: the disk is full"

    run(body)


@pytest.mark.parametrize("broken", [1, 4])
def test_a_watch_that_breaks_is_followed_by_a_list(broken: int) -> None:
    registry = Faulty()
    registry.failing["watch"] = broken

    async def body(registry: Faulty, reconciler: Reconciler) -> None:
        await created(registry, MESH)
        for seed in range(1, 5):
            await addressed(registry, (await created(registry, peer(seed))).meta.name)
        assert registry.failing["watch"] == 0

    run(body, registry=registry)


def test_a_peer_that_is_deleted_while_it_is_written_is_forgotten() -> None:
    async def body(registry: Faulty, reconciler: Reconciler) -> None:
        await created(registry, MESH)
        victim = await created(registry, peer(1))

        async def delete(name: str) -> None:
            if name == victim.meta.name and registry.store.find(Kind.PEER, name) is not None:
                await registry.delete(Kind.PEER, name, uid=victim.meta.uid)

        registry.before_write = delete
        await addressed(registry, (await created(registry, peer(2))).meta.name)
        assert [each.meta.name for each in registry.store.list(Kind.PEER).resources] == [peer(2).meta.name]

    run(body)


def test_a_thousand_joins_at_once_each_get_an_address_of_their_own() -> None:
    async def body(registry: Faulty, reconciler: Reconciler) -> None:
        await created(registry, MESH)
        made = [await created(registry, peer(seed)) for seed in range(1, 1001)]
        found = [await addressed(registry, each.meta.name) for each in made]
        assert len({each.assignment.addresses[0] for each in found}) == 1000
        # One write each, none twice: the mesh's own are not counted.
        assert len([name for name in registry.writes if name != "home"]) == 1000

    run(body)


def test_two_reconcilers_of_one_registry_give_each_peer_one_address() -> None:
    async def body(registry: Faulty, reconciler: Reconciler) -> None:
        async with reconciled(registry):
            await created(registry, MESH)
            made = [await created(registry, peer(seed)) for seed in range(1, 101)]
            found = [await addressed(registry, each.meta.name) for each in made]
            assert len({each.assignment.addresses for each in found}) == 100

    run(body)
