"""The whole agent, sans-IO: inputs in, outputs out, and the order in which its rooms speak.

`receive(input, now)`, `handle_timer(now)`, `get_timer()`, `outputs()`. Datagrams leave at once. For the
device, the registry and the disk at most one batch is in flight; the next is planned from the newest views,
so a slow registry never delays an endpoint. Level-triggered: every plan compares the whole of what should be
with the whole of what is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields, replace
from itertools import islice
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar, assert_never

from scope.carrier import Carrier, is_carried
from scope.channel import Channel, Confirmed, Hello, Received
from scope.model import (
    CandidateKind,
    ConfigError,
    DeviceKind,
    Endpoint,
    Family,
    GatewayOrigin,
    IPInterface,
    PathKind,
    Peer,
    PodNetworking,
    PublicKey,
    RelayReport,
    Role,
    Snapshot,
    Tombstone,
)
from scope.relay import Grants
from scope.resources import as_reason
from scope.topology import Topology, peers_for, rehomed
from scope.wire import (
    AskRelay,
    Attach,
    Attached,
    Forward,
    Forwarded,
    Granted,
    KeyPart,
    Message,
    Ping,
    Refused,
    Removed,
)
from scope_agent.agenda import earliest
from scope_agent.carrier.boarding import ListeningHub, Surroundings
from scope_agent.carrier.core import Carriage, CarrierSeen
from scope_agent.carrying import Carrying, back
from scope_agent.desired import (
    DeviceSettings,
    Identity,
    desired_device,
    desired_peer,
    report,
)
from scope_agent.inputs import (
    Applied,
    ApplyForwarding,
    ApplyGrants,
    ApplyPods,
    ApplyPorts,
    CommandArrived,
    Courier,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    DiskState,
    FactArrived,
    Failed,
    ForwardingSeen,
    IdentitySaved,
    Input,
    InterfacesChanged,
    KeysSetUp,
    Leaving,
    Leg,
    ListAgain,
    Observe,
    Output,
    PodsSeen,
    PortsApplied,
    PskSaved,
    Relaying,
    Reply,
    SaveIdentity,
    SaveState,
    Send,
    Socket,
    Target,
    TrafficMoved,
    Via,
    WriteReport,
)
from scope_agent.keying import Keying, read_certificate, read_fingerprint
from scope_agent.membership import Membership
from scope_agent.paths.candidates import contains, public_addresses
from scope_agent.paths.core import Call, Changes, Outgoing, Paths, PathsView, PeerReading
from scope_agent.paths.route import Relay
from scope_agent.pods.core import Pods
from scope_agent.relay.asking import Ask, Asking, Hub, Knock, Knocked, Offered, Standing
from scope_agent.relay.counting import Counted
from scope_agent.relay.serving import Serving
from scope_agent.reporting import Reporting
from scope_agent.status import DeviceStatus, candidates, identities, status
from scope_agent.tree.attaching import Reach
from scope_agent.tree.core import Tree
from scope_agent.tree.rules import ForwardedPrefixes
from scope_agent.wireguard.device import (
    AddAddress,
    AddGuard,
    AddPeer,
    AddRoute,
    CreateDevice,
    DesiredDevice,
    DesiredPeer,
    HoldEndpoint,
    ObservedDevice,
    ObservedPeer,
    PlannedAction,
    RemoveAddress,
    RemoveGuard,
    RemovePeer,
    RemoveRoute,
    SetEndpoint,
    SetFwmark,
    SetListenPort,
    SetMtu,
    SetPrivateKey,
    SetUp,
)
from scope_agent.wireguard.plan import count_drift, plan_device, plan_holds, plan_peers
from scope_agent.wireguard.port_rules import Opening

if TYPE_CHECKING:
    from scope_agent.psk.identity import HybridIdentity
    from scope_agent.psk.slots import Record

DEVICE_ACTIONS = (
    CreateDevice, SetPrivateKey, SetListenPort, SetFwmark, SetMtu, SetUp,
    AddAddress, RemoveAddress, AddRoute, RemoveRoute, AddGuard, RemoveGuard,
)  # fmt: skip
MAX_BATCH = 64  # actions between two looks at the device: endpoints never wait for a thousand peers
SESSION_VALID = 180.0  # WireGuard's REJECT_AFTER_TIME
OBSERVE_BUSY = 0.05  # while a handshake is awaited or a path is in doubt
OBSERVE_TRAFFIC = 0.25  # while traffic flows: a path that swallows it is suspect after 0.5 s
OBSERVE_KEYS = 2.0  # while a new pre-shared key waits for its time or its proof
OBSERVE_IDLE = 15.0  # foreign changes to an idle device are put right within so long
OBSERVE_SHARE = 50.0  # a look that took t seconds is followed by t times this of not looking,
OBSERVE_LATEST = 1.0  # but of no longer than this while traffic flows: a path that swallows it is noticed
# The disk gets one write, of the whole snapshot, for a burst of changes: the larger the mesh, the longer they
# are gathered. What is missing from it after a crash the registry tells again; a removal must not wait.
SAVE_AFTER, SAVE_PER_PEER, SAVE_LONGEST = 1.0, 0.05, 30.0
RETRY_MIN, RETRY_MAX = 1.0, 30.0  # after a failed batch
FORWARDING_AGAIN = 5.0  # after rules or settings were refused
NO_RECORDS: Mapping[PublicKey, Record] = MappingProxyType({})
GOSSIP_AGAIN = 1.0  # a tombstone is passed on twice: the first datagram may be lost


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What an agent is from its start: the rest is in the ScopeMesh."""

    mesh: str
    device: str
    identity: Identity
    registry_key: PublicKey | None  # None: the one that the ScopeMesh's status names
    fwmark: int = 0
    upstream: GatewayOrigin | None = None  # to which a hub leads; None: the one that the mesh names


class Agent:
    """One peer. `random` draws from [0, 1); `channel` holds a fresh boot id.

    `wall` is the wall clock at `now`, `granted` what the last run relayed as a hub, if it was one, `openings`
    the ports that it had WireGuard speak from, `carried` what it had its carrier do, and `psk_records` the
    keys of its pairs.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        channel: Channel,
        state: DiskState,
        random: Callable[[], float],
        now: float,
        wall: float = 0.0,
        granted: Grants | None = None,
        openings: tuple[Opening, ...] = (),
        carried: Carrier | None = None,
        psk_records: Mapping[PublicKey, Record] = NO_RECORDS,
    ) -> None:
        self._config = config
        self._channel = channel
        self._random = random
        self._started = now
        self._wall_offset = wall - now
        own = config.identity.public.wireguard
        self._membership = Membership(own=own, mesh=config.mesh, registry_key=config.registry_key, now=now)
        self._paths = Paths(own=own, random=random)
        self._asking = Asking(random=random)
        self._serving = Serving(random=random, earlier=granted, now=now, wall=wall)
        self._tree = Tree(config.identity.public, signing=config.identity.signing, now=now, wall=wall)
        self._carriage = Carriage(
            own=own,
            signing=config.identity.signing,
            upstream=config.upstream,
            earlier=carried,
            now=now,
            wall=wall,
        )
        self._relay_report: RelayReport | None = None  # the one that was last worth a report
        self._listen_port = state.listen_port
        self._interfaces: frozenset[IPInterface] = frozenset()
        self._underlay_mtu = 1500
        self._out: list[Output] = []
        self._due: float | None = None  # what `get_timer` says until the next input
        self._is_due_known = False
        # device
        self._observed: ObservedDevice | None = None
        self._device_kind: DeviceKind | None = None
        self._sessions: dict[PublicKey, tuple[float, float]] = {}  # key -> (last handshake, since when, ours)
        self._agreed: DesiredDevice | None = None  # what the device was last seen to agree with, but for
        self._agreed_peers: dict[PublicKey, DesiredPeer] = {}  # peers: of these it was
        self._drift = 0
        self._device_busy = False
        self._holding: set[PublicKey] = set()  # whose holds are in the batch in flight
        self._observing_since: float | None = now
        self._observe_at: float | None = None
        self._observe_floor = now
        self._observe_latest = now  # the same while traffic flows
        self._device_error = ""
        self._device_retry = RETRY_MIN
        self._desired: DesiredDevice | None = None
        self._settled = Topology({})  # what is whose
        self._topology = Topology({})  # by whom it is reached
        self._plan_after = now  # a device that failed is left alone for a while
        self._plan_all = True  # the whole device is to be compared
        self._touched: set[PublicKey] = set()  # else these peers
        self._backlog: dict[PublicKey, None] = {}  # and these, by and by: a plan was longer than a batch
        # disk
        self._saved = state
        self._saving: DiskState | None = None
        self._save_at: float | None = None
        self._disk_error = ""
        # what a hub of a tree forwards: wanted last; None also where nothing was ever asked for
        self._forwarded: ForwardedPrefixes | None = None
        self._is_forwarding_known = granted is None  # else an earlier run may have left something
        self._forwarding_busy = False
        self._forwarding_after = now
        self._forwarding_error = ""
        self._lost = ""  # why what this hub forwards does not get through
        earlier = state.snapshot.mesh
        self._pods = Pods(left=earlier is not None and earlier.spec.pod_networking is not PodNetworking.OFF)
        # gossip and forwarding
        self._passed: dict[str, tuple[Tombstone, float]] = {}
        self._known_tombstones: set[str] = {t.peer_uid for t in state.snapshot.tombstones}
        self._origins: dict[PublicKey, bytes] = {}
        self._snapshot = Snapshot()
        self._peer_keys: dict[PublicKey, PublicKey] = {}  # probe key -> WireGuard key of the peers
        self._carrying = self._make_carrying()
        self._keying = Keying(
            psk_records,
            own=own,
            random=random,
            offset=wall - now,
            carrying=self._carrying,
            paths=self._paths,
        )
        self._renewing: tuple[int, HybridIdentity] | None = None  # for which command, what is being written
        written = state.snapshot.own.report if state.snapshot.own is not None else None
        self._reporting = Reporting(own=own, written=written, random=random)
        self._membership.restore(state.snapshot)
        self._paths.restore(state.last_good, now)
        self._paths.restore_openings(openings, now)
        self._paths.restore_tries(state.tries, now, wall=wall)
        self._asking.restore(state.grants)
        self._tree.restore(state.attachments, was_in_mesh=bool(state.snapshot.peers))

    def _make_carrying(self) -> Carrying:
        return Carrying(self._channel, paths=self._paths, membership=self._membership)

    # --- the five verbs ------------------------------------------------------------------------------------

    def receive(self, event: Input, now: float) -> None:
        """Take one input."""
        match event:
            case DatagramArrived(data, leg):
                self._datagram(data, leg, now)
            case FactArrived(fact):
                was_complete = self._membership.is_complete
                self._membership.receive(fact, now)
                self._plan_all |= self._membership.is_complete and not was_complete
                self._reporting.receive(fact)
                self._snapshot_changed(now)
            case InterfacesChanged(addresses, mtu, inner):
                before, self._interfaces = self._interfaces, self._usable(addresses)
                self._paths.set_inner(inner)
                self._underlay_mtu = mtu
                self._plan_all = True
                if self._interfaces != before:
                    self._network_changed(now)
                self._snapshot_changed(now)
            case DeviceObserved(device, kind, wall):
                self._device_observed(device, kind, wall, now)
            case Applied(target):
                self._applied(target, now)
            case Failed():
                self._failed(event, now)
            case Relaying(by, reason, forgot=forgot, answers=answers, taken=taken):
                self._serving.relaying(by, reason, forgot=forgot, answers=answers, taken=taken, now=now)
            case ForwardingSeen(lost):
                self._lost = lost
            case PodsSeen(trouble, unplugged):
                self._pods.seen(trouble, unplugged=unplugged)
                self._reporting.expect()
            case PortsApplied(error):
                self._paths.port_rules_applied(error, now)
            case CarrierSeen():
                self._carriage.seen(event, now)
            case PskSaved(peer, error):
                self._keying.saved(peer, error, now)
            case KeysSetUp(maker):
                self._keying.equip(maker, now)
                self._reporting.expect(is_awaited=self._keying.is_required)  # of our identity
                self._observe_soon(now, OBSERVE_BUSY)  # of what its pairs hold the room has seen nothing
            case IdentitySaved(error):
                self._identity_saved(error, now)
            case TrafficMoved():
                self._paths.traffic_moved(now)
                self._observe_soon(now, OBSERVE_TRAFFIC, floor=min(self._observe_floor, self._observe_latest))
            case Leaving(tombstone):
                if self._membership.bury(tombstone):
                    self._snapshot_changed(now)
            case CommandArrived():
                self._out += self._command(event, now)
            case _:
                assert_never(event)
        self._collect(now)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self._paths.handle_timer(now)
        self._asking.handle_timer(now)
        self._serving.handle_timer(now)
        self._tree.handle_timer(now)
        self._keying.handle_timer(now)
        if self._membership.wants_list(now):
            self._out.append(ListAgain())
        for uid, (tombstone, at) in list(self._passed.items()):
            if now >= at:
                del self._passed[uid]
                self._pass_on(tombstone, now)
        self._collect(now)

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        if not self._is_due_known:
            self._due, self._is_due_known = self._next_due(), True
        return self._due

    def _next_due(self) -> float | None:
        return earliest(
            self._paths.get_timer(),
            self._asking.get_timer(),
            self._serving.get_timer(),
            self._tree.get_timer(),
            self._forwarding_at(),
            self._pods.get_timer(),
            self._carriage.get_timer(),
            self._keying.get_timer(),
            self._membership.get_timer(),
            self._observe_at if self._observing_since is None and not self._device_busy else None,
            self._reporting.get_timer(),
            self._save_at if self._saving is None else None,
            *[at for _, at in self._passed.values()],
        )

    def outputs(self) -> list[Output]:
        """What is to be performed now, in order."""
        out, self._out = self._out, []
        return out

    # --- what the shell may ask ----------------------------------------------------------------------------

    @property
    def listen_port(self) -> int:
        """WireGuard's UDP port."""
        return self._listen_port

    @property
    def removed(self) -> bool:
        """Whether our own ScopePeer was deliberately removed."""
        return self._membership.removed_self()

    @property
    def is_cut_off(self) -> bool:
        """Whether the device is known to have no peers."""
        return self._observed is not None and not self._observed.peers and not self._device_busy

    @property
    def reaches_a_peer(self) -> bool:
        """Whether some path is believed to work."""
        return self._paths.any_alive

    @property
    def home(self) -> PublicKey | None:
        """The hub of a tree that we are attached to, by its WireGuard key."""
        return self._tree.home

    def snapshot(self) -> Snapshot:
        """What is believed of the mesh."""
        return self._snapshot

    def paths(self, now: float) -> PathsView:
        """All paths."""
        return self._paths.view(now)

    # --- datagrams -----------------------------------------------------------------------------------------

    def _datagram(self, data: bytes, leg: Leg, now: float) -> None:
        opened = self._carrying.open(data)
        source = leg.endpoint if isinstance(leg, Socket) else None
        if opened is not None and source is not None and not is_carried(source):
            self._paths.heard_over_udp(now)
        match opened:
            case Hello(sender, cookie):
                self._out += self._carrying.send(cookie, back(leg, sender), now)
            case Confirmed(sender):
                self._paths.confirmed(sender, source, now)
            case Received(sender, message, origin):
                self._message(sender, message, leg, origin=origin, now=now)
            case None:
                pass
            case _:
                assert_never(opened)

    def _message(self, sender: PublicKey, message: Message, leg: Leg, *, origin: bytes, now: float) -> None:
        if self._origins.get(sender) != origin:
            self._origins[sender] = origin
            self._greet(sender, leg, now)
        if isinstance(leg, Socket) and leg.port is not None:
            if isinstance(message, Ping):
                self._paths.hit(sender, leg.endpoint, leg.port, now)
            return
        match message:
            case Forward():
                self._out += self._carrying.forward(sender, message, peers=self._peer_keys.keys(), now=now)
            case Forwarded(asker, datagram):
                if not isinstance(leg, Via):  # one hop of carrying: what is carried carries nothing
                    self._datagram(datagram, Via(carrier=sender, to=asker), now)
            case Removed(tombstone):
                if self._membership.bury(tombstone):
                    self._snapshot_changed(now)
            case Granted() | Refused():
                self._answered(sender, message, now)
            case AskRelay():
                if sender in self._peer_keys:
                    self._serving.ask(self._peer_keys[sender], message, now)
            case Attach() | Attached():
                answer = None
                if sender in self._peer_keys:
                    answer = self._tree.receive(self._peer_keys[sender], message, now)
                if answer is not None:
                    self._out += self._carrying.seal(sender, answer, back(leg, sender), now)
            case KeyPart():
                if sender in self._peer_keys:
                    self._keying.receive(self._peer_keys[sender], message, now)
            case _:
                source = leg.endpoint if isinstance(leg, Socket) else None
                self._paths.receive(sender, message, source, origin=origin, now=now)

    def _greet(self, sender: PublicKey, leg: Leg, now: float) -> None:
        """A peer that was away may have missed removals."""
        if sender not in self._peer_keys:
            return
        self._tree.greeted(self._peer_keys[sender], now)
        for tombstone in self._snapshot.tombstones[-MAX_BATCH:]:
            self._out += self._carrying.seal(sender, Removed(tombstone), back(leg, sender), now)

    # --- relays --------------------------------------------------------------------------------------------

    def _answered(self, sender: PublicKey, message: Granted | Refused, now: float) -> None:
        hub = self._peer_keys.get(sender)
        if hub is None:
            return
        match message:
            case Granted():
                self._asking.granted(hub, message, now)
            case Refused():
                self._asking.refused(hub, message, now)
            case _:
                assert_never(message)

    def _stand(self, key: PublicKey, now: float) -> None:
        """Tell how a pair stands to what asks hubs for it."""
        self._keying.stand(key, now)
        view, peer = self._paths.view(now).pairs.get(key), self._snapshot.peers.get(key)
        if view is None or peer is None:
            return
        standing = Standing(
            view.path,
            since=view.since,
            is_in_doubt=view.is_in_doubt,
            is_expected=not view.declared or peer.assignment.online,
            endpoint=view.endpoint if view.path is not PathKind.NONE else None,
            rtt=view.rtt,
            is_hub_itself=view.path is PathKind.RELAYED and view.hub == peer.meta.name,
        )
        self._asking.observe(key, standing, now)
        is_alive = view.path is not PathKind.NONE
        self._tree.observe(key, Reach(is_alive, rtt=view.rtt, is_in_doubt=view.is_in_doubt), now)

    def _ask_hubs(self, now: float) -> None:
        """Do what the asking room wants."""
        for out in self._asking.outputs():
            match out:
                case Ask(hub, peer):
                    self._ask(hub, peer, now)
                case Knock(endpoint, data):
                    self._out.append(Send(Socket(endpoint), data))
                case Knocked(peer):
                    self._paths.knocked(peer, now)
                case Offered(peer, relays):
                    self._paths.set_relays(peer, {at: Relay(*relay) for at, relay in relays.items()}, now)
                case _:
                    assert_never(out)

    def _ask(self, hub: PublicKey, peer: PublicKey, now: float) -> None:
        report = self._snapshot.peers[hub].report
        endpoint = self._paths.endpoint_of(report.keys.probe, now) if report is not None else None
        if report is not None and endpoint is not None:
            self._out += self._carrying.seal(report.keys.probe, AskRelay(peer), Socket(endpoint), now)

    def _serve(self, now: float) -> None:
        """Do what the hub's side wants: one application at a time, and nobody is told before it stands."""
        apply = self._serving.take_apply()
        if apply is not None:
            self._out.append(ApplyGrants(apply.grants))
        for telling in self._serving.take_tellings():
            endpoint = self._paths.endpoint_of(telling.to, now)
            leg = Socket(endpoint) if endpoint is not None else Courier(telling.to)
            self._out += self._carrying.seal(telling.to, telling.message, leg, now)
        report = self._relaying(now)
        # How many pairs there are goes along with whatever else is reported.
        if _says_more(report, self._relay_report):
            self._reporting.expect()
        self._relay_report = report

    def _relaying(self, now: float) -> RelayReport | None:
        """What our own status says of relaying and carrying."""
        report = self._serving.report(now)
        if report is None:
            return None
        unrouted, carrier = as_reason(self._forwarding_error or self._lost), self._carriage.report()
        if not unrouted and carrier is None:
            return report
        return replace(report, unrouted=unrouted, carrier=carrier)

    # --- what TCP carries ----------------------------------------------------------------------------------

    def _carry(self, now: float) -> None:
        """Have ourselves carried, and others, as things are now."""
        silent_since = self._paths.udp_silent_since()
        if silent_since is not None or not self._carriage.is_at_rest:
            self._choose_carriers(silent_since, now)
        if self._carriage.is_carried:
            self._carriage.set_granted(self._asking.ports())
        apply = self._carriage.take_apply(now)
        if apply is not None:
            self._out.append(apply)
        if self._carriage.take_change():
            self._take_passages(now)
        for hub in self._carriage.take_connected():
            self._asking.connected(hub, now)
            self._paths.connected(hub, now)

    def _choose_carriers(self, silent_since: float | None, now: float) -> None:
        is_carried = self._carriage.is_carried
        around = Surroundings(
            silent_since,
            is_used=is_carried and self._paths.any_by_carrier,
            distances=self._asking.distances() if is_carried else {},
            wanted=self._asking.wanted_hubs() if is_carried else frozenset(),
        )
        if self._carriage.observe(around, now):
            self._paths.doubt_udp(now)

    def _take_passages(self, now: float) -> None:
        peers, own = self._snapshot.peers, self._snapshot.own
        hubs = {
            hub: {endpoint: Relay(peers[hub].meta.name, user_space=False)}
            for hub, endpoint in self._carriage.ways_to_hubs().items()
            if hub in peers
        }
        self._paths.set_carried(hubs, now)
        self._asking.set_passages(self._carriage.passages(), now)
        if own is not None:
            here = Relay(own.meta.name, user_space=False)
            self._paths.expect_carried(self._carriage.members(), here)

    # --- membership ----------------------------------------------------------------------------------------

    def _snapshot_changed(self, now: float) -> None:
        before, snapshot = self._snapshot, self._membership.snapshot()
        if snapshot is before:
            return
        for tombstone in snapshot.tombstones if snapshot.tombstones != before.tombstones else ():
            if tombstone.peer_uid not in self._known_tombstones:
                self._known_tombstones.add(tombstone.peer_uid)
                self._passed[tombstone.peer_uid] = (tombstone, now + GOSSIP_AGAIN)
                self._pass_on(tombstone, now)
        self._snapshot = snapshot
        mesh = snapshot.mesh
        if mesh is not None and mesh.spec.listen_port and mesh.spec.listen_port != self._listen_port:
            self._listen_port = mesh.spec.listen_port
            self._network_changed(now)
        if snapshot.peers.keys() != before.peers.keys() or mesh is not before.mesh:
            self._peer_keys = {p.report.keys.probe: k for k, p in snapshot.peers.items() if p.report}
            reflectors = {r.probe_key for r in mesh.status.reflectors} if mesh is not None else set()
            self._channel.set_correspondents(frozenset(reflectors | self._peer_keys.keys()))
        self._interfaces = self._usable(self._interfaces)
        self._tree.configure(snapshot, is_removed=self.removed, now=now)
        if _shape_differs(before, snapshot) or snapshot.tombstones != before.tombstones:
            self._settled = peers_for(snapshot)
            self._follow_tree(now, anew=True)
        else:
            self._link(now)
        self._keying.set_snapshot(snapshot, is_complete=self._membership.is_complete, now=now)
        if mesh is not None and snapshot.own is not None:
            self._serving.configure(
                mesh.spec.hubs,
                is_hub=snapshot.own.assignment.role is Role.HUB and not self.removed,
                listen_port=self._listen_port,
                members={key: probe for probe, key in self._peer_keys.items()},
                now=now,
            )
            self._carriage.configure(
                mesh_uid=mesh.meta.uid,
                hubs=mesh.spec.hubs,
                is_hub=snapshot.own.assignment.role is Role.HUB and not self.removed,
                listen_port=self._listen_port,
                members={key: p.report.keys.signing for key, p in snapshot.peers.items() if p.report},
                listening=_listening(snapshot),
                gateway=mesh.status.gateway,
            )
            self._take_passages(now)
        for key, peer in snapshot.peers.items():
            if before.peers.get(key) is not peer:
                self._stand(key, now)
        self._ask_hubs(now)
        self._adopt(now, new=snapshot.peers.keys() - before.peers.keys())
        self._reporting.expect()
        self._save_soon(now, urgent=snapshot.tombstones != before.tombstones)

    # --- the tree ------------------------------------------------------------------------------------------

    def _follow_tree(self, now: float, *, anew: bool = False) -> None:
        """Have the device know who leads where; to move an edge costs the same in a mesh of any size."""
        changes = self._tree.take_changes()
        if changes.to_keep:
            self._save_soon(now)
        if anew or changes.is_reshaped:
            self._topology = self._tree.topology(self._settled)
            self._plan_all = True
            self._link(now)
            self._reporting.expect()
        elif changes.moves:
            self._topology = rehomed(self._topology, self._settled, changes.moves)
            self._touched |= changes.moves.keys()
            self._touched |= {hub for move in changes.moves.values() for hub in move if hub is not None}
        self._paths.watch(self._tree.watched(), now)
        for hub in sorted(self._tree.take_doubt()):
            self._paths.suspect(hub, now)

    def _link(self, now: float) -> None:
        """Have paths to those that we are to have links with, and to nobody else."""
        snapshot, pairs = self._snapshot, self._tree.pairs()
        self._paths.set_snapshot(snapshot, now, pairs=pairs)
        members = snapshot.peers.keys() if pairs is None else pairs & snapshot.peers.keys()
        self._asking.set_members(members, _hubs(snapshot), now)

    def _say_tree(self, now: float) -> None:
        for say in self._tree.outputs(now):
            report = self._snapshot.peers[say.to].report if say.to in self._snapshot.peers else None
            endpoint = self._paths.endpoint_of(report.keys.probe, now) if report is not None else None
            if report is not None and endpoint is not None:
                self._out += self._carrying.seal(report.keys.probe, say.message, Socket(endpoint), now)

    def _forwarding_at(self) -> float | None:
        """When what a hub forwards is to be tried again."""
        return self._forwarding_after if self._forwarding_error and not self._forwarding_busy else None

    def _plan_forwarding(self, now: float) -> None:
        if self._snapshot.own is None or self._forwarding_busy or now < self._forwarding_after:
            return
        wanted = self._tree.forwarding(self._settled)
        if self._is_forwarding_known and wanted == self._forwarded and not self._forwarding_error:
            return
        self._is_forwarding_known, self._forwarding_busy, self._forwarded = True, True, wanted
        self._out.append(ApplyForwarding(wanted))

    def _plan_pods(self, now: float) -> None:
        device = self._observed
        mtu = device.mtu if device is not None and device.exists and device.up else None
        self._pods.configure(self._snapshot, self._settled, mtu=mtu, is_removed=self.removed)
        apply = self._pods.take_apply(now)
        if apply is not None:
            self._out.append(ApplyPods(*apply))

    def _pass_on(self, tombstone: Tombstone, now: float) -> None:
        for key, pair in self._paths.view(now).pairs.items():
            peer = self._snapshot.peers.get(key)
            if peer is None or peer.report is None or pair.endpoint is None or key == tombstone.key:
                continue
            leg = Socket(pair.endpoint)
            self._out += self._carrying.seal(peer.report.keys.probe, Removed(tombstone), leg, now)

    def _network_changed(self, now: float) -> None:
        self._paths.set_interfaces(self._interfaces, self._listen_port, now)
        versions = {interface.version for interface in self._interfaces}
        families = {Family.IPV4 if version == 4 else Family.IPV6 for version in versions}
        self._asking.set_families(frozenset(families), now)

    def _usable(self, addresses: frozenset[IPInterface]) -> frozenset[IPInterface]:
        """Our own addresses that the underlay may use: not the mesh's."""
        mesh = self._snapshot.mesh
        prefixes = (mesh.spec.addressing.ipv4, mesh.spec.addressing.ipv6) if mesh is not None else ()
        return frozenset(a for a in addresses if not contains([p for p in prefixes if p is not None], a.ip))

    # --- the device ----------------------------------------------------------------------------------------

    def _device_observed(self, device: ObservedDevice, kind: DeviceKind, wall: float, now: float) -> None:
        first = self._observed is None
        cost = now - self._observing_since if self._observing_since is not None else 0.0
        self._observing_since = None
        self._observe_floor = now + min(cost * OBSERVE_SHARE, OBSERVE_IDLE)
        self._observe_latest = now + OBSERVE_LATEST
        self._device_kind = kind
        readings = {key: self._read(key, peer, wall, now) for key, peer in device.peers.items()}
        if len(self._sessions) > len(device.peers):
            self._sessions = {key: value for key, value in self._sessions.items() if key in device.peers}
        differing = _differing(self._observed, device)
        self._observed = device
        if first:
            self._adopt(now, new=device.peers.keys())
        self._paths.observe(readings, now)
        self._keying.observe(device, self._sessions, now)
        self._count_drift(device, differing)
        self._observe_at = None
        self._observe_soon(now, OBSERVE_BUSY if self._paths.busy(now) else OBSERVE_IDLE)
        if differing is None:
            self._plan_all = True
        else:
            self._touched |= differing
        if first:
            self._reporting.expect()

    def _read(self, key: PublicKey, peer: ObservedPeer, wall: float, now: float) -> PeerReading:
        known = self._sessions.get(key)
        stamp = peer.last_handshake or 0.0
        fresh = known is not None and stamp != known[0] and stamp > 0.0
        if known is None:
            age = wall - stamp if stamp > 0.0 else SESSION_VALID
            known = (stamp, now - max(age, 0.0))
        elif fresh:
            known = (stamp, now)
        self._sessions[key] = known
        return PeerReading(
            tx=peer.tx,
            rx=peer.rx,
            endpoint=peer.endpoint,
            handshake=fresh,
            session=now - known[1] < SESSION_VALID,
        )

    def _adopt(self, now: float, *, new: Set[PublicKey]) -> None:
        """What an earlier agent left working stays as it is."""
        if self._observed is None or now - self._started > SESSION_VALID:
            return
        for key in sorted(self._snapshot.peers.keys() & self._observed.peers.keys() & new):
            peer = self._observed.peers[key]
            stamp, since = self._sessions[key]
            if peer.endpoint is not None and peer.allowed_ips:
                session = stamp > 0.0 and now - since < SESSION_VALID
                self._paths.adopt(key, peer.endpoint, session=session, now=now)

    def _observe_soon(self, now: float, delay: float, *, floor: float | None = None) -> None:
        at = max(now + delay, self._observe_floor if floor is None else floor)
        if self._observe_at is None or at < self._observe_at:
            self._observe_at = at

    def _plan_device(self, now: float) -> None:
        if not (self._plan_all or self._touched or self._backlog):
            return
        if self._device_busy or now < self._plan_after:
            return
        if self._observed is None or self._observing_since is not None:
            return
        desired, observed = self._want(now), self._observed
        if desired is None:
            return
        actions: tuple[PlannedAction, ...]
        if self._plan_all:
            keys = desired.peers.keys() | observed.peers.keys()
            actions = (*plan_holds(desired.peers), *plan_device(desired, observed))
        else:
            keys = self._touched | set(islice(self._backlog, MAX_BATCH))
            wanted, known = _only(desired.peers, keys), _only(observed.peers, keys)
            actions = (*plan_holds(wanted), *plan_peers(wanted, known))
        batch = actions[:MAX_BATCH]
        acted = {action.key for action in batch if not isinstance(action, DEVICE_ACTIONS)}
        waits = {a.key: None for a in actions[MAX_BATCH:] if not isinstance(a, DEVICE_ACTIONS)}
        self._agree(desired, keys, but=acted | waits.keys())
        self._touched = acted  # what was acted on is compared again with the next observation
        self._backlog = waits | {key: None for key in self._backlog if key not in keys}
        self._plan_all = any(isinstance(action, DEVICE_ACTIONS) for action in actions)
        if not batch:
            return
        if self._plan_all:
            self._agreed = None
        self._device_busy = True
        self._holding = {action.key for action in batch if isinstance(action, HoldEndpoint)}
        self._out.append(DeviceBatch(batch, desired))
        for action in batch:
            if isinstance(action, SetEndpoint | AddPeer | HoldEndpoint):
                self._paths.settled(action.key, now)
            elif isinstance(action, RemovePeer):
                self._sessions.pop(action.key, None)

    def _agree(self, desired: DesiredDevice, keys: Set[PublicKey], *, but: Set[PublicKey]) -> None:
        """Note with what the device agrees now, of these peers; what is acted on is to be seen first."""
        if self._plan_all:
            self._agreed_peers = dict(desired.peers)
        elif self._agreed is not None:
            self._agreed_peers |= _only(desired.peers, keys)
        else:
            return
        for key in but:
            self._agreed_peers.pop(key, None)
        self._agreed = desired

    def _count_drift(self, device: ObservedDevice, differing: set[PublicKey] | None) -> None:
        """Count what somebody else changed since the device was last as it should be."""
        agreed, desired = self._agreed, self._desired
        if agreed is None or desired is None or self._device_busy or differing == set():
            return
        known = self._agreed_peers
        keys = device.peers.keys() | known.keys() if differing is None else differing
        foreign = {key for key in keys if key in known or key not in desired.peers}
        self._drift += count_drift(
            replace(agreed, peers=_only(known, foreign)), replace(device, peers=_only(device.peers, foreign))
        )

    def _want(self, now: float) -> DesiredDevice | None:
        """The device as it should be: worked out anew for peers that were touched, else for all."""
        view, desired = self._paths.view(now), self._desired
        if self._plan_all or desired is None:
            settings = DeviceSettings(
                self._config.device,
                listen_port=self._listen_port,
                underlay_mtu=self._underlay_mtu,
                fwmark=self._config.fwmark,
            )
            desired = desired_device(
                self._snapshot,
                self._topology,
                view,
                identity=self._config.identity,
                settings=settings,
                keyed=self._keying.pair,
            )
            if desired is not None and self.removed:
                desired = replace(desired, peers={})
            elif desired is not None and not self._membership.is_complete:
                desired = replace(desired, peers=desired.peers | self._unlisted())
        else:
            allowed = self._topology.allowed_ips
            wanted = {
                key: desired_peer(
                    key, allowed.get(key, frozenset()), view.pairs.get(key), self._keying.pair(key)
                )
                for key in self._touched & self._snapshot.peers.keys() & desired.peers.keys()
            }
            if any(desired.peers[key] != peer for key, peer in wanted.items()):
                desired = replace(desired, peers=desired.peers | wanted)
        self._desired = desired
        return desired

    def _unlisted(self) -> dict[PublicKey, DesiredPeer]:
        """Peers that the last agent added after it last wrote to disk: left as they are until a list."""
        observed = self._observed.peers if self._observed is not None else {}
        return {
            key: DesiredPeer(key, allowed_ips=peer.allowed_ips, keepalive=peer.keepalive)
            for key, peer in observed.items()
            if key not in self._snapshot.peers and not self._membership.is_buried(key)
        }

    # --- batches -------------------------------------------------------------------------------------------

    def _applied(self, target: Target, now: float) -> None:
        match target:
            case Target.DEVICE:
                self._device_busy = False
                self._device_error, self._device_retry = "", RETRY_MIN
                self._observing_since = now  # the shell looks after each batch
                for key in sorted(self._holding):
                    self._paths.held(key, now)
            case Target.REGISTRY:
                self._reporting.applied()
            case Target.DISK:
                if self._saving is not None:
                    self._saved, self._saving = self._saving, None
                self._disk_error = ""
            case Target.FORWARDING:
                self._forwarding_busy, self._forwarding_error = False, ""
            case Target.PODS:
                self._pods.applied()
                self._reporting.expect()
            case _:
                assert_never(target)

    def _failed(self, failed: Failed, now: float) -> None:
        match failed.target:
            case Target.DEVICE:
                self._device_busy, self._device_error = False, failed.error
                self._plan_all = True
                if (
                    failed.port_taken
                    and self._snapshot.mesh is not None
                    and not self._snapshot.mesh.spec.listen_port
                ):
                    self._listen_port = pick_port(self._random)
                    self._plan_all = True
                    self._network_changed(now)
                    self._save_soon(now)
                self._observing_since = None
                self._plan_after = self._observe_at = now + self._device_retry
                self._observe_floor = self._observe_latest = self._plan_after
                self._device_retry = min(2 * self._device_retry, RETRY_MAX)
            case Target.REGISTRY:
                self._reporting.failed(failed.error, now)
            case Target.DISK:
                self._saving, self._disk_error = None, failed.error
                self._save_at = now + RETRY_MAX
            case Target.FORWARDING:
                self._forwarding_busy, self._forwarding_error = False, failed.error
                self._forwarding_after = now + FORWARDING_AGAIN
            case Target.PODS:
                self._pods.failed(failed.error, now)
                self._reporting.expect()
            case _:
                assert_never(failed.target)

    def _collect(self, now: float) -> None:
        """Turn what the rooms want into outputs."""
        changes = self._paths.changes(now)
        for key in sorted(changes.pairs):
            self._stand(key, now)
        self._follow_tree(now)
        self._say_tree(now)
        self._plan_forwarding(now)
        self._plan_pods(now)
        self._carry(now)
        self._ask_hubs(now)
        self._serve(now)
        for out in self._paths.outputs():
            match out:
                case Outgoing(to, message, endpoint, ttl, port):
                    self._out += self._carrying.seal(to, message, Socket(endpoint, ttl, port), now)
                case Call():
                    self._out += self._carrying.call(out, now)
                case _:
                    assert_never(out)
        rules = self._paths.take_port_rules(now)
        if rules is not None:
            self._out.append(ApplyPorts(rules))
        keyed = self._keying.take_changes()
        if keyed:
            self._reporting.expect()
        self._touched |= changes.pairs | keyed
        self._out += self._keying.outputs(now)
        if self._keying.wants_look:
            self._observe_soon(now, OBSERVE_BUSY if self._keying.expects_proof(now) else OBSERVE_KEYS)
        self._plan_device(now)
        if self._observe_at is not None and now >= self._observe_at:
            if self._observing_since is None and not self._device_busy:
                self._observing_since = now
                self._observe_at = None
                self._out.append(Observe())
        elif self._paths.busy(now):
            self._observe_soon(now, OBSERVE_BUSY)
        self._plan_report(changes, now)
        self._plan_save(changes, now)
        self._is_due_known = False

    def _plan_report(self, changes: Changes, now: float) -> None:
        own = self._snapshot.own
        self._reporting.observe(changes, paths=self._paths, snapshot=self._snapshot, now=now)
        if not self._reporting.handle_timer(now):
            return
        if own is None or not self._listen_port or self._observed is None:
            return  # whatever brings these makes a report due
        if not self._membership.registration().connected:
            return  # so does a list
        wanted = report(
            self._snapshot,
            self._paths.view(now),
            identity=self._config.identity,
            device=self._device_kind,
            relay=self._relaying(now),
            hub=self._home_name(),
            fingerprint=self._keying.fingerprint,
            keyed=self._keying.pairs(),
            pods_trouble=as_reason(self._pods.trouble),
        )
        if self._reporting.take(wanted):
            self._out.append(WriteReport(own.meta.name, own.meta.uid, wanted))

    def _save_soon(self, now: float, *, urgent: bool = False) -> None:
        gathering = 0.0 if urgent else min(SAVE_PER_PEER * len(self._snapshot.peers), SAVE_LONGEST)
        at = now + max(SAVE_AFTER, gathering)
        if self._save_at is None or (at < self._save_at and not self._disk_error):
            self._save_at = at

    def _plan_save(self, changes: Changes, now: float) -> None:
        if changes.kept or self._asking.take_change():
            self._save_soon(now)
        if self._saving is not None or self._save_at is None or now < self._save_at:
            return
        self._save_at = None
        last_good = dict(self._paths.last_good())
        state = DiskState(
            self._snapshot,
            last_good=last_good,
            listen_port=self._listen_port,
            grants=self._asking.held(),
            attachments=self._tree.kept(),
            tries=self._paths.kept_tries(offset=self._wall_offset),
        )
        if state != self._saved:
            self._saving = state
            self._out.append(SaveState(state))

    def _home_name(self) -> str:
        """The ScopePeer of the hub that we are attached to; empty where there is none."""
        hub = self._snapshot.peers.get(self.home) if self.home is not None else None
        return hub.meta.name if hub is not None else ""

    # --- status --------------------------------------------------------------------------------------------

    def _command(self, asked: CommandArrived, now: float) -> list[Output]:
        """Answer now, or have the answer wait for the disk."""
        try:
            match asked.command:
                case "identity rotate":
                    return self._renew(asked.number, self._keying.make_successor)
                case "identity certify":
                    certificate = read_certificate(asked.argument)
                    return self._renew(asked.number, lambda: self._keying.make_certified(certificate))
                case _:
                    return [Reply(asked.number, {"ok": True, **self._answer(asked, now)})]
        except ConfigError as error:
            return [Reply(asked.number, {"ok": False, "error": str(error)})]

    def _renew(self, number: int, make: Callable[[], HybridIdentity]) -> list[Output]:
        if self._renewing is not None:
            raise ConfigError("another identity is being written: ask again")
        self._renewing = (number, make())
        return [SaveIdentity(self._renewing[1])]

    def _identity_saved(self, error: str, now: float) -> None:
        if self._renewing is None:
            return
        (number, identity), self._renewing = self._renewing, None
        if error:
            self._out.append(Reply(number, {"ok": False, "error": error}))
            return
        self._keying.renew(identity, now)
        self._reporting.expect()
        self._out.append(Reply(number, {"ok": True, "fingerprint": str(identity.public.fingerprint())}))

    def _answer(self, asked: CommandArrived, now: float) -> dict[str, object]:
        match asked.command:
            case "status":
                return {"status": self.status(now, asked.counted)}
            case "explain":
                key = next((k for k, p in self._snapshot.peers.items() if p.meta.name == asked.peer), None)
                if key is None:
                    raise ConfigError(f"there is no other peer {asked.peer!r}")
                return {"candidates": candidates(self._paths.explain(key, now))}
            case "rotate":
                return {"peers": self._keying.rotate(asked.peer, now)}
            case "identity show":
                maker = self._keying.maker()
                return {"identity": identities(self._snapshot, maker, self._keying.pairs())}
            case "identity trust":
                named = self._keying.trust(asked.peer, read_fingerprint(asked.argument), now)
                return {"named": str(named) if named is not None else None}
            case _:
                raise ConfigError(
                    f"unknown command {asked.command!r}; this agent knows: status, explain, rotate, "
                    "identity show, identity trust, identity rotate, identity certify"
                )

    def status(self, now: float, counted: Counted | None = None) -> dict[str, object]:
        """What `scopectl status` shows: plain JSON values. `counted`: what we relayed, where we are a hub."""
        return status(
            self._snapshot,
            self._paths.view(now),
            mesh=self._config.mesh,
            device=DeviceStatus(
                self._config.device,
                kind=self._device_kind,
                listen_port=self._listen_port,
                drift=self._drift,
                observed=self._observed,
                sessions=self._sessions,
            ),
            registration=self._membership.registration(),
            errors={
                "Device": self._device_error,
                "Registry": self._reporting.error,
                "Disk": self._disk_error,
                "Forwarding": self._forwarding_error or self._lost,
                "Pods": self._pods.trouble,
                "Carrier": self._carriage.trouble(
                    {key: peer.meta.name for key, peer in self._snapshot.peers.items()}
                ),
                "PostQuantum": self._keying.trouble,
                "Removed": "this peer was removed from the mesh" if self.removed else "",
            },
            keyed=self._keying.pairs(),
            wall=now + self._wall_offset,
            dropped=self._carrying.dropped + self._serving.dropped + self._keying.dropped,
            home=self._home_name(),
            birthday=self._paths.birthday_spent,
            relayed=self._serving.relayed(counted),
            now=now,
        )


def pick_port(random: Callable[[], float]) -> int:
    """A port of one's own: below the ephemeral and NodePort ranges, and below those that hubs relay on."""
    return 20000 + int(random() * 6000)


_but_pairs: Callable[[RelayReport], tuple[object, ...]] = attrgetter(
    *(each.name for each in fields(RelayReport) if each.name != "pairs")
)


def _says_more(report: RelayReport | None, before: RelayReport | None) -> bool:
    """Whether what is said of relaying differs by more than how many pairs there are."""
    if report is None or before is None:
        return report is not before
    return _but_pairs(report) != _but_pairs(before)


def _hubs(snapshot: Snapshot) -> dict[PublicKey, Hub]:
    return {
        key: Hub(peer.meta.name, public_addresses(peer))
        for key, peer in snapshot.peers.items()
        if peer.assignment.role is Role.HUB
    }


def _listening(snapshot: Snapshot) -> dict[PublicKey, ListeningHub]:
    """The hubs that carry, with what we can know of where."""
    found = {}
    for key, peer in snapshot.peers.items():
        relay = peer.report.relay if peer.report is not None else None
        carrier = relay.carrier if relay is not None else None
        if peer.assignment.role is not Role.HUB or peer.report is None or carrier is None or carrier.reason:
            continue
        addresses = public_addresses(peer) or tuple(c.endpoint.address for c in peer.report.endpoints)
        port = _wireguard_port(peer, snapshot)
        if addresses and port:
            found[key] = ListeningHub(
                tuple(Endpoint(address, carrier.port) for address in addresses), carrier.pin, port
            )
    return found


def _wireguard_port(peer: Peer, snapshot: Snapshot) -> int:
    """The port at which WireGuard of a peer itself listens; 0: it does not say."""
    candidates = peer.report.endpoints if peer.report is not None else ()
    ports = [c.endpoint.port for c in candidates if c.kind is CandidateKind.HOST]
    usual = snapshot.mesh.spec.listen_port if snapshot.mesh is not None else 0
    return ports[0] if ports else usual


def _shape_differs(before: Snapshot, after: Snapshot) -> bool:
    """Whether what the device and its allowed IPs are made of differs; endpoints and links are not that."""
    if before.peers.keys() != after.peers.keys() or before.own is None or after.own is None:
        return True
    if before.mesh is not after.mesh or _claim(before.own) != _claim(after.own):
        return True
    return any(
        before.peers[key] is not peer and _claim(before.peers[key]) != _claim(peer)
        for key, peer in after.peers.items()
    )


def _claim(peer: Peer) -> tuple[object, ...]:
    spec = peer.spec
    return peer.assignment.addresses, spec.routes, spec.pod_prefixes, peer.meta.uid, peer.meta.created


_AnyPeer = TypeVar("_AnyPeer", DesiredPeer, ObservedPeer)


def _only(peers: Mapping[PublicKey, _AnyPeer], keys: Set[PublicKey]) -> dict[PublicKey, _AnyPeer]:
    """Some of the peers; to plan for these alone costs the same in a mesh of any size."""
    return {key: peers[key] for key in keys if key in peers}


_but_peers: Callable[[ObservedDevice], tuple[object, ...]] = attrgetter(
    *(each.name for each in fields(ObservedDevice) if each.name != "peers")
)
_set_up: Callable[[ObservedPeer], tuple[object, ...]] = attrgetter(
    "endpoint", "allowed_ips", "keepalive", "psk"
)


def _differing(before: ObservedDevice | None, after: ObservedDevice) -> set[PublicKey] | None:
    """Peers that are set up otherwise than they were observed before; None when more than peers differs."""
    if before is None or _but_peers(before) != _but_peers(after):
        return None
    differing = before.peers.keys() ^ after.peers.keys()
    return differing | {
        key
        for key in before.peers.keys() & after.peers.keys()
        if before.peers[key] is not after.peers[key]
        and _set_up(before.peers[key]) != _set_up(after.peers[key])
    }
