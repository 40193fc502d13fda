"""Has the Nodes of a cluster leave their meshes, before Scope is taken out of it: `scope-operator --leave`.

Each ScopePeer of this cluster's Nodes is told to leave (`spec.leaving`). Its agent takes down what the mesh
has on the Node, and the ScopePeer says so (`status.left`); that is waited for, and whoever has not said it in
time is named. A ScopePeer whose agent never came has nothing to take down.

It looks again and again, so that a ScopePeer which is made meanwhile, or which an operator that starts just
then lets come back, is told as well. Nothing is deleted: the next installation lets all of them come back
with their addresses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from scope.model import Kind, Peer, Resource
from scope.registry.kube.access import Access
from scope.registry.kube.client import KubeClient
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import Conflict, NotFound, Registry, Unavailable
from scope_operator.kube.cluster import identity
from scope_operator.kube.joined import connect, read_membership

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between lists: agents need some seconds each, and a list of a thousand peers has 3 MB


@dataclass(frozen=True, slots=True)
class LeaveConfig:
    """What the command line said; `patience` in seconds. `is_joined`: the registry is another cluster's."""

    cluster: str
    namespace: str
    patience: float
    is_joined: bool


@dataclass(frozen=True, slots=True)
class Leaving:
    """How far the peers of a cluster's Nodes are."""

    unmarked: tuple[Peer, ...]  # to be told
    staying: tuple[Peer, ...]  # whose agents have not said that they left
    left: int


def judge(resources: Iterable[Resource], *, cluster: str) -> Leaving:
    """Whom of these is to be told, and who has not left yet."""
    own = [
        each
        for each in resources
        if isinstance(each, Peer)
        and (each.spec.cluster, each.assignment.tombstone) == (cluster, None)
        and each.spec.node_name
    ]
    unmarked = tuple(peer for peer in own if not peer.spec.leaving)
    staying = tuple(peer for peer in own if peer.report is not None and not peer.report.left)
    return Leaving(unmarked, staying, left=len(own) - len(staying))


def describe(staying: Iterable[Peer]) -> str:
    """What a person reads of those that did not leave, a line for each."""
    return "\n".join(
        f"  Node {peer.spec.node_name}, mesh {peer.spec.mesh}: "
        + (
            "its agent runs, and has not taken it down"
            if peer.assignment.online
            else "its agent is not heard"
        )
        for peer in sorted(staying, key=lambda each: each.meta.name)
    )


async def leave(access: Access, config: LeaveConfig) -> tuple[Peer, ...]:
    """Have all leave; those that did not within the patience. Raises ConfigError, RegistryError."""
    async with KubeClient(access) as client, _registry(client, config) as registry:
        if registry is None:
            log.info("leaving.nowhere: this cluster has joined no mesh")
            return ()
        return await wait_until_left(registry, config, now=time.monotonic)


async def wait_until_left(
    registry: Registry, config: LeaveConfig, *, now: Callable[[], float]
) -> tuple[Peer, ...]:
    """As `leave`, over any Registry; `now` is monotonic."""
    deadline = now() + config.patience
    staying: tuple[Peer, ...] = ()
    while True:
        try:
            listed = await registry.list(Kind.PEER)
        except NotFound:
            log.info("leaving.nobody: the cluster knows no ScopePeer")
            return ()
        except Unavailable as error:
            log.warning("leaving.unanswered error=%s", error)
            if now() >= deadline:
                raise
        else:
            found = judge(listed.resources, cluster=config.cluster)
            await _tell(registry, found.unmarked)
            if not found.unmarked and found.staying != staying:
                log.info("leaving.waiting staying=%d left=%d", len(found.staying), found.left)
            staying = found.staying
            if not staying and not found.unmarked:
                log.info("leaving.done left=%d", found.left)
                return ()
            if now() >= deadline:
                return staying
        await asyncio.sleep(LOOK_SECONDS)


async def _tell(registry: Registry, peers: Iterable[Peer]) -> None:
    for peer in peers:
        asked = Peer(peer.meta, replace(peer.spec, leaving=True))
        try:
            await registry.update(asked, if_revision=peer.meta.revision)
        except (Conflict, NotFound, Unavailable) as error:
            log.info("leaving.again peer=%s error=%s", peer.meta.name, error)
        else:
            log.info("leaving.told peer=%s", peer.meta.name)


@asynccontextmanager
async def _registry(client: KubeClient, config: LeaveConfig) -> AsyncIterator[Registry | None]:
    """Where this cluster's peers are; None where it has joined none."""
    uid = await identity(client)
    if not config.is_joined:
        yield KubeRegistry(client, namespace=config.namespace, registry_id=uid)
        return
    membership = await read_membership(client, config.namespace)
    if membership is None:
        yield None
        return
    async with connect(membership, cluster=config.cluster, uid=uid) as registry:
        yield registry
