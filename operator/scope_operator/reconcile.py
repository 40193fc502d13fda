"""Keeps a registry's meshes and peers as they should be, over any Registry: cache, queue, plan, write.

The decisions are `plan.planner`'s. This shell hands it every fact, does the actions that it gives, at most 64
at once, and tells it how they ended. Facts are either followed here (`follow`: list and watch, the embedded
registry) or pushed from outside (`take`: whoever watches a cluster). A write names the revision it was
planned from; on a conflict the resource is read and planned again, so no write of another is undone, a
tombstone least of all. What the registry refuses for now is tried again with backoff, longer each time.

Nothing is written at rest. A new peer is planned as soon as its fact arrives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import assert_never

from scope.model import GatewayOrigin, Kind, Peer, PublicKey, Reflector, Resource
from scope.registry.follow import backoff, follow
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    Deleted,
    Disconnected,
    Listed,
    Liveness,
    NotFound,
    Put,
    Registry,
    RegistryError,
)
from scope_operator.plan.nodes import NodeDeleted, NodePeers, NodePut, NodesListed
from scope_operator.plan.planner import (
    Action,
    Confirm,
    CreatePeer,
    DeletePeer,
    Planner,
    RevivePeer,
    Write,
    WriteAssignment,
    WriteMeshStatus,
    WritePeer,
    key_of,
)

log = logging.getLogger(__name__)

KINDS = (Kind.MESH, Kind.PEER)
HEAR_INTERVAL = 5.0  # seconds: `online` is right to this, and reading 10,000 ages takes milliseconds
SWEEP_INTERVAL = 60.0  # seconds: what time alone brings about (expiry, freed addresses) is a matter of days
DRAIN_SECONDS = 1.0  # a write takes milliseconds; whoever follows us waits no longer than two seconds in all
ERROR_COUNTS = 10.0  # seconds for which a failed write is trouble: longer than the longest backoff
CONFIRM_INTERVAL = 5.0  # seconds between looks whether Nodes are to be listed anew


@dataclass(frozen=True, slots=True)
class ReconcileHealth:
    """What /healthz says of the reconciler. Ages are in seconds; None: never."""

    listed: bool
    event_age: float | None
    queue: int
    delayed: int
    last_error: str
    error_age: float | None

    @property
    def trouble(self) -> str:
        """What keeps it from its work, for /readyz; "" where nothing does."""
        if not self.listed:
            return "the reconciler has not listed its registry yet"
        if self.error_age is not None and self.error_age < ERROR_COUNTS:
            return f"the reconciler cannot write: {self.last_error}"
        return ""


@dataclass(frozen=True, slots=True)
class Done:
    """How a write ended; `stored` is the resource afterwards, None where there is none."""

    action: Write
    stored: Resource | None
    error: RegistryError | None
    seconds: float


class Reconciler:
    """One for each registry. `now` is monotonic, `uniform` draws the jitter (`random.uniform`).

    `liveness` is where heartbeats are known in this process; without it `online` is left alone. `nodes` and
    `list_nodes` (given the newest revision known) are a cluster's. Without `assigns` no status is written:
    the registry is another cluster's. `told` hears how each write ended.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        liveness: Liveness | None,
        now: Callable[[], float],
        wall: Callable[[], float],
        uniform: Callable[[float, float], float],
        signing_key: PublicKey | None = None,
        reflectors: tuple[Reflector, ...] = (),
        gateway: GatewayOrigin | None = None,
        nodes: NodePeers | None = None,
        list_nodes: Callable[[], Awaitable[NodesListed]] | None = None,
        assigns: bool = True,
        told: Callable[[Done], None] = lambda _: None,
    ) -> None:
        self._registry = registry
        self._liveness = liveness
        self._now = now
        self._wall = wall
        self._uniform = uniform
        self._planner = Planner(
            now=now(),
            tells_liveness=liveness is not None,
            signing_key=signing_key,
            reflectors=reflectors,
            gateway=gateway,
            nodes=nodes,
            assigns=assigns,
        )
        self._signing_key, self._gateway = signing_key, gateway
        self._list_nodes = list_nodes
        self._told = told
        self._wake = asyncio.Event()
        self._writes: set[asyncio.Task[None]] = set()
        self._failures: dict[tuple[Kind, str], int] = {}
        self._event_at: float | None = None
        self._error_at: float | None = None
        self._error = ""

    @property
    def health(self) -> ReconcileHealth:
        """How it goes."""
        now = self._now()
        return ReconcileHealth(
            listed=self._planner.is_listed,
            event_age=None if self._event_at is None else now - self._event_at,
            queue=self._planner.depth,
            delayed=self._planner.delayed,
            last_error=self._error,
            error_age=None if self._error_at is None else now - self._error_at,
        )

    @property
    def revision(self) -> int:
        """The newest revision of the registry that was heard of."""
        return self._planner.revision

    def peer(self, name: str) -> Peer | None:
        """The peer of that name, as it was last heard of."""
        return self._planner.peer(name)

    def announce(
        self,
        *,
        reflectors: tuple[Reflector, ...],
        signing_key: PublicKey | None = None,
        gateway: GatewayOrigin | None = None,
    ) -> None:
        """Let every mesh name these reflectors, and this key and gateway where there are any, from now on."""
        self._signing_key = signing_key or self._signing_key
        self._gateway = gateway or self._gateway
        self._planner.announce(signing_key=self._signing_key, reflectors=reflectors, gateway=self._gateway)
        self._wake.set()

    def take(self, fact: Put | Deleted | NodePut | NodeDeleted) -> None:
        """Take what a watch outside of this shell told."""
        self._planner.take(fact)
        self._heard()

    async def list_all(self) -> None:
        """List everything once and compare: what a watch missed is found. Raises RegistryError."""
        for kind in KINDS:
            await self._list(kind)
        await self._list_the_nodes()

    async def run(self) -> None:
        """Plan and write until cancelled, from the facts that are taken.

        Writes that are under way then have `DRAIN_SECONDS` to end, so that who writes after us finds them
        done.
        """
        try:
            await self._run()
        finally:
            if self._writes:
                _, late = await asyncio.wait(self._writes, timeout=DRAIN_SECONDS)
                for write in late:
                    write.cancel()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._every(SWEEP_INTERVAL, self._planner.sweep))
            if self._liveness is not None:
                liveness = self._liveness
                tasks.create_task(
                    self._every(
                        HEAR_INTERVAL,
                        lambda: self._planner.hear(liveness.seconds_since_heartbeat(), now=self._now()),
                    )
                )
            if self._list_nodes is not None:
                tasks.create_task(self._confirm_departures())
            await self._work()

    async def follow(self) -> None:
        """Follow the registry and write, until cancelled; a registry that closes is left at rest."""
        async with asyncio.TaskGroup() as tasks:
            for kind in KINDS:
                tasks.create_task(self._follow(kind))
            await self.run()

    async def _follow(self, kind: Kind) -> None:
        """Keep the planner's cache of a kind."""
        after = self._planner.seen(kind)
        async for fact in follow(self._registry, kind, sleep=asyncio.sleep, uniform=self._uniform):
            match fact:
                case Disconnected(reason):
                    self._note(RegistryError(reason))
                case Listed():
                    self._planner.take(fact, after=after)
                    self._heard()
                case Put() | Deleted():
                    self.take(fact)
                case _:
                    assert_never(fact)
            after = self._planner.seen(kind)

    async def _list(self, kind: Kind) -> None:
        after = self._planner.seen(kind)
        listed = await self._registry.list(kind)
        self._planner.take(listed, after=after)
        self._heard()

    async def _list_the_nodes(self) -> None:
        if self._list_nodes is not None:
            self._planner.take(await self._list_nodes())
            self._heard()

    async def _confirm_departures(self) -> None:
        """List Nodes whenever peers wait for that to go."""
        failures = 0
        while True:
            due = self._planner.nodes_due(now=self._now())
            if due is not None and due <= self._now():
                try:
                    await self._list_the_nodes()
                    failures = 0
                except RegistryError as error:
                    self._note(error)
                    failures += 1
            # A list that was not complete confirms nothing: it is asked for again, but not at once.
            await asyncio.sleep(
                CONFIRM_INTERVAL + (backoff(failures, uniform=self._uniform) if failures else 0)
            )

    async def _every(self, interval: float, step: Callable[[], None]) -> None:
        while True:
            step()
            self._wake.set()
            await asyncio.sleep(interval)

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            for write in [write for write in self._writes if write.done()]:
                self._writes.discard(write)
                write.result()
            for action in self._planner.plan(now=self._now(), wall=self._wall()):
                self._writes.add(asyncio.create_task(self._do(action)))
            due = self._planner.next_time()
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._now())):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _do(self, action: Action) -> None:
        try:
            if isinstance(action, Confirm):
                await self._confirm(action)
            else:
                await self._write(action)
        finally:
            self._wake.set()

    async def _confirm(self, action: Confirm) -> None:
        kind, name = key_of(action)
        try:
            stored = await self._registry.get(kind, name)
        except NotFound:
            log.info("reconcile.absent kind=%s name=%s uid=%s", kind, name, action.resource.meta.uid)
            self._planner.succeeded(action, None)
        except RegistryError as error:
            self._fail(action, error)
            return
        else:
            log.warning("reconcile.unlisted kind=%s name=%s uid=%s", kind, name, stored.meta.uid)
            self._planner.succeeded(action, stored)
        self._failures.pop((kind, name), None)

    async def _write(self, action: Write) -> None:
        began = self._now()
        stored: Resource | None = None
        error: RegistryError | None = None
        try:
            stored = await self._perform(action)
        except (AlreadyExists, Conflict, NotFound) as outdated:
            error = outdated
            await self._read_again(action)
        except RegistryError as failed:
            error = failed
            self._fail(action, failed)
        else:
            self._failures.pop(key_of(action), None)
            self._planner.succeeded(action, stored)
        self._told(Done(action, stored, error, self._now() - began))

    async def _perform(self, action: Write) -> Resource | None:
        match action:
            case WriteAssignment(peer=peer, part=part):
                meta = peer.meta
                return await self._registry.update_status(
                    Kind.PEER, meta.name, part, uid=meta.uid, if_revision=meta.revision
                )
            case WriteMeshStatus(mesh, status):
                meta = mesh.meta
                return await self._registry.update_status(
                    Kind.MESH, meta.name, status, uid=meta.uid, if_revision=meta.revision
                )
            case WritePeer(peer):
                prefixes = [str(each.prefix) for each in peer.spec.pod_prefixes]
                log.info("reconcile.pods peer=%s prefixes=%s", peer.meta.name, prefixes)
                return await self._registry.update(peer, if_revision=peer.meta.revision)
            case CreatePeer(peer, mesh):
                log.info("reconcile.created peer=%s node=%s", peer.meta.name, peer.spec.node_name)
                return await self._registry.create(peer)
            case RevivePeer(peer=peer):
                log.info("reconcile.revived peer=%s node=%s", peer.meta.name, peer.spec.node_name)
                asked = Peer(peer.meta, replace(peer.spec, leaving=False))
                return await self._registry.update(asked, if_revision=peer.meta.revision)
            case DeletePeer(peer=peer, why=why):
                log.info("reconcile.deleted peer=%s uid=%s why=%s", peer.meta.name, peer.meta.uid, why)
                await self._registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
                return None
        assert_never(action)

    async def _read_again(self, action: Write) -> None:
        try:
            stored: Resource | None = await self._registry.get(*key_of(action))
        except NotFound:
            stored = None
        except RegistryError as error:
            self._fail(action, error)
            return
        # A resource that is there, and is not, and is there: each attempt waits longer than the last.
        again_at = self._again_at(action) if isinstance(action, CreatePeer) else self._now()
        self._planner.outdated(action, stored, again_at=again_at)

    def _fail(self, action: Action, error: RegistryError) -> None:
        self._note(error)
        self._planner.failed(action, again_at=self._again_at(action))

    def _again_at(self, action: Action) -> float:
        key = key_of(action)
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        return self._now() + backoff(failures, uniform=self._uniform)

    def _heard(self) -> None:
        self._event_at = self._now()
        self._wake.set()

    def _note(self, error: RegistryError) -> None:
        self._error, self._error_at = str(error), self._now()
        log.warning("reconcile.failed error=%s", error)
