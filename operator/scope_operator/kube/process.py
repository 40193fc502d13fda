"""The operator as one process: it watches always, and writes while it is elected.

Every replica keeps its view of the cluster, so the next leader starts at once; it lists everything anew
before its first write, because what its predecessor wrote last may not have reached its watch.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from scope.model import ConfigError, Kind, Mesh, Peer
from scope.registry.follow import backoff
from scope.registry.kube.access import Access
from scope.registry.kube.client import KubeClient
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import RegistryError, Unavailable
from scope_operator.gateway import face, tls
from scope_operator.gateway.advertised import Advertised
from scope_operator.gateway.face import Face, FaceConfig, UsersCertificate, Works, announce
from scope_operator.gateway.feed import Feed
from scope_operator.gateway.joining import public_half
from scope_operator.kube.cluster import identity, list_nodes, require_resources
from scope_operator.kube.gateway import (
    GatewayKeys,
    GatewayRegistry,
    ensure_keys,
    find_keys,
    tell_administrator,
)
from scope_operator.kube.heartbeats import Heartbeats
from scope_operator.kube.lease import Election
from scope_operator.kube.news import KeysSeen, Newsroom
from scope_operator.kube.report import Report, site
from scope_operator.kube.watching import Fact, watch
from scope_operator.plan.nodes import NodePeers, NodesListed
from scope_operator.reconcile import Done, Reconciler

T = TypeVar("T")

log = logging.getLogger(__name__)

LEASE = "scope-operator"
SWEEP_SECONDS = (300.0, 600.0)  # between lists of everything, drawn anew each time, so replicas do not meet
# TLS takes its key from a file: this one is in memory, and writable where a container's root is not.
MEMORY = "/dev/shm"  # noqa: S108 - the directory made there is nobody else's
KEYS_SECONDS = 0.5  # between looks of a replica that waits for the leader to make the gateway's keys
RELIST_SECONDS = 2.0  # what the watch lists of three kinds is followed by one list of ours
REWATCH_SECONDS = 1.0  # between a watch that failed and the next


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Where the gateway listens, and where peers find it."""

    listen: tuple[tuple[str, int], ...]
    reflector_ports: tuple[int, ...]
    advertise: tuple[Advertised, ...] = ()
    certificate: UsersCertificate | None = None


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """What the command line said. Without `gateway` only Nodes are peers."""

    cluster: str
    namespace: str
    gateway: GatewayConfig | None
    metrics_address: str
    metrics_port: int


async def operate(access: Access, config: OperatorConfig) -> None:
    """Run until SIGTERM or SIGINT. Raises ConfigError, Refused, LeaseLost."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    report = Report()
    pages = site(report.application(), host=config.metrics_address, port=config.metrics_port)
    async with KubeClient(access) as client, pages as port:
        log.info("operator.serving cluster=%s metrics_port=%d", config.cluster, port)
        starting = asyncio.create_task(_know(client, namespace=config.namespace))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            await _end(starting)
            return
        await _end(stopping)
        await Operator(client, access, config, uid=starting.result(), report=report).run(stop)


async def _know(client: KubeClient, *, namespace: str) -> str:
    """The UID of the cluster, which knows Scope's resources; an API server that is away is waited for.

    Raises ConfigError, Refused.
    """
    failures = 0
    while True:
        try:
            await require_resources(client, namespace=namespace)
            return await identity(client)
        except Unavailable as error:
            failures += 1
            log.warning("cluster.unanswered error=%s", error)
            await asyncio.sleep(backoff(failures, uniform=random.uniform))


class Operator:
    """One replica, in the cluster whose kube-system namespace has the UID `uid`."""

    def __init__(
        self, client: KubeClient, access: Access, config: OperatorConfig, *, uid: str, report: Report
    ) -> None:
        self._client = client
        self._access = access
        self._uid = uid
        self._identity = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._config = config
        self._registry = KubeRegistry(client, namespace=config.namespace, registry_id=uid)
        self._face: asyncio.Future[Face] = asyncio.get_running_loop().create_future()
        self._nodes = NodePeers(cluster=config.cluster, uid=uid)
        self._keys_seen = KeysSeen()
        self._newsroom = Newsroom(client, identity=self._identity, wall=time.time)
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
            list_nodes=self._list_nodes,
            told=self._tell,
        )
        self._election = Election(
            client,
            namespace=config.namespace,
            name=LEASE,
            identity=self._identity,
            now=time.monotonic,
            wall=time.time,
            newest=lambda: self._reconciler.revision,
            restored=self._note_restored,
        )
        self._restored = asyncio.Event()
        self._relisted = asyncio.Event()
        self._report = report
        report.watch(health=lambda: self._reconciler.health, is_leader=lambda: self._election.is_leader)

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set. Raises LeaseLost."""
        leading = asyncio.create_task(self._election.lead(self._write), name="election")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        works = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("watch", self._watch()),
                ("sweep", self._sweep()),
                ("leases", self._registry.leases.listen()),
                ("events", self._newsroom.run()),
                ("gateway", self._serve()),
            )
        ]
        try:
            done, _ = await asyncio.wait((stopping, leading, *works), return_when=asyncio.FIRST_COMPLETED)
        finally:
            log.info("operator.stopping identity=%s", self._identity)
            await _end(leading)  # first: the other replica waits for it
            await _end(stopping, *works)
        for task in done - {stopping}:
            task.result()

    async def _write(self) -> None:
        """What the leader does."""
        await self._list_all()
        if self._config.gateway is None:
            await self._reconciler.run()
            return
        keys = await self._keys()
        # A mesh names the reflectors that serve: the first write waits for them.
        served = await asyncio.shield(self._face)
        reflectors = await served.reflectors()
        self._reconciler.announce(reflectors=reflectors, signing_key=public_half(keys.signing))
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

        return await self._persist(made)

    async def _serve(self) -> None:
        """The gateway, from the time when its keys exist. Raises ConfigError."""
        config, namespace = self._config.gateway, self._config.namespace
        if config is None:
            await asyncio.Event().wait()
            return
        keys = await self._await_keys()
        registry = GatewayRegistry(self._client, namespace=namespace, registry_id=self._uid)
        works = Works()
        with tempfile.TemporaryDirectory(prefix="scope-gateway-", dir=MEMORY) as directory:
            data = Path(directory)
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
            keys = await self._persist(lambda: find_keys(self._client, namespace=self._config.namespace))
            if keys is not None:
                return keys
            await asyncio.sleep(KEYS_SECONDS)

    async def _tell_administrator(self, served: Face, keys: GatewayKeys) -> None:
        await self._persist(
            lambda: tell_administrator(
                self._client, served, keys, namespace=self._config.namespace, registry_id=self._uid
            )
        )

    async def _watch(self) -> None:
        while True:
            watching = asyncio.create_task(
                watch(
                    self._access,
                    registry_id=self._uid,
                    take=self._take,
                    relisted=self._relisted.set,
                )
            )
            restored = asyncio.create_task(self._restored.wait())
            try:
                await asyncio.wait((watching, restored), return_when=asyncio.FIRST_COMPLETED)
            finally:
                restored.cancel()
                await _end(watching)
            if not self._restored.is_set():
                error = None if watching.cancelled() else watching.exception()
                log.warning("watch.ended reason=%r", error)
                await asyncio.sleep(REWATCH_SECONDS)
            await self._list_all()
            self._restored.clear()

    async def _sweep(self) -> None:
        """List everything now and then, and after the watch did: what it missed is found."""
        while True:
            await self._list_all()
            try:
                async with asyncio.timeout(random.uniform(*SWEEP_SECONDS)):  # noqa: S311 - jitter
                    await self._relisted.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(RELIST_SECONDS)
            self._relisted.clear()

    async def _list_all(self) -> None:
        before = self._reconciler.revision
        await self._persist(self._reconciler.list_all)
        if self._reconciler.revision < before:
            self._restored.set()

    async def _persist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer of an API server that may be away for a while."""
        failures = 0
        while True:
            try:
                return await ask()
            except RegistryError as error:
                failures += 1
                log.warning("cluster.unanswered error=%s", error)
                await asyncio.sleep(backoff(failures, uniform=random.uniform))

    async def _list_nodes(self) -> NodesListed:
        return await list_nodes(self._client, asked_at=time.monotonic(), after=self._nodes.revision)

    def _note_restored(self, revision: int, before: int) -> None:
        """An API server whose revisions go backwards was restored: watches would wait for what is gone."""
        log.warning("cluster.restored revision=%d before=%d", revision, before)
        self._restored.set()

    def _take(self, fact: Fact) -> None:
        self._reconciler.take(fact)
        news = self._keys_seen.take(fact)
        if news is not None and self._election.is_leader:
            self._newsroom.post(news)

    def _peer(self, name: str) -> Peer | None:
        return self._reconciler.peer(name)

    def _tell(self, done: Done) -> None:
        self._report.tell(done)
        self._newsroom.tell(done)


def _uid_of(feed: Feed, name: str) -> str:
    peer = feed.peers.get(name)
    return peer.meta.uid if peer is not None else ""


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
