"""The asyncio loop of an agent that is in a mesh: what its registry and its directory on disk add to `loop`.

The registry is listed, then watched; reports are written to it. What the first ping does not need is imported
and started after it: the HTTP client above all.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, runtime_checkable

from scope import resources
from scope.model import ConfigError, DeviceKind, GatewayOrigin, Kind, PublicKey, Snapshot
from scope.registry.follow import delay_after
from scope.registry.port import Disconnected, Gone, PeerRemoved, Registry, RegistryError
from scope_agent.inputs import (
    Applied,
    Courier,
    DatagramArrived,
    FactArrived,
    Failed,
    IdentitySaved,
    KeysSetUp,
    Leaving,
    SaveState,
    Socket,
    Target,
    WriteReport,
)
from scope_agent.loop import AgentLoop, SansIo
from scope_agent.psk.choice import DEFAULT, KeyChoice
from scope_agent.state import Enrolment, StateDir
from scope_agent.wireguard.shell import Device, ProbeSocket

if TYPE_CHECKING:
    from scope.registry.http import Couriered, HttpRegistry
    from scope_agent.psk.identity import HybridIdentity, KeyMaker, TrustPolicy
    from scope_agent.psk.provider import Provider
    from scope_agent.psk.slots import Record

log = logging.getLogger(__name__)

LATE_AFTER = 0.4  # what the first pings do not need is imported after them, or after so long
HEARTBEAT = 60.0
HEARTBEAT_AGAIN = 10.0  # after one that failed: a few are tried before those who listen give us up
LASTING = 30.0  # seconds: a watch that held for so long was no failure
REMOVED_GRACE = 2.0  # for a device to lose its peers before the agent of a removed peer ends
COURIERS = 16  # datagrams on their way to the gateway at once; more are dropped
M_MMAP_THRESHOLD = -3  # of glibc's mallopt(3): blocks from this size on are maps of their own
LARGE_BLOCK = 128 * 1024  # bytes; its initial value, set so that it stays


class RemovedFromMesh(ConfigError):
    """Our peer was removed on purpose: to start its agent again changes nothing."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Where one agent keeps things."""

    state: StateDir
    run_dir: Path = Path("/run/scope")
    only: DeviceKind | None = None
    beside: bool = False  # user-space WireGuard is run by something else
    fwmark: int = 0
    unplugged: Callable[[], str] = lambda: ""  # why pods of this Node have no network of ours, in words
    keys: KeyChoice = DEFAULT
    trust: TrustPolicy | None = None  # in identities; None: the registry's word at first contact
    upstream: GatewayOrigin | None = None  # to which a hub leads, where its enrolment names none


@dataclass(frozen=True, slots=True)
class _Counters:
    """What the shell dropped or did, for status."""

    inbox_dropped: int
    couriers_dropped: int
    unsent: Mapping[str, int]

    def added_to(self, answer: Mapping[str, object]) -> dict[str, object]:
        """The agent's answer and, where it is a status, what the shell lost."""
        status = answer.get("status")
        if not isinstance(status, Mapping):
            return dict(answer)
        lost = {"inbox": self.inbox_dropped, "courier": self.couriers_dropped, "unsent": dict(self.unsent)}
        return {**answer, "status": {**status, "lost": lost}}


class AgentRegistry(Registry, Protocol):
    """A registry that an agent follows over a network."""

    async def reconnect(self) -> None:
        """End every watch as lost: our own network has changed."""
        ...


@runtime_checkable
class Gateway(AgentRegistry, Protocol):
    """A registry with a courier."""

    async def courier(self, to: PublicKey, datagram: bytes) -> None:
        """Have a sealed datagram brought to the holder of a probe key. Raises RegistryError."""
        ...

    def couriered(self) -> AsyncIterator[Couriered]:
        """Sealed datagrams for us."""
        ...

    async def close(self) -> None:
        """End every watch and connection."""
        ...


Connect: TypeAlias = Callable[[], Awaitable[AgentRegistry]]


class MeshAgent(SansIo, Protocol):
    """An agent of a mesh as its loop sees it."""

    @property
    def removed(self) -> bool:
        """Whether our own ScopePeer was deliberately removed."""

    @property
    def reaches_a_peer(self) -> bool:
        """Whether some path is believed to work."""

    def snapshot(self) -> Snapshot:
        """What is believed of the mesh."""


_Agent = TypeVar("_Agent", bound=MeshAgent)


class MeshLoop(AgentLoop[_Agent]):
    """One agent of a mesh in its world.

    `connect` gives the registry when the first pings are on their way. A gateway is closed here in the end,
    any other registry by whoever gave it. Without `connect` it is the gateway that the enrolment names.
    """

    def __init__(
        self,
        agent: _Agent,
        config: RunConfig,
        enrolment: Enrolment,
        *,
        device: Device,
        probe: ProbeSocket,
        connect: Connect | None,
    ) -> None:
        super().__init__(
            agent,
            device=device,
            probe=probe,
            state=config.state,
            socket=config.run_dir / f"{enrolment.mesh}.sock",
        )
        self._config, self._enrolment = config, enrolment
        self._connect = connect or self._open_gateway
        self._registry: AgentRegistry | None = None
        self._gateway: Gateway | None = None  # the registry, where it is one
        self._list_again = asyncio.Event()
        self._reached = asyncio.Event()  # once some path works
        self._couriers = 0
        self._couriers_dropped = 0
        self._removal_kept = agent.removed  # a restart would else start from a snapshot without it

    async def _close(self) -> None:
        if self._gateway is not None:
            await self._gateway.close()

    def _performed(self) -> None:
        if self._agent.reaches_a_peer:
            self._reached.set()

    @abc.abstractmethod
    async def _removed(self) -> None:
        """The registry says that we are no member any more, and hears us no more."""

    def _end_removed(self) -> None:
        mesh = self._enrolment.mesh
        self._fail(
            RemovedFromMesh(
                f"this peer was removed from {mesh}: `scope-agent leave --mesh {mesh}` cleans up, "
                "and makes room for another join"
            )
        )

    # --- datagrams -----------------------------------------------------------------------------------------

    def _send(self, leg: Socket | Courier, data: bytes) -> None:
        if isinstance(leg, Socket):
            self._send_probe(leg, data)
            return
        if self._couriers >= COURIERS or self._gateway is None or leg.to is None:
            self._couriers_dropped += 1
            return
        self._couriers += 1
        self._spawn(self._courier(leg, data))

    async def _courier(self, leg: Courier, data: bytes) -> None:
        try:
            if self._gateway is not None and leg.to is not None:
                await self._gateway.courier(leg.to, data)
        except RegistryError as error:
            log.debug("courier.failed error=%s", error)
        finally:
            self._couriers -= 1

    # --- the registry --------------------------------------------------------------------------------------

    async def _follow_registry(self) -> None:
        """List, then watch; whatever ends the watch, list again after a while."""
        await self._first_pings()
        _return_large_blocks()
        registry = self._registry = await self._connect()
        if isinstance(registry, Gateway):
            self._gateway = registry
            self._spawn(self._take_couriered(registry))
        failures = 0
        while True:
            started = time.monotonic()
            lost = RegistryError("the event stream ended")
            try:
                await self._watch_registry(registry)
            except PeerRemoved as error:
                self._post(FactArrived(Disconnected(str(error))))
                await self._removed()
                return
            except Gone:
                lost = RegistryError("the registry no longer keeps what changed since: listing again")
            except RegistryError as error:
                lost = error
            failures = 1 if time.monotonic() - started > LASTING else failures + 1
            log.info("registry.lost reason=%s", lost)
            self._post(FactArrived(Disconnected(str(lost))))
            await asyncio.sleep(delay_after(lost, failures, uniform=secrets.SystemRandom().uniform))

    async def _open_gateway(self) -> HttpRegistry:
        """The gateway of the enrolment; nothing is asked yet."""
        http = await asyncio.to_thread(import_http)
        enrolment = self._enrolment
        return http.HttpRegistry(
            enrolment.url,
            pin=enrolment.pin,
            credential=http.PeerCredential(
                name=enrolment.peer_name,
                uid=enrolment.peer_uid,
                registry=enrolment.registry_id,
                signing=enrolment.identity.signing,
            ),
            for_agent=True,
            registry_key=enrolment.registry_key,
            followed=self._keep_pin,
        )

    def _keep_pin(self, pin: bytes) -> None:
        """The gateway has another key, for which the registry vouches: the earlier one holds no longer."""
        log.warning("registry.gateway_key_replaced url=%s", self._enrolment.url)
        self._enrolment = replace(self._enrolment, pin=pin)
        self._config.state.save_enrolment(self._enrolment)

    async def _first_pings(self) -> None:
        """Let an enrolled agent reach its peers before anything is imported for the registry."""
        if self._agent.snapshot().peers:
            await self._a_path(within=LATE_AFTER)

    async def _a_path(self, *, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._reached.wait()

    async def _watch_registry(self, registry: AgentRegistry) -> None:
        """List all, then follow changes until something ends it. Raises RegistryError."""
        revisions = {}
        # Peers are the news, but who has no mesh on disk can believe no list of them before it.
        kinds = (Kind.PEER, Kind.MESH) if self._agent.snapshot().mesh is not None else (Kind.MESH, Kind.PEER)
        for kind in kinds:
            listed = await registry.list(kind)
            revisions[kind] = listed.revision
            self._post(FactArrived(listed))
        log.info("registry.listed revision=%d", listed.revision.number)

        async def follow(kind: Kind) -> None:
            async for fact in registry.watch(kind, revisions[kind]):
                self._post(FactArrived(fact))

        async def beat() -> None:
            while True:
                delay = HEARTBEAT
                try:
                    await registry.heartbeat(self._enrolment.peer_name)
                except PeerRemoved:
                    raise
                except RegistryError as error:  # what the watch brings is worth no less for it
                    log.warning("heartbeat.failed error=%s", error)
                    delay = HEARTBEAT_AGAIN
                await asyncio.sleep(delay * (0.9 + 0.2 * secrets.SystemRandom().random()))

        async def list_again() -> None:
            while True:
                await self._list_again.wait()
                self._list_again.clear()
                self._post(FactArrived(await registry.list(Kind.PEER)))

        works = [
            asyncio.ensure_future(w) for w in (follow(Kind.MESH), follow(Kind.PEER), beat(), list_again())
        ]
        try:
            done, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
            for work in done:
                work.result()
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _take_couriered(self, registry: Gateway) -> None:
        async for couriered in registry.couriered():
            self._post(DatagramArrived(couriered.datagram, Courier(couriered.sender)))

    async def _write_report(self, write: WriteReport) -> None:
        if self._registry is None:
            self._post(Failed(Target.REGISTRY, "the registry is not connected yet"))
            return
        try:
            await self._registry.update_status(Kind.PEER, write.name, write.report, uid=write.uid)
        except RegistryError as error:
            self._post(Failed(Target.REGISTRY, str(error)))
            return
        self._post(Applied(Target.REGISTRY))

    # --- the disk ------------------------------------------------------------------------------------------

    async def _save(self, save: SaveState, *, removed: bool) -> None:
        try:
            await asyncio.to_thread(self._config.state.save, save.state)
        except ConfigError as error:
            log.warning("state.unsaved error=%s", error)
            self._post(Failed(Target.DISK, str(error)))
            return
        finally:
            self._removal_kept |= removed  # on a full disk too: nothing is gained by waiting for it
        self._post(Applied(Target.DISK))

    async def _set_up_keys(self, *, is_awaited: bool) -> None:
        """In a thread: the imports and the self-test would hold pings up."""
        if not is_awaited:
            await self._a_path(within=LATE_AFTER)
        try:
            maker = await asyncio.to_thread(set_up_keys, self._config)
        except ConfigError as error:
            log.warning("psk.unavailable error=%s", error)
            self._post(KeysSetUp(str(error)))
            return
        log.info("psk.available suite=%d provider=%s", maker.suite.number, self._config.keys.provider)
        self._post(KeysSetUp(maker))

    async def _save_identity(self, identity: HybridIdentity) -> None:
        error = ""
        try:
            await asyncio.to_thread(self._config.state.save_hybrid_identity, identity)
            log.info("identity.saved fingerprint=%s", identity.public.fingerprint())
        except ConfigError as failed:
            error = str(failed)
            log.warning("identity.unsaved error=%s", error)
        self._post(IdentitySaved(error))

    # --- the local socket ----------------------------------------------------------------------------------

    def _take(self, request: Mapping[str, object]) -> dict[str, object] | None:
        if request["command"] != "leave":
            return None
        self._post(Leaving(resources.parse_tombstone(request["tombstone"])))
        return {"ok": True}

    def _add_losses(self, answer: Mapping[str, object]) -> dict[str, object]:
        lost = _Counters(self._inbox.dropped, self._couriers_dropped, self._unsent)
        return lost.added_to(answer)


def set_up_keys(config: RunConfig) -> KeyMaker:
    """What makes post-quantum keys, tried once. Raises ConfigError where none can be made."""
    from scope_agent.psk.shell.making import make_maker  # a mesh without such keys needs none of it

    def identity(provider: Provider) -> HybridIdentity:
        return config.state.hybrid_identity(secrets.token_bytes, provider)

    maker = make_maker(config.keys, identity=identity, random_bytes=secrets.token_bytes)
    return maker if config.trust is None else replace(maker, trust=config.trust)


def read_records(state: StateDir) -> Mapping[PublicKey, Record]:
    """The pairs' keys of earlier runs: a device that was made anew needs them for its first ping."""
    records, troubles = state.load_psk()
    for trouble in troubles:
        log.warning("psk.damaged detail=%s", trouble)
    return records


def _return_large_blocks() -> None:
    """Have the C library return what a reading or a file of thousands of peers took, once it is done with.

    Left to itself glibc learns from the first such block to keep the next ones, in an arena for each thread.
    """
    import ctypes  # of no use before the first ping

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def import_http() -> HttpModule:
    """Import the HTTP client: in a thread, so that pings go on."""
    from scope.credentials import PeerCredential, ProjectedToken
    from scope.registry.http import HttpRegistry

    return HttpModule(HttpRegistry, PeerCredential, ProjectedToken)


@dataclass(frozen=True, slots=True)
class HttpModule:
    """What is imported late."""

    HttpRegistry: Callable[..., HttpRegistry]
    PeerCredential: Callable[..., object]
    ProjectedToken: Callable[..., object]
