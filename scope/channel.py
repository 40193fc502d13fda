"""The sealed channel between holders of probe keys, without I/O, clock or randomness.

Both sides know each other's static X25519 keys from the registry; what they must still learn is who is
alive now, or yesterday's recorded datagrams could be played again. So each side derives *tickets* from its
boot id: a fresh 12 bytes for each correspondent, used in one association and never again. Two tickets, one
of each side, name an association: its keys come from the static secret and both tickets, its counters start
at zero, its replay window starts empty.

    A (restarted, offers ticket a)                     B (offers ticket b)
    INITIAL from a: ping                  -->          authentic, perhaps replayed: acts on nothing,
                                          <--          keeps nothing; COOKIE from b to a
    b answers a, so b is alive: association (a, b)
    SEALED from a to b: ping              -->          names b, which B never used: association (b, a)
                                          <--          SEALED from b to a: pong

A ticket is spent by the first authentic answer to it, so a datagram of an earlier boot, of an earlier
association, or from before a correspondent was removed and came back, can never be believed again. Two sides
that disagree (one restarted, datagrams crossed or were held back) agree again with the first cookie that
arrives. An association is replaced at once, with no overlap: what the other side sealed before belongs to a
boot that is gone, and probes are repeated anyway.

A cookie is the smallest datagram there is, a pure function of the datagram that earned it, and costs its
maker no memory. Everything kept is bounded by the number of correspondents; the key agreement of a
correspondent is worked out at its first datagram.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from scope.model import PublicKey, Secret
from scope.wire import (
    KEY_ID_BYTES,
    NO_TICKET,
    TICKET_BYTES,
    Datagram,
    DatagramType,
    Message,
    WireError,
    decode_message,
    encode_message,
    pack_header,
    unpack_datagram,
)

BOOT_ID_BYTES = 16
REPLAY_WINDOW = 1024  # counters: far more than a burst over several paths is reordered by; 128 bytes a window

_KEY_ID_LABEL = b"scope probe key id 1"
_TICKET_LABEL = b"scope probe ticket 1"
_LABELS = {
    DatagramType.INITIAL: b"scope probe initial 1",
    DatagramType.SEALED: b"scope probe sealed 1",
    DatagramType.COOKIE: b"scope probe cookie 1",
}


class NotACorrespondent(Exception):
    """The key is not one that this channel speaks with: unknown, removed, or no usable X25519 point."""


class Replayed(WireError):
    """An authentic datagram's counter or cookie that was used before, or one too old to tell."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message that `sender` sealed for us in this boot, never handed out before.

    Numbers that a sender counts from its start are comparable within one `origin` only.
    """

    sender: PublicKey
    message: Message
    origin: bytes = b""


@dataclass(frozen=True, slots=True)
class Hello:
    """A datagram of `sender`, perhaps replayed, that names no association of ours: act on nothing.

    Send `cookie`, which is no larger than the datagram was, back the way it came.
    """

    sender: PublicKey
    cookie: bytes


@dataclass(frozen=True, slots=True)
class Confirmed:
    """`sender` is alive and answered us with a cookie, which acts on nothing that was sent to it before.

    Comes once for an association: send again, now sealed, what you want it to have, on every way you want
    tried.
    """

    sender: PublicKey


Opened: TypeAlias = Received | Hello | Confirmed


class Channel:
    """Seals messages for correspondents, and opens what they seal for us.

    `secret` is the raw 32-byte X25519 private key. `boot_id` is 16 random bytes, fresh for every Channel:
    the safety of all counters rests on it.
    """

    def __init__(self, *, secret: Secret, boot_id: bytes) -> None:
        if len(boot_id) != BOOT_ID_BYTES:
            raise ValueError(f"a boot id is {BOOT_ID_BYTES} bytes, not {len(boot_id)}")
        self._private = X25519PrivateKey.from_private_bytes(secret.raw)
        self._public = PublicKey(self._private.public_key().public_bytes_raw())
        self._key_id = key_id(self._public)
        self._boot_id = boot_id
        self._tickets = 0
        self._by_key: dict[PublicKey, _Correspondent] = {}
        self._by_id: dict[bytes, _Correspondent] = {}

    @property
    def public_key(self) -> PublicKey:
        """Our probe key, for the registry."""
        return self._public

    def set_correspondents(self, keys: frozenset[PublicKey]) -> None:
        """Speak with the holders of these keys and nobody else; those no longer named lose their state.

        Our own key is left out. Of two keys with one key id (nobody makes such a pair by chance) the one
        that was there first is kept.
        """
        for gone in self._by_key.keys() - keys:
            del self._by_id[self._by_key.pop(gone).key_id]
        for key in sorted(keys - self._by_key.keys() - {self._public}):
            correspondent = _Correspondent(key, key_id=key_id(key), offered=self._new_ticket())
            if self._by_id.setdefault(correspondent.key_id, correspondent) is correspondent:
                self._by_key[key] = correspondent

    def seal(self, to: PublicKey, message: Message) -> bytes:
        """A datagram for `to`: SEALED once it is confirmed, else INITIAL, whose message it will not act on.

        Raises NotACorrespondent, and ValueError for a message outside its bounds.
        """
        correspondent = self._by_key.get(to)
        if correspondent is None:
            raise NotACorrespondent(f"{to} is not a correspondent: name it in set_correspondents first")
        body = encode_message(message)
        try:
            shared = correspondent.agree(self._private)
        except WireError as error:
            raise NotACorrespondent(str(error)) from None
        association = correspondent.association
        if association is None:
            counter = correspondent.initials
            correspondent.initials += 1
            names = _Names(self._public, correspondent.key, correspondent.offered, NO_TICKET)
            key = _derive(shared, DatagramType.INITIAL, names)
            return self._pack(DatagramType.INITIAL, names, key, counter=counter, body=body)
        counter = association.sent
        association.sent += 1
        names = _Names(self._public, correspondent.key, association.ours, association.theirs)
        return self._pack(DatagramType.SEALED, names, association.outbound, counter=counter, body=body)

    def open(self, data: bytes) -> Opened:
        """What an arrived datagram means. Raises WireError, and nothing else, for any bytes."""
        datagram = unpack_datagram(data)
        correspondent = self._by_id.get(datagram.key_id)
        if correspondent is None:
            raise WireError("a datagram from the holder of a key that is no correspondent's")
        match datagram.type:
            case DatagramType.INITIAL:
                return self._open_initial(correspondent, datagram)
            case DatagramType.SEALED:
                return self._open_sealed(correspondent, datagram)
            case DatagramType.COOKIE:
                return self._open_cookie(correspondent, datagram)
            case _:
                assert_never(datagram.type)

    def is_confirmed(self, key: PublicKey) -> bool:
        """Whether what is sealed for `key` now is SEALED: it was alive in this boot of ours."""
        correspondent = self._by_key.get(key)
        return correspondent is not None and correspondent.association is not None

    def _open_initial(self, correspondent: _Correspondent, datagram: Datagram) -> Hello:
        self._decrypt(correspondent, datagram)
        return self._hello(correspondent, datagram)

    def _open_sealed(self, correspondent: _Correspondent, datagram: Datagram) -> Received | Hello:
        association = correspondent.association
        if association is not None and association.is_named_by(datagram):
            association.window.check(datagram.counter)
            body = _decrypt(association.inbound, datagram)
            association.window.add(datagram.counter)
            return Received(correspondent.key, decode_message(body), origin=association.theirs)
        body = self._decrypt(correspondent, datagram)
        if datagram.receiver != correspondent.offered:
            return self._hello(correspondent, datagram)
        self._associate(correspondent, theirs=datagram.sender).window.add(datagram.counter)
        return Received(correspondent.key, decode_message(body), origin=datagram.sender)

    def _open_cookie(self, correspondent: _Correspondent, datagram: Datagram) -> Confirmed:
        association = correspondent.association
        if association is not None and association.is_named_by(datagram):
            raise Replayed("a cookie for the association that stands already")
        if datagram.receiver != correspondent.offered and (
            association is None or datagram.receiver != association.ours
        ):
            raise Replayed("a cookie that answers a ticket which is spent, or never was ours")
        self._decrypt(correspondent, datagram)
        # A cookie for the ticket in use says that the other side does not know the association: it restarted.
        # That ticket is spent, so the new association takes the offered one; our next datagram tells it.
        self._associate(correspondent, theirs=datagram.sender)
        return Confirmed(correspondent.key)

    def _hello(self, correspondent: _Correspondent, datagram: Datagram) -> Hello:
        """The cookie for an authentic datagram: from the ticket its sender is to name, to the one it named.

        Its key is used for this one empty body under this one header only, so the counter may stay zero.
        """
        association = correspondent.association
        ours = correspondent.offered
        # Who sends an INITIAL of the ticket in our association has only to complete it. Who sends a SEALED
        # datagram has bound its ticket to another one of ours, so both sides need fresh tickets.
        if (
            datagram.type is DatagramType.INITIAL
            and association is not None
            and association.theirs == datagram.sender
        ):
            ours = association.ours
        names = _Names(self._public, correspondent.key, ours, datagram.sender)
        key = _derive(correspondent.agree(self._private), DatagramType.COOKIE, names)
        cookie = self._pack(DatagramType.COOKIE, names, key, counter=0, body=b"")
        return Hello(correspondent.key, cookie)

    def _associate(self, correspondent: _Correspondent, *, theirs: bytes) -> _Association:
        """Spend the offered ticket on an association with `theirs`, in place of the one that was."""
        shared = correspondent.agree(self._private)
        ours = correspondent.offered
        association = _Association(
            ours=ours,
            theirs=theirs,
            outbound=_derive(
                shared, DatagramType.SEALED, _Names(self._public, correspondent.key, ours, theirs)
            ),
            inbound=_derive(
                shared, DatagramType.SEALED, _Names(correspondent.key, self._public, theirs, ours)
            ),
        )
        correspondent.association = association
        correspondent.offered = self._new_ticket()
        correspondent.initials = 0
        return association

    def _new_ticket(self) -> bytes:
        self._tickets += 1
        number = self._tickets.to_bytes(8, "big")
        return hashlib.sha256(_TICKET_LABEL + self._boot_id + number).digest()[:TICKET_BYTES]

    def _decrypt(self, correspondent: _Correspondent, datagram: Datagram) -> bytes:
        """Open a datagram by the tickets it names itself, whether we ever knew them or not."""
        names = _Names(correspondent.key, self._public, datagram.sender, datagram.receiver)
        return _decrypt(_derive(correspondent.agree(self._private), datagram.type, names), datagram)

    def _pack(self, type_: DatagramType, names: _Names, key: Secret, *, counter: int, body: bytes) -> bytes:
        header = pack_header(
            type_,
            body_bytes=len(body),
            key_id=self._key_id,
            sender=names.sender_ticket,
            receiver=names.receiver_ticket,
            counter=counter,
        )
        return header + ChaCha20Poly1305(key.raw).encrypt(_nonce(counter), body, header)


def key_id(key: PublicKey) -> bytes:
    """What a datagram calls its sender: 8 bytes that name it only to those who know the key."""
    return hashlib.sha256(_KEY_ID_LABEL + key.raw).digest()[:KEY_ID_BYTES]


@dataclass(frozen=True, slots=True)
class _Names:
    """What a key is bound to. Sender before receiver: each direction has a key of its own."""

    sender: PublicKey
    receiver: PublicKey
    sender_ticket: bytes
    receiver_ticket: bytes


class _Window:
    """Which counters of one sender were used, over the last REPLAY_WINDOW of them."""

    __slots__ = ("_highest", "_used")

    def __init__(self) -> None:
        self._highest = 0
        self._used = 0  # bit i is set: counter `_highest - i` was used

    def check(self, counter: int) -> None:
        """Raises Replayed when `counter` was used, or is too old to tell."""
        age = self._highest - counter
        if age >= REPLAY_WINDOW or (age >= 0 and self._used >> age & 1):
            raise Replayed(f"counter {counter} was used before, or lies {REPLAY_WINDOW} or more back")

    def add(self, counter: int) -> None:
        """Mark `counter`, which `check` let pass, as used."""
        ahead = counter - self._highest
        if ahead <= 0:
            self._used |= 1 << -ahead
            return
        kept = self._used << ahead if ahead < REPLAY_WINDOW else 0
        self._used = (kept | 1) & (1 << REPLAY_WINDOW) - 1
        self._highest = counter


@dataclass(slots=True, repr=False)
class _Association:
    """One ticket of each side, with the keys and counters that belong to the two.

    Keys, not ciphers: a ready cipher saves 3 µs a datagram and holds 2 KiB, for each of thousands of peers.
    """

    ours: bytes
    theirs: bytes
    outbound: Secret
    inbound: Secret
    window: _Window = field(default_factory=_Window)
    sent: int = 0

    def is_named_by(self, datagram: Datagram) -> bool:
        return datagram.sender == self.theirs and datagram.receiver == self.ours


@dataclass(slots=True, repr=False)
class _Correspondent:
    """Everything kept about one holder of a probe key."""

    key: PublicKey
    key_id: bytes
    offered: bytes  # our next ticket: in our INITIALs and cookies, spent by the first authentic answer
    association: _Association | None = None
    initials: int = 0  # INITIAL datagrams sealed under the offered ticket
    shared: Secret | None = None  # worked out at the first datagram

    def agree(self, private: X25519PrivateKey) -> bytes:
        """The static secret of both probe keys. Raises WireError for a low-order point: it hides nothing."""
        if self.shared is None:
            try:
                self.shared = Secret(private.exchange(X25519PublicKey.from_public_bytes(self.key.raw)))
            except ValueError:
                raise WireError(f"{self.key} is no probe key but a low-order point: enrol it anew") from None
        return self.shared.raw


def _derive(shared: bytes, type_: DatagramType, names: _Names) -> Secret:
    info = b"".join(
        (
            _LABELS[type_],  # no label is the start of another, and all that follows has one length
            names.sender.raw,
            names.receiver.raw,
            names.sender_ticket,
            names.receiver_ticket,
        )
    )
    return Secret(HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(shared))


def _decrypt(key: Secret, datagram: Datagram) -> bytes:
    try:
        return ChaCha20Poly1305(key.raw).decrypt(_nonce(datagram.counter), datagram.sealed, datagram.header)
    except InvalidTag:
        raise WireError("a datagram that its claimed sender did not seal for us") from None


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")
