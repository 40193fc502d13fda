"""The asyncio shell of one mesh's agent: what it adds to `loop`, which feeds it and has outputs performed.

Registry, disk, and what relays, forwards and carries work in tasks that post their result back. What the
first ping does not need is imported and started after it: the HTTP client above all.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, assert_never, runtime_checkable

from scope import resources
from scope.carrier import Carrier, CarrierFileError, decode_carrier
from scope.channel import BOOT_ID_BYTES, Channel
from scope.model import ConfigError, DeviceKind, Forwarding, GatewayOrigin, IPInterface, Kind, PublicKey
from scope.registry.follow import delay_after
from scope.registry.port import Disconnected, Gone, PeerRemoved, Registry, RegistryError
from scope.relay import Grants
from scope_agent.agent import Agent, AgentConfig, pick_port
from scope_agent.carrier.core import ApplyCarrier, CarrierSeen
from scope_agent.inputs import (
    Applied,
    ApplyForwarding,
    ApplyGrants,
    ApplyPods,
    ApplyPorts,
    Courier,
    DatagramArrived,
    DeviceBatch,
    FactArrived,
    Failed,
    ForwardingSeen,
    IdentitySaved,
    InterfacesChanged,
    KeysSetUp,
    Leaving,
    ListAgain,
    NudgeTunnel,
    Observe,
    Output,
    PodsSeen,
    PortsApplied,
    Relaying,
    Reply,
    SaveIdentity,
    SavePsk,
    SaveState,
    Send,
    SetUpKeys,
    Socket,
    Target,
    TrafficMoved,
    WriteReport,
)
from scope_agent.loop import AgentLoop
from scope_agent.psk.choice import DEFAULT, KeyChoice
from scope_agent.psk.shell.nudging import nudge
from scope_agent.state import Enrolment, StateDir
from scope_agent.underlay.shell import InterfaceWatch
from scope_agent.wireguard.device import ApplyError, HoldEndpoint
from scope_agent.wireguard.port_rules import PortRules
from scope_agent.wireguard.shell import (
    EndpointHolds,
    PortTable,
    choose_device,
    open_probe_socket,
)
from scope_agent.wireguard.shell.nft import NftError

if TYPE_CHECKING:
    from scope.registry.http import Couriered, HttpRegistry
    from scope_agent.carrier.shell.machine import CarrierMachine
    from scope_agent.pods.rules import PodNetwork
    from scope_agent.pods.shell.network import PodRoutes
    from scope_agent.psk.identity import HybridIdentity, KeyMaker, TrustPolicy
    from scope_agent.psk.provider import Provider
    from scope_agent.psk.slots import Record
    from scope_agent.relay.counting import Counted
    from scope_agent.relay.shell.hub import HubMachine, Outcome
    from scope_agent.tree.rules import ForwardedPrefixes
    from scope_agent.tree.shell.forwarding import TreeForwarding

log = logging.getLogger(__name__)

TRAFFIC_INTERVAL = 0.25  # how soon the device's counters tell that someone uses the mesh
HUB_CHECK = 2.0  # seconds: with the knocks that follow, relayed pairs are back within three
HUB_CHECK_SHARE = 20.0  # a check that took t seconds is followed by t times this of not checking
# A status says what was relayed some seconds ago: whoever asks all the time has it counted no more often, and
# nobody waits for long for a machine whose rules are at work.
COUNT_AGAIN = 5.0
COUNT_PATIENCE = 1.0
PORTS_CHECK = 2.0  # seconds: a path that needs the rules is back as soon
NO_PORTS = range(0)
PODS_CHECK = 2.0  # seconds: what somebody took away is back within three
PODS_CHECK_SHARE = 50.0  # a check that took t seconds is followed by t times this of not checking
CARRIER_CHECK = 0.25  # seconds: a carrier that died is back within two
LATE_AFTER = 0.4  # what the first pings do not need is imported after them, or after so long
HEARTBEAT = 60.0
HEARTBEAT_AGAIN = 10.0  # after one that failed: a few are tried before those who listen give us up
LASTING = 30.0  # seconds: a watch that held for so long was no failure
REMOVED_GRACE = 2.0  # for a device to lose its peers before the agent of a removed peer ends
COURIERS = 16  # datagrams on their way to the gateway at once; more are dropped
PORT_ATTEMPTS = 20
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
    fwmark: int = 0
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


class Runner(AgentLoop[Agent]):
    """One agent in its world. Raises ConfigError from `run` where a person must act.

    `connect` gives the registry when the first pings are on their way. A gateway is closed here in the end,
    any other registry by whoever gave it. Without `connect` it is the gateway that the enrolment names.
    """

    def __init__(self, config: RunConfig, enrolment: Enrolment, *, connect: Connect | None = None) -> None:
        self._config = config
        self._connect = connect or self._open_gateway
        self._enrolment = enrolment
        state, trouble = config.state.load()
        if trouble:
            log.warning("state.damaged detail=%s", trouble)
        if not state.listen_port:
            state = replace(state, listen_port=free_port())
        granted, trouble = config.state.load_granted()
        if trouble:
            log.warning("granted.damaged detail=%s", trouble)
        self._ports = PortTable(enrolment.device)
        mesh = state.snapshot.mesh
        openings = self._ports.read() if mesh is not None and mesh.spec.birthday else ()
        self._wall_offset = time.time() - time.monotonic()
        identity = enrolment.identity
        device = choose_device(enrolment.device, run_dir=config.run_dir, only=config.only)
        log.info("device.chosen name=%s kind=%s", enrolment.device, device.kind)
        agent = Agent(
            AgentConfig(
                mesh=enrolment.mesh,
                device=enrolment.device,
                identity=identity,
                registry_key=enrolment.registry_key,
                fwmark=config.fwmark,
                upstream=upstream_of(config, enrolment),
            ),
            channel=Channel(secret=identity.probe, boot_id=secrets.token_bytes(BOOT_ID_BYTES)),
            state=state,
            random=secrets.SystemRandom().random,
            now=time.monotonic(),
            wall=self._wall(),
            granted=granted,
            openings=openings,
            carried=read_earlier(config, enrolment),
            psk_records=read_records(config.state),
        )
        super().__init__(
            agent,
            device=device,
            probe=open_probe_socket(agent.listen_port, fwmark=config.fwmark),
            state=config.state,
            socket=config.run_dir / f"{enrolment.mesh}.sock",
        )
        self._holds = EndpointHolds()
        self._hub: HubMachine | None = None  # made when there is something to relay, or to undo
        self._forwarding: TreeForwarding | None = None  # made likewise
        self._lost = ""  # why what it forwards does not get through, as the agent knows it
        self._hub_lock = asyncio.Lock()
        self._pods: PodRoutes | None = None  # made when there is something to lead to, or to undo
        self._pods_lock = asyncio.Lock()
        self._counted: Counted | None = None  # what the hub relayed
        self._counting: asyncio.Task[None] | None = None
        self._count_again = 0.0
        self._ports_lock = asyncio.Lock()
        self._carrier: CarrierMachine | None = None  # made when there is something to carry, or to undo
        self._carrier_lock = asyncio.Lock()
        self._registry: AgentRegistry | None = None
        self._gateway: Gateway | None = None  # the registry, where it is one
        self._list_again = asyncio.Event()
        self._reached = asyncio.Event()  # once some path works
        self._addresses: frozenset[IPInterface] = frozenset()
        self._couriers = 0
        self._couriers_dropped = 0
        self._removal_kept = self._agent.removed  # a restart would else start from a snapshot without it

    async def run(self) -> None:
        """Run until `stop`; the device stays as it is. Raises ConfigError."""
        watch = InterfaceWatch(self._enrolment.device, self._interfaces_changed)
        try:
            await self._run(
                self._watch_traffic(),
                self._watch_hub(),
                self._watch_ports(),
                self._watch_pods(),
                self._watch_carrier(),
                self._follow_registry(),
            )
        finally:
            watch.stop()

    async def _close(self) -> None:
        self._holds.close()
        if self._gateway is not None:
            await self._gateway.close()

    # --- what this agent adds to the loop ------------------------------------------------------------------

    def _interfaces_changed(self, event: InterfacesChanged) -> None:
        """What is open to the registry from an address that is gone would be missed in ten seconds only."""
        lost = self._addresses - event.addresses
        self._addresses = event.addresses
        if lost and self._registry is not None:
            self._spawn(self._registry.reconnect())
        self._post(event)

    def _performed(self) -> None:
        if self._agent.reaches_a_peer:
            self._reached.set()
        if self._agent.removed and self._agent.is_cut_off and self._removal_kept:
            self._end_removed()

    def _end_removed(self) -> None:
        mesh = self._enrolment.mesh
        self._fail(
            RemovedFromMesh(
                f"this peer was removed from {mesh}: `scope-agent leave --mesh {mesh}` cleans up, "
                "and makes room for another join"
            )
        )

    def _perform(self, output: Output) -> None:
        match output:
            case Send(leg, data):
                self._send(leg, data)
            case DeviceBatch():
                self._spawn(self._apply(output))
            case Observe():
                self._spawn(self._observe())
            case WriteReport():
                self._spawn(self._write_report(output))
            case SaveState():
                self._spawn(self._save(output, removed=self._agent.removed))
            case ApplyGrants(grants):
                self._spawn(self._relay(grants))
            case ApplyForwarding(forwarded):
                self._spawn(self._forward(forwarded))
            case ApplyPods(network):
                self._spawn(self._lead_to_pods(network))
            case ApplyPorts(rules):
                self._spawn(self._apply_ports(rules))
            case ApplyCarrier(carrier):
                self._spawn(self._carry(carrier))
            case SavePsk():
                self._spawn(self._save_psk(output))
            case SetUpKeys(is_awaited):
                self._spawn(self._set_up_keys(is_awaited=is_awaited))
            case SaveIdentity(identity):
                self._spawn(self._save_identity(identity))
            case NudgeTunnel(address=address):
                try:
                    nudge(self._enrolment.device, address)
                except OSError as error:
                    log.debug("psk.nudge_unsent address=%s error=%s", address, error)
            case Reply():
                self._reply(output)
            case ListAgain():
                self._list_again.set()
            case _:
                assert_never(output)

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

    # --- the device ----------------------------------------------------------------------------------------

    async def _watch_traffic(self) -> None:
        last = None
        while True:
            counters = self._device.read_counters()
            if counters is not None and last is not None and counters != last:
                self._post(TrafficMoved())
            last = counters
            await asyncio.sleep(TRAFFIC_INTERVAL)

    async def _hold(self, hold: HoldEndpoint) -> None:
        await self._holds.set(hold, port=self._agent.listen_port)

    # --- ports beside WireGuard's own ----------------------------------------------------------------------

    async def _apply_ports(self, rules: PortRules) -> None:
        search, error = rules.search, ""
        async with self._ports_lock:
            try:
                self._probe.hear(range(search.first, search.last + 1) if search is not None else NO_PORTS)
                await asyncio.to_thread(self._ports.apply, rules)
            except ConfigError as refused:
                error = str(refused)
            except NftError as failed:
                log.warning("ports.failed error=%s", failed)
                error = "nftables takes no rules here"
        log.debug("ports.applied rules=%s error=%s", rules, error)
        self._post(PortsApplied(error))

    async def _watch_ports(self) -> None:
        """Put right what other programs do to our rules."""
        while True:
            await asyncio.sleep(PORTS_CHECK)
            if self._ports.is_empty:
                continue
            async with self._ports_lock:
                try:
                    if await asyncio.to_thread(self._ports.check):
                        log.warning("ports.mended other programs changed the rules")
                except NftError as error:
                    log.warning("ports.unmended error=%s", error)

    # --- pods of other clusters ----------------------------------------------------------------------------

    async def _lead_to_pods(self, network: PodNetwork | None) -> None:
        try:
            async with self._pods_lock:
                await asyncio.to_thread(self._lead_to_these, network)
        except (ApplyError, ConfigError) as error:
            log.warning("pods.failed error=%s", error)
            self._post(Failed(Target.PODS, str(error)))
            return
        log.info("pods.applied reached=%d", len(network.reached) if network is not None else 0)
        self._post(Applied(Target.PODS))

    def _lead_to_these(self, network: PodNetwork | None) -> None:
        from scope_agent.pods.shell.network import PodRoutes

        if self._pods is None:
            self._pods = PodRoutes(self._enrolment.device)
        if network is None:
            self._pods.remove()
        else:
            self._pods.apply(network)

    async def _watch_pods(self) -> None:
        """Put right what other programs do to what leads to pods."""
        told, delay = "", PODS_CHECK
        while True:
            await asyncio.sleep(delay)
            if self._pods is None:
                continue
            started = time.monotonic()
            try:
                async with self._pods_lock:
                    trouble = await asyncio.to_thread(self._pods.check)
            except (ApplyError, ConfigError) as error:
                trouble = str(error)
            delay = max(PODS_CHECK, PODS_CHECK_SHARE * (time.monotonic() - started))
            if trouble != told:
                log.warning("pods.changed trouble=%s", trouble)
                told = trouble
                self._post(PodsSeen(trouble))

    # --- relaying for others -------------------------------------------------------------------------------

    def _wall(self) -> float:
        """The wall clock as it was at the start, going on evenly."""
        return time.monotonic() + self._wall_offset

    async def _relay(self, grants: Grants | None) -> None:
        async with self._hub_lock:
            outcome = await asyncio.to_thread(self._relay_these, grants)
        log.info("relay.applied forwarding=%s reason=%s", outcome.forwarding, outcome.reason)
        self._post(_relaying(outcome, answers=True))

    def _relay_these(self, grants: Grants | None) -> Outcome:
        from scope_agent.relay.shell.hub import Outcome

        if self._hub is None:
            self._hub = make_hub(self._config, self._enrolment)
        try:
            self._config.state.save_granted(grants)
        except ConfigError as error:  # sides ask again after a restart; until then nothing is amiss
            log.warning("granted.unsaved error=%s", error)
        if grants is None:
            for failed in self._hub.stop():
                log.warning("relay.left error=%s", failed)
            return Outcome(Forwarding.NONE, "", forgot=False)
        try:
            return self._hub.apply(grants, self._wall())
        except ConfigError as error:
            return Outcome(Forwarding.NONE, str(error), forgot=False)

    async def _forward(self, forwarded: ForwardedPrefixes | None) -> None:
        try:
            async with self._hub_lock:
                await asyncio.to_thread(self._forward_these, forwarded)
        except (ApplyError, ConfigError) as error:
            log.warning("forwarding.failed error=%s", error)
            self._post(Failed(Target.FORWARDING, str(error)))
            return
        log.info("forwarding.applied inside=%s", forwarded.inside if forwarded is not None else ())
        self._post(Applied(Target.FORWARDING))

    def _forward_these(self, forwarded: ForwardedPrefixes | None) -> None:
        from scope_agent.tree.shell.forwarding import TreeForwarding

        if self._forwarding is None:
            self._forwarding = TreeForwarding(self._enrolment.device)
        if forwarded is None:
            self._forwarding.remove()
            return
        if self._hub is None:
            self._hub = make_hub(self._config, self._enrolment)
        self._forwarding.apply(forwarded, off=self._hub.turn_on())

    async def _watch_hub(self) -> None:
        """Put right what other programs do to our rules."""
        delay = HUB_CHECK
        while True:
            await asyncio.sleep(delay)
            if self._hub is None:
                continue
            started = time.monotonic()
            async with self._hub_lock:
                outcome, lost = await asyncio.to_thread(self._check_hub, self._hub)
            delay = max(HUB_CHECK, HUB_CHECK_SHARE * (time.monotonic() - started))
            if outcome is not None:
                log.warning("relay.changed forwarding=%s reason=%s", outcome.forwarding, outcome.reason)
                self._post(_relaying(outcome, answers=False))
            if lost != self._lost:
                log.warning("forwarding.changed lost=%s", lost)
                self._lost = lost
                self._post(ForwardingSeen(lost))

    async def _count(self) -> Counted | None:
        """What we relay for others, as it was counted a little while ago; None where it was not."""
        if self._hub is None:
            return None
        if self._counting is None and time.monotonic() >= self._count_again:
            self._counting = self._spawn(self._count_now(self._hub))
        if self._counting is not None:
            await asyncio.wait([self._counting], timeout=COUNT_PATIENCE)
        return self._counted

    async def _count_now(self, hub: HubMachine) -> None:
        async with self._hub_lock:
            started = time.monotonic()
            self._counted = await asyncio.to_thread(hub.counters)
        now = time.monotonic()
        self._count_again = now + max(COUNT_AGAIN, HUB_CHECK_SHARE * (now - started))
        self._counting = None

    def _check_hub(self, hub: HubMachine) -> tuple[Outcome | None, str]:
        """What relays now, if that is news, and why what is forwarded for edges does not get through."""
        lost = self._lost
        if self._forwarding is not None:
            try:
                lost = self._forwarding.check()
            except ApplyError as error:
                log.warning("forwarding.unchecked error=%s", error)
        return hub.check(self._wall()), lost

    # --- being carried, and carrying -----------------------------------------------------------------------

    async def _carry(self, carrier: Carrier | None) -> None:
        async with self._carrier_lock:
            seen = await asyncio.to_thread(self._carry_so, carrier)
        log.info("carrier.applied in_effect=%s error=%s", seen.is_in_effect, seen.error)
        self._post(seen)

    def _carry_so(self, carrier: Carrier | None) -> CarrierSeen:
        if self._carrier is None:
            self._carrier = make_carrier(self._config, self._enrolment)
        seen = self._carrier.apply(carrier)
        if carrier is None and seen.is_in_effect:
            self._carrier = None
        return seen

    async def _watch_carrier(self) -> None:
        """Start the process again if it ended, and hear what it says."""
        if carrier_file(self._config, self._enrolment).exists():
            self._carrier = await asyncio.to_thread(make_carrier, self._config, self._enrolment)
        while True:
            await asyncio.sleep(CARRIER_CHECK)
            async with self._carrier_lock:
                carrier = self._carrier
                seen = await asyncio.to_thread(carrier.check) if carrier is not None else None
            if seen is not None:
                self._post(seen)

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
                # Where a tombstone came, too, the device is cut off first and the agent ends by that.
                self._post(FactArrived(Disconnected(str(error))))
                await asyncio.sleep(REMOVED_GRACE)
                self._end_removed()
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


def _relaying(outcome: Outcome, *, answers: bool) -> Relaying:
    return Relaying(
        outcome.forwarding, outcome.reason, forgot=outcome.forgot, answers=answers, taken=outcome.taken
    )


def be_no_hub(config: RunConfig, enrolment: Enrolment) -> list[str]:
    """Take away what we relay with, if we do, and put settings back; what stays comes back in words.

    The mesh is left, so nobody runs here. Raises ConfigError.
    """
    state = config.state
    if not state.granted_file.exists() and not state.settings_file.exists():
        return []
    from scope_agent.tree.shell.forwarding import TreeForwarding

    failed = make_hub(config, enrolment).stop()
    try:
        TreeForwarding(enrolment.device).remove()
    except ApplyError as error:
        failed.append(str(error))
    return failed


def close_ports(config: RunConfig, enrolment: Enrolment) -> list[str]:
    """Take away the ports that WireGuard has beside its own, if any; what stays comes back in words.

    The mesh is left, so nobody runs here.
    """
    state, _ = config.state.load()
    if state.snapshot.mesh is None or not state.snapshot.mesh.spec.birthday:
        return []
    try:
        PortTable(enrolment.device).remove()
    except NftError as error:
        return [f"the rules for ports of {enrolment.device} may stay: {error}"]
    return []


def lead_to_no_pods(_: RunConfig, enrolment: Enrolment) -> list[str]:
    """Take away what led to pods of other clusters, if anything; what stays comes back in words."""
    from scope_agent.pods.shell.network import remove_pod_routes

    return remove_pod_routes(enrolment.device)


def upstream_of(config: RunConfig, enrolment: Enrolment) -> GatewayOrigin | None:
    """The gateway to which we lead as a hub: where we joined, or the one that we were told of by hand."""
    return GatewayOrigin(enrolment.url, enrolment.pin) if enrolment.url else config.upstream


def carrier_file(config: RunConfig, enrolment: Enrolment) -> Path:
    """Where the file of the mesh's carrier lies; the unit `scope-carrier@` says the same."""
    return config.run_dir / "carrier" / f"{enrolment.device}.json"


def read_earlier(config: RunConfig, enrolment: Enrolment) -> Carrier | None:
    """What the last run had its carrier do; None where it had none, or what it wrote is damaged."""
    try:
        return decode_carrier(carrier_file(config, enrolment).read_text(encoding="utf-8"))
    except (OSError, CarrierFileError):
        return None


def make_carrier(config: RunConfig, enrolment: Enrolment) -> CarrierMachine:
    """What carries us and others on this machine."""
    from scope_agent.carrier.shell.machine import CarrierMachine  # brings X.509; most peers have UDP

    return CarrierMachine(carrier_file(config, enrolment), config.state.carrier_file, mark=config.fwmark)


def carry_nobody(config: RunConfig, enrolment: Enrolment) -> list[str]:
    """End our carrier, if there is one; what stays comes back in words. The mesh is left."""
    if not carrier_file(config, enrolment).exists():
        return []
    seen = make_carrier(config, enrolment).apply(None)
    return [seen.error] if seen.error else []


def make_hub(config: RunConfig, enrolment: Enrolment) -> HubMachine:
    """What relays for others on this machine. Raises ConfigError."""
    from scope_agent.relay.shell.hub import HubMachine  # most machines are no hubs

    secret = hashlib.sha256(b"scope relay seed 1" + enrolment.identity.probe.raw).digest()
    return HubMachine(
        enrolment.device,
        run_dir=config.run_dir,
        seed=int.from_bytes(secret[:4], "big"),
        mark=config.fwmark,
        noted=config.state.load_settings(),
        note=config.state.save_settings,
    )


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


def free_port() -> int:
    """A UDP port for WireGuard that nobody here uses now. Raises ConfigError."""
    for _ in range(PORT_ATTEMPTS):
        port = pick_port(secrets.SystemRandom().random)
        if _is_free(port):
            return port
    raise ConfigError("no free UDP port from 20000 to 25999: set spec.listenPort of the ScopeMesh")


def _is_free(port: int) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a machine without IPv6 has no port of it to take
                return False
    return True


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
