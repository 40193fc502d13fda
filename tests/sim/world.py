"""Whole agents in virtual time: one heap of (time, sequence, call), a seeded random, and no event loop.

Real are the Agent with all its rooms, the Channel with its cryptography, the planner of the device, and the
registry's Store with its rules of writing. Modelled are WireGuard (`wireguard`), the internet (`network`,
`nat`), and the thin shells between: performing outputs, one timer, a disk, a gateway's stream and courier, a
reflector. An agent can be crashed after any of its outputs; its device lives on.

A timer that keeps asking for the same instant is an endless loop in a real agent: the world raises Livelock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from random import Random
from typing import assert_never

from lab.grid import Place, place_reason
from lab.nat import Nat
from scope_agent.agent import Agent, AgentConfig, pick_port
from scope_agent.carrier.core import ApplyCarrier, CarrierSeen
from scope_agent.carrying import Carrying
from scope_agent.inputs import (
    Applied,
    ApplyForwarding,
    ApplyGrants,
    ApplyPods,
    ApplyPorts,
    Courier,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    DiskState,
    FactArrived,
    Failed,
    IdentitySaved,
    Input,
    InterfacesChanged,
    KeysSetUp,
    Leg,
    ListAgain,
    NudgeTunnel,
    Observe,
    Output,
    PortsApplied,
    PskSaved,
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
from scope_agent.membership import Membership
from scope_agent.paths.core import Paths
from scope_agent.pods.rules import PodNetwork
from scope_agent.psk.identity import FIRST_CONTACT, HybridIdentity, KeyMaker, make_hybrid_identity
from scope_agent.psk.slots import Record
from scope_agent.state import make_identity
from scope_agent.tree.rules import ForwardedPrefixes
from scope_agent.wireguard.device import HoldEndpoint
from scope_agent.wireguard.port_rules import PortRules
from scope_operator.gateway.reflector import HEARD_SECONDS

from scope.carrier import Carrier, is_carried
from scope.channel import Channel, Confirmed, Hello, NotACorrespondent, Received
from scope.model import (
    Addressing,
    Assignment,
    DeviceKind,
    Endpoint,
    Family,
    IPAddress,
    IPInterface,
    JoinToken,
    Kind,
    Mesh,
    MeshSpec,
    MeshStatus,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Reflector,
    Resource,
    Role,
    Secret,
    Service,
    Snapshot,
    Timers,
    Tombstone,
    kind_of,
)
from scope.projection import is_told, projected
from scope.registry.memory import Create, Delete, Store, Update, UpdateStatus
from scope.registry.port import Deleted, Disconnected, Put, RegistryError
from scope.relay import Grants
from scope.tombstones import sign_tombstone
from scope.wire import AskRelay, Forward, Forwarded, Message, Ping, Pong, Refused, WireError
from tests.sim import carrier, relay
from tests.sim.network import Network, Site
from tests.sim.wireguard import Device, Transport
from tests.toy_provider import ToyProvider

MESH = "mesh"
DEFAULT_TIMERS = Timers()
WALL_START = 1_800_000_000.0
DEVICE_DELAY = 0.002
HOLD_DELAY = (0.005, 0.04)  # the packet filter's program is started for each hold
TURN_DELAY = 0.002  # what another family's packet may lose by going through the agent
DISK_DELAY = 0.005
SET_UP_DELAY = 0.5  # after the first pings, and then imports and a self-test
PORTS_DELAY = 0.02  # a run of the packet filter's program
RELAY_DELAY = 0.05  # a disk write and a run of the packet filter's program
CARRIER_LOOK = 0.5  # how soon a carrier's process that died is started again
POLL = 0.25  # how often the shell looks at the device's own counters
RECONNECT, RECONNECT_MAX = 1.0, 30.0
SPIN_LIMIT = 200  # turns of one timer at one instant
NUDGE = -1  # the number of a packet that only makes WireGuard rekey
REFLECTOR_PORTS = (3478, 3479)
CONTENT = (Kind.MESH, Kind.PEER)  # what a gateway serves


class Livelock(AssertionError):
    """An agent's timer that never moves on."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet of the machines' own traffic."""

    number: int
    answer: bool  # whether the receiver answers
    source: IPAddress
    destination: IPAddress


@dataclass(frozen=True, slots=True)
class Backup:
    """A registry's resources at one revision."""

    number: int
    resources: tuple[Resource, ...]


class World:
    """Everything there is. `seed` alone decides what happens."""

    def __init__(
        self, seed: int = 1, *, timers: Timers = DEFAULT_TIMERS, prefer: Family = Family.IPV6
    ) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        self.events = 0
        self.machines: list[Machine] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.network = Network(random=self.random, now=lambda: self.now, schedule=self.at)
        self.network.is_data = lambda payload: isinstance(payload, Transport)
        self.registry = RegistryServer(self, timers=timers, prefer=prefer)

    @property
    def wall(self) -> float:
        """The wall clock."""
        return WALL_START + self.now

    def bytes(self, count: int) -> bytes:
        """Random bytes of the seed."""
        return self.random.randbytes(count)

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Run `call` at `when`."""
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, call))

    def after(self, delay: float, call: Callable[[], None]) -> None:
        """Run `call` in `delay` seconds."""
        self.at(self.now + delay, call)

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        self.run_to(self.now + seconds)

    def run_to(self, end: float, until: Callable[[], bool] | None = None, *, every: float = 0.01) -> bool:
        """Let time pass to `end`, or until `until`, asked at least `every` so often, holds."""
        heap = self._heap
        ask = self.now
        while heap and heap[0][0] <= end:
            if until is not None and heap[0][0] > ask:
                if until():
                    return True
                ask = heap[0][0] + every
            when, _, call = heapq.heappop(heap)
            self.now = max(when, self.now)
            self.events += 1
            call()
        self.now = max(self.now, end)
        return until is not None and until()

    def until(self, condition: Callable[[], bool], *, within: float) -> float:
        """Seconds until `condition` holds. Raises AssertionError after `within`."""
        start = self.now
        if not self.run_to(start + within, condition):
            raise AssertionError(
                f"seed {self.seed}: not within {within} s (now {self.now:.3f})\n{self.describe()}"
            )
        return self.now - start

    # --- building ------------------------------------------------------------------------------------------

    def site(self, kind: Nat, *, ipv6: bool = False, delay: float = 0.01, lan: str | None = None) -> Site:
        """A new site; two sites with the default delay are 40 ms apart, there and back."""
        return self.network.site(kind, ipv6=ipv6, delay=delay, lan=lan)

    def machine(self, site: Site, *, port: int | None = None) -> Machine:
        """A machine that has not joined yet."""
        machine = Machine(self, site, name=f"peer{len(self.machines)}", port=port)
        self.machines.append(machine)
        return machine

    def peer(self, kind: Nat, *, ipv6: bool = False, delay: float = 0.01) -> Machine:
        """A machine in a site of its own, joined and started."""
        machine = self.machine(self.site(kind, ipv6=ipv6, delay=delay))
        machine.join()
        return machine

    def hub(self, *, kind: Nat = Nat.NONE, ipv6: bool = False, delay: float = 0.01) -> Machine:
        """A machine that relays, in a site of its own, joined and started."""
        machine = self.machine(self.site(kind, ipv6=ipv6, delay=delay))
        self.registry.enrol(machine, role=Role.HUB)
        machine.start()
        return machine

    # --- judging -------------------------------------------------------------------------------------------

    def members(self) -> list[Machine]:
        """Machines that run and were not removed."""
        return [m for m in self.machines if m.agent is not None and not m.agent.removed]

    def is_direct(self, a: Machine, b: Machine) -> bool:
        """Whether both know a direct path, programmed it, and WireGuard's session stands."""
        return a.reaches(b) and b.reaches(a)

    def is_relayed(self, a: Machine, b: Machine) -> bool:
        """Whether both reach each other through a hub."""
        return a.reaches(b, PathKind.RELAYED) and b.reaches(a, PathKind.RELAYED)

    def is_connected(self, a: Machine, b: Machine) -> bool:
        """Whether both reach each other, one way or the other."""
        return self.is_direct(a, b) or self.is_relayed(a, b)

    def traversable(self, a: Machine, b: Machine) -> bool:
        """Whether the pair can have a direct path, by the table that demo and tests share."""
        return place_reason(a.place, b.place) is None

    def is_converged(self) -> bool:
        """Whether every traversable pair of members is direct."""
        members = self.members()
        return all(
            self.is_direct(a, b) for i, a in enumerate(members) for b in members[:i] if self.traversable(a, b)
        )

    def describe(self) -> str:
        """For a person: who reaches whom."""
        lines = []
        for machine in self.machines:
            if machine.agent is None:
                lines.append(f"{machine.name} ({machine.site.kind.value}): not running")
                continue
            lines.append(
                f"{machine.name} ({machine.site.kind.value}) {machine.agent.paths(self.now).mapping}"
            )
            for other in self.machines:
                view = machine.agent.paths(self.now).pairs.get(other.key)
                if view is not None:
                    peer = machine.device.peers.get(other.key)
                    lines.append(
                        f"  -> {other.name}: {view.path} {view.hub} {view.endpoint} ready={view.ready}"
                        f" {view.reason!r}"
                        f" device={peer.endpoint if peer else None} allowed={bool(peer and peer.allowed_ips)}"
                        f" handshake={peer.last_handshake if peer else None}"
                    )
        return "\n".join(lines)


class Machine:
    """A machine: a device, a disk, and perhaps an agent."""

    def __init__(self, world: World, site: Site, *, name: str, port: int | None) -> None:
        self.world, self.site, self.name = world, site, name
        self.identity = make_identity(world.bytes)
        self.key: PublicKey = self.identity.public.wireguard
        self.addresses = world.network.attach(self, site)
        self.granted: Grants | None = None
        self.address: IPAddress = IPv4Address(0)  # in the mesh, once it is enrolled
        self.forwarded: ForwardedPrefixes | None = None
        self.pods: PodNetwork | None = None
        self.passed = 0  # packets of others that went on from here
        self.clock_error = 0.0  # seconds by which our wall clock is wrong
        # Of a random of its own: what is drawn for keys leaves every other draw of the seed as it is.
        self.key_random = Random(f"{world.seed} {name}")
        self.provider = ToyProvider(self.key_random)
        self.hybrid = make_hybrid_identity(self.key_random.randbytes, self.provider)
        self.trust = FIRST_CONTACT
        self.psk_disk: dict[PublicKey, Record] = {}
        self.key_trouble = ""  # why this machine makes no keys
        self.nudges = 0
        self.disk = DiskState(Snapshot(), listen_port=port or pick_port(world.random.random))
        self.agent: Agent | None = None
        self.connected = False
        self.patience = RECONNECT
        self.generation = 0  # rises at each start and crash: what was scheduled for an earlier run is void
        self.crash_after: int | None = None  # outputs still to be performed
        self._waiting: list[tuple[int, Input]] = []
        self.busy_until = 0.0  # till then nothing that comes to the agent, its timer included, is looked at
        self.sees_device_first = False  # before its interfaces, when the agent starts
        self.disk_fails = False
        self.device_fails = False
        self.can_hold = True
        self.holds: dict[PublicKey, tuple[HoldEndpoint, float]] = {}  # and until when
        self.started_at = 0.0
        self.sent: dict[str, int] = {}
        self.on_send: Callable[[Leg, Message], object] | None = None
        self.probe_bytes = 0
        self.reports: list[tuple[float, PeerReport]] = []
        self.saves: list[float] = []
        self.batches: list[tuple[float, DeviceBatch]] = []
        self.observations = 0
        self.replies: list[Reply] = []
        self.received: list[tuple[float, PublicKey, Packet]] = []
        self.refused_packets = 0
        self._armed: float | None = None
        self._spins = 0
        self._spun_at = -1.0
        self._traffic_noted = False
        self._polled = 0
        self.is_off = False
        self.ports = PortRules()  # of its packet filter and probe socket
        self.ports_fail = ""
        self._watching = 0
        self.relay = relay.Relay(lambda: world.now, self._send_relayed)
        self.carrier = carrier.CarrierProcess(self, self._at_address)
        self.device = Device(
            name="scope0",
            now=lambda: world.now,
            wall=lambda: world.wall,
            random=world.random.random,
            schedule=world.after,
            send=self._send_wireguard,
            deliver=self._deliver,
        )

    @property
    def place(self) -> Place:
        """Where it is, for the table of traversable pairs."""
        return Place(self.site.name, self.site.kind, self.site.prefix is not None)

    def reaches(self, other: Machine, kind: PathKind = PathKind.DIRECT) -> bool:
        """Whether this machine's agent and device have a path of that kind to the other."""
        if self.agent is None:
            return False
        view = self.agent.paths(self.world.now).pairs.get(other.key)
        peer = self.device.peers.get(other.key)
        return (
            view is not None
            and peer is not None
            and view.path is kind
            and view.ready
            and peer.session is not None
            and self.world.now - peer.session.born < 180.0
            and bool(peer.allowed_ips)
            and (peer.endpoint == view.endpoint or peer.endpoint in view.verified)
        )

    @property
    def home(self) -> str | None:
        """The name of the hub that its agent, which runs, is attached to."""
        assert self.agent is not None
        names = {machine.key: machine.name for machine in self.world.machines}
        home = self.agent.home
        return names[home] if home is not None else None

    def endpoint_of(self, other: Machine) -> Endpoint | None:
        """Where the device sends to the other."""
        peer = self.device.peers.get(other.key)
        return peer.endpoint if peer is not None else None

    # --- life ----------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Enrol at the registry and start."""
        self.world.registry.enrol(self)
        self.start()

    def start(self) -> None:
        """Start the agent from its disk."""
        world = self.world
        self.generation += 1
        self.started_at = world.now
        self._armed = None
        self.agent = _Overheard(
            self,
            AgentConfig(
                mesh=MESH,
                device="scope0",
                identity=self.identity,
                registry_key=world.registry.signing_key,
            ),
            channel=Channel(secret=self.identity.probe, boot_id=world.bytes(16)),
            state=self.disk,
        )
        seen = (DEVICE_DELAY, 0.0) if self.sees_device_first else (0.0, DEVICE_DELAY)
        self._later(seen[0], lambda: self.give(self._interfaces()))
        self._later(seen[1], lambda: self.give(self._observation()))
        self._later(0.0, lambda: world.registry.connect(self))
        if self.carrier.carrier is not None:
            self._watch_carrier(self.generation)

    def crash(self) -> None:
        """SIGKILL: the device lives on."""
        self.agent = None
        self.generation += 1
        self.connected = False
        self.crash_after = None

    def stall(self, seconds: float) -> None:
        """Give the agent no share of the processor for so long; what comes meanwhile waits."""
        self.busy_until = max(self.busy_until, self.world.now + seconds)
        self.world.at(self.busy_until, self._wake)

    def _wake(self) -> None:
        if self.world.now >= self.busy_until:
            waiting, self._waiting = self._waiting, []
            for generation, event in waiting:
                if generation == self.generation:
                    self.give(event)

    def restart(self, *, after: float = 0.1) -> None:
        """Kill the agent and start it again."""
        self.crash()
        self.world.after(after, lambda: self.start() if self.agent is None else None)

    def move(self, site: Site) -> None:
        """Roam to another site; netlink tells the agent."""
        self.world.network.detach(self)
        self.site = site
        self.addresses = self.world.network.attach(self, site)
        self._later(0.01, lambda: self.give(self._interfaces()))
        self.world.registry.disconnect(self, "the connection broke")

    def switch_off(self) -> None:
        """The machine loses its power, or its network."""
        self.is_off = True
        self.crash()

    def switch_on(self) -> None:
        """It boots: the device is gone, and what a hub's kernel has learned."""
        self.is_off = False
        self.device.delete()
        self.relay.forget()
        self.ports = PortRules()
        self.start()

    def leave(self) -> None:
        """Sign our own tombstone, and stop."""
        self.world.registry.remove(self, by=self.identity.signing)
        self.crash()
        self.device.delete()

    # --- traffic -------------------------------------------------------------------------------------------

    def ping(self, other: Machine, number: int = 0, *, answer: bool = True) -> None:
        """One packet to the other's mesh address."""
        before = self.device.payload_packets
        if not self.device.send_packet(Packet(number, answer, self.address, other.address)):
            self.refused_packets += 1
        if self.device.payload_packets != before:
            self._note_traffic()

    def time_to(self, other: Machine, *, within: float) -> float:
        """Seconds until a packet to the other, sent from now on, is there."""
        start, mark = self.world.now, len(other.received)
        self.stream(other, rate=50.0, seconds=within, answer=False)
        self.world.until(
            lambda: any(sender == self.key for _, sender, _ in other.received[mark:]), within=within
        )
        return self.world.now - start

    def stream(self, other: Machine, *, rate: float, seconds: float, answer: bool = True) -> None:
        """Packets at a rate."""
        end = self.world.now + seconds
        number = 0

        def send() -> None:
            nonlocal number
            if self.world.now > end:
                return
            self.ping(other, number, answer=answer)
            number += 1
            self.world.after(1.0 / rate, send)

        send()

    def _deliver(self, content: object) -> None:
        assert isinstance(content, Packet)
        self._note_traffic()
        if content.destination != self.address:
            self._forward(content)
            return
        if content.number == NUDGE:
            return
        sender = self.world.registry.holder(content.source).key
        self.received.append((self.world.now, sender, content))
        if content.answer:
            answer = Packet(content.number, False, content.destination, content.source)
            self.device.send_packet(answer)

    def _forward(self, packet: Packet) -> None:
        """What rules and settings of a hub of a tree do."""
        inside = self.forwarded.inside if self.forwarded is not None else ()
        ends = (packet.source, packet.destination)
        if not self.is_off and all(any(end in prefix for prefix in inside) for end in ends):
            self.passed += 1
            self.device.send_packet(packet)

    def _note_traffic(self) -> None:
        if not self._traffic_noted:
            self._traffic_noted = True
            due = (int(self.world.now / POLL) + 1) * POLL
            self.world.at(due, self._poll_traffic)

    def _poll_traffic(self) -> None:
        self._traffic_noted = False
        self.give(TrafficMoved())

    # --- the network ---------------------------------------------------------------------------------------

    def arrived(self, source: Endpoint, port: int, payload: object) -> None:
        """A datagram for our socket: WireGuard's, or the probe protocol's."""
        if self.is_off:
            return
        if relay.FIRST_PORT <= port <= relay.LAST_PORT:
            self.relay.arrived(source, port, payload)
            return
        if any((source, port) == (opening.endpoint, opening.port) for opening in self.ports.openings):
            port = self.ports.port
        search = self.ports.search
        if search is not None and search.first <= port <= search.last and isinstance(payload, bytes):
            self.give(DatagramArrived(payload, Socket(source, port=port)))
        if port != (self.device.listen_port or self.disk.listen_port):
            return
        if isinstance(payload, bytes):
            self.give(DatagramArrived(payload, Socket(source)))
        elif isinstance(payload, Transport):
            self._arrived_data(source, payload)
        else:
            self.device.receive(source, payload)  # type: ignore[arg-type]

    def _arrived_data(self, source: Endpoint, data: Transport) -> None:
        hold, until = self.holds.get(data.sender, (None, 0.0))
        if hold is None or self.world.now >= until or source not in hold.against:
            self.device.receive(source, data)
        elif hold.endpoint.family is source.family:
            self.device.receive(hold.endpoint, data)
        else:
            delay = TURN_DELAY * self.world.random.random()
            self.world.after(delay, lambda: self.device.receive(hold.endpoint, data))

    def _put(self, to: Endpoint, payload: object, *, ttl: int | None = None) -> None:
        port = self.device.listen_port or (self.agent.listen_port if self.agent else 0)
        turned = [
            each.port for each in self.ports.openings if each.endpoint == to and port == self.ports.port
        ]
        self._put_from(turned[0] if turned else port, to, payload, ttl=ttl)

    def _send_relayed(self, port: int, to: Endpoint, payload: object) -> None:
        self._put_from(port, to, payload)

    def _at_address(self, endpoint: Endpoint) -> Machine | None:
        """Who would answer there over TCP."""
        return next((m for m in self.world.machines if endpoint.address in m.addresses), None)

    def _put_from(self, port: int, to: Endpoint, payload: object, *, ttl: int | None = None) -> None:
        if is_carried(to):
            self.carrier.send(port, to, payload)
            return
        for address in self.addresses:
            if address.version == to.address.version and port and not self.is_off:
                self.world.network.send(self.site, Endpoint(address, port), to, payload, ttl=ttl)
                return

    def _send_wireguard(self, to: Endpoint, datagram: object) -> None:
        self._put(to, datagram)

    def _interfaces(self) -> InterfacesChanged:
        return InterfacesChanged(frozenset(_interface(a) for a in self.addresses))

    def _observation(self) -> DeviceObserved:
        self.observations += 1
        return DeviceObserved(self.device.observe(), DeviceKind.USER_SPACE, self.world.wall)

    # --- the shell -----------------------------------------------------------------------------------------

    def _later(self, delay: float, call: Callable[[], None]) -> None:
        """Run `call` unless this run of the agent has ended by then."""
        generation = self.generation
        self.world.after(delay, lambda: call() if generation == self.generation else None)

    def give(self, event: Input) -> None:
        """Hand one input to the agent and perform what comes out."""
        if self.agent is None:
            return
        if self.world.now < self.busy_until:
            self._waiting.append((self.generation, event))
            return
        self.agent.receive(event, self.world.now)
        self._perform()

    def _perform(self) -> None:
        agent = self.agent
        assert agent is not None
        for output in agent.outputs():
            if self.crash_after is not None:
                self.crash_after -= 1
                if self.crash_after < 0:
                    self.crash()
                    self.world.after(0.2, lambda: self.start() if self.agent is None else None)
                    return
            self._do(output)
        self._arm(agent)

    def _arm(self, agent: Agent) -> None:
        due = agent.get_timer()
        if due is None or (self._armed is not None and self._armed <= due and self._armed >= self.world.now):
            return
        due = max(due, self.world.now)
        self._armed = due
        generation = self.generation
        self.world.at(due, lambda: self._tick(due, generation))

    def _tick(self, due: float, generation: int) -> None:
        agent = self.agent
        if agent is None or generation != self.generation or self._armed != due:
            return
        if self.world.now < self.busy_until:
            self.world.at(self.busy_until, lambda: self._tick(due, generation))
            return
        self._armed = None
        wanted = agent.get_timer()
        if wanted is not None and wanted <= self.world.now:
            self._spins = self._spins + 1 if self._spun_at == self.world.now else 0
            self._spun_at = self.world.now
            if self._spins > SPIN_LIMIT:
                raise Livelock(
                    f"{self.name}'s timer asks for {wanted!r} again and again at {self.world.now!r}"
                )
            agent.handle_timer(self.world.now)
        self._perform()

    def _do(self, output: Output) -> None:
        name = type(output).__name__
        self.sent[name] = self.sent.get(name, 0) + 1
        match output:
            case Send(leg, data):
                if isinstance(leg, Socket):
                    self.probe_bytes += len(data)
                    if leg.port is None:
                        self._put(leg.endpoint, data, ttl=leg.ttl)
                    else:
                        self._put_from(leg.port, leg.endpoint, data, ttl=leg.ttl)
                else:
                    self.world.registry.carry(self, leg.to, data)
            case DeviceBatch():
                self.batches.append((self.world.now, output))
                holds = sum(isinstance(action, HoldEndpoint) for action in output.actions)
                delay = DEVICE_DELAY + sum(self.world.random.uniform(*HOLD_DELAY) for _ in range(holds))
                self._later(delay, lambda: self._apply(output))
            case Observe():
                self._later(DEVICE_DELAY / 2, lambda: self.give(self._observation()))
            case WriteReport():
                self.reports.append((self.world.now, output.report))
                self.world.registry.write_report(self, output)
            case SaveState(state):
                self.saves.append(self.world.now)
                self._later(DISK_DELAY, lambda: self._save(state))
            case ApplyGrants(grants):
                self._later(RELAY_DELAY, lambda: self._grant(grants))
            case ApplyForwarding(forwarded):
                self._later(RELAY_DELAY, lambda: self._forward_these(forwarded))
            case ApplyPods(network):
                self._later(RELAY_DELAY, lambda: self._lead_to_pods(network))
            case ApplyPorts(rules):
                self._later(PORTS_DELAY, lambda: self._turn_ports(rules))
            case ApplyCarrier(wanted):
                self._later(RELAY_DELAY, lambda: self._have_carried(wanted))
            case SavePsk(peer, record):
                self._later(DISK_DELAY, lambda: self._save_psk(peer, record))
            case SetUpKeys():
                maker = self.key_trouble or KeyMaker(
                    self.hybrid, self.provider, self.key_random.randbytes, trust=self.trust
                )
                self._later(SET_UP_DELAY, lambda: self.give(KeysSetUp(maker)))
            case SaveIdentity(identity):
                self._later(DISK_DELAY, lambda: self._save_identity(identity))
            case NudgeTunnel(address=address):
                self.nudges += 1
                self.device.send_packet(Packet(NUDGE, False, self.address, address))
            case Reply():
                self.replies.append(output)
            case ListAgain():
                self._later(self.world.registry.distance(self), lambda: self.world.registry.list_for(self))
            case _:
                assert_never(output)

    def _apply(self, batch: DeviceBatch) -> None:
        if self.device_fails:
            self.give(Failed(Target.DEVICE, "the device does not answer"))
            return
        for action in batch.actions:
            if not isinstance(action, HoldEndpoint):
                self.device.apply(action)
            elif self.can_hold:
                self.holds[action.key] = (action, self.world.now + action.seconds)
        self.give(Applied(Target.DEVICE))
        self.give(self._observation())

    def _grant(self, grants: Grants | None) -> None:
        forgot = self.relay.apply(grants)
        self.granted = grants
        self.give(Relaying(self.relay.forwarding, "", forgot=forgot, answers=True))

    def _forward_these(self, forwarded: ForwardedPrefixes | None) -> None:
        self.forwarded = forwarded
        self.give(Applied(Target.FORWARDING))

    def _lead_to_pods(self, network: PodNetwork | None) -> None:
        self.pods = network
        self.give(Applied(Target.PODS))

    def _turn_ports(self, rules: PortRules) -> None:
        if not self.ports_fail:
            self.ports = rules
        self.give(PortsApplied(self.ports_fail))

    def _have_carried(self, wanted: Carrier | None) -> None:
        self.carrier.apply(wanted)
        self.give(self._carrier_seen(answers=True))
        self._watch_carrier(self.generation)

    def _carrier_seen(self, *, answers: bool) -> CarrierSeen:
        report = self.carrier.report()
        error = "" if report is not None else "scope-carrier does not run"
        return CarrierSeen(
            report, error, pin=carrier.PIN, answers=answers, is_in_effect=answers and report is not None
        )

    def _watch_carrier(self, generation: int) -> None:
        """The shell looks after the process, and at what it says."""
        if self._watching == generation:
            return
        self._watching = generation

        def look() -> None:
            if generation != self.generation or self.agent is None:
                return
            if not self.carrier.is_running:
                self.carrier.start()
            self.give(self._carrier_seen(answers=False))
            self.world.after(CARRIER_LOOK, look)

        self.world.after(CARRIER_LOOK, look)

    def _save(self, state: DiskState) -> None:
        if self.disk_fails:
            self.give(Failed(Target.DISK, "no space left on device"))
            return
        self.disk = state
        self.give(Applied(Target.DISK))

    def _save_identity(self, identity: HybridIdentity) -> None:
        if self.disk_fails:
            self.give(IdentitySaved("no space left on device"))
        else:
            self.hybrid = identity
            self.give(IdentitySaved())

    def _save_psk(self, peer: PublicKey, record: Record | None) -> None:
        if self.disk_fails:
            self.give(PskSaved(peer, "no space left on device"))
        elif record is None:
            self.psk_disk.pop(peer, None)
        else:
            self.psk_disk[peer] = record
            self.give(PskSaved(peer))


class _Overheard(Agent):
    """An Agent whose sealed messages a test may read as they leave."""

    def __init__(self, machine: Machine, config: AgentConfig, *, channel: Channel, state: DiskState) -> None:
        world = machine.world
        self._machine = machine
        super().__init__(
            config,
            channel=channel,
            state=state,
            random=world.random.random,
            now=world.now,
            wall=world.now + machine.clock_error,
            granted=machine.granted,
            openings=machine.ports.openings,
            carried=machine.carrier.carrier,
            psk_records=machine.psk_disk,
        )

    def _make_carrying(self) -> Carrying:
        return _Ear(self._machine, self._channel, paths=self._paths, membership=self._membership)

    def _message(self, sender: PublicKey, message: Message, leg: Leg, *, origin: bytes, now: float) -> None:
        refuses = self._machine.relay.refuses
        if refuses is None or not isinstance(message, AskRelay):
            super()._message(sender, message, leg, origin=origin, now=now)
        else:
            self._out += self._carrying.seal(sender, Refused(message.peer, refuses), leg, now)


class _Ear(Carrying):
    def __init__(self, machine: Machine, channel: Channel, *, paths: Paths, membership: Membership) -> None:
        super().__init__(channel, paths=paths, membership=membership)
        self._machine = machine

    def seal(self, to: PublicKey, message: Message, leg: Leg, now: float) -> list[Send]:
        if self._machine.on_send is not None:
            self._machine.on_send(leg, message)
        return super().seal(to, message, leg, now)


class RegistryServer:
    """The registry, its gateway's stream and courier, and its reflector, on a server of its own."""

    def __init__(self, world: World, *, timers: Timers, prefer: Family) -> None:
        self.world = world
        self.up = True
        self.secret = Secret(world.bytes(32))
        self.probe_secret = Secret(world.bytes(32))
        identity = make_identity(world.bytes)
        self.secret, self.signing_key = identity.signing, identity.public.signing
        self.channel = Channel(secret=identity.probe, boot_id=world.bytes(16))
        self._numbers = 0
        self._uids = 0
        self._serial = 1
        self.site = world.network.site(Nat.NONE, ipv6=True)
        self.addresses = world.network.attach(self, self.site)
        self.store = self._new_store()
        reflector = Reflector(
            self.channel.public_key,
            tuple(Endpoint(address, port) for address in self.addresses for port in REFLECTOR_PORTS),
        )
        self.store.write(
            Create(
                Mesh(
                    Meta(MESH),
                    MeshSpec(
                        Addressing(IPv4Network("10.200.0.0/16"), IPv6Network("fd00:5c0e::/48")),
                        prefer=prefer,
                        timers=timers,
                    ),
                    MeshStatus(signing_key=self.signing_key, reflectors=(reflector,)),
                )
            )
        )
        self.reflecting = True
        self._seen: dict[PublicKey, tuple[Endpoint, int, float]] = {}
        self._by_probe: dict[PublicKey, Machine] = {}
        self._by_address: dict[IPAddress, Machine] = {}
        self._forsaken: set[str] = set()

    def _new_store(self) -> Store:
        return Store(f"registry-{self._serial}", wall=lambda: self.world.wall, new_uid=self._new_uid)

    def _new_uid(self) -> str:
        self._uids += 1
        return f"uid-{self._uids}"

    def distance(self, machine: Machine) -> float:
        """One way between a machine and the gateway."""
        return machine.site.delay + self.site.delay

    # --- resources -----------------------------------------------------------------------------------------

    def enrol(self, machine: Machine, *, role: Role = Role.EDGE) -> None:
        """Make the machine's ScopePeer, with addresses."""
        self._numbers += 1
        addresses: tuple[IPInterface, ...] = (
            IPv4Interface(f"10.200.{self._numbers // 250}.{1 + self._numbers % 250}/16"),
            IPv6Interface(f"fd00:5c0e::{self._numbers:x}/48"),
        )
        machine.address = addresses[0].ip
        self._by_address[machine.address] = machine
        self._by_probe[machine.identity.public.probe] = machine
        self.channel.set_correspondents(frozenset(self._by_probe))
        self._write(
            Create(
                Peer(
                    Meta(machine.name),
                    PeerSpec(MESH),
                    PeerReport(machine.identity.public),
                    Assignment(addresses, role=role, online=True),
                )
            )
        )

    def holder(self, address: IPAddress) -> Machine:
        """The machine with a mesh address."""
        return self._by_address[address]

    def peer(self, machine: Machine) -> Peer:
        """The machine's ScopePeer."""
        found = self.store.get(Kind.PEER, machine.name)
        assert isinstance(found, Peer)
        return found

    def mesh(self) -> Mesh:
        """The mesh."""
        found = self.store.get(Kind.MESH, MESH)
        assert isinstance(found, Mesh)
        return found

    def remove(self, machine: Machine, *, by: Secret | None = None) -> Tombstone:
        """A deliberate removal, signed by the registry (or by the peer itself)."""
        peer = self.peer(machine)
        tombstone = sign_tombstone(
            mesh_uid=self.mesh().meta.uid, peer_uid=peer.meta.uid, key=machine.key, secret=by or self.secret
        )
        part = replace(peer.assignment, tombstone=tombstone, online=False)
        self._write(UpdateStatus(Kind.PEER, machine.name, part, peer.meta.uid))
        return tombstone

    def delete(self, machine: Machine) -> None:
        """What `kubectl delete` does to a ScopePeer."""
        self._write(Delete(Kind.PEER, machine.name, self.peer(machine).meta.uid))

    def change_mesh(self, change: Callable[[MeshSpec], MeshSpec]) -> None:
        """What `scopectl apply` does."""
        mesh = self.mesh()
        self._write(Update(replace(mesh, spec=change(mesh.spec))))

    def assign(self, machine: Machine, assignment: Assignment) -> None:
        """Write the registry's part of a status."""
        self._write(UpdateStatus(Kind.PEER, machine.name, assignment, self.peer(machine).meta.uid))

    def change_peer(self, machine: Machine, spec: PeerSpec) -> None:
        """What a user does to a ScopePeer."""
        self._write(Update(replace(self.peer(machine), spec=spec)))

    def peers(self) -> list[Peer]:
        """All ScopePeers."""
        return [peer for peer in self.store.list(Kind.PEER).resources if isinstance(peer, Peer)]

    def vanish(self, machine: Machine) -> None:
        """A ScopePeer is gone and no event says so."""
        self.store.write(Delete(Kind.PEER, machine.name, self.peer(machine).meta.uid))

    def backup(self) -> Backup:
        """Everything as it stands."""
        resources = [r for kind in (Kind.MESH, Kind.PEER) for r in self.store.list(kind).resources]
        return Backup(self.store.number, tuple(resources))

    def restore(self, backup: Backup) -> None:
        """Go back to what was; every stream breaks."""
        self.store = self._new_store()
        self.store.restore(backup.resources, (), number=backup.number)
        for machine in self.world.machines:
            self.disconnect(machine, "the registry restarted")

    def forsake(self, machine: Machine) -> None:
        """The machine never reaches the registry again; its reflector it does."""
        self._forsaken.add(machine.name)

    def _write(self, write: Create | Update | UpdateStatus | Delete) -> None:
        since = self.store.revision
        before = {(kind, r.meta.name): r for kind in CONTENT for r in self.store.list(kind).resources}
        self.store.write(write)
        for kind in CONTENT:
            for change in self.store.changes_since(kind, since):
                told = _told_others(change, before)
                for machine in self.world.machines:
                    is_own = isinstance(change, Put) and change.resource.meta.name == machine.name
                    news = change if is_own else told
                    if machine.connected and news is not None:
                        self._tell(machine, FactArrived(news))

    def _tell(self, machine: Machine, event: Input) -> None:
        machine._later(self.distance(machine), lambda: machine.give(event))

    # --- connections ---------------------------------------------------------------------------------------

    def connect(self, machine: Machine) -> None:
        """The machine's stream: a complete list, then every change."""
        if machine.agent is None:
            return
        generation = machine.generation
        if not self.up or machine.name in self._forsaken:
            machine.give(FactArrived(Disconnected("the registry does not answer")))
            machine.patience = min(2 * machine.patience, RECONNECT_MAX)
            machine._later(machine.patience, lambda: self.connect(machine))
            return
        self.world.after(
            2 * self.distance(machine),
            lambda: self._accept(machine) if machine.generation == generation else None,
        )

    def _accept(self, machine: Machine) -> None:
        if not self.up or machine.name in self._forsaken:
            self.connect(machine)
            return
        machine.connected, machine.patience = True, RECONNECT
        self.list_for(machine)

    def list_for(self, machine: Machine) -> None:
        """Send complete lists."""
        if not self.up:
            return
        for kind in CONTENT:
            listed = self.store.list(kind)
            told = tuple(_seen_by(machine, resource) for resource in listed.resources)
            self._tell(machine, FactArrived(replace(listed, resources=told)))

    def disconnect(self, machine: Machine, reason: str) -> None:
        """Break the machine's stream; it connects again."""
        machine.connected = False
        if machine.agent is not None:
            machine.give(FactArrived(Disconnected(reason)))
            machine._later(RECONNECT, lambda: self.connect(machine))

    def go_down(self, *, reflecting: bool = False) -> None:
        """The registry is gone (its reflector too, unless `reflecting`)."""
        self.up, self.reflecting = False, reflecting
        for machine in self.world.machines:
            self.disconnect(machine, "the registry does not answer")

    def come_up(self) -> None:
        """The registry is back."""
        self.up = self.reflecting = True

    def write_report(self, machine: Machine, output: WriteReport) -> None:
        """The machine's status write, there and back."""
        machine._later(self.distance(machine), lambda: self._take_report(machine, output))

    def _take_report(self, machine: Machine, output: WriteReport) -> None:
        if not self.up:
            self._tell(machine, Failed(Target.REGISTRY, "the registry does not answer"))
            return
        try:
            self._write(UpdateStatus(Kind.PEER, output.name, output.report, output.uid))
        except RegistryError as error:
            self._tell(machine, Failed(Target.REGISTRY, str(error)))
            return
        self._tell(machine, Applied(Target.REGISTRY))

    def carry(self, machine: Machine, to: PublicKey | None, data: bytes) -> None:
        """The courier: a sealed datagram over the gateway's stream."""
        other = self._by_probe.get(to) if to is not None else None
        if not self.up or other is None or not (machine.connected and other.connected):
            return
        event = DatagramArrived(data, Courier(machine.identity.public.probe))
        delay = self.distance(machine) + self.distance(other)
        generation = other.generation
        self.world.after(delay, lambda: other.give(event) if other.generation == generation else None)

    # --- the reflector -------------------------------------------------------------------------------------

    def arrived(self, source: Endpoint, port: int, payload: object) -> None:
        """A probe for the reflector."""
        if not self.reflecting or port not in REFLECTOR_PORTS or not isinstance(payload, bytes):
            return
        try:
            opened = self.channel.open(payload)
        except WireError:
            return
        match opened:
            case Hello(_, cookie):
                self._send(cookie, source, port)
            case Received(sender, Ping(transaction=transaction)):
                self._seen[sender] = (source, port, self.world.now)
                self._seal(sender, Pong(transaction, source, has_session=False, received=0), source, port)
            case Received(sender, Forward(to, datagram)) if to in self._seen:
                seen, at_port, when = self._seen[to]
                if self.world.now - when < HEARD_SECONDS:
                    self._seal(to, Forwarded(sender, datagram), seen, at_port)
            case Received() | Confirmed():
                pass

    def _seal(self, to: PublicKey, message: Pong | Forwarded, endpoint: Endpoint, port: int) -> None:
        try:
            self._send(self.channel.seal(to, message), endpoint, port)
        except (NotACorrespondent, ValueError):
            return

    def _send(self, data: bytes, to: Endpoint, port: int) -> None:
        for address in self.addresses:
            if address.version == to.address.version:
                self.world.network.send(self.site, Endpoint(address, port), to, data)


def _told_others(change: Put | Deleted, before: dict[tuple[Kind, str], Resource]) -> Put | Deleted | None:
    """What the gateway's stream tells all agents of a change but the peer's own; None: nothing."""
    if isinstance(change, Deleted):
        return change
    resource = change.resource
    was = before.get((kind_of(resource), resource.meta.name))
    assert isinstance(resource, Mesh | Peer) and not isinstance(was, Service | JoinToken)
    return replace(change, resource=projected(resource)) if is_told(was, resource) else None


def _seen_by(machine: Machine, resource: Resource) -> Resource:
    """What an agent is given of a resource: all of its own peer, of others what it acts on."""
    if isinstance(resource, Service | JoinToken) or resource.meta.name == machine.name:
        return resource
    return projected(resource)


def _interface(address: object) -> IPInterface:
    text = str(address)
    return IPv6Interface(f"{text}/64") if ":" in text else IPv4Interface(f"{text}/24")


__all__ = ["Livelock", "Machine", "Packet", "RegistryServer", "World"]
