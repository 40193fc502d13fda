"""A WireGuard device as frozen values: desired, observed, and the actions that lead from one to the other.

Desired and observed never share a type. An action changes one fact, so that correcting one thing never
overwrites another that WireGuard changed by itself (an endpoint that roamed, above all). `plan.plan_device`
compares; a `shell` performs.

Every prefix that is to be sent into the device stands in `DesiredDevice.routes`, the mesh's own included:
addresses are added without the connected route that the kernel would make of their length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from scope.model import ConfigError, Endpoint, IPInterface, IPNetwork, PublicKey, Secret

NO_PSK = Secret(bytes(32))  # WireGuard's own way of saying "no pre-shared key"


class ApplyError(Exception):
    """An action or a reading failed and may succeed later: retry with backoff. Says what, and why."""


class PortTaken(ConfigError):
    """Another program holds the listen port; pick another one, or free it."""


@dataclass(frozen=True, slots=True)
class DesiredPeer:
    """One remote peer as the device should know it.

    `endpoint` None leaves the device's own knowledge alone: an endpoint is never cleared. `psk` None does so
    too; `NO_PSK` asks for none. `verified` are the endpoints that WireGuard may move to by itself without it
    being drift. While `settling`, the endpoint is set again whatever the device reports. `hold` is to be set.
    `keepalive` is in seconds, 0 for off; its rise from 0 sends a packet at once, and so starts a handshake.
    """

    key: PublicKey
    endpoint: Endpoint | None = None
    allowed_ips: frozenset[IPNetwork] = frozenset()
    keepalive: int = 0
    psk: Secret | None = None
    verified: frozenset[Endpoint] = frozenset()
    settling: bool = False
    hold: HoldEndpoint | None = None


@dataclass(frozen=True, slots=True)
class DesiredDevice:
    """The whole device as it should be.

    `listen_port` 0 leaves the choice to WireGuard. `guarded` are the prefixes under which a blackhole route
    lies, so that nothing for the mesh leaves in plaintext while the device is away. `peers` is by key; a
    prefix that two peers claim goes to the lower key.
    """

    name: str
    private_key: Secret
    public_key: PublicKey  # of `private_key`: the device reports this half
    listen_port: int
    mtu: int
    fwmark: int = 0
    addresses: frozenset[IPInterface] = frozenset()
    routes: frozenset[IPNetwork] = frozenset()
    guarded: frozenset[IPNetwork] = frozenset()
    peers: dict[PublicKey, DesiredPeer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ObservedPeer:
    """One remote peer as the device reports it.

    `rx` and `tx` are bytes since the peer was added. `last_handshake` is in wall-clock seconds by the
    machine's own clock: compare it with its earlier value only.
    """

    key: PublicKey
    endpoint: Endpoint | None = None
    allowed_ips: frozenset[IPNetwork] = frozenset()
    keepalive: int = 0
    psk: Secret | None = None
    rx: int = 0
    tx: int = 0
    last_handshake: float | None = None


@dataclass(frozen=True, slots=True)
class ObservedDevice:
    """The whole device as it is. Where `exists` is False only `guarded` may hold anything.

    `routes` are the ones made by Scope on this device, `guarded` the blackhole routes made by Scope for it.
    """

    name: str
    exists: bool = False
    up: bool = False
    public_key: PublicKey | None = None
    listen_port: int = 0
    mtu: int = 0
    fwmark: int = 0
    addresses: frozenset[IPInterface] = frozenset()
    routes: frozenset[IPNetwork] = frozenset()
    guarded: frozenset[IPNetwork] = frozenset()
    peers: dict[PublicKey, ObservedPeer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes through the whole device: cheap to read, so that peers are read only when these moved.

    A user-space device counts payload alone, so handshakes and keepalives do not move its counters.
    """

    rx: int
    tx: int


# --- actions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateDevice:
    """Make the device, or see that it is there; in user space also see that its process runs."""


@dataclass(frozen=True, slots=True)
class SetPrivateKey:
    """Give the device its key."""

    private_key: Secret


@dataclass(frozen=True, slots=True)
class SetListenPort:
    """Move the device to another UDP port."""

    port: int


@dataclass(frozen=True, slots=True)
class SetFwmark:
    """Mark the device's own datagrams; 0 for none."""

    mark: int


@dataclass(frozen=True, slots=True)
class SetMtu:
    """Set the device's MTU, in bytes."""

    mtu: int


@dataclass(frozen=True, slots=True)
class SetUp:
    """Bring the device up."""


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Give the device an address, without a route."""

    address: IPInterface


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Take an address away."""

    address: IPInterface


@dataclass(frozen=True, slots=True)
class AddRoute:
    """Send a prefix into the device."""

    prefix: IPNetwork


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    """Stop sending a prefix into the device."""

    prefix: IPNetwork


@dataclass(frozen=True, slots=True)
class AddGuard:
    """Lay a blackhole route under a prefix."""

    prefix: IPNetwork


@dataclass(frozen=True, slots=True)
class RemoveGuard:
    """Take a blackhole route away."""

    prefix: IPNetwork


@dataclass(frozen=True, slots=True)
class AddPeer:
    """Add a peer that the device does not know, with all that is wanted of it."""

    key: PublicKey
    endpoint: Endpoint | None = None
    allowed_ips: frozenset[IPNetwork] = frozenset()
    keepalive: int = 0
    psk: Secret | None = None


@dataclass(frozen=True, slots=True)
class RemovePeer:
    """Remove a peer with its session and allowed IPs."""

    key: PublicKey


@dataclass(frozen=True, slots=True)
class SetEndpoint:
    """Send a known peer's datagrams to an endpoint; the session stays."""

    key: PublicKey
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class HoldEndpoint:
    """For so many seconds, data that arrives from `against` does not move a peer's endpoint off `endpoint`.

    No device can do it by itself: the packet filter does, in front of it (`shell.hold`). It replaces the
    peer's last hold. Where the packet filter is not to be had nothing happens.
    """

    key: PublicKey
    endpoint: Endpoint
    against: frozenset[Endpoint]
    seconds: float


@dataclass(frozen=True, slots=True)
class SetPsk:
    """Set the pre-shared key that the next handshake uses; the session stays."""

    key: PublicKey
    psk: Secret


@dataclass(frozen=True, slots=True)
class AddAllowedIps:
    """Give a known peer more allowed IPs. One that another peer holds moves in one step: nothing is lost."""

    key: PublicKey
    allowed_ips: frozenset[IPNetwork]


@dataclass(frozen=True, slots=True)
class SetAllowedIps:
    """Replace a known peer's allowed IPs: the only way to take one away that no other peer gets."""

    key: PublicKey
    allowed_ips: frozenset[IPNetwork]


@dataclass(frozen=True, slots=True)
class SetKeepalive:
    """Set a known peer's keepalive interval, in seconds; 0 for off."""

    key: PublicKey
    keepalive: int


Action: TypeAlias = (
    CreateDevice
    | SetPrivateKey
    | SetListenPort
    | SetFwmark
    | SetMtu
    | SetUp
    | AddAddress
    | RemoveAddress
    | AddRoute
    | RemoveRoute
    | AddGuard
    | RemoveGuard
    | AddPeer
    | RemovePeer
    | SetEndpoint
    | SetPsk
    | AddAllowedIps
    | SetAllowedIps
    | SetKeepalive
)

PlannedAction: TypeAlias = Action | HoldEndpoint
