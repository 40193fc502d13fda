"""The asyncio shell of one mesh's agent: what it adds to `loop`, which feeds it and has outputs performed.

Registry, disk, and what relays, forwards and carries work in tasks that post their result back. What the
first ping does not need is imported and started after it: the HTTP client above all.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import secrets
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from scope.carrier import Carrier, CarrierFileError, decode_carrier
from scope.channel import BOOT_ID_BYTES, Channel
from scope.model import ConfigError, Forwarding, GatewayOrigin, IPInterface
from scope.relay import Grants
from scope_agent.agent import Agent, AgentConfig, pick_port
from scope_agent.carrier.core import ApplyCarrier, CarrierSeen
from scope_agent.inputs import (
    Applied,
    ApplyForwarding,
    ApplyGrants,
    ApplyPods,
    ApplyPorts,
    DeviceBatch,
    Failed,
    ForwardingSeen,
    InterfacesChanged,
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
    Target,
    TrafficMoved,
    WriteReport,
)
from scope_agent.mesh_loop import REMOVED_GRACE, Connect, MeshLoop, RunConfig, read_records
from scope_agent.state import Enrolment
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
    from scope_agent.carrier.shell.machine import CarrierMachine
    from scope_agent.pods.rules import PodNetwork
    from scope_agent.pods.shell.network import PodRoutes
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
PORT_ATTEMPTS = 20


class Runner(MeshLoop[Agent]):
    """One agent with a device of its own. Raises ConfigError from `run` where a person must act."""

    def __init__(self, config: RunConfig, enrolment: Enrolment, *, connect: Connect | None = None) -> None:
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
        device = choose_device(
            enrolment.device, run_dir=config.run_dir, only=config.only, beside=config.beside
        )
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
            config,
            enrolment,
            device=device,
            probe=open_probe_socket(agent.listen_port, fwmark=config.fwmark),
            connect=connect,
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
        self._addresses: frozenset[IPInterface] = frozenset()

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
        await super()._close()

    # --- what this agent adds to the loop ------------------------------------------------------------------

    def _interfaces_changed(self, event: InterfacesChanged) -> None:
        """What is open to the registry from an address that is gone would be missed in ten seconds only."""
        lost = self._addresses - event.addresses
        self._addresses = event.addresses
        if lost and self._registry is not None:
            self._spawn(self._registry.reconnect())
        self._post(event)

    def _performed(self) -> None:
        super()._performed()
        if self._agent.removed and self._agent.is_cut_off and self._removal_kept:
            self._end_removed()

    async def _removed(self) -> None:
        # Where a tombstone came, too, the device is cut off first and the agent ends by that.
        await asyncio.sleep(REMOVED_GRACE)
        self._end_removed()

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
                self._nudge(address)
            case Reply():
                self._reply(output)
            case ListAgain():
                self._list_again.set()
            case _:
                assert_never(output)

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
        told, delay = PodsSeen(""), PODS_CHECK
        while True:
            await asyncio.sleep(delay)
            started, trouble = time.monotonic(), ""
            try:
                async with self._pods_lock:
                    if self._pods is not None:
                        trouble = await asyncio.to_thread(self._pods.check)
            except (ApplyError, ConfigError) as error:
                trouble = str(error)
            delay = max(PODS_CHECK, PODS_CHECK_SHARE * (time.monotonic() - started))
            seen = PodsSeen(trouble, self._config.unplugged())
            if seen != told:
                log.warning("pods.changed trouble=%s", seen.trouble or seen.unplugged)
                told = seen
                self._post(seen)

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
