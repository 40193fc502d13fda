"""The operator as one process: it watches always, and writes while it is elected.

Every replica keeps its view of the cluster, so the next leader starts at once; it lists everything anew
before its first write, because what its predecessor wrote last may not have reached its watch.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from scope.model import ConfigError, Kind, Mesh, Peer
from scope.registry.kube.access import Access
from scope.registry.kube.client import KubeClient
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import RegistryError
from scope_operator.gateway import face, tls
from scope_operator.gateway.advertised import Advertised
from scope_operator.gateway.face import Face, FaceConfig, UsersCertificate, Works, announce
from scope_operator.gateway.feed import Feed
from scope_operator.gateway.joining import public_half
from scope_operator.kube import replica
from scope_operator.kube.cluster import identity, list_nodes, require_resources
from scope_operator.kube.declared import declare_mesh
from scope_operator.kube.gateway import (
    GatewayKeys,
    GatewayRegistry,
    ensure_keys,
    find_keys,
    tell_administrator,
)
from scope_operator.kube.heartbeats import Heartbeats
from scope_operator.kube.memory import private_directory
from scope_operator.kube.news import Newsroom, Overheard
from scope_operator.kube.replica import Replica, end, persist
from scope_operator.kube.report import Report
from scope_operator.kube.services import Services
from scope_operator.kube.watching import Fact
from scope_operator.plan.nodes import NodePeers
from scope_operator.reconcile import Done, Reconciler

log = logging.getLogger(__name__)

KEYS_SECONDS = 0.5  # between looks of a replica that waits for the leader to make the gateway's keys


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Where the gateway listens, and where peers find it."""

    listen: tuple[tuple[str, int], ...]
    reflector_ports: tuple[int, ...]
    advertise: tuple[Advertised, ...] = ()
    certificate: UsersCertificate | None = None


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """What the command line said. Without `gateway` only Nodes are peers; `mesh` is one to apply."""

    cluster: str
    namespace: str
    gateway: GatewayConfig | None
    metrics_address: str
    metrics_port: int
    mesh: Mapping[str, object] | None = None
    services: bool = False  # keep exported Services


async def operate(access: Access, config: OperatorConfig) -> None:
    """Run until SIGTERM or SIGINT. Raises ConfigError, Refused, LeaseLost."""

    async def run(client: KubeClient, report: Report) -> None:
        uid = await persist(lambda: _know(client, namespace=config.namespace))
        await Operator(client, access, config, uid=uid, report=report).run()

    await replica.operate(
        access,
        cluster=config.cluster,
        metrics_address=config.metrics_address,
        metrics_port=config.metrics_port,
        run=run,
    )


async def _know(client: KubeClient, *, namespace: str) -> str:
    """The UID of the cluster, which knows Scope's resources. Raises ConfigError, Refused, Unavailable."""
    await require_resources(client, namespace=namespace)
    return await identity(client)


class Operator:
    """One replica, in the cluster whose kube-system namespace has the UID `uid`."""

    def __init__(
        self, client: KubeClient, access: Access, config: OperatorConfig, *, uid: str, report: Report
    ) -> None:
        self._client = client
        self._uid = uid
        self._config = config
        self._registry = KubeRegistry(client, namespace=config.namespace, registry_id=uid, known=self._known)
        self._face: asyncio.Future[Face] = asyncio.get_running_loop().create_future()
        self._nodes = NodePeers(cluster=config.cluster, uid=uid)
        self._overheard = Overheard()
        self._replica = Replica(
            access, namespace=config.namespace, uid=uid, newest=lambda: self._reconciler.revision
        )
        self._newsroom = Newsroom(client, identity=self._replica.name, wall=time.time)
        self._reconciler = Reconciler(
            self._registry,
            liveness=Heartbeats(
                self._registry.leases,
                cluster=config.cluster,
                peer_of=self._peer,
            ),
            now=time.monotonic,
            wall=time.time,
            uniform=random.uniform,
            nodes=self._nodes,
            list_nodes=lambda: list_nodes(client, self._nodes),
            told=self._tell,
        )
        self._services = (
            Services(
                client,
                self._registry,
                cluster=config.cluster,
                uid=uid,
                tell=self._newsroom.post,
                now=time.monotonic,
                uniform=random.uniform,
            )
            if config.services
            else None
        )
        self._report = report
        report.watch(health=lambda: self._reconciler.health, is_leader=lambda: self._replica.is_leader)

    async def run(self) -> None:
        """Run until cancelled. Raises LeaseLost."""
        leading = asyncio.create_task(self._replica.lead(self._write), name="election")
        heard = self._services.heard if self._services is not None else None
        works = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("hearing", self._replica.hear(self._reconciler, take=self._take, services=heard)),
                ("leases", self._registry.leases.listen()),
                ("events", self._newsroom.run()),
                ("gateway", self._serve()),
            )
        ]
        try:
            done, _ = await asyncio.wait((leading, *works), return_when=asyncio.FIRST_COMPLETED)
        finally:
            log.info("operator.stopping identity=%s", self._replica.name)
            await end(leading)  # first: the other replica waits for it
            await end(*works)
        for task in done:
            task.result()

    async def _write(self) -> None:
        """What the leader does."""
        await self._replica.list_all(self._reconciler)
        works = [asyncio.create_task(self._reconcile(), name="reconciling")]
        if self._services is not None:
            works.append(asyncio.create_task(self._services.run(), name="services"))
        declaring = () if self._config.mesh is None else (self._declare(self._config.mesh),)
        try:
            done, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(*works, *declaring)
        for task in done:
            task.result()

    def _declare(self, mesh: Mapping[str, object]) -> asyncio.Task[None]:
        return asyncio.create_task(declare_mesh(self._client, mesh), name="declaring")

    async def _reconcile(self) -> None:
        if self._config.gateway is None:
            await self._reconciler.run()
            return
        keys = await self._keys()
        # A mesh names the reflectors that serve: the first write waits for them.
        served = await asyncio.shield(self._face)
        reflectors = await served.reflectors()
        self._reconciler.announce(
            reflectors=reflectors, signing_key=public_half(keys.signing), gateway=served.origin
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell_administrator(served, keys))
            tasks.create_task(announce(served, self._reconciler, reflectors))
            await self._reconciler.run()

    async def _keys(self) -> GatewayKeys:
        """The gateway's keys, made if they never were. Raises ConfigError."""

        async def made() -> GatewayKeys:
            listed = await self._registry.list(Kind.MESH)
            meshes = [mesh for mesh in listed.resources if isinstance(mesh, Mesh)]
            return await ensure_keys(
                self._client, namespace=self._config.namespace, meshes=meshes, entropy=secrets.token_bytes
            )

        return await persist(made, through=RegistryError)

    async def _serve(self) -> None:
        """The gateway, from the time when its keys exist. Raises ConfigError."""
        config, namespace = self._config.gateway, self._config.namespace
        if config is None:
            await asyncio.Event().wait()
            return
        keys = await self._await_keys()
        registry = GatewayRegistry(self._client, namespace=namespace, registry_id=self._uid)
        works = Works()
        with private_directory("scope-gateway-") as data:  # TLS takes its key from a file
            tls.write_private(data / tls.KEY_FILE, keys.tls_key.raw)
            opened = face.opened(
                registry,
                keys.identity(self._uid),
                FaceConfig(data, config.listen, config.reflector_ports, config.advertise, config.certificate),
                works,
            )
            async with opened as served:
                registry.uid_of = partial(_uid_of, served.feed)
                self._face.set_result(served)
                log.info("gateway.serving url=%s listening=%s", served.url, served.listening[0])
                await works.failed
                raise ConfigError("a part of the gateway ended; the log above says which: please report it")

    async def _await_keys(self) -> GatewayKeys:
        """The gateway's keys, once the leader has made them. Raises ConfigError."""
        while True:
            keys = await persist(
                lambda: find_keys(self._client, namespace=self._config.namespace), through=RegistryError
            )
            if keys is not None:
                return keys
            await asyncio.sleep(KEYS_SECONDS)

    async def _tell_administrator(self, served: Face, keys: GatewayKeys) -> None:
        await persist(
            lambda: tell_administrator(
                self._client, served, keys, namespace=self._config.namespace, registry_id=self._uid
            ),
            through=RegistryError,
        )

    def _take(self, fact: Fact) -> None:
        self._reconciler.take(fact)
        news = self._overheard.take(fact)
        if self._replica.is_leader:
            self._newsroom.post(*news)

    def _known(self, name: str, revision: int) -> Peer | None:
        """A peer, for a list at that revision; none where that is older than what is known: a restore."""
        return self._peer(name) if revision >= self._reconciler.revision else None

    def _peer(self, name: str) -> Peer | None:
        return self._reconciler.peer(name)

    def _tell(self, done: Done) -> None:
        self._report.tell(done)
        self._newsroom.tell(done)


def _uid_of(feed: Feed, name: str) -> str:
    peer = feed.peers.get(name)
    return peer.meta.uid if peer is not None else ""
