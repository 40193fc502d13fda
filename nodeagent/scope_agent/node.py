"""The agent of a Kubernetes Node: a peer of every mesh that selects the Node, in one process.

One process, because what the meshes share is the Node's: its Lease, the connection to the API server, and
most of an agent's memory. Each mesh has a Runner of its own, as everywhere else; one that stops is started
again and disturbs no other.

The operator makes the ScopePeers. This finds those of its own cluster and Node, makes keys for each on disk,
publishes them, and starts the Runner, which takes the address when there is one. A ScopePeer that was made
anew, because its Node was, gets the keys and addresses that are held. Meshes that are known from disk are
served before the API server is asked anything.

A mesh is left, with its device and keys, when its ScopePeer is gone, or only stands for its own removal:
absent from two complete lists half a minute apart. One whose deletion was seen, and whose ScopeMesh is gone
as well, is left at once: nobody would make it again. For a mesh that was not listed since the start, or since
the registry went back in time, as a restored one does, neither is believed for ten minutes.

One whose ScopePeer is told to leave is left at once, and the ScopePeer then says so: whoever told it waits
for that. It stays away for as long as that stands there.

Where it is asked to, it gives the Node's pods their network, by a CNI configuration that is made of what the
Node says of itself, before it is a peer of any mesh. That goes once every mesh was told to leave.

In a cluster whose registry is elsewhere the gateway there takes the API server's place. This asks it for the
one ScopePeer that is its own, at intervals: the event stream is the Runner's, since a second one of the same
peer would end it. A gateway that knows no such ScopePeer tells nothing of its revision, so it is believed
after ten minutes only; one that says that the peer was removed, as above.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope.model import (
    ConfigError,
    DeviceKind,
    GatewayOrigin,
    IPAddress,
    IPNetwork,
    Kind,
    Mesh,
    Peer,
    PeerReport,
    PublicKey,
    Resource,
    Revision,
)
from scope.names import peer_name
from scope.registry.follow import delay_after, follow
from scope.registry.port import (
    Deleted,
    Disconnected,
    Fact,
    Listed,
    NotFound,
    PeerRemoved,
    Put,
    RegistryError,
    Unavailable,
)
from scope.resources import parse_route
from scope_agent.mesh_loop import LATE_AFTER, AgentRegistry, RemovedFromMesh, RunConfig, import_http
from scope_agent.mesh_psk_run import AnyRunner, MeshPskRunner, device_key, open_runner
from scope_agent.pods.shell.cni import CniDirectories, keep_cni, remove_cni
from scope_agent.psk.choice import DEFAULT, KeyChoice
from scope_agent.run import be_no_hub, carry_nobody, close_ports, lead_to_no_pods
from scope_agent.state import Enrolment, StateDir, enrolled_meshes, identity_on, sole_agent
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell import choose_device

if TYPE_CHECKING:
    from scope.gateway_file import GatewayFile
    from scope.registry.http import HttpRegistry
    from scope.registry.kube.access import ServiceAccount
    from scope.registry.kube.client import KubeClient
    from scope.registry.kube.leases import Leases
    from scope.registry.kube.registry import KubeRegistry
    from scope_agent.psk.identity import TrustPolicy

log = logging.getLogger(__name__)

DEVICE_PREFIX = "scope"
SECOND_LIST_AFTER = 30.0  # seconds between the two lists that a ScopePeer must be missing from
# Before each look for the ScopeMesh of a ScopePeer that was deleted; `--cascade=foreground` deletes it last.
MESH_LOOKS = (0.0, 1.0, 4.0)
RESTORE_PATIENCE = 600.0  # as for other peers: an operator has made the missing ones again by then
RETRY = 5.0  # seconds between two attempts at what a mesh needs; few, since a Node has few meshes
ASK_AGAIN = 30.0  # between two questions to a gateway, which hears a thousand Nodes from one address
CNI_CHECK = 10.0  # seconds between two looks at the CNI's directory
CNI_ASK = 300.0  # between two questions for the Node's prefixes, which stay while it is the same one
RESTART = 30.0  # a Runner that stopped for what a person must mend is looked at again then


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Which Node this is, and where it finds and keeps things. `api_server` None: as the pod is told.

    `gateway`: where the gateway's file and the token for it are; None where the registry is the API server.
    """

    node: str
    cluster: str
    namespace: str  # of the Lease
    state_root: Path
    run_dir: Path
    api_server: str | None
    service_account: Path
    only: DeviceKind | None = None
    beside: bool = False  # user-space WireGuard is run by something else
    fwmark: int = 0
    keys: KeyChoice = DEFAULT
    gateway: Path | None = None
    upstream: GatewayOrigin | None = None  # to which hubs lead, in place of what the ScopeMesh says
    trust: TrustPolicy | None = None  # in identities; None: the registry's word at first contact
    cni: CniDirectories | None = None  # where to give the Node's pods their network; None: another does


@dataclass(slots=True, eq=False)
class _Served:
    """One mesh: what is to be known of it has changed, and what works for it."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    work: asyncio.Task[None] | None = None
    run: asyncio.Task[None] | None = None
    runner: AnyRunner | None = None
    name: str = ""  # of the ScopePeer that it runs as


class NodeAgent:
    """One for each Node. Raises ConfigError from `run` where a person must act."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._elsewhere = _Elsewhere(config, config.gateway) if config.gateway is not None else None
        self._served: dict[str, _Served] = {}  # by mesh
        self._peers: dict[str, Peer] = {}  # our own ScopePeers, by mesh
        self._absent: dict[str, float] = {}  # meshes that we serve without a ScopePeer, since when
        self._deletion = asyncio.Event()  # of one of our ScopePeers was seen
        self._listed: set[str] = set()  # meshes whose ScopePeer was there since the start
        self._patient_until = time.monotonic() + RESTORE_PATIENCE
        self._leaving: dict[str, asyncio.Task[object]] = {}  # by mesh
        self._revision: Revision | None = None
        self._opening: asyncio.Task[tuple[KubeModule, KubeClient, Leases]] | None = None
        self._asked = asyncio.Event()  # a Runner's first pings are on their way
        self._stopped = asyncio.Event()
        self._failure: ConfigError | None = None
        self._cni_lock = asyncio.Lock()
        self._unplugged = ""  # why the Node's pods have no network of ours

    @property
    def unplugged(self) -> str:
        """Why the Node's pods have no network of ours, in words; "": they have, or another's."""
        return self._unplugged

    def stop(self) -> None:
        """End `run`, soon; devices stay as they are."""
        self._stopped.set()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises ConfigError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        for mesh in enrolled_meshes(self._config.state_root):
            if not self._state(mesh).load_enrolment().url:
                self._serve(mesh)
        following = asyncio.ensure_future(self._follow())
        following.add_done_callback(self._note_end)
        plugging = asyncio.ensure_future(self._plug())
        plugging.add_done_callback(self._note_end)
        try:
            await self._stopped.wait()
        finally:
            following.cancel()
            plugging.cancel()
            for served in self._served.values():
                await self._end(served)
            await asyncio.gather(following, plugging, *self._leaving.values(), return_exceptions=True)
            if self._opening is not None:
                with suppress(ConfigError):
                    _, client, _ = await self._opening
                    await client.close()
            if self._elsewhere is not None:
                await self._elsewhere.close()
        if self._failure is not None:
            raise self._failure

    def _note_end(self, task: asyncio.Future[Any]) -> None:
        """What ends following, but stopping, is for a person to mend."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, ConfigError):
            log.error("task.failed", exc_info=error)
            error = ConfigError(f"scope-agent has a bug: {error!r}; the log has its trace, devices stay up")
        self._failure = error
        self._stopped.set()

    # --- the network of the Node's pods -------------------------------------------------------------------

    async def _plug(self) -> None:
        """Keep the CNI configuration as the Node's prefixes ask for it."""
        where = self._config.cni
        if where is None:
            return
        await self._let_pings_out()
        pods: tuple[IPNetwork, ...] = ()
        asked_at: float | None = None
        while True:
            if not pods or asked_at is None or time.monotonic() - asked_at > CNI_ASK:
                try:
                    pods, asked_at = await self._own_pods(), time.monotonic()
                except RegistryError as error:
                    log.warning("cni.unasked error=%s", error)
            async with self._cni_lock:
                if self._is_told_to_leave():
                    self._note_plug("; ".join(await asyncio.to_thread(remove_cni, where)))
                elif asked_at is not None:
                    self._note_plug(await asyncio.to_thread(keep_cni, where, pods))
            await asyncio.sleep(CNI_CHECK if pods else RETRY)

    async def _own_pods(self) -> tuple[IPNetwork, ...]:
        """The prefixes that the cluster gave this Node. Raises RegistryError, ConfigError."""
        _, client, _ = await self._api()
        node = await client.ask("GET", f"/api/v1/nodes/{self._config.node}")
        texts = (node.get("spec") or {}).get("podCIDRs") or ()
        return tuple(prefix for text in texts if (prefix := parse_route(text)) is not None)

    def _note_plug(self, trouble: str) -> None:
        if trouble != self._unplugged:
            log.warning("cni.changed trouble=%s", trouble)
        self._unplugged = trouble

    async def _unplug(self) -> bool:
        """Take our configuration away once no mesh is to stay here. False where something of it stays."""
        where = self._config.cni
        if where is None or not self._is_told_to_leave():
            return True
        async with self._cni_lock:
            failed = await asyncio.to_thread(remove_cni, where)
        for each in failed:
            log.error("cni.stays error=%s", each)
        return not failed

    def _is_told_to_leave(self) -> bool:
        """Whether every mesh of this Node is."""
        return bool(self._peers) and all(peer.spec.leaving for peer in self._peers.values())

    # --- our own ScopePeers -------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Keep our own ScopePeers, and what is to be done for them."""
        await self._let_pings_out()
        if self._elsewhere is not None:
            async for peer in self._elsewhere.own_peers():
                self._take_own(peer)
            self.stop()
            return
        registry = await self._registry(node=self._config.node)
        beside = [self._list_absent(registry), self._leave_deleted_meshes(registry)]
        looking = [asyncio.ensure_future(each) for each in beside]
        for task in looking:
            task.add_done_callback(self._note_end)
        try:
            async for fact in follow(
                registry, Kind.PEER, sleep=asyncio.sleep, uniform=secrets.SystemRandom().uniform
            ):
                self._take(fact)
        finally:
            for task in looking:
                task.cancel()

    async def _let_pings_out(self) -> None:
        """What meshes on disk do first is not to wait for what the API server needs."""
        if self._served:
            with suppress(TimeoutError):
                async with asyncio.timeout(LATE_AFTER):
                    await self._asked.wait()

    async def _list_absent(self, registry: KubeRegistry) -> None:
        """List once more while the ScopePeer of a mesh that we serve is missing."""
        while True:
            await asyncio.sleep(SECOND_LIST_AFTER / 2)
            if self._absent:
                try:
                    self._take(await registry.list(Kind.PEER))
                except RegistryError as error:
                    log.info("node.unlisted error=%s", error)

    async def _leave_deleted_meshes(self, registry: KubeRegistry) -> None:
        """Leave those that went with our ScopePeers, without waiting for lists."""
        while True:
            await self._deletion.wait()
            self._deletion.clear()
            for delay in MESH_LOOKS:
                await asyncio.sleep(delay)
                for mesh in [*self._absent]:
                    try:
                        await registry.get(Kind.MESH, mesh)
                    except NotFound:
                        if mesh in self._absent and mesh in self._served:
                            self._missed(mesh, time.monotonic(), patience=0.0)
                    except RegistryError as error:
                        log.info("node.mesh_unknown mesh=%s error=%s", mesh, error)

    def _take(self, fact: Fact) -> None:
        now = time.monotonic()
        match fact:
            case Disconnected(reason):
                log.info("node.registry_lost reason=%s", reason)
                return
            case Listed(_, revision, resources, complete):
                self._note_revision(revision, now)
                present = self._ours(resources)
                if complete:
                    for mesh in self._served.keys() - present.keys():
                        self._missed(mesh, now, patience=SECOND_LIST_AFTER)
                    self._peers = {}
                self._peers |= present
            case Put(resource) if not _is_removed(resource):
                self._peers |= self._ours([resource])
            case Put(last) | Deleted(last):
                for mesh, peer in list(self._peers.items()):
                    if peer.meta.uid == last.meta.uid:
                        del self._peers[mesh]
                        self._absent.setdefault(mesh, now)
                        if isinstance(fact, Deleted):
                            self._deletion.set()
        self._note_present()

    def _take_own(self, found: Peer | NotFound | PeerRemoved) -> None:
        """What a gateway answers: it serves one mesh, so that every other is left."""
        now = time.monotonic()
        self._peers = {found.spec.mesh: found} if isinstance(found, Peer) else {}
        patience = SECOND_LIST_AFTER if isinstance(found, PeerRemoved) else RESTORE_PATIENCE
        for mesh in self._served.keys() - self._peers.keys():
            self._missed(mesh, now, patience=patience)
        self._note_present()

    def _note_present(self) -> None:
        for mesh, peer in self._peers.items():
            self._absent.pop(mesh, None)
            self._listed.add(mesh)
            if peer.spec.leaving:
                self._depart(mesh, peer)
            else:
                self._serve(mesh).changed.set()

    def _ours(self, resources: Iterable[Resource]) -> dict[str, Peer]:
        """The ScopePeers of our own cluster and Node, by mesh; the newest of two, which follows the Node."""
        ours = [
            peer
            for peer in resources
            if isinstance(peer, Peer)
            and not _is_removed(peer)
            and (peer.spec.cluster, peer.spec.node_name) == (self._config.cluster, self._config.node)
        ]
        return {peer.spec.mesh: peer for peer in sorted(ours, key=lambda peer: peer.meta.created)}

    def _note_revision(self, revision: Revision, now: float) -> None:
        before, self._revision = self._revision, revision
        if before is None or (before.registry == revision.registry and before.number <= revision.number):
            return
        log.warning("node.registry_went_back from=%s to=%s", before, revision)
        self._listed.clear()
        self._patient_until = now + RESTORE_PATIENCE

    def _missed(self, mesh: str, now: float, *, patience: float) -> None:
        """The registry has no ScopePeer of ours for a mesh that we serve."""
        since = self._absent.setdefault(mesh, now)
        if now - since < patience or (mesh not in self._listed and now < self._patient_until):
            return
        log.info("mesh.left mesh=%s: its ScopePeer is gone", mesh)
        self._absent.pop(mesh)
        self._peers.pop(mesh, None)
        self._begin_leaving(mesh, self._leave(mesh, self._served.pop(mesh)))

    def _depart(self, mesh: str, peer: Peer) -> None:
        """Our ScopePeer is told to leave: have nothing of the mesh here, and have the ScopePeer say so."""
        is_told = peer.report is None or peer.report.left
        if mesh in self._leaving or (mesh not in self._served and is_told):
            return
        log.info("mesh.leaving mesh=%s: its ScopePeer is told to", mesh)
        self._begin_leaving(mesh, self._leave_and_tell(mesh, self._served.pop(mesh, None)))

    def _begin_leaving(self, mesh: str, work: Coroutine[object, None, object]) -> None:
        leaving = self._leaving[mesh] = asyncio.ensure_future(work)
        leaving.add_done_callback(self._note_end)
        leaving.add_done_callback(lambda _: self._leaving.pop(mesh))

    # --- one mesh -----------------------------------------------------------------------------------------

    def _serve(self, mesh: str) -> _Served:
        served = self._served.get(mesh)
        if served is None:
            served = self._served[mesh] = _Served()
            served.work = asyncio.ensure_future(self._work(mesh, served))
            served.work.add_done_callback(self._note_end)
        return served

    async def _work(self, mesh: str, served: _Served) -> None:
        """Do what a mesh needs, now and whenever our ScopePeer in it changed."""
        if mesh in self._leaving:
            await asyncio.wait([self._leaving[mesh]])
        while True:
            served.changed.clear()
            try:
                await self._settle(mesh, served)
            except (RegistryError, ConfigError) as error:
                log.warning("mesh.unsettled mesh=%s error=%s", mesh, error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY):
                        await served.changed.wait()
                continue
            await served.changed.wait()

    async def _settle(self, mesh: str, served: _Served) -> None:
        """Have our keys published and a Runner running. Raises RegistryError, ConfigError."""
        state, peer = self._state(mesh), self._peers.get(mesh)
        enrolment = state.load_enrolment() if state.is_enrolled() else None
        if enrolment is not None and enrolment.url:
            raise ConfigError(
                f"this machine joined {mesh} through {enrolment.url}: `scope-agent leave --mesh {mesh}` "
                "makes room for the Node's own peer"
            )
        if peer is not None:
            enrolment = await self._adopt(state, enrolment, peer)
        if enrolment is None:
            return
        if served.name not in ("", enrolment.peer_name):
            await self._end_run(served)
        # One that ended was the peer that is no more; a ScopePeer that is there was made anew.
        if served.run is None or (served.run.done() and peer is not None):
            served.name = enrolment.peer_name
            served.run = asyncio.ensure_future(self._run_mesh(mesh, served))
            served.run.add_done_callback(self._note_end)

    async def _adopt(self, state: StateDir, enrolment: Enrolment | None, peer: Peer) -> Enrolment:
        """Be the peer of a ScopePeer: publish our keys where it holds none, or others."""
        if enrolment is None:
            state.prepare()
            identity, device = state.pending_identity(secrets.token_bytes), ""
            mesh = await (await self._holding()).get(Kind.MESH, peer.spec.mesh)
            if isinstance(mesh, Mesh) and mesh.spec.existing_interface:
                device = mesh.spec.existing_interface
                identity = identity_on(await device_key(device, self._config.run_dir), identity)
        else:
            identity, device = enrolment.identity, enrolment.device
            if enrolment.is_foreign:  # its manager may have given it another key
                identity = identity_on(await device_key(device, self._config.run_dir), identity)
        if peer.report is None or peer.report.keys != identity.public:
            keys = PeerReport(keys=identity.public, held_addresses=await asyncio.to_thread(_held, state))
            await self._publish(peer, keys)
            log.info("mesh.keys_published mesh=%s peer=%s", peer.spec.mesh, peer.meta.name)
        adopted = Enrolment(
            mesh=peer.spec.mesh,
            device=device or self._free_device(),
            identity=identity,
            url="",
            pin=None,
            registry_id="",
            registry_key=await self._elsewhere.registry_key() if self._elsewhere is not None else None,
            peer_name=peer.meta.name,
            peer_uid=peer.meta.uid,
        )
        if adopted != enrolment:
            state.save_enrolment(adopted)
        return adopted

    async def _publish(self, peer: Peer, report: PeerReport) -> None:
        """Have our ScopePeer say it, wherever its registry is. Raises RegistryError, ConfigError."""
        registry = await self._holding()
        await registry.update_status(Kind.PEER, peer.meta.name, report, uid=peer.meta.uid)

    async def _holding(self) -> AgentRegistry:
        """The registry that holds our ScopePeer. Raises RegistryError, ConfigError."""
        return await (self._registry() if self._elsewhere is None else self._elsewhere.registry())

    async def _run_mesh(self, mesh: str, served: _Served) -> None:
        """Run the mesh's Runner, again and again when something ends it that a person must mend."""
        state, config = self._state(mesh), self._config
        ours = RunConfig(
            state,
            config.run_dir,
            only=config.only,
            beside=config.beside,
            fwmark=config.fwmark,
            keys=config.keys,
            trust=config.trust,
            upstream=config.upstream,
            unplugged=lambda: self.unplugged,
        )

        async def connect() -> AgentRegistry:
            self._asked.set()
            if self._elsewhere is not None:
                return await self._elsewhere.connect(mesh)
            return await self._registry(mesh=mesh, own=served.name)

        while True:
            try:
                enrolment = state.load_enrolment()
                interface = enrolment.device if enrolment.is_foreign else ""
                with sole_agent(state, config.run_dir, interface=interface):
                    served.runner = await open_runner(ours, enrolment, connect=connect)
                    await served.runner.run()
            except RemovedFromMesh as error:
                log.warning("mesh.removed mesh=%s reason=%s", mesh, error)
                if self._elsewhere is not None:
                    self._elsewhere.ask_now()  # the peer may be there anew already, as its Node is
                return
            except ConfigError as error:
                log.error("mesh.stopped mesh=%s error=%s", mesh, error)  # noqa: TRY400 - it is a sentence
            await asyncio.sleep(RESTART)

    async def _leave_and_tell(self, mesh: str, served: _Served | None) -> None:
        """Leave, and say so where nothing stays; who waits for that names the Node otherwise."""
        is_clean = served is None or await self._leave(mesh, served)
        if not await self._unplug() or not is_clean:
            return
        while (peer := self._peers.get(mesh)) is not None and peer.spec.leaving:
            if peer.report is None or peer.report.left:
                return
            try:
                await self._publish(peer, PeerReport(keys=peer.report.keys, left=True))
            except (RegistryError, ConfigError) as error:
                log.warning("mesh.left_untold mesh=%s error=%s", mesh, error)
                await asyncio.sleep(RETRY)
            else:
                log.info("mesh.left mesh=%s: its ScopePeer says so", mesh)
                return

    async def _leave(self, mesh: str, served: _Served) -> bool:
        """Take down what a mesh had here: its Runner, its device, its keys. False where something stays."""
        if isinstance(served.runner, MeshPskRunner) and served.run is not None and not served.run.done():
            await served.runner.go_back()
        await self._end(served)
        state, config = self._state(mesh), self._config
        if not state.is_enrolled():
            return True
        enrolment = state.load_enrolment()
        if enrolment.is_foreign:
            state.remove()
            return True
        run_config = RunConfig(state, config.run_dir, fwmark=config.fwmark)
        is_clean = True
        for undo in (be_no_hub, lead_to_no_pods, close_ports, carry_nobody):
            for failed in await asyncio.to_thread(undo, run_config, enrolment):
                log.error("mesh.traces_stay mesh=%s error=%s", mesh, failed)
                is_clean = False
        device = choose_device(
            enrolment.device, run_dir=config.run_dir, only=config.only, beside=config.beside
        )
        try:
            await device.delete()
        except ApplyError as error:
            log.error("mesh.device_stays mesh=%s error=%s", mesh, error)  # noqa: TRY400 - it is a sentence
            is_clean = False
        finally:
            await device.close()
        state.remove()
        return is_clean

    async def _end(self, served: _Served) -> None:
        if served.work is not None:
            served.work.cancel()
            await asyncio.wait([served.work])
        await self._end_run(served)

    async def _end_run(self, served: _Served) -> None:
        """End the Runner; its device stays."""
        if served.run is not None:
            served.run.cancel()
            await asyncio.wait([served.run])
            served.run = None

    def _state(self, mesh: str) -> StateDir:
        return StateDir(mesh, self._config.state_root)

    def _free_device(self) -> str:
        """The first name that no mesh on this machine uses."""
        root = self._config.state_root
        used = {StateDir(mesh, root).load_enrolment().device for mesh in enrolled_meshes(root)}
        return next(
            name for number in range(len(used) + 1) if (name := f"{DEVICE_PREFIX}{number}") not in used
        )

    # --- the API server -----------------------------------------------------------------------------------

    async def _registry(
        self, *, mesh: str | None = None, own: str | None = None, node: str | None = None
    ) -> KubeRegistry:
        """The registry as one mesh, or the Node, needs it; all share one client. Raises ConfigError."""
        kube, client, leases = await self._api()
        return kube.KubeRegistry(
            client, namespace=self._config.namespace, mesh=mesh, own=own, node=node, leases=leases
        )

    async def _api(self) -> tuple[KubeModule, KubeClient, Leases]:
        """What speaks to the API server, one for all. Raises ConfigError."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> tuple[KubeModule, KubeClient, Leases]:
        kube = await asyncio.to_thread(_import_kube)
        config = self._config
        access = kube.in_cluster(url=config.api_server, directory=config.service_account)
        client = kube.KubeClient(access)
        return kube, client, kube.Leases(client, config.namespace)


class _Elsewhere:
    """The gateway of a registry elsewhere, as our cluster's operator tells and our kubelet brings it.

    `directory` has the file of `scope.gateway_file` and `token`, our ServiceAccount's for the gateway.
    """

    def __init__(self, config: NodeConfig, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self._finding: asyncio.Task[GatewayFile] | None = None
        self._registry: HttpRegistry | None = None
        self._hurry = asyncio.Event()

    def ask_now(self) -> None:
        """Let `own_peers` ask before its interval is over."""
        self._hurry.set()

    async def own_peers(self) -> AsyncIterator[Peer | NotFound | PeerRemoved]:
        """What the gateway says of our ScopePeer, again and again; ends once another gateway is named."""
        gateway = await self._gateway()
        name = peer_name(gateway.mesh, self._config.cluster, self._config.node)
        registry = await self.registry()
        uniform = secrets.SystemRandom().uniform
        failures, said = 0, ""
        while await asyncio.to_thread(self._read, or_else=gateway) == gateway:
            delay = uniform(0.5 * ASK_AGAIN, ASK_AGAIN)
            try:
                found = await registry.get(Kind.PEER, name)
            except RegistryError as error:
                failures += 1
                level = logging.INFO if isinstance(error, NotFound) else logging.WARNING
                if str(error) != said:
                    log.log(level, "node.no_peer mesh=%s reason=%s", gateway.mesh, error)
                said = str(error)
                if isinstance(error, NotFound | PeerRemoved):
                    yield error
                if isinstance(error, NotFound):  # the operator may be about to make it
                    delay = min(delay, uniform(0.5, 1.0) * 2.0 ** min(failures, 8))
                elif isinstance(error, Unavailable):
                    delay = delay_after(error, failures, uniform=uniform)
            else:
                failures, said = 0, ""
                if isinstance(found, Peer):
                    yield found
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._hurry.wait()
            self._hurry.clear()
        log.warning("node.gateway_changed: starting anew with the one that the cluster's operator names now")

    async def connect(self, mesh: str) -> HttpRegistry:
        """The gateway as the Runner of a mesh needs it, which closes it; waits until one is named."""
        gateway = await self._gateway()
        http = await asyncio.to_thread(import_http)
        token = http.ProjectedToken(mesh, self._config.cluster, str(self._directory / "token"))
        return http.HttpRegistry(
            gateway.url,
            pin=gateway.pin,
            credential=token,
            for_agent=True,
            # A pin that replaces ours comes with the file as well, and with that we start anew.
            registry_key=gateway.registry_key,
        )

    async def registry(self) -> HttpRegistry:
        """The gateway for questions between; it is closed with this."""
        if self._registry is None:
            self._registry = await self.connect((await self._gateway()).mesh)
        return self._registry

    async def registry_key(self) -> PublicKey:
        """The key that signs removals."""
        return (await self._gateway()).registry_key

    async def close(self) -> None:
        """End what was opened for questions."""
        if self._finding is not None:
            self._finding.cancel()
        if self._registry is not None:
            await self._registry.close()

    async def _gateway(self) -> GatewayFile:
        if self._finding is None:
            self._finding = asyncio.ensure_future(self._find())
        return await asyncio.shield(self._finding)

    async def _find(self) -> GatewayFile:
        """Where the gateway is, once that is told."""
        waiting = False
        while (gateway := await asyncio.to_thread(self._read, or_else=None)) is None:
            if not waiting:
                log.info("node.no_gateway: waiting until this cluster's operator has joined a mesh")
            waiting = True
            await asyncio.sleep(RETRY)
        log.info("node.gateway url=%s mesh=%s", gateway.url, gateway.mesh)
        return gateway

    def _read(self, *, or_else: GatewayFile | None) -> GatewayFile | None:
        """What the file says, `or_else` while there is none to be read."""
        from scope import gateway_file  # brings X.509, which the first ping need not wait for

        try:
            return gateway_file.GatewayFile.parse((self._directory / gateway_file.NAME).read_text())
        except FileNotFoundError:
            return or_else
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            log.warning("node.gateway_unread directory=%s error=%s", self._directory, error)
            return or_else


def _is_removed(resource: Resource) -> bool:
    """Whether a ScopePeer only stands for its own removal. Its keys are buried: a new one gets new keys."""
    return isinstance(resource, Peer) and resource.assignment.tombstone is not None


def _held(state: StateDir) -> tuple[IPAddress, ...]:
    """The addresses that this machine has on disk; a new ScopePeer is given them if they are free."""
    own = state.load()[0].snapshot.own
    return tuple(interface.ip for interface in own.assignment.addresses) if own is not None else ()


def _import_kube() -> KubeModule:
    """Import what speaks to an API server: in a thread, so that pings go on."""
    from scope.registry.kube.access import in_cluster
    from scope.registry.kube.client import KubeClient
    from scope.registry.kube.leases import Leases
    from scope.registry.kube.registry import KubeRegistry

    return KubeModule(in_cluster, KubeClient, Leases, KubeRegistry)


@dataclass(frozen=True, slots=True)
class KubeModule:
    """What is imported late."""

    in_cluster: Callable[..., ServiceAccount]
    KubeClient: Callable[..., KubeClient]
    Leases: Callable[..., Leases]
    KubeRegistry: Callable[..., KubeRegistry]
