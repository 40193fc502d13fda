"""The words of Scope as frozen values: what every side means by mesh, peer, endpoint, candidate and path.

Nothing here does I/O, reads a clock or draws a random number. Resources on the wire and on disk are
dictionaries; `scope.resources` turns them into these values at the edge, and inside the program only
these values are used: no strings for keys, endpoints or prefixes.

Times are seconds (float) unless a name says otherwise; wall-clock times are seconds since the Unix epoch
and appear in resources only.
"""

from __future__ import annotations

import base64
import binascii
import enum
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
)
from typing import TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPInterface: TypeAlias = IPv4Interface | IPv6Interface
IPNetwork: TypeAlias = IPv4Network | IPv6Network

KEY_BYTES = 32  # X25519 and Ed25519 public keys alike
FINGERPRINT_BYTES = 32


class ConfigError(Exception):
    """Something only a person can mend: the message says what is wrong, where, and what to change."""


class Family(enum.StrEnum):
    """An address family, by the name its users know."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"


_FAMILIES = {4: Family.IPV4, 6: Family.IPV6}  # by version


@dataclass(frozen=True, slots=True, order=True)
class PublicKey:
    """A 32-byte public key: WireGuard (X25519), probe (X25519) or signing (Ed25519). Ordered by raw bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ValueError(f"a public key is {KEY_BYTES} bytes, not {len(self.raw)}")

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read canonical base64 (44 characters). Raises ValueError."""
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not base64: {error}") from None
        key = cls(raw)
        if str(key) != text:
            raise ValueError("not canonical base64: its last character carries stray bits")
        return key

    def __hash__(self) -> int:
        return hash(self.raw)  # which bytes remember; every table of peers asks for it again and again

    def __str__(self) -> str:
        return base64.b64encode(self.raw).decode()

    def __repr__(self) -> str:
        return f"PublicKey({self})"


@dataclass(frozen=True, slots=True, order=True)
class Fingerprint:
    """SHA3-256 of a peer's identity for post-quantum keys: 32 bytes, as text 64 digits."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint is {FINGERPRINT_BYTES} bytes, not {len(self.raw)}")

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Read 64 lowercase hexadecimal digits. Raises ValueError."""
        fingerprint = cls(bytes.fromhex(text))
        if str(fingerprint) != text:
            raise ValueError("a fingerprint is 64 lowercase hexadecimal digits without separators")
        return fingerprint

    def __str__(self) -> str:
        return self.raw.hex()

    def __repr__(self) -> str:
        return f"Fingerprint({self})"


class IdentityTrust(enum.StrEnum):
    """By what the identity of a peer is believed: the registry's word, the operator's, or a CA's."""

    REGISTRY = "Registry"
    PINNED = "Pinned"
    CA = "CA"


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """Bytes that have no printable form: private keys and pre-shared keys."""

    raw: bytes

    def __repr__(self) -> str:
        return "Secret(...)"

    __str__ = __repr__


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An IP and UDP port where a datagram can be sent. IPv4-mapped IPv6 addresses become IPv4."""

    address: IPAddress
    port: int

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"a port is 1 to 65535, not {self.port}")
        if isinstance(self.address, IPv6Address) and self.address.ipv4_mapped is not None:
            object.__setattr__(self, "address", self.address.ipv4_mapped)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read `192.0.2.1:51820` or `[2001:db8::1]:51820`. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit():
            raise ValueError("an endpoint is ADDRESS:PORT, IPv6 as [ADDRESS]:PORT")
        if host.startswith("[") and host.endswith("]"):
            return cls(IPv6Address(host[1:-1]), int(port))
        return cls(IPv4Address(host), int(port))

    def __hash__(self) -> int:
        return hash((int(self.address), self.port))  # an address by itself hashes its digits as text

    @property
    def family(self) -> Family:
        return _FAMILIES[self.address.version]

    def __str__(self) -> str:
        return f"{self.address}:{self.port}" if self.address.version == 4 else f"[{self.address}]:{self.port}"


def endpoint_at(address: str, port: int) -> Endpoint:
    """The endpoint of a socket address as the kernel gives it (a zone after `%` is cut off)."""
    return Endpoint(ip_address(address.partition("%")[0]), port)


class CandidateKind(enum.StrEnum):
    """How a candidate is known."""

    HOST = "Host"  # an address of one of the peer's own interfaces
    REFLEXIVE = "Reflexive"  # what a reflector saw
    OBSERVED = "Observed"  # what another peer saw
    STATIC = "Static"  # what the user wrote
    MAPPED = "Mapped"  # what a port-mapping protocol gave
    RELAY = "Relay"  # a port on a hub


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that might work, with its kind."""

    endpoint: Endpoint
    kind: CandidateKind


class Mapping(enum.StrEnum):
    """The NAT mapping class of a peer's WireGuard socket (RFC 4787, section 4.1)."""

    NONE = "None"  # the mapping is one of the peer's own addresses
    ENDPOINT_INDEPENDENT = "EndpointIndependent"
    ENDPOINT_DEPENDENT = "EndpointDependent"
    UNKNOWN = "Unknown"  # fewer than two reflector endpoints answered


class PathKind(enum.StrEnum):
    """How a peer is reached."""

    DIRECT = "Direct"
    RELAYED = "Relayed"
    NONE = "None"


class Role(enum.StrEnum):
    """What a peer is asked to be; `Auto` leaves the choice to the registry."""

    HUB = "Hub"
    EDGE = "Edge"
    AUTO = "Auto"


class DeviceKind(enum.StrEnum):
    """What carries a peer's device."""

    KERNEL = "Kernel"
    USER_SPACE = "UserSpace"


# --- resources ---------------------------------------------------------------------------------------------


class Kind(enum.StrEnum):
    """The kinds a Registry holds."""

    MESH = "ScopeMesh"
    PEER = "ScopePeer"
    SERVICE = "ScopeService"
    TOKEN = "JoinToken"  # noqa: S105 - the name of a kind; never served


@dataclass(frozen=True, slots=True, order=True)
class Revision:
    """A point in a registry's history. Numbers are comparable within one `registry` id only."""

    registry: str
    number: int


@dataclass(frozen=True, slots=True)
class Meta:
    """What every resource carries. A new one has uid "", revision 0 and created 0: the registry sets them."""

    name: str
    uid: str = ""
    revision: int = 0
    generation: int = 1  # rises when the spec changes
    created: float = 0.0  # wall clock


@dataclass(frozen=True, slots=True)
class Condition:
    """A Kubernetes status condition. `status` is "True", "False" or "Unknown"."""

    type: str
    status: str
    reason: str
    message: str
    changed: float = 0.0  # wall clock of the last change of `status`


@dataclass(frozen=True, slots=True)
class Addressing:
    """The address space of a mesh: at least one of the two prefixes."""

    ipv4: IPv4Network | None = None
    ipv6: IPv6Network | None = None


@dataclass(frozen=True, slots=True)
class Timers:
    """The ladder's upper bounds, in seconds after a peer joined or a path was lost."""

    probe_interval: float = 2.0  # every peer is pinged this often while its path is being searched
    address_fallback: float = 8.0  # no echo on the preferred family: the other one becomes primary
    report: float = 16.0  # endpoint and latency of every peer stand in the status
    connect_back: float = 20.0  # peers that saw no ping connect back to the observed endpoints
    hub_fallback: float = 60.0  # the pair is declared relayed, or unreachable without a hub


class Operator(enum.StrEnum):
    """How a requirement compares a label, by Kubernetes' names."""

    IN = "In"
    NOT_IN = "NotIn"  # also true where the label is absent
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Requirement:
    """What one label of a Node must be. `values` is empty for Exists and DoesNotExist, and for them only."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """Which Nodes are meant: those whose labels meet everything here, so an empty one means every Node."""

    match_labels: tuple[tuple[str, str], ...] = ()  # (key, value), sorted, each key once
    match_expressions: tuple[Requirement, ...] = ()


class HubMode(enum.StrEnum):
    """Who says which peers are hubs."""

    DECLARED = "Declared"  # the user
    AUTO = "Auto"  # the registry, among the peers that can be reached by all


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Bytes per second that a hub relays for one pair, both ways together, and in all; 0: no limit."""

    pair: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Hubs:
    """Which peers relay for others, and how.

    `names` are ScopePeers, `selector` means Nodes; either makes hubs of whom it means. A peer whose spec says
    Hub is one too, and one whose spec says Edge is none, whatever stands here.
    """

    mode: HubMode = HubMode.DECLARED
    names: tuple[str, ...] = ()
    selector: LabelSelector | None = None  # None: no Node by its labels
    ports: tuple[int, int] = (26000, 26255)  # UDP, first and last, where hubs are reached by relayed peers
    limits: RelayLimits = RelayLimits()
    carrier_port: int = 443  # TCP, where hubs are reached by peers whose network lets no UDP out; 0: nowhere


class TopologyMode(enum.StrEnum):
    """Between which peers there are direct links."""

    FULL = "Full"  # between all
    TREE = "Tree"  # between hubs, and from each edge to hubs


class PodNetworking(enum.StrEnum):
    """Whose pods reach each other through the mesh."""

    OFF = "Off"
    CROSS_CLUSTER = "CrossCluster"  # those of different clusters; an external peer is a cluster of its own
    ALL = "All"  # those of one cluster too, but where its own network leads there


class PodSource(enum.StrEnum):
    """Who says that a prefix is that of a Node's pods."""

    NODE = "Node"  # its spec.podCIDRs
    STATIC = "Static"  # the user


@dataclass(frozen=True, slots=True)
class Translation:
    """Addresses of pods that others see as different ones: each of `inside` at the same place of `outside`.

    Both are of one family and length.
    """

    inside: IPNetwork  # in its own cluster
    outside: IPNetwork  # elsewhere


@dataclass(frozen=True, slots=True)
class MeshCluster:
    """What the user asks of one cluster of a mesh."""

    name: str
    translate: tuple[Translation, ...] = ()  # of two that hold for a prefix the longer one counts


class PostQuantumMode(enum.StrEnum):
    """Whether pairs agree on post-quantum pre-shared keys."""

    REQUIRED = "Required"  # no traffic before a key is proved
    PREFERRED = "Preferred"  # traffic first, a key as soon as it can be had
    OFF = "Off"  # no new keys; those in use stay


@dataclass(frozen=True, slots=True)
class PostQuantum:
    """How a mesh keys its pairs; `rotation_interval` in seconds, between the proofs of a pair's keys."""

    mode: PostQuantumMode = PostQuantumMode.OFF
    rotation_interval: float = 3600.0


class PskFailure(enum.StrEnum):
    """What stands against a pair's post-quantum key, or against a newer one; the gravest first."""

    CONFLICT = "Conflict"  # another program replaces it in the device, again and again
    UNTRUSTED = "Untrusted"  # the peer's identity is another one than before, or not trusted
    UNCONFIRMED = "Unconfirmed"  # no handshake proved it in time
    DISK = "Disk"  # it could not be written down
    REFUSED = "Refused"  # by the peer's policy
    NO_IDENTITY = "NoIdentity"  # the peer publishes none
    UNANSWERED = "Unanswered"  # the peer does not answer
    NO_SESSION = "NoYoungSession"  # there was none to lay the key into


@dataclass(frozen=True, slots=True)
class KeyCounts:
    """Of how many peers, or pairs, the post-quantum key is proved, or not; `failed` may be of either."""

    keyed: int = 0
    unkeyed: int = 0  # with a path, and without a proved key
    failed: int = 0  # something stands against a key, or a newer one


@dataclass(frozen=True, slots=True)
class MeshSpec:
    """What the user asks of a mesh.

    With `existing_interface` the mesh is no network of its own: it lays keys on the WireGuard interface of
    that name, which something else manages on every peer, and has no addresses.
    """

    addressing: Addressing
    prefer: Family = Family.IPV6
    timers: Timers = Timers()
    listen_port: int = 0  # 0: each agent picks a port and keeps it
    mtu: int | None = None  # None: Auto, the underlay's MTU less WireGuard's 80 bytes
    peer_expiry: float = 30 * 86400.0
    node_selector: LabelSelector = LabelSelector()  # which Kubernetes Nodes are peers: all, unless it says
    hubs: Hubs = Hubs()
    topology: TopologyMode = TopologyMode.FULL
    birthday: bool = False  # whether ports of a symmetric NAT may be guessed
    pod_networking: PodNetworking = PodNetworking.OFF
    post_quantum: PostQuantum = PostQuantum()
    existing_interface: str = ""
    clusters: tuple[MeshCluster, ...] = ()  # each name once; not every one need be named


@dataclass(frozen=True, slots=True)
class Reflector:
    """Who answers authenticated probes with the endpoint it saw, on which endpoints."""

    probe_key: PublicKey
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class GatewayOrigin:
    """Where a registry's gateway serves: `url` is its origin, https://HOST or https://HOST:PORT.

    `pin` is the SHA-256 of its certificate's SubjectPublicKeyInfo; None: the system's CAs vouch for it.
    """

    url: str
    pin: bytes | None


@dataclass(frozen=True, slots=True)
class MeshCounts:
    """Totals over a mesh: peers, and links by path (a pair counts once)."""

    peers: int = 0
    online: int = 0
    direct: int = 0
    relayed: int = 0
    unreachable: int = 0
    post_quantum: KeyCounts | None = None  # None: nobody makes post-quantum keys


class Curve(enum.StrEnum):
    """The elliptic curves on which API servers sign, by their names in a JWK (RFC 7518, section 6.2.1.1)."""

    P256 = "P-256"
    P384 = "P-384"
    P521 = "P-521"


@dataclass(frozen=True, slots=True)
class RsaKey:
    """A public key with which an API server signs tokens; `id` is the `kid` in their headers."""

    id: str
    modulus: int
    exponent: int


@dataclass(frozen=True, slots=True)
class EcKey:
    """A public key with which an API server signs tokens: a point of `curve`."""

    id: str
    curve: Curve
    x: int
    y: int


TokenKey: TypeAlias = RsaKey | EcKey


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """Who a token of a cluster's API server speaks for."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class AgentTokens:
    """By what the tokens of a joined cluster's agents are known: no API server is asked."""

    issuer: str
    keys: tuple[TokenKey, ...]  # each id once
    service_account: ServiceAccount


@dataclass(frozen=True, slots=True)
class ClusterTrust:
    """Who speaks for a cluster that joined from elsewhere."""

    signing_key: PublicKey  # its operator's
    tokens: AgentTokens


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Kubernetes cluster with Nodes in a mesh: whoever comes with its name must have its UID.

    `trust` is None for the registry's own cluster.
    """

    name: str
    uid: str  # of its kube-system namespace
    trust: ClusterTrust | None = None


@dataclass(frozen=True, slots=True)
class HubChoice:
    """Whether a peer is a hub, and why or why not, in words.

    `contested_since` is the wall clock since which the choice ought to be the other way, 0 where it ought
    not: what is so for long enough is done. It is all that the choice of hubs remembers.
    """

    peer: str  # name of the ScopePeer
    chosen: bool
    reason: str
    contested_since: float = 0.0


@dataclass(frozen=True, slots=True)
class MeshStatus:
    """What the registry says of a mesh."""

    signing_key: PublicKey | None = None  # the registry's Ed25519 key: it signs tombstones
    reflectors: tuple[Reflector, ...] = ()
    gateway: GatewayOrigin | None = None  # to which hubs that joined by none lead whom they carry
    counts: MeshCounts = MeshCounts()
    conditions: tuple[Condition, ...] = ()
    observed_generation: int = 0
    clusters: tuple[Cluster, ...] = ()  # each name once
    hubs: tuple[HubChoice, ...] = ()  # by name; hubs first, then candidates that were not chosen; bounded


@dataclass(frozen=True, slots=True)
class Mesh:
    """A ScopeMesh: one overlay network with one address space."""

    meta: Meta
    spec: MeshSpec
    status: MeshStatus = MeshStatus()


@dataclass(frozen=True, slots=True)
class PodPrefix:
    """Where pods of a Node have their addresses, and who says so."""

    prefix: IPNetwork
    source: PodSource
    seen_as: IPNetwork | None = None  # by those of other clusters; None: as it is


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """What the user asks of a peer.

    A Kubernetes Node's peer names the Node with all three of `cluster`, `node_name` and `node_uid`, an
    external peer with none. The UID tells a Node from a later one of the same name, which is another peer.
    """

    mesh: str
    role: Role = Role.AUTO
    routes: tuple[IPNetwork, ...] = ()  # prefixes offered beyond the peer's own address
    endpoints: tuple[Endpoint, ...] = ()  # static endpoints
    cluster: str = ""
    node_name: str = ""
    node_uid: str = ""
    leaving: bool = (
        False  # of a Node: its agent takes down what the mesh has there; the address stays its own
    )
    pod_prefixes: tuple[PodPrefix, ...] = ()  # offered to others where the mesh asks for them


@dataclass(frozen=True, slots=True)
class PeerKeys:
    """A peer's public keys, bound at enrolment and never changed by a status write."""

    wireguard: PublicKey
    probe: PublicKey
    signing: PublicKey


@dataclass(frozen=True, slots=True)
class LinkPsk:
    """The proved post-quantum pre-shared key of a link, if there is one, and what stands against it."""

    epoch: int = 0  # 0: none is proved; then `since` and `suite` are 0, too
    since: float = 0.0  # wall clock of its proof by a handshake
    suite: int = 0  # the number of its primitives
    trust: IdentityTrust | None = None  # None: no identity of the peer is believed
    failure: PskFailure | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """How the reporting peer reaches one other peer, for people. At most `MAX_LINKS` are published."""

    peer: str  # name of the ScopePeer
    path: PathKind
    endpoint: Endpoint | None = None  # where its datagrams are sent
    observed: Endpoint | None = None  # where it was seen to send from, when it does not publish that itself
    latency: float | None = None  # round trip, seconds
    reason: str = ""  # why not direct
    hub: str = ""  # name of the ScopePeer that relays
    user_space: bool = False  # what relays is a process on the hub, not its kernel
    birthday: bool = False  # direct, by a port of a symmetric NAT that was guessed
    carried: bool = False  # over TCP between the hub and one of the two
    psk: LinkPsk | None = None  # about the post-quantum key; never the key itself


class Forwarding(enum.StrEnum):
    """What forwards on a hub."""

    KERNEL = "Kernel"  # rules in its kernel; a process for what these cannot
    USER_SPACE = "UserSpace"  # a process for everything
    NONE = "None"


@dataclass(frozen=True, slots=True)
class HubCarrier:
    """Where a hub carries peers whose network lets no UDP out, or why it does not."""

    port: int  # TCP
    pin: bytes  # SHA-256 of the public key of the certificate that it shows there
    reason: str = ""  # why nobody is listening; "" where somebody is


@dataclass(frozen=True, slots=True)
class RelayReport:
    """What a hub says of its relaying."""

    forwarding: Forwarding
    pairs: int = 0  # with a grant
    refused: int = 0  # pairs that got none because no port was left, and asked lately
    reason: str = ""  # why not in the kernel, or not at all
    carrier: HubCarrier | None = None  # None: none is asked for, or it is not known yet
    unrouted: str = ""  # of a tree's hub: why it does not forward what edges send each other


@dataclass(frozen=True, slots=True)
class PeerReport:
    """The part of a ScopePeer's status that its own agent writes, and nobody else."""

    keys: PeerKeys
    endpoints: tuple[Candidate, ...] = ()
    mapping: Mapping = Mapping.UNKNOWN
    device: DeviceKind | None = None
    links: tuple[Link, ...] = ()
    direct: int = 0
    relayed: int = 0
    unreachable: int = 0
    held_addresses: tuple[IPAddress, ...] = ()  # honoured by a rebuilt registry when they are free
    protocol: int = 1  # highest version of the probe protocol that the agent speaks
    relay: RelayReport | None = None  # of a hub
    hub: str = ""  # of an edge of a tree: name of the ScopePeer by which it is reached
    identity: Fingerprint | None = None  # for post-quantum keys; None: the agent makes none
    post_quantum: KeyCounts | None = None  # None: as `identity`
    left: bool = False  # the agent was told to leave, and nothing of the mesh is on its Node any more
    pods_trouble: str = ""  # what stands against packets of pods there


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The signed record of a deliberate removal; `scope.tombstones` makes and checks it."""

    mesh_uid: str
    peer_uid: str
    key: PublicKey  # the removed peer's WireGuard key
    signer: PublicKey  # the registry's signing key, or the removed peer's own
    signature: bytes  # 64 bytes, Ed25519


@dataclass(frozen=True, slots=True)
class Attachment:
    """An edge's claim that it is reached by a hub; `scope.attachments` makes and checks it.

    `hub` is the edge's own key where it is reached by none. Of two claims of one edge the later one holds.
    """

    edge: PublicKey  # WireGuard key
    hub: PublicKey  # WireGuard key
    epoch: int  # u64, rises with each claim of the edge
    signature: bytes  # 64 bytes, Ed25519, the edge's


@dataclass(frozen=True, slots=True)
class Assignment:
    """The part of a ScopePeer's status that the registry side (operator, gateway) writes, and nobody else."""

    addresses: tuple[IPInterface, ...] = ()  # each with its mesh prefix's length
    role: Role = Role.EDGE
    online: bool = False
    last_seen: float = 0.0  # wall clock of the last change of `online`
    conditions: tuple[Condition, ...] = ()
    tombstone: Tombstone | None = None  # set: the peer is removed, and kept until `peer_expiry` to say so


@dataclass(frozen=True, slots=True)
class Peer:
    """A ScopePeer: a member of a mesh."""

    meta: Meta
    spec: PeerSpec
    report: PeerReport | None = None
    assignment: Assignment = Assignment()


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """A right to join one mesh in one role. Only the hash of its secret is kept."""

    mesh: str
    secret_hash: bytes  # SHA-256 of the 32 random bytes of the secret
    role: Role = Role.AUTO
    expires: float = 0.0  # wall clock
    single_use: bool = False
    used_by: tuple[str, ...] = ()  # UIDs of machines (hash of their keys) that joined with it; bounded


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A join token at rest; `meta.name` is its public id."""

    meta: Meta
    spec: TokenSpec


class Protocol(enum.StrEnum):
    """What a port of a Service speaks."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class EndpointState(enum.StrEnum):
    """Whether a pod behind a Service takes connections."""

    READY = "Ready"
    DRAINING = "Draining"  # it ends, and serves until then
    NOT_READY = "NotReady"


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a Service, or of the pods behind it; `name` says which belongs to which."""

    port: int
    protocol: Protocol = Protocol.TCP
    name: str = ""
    app_protocol: str = ""


@dataclass(frozen=True, slots=True)
class ServiceEndpoint:
    """A pod behind a Service, as its own cluster knows it."""

    address: IPAddress
    state: EndpointState = EndpointState.READY
    hostname: str = ""  # by which a headless Service names this one pod


@dataclass(frozen=True, slots=True)
class Backend:
    """Pods that listen on the same ports."""

    ports: tuple[ServicePort, ...] = ()
    endpoints: tuple[ServiceEndpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A Service that a cluster offers to the others of its mesh."""

    mesh: str
    cluster: str
    namespace: str
    service: str  # its name there
    headless: bool = False
    families: tuple[Family, ...] = ()  # one or two, the first one preferred
    ports: tuple[ServicePort, ...] = ()
    backends: tuple[Backend, ...] = ()  # bounded: `MAX_SERVICE_ENDPOINTS` in all


@dataclass(frozen=True, slots=True)
class Service:
    """A ScopeService: the record of an exported Service, which its own cluster's operator writes."""

    meta: Meta
    spec: ServiceSpec


Resource: TypeAlias = Mesh | Peer | Service | JoinToken
StatusPart: TypeAlias = MeshStatus | PeerReport | Assignment


def kind_of(resource: Resource) -> Kind:
    """The kind of a resource."""
    match resource:
        case Mesh():
            return Kind.MESH
        case Peer():
            return Kind.PEER
        case Service():
            return Kind.SERVICE
        case JoinToken():
            return Kind.TOKEN


# --- what an agent knows ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An immutable view of all that is known of one mesh: what `membership` believes.

    `peers` holds every other member that may be spoken to, by WireGuard key: with keys, not removed, not
    ourselves. `own` is None until our ScopePeer was seen.
    """

    mesh: Mesh | None = None
    own: Peer | None = None
    peers: dict[PublicKey, Peer] = field(default_factory=dict)
    tombstones: tuple[Tombstone, ...] = ()
    revision: Revision | None = None
