"""Datagrams of the probe protocol: bytes to messages and back.

All numbers are big endian. A datagram is a header of 48 bytes, readable by all and authenticated, then the
sealed body and its tag of 16 bytes (`scope.channel` seals and opens them):

    offset  bytes
         0      4  magic "SCop"
         4      1  version, 1
         5      1  type: 1 INITIAL, 2 SEALED, 3 COOKIE
         6      2  length of the whole datagram
         8      8  key id of the sender: start of a hash of its probe key
        16     12  ticket of the sender
        28     12  ticket of the receiver; zero in INITIAL
        40      8  counter
        48      n  body: empty in COOKIE, one message else
      48+n     16  tag

The magic, version, type and length stay where they are in every version. Read as little-endian number the
magic is none of WireGuard's types 1 to 4, and its first two bits are not those of STUN. The magic "SCok" is
a knock's (`scope.relay`), "SCoh" is kept for datagrams that end at a hub.

A message is one byte of type and then:

    1 Ping         transaction u32, has_session u8, received u64, guessed u8, 17 bytes of zeros
    2 Pong         transaction u32, has_session u8, received u64, observed endpoint
    3 Nominate     sequence u32, there endpoint, here endpoint
    4 Nominated    sequence u32
    5 CallMeMaybe  count u8, then for each candidate: kind u8, endpoint;
                   count u8, then that many opened endpoints (earlier releases: nothing)
    6 Forward      to 32 bytes, length u16, datagram
    7 Forwarded    sender 32 bytes, length u16, datagram
    8 Removed      mesh uid, peer uid (each: length u8, UTF-8), key 32, signer 32, signature 64
    9 AskRelay     peer 32, 15 bytes of zeros
   10 Granted      peer 32, token 8, port u16, lifetime u32, user space u8
   11 Refused      peer 32, reason u8
   12 Attach       count u8, then for each attachment: edge 32, hub 32, epoch u64, signature 64
   13 Attached     count u8, then that many attachments
   14 Guess        attempt u32, at endpoint, here endpoint
   15 Guessing     attempt u32, answer u8
   16 KeyPart      number u32, index u8, count u8, length u16, data

    endpoint       address 16 bytes (IPv4 as ::ffff:a.b.c.d), port u16: 18 bytes

Bytes after the last field are ignored, so that a later release may append fields; everything else is
strict. The zeros of a Ping and of an AskRelay make them as long as the longest answer.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias, assert_never

from scope.model import KEY_BYTES, Attachment, Candidate, CandidateKind, Endpoint, PublicKey, Tombstone

MAGIC = b"SCop"
VERSION = 1
MAX_CANDIDATES = 16  # what one call-me-maybe carries: host, reflexive and static of two families, with room
MAX_DATAGRAM = 1232  # IPv6's minimum MTU of 1280 less IPv6 and UDP headers: never fragmented by us
KEY_ID_BYTES = 8
TICKET_BYTES = 12  # 2**32 associations of one pair repeat a ticket with a chance of 2**-33
TAG_BYTES = 16
SIGNATURE_BYTES = 64
TOKEN_BYTES = 8  # of a relay's grant: what a rule of the hub's kernel can look up
MAX_ATTACHMENTS = 8  # of 136 bytes each: what one datagram holds
MAX_KEY_PART = 1100  # bytes: its datagram stays below MAX_DATAGRAM
MAX_KEY_PARTS = 8  # of one message; the longest takes five
MAX_UID_BYTES = 63  # a UUID takes 36; 63 is what a Kubernetes label value may hold
NO_TICKET = bytes(TICKET_BYTES)

_HEADER = struct.Struct(f">4sBBH{KEY_ID_BYTES}s{TICKET_BYTES}s{TICKET_BYTES}sQ")
HEADER_BYTES = _HEADER.size
MIN_DATAGRAM = HEADER_BYTES + TAG_BYTES
MAX_BODY = MAX_DATAGRAM - MIN_DATAGRAM
_FORWARD = struct.Struct(f">{KEY_BYTES}sH")
MAX_FORWARDED = MAX_BODY - 1 - _FORWARD.size  # the longest datagram that fits in a Forward


class WireError(Exception):
    """A datagram that is not ours, is damaged, or breaks a bound: drop and count it."""


class UnknownVersion(WireError):
    """A datagram of a version that this release does not speak: one side is to be upgraded."""


class UnknownMessage(WireError):
    """An authentic message of a type that this release does not know: its sender is newer."""


@dataclass(frozen=True, slots=True)
class Ping:
    """The question "do you hear me?", padded so that no answer is larger."""

    transaction: int  # u32, chosen by the asker
    has_session: bool  # the asker's WireGuard holds a live session with the receiver
    received: int  # u64, bytes that the asker's WireGuard has received from the receiver
    guessed: bool = False  # it leaves by a port of the asker's symmetric NAT that the receiver has guessed


@dataclass(frozen=True, slots=True)
class Pong:
    """The echo of one ping, with the endpoint that the ping was seen from."""

    transaction: int
    observed: Endpoint
    has_session: bool
    received: int  # u64, bytes that the answerer's WireGuard has received from the asker


@dataclass(frozen=True, slots=True)
class Nominate:
    """The lower key's choice of path: it sends to `there`; the receiver is to send to `here`."""

    sequence: int  # u32, rises with each nomination of the pair in one boot of the nominator
    there: Endpoint  # the receiver's endpoint
    here: Endpoint  # the nominator's endpoint, as the receiver saw it in a ping over this path


@dataclass(frozen=True, slots=True)
class Nominated:
    """The receiver follows nomination `sequence`."""

    sequence: int


@dataclass(frozen=True, slots=True)
class CallMeMaybe:
    """The call "punch towards me now", with at most MAX_CANDIDATES candidates of the sender.

    `opened` are endpoints of the receiver, at most MAX_CANDIDATES: the sender has just sent towards them, so
    that its NAT lets in what comes from there.
    """

    candidates: tuple[Candidate, ...]
    opened: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Forward:
    """Ask a peer or reflector to pass a sealed datagram, unread, to the holder of probe key `to`."""

    to: PublicKey
    datagram: bytes  # at most MAX_FORWARDED bytes, a datagram of this protocol


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A datagram that the holder of probe key `sender` asked to pass on."""

    sender: PublicKey
    datagram: bytes


@dataclass(frozen=True, slots=True)
class Removed:
    """A tombstone, passed on from peer to peer. Its signature is still to be verified."""

    tombstone: Tombstone


@dataclass(frozen=True, slots=True)
class AskRelay:
    """Ask a hub to relay between the asker and the peer with WireGuard key `peer`, or to go on doing so."""

    peer: PublicKey


@dataclass(frozen=True, slots=True)
class Granted:
    """A hub relays between the receiver and `peer`; said in answer, and unasked to the other side.

    The receiver knocks with `token` at `port` of the hub, and reaches the peer there from then on.
    """

    peer: PublicKey  # the WireGuard key of the other side
    token: bytes  # TOKEN_BYTES, the receiver's own
    port: int  # 1 to 65535, another one for each peer of the receiver
    lifetime: int  # u32, seconds from now
    user_space: bool  # the hub's kernel does not forward: a process does


class RefusedBecause(enum.IntEnum):
    """Why a hub does not relay. Numbers are never used again for another reason."""

    NO_HUB = 1  # it is not asked to be one, or not any more
    UNKNOWN_PEER = 2  # no member of the mesh that the hub knows
    NO_PORT_LEFT = 3  # the asker or the peer has a grant at every port of the range
    NO_FORWARDING = 4  # neither its kernel nor its forwarder can


@dataclass(frozen=True, slots=True)
class Refused:
    """A hub does not relay between the receiver and `peer`."""

    peer: PublicKey
    reason: RefusedBecause


@dataclass(frozen=True, slots=True)
class Attach:
    """Tell a hub where edges are attached, MAX_ATTACHMENTS at most. Signatures are still to be verified."""

    attachments: tuple[Attachment, ...]


@dataclass(frozen=True, slots=True)
class Attached:
    """What a hub holds now of the edges that it was told of; those that it does not know are left out."""

    attachments: tuple[Attachment, ...]


@dataclass(frozen=True, slots=True)
class Guess:
    """Ask a peer to ping ports of the sender's public address until one of them leads to the sender.

    Many ports of the sender send to the receiver's endpoint `at`, so that its symmetric NAT lets the
    receiver in at as many ports, which nobody knows.
    """

    attempt: int  # u32, another one for each try of one boot
    at: Endpoint  # the receiver's, as it publishes it
    here: Endpoint  # the sender's, as it publishes it: the port says nothing


class Guesses(enum.IntEnum):
    """Whether a peer guesses ports, or why not. Numbers are never used again for another answer."""

    YES = 0
    OFF = 1  # the mesh, as far as the peer knows, does not allow it
    BUSY = 2  # it does so for another peer now
    TOO_OFTEN = 3  # it did so lately, or for many
    ELSEWHERE = 4  # it knows other endpoints of itself or of the asker: one side's news are late


@dataclass(frozen=True, slots=True)
class Guessing:
    """The answer to Guess `attempt`."""

    attempt: int  # u32
    answer: Guesses


@dataclass(frozen=True, slots=True)
class KeyPart:
    """A part of a message about the pair's pre-shared key; what it says is the `psk` room's own business."""

    number: int  # u32, of the message
    index: int  # below `count`
    count: int  # 1 to MAX_KEY_PARTS
    data: bytes = field(repr=False)  # 1 to MAX_KEY_PART bytes


Message: TypeAlias = (
    Ping
    | Pong
    | Nominate
    | Nominated
    | CallMeMaybe
    | Forward
    | Forwarded
    | Removed
    | AskRelay
    | Granted
    | Refused
    | Attach
    | Attached
    | Guess
    | Guessing
    | KeyPart
)


class _Type(enum.IntEnum):
    """The first byte of a message. Numbers are never used again for another message."""

    PING = 1
    PONG = 2
    NOMINATE = 3
    NOMINATED = 4
    CALL_ME_MAYBE = 5
    FORWARD = 6
    FORWARDED = 7
    REMOVED = 8
    ASK_RELAY = 9
    GRANTED = 10
    REFUSED = 11
    ATTACH = 12
    ATTACHED = 13
    GUESS = 14
    GUESSING = 15
    KEY_PART = 16


class DatagramType(enum.IntEnum):
    """How a datagram is sealed, and what may be believed of it."""

    INITIAL = 1
    SEALED = 2
    COOKIE = 3


@dataclass(frozen=True, slots=True)
class Datagram:
    """The parts of a datagram, the body still sealed. The header bytes are authenticated with it."""

    type: DatagramType
    key_id: bytes
    sender: bytes  # the sender's ticket
    receiver: bytes  # the receiver's ticket
    counter: int
    header: bytes
    sealed: bytes


# --- datagrams ----------------------------------------------------------------------------------------------


def pack_header(
    type_: DatagramType, *, body_bytes: int, key_id: bytes, sender: bytes, receiver: bytes, counter: int
) -> bytes:
    """The header of a datagram whose body, before sealing, has `body_bytes` bytes (at most MAX_BODY)."""
    if not 0 <= body_bytes <= MAX_BODY:
        raise ValueError(f"a body is at most {MAX_BODY} bytes, not {body_bytes}")
    return _HEADER.pack(MAGIC, VERSION, type_, MIN_DATAGRAM + body_bytes, key_id, sender, receiver, counter)


def unpack_datagram(data: bytes) -> Datagram:
    """Take a datagram apart. Raises WireError (UnknownVersion for another release's)."""
    if not is_datagram(data):
        raise WireError("not a datagram of the probe protocol: its magic or its length is wrong")
    _, version, number, _, key_id, sender, receiver, counter = _HEADER.unpack_from(data)
    if version != VERSION:
        raise UnknownVersion(f"a datagram of version {version}, where this side speaks version {VERSION}")
    if number not in _DATAGRAM_TYPES:
        raise WireError(f"no such datagram type: {number}")
    return Datagram(
        type=DatagramType(number),
        key_id=key_id,
        sender=sender,
        receiver=receiver,
        counter=counter,
        header=data[:HEADER_BYTES],
        sealed=data[HEADER_BYTES:],
    )


def is_datagram(data: bytes) -> bool:
    """Whether `data` has the magic, and the length it claims, of this protocol in any version."""
    return (
        MIN_DATAGRAM <= len(data) <= MAX_DATAGRAM
        and data[:4] == MAGIC
        and int.from_bytes(data[6:8], "big") == len(data)
    )


# --- messages -----------------------------------------------------------------------------------------------


def encode_message(message: Message) -> bytes:
    """The body of a datagram, at most MAX_BODY bytes. Raises ValueError for a value outside its bounds."""
    match message:
        case Ping():
            _require_u32(message.transaction, "transaction")
            _require_u64(message.received, "received")
            return _PING.pack(
                _Type.PING, message.transaction, message.has_session, message.received, message.guessed
            )
        case Pong():
            _require_u32(message.transaction, "transaction")
            _require_u64(message.received, "received")
            fixed = _PONG.pack(_Type.PONG, message.transaction, message.has_session, message.received)
            return fixed + _encode_endpoint(message.observed)
        case Nominate():
            _require_u32(message.sequence, "sequence")
            fixed = _SEQUENCE.pack(_Type.NOMINATE, message.sequence)
            return fixed + _encode_endpoint(message.there) + _encode_endpoint(message.here)
        case Nominated():
            _require_u32(message.sequence, "sequence")
            return _SEQUENCE.pack(_Type.NOMINATED, message.sequence)
        case CallMeMaybe():
            if len(message.candidates) > MAX_CANDIDATES:
                raise ValueError(f"at most {MAX_CANDIDATES} candidates, not {len(message.candidates)}")
            if len(message.opened) > MAX_CANDIDATES:
                raise ValueError(f"at most {MAX_CANDIDATES} opened endpoints, not {len(message.opened)}")
            listed = b"".join(map(_encode_candidate, message.candidates))
            body = bytes((_Type.CALL_ME_MAYBE, len(message.candidates))) + listed
            return body + bytes((len(message.opened),)) + b"".join(map(_encode_endpoint, message.opened))
        case Forward():
            return _encode_forward(_Type.FORWARD, message.to, message.datagram)
        case Forwarded():
            return _encode_forward(_Type.FORWARDED, message.sender, message.datagram)
        case Removed():
            return bytes((_Type.REMOVED,)) + _encode_tombstone(message.tombstone)
        case AskRelay():
            return _ASK_RELAY.pack(_Type.ASK_RELAY, message.peer.raw)
        case Granted():
            if len(message.token) != TOKEN_BYTES:
                raise ValueError(f"a token is {TOKEN_BYTES} bytes, not {len(message.token)}")
            if not 1 <= message.port <= 65535:
                raise ValueError(f"a port is 1 to 65535, not {message.port}")
            _require_u32(message.lifetime, "lifetime")
            return _GRANTED.pack(
                _Type.GRANTED,
                message.peer.raw,
                message.token,
                message.port,
                message.lifetime,
                message.user_space,
            )
        case Refused():
            return _REFUSED.pack(_Type.REFUSED, message.peer.raw, message.reason)
        case Attach():
            return _encode_attachments(_Type.ATTACH, message.attachments)
        case Attached():
            return _encode_attachments(_Type.ATTACHED, message.attachments)
        case Guess():
            _require_u32(message.attempt, "attempt")
            fixed = _SEQUENCE.pack(_Type.GUESS, message.attempt)
            return fixed + _encode_endpoint(message.at) + _encode_endpoint(message.here)
        case Guessing():
            _require_u32(message.attempt, "attempt")
            return _GUESSING.pack(_Type.GUESSING, message.attempt, message.answer)
        case KeyPart(number, index, count, data):
            _require_u32(number, "number")
            if not 1 <= count <= MAX_KEY_PARTS or not 0 <= index < count:
                raise ValueError(f"no part {index} of {count}: {MAX_KEY_PARTS} are the most")
            if not 1 <= len(data) <= MAX_KEY_PART:
                raise ValueError(f"a part is 1 to {MAX_KEY_PART} bytes, not {len(data)}")
            return _KEY_PART.pack(_Type.KEY_PART, number, index, count, len(data)) + data
        case _:
            assert_never(message)


def decode_message(body: bytes) -> Message:
    """The message in an opened body. Raises WireError (UnknownMessage for a type of a later release)."""
    reader = Reader(body)
    number = reader.u8()
    match number:
        case _Type.PING:
            transaction, has_session, received = reader.u32(), reader.flag(), reader.u64()
            guessed = reader.flag()
            reader.take(_PING_ZEROS)
            return Ping(transaction=transaction, has_session=has_session, received=received, guessed=guessed)
        case _Type.PONG:
            transaction, has_session, received = reader.u32(), reader.flag(), reader.u64()
            observed = reader.endpoint()
            return Pong(
                transaction=transaction, observed=observed, has_session=has_session, received=received
            )
        case _Type.NOMINATE:
            return Nominate(sequence=reader.u32(), there=reader.endpoint(), here=reader.endpoint())
        case _Type.NOMINATED:
            return Nominated(sequence=reader.u32())
        case _Type.CALL_ME_MAYBE:
            count = reader.u8()
            if count > MAX_CANDIDATES:
                raise WireError(f"a call-me-maybe with {count} candidates; {MAX_CANDIDATES} are allowed")
            candidates = tuple(reader.candidate() for _ in range(count))
            count = reader.u8() if reader.has_more else 0
            if count > MAX_CANDIDATES:
                raise WireError(f"{count} opened endpoints in a call-me-maybe; {MAX_CANDIDATES} are allowed")
            return CallMeMaybe(candidates, opened=tuple(reader.endpoint() for _ in range(count)))
        case _Type.FORWARD:
            return Forward(to=reader.key(), datagram=reader.datagram())
        case _Type.FORWARDED:
            return Forwarded(sender=reader.key(), datagram=reader.datagram())
        case _Type.REMOVED:
            return Removed(
                tombstone=Tombstone(
                    mesh_uid=reader.uid(),
                    peer_uid=reader.uid(),
                    key=reader.key(),
                    signer=reader.key(),
                    signature=reader.take(SIGNATURE_BYTES),
                )
            )
        case _Type.ASK_RELAY:
            peer = reader.key()
            reader.take(_ASK_RELAY_ZEROS)
            return AskRelay(peer)
        case _Type.GRANTED:
            return Granted(
                reader.key(),
                token=reader.take(TOKEN_BYTES),
                port=reader.port(),
                lifetime=reader.u32(),
                user_space=reader.flag(),
            )
        case _Type.REFUSED:
            return Refused(reader.key(), _reason(reader.u8()))
        case _Type.ATTACH:
            return Attach(reader.attachments())
        case _Type.ATTACHED:
            return Attached(reader.attachments())
        case _Type.GUESS:
            return Guess(reader.u32(), at=reader.endpoint(), here=reader.endpoint())
        case _Type.GUESSING:
            return Guessing(reader.u32(), _guesses(reader.u8()))
        case _Type.KEY_PART:
            transfer, index, count = reader.u32(), reader.u8(), reader.u8()
            length = reader.u16()
            if not 1 <= count <= MAX_KEY_PARTS or index >= count or not 1 <= length <= MAX_KEY_PART:
                raise WireError(f"part {index} of {count} with {length} bytes is out of bounds")
            return KeyPart(transfer, index, count, reader.take(length))
        case _:
            raise UnknownMessage(f"no such message type: {number}; its sender may run a later release")


_DATAGRAM_TYPES = frozenset(int(member) for member in DatagramType)
_ENDPOINT = struct.Struct(">16sH")
_PING_ZEROS = _ENDPOINT.size - 1
_PING = struct.Struct(f">BI?Q?{_PING_ZEROS}x")
_PONG = struct.Struct(">BI?Q")
_SEQUENCE = struct.Struct(">BI")
_GRANTED = struct.Struct(f">B{KEY_BYTES}s{TOKEN_BYTES}sHI?")
_ASK_RELAY_ZEROS = _GRANTED.size - 1 - KEY_BYTES
_ASK_RELAY = struct.Struct(f">B{KEY_BYTES}s{_ASK_RELAY_ZEROS}x")
_REFUSED = struct.Struct(f">B{KEY_BYTES}sB")
_ATTACHMENT = struct.Struct(f">{KEY_BYTES}s{KEY_BYTES}sQ{SIGNATURE_BYTES}s")
_GUESSING = struct.Struct(">BIB")
_KEY_PART = struct.Struct(">BIBBH")
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, section 2.5.5.2

_KIND_NUMBERS = {
    CandidateKind.HOST: 1,
    CandidateKind.REFLEXIVE: 2,
    CandidateKind.OBSERVED: 3,
    CandidateKind.STATIC: 4,
    CandidateKind.MAPPED: 5,
    CandidateKind.RELAY: 6,
}
_KINDS = {number: kind for kind, number in _KIND_NUMBERS.items()}


def _reason(number: int) -> RefusedBecause:
    try:
        return RefusedBecause(number)
    except ValueError:
        raise WireError(f"no such reason to refuse a relay: {number}") from None


def _guesses(number: int) -> Guesses:
    try:
        return Guesses(number)
    except ValueError:
        raise WireError(f"no such answer to who asks to guess ports: {number}") from None


def _require_u32(value: int, name: str) -> None:
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} is a number below 2**32, not {value}")


def _require_u64(value: int, name: str) -> None:
    if not 0 <= value < 2**64:
        raise ValueError(f"{name} is a number below 2**64, not {value}")


def _encode_endpoint(endpoint: Endpoint) -> bytes:
    packed = endpoint.address.packed
    return _ENDPOINT.pack(packed if len(packed) == 16 else _MAPPED + packed, endpoint.port)


def _encode_candidate(candidate: Candidate) -> bytes:
    return bytes((_KIND_NUMBERS[candidate.kind],)) + _encode_endpoint(candidate.endpoint)


def _encode_forward(number: int, key: PublicKey, datagram: bytes) -> bytes:
    if len(datagram) > MAX_FORWARDED or not is_datagram(datagram):
        raise ValueError(f"forwarded is a datagram of the probe protocol, of at most {MAX_FORWARDED} bytes")
    return bytes((number,)) + _FORWARD.pack(key.raw, len(datagram)) + datagram


def _encode_tombstone(tombstone: Tombstone) -> bytes:
    if len(tombstone.signature) != SIGNATURE_BYTES:
        raise ValueError(f"a signature is {SIGNATURE_BYTES} bytes, not {len(tombstone.signature)}")
    return b"".join(
        (
            encode_uid(tombstone.mesh_uid),
            encode_uid(tombstone.peer_uid),
            tombstone.key.raw,
            tombstone.signer.raw,
            tombstone.signature,
        )
    )


def _encode_attachments(number: int, attachments: tuple[Attachment, ...]) -> bytes:
    if len(attachments) > MAX_ATTACHMENTS:
        raise ValueError(f"at most {MAX_ATTACHMENTS} attachments, not {len(attachments)}")
    return bytes((number, len(attachments))) + b"".join(map(_encode_attachment, attachments))


def _encode_attachment(attachment: Attachment) -> bytes:
    _require_u64(attachment.epoch, "epoch")
    if len(attachment.signature) != SIGNATURE_BYTES:
        raise ValueError(f"a signature is {SIGNATURE_BYTES} bytes, not {len(attachment.signature)}")
    return _ATTACHMENT.pack(attachment.edge.raw, attachment.hub.raw, attachment.epoch, attachment.signature)


def encode_uid(uid: str) -> bytes:
    """A UID behind its length, as `Reader.uid` takes it. Raises ValueError for one out of bounds."""
    raw = uid.encode()
    if not 1 <= len(raw) <= MAX_UID_BYTES:
        raise ValueError(f"a UID is 1 to {MAX_UID_BYTES} bytes of UTF-8, not {len(raw)}")
    return bytes((len(raw),)) + raw


class Reader:
    """Takes fields off the front of a body; what is missing or out of bounds raises WireError."""

    __slots__ = ("_data", "_offset")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def take(self, count: int) -> bytes:
        end = self._offset + count
        if end > len(self._data):
            raise WireError(f"a message ends at byte {len(self._data)}, inside a field that ends at {end}")
        field = self._data[self._offset : end]
        self._offset = end
        return field

    @property
    def has_more(self) -> bool:
        return self._offset < len(self._data)

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def flag(self) -> bool:
        value = self.u8()
        if value > 1:
            raise WireError(f"a flag is 0 or 1, not {value}")
        return value == 1

    def key(self) -> PublicKey:
        return PublicKey(self.take(KEY_BYTES))

    def port(self) -> int:
        port = int.from_bytes(self.take(2), "big")
        if port == 0:
            raise WireError("a port 0")
        return port

    def endpoint(self) -> Endpoint:
        address, port = _ENDPOINT.unpack(self.take(_ENDPOINT.size))
        if port == 0:
            raise WireError("an endpoint with port 0")
        if address.startswith(_MAPPED):
            return Endpoint(IPv4Address(address[len(_MAPPED) :]), port)
        return Endpoint(IPv6Address(address), port)

    def candidate(self) -> Candidate:
        number = self.u8()
        kind = _KINDS.get(number)
        if kind is None:
            raise WireError(f"no such kind of candidate: {number}")
        return Candidate(endpoint=self.endpoint(), kind=kind)

    def attachments(self) -> tuple[Attachment, ...]:
        count = self.u8()
        if count > MAX_ATTACHMENTS:
            raise WireError(f"{count} attachments in one message; {MAX_ATTACHMENTS} are allowed")
        return tuple(self._attachment() for _ in range(count))

    def _attachment(self) -> Attachment:
        edge, hub, epoch, signature = _ATTACHMENT.unpack(self.take(_ATTACHMENT.size))
        return Attachment(PublicKey(edge), PublicKey(hub), epoch, signature)

    def datagram(self) -> bytes:
        inner = self.take(int.from_bytes(self.take(2), "big"))
        if len(inner) > MAX_FORWARDED or not is_datagram(inner):
            raise WireError("what is to be forwarded is not a datagram of the probe protocol")
        return inner

    def uid(self) -> str:
        count = self.u8()
        if not 1 <= count <= MAX_UID_BYTES:
            raise WireError(f"a UID is 1 to {MAX_UID_BYTES} bytes, not {count}")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError:
            raise WireError("a UID is not UTF-8") from None
