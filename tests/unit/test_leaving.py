"""Nodes that leave before Scope is taken out of their cluster: who is told, awaited and named."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest
from scope_operator.kube import leaving
from scope_operator.kube.leaving import LeaveConfig, describe, judge, wait_until_left

from scope.model import Kind, Meta, Peer, PeerReport, PeerSpec
from scope.registry.http import HttpRegistry
from scope.registry.memory import MemoryRegistry
from scope.registry.port import Listed, Registry, Unavailable
from tests.unit.cluster_fixture import JoiningCluster, invite
from tests.unit.gateway_fixture import REGISTRY, REGISTRY_KEY, enrolled, gateway
from tests.unit.registry_conformance import MESH, created
from tests.unit.test_gateway_clusters import machine_keys

CONFIG = LeaveConfig(cluster="west", namespace="scope-system", patience=60.0, is_joined=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "LOOK_SECONDS", 0.01)


def peer(node: str, *, cluster: str = "west") -> Peer:
    spec = PeerSpec("home", cluster=cluster, node_name=node, node_uid=f"uid-of-{node}")
    return Peer(Meta(f"home.{cluster}.{node}"), spec)


async def report(registry: Registry, name: str, number: int, *, left: bool = False) -> None:
    """What an agent writes."""
    found = await registry.get(Kind.PEER, name)
    said = PeerReport(machine_keys(number), left=left)
    await registry.update_status(Kind.PEER, name, said, uid=found.meta.uid)


async def play_agent(registry: Registry, name: str, number: int) -> None:
    """Leave once it is told to, as an agent does."""
    while True:
        found = await registry.get(Kind.PEER, name)
        assert isinstance(found, Peer)
        if found.spec.leaving:
            break
        await asyncio.sleep(0.002)
    await report(registry, name, number, left=True)


class Lossy(MemoryRegistry):
    """A registry that does not answer the first list."""

    def __init__(self) -> None:
        numbers = itertools.count(1)
        super().__init__(
            "lossy",
            wall=lambda: 1.0,
            now=lambda: 0.0,
            new_uid=lambda: f"uid-{next(numbers)}",
            new_signal=asyncio.Event,
        )
        self.is_lost = True

    async def list(self, kind: Kind) -> Listed:
        if self.is_lost:
            self.is_lost = False
            raise Unavailable("not now")
        return await super().list(kind)


def ticking(step: float = 1.0) -> itertools.count[float]:
    return itertools.count(0.0, step)


def test_all_nodes_of_the_cluster_are_told_and_waited_for_and_no_others() -> None:
    async def body() -> None:
        registry = Lossy()
        await registry.create(MESH)
        for number, each in enumerate((peer("n1"), peer("n2"), peer("n1", cluster="east")), start=1):
            await created(registry, each)
            await report(registry, each.meta.name, number)
        await created(registry, peer("n3"))  # its agent never came
        await created(registry, Peer(Meta("home.external.nas"), PeerSpec("home")))
        agents = [
            asyncio.create_task(play_agent(registry, f"home.west.n{number}", number)) for number in (1, 2)
        ]
        async with asyncio.timeout(60):
            assert await wait_until_left(registry, CONFIG, now=lambda: 0.0) == ()
            await asyncio.gather(*agents)
        peers = [each for each in (await registry.list(Kind.PEER)).resources if isinstance(each, Peer)]
        assert {each.meta.name for each in peers if each.spec.leaving} == {
            "home.west.n1",
            "home.west.n2",
            "home.west.n3",
        }

    asyncio.run(body())


def test_who_has_not_left_in_time_is_named_with_what_is_known_of_its_agent() -> None:
    async def body() -> None:
        registry = Lossy()
        await registry.create(MESH)
        for number, node in enumerate(("n1", "n2"), start=1):
            await created(registry, peer(node))
            await report(registry, f"home.west.{node}", number)
        agent = asyncio.create_task(play_agent(registry, "home.west.n1", 1))
        clock = ticking()

        async def later() -> tuple[Peer, ...]:
            return await wait_until_left(registry, CONFIG, now=lambda: next(clock))

        async with asyncio.timeout(60):
            staying = await later()
            await agent
        assert [each.meta.name for each in staying] == ["home.west.n2"]
        assert describe(staying) == "  Node n2, mesh home: its agent is not heard"
        heard = replace(staying[0], assignment=replace(staying[0].assignment, online=True))
        assert describe([heard]).endswith("its agent runs, and has not taken it down")

    asyncio.run(body())


def test_a_peer_that_comes_back_meanwhile_is_told_again() -> None:
    told = judge([peer("n1")], cluster="west")
    assert [each.meta.name for each in told.unmarked] == ["home.west.n1"]
    marked = replace(peer("n1"), spec=replace(peer("n1").spec, leaving=True))
    assert judge([marked], cluster="west").unmarked == ()


def test_a_joined_cluster_has_its_nodes_leave_through_the_gateway() -> None:
    west = JoiningCluster()

    async def body() -> None:
        async with asyncio.timeout(60), gateway() as running:
            await enrolled(running.registry, 1)
            await invite(running.registry, wall=running.clock())
            async with HttpRegistry(running.url, pin=None, credential=None) as client:
                await client.join_cluster(west.document(registry=REGISTRY_KEY))
            async with HttpRegistry(running.url, pin=None, credential=west.credential(REGISTRY)) as client:
                await client.create(peer("n1"))
                await report(running.registry, "home.west.n1", 1)
                agent = asyncio.create_task(play_agent(running.registry, "home.west.n1", 1))
                assert await wait_until_left(client, CONFIG, now=lambda: 0.0) == ()
                await agent

    asyncio.run(body())
