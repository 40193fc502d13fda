"""How datagrams travel over TCP where a network lets no UDP out: frames, tickets, the carrier's file. Pure.

A *carrier* is a process beside the agent, at a peer and at a hub. The peer's connects to the hub by TLS and
WebSocket and carries datagrams both ways; it is told what to do by one file, replaced as a whole.

    WireGuard, agent          peer's carrier        hub's carrier           WireGuard, agent, forwarder
    127.0.0.1:W  <--UDP-->  127.83.a.b:P  <--TLS-->  127.83.c.d:Q  <--UDP-->  127.0.0.1:port of the hub

At the peer each port of the hub has a loopback endpoint of its own, a *passage*: what WireGuard sends there
goes to that port, and what comes from that port is sent from there. At the hub each member has a loopback
endpoint, at which all of the hub's programs find it as they find any other peer.

A binary message of the WebSocket is a frame, all numbers big endian:

    offset  bytes
         0      2  port of the hub: to which, or from which
         2      2  size of a segment, 1 at least
         4      n  a batch: datagrams of that size, of which the last may be shorter; MAX_SEGMENTS at most

A text message, only from the peer, is a ticket that takes the place of the one that it connected with.

A ticket says that a peer may be carried by one hub until it expires. As text it is base64url of

         0     32  the peer's WireGuard key
        32      8  the wall clock at which it expires, in seconds
        40     64  signature (Ed25519) by the peer's signing key over a label and then the mesh's UID, both
                   peers' WireGuard keys and those eight bytes, each behind its length in four bytes

so a ticket is worth nothing at another hub or in another mesh. The peer shows it in the request that opens
the WebSocket, as a bearer token, to a hub whose certificate it knows by its pin.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from scope.credentials import PIN_BYTES, base64url, read_base64url
from scope.model import KEY_BYTES, Endpoint, GatewayOrigin, PublicKey, RelayLimits, Secret

CARRIER_PATH: Final = "/v1/carrier"  # of the WebSocket; every other path is the registry's
REFUSED_HEADER: Final = "Scope-Refused"  # why: a client does not read the body of a refused upgrade
DEFAULT_PORT: Final = 443  # what networks without UDP let through

# A part of 127.0.0.0/8 where nothing else is found by accident; 16 bits, as many as peers of a large mesh.
LOOPBACKS: Final = IPv4Network("127.83.0.0/16")
_PREFIX: Final = LOOPBACKS.network_address.packed[:2]
# Below the ports that Linux gives to sockets by itself (32768), beyond the default range of relays.
MEMBER_PORT: Final = 26443
PASSAGE_PORT: Final = 26444

TICKET_LIFETIME: Final = 86400  # seconds: an agent that is dead for a day is not carried any more
TICKET_RENEWAL: Final = 3600
# NTP is UDP, so the clock of whoever needs a carrier is wrong more often than others: a ticket may expire so
# many seconds later than a right clock would have said.
CLOCK_AHEAD: Final = 86400

MAX_BATCH: Final = 65507  # bytes of payload that one UDP packet can have
MAX_SEGMENTS: Final = 64  # what Linux takes in one call; a frame of single bytes must not cost thousands
_HEADER: Final = struct.Struct(">HH")
HEADER_BYTES: Final = _HEADER.size
MAX_FRAME: Final = HEADER_BYTES + MAX_BATCH
MAX_TICKET: Final = 256  # characters: more than any that is one

_VERSION = 1
_LABEL = b"scope carrier ticket 1"
_TICKET = struct.Struct(f">{KEY_BYTES}s8s64s")
_EXPIRES = struct.Struct(">Q")


class FrameError(ValueError):
    """A message that is no frame: whoever sent it speaks something else, or wishes ill."""


class TicketError(ValueError):
    """A ticket that opens nothing here; the message says why, and repeats nothing of it."""


class CarrierFileError(ValueError):
    """The carrier's file is not one: it is left as it was, and what was read before goes on."""


# --- frames -------------------------------------------------------------------------------------------------


def encode_frame(port: int, segment: int, batch: bytes | bytearray | memoryview) -> bytes:
    """One message: `batch` (1 to MAX_BATCH bytes) is datagrams of `segment` bytes, the last maybe shorter."""
    return b"".join((_HEADER.pack(port, segment), batch))


def decode_frame(message: bytes) -> tuple[int, int]:
    """Port and size of a segment of a message whose batch begins at HEADER_BYTES. Raises FrameError."""
    size = len(message) - HEADER_BYTES
    if not 1 <= size <= MAX_BATCH:
        raise FrameError(f"{len(message)} bytes are no frame")
    port, segment = _HEADER.unpack_from(message)
    if port == 0 or segment == 0:
        raise FrameError("a port and the size of a segment are 1 at least")
    if size > segment * MAX_SEGMENTS:
        raise FrameError(f"more than {MAX_SEGMENTS} datagrams in one frame")
    return port, segment


# --- tickets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ticket:
    """A ticket that is believed: whose, and until when (wall clock, seconds)."""

    peer: PublicKey
    expires: int


def sign_ticket(*, mesh_uid: str, peer: PublicKey, hub: PublicKey, expires: int, secret: Secret) -> str:
    """The text of a ticket. `secret` is the peer's raw 32-byte Ed25519 private key."""
    packed = _EXPIRES.pack(expires)
    private = Ed25519PrivateKey.from_private_bytes(secret.raw)
    signature = private.sign(_statement(mesh_uid=mesh_uid, peer=peer, hub=hub, expires=packed))
    return base64url(_TICKET.pack(peer.raw, packed, signature))


def verify_ticket(
    text: str, *, mesh_uid: str, hub: PublicKey, signing: Mapping[PublicKey, PublicKey], wall: float
) -> Ticket:
    """Whose ticket this is. `signing` has the members' signing keys by WireGuard key. Raises TicketError."""
    if len(text) > MAX_TICKET:
        raise TicketError("not a ticket")
    try:
        key, packed, signature = _TICKET.unpack(read_base64url(text))
    except (ValueError, struct.error):
        raise TicketError("not a ticket") from None
    peer, expires = PublicKey(key), int(_EXPIRES.unpack(packed)[0])
    signer = signing.get(peer)
    if signer is None:
        raise TicketError("not a member of this mesh")
    try:
        statement = _statement(mesh_uid=mesh_uid, peer=peer, hub=hub, expires=packed)
        Ed25519PublicKey.from_public_bytes(signer.raw).verify(signature, statement)
    except (InvalidSignature, ValueError):  # ValueError: a key that is no point
        raise TicketError("not signed by that member for this hub") from None
    if expires <= wall:
        raise TicketError("expired")
    if expires > wall + TICKET_LIFETIME + CLOCK_AHEAD:
        raise TicketError("expires too late: the clock of one of us is more than a day wrong")
    return Ticket(peer, expires)


def _statement(*, mesh_uid: str, peer: PublicKey, hub: PublicKey, expires: bytes) -> bytes:
    fields = (_LABEL, mesh_uid.encode(), peer.raw, hub.raw, expires)
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


# --- loopback endpoints -------------------------------------------------------------------------------------


def is_carried(endpoint: Endpoint) -> bool:
    """Whether an endpoint is a carrier's, so reached over loopback and TCP."""
    return endpoint.address.version == 4 and endpoint.address.packed[:2] == _PREFIX


def assign_loopbacks(
    names: Iterable[bytes], *, port: int, held: Mapping[bytes, Endpoint]
) -> dict[bytes, Endpoint]:
    """A loopback endpoint for each name: the one that it holds, or one that its hash leads to.

    Names are hashed as they are, so put the mesh's UID into them: the meshes of one machine share addresses.
    Raises ValueError when there are more names than addresses.
    """
    wanted = sorted(set(names))
    given = {name: held[name] for name in wanted if name in held and held[name].port == port}
    taken = {endpoint.address for endpoint in given.values()}
    if len(wanted) > LOOPBACKS.num_addresses - 2:
        raise ValueError(f"{len(wanted)} are more than {LOOPBACKS} has addresses")
    for name in wanted:
        if name in given:
            continue
        place = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
        while (address := _loopback(place)) in taken:
            place += 1
        taken.add(address)
        given[name] = Endpoint(address, port)
    return given


def _loopback(place: int) -> IPv4Address:
    """One of LOOPBACKS, less the first and the last, which look like a network's own."""
    return LOOPBACKS.network_address + 1 + place % (LOOPBACKS.num_addresses - 2)


# --- the file -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passage:
    """At a peer: the loopback endpoint that stands for one UDP port of a hub."""

    endpoint: Endpoint
    port: int


@dataclass(frozen=True, slots=True)
class CarryingHub:
    """At a peer: a hub to be carried by. `addresses`: where its carrier listens (TCP), the best first."""

    hub: PublicKey  # its WireGuard key
    addresses: tuple[Endpoint, ...]
    pin: bytes  # SHA-256 of its certificate's SubjectPublicKeyInfo
    ticket: str
    passages: tuple[Passage, ...]

    def __repr__(self) -> str:
        return f"CarryingHub(hub={self.hub}, addresses={self.addresses}, passages={self.passages})"


@dataclass(frozen=True, slots=True)
class PeerPart:
    """What a peer's carrier does. `wireguard_port`: of the mesh's device, UDP."""

    wireguard_port: int
    hubs: tuple[CarryingHub, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """At a hub: who may be carried, known by `signing`, and the loopback endpoint at which it is found."""

    peer: PublicKey
    signing: PublicKey
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class HubPart:
    """What a hub's carrier does: whom it carries to which UDP ports of the hub; it listens at `port`."""

    mesh_uid: str
    hub: PublicKey  # its WireGuard key
    port: int
    certificate: str  # PEM
    key: Secret  # PEM, of the certificate
    wireguard_port: int
    first_port: int  # of the range of relays
    last_port: int
    limits: RelayLimits  # `pair` holds for one member, both ways together
    members: tuple[Member, ...]
    upstream: GatewayOrigin | None  # to which all goes that is no carrier's; None: nowhere

    def carries_to(self, port: int) -> bool:
        """Whether members may send to, and hear from, that UDP port of the hub."""
        return port == self.wireguard_port or self.first_port <= port <= self.last_port


@dataclass(frozen=True, slots=True)
class Carrier:
    """All that the carrier of one mesh does on this machine."""

    peer: PeerPart | None = None
    hub: HubPart | None = None


def encode_carrier(carrier: Carrier) -> str:
    """The file for the carrier: JSON, one line, with secrets."""
    peer, hub = carrier.peer, carrier.hub
    return json.dumps(
        {
            "version": _VERSION,
            "peer": None if peer is None else _encode_peer(peer),
            "hub": None if hub is None else _encode_hub(hub),
        }
    )


def decode_carrier(text: str) -> Carrier:
    """Read `encode_carrier`'s JSON. Raises CarrierFileError."""
    try:
        document = json.loads(text)
        _require_version(document["version"])
        peer, hub = document["peer"], document["hub"]
        return Carrier(
            None if peer is None else _decode_peer(peer), None if hub is None else _decode_hub(hub)
        )
    except CarrierFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # What a ValueError quotes may be a part of the file, which holds a private key.
        raise CarrierFileError(f"not a carrier's file ({type(error).__name__})") from None


def _require_version(version: object) -> None:
    if version != _VERSION:
        raise CarrierFileError(f"version {version}, where this release reads {_VERSION}")


def _encode_peer(part: PeerPart) -> dict[str, Any]:
    return {
        "wireguardPort": part.wireguard_port,
        "hubs": [
            {
                "hub": str(each.hub),
                "addresses": [str(address) for address in each.addresses],
                "pin": each.pin.hex(),
                "ticket": each.ticket,
                "passages": [
                    {"endpoint": str(passage.endpoint), "port": passage.port} for passage in each.passages
                ],
            }
            for each in part.hubs
        ],
    }


def _decode_peer(document: dict[str, Any]) -> PeerPart:
    return PeerPart(
        wireguard_port=_port(document["wireguardPort"]),
        hubs=tuple(
            CarryingHub(
                hub=PublicKey.parse(each["hub"]),
                addresses=tuple(Endpoint.parse(address) for address in each["addresses"]),
                pin=_pin(each["pin"]),
                ticket=_text(each["ticket"]),
                passages=tuple(
                    Passage(_decode_loopback(passage["endpoint"]), _port(passage["port"]))
                    for passage in each["passages"]
                ),
            )
            for each in document["hubs"]
        ),
    )


def _encode_hub(part: HubPart) -> dict[str, Any]:
    upstream = part.upstream
    return {
        "mesh": part.mesh_uid,
        "hub": str(part.hub),
        "port": part.port,
        "certificate": part.certificate,
        "key": part.key.raw.decode("ascii"),
        "wireguardPort": part.wireguard_port,
        "relayPorts": [part.first_port, part.last_port],
        "limits": {"pair": part.limits.pair, "total": part.limits.total},
        "members": [
            {
                "peer": str(member.peer),
                "signing": str(member.signing),
                "endpoint": str(member.endpoint),
            }
            for member in part.members
        ],
        "upstream": None
        if upstream is None
        else {"url": upstream.url, "pin": None if upstream.pin is None else upstream.pin.hex()},
    }


def _decode_hub(document: dict[str, Any]) -> HubPart:
    first, last = map(_port, document["relayPorts"])
    limits, upstream = document["limits"], document["upstream"]
    return HubPart(
        mesh_uid=_text(document["mesh"]),
        hub=PublicKey.parse(document["hub"]),
        port=_port(document["port"]),
        certificate=_text(document["certificate"]),
        key=Secret(_text(document["key"]).encode("ascii")),
        wireguard_port=_port(document["wireguardPort"]),
        first_port=first,
        last_port=last,
        limits=RelayLimits(pair=int(limits["pair"]), total=int(limits["total"])),
        members=tuple(
            Member(
                PublicKey.parse(each["peer"]),
                PublicKey.parse(each["signing"]),
                _decode_loopback(each["endpoint"]),
            )
            for each in document["members"]
        ),
        upstream=None
        if upstream is None
        else GatewayOrigin(
            _text(upstream["url"]), None if upstream["pin"] is None else _pin(upstream["pin"])
        ),
    )


# --- what it tells ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Carried:
    """What went over the connections with one other side; `dropped`: datagrams that did not, of both ways."""

    sent_packets: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    received_bytes: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class HubReport:
    """At a peer: one hub. `address`: where it is connected to; else None, and `reason` says why, in words."""

    hub: PublicKey
    address: Endpoint | None
    reason: str
    carried: Carried


@dataclass(frozen=True, slots=True)
class MemberReport:
    """At a hub: one member that was carried since the carrier started, and whether it is now."""

    peer: PublicKey
    connected: bool
    carried: Carried


@dataclass(frozen=True, slots=True)
class CarrierReport:
    """All that a carrier tells. Counts start anew with its process."""

    hubs: tuple[HubReport, ...]
    members: tuple[MemberReport, ...]
    listening: bool  # as a hub
    reason: str  # why it does not listen, or over one version of IP alone, in words; else empty
    refused: int  # requests to be carried by whom may not
    file: str  # SHA-256, hexadecimal, of the text of the file that is in effect


def encode_report(report: CarrierReport) -> str:
    """What the carrier's socket says: JSON, one line."""
    return json.dumps(
        {
            "version": _VERSION,
            "hubs": [
                {
                    "hub": str(each.hub),
                    "address": None if each.address is None else str(each.address),
                    "reason": each.reason,
                    "carried": _encode_carried(each.carried),
                }
                for each in report.hubs
            ],
            "members": [
                {
                    "peer": str(each.peer),
                    "connected": each.connected,
                    "carried": _encode_carried(each.carried),
                }
                for each in report.members
            ],
            "listening": report.listening,
            "reason": report.reason,
            "refused": report.refused,
            "file": report.file,
        }
    )


def decode_report(text: str) -> CarrierReport:
    """Read `encode_report`'s JSON. Raises ValueError, KeyError, TypeError."""
    document = json.loads(text)
    _require_version(document["version"])
    return CarrierReport(
        hubs=tuple(
            HubReport(
                PublicKey.parse(each["hub"]),
                None if each["address"] is None else Endpoint.parse(each["address"]),
                _text(each["reason"]),
                _decode_carried(each["carried"]),
            )
            for each in document["hubs"]
        ),
        members=tuple(
            MemberReport(
                PublicKey.parse(each["peer"]), bool(each["connected"]), _decode_carried(each["carried"])
            )
            for each in document["members"]
        ),
        listening=bool(document["listening"]),
        reason=_text(document["reason"]),
        refused=int(document["refused"]),
        file=_text(document["file"]),
    )


def _encode_carried(carried: Carried) -> dict[str, int]:
    return {
        "sentPackets": carried.sent_packets,
        "sentBytes": carried.sent_bytes,
        "receivedPackets": carried.received_packets,
        "receivedBytes": carried.received_bytes,
        "dropped": carried.dropped,
    }


def _decode_carried(document: dict[str, Any]) -> Carried:
    return Carried(
        sent_packets=int(document["sentPackets"]),
        sent_bytes=int(document["sentBytes"]),
        received_packets=int(document["receivedPackets"]),
        received_bytes=int(document["receivedBytes"]),
        dropped=int(document["dropped"]),
    )


def _decode_loopback(text: str) -> Endpoint:
    endpoint = Endpoint.parse(text)
    if not is_carried(endpoint):
        raise CarrierFileError(f"{endpoint} is outside of {LOOPBACKS}")
    return endpoint


def _port(value: object) -> int:
    port = int(str(value))
    if not 1 <= port <= 65535:
        raise CarrierFileError(f"a port is 1 to 65535, not {port}")
    return port


def _pin(text: str) -> bytes:
    pin = bytes.fromhex(text)
    if len(pin) != PIN_BYTES:
        raise CarrierFileError(f"a pin is {PIN_BYTES} bytes, not {len(pin)}")
    return pin


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise CarrierFileError(f"a {type(value).__name__} where text is expected")
    return value
