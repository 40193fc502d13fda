"""What goes into the agent and what comes out: two closed unions of frozen values.

`run` turns the world into inputs and performs outputs; `agent` sees nothing else of the world. A datagram
leaves by a leg: WireGuard's own UDP port, a carrier that both sides reach, or the gateway's courier.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from scope.model import (
    Attachment,
    DeviceKind,
    Endpoint,
    Forwarding,
    IPAddress,
    IPInterface,
    PeerReport,
    PublicKey,
    Snapshot,
    Tombstone,
)
from scope.registry.port import Fact
from scope.relay import Grants
from scope_agent.carrier.core import ApplyCarrier, CarrierSeen
from scope_agent.paths.birthday import Tried
from scope_agent.pods.rules import PodNetwork
from scope_agent.relay.asking import HeldGrant
from scope_agent.relay.counting import Counted
from scope_agent.tree.rules import ForwardedPrefixes
from scope_agent.wireguard.device import DesiredDevice, ObservedDevice, PlannedAction
from scope_agent.wireguard.port_rules import PortRules

if TYPE_CHECKING:  # a mesh without post-quantum keys imports nothing of them
    from scope_agent.psk.identity import HybridIdentity, KeyMaker
    from scope_agent.psk.slots import Record


@dataclass(frozen=True, slots=True)
class Socket:
    """WireGuard's own UDP port, or another `port` of ours, to an endpoint.

    `ttl` bounds the hops of an opener, None is the default.
    """

    endpoint: Endpoint
    ttl: int | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Via:
    """A carrier (reflector or peer, by probe key) that passes a sealed datagram on to probe key `to`."""

    carrier: PublicKey
    to: PublicKey


@dataclass(frozen=True, slots=True)
class Courier:
    """The gateway's event stream, to (or from: then unknown, None) probe key `to`."""

    to: PublicKey | None


Leg: TypeAlias = Socket | Via | Courier


class Target(enum.StrEnum):
    """What an agent programs; each has at most one batch in flight."""

    DEVICE = "device"
    REGISTRY = "registry"
    DISK = "disk"
    FORWARDING = "forwarding"
    PODS = "pods"


@dataclass(frozen=True, slots=True)
class DiskState:
    """The last good snapshot, what worked last, what hubs granted, where edges are attached, and when ports
    were guessed.

    A restart needs nobody else.
    """

    snapshot: Snapshot
    last_good: dict[PublicKey, Endpoint] = field(default_factory=dict)  # by WireGuard key
    listen_port: int = 0
    grants: tuple[HeldGrant, ...] = ()  # in the order of peers and hubs
    attachments: tuple[Attachment, ...] = ()  # of a tree: all that a hub holds, and our own last one
    tries: tuple[Tried, ...] = ()  # to guess ports, the latest first


# --- inputs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FactArrived:
    """A registry adapter learned something."""

    fact: Fact


@dataclass(frozen=True, slots=True)
class DatagramArrived:
    """A datagram of the probe protocol came in over `leg` (a Socket leg's endpoint is its source)."""

    data: bytes
    leg: Leg


@dataclass(frozen=True, slots=True)
class InterfacesChanged:
    """All addresses of all interfaces that may carry the underlay, at once, and the smallest MTU of these.

    `inner` are the addresses of its other interfaces: those of containers, virtual machines and tunnels.
    """

    addresses: frozenset[IPInterface]
    mtu: int = 1500
    inner: frozenset[IPAddress] = frozenset()


@dataclass(frozen=True, slots=True)
class DeviceObserved:
    """The device as it is; `wall` is the wall clock of the reading, to age handshakes once after a start."""

    device: ObservedDevice
    kind: DeviceKind
    wall: float


@dataclass(frozen=True, slots=True)
class Applied:
    """A batch was performed in full."""

    target: Target


@dataclass(frozen=True, slots=True)
class Failed:
    """A batch stopped with `error`; what was done of it is in the next observation."""

    target: Target
    error: str
    port_taken: bool = False


@dataclass(frozen=True, slots=True)
class Relaying:
    """What forwards on this hub now, and in words why not its kernel.

    `answers` an ApplyGrants, else it changed by itself. `forgot`: no side's place is known any more. `taken`:
    granted ports that another program holds.
    """

    forwarding: Forwarding
    reason: str
    forgot: bool
    answers: bool
    taken: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ForwardingSeen:
    """Whether what a hub of a tree forwards gets through: why not, in words, or ""."""

    lost: str


@dataclass(frozen=True, slots=True)
class PodsSeen:
    """What stands against packets of pods, and why they have no network of ours: in words, or ""."""

    trouble: str
    unplugged: str = ""


@dataclass(frozen=True, slots=True)
class PortsApplied:
    """The answer to ApplyPorts: they are so, or, with `error` as part of a sentence, as they were."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class PskSaved:
    """A pair's record is on disk; with an `error` it is not."""

    peer: PublicKey
    error: str = ""


@dataclass(frozen=True, slots=True)
class KeysSetUp:
    """The answer to SetUpKeys: what makes post-quantum keys, or in words why none can be made."""

    maker: KeyMaker | str


@dataclass(frozen=True, slots=True)
class IdentitySaved:
    """Our identity is on disk; with an `error` the one before still is."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class TrafficMoved:
    """The device's own counters moved: someone uses the mesh now."""


@dataclass(frozen=True, slots=True)
class CommandArrived:
    """Somebody asks over the local socket; the answer is a Reply with the same number."""

    number: int
    command: str
    peer: str = ""  # the name of the ScopePeer that it is about
    argument: str = ""  # what else it is given
    counted: Counted | None = None  # of a hub that is asked for its status: what it relayed


@dataclass(frozen=True, slots=True)
class Leaving:
    """The machine leaves the mesh: its own tombstone is to reach whom it still reaches."""

    tombstone: Tombstone


Input: TypeAlias = (
    FactArrived
    | DatagramArrived
    | InterfacesChanged
    | DeviceObserved
    | Applied
    | Failed
    | Relaying
    | ForwardingSeen
    | PodsSeen
    | PortsApplied
    | CarrierSeen
    | PskSaved
    | KeysSetUp
    | IdentitySaved
    | TrafficMoved
    | CommandArrived
    | Leaving
)


# --- outputs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a sealed datagram, or a knock, at once; nobody waits for it. `leg` is a Socket or a Courier."""

    leg: Socket | Courier
    data: bytes


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """At most MAX_BATCH actions for the device, in order, then one observation.

    `desired` is what they lead to in the end: what a user-space device's process is to come back with; None
    where the device is not ours to bring back.
    """

    actions: tuple[PlannedAction, ...]
    desired: DesiredDevice | None


@dataclass(frozen=True, slots=True)
class Observe:
    """Read the device and answer with DeviceObserved."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """Write our part of our own ScopePeer's status."""

    name: str
    uid: str
    report: PeerReport


@dataclass(frozen=True, slots=True)
class SaveState:
    """Replace the last good snapshot on disk."""

    state: DiskState


@dataclass(frozen=True, slots=True)
class ApplyGrants:
    """Keep these grants on disk, and relay them and nothing else; None: be no hub, and leave nothing behind.

    Answered by Relaying. One is in flight at a time.
    """

    grants: Grants | None


@dataclass(frozen=True, slots=True)
class ApplyForwarding:
    """As a hub of a tree, forward this and nothing else that comes from or goes to the mesh; None: be none.

    Answered by Applied or Failed. One is in flight at a time.
    """

    forwarded: ForwardedPrefixes | None


@dataclass(frozen=True, slots=True)
class ApplyPods:
    """Have this lead to pods of other clusters, and nothing else; None: nothing does.

    Answered by Applied or Failed. One is in flight at a time.
    """

    network: PodNetwork | None


@dataclass(frozen=True, slots=True)
class ApplyPorts:
    """Have WireGuard speak from these ports, and listen for probes at those of a search, and no others.

    Answered by PortsApplied. One is in flight at a time.
    """

    rules: PortRules


@dataclass(frozen=True, slots=True)
class SavePsk:
    """Replace what is kept of a pair's key, None: remove it. A record is answered by PskSaved."""

    peer: PublicKey
    record: Record | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class SetUpKeys:
    """Have what makes post-quantum keys ready, answered by KeysSetUp. Asked once in a run.

    `is_awaited`: no traffic passes before; else it is not to delay the first pings.
    """

    is_awaited: bool


@dataclass(frozen=True, slots=True)
class SaveIdentity:
    """Replace our identity on disk. Answered by IdentitySaved; one is in flight at a time."""

    identity: HybridIdentity


@dataclass(frozen=True, slots=True)
class NudgeTunnel:
    """Send an empty UDP datagram to the peer's address, through the device and no other way."""

    peer: PublicKey
    address: IPAddress


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a command: plain JSON values."""

    number: int
    value: MappingOf[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ListAgain:
    """Ask the registry for a complete list: many peers seem to be gone."""


Output: TypeAlias = (
    Send
    | DeviceBatch
    | Observe
    | WriteReport
    | SaveState
    | ApplyGrants
    | ApplyForwarding
    | ApplyPods
    | ApplyPorts
    | ApplyCarrier
    | SavePsk
    | SetUpKeys
    | SaveIdentity
    | NudgeTunnel
    | Reply
    | ListAgain
)
