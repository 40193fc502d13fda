"""The plan for a cluster's Nodes over a gateway, as the operator of a joined cluster runs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from scope_operator.plan.nodes import Node, NodeDeleted, NodePeers, NodePut, NodesListed
from scope_operator.reconcile import Done, Reconciler

from scope.model import Kind, LabelSelector, Mesh, Peer, PeerReport
from scope.registry.http import HttpRegistry
from tests.unit.cluster_fixture import JoiningCluster, invite
from tests.unit.gateway_fixture import REGISTRY, REGISTRY_KEY, Running, enrolled, gateway
from tests.unit.test_gateway import until
from tests.unit.test_gateway_clusters import machine_keys

WEST = JoiningCluster()


@dataclass
class Operating:
    """A joined cluster's reconciler beside the gateway, and what it wrote."""

    running: Running
    reconciler: Reconciler
    done: list[Done]

    def nodes(self) -> set[str]:
        """The Nodes that have a peer in the registry now."""
        peers = self.running.registry.store.list(Kind.PEER).resources
        return {
            peer.spec.node_name for peer in peers if isinstance(peer, Peer) and peer.spec.cluster == "west"
        }


def node(name: str, revision: int = 1, *, uid: str = "", **labels: str) -> Node:
    return Node(name, uid or f"uid-of-{name}", labels, revision)


def operating(nodes: tuple[Node, ...], body: Callable[[Operating], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), gateway() as running:
            await enrolled(running.registry, 1)
            await invite(running.registry, wall=running.clock())
            async with HttpRegistry(running.url, pin=None, credential=None) as client:
                await client.join_cluster(WEST.document(registry=REGISTRY_KEY))
            done: list[Done] = []

            async def listed() -> NodesListed:
                return NodesListed(nodes, 1, time.monotonic())

            async with HttpRegistry(running.url, pin=None, credential=WEST.credential(REGISTRY)) as client:
                reconciler = Reconciler(
                    client,
                    liveness=None,
                    now=time.monotonic,
                    wall=running.clock,
                    uniform=lambda low, high: low,
                    nodes=NodePeers(cluster="west", uid=WEST.uid),
                    list_nodes=listed,
                    assigns=False,
                    told=done.append,
                )
                await reconciler.list_all()
                following = asyncio.create_task(reconciler.follow())
                try:
                    await body(Operating(running, reconciler, done))
                finally:
                    following.cancel()
                    await asyncio.wait([following])

    asyncio.run(run())


def test_every_node_has_a_peer_and_nothing_else_is_written() -> None:
    async def body(west: Operating) -> None:
        await until(lambda: west.nodes() == {"n1", "n2"})
        peer = await west.running.registry.get(Kind.PEER, "home.west.n1")
        assert isinstance(peer, Peer)
        assert (peer.spec.node_uid, peer.report) == ("uid-of-n1", None)
        await until(lambda: len(west.done) == 2)
        assert [each.error for each in west.done] == [None, None]

    operating((node("n1"), node("n2")), body)


def test_a_deleted_nodes_peer_goes_and_a_node_made_anew_has_a_new_one() -> None:
    async def body(west: Operating) -> None:
        await until(lambda: west.nodes() == {"n1", "n2"})
        before = await west.running.registry.get(Kind.PEER, "home.west.n1")
        west.reconciler.take(NodeDeleted(node("n1", 2)))
        await until(lambda: west.nodes() == {"n2"})
        west.reconciler.take(NodePut(node("n1", 3, uid="made-anew")))
        await until(lambda: west.nodes() == {"n1", "n2"})
        peer = await west.running.registry.get(Kind.PEER, "home.west.n1")
        assert isinstance(peer, Peer)
        assert peer.spec.node_uid == "made-anew"
        assert peer.meta.uid != before.meta.uid

    operating((node("n1"), node("n2")), body)


def test_a_node_that_takes_the_name_of_another_at_once_has_a_new_peer() -> None:
    async def body(west: Operating) -> None:
        await until(lambda: west.nodes() == {"n1"})
        west.reconciler.take(NodePut(node("n1", 2, uid="made-anew")))

        def renewed() -> bool:
            peer = west.running.registry.store.find(Kind.PEER, "home.west.n1")
            return isinstance(peer, Peer) and peer.spec.node_uid == "made-anew"

        await until(renewed)

    operating((node("n1"),), body)


def test_the_meshs_selector_is_followed() -> None:
    async def body(west: Operating) -> None:
        await until(lambda: west.nodes() == {"n1", "n2"})
        mesh = await west.running.registry.get(Kind.MESH, "home")
        assert isinstance(mesh, Mesh)
        selector = LabelSelector(match_labels=(("zone", "a"),))
        await west.running.registry.update(replace(mesh, spec=replace(mesh.spec, node_selector=selector)))
        await until(lambda: west.nodes() == {"n1"})
        west.reconciler.take(NodePut(node("n2", 2, zone="a")))
        await until(lambda: west.nodes() == {"n1", "n2"})

    operating((node("n1", zone="a"), node("n2")), body)


def test_a_peer_that_somebody_deleted_comes_back_and_what_others_write_stays() -> None:
    async def body(west: Operating) -> None:
        registry = west.running.registry
        await until(lambda: west.nodes() == {"n1"})
        peer = await registry.get(Kind.PEER, "home.west.n1")
        await registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
        await until(lambda: west.nodes() == {"n1"} and len(west.done) == 2)
        again = await registry.get(Kind.PEER, "home.west.n1")
        report = PeerReport(machine_keys(1), direct=1)
        written = await registry.update_status(Kind.PEER, again.meta.name, report, uid=again.meta.uid)
        west.reconciler.take(NodePut(node("n2", 2)))
        await until(lambda: west.nodes() == {"n1", "n2"})
        assert await registry.get(Kind.PEER, "home.west.n1") == written

    operating((node("n1"),), body)
