"""The memory registry passes the conformance suite, keeps heartbeats, and ends its watches when it closes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from scope.model import Kind, Mesh, Peer, Revision
from scope.registry.memory import Create, MemoryRegistry, Store, Update
from scope.registry.port import Gone, NotFound, Put, Registry
from tests.unit.registry_conformance import MESH, RegistryConformance, created, peer


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def memory_registry(*, backlog: int = 64, clock: Clock | None = None) -> MemoryRegistry:
    numbers = itertools.count(1)
    clock = clock or Clock()
    return MemoryRegistry(
        "memory",
        wall=clock,
        now=clock,
        new_uid=lambda: f"uid-{next(numbers)}",
        new_signal=asyncio.Event,
        backlog=backlog,
    )


class TestMemoryRegistry(RegistryConformance):
    @asynccontextmanager
    async def opened(self, *, backlog: int) -> AsyncIterator[Registry]:
        yield memory_registry(backlog=backlog)


def test_a_heartbeat_ages_and_dies_with_its_peer() -> None:
    async def body() -> None:
        clock = Clock()
        registry = memory_registry(clock=clock)
        await created(registry, MESH)
        member: Peer = await created(registry, peer(1))
        await registry.heartbeat(member.meta.name)
        clock.at += 7.0
        assert registry.seconds_since_heartbeat() == {member.meta.name: 7.0}
        await registry.delete(Kind.PEER, member.meta.name, uid=member.meta.uid)
        assert registry.seconds_since_heartbeat() == {}

    asyncio.run(body())


def test_a_watch_ends_when_its_registry_closes() -> None:
    async def body() -> None:
        registry = memory_registry()
        facts = registry.watch(Kind.PEER, registry.store.revision)
        waiting = asyncio.ensure_future(anext(facts, None))
        await asyncio.sleep(0)
        registry.close_watches()
        assert await waiting is None
        assert not registry.store.listeners

    asyncio.run(body())


def test_a_store_works_without_an_event_loop() -> None:
    clock = Clock()
    store = Store("sim", wall=clock, new_uid=iter(["a", "b"]).__next__)
    woken: list[int] = []
    store.listeners.add(lambda: woken.append(store.number))
    mesh = store.write(Create(MESH))
    assert isinstance(mesh, Mesh)
    assert mesh.meta == replace(MESH.meta, uid="a", revision=1, created=1000.0)
    changed = store.write(Update(replace(mesh, spec=replace(mesh.spec, listen_port=7))))
    assert isinstance(changed, Mesh)
    assert store.write(Update(replace(mesh, spec=changed.spec))) == changed
    assert store.changes_since(Kind.MESH, Revision("sim", 0)) == (
        Put(mesh, Revision("sim", 1)),
        Put(changed, Revision("sim", 2)),
    )
    assert woken == [1, 2]
    with pytest.raises(NotFound):
        store.get(Kind.PEER, "home")


def test_the_backlog_is_bounded() -> None:
    store = Store("sim", wall=Clock(), new_uid=lambda: "u", backlog=10)
    mesh = store.write(Create(MESH))
    assert isinstance(mesh, Mesh)
    for port in range(1, 101):
        store.write(Update(replace(mesh, spec=replace(MESH.spec, listen_port=port))))
    assert len(store.changes_since(Kind.MESH, Revision("sim", 91))) == 10
    with pytest.raises(Gone):
        store.changes_since(Kind.MESH, Revision("sim", 90))
