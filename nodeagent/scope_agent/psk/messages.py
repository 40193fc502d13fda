"""What two agents say to each other about their pre-shared key: values to bytes and back.

All numbers are big endian. The first byte is the type:

     1 Who        nothing: send me your Identity
     2 Identity   Ed448 57, ML-DSA 1952; a CA's signatures 3423, or nothing
     3 Wanted     the epoch that I use u64, its id 32 (zeros: none)
     4 Offer      header, KEM key, DH key; signatures 3423
     5 Answer     header, SHA3-512 of the Offer's body 64, KEM ciphertext, DH key; MAC 32, signatures 3423
     6 Control    what u8, epoch u64, id 32, MAC 32
     7 Refusal    reason u8, highest epoch u64
     8 Whence     a fingerprint 32: how does your identity follow from this one?
     9 Succeeded  the old keys, as in Identity, the new fingerprint 32, signatures of the old ones 3423

    header        suite u8, mesh uid (length u8, UTF-8), fingerprint of the decapsulator 32, of the
                  encapsulator 32, their WireGuard keys 32 each, epoch u64, id of the base epoch 32
                  (zeros: none), nonce 32

    suite         1: ML-KEM-1024 (key 1568, ciphertext 1568) and X448 (56);
                  2: ML-KEM-768 (key 1184, ciphertext 1088) and X25519 (32)

Of an Offer of another suite only the header can be read. The *body* of an Offer or Answer is all before its
MAC and signatures: what is hashed and signed. Nothing may follow the last field: two readings of one message
would be two transcripts.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, assert_never

from scope.model import KEY_BYTES, Fingerprint, PublicKey
from scope.wire import Reader, WireError, encode_uid
from scope_agent.psk.identity import PublicIdentity, Succession
from scope_agent.psk.provider import (
    ED448_BYTES,
    ED448_SIGNATURE_BYTES,
    MLDSA_PUBLIC_BYTES,
    MLDSA_SIGNATURE_BYTES,
    SUITES,
)

ID_BYTES = MAC_BYTES = NONCE_BYTES = 32
HASH_BYTES = 64
SIGNATURES_BYTES = ED448_SIGNATURE_BYTES + MLDSA_SIGNATURE_BYTES
NO_ID = bytes(ID_BYTES)
EPOCH_BYTES = 8

_Number = TypeVar("_Number", bound=enum.IntEnum)


class What(enum.IntEnum):
    """What is said about one epoch, by D, the decapsulator, or E, the encapsulator. Numbers stay."""

    COMMIT = 1  # D: I hold it on disk; do so, too
    READY = 2  # E: I do
    ACTIVATE = 3  # D: give it to your device now
    ACTIVE = 4  # E: my device has it
    ABORT = 5  # D: take it out of your device, unless a handshake has proved it
    REVERTED = 6  # E: I took it out of my device: no handshake proved it in time
    CONFIRM = 7  # either: a handshake proved it, and nothing else is used any more
    CONFIRMED = 8  # either: so it is with me, in answer to CONFIRM


class RefusedFor(enum.IntEnum):
    """Why an Offer gets no Answer. Numbers are never used again for another reason."""

    EPOCH = 1  # it is not above the highest one that I know, which stands beside
    BASE = 2  # I do not hold the epoch that it builds on
    SUITE = 3  # my policy knows no such suite
    OFF = 4  # my mesh asks for no post-quantum keys
    IDENTITY = 5  # the fingerprints are not those that I expect


@dataclass(frozen=True, slots=True)
class Who:
    """Send me your Identity."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The sender's public keys, and what a CA signed of them: all of SIGNATURES_BYTES, or nothing."""

    keys: PublicIdentity
    certificate: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The encapsulator asks for an Offer, and says what it uses now."""

    epoch: int
    id: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What both messages of one exchange say alike."""

    suite: int
    mesh_uid: str
    fingerprint_d: Fingerprint
    fingerprint_e: Fingerprint
    key_d: PublicKey
    key_e: PublicKey
    epoch: int
    base: bytes  # id of the epoch whose chain value is mixed in
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """The decapsulator's part."""

    header: Header
    kem_public: bytes = field(repr=False)
    dh_public: bytes = field(repr=False)
    signatures: bytes = field(repr=False)

    def body(self) -> bytes:
        """What is hashed and signed."""
        return bytes((_Type.OFFER,)) + _encode_header(self.header) + self.kem_public + self.dh_public


@dataclass(frozen=True, slots=True)
class StrangeOffer:
    """An Offer of a suite that this release does not know."""

    header: Header
    rest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """The encapsulator's part."""

    header: Header
    offer_hash: bytes
    ciphertext: bytes = field(repr=False)
    dh_public: bytes = field(repr=False)
    mac: bytes = field(repr=False)
    signatures: bytes = field(repr=False)

    def body(self) -> bytes:
        """What is hashed and signed."""
        header = bytes((_Type.ANSWER,)) + _encode_header(self.header)
        return header + self.offer_hash + self.ciphertext + self.dh_public


@dataclass(frozen=True, slots=True)
class Control:
    """A word about one epoch, under a key that only its two holders have."""

    what: What
    epoch: int
    id: bytes
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """No Answer to the last Offer."""

    reason: RefusedFor
    epoch: int  # the highest that the sender knows


@dataclass(frozen=True, slots=True)
class Whence:
    """Tell how your identity follows from this one, which I know as yours."""

    known: Fingerprint


@dataclass(frozen=True, slots=True)
class Succeeded:
    """My identity followed another one."""

    succession: Succession


PskMessage: TypeAlias = (
    Who | Identity | Wanted | Offer | StrangeOffer | Answer | Control | Refusal | Whence | Succeeded
)


class _Type(enum.IntEnum):
    WHO = 1
    IDENTITY = 2
    WANTED = 3
    OFFER = 4
    ANSWER = 5
    CONTROL = 6
    REFUSAL = 7
    WHENCE = 8
    SUCCEEDED = 9


def encode(message: PskMessage) -> bytes:
    """A message as bytes."""
    match message:
        case Who():
            return bytes((_Type.WHO,))
        case Identity(keys, certificate):
            return bytes((_Type.IDENTITY,)) + keys.ed448 + keys.mldsa + certificate
        case Wanted(epoch, id_):
            return bytes((_Type.WANTED,)) + _epoch(epoch) + id_
        case Offer():
            return message.body() + message.signatures
        case StrangeOffer(header, rest):
            return bytes((_Type.OFFER,)) + _encode_header(header) + rest
        case Answer():
            return message.body() + message.mac + message.signatures
        case Control(what, epoch, id_, mac):
            return bytes((_Type.CONTROL, what)) + _epoch(epoch) + id_ + mac
        case Refusal(reason, epoch):
            return bytes((_Type.REFUSAL, reason)) + _epoch(epoch)
        case Whence(known):
            return bytes((_Type.WHENCE,)) + known.raw
        case Succeeded(succession):
            old = succession.old.ed448 + succession.old.mldsa
            return bytes((_Type.SUCCEEDED,)) + old + succession.new.raw + succession.signatures
        case _:
            assert_never(message)


def decode(data: bytes) -> PskMessage:
    """The message in bytes. Raises WireError, and nothing else, for any bytes."""
    reader = _Reader(data)
    number = reader.u8()
    message: PskMessage
    match number:
        case _Type.WHO:
            message = Who()
        case _Type.IDENTITY:
            keys = reader.identity()
            message = Identity(keys, reader.take(SIGNATURES_BYTES) if reader.has_more else b"")
        case _Type.WANTED:
            message = Wanted(reader.epoch(), reader.take(ID_BYTES))
        case _Type.OFFER:
            message = reader.offer(reader.header())
        case _Type.ANSWER:
            message = reader.answer(reader.header())
        case _Type.CONTROL:
            what = _member(What, reader.u8())
            message = Control(what, reader.epoch(), reader.take(ID_BYTES), reader.take(MAC_BYTES))
        case _Type.REFUSAL:
            message = Refusal(_member(RefusedFor, reader.u8()), reader.epoch())
        case _Type.WHENCE:
            message = Whence(Fingerprint(reader.take(KEY_BYTES)))
        case _Type.SUCCEEDED:
            old, new = reader.identity(), Fingerprint(reader.take(KEY_BYTES))
            message = Succeeded(Succession(old, new, reader.take(SIGNATURES_BYTES)))
        case _:
            raise WireError(f"no such message about keys: {number}")
    reader.end()
    return message


def _member(of: type[_Number], number: int) -> _Number:
    try:
        return of(number)
    except ValueError:
        raise WireError(f"no such {of.__name__}: {number}") from None


def _epoch(epoch: int) -> bytes:
    return epoch.to_bytes(EPOCH_BYTES, "big")


def _encode_header(header: Header) -> bytes:
    return b"".join(
        (
            bytes((header.suite,)),
            encode_uid(header.mesh_uid),
            header.fingerprint_d.raw,
            header.fingerprint_e.raw,
            header.key_d.raw,
            header.key_e.raw,
            _epoch(header.epoch),
            header.base,
            header.nonce,
        )
    )


class _Reader(Reader):
    """Besides, what all messages about keys are made of."""

    __slots__ = ()

    def end(self) -> None:
        if self.has_more:
            raise WireError("bytes too many in a message about keys")

    def offer(self, header: Header) -> Offer | StrangeOffer:
        suite = SUITES.get(header.suite)
        if suite is None:
            return StrangeOffer(header, self.rest())
        return Offer(
            header,
            kem_public=self.take(suite.kem_public_bytes),
            dh_public=self.take(suite.dh_bytes),
            signatures=self.take(SIGNATURES_BYTES),
        )

    def answer(self, header: Header) -> Answer:
        suite = SUITES.get(header.suite)
        if suite is None:
            raise WireError(f"an answer of suite {header.suite}, of which we made no offer")
        return Answer(
            header,
            offer_hash=self.take(HASH_BYTES),
            ciphertext=self.take(suite.kem_ciphertext_bytes),
            dh_public=self.take(suite.dh_bytes),
            mac=self.take(MAC_BYTES),
            signatures=self.take(SIGNATURES_BYTES),
        )

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._offset)

    def epoch(self) -> int:
        return int.from_bytes(self.take(EPOCH_BYTES), "big")

    def identity(self) -> PublicIdentity:
        return PublicIdentity(self.take(ED448_BYTES), self.take(MLDSA_PUBLIC_BYTES))

    def header(self) -> Header:
        return Header(
            suite=self.u8(),
            mesh_uid=self.uid(),
            fingerprint_d=Fingerprint(self.take(KEY_BYTES)),
            fingerprint_e=Fingerprint(self.take(KEY_BYTES)),
            key_d=self.key(),
            key_e=self.key(),
            epoch=self.epoch(),
            base=self.take(ID_BYTES),
            nonce=self.take(NONCE_BYTES),
        )
