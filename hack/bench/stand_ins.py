"""Many peers in one process: each answers an agent's probes and WireGuard handshakes on a port of its own.

    python -m bench.stand_ins ADDRESS COUNT AGENT_WIREGUARD_KEY AGENT_PROBE_KEY

A stand-in starts nothing and carries nothing, so that a thousand of them cost little; what the agent sees
is a peer with a direct path and a live session. Keys come from numbers, so that whoever writes the agent's
snapshot knows them too. The handshake is the responder's half of WireGuard's (whitepaper, section 5.4),
without pre-shared keys and cookies.
"""

from __future__ import annotations

import hashlib
import hmac
import resource
import secrets
import select
import socket
import struct
import sys
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from scope_agent.desired import Identity
from scope_agent.state import identity_of

from scope.channel import BOOT_ID_BYTES, Channel, Hello, Received
from scope.model import PublicKey, Secret, endpoint_at
from scope.wire import Message, Nominate, Nominated, Ping, Pong, WireError

FIRST_PORT = 30000
# WireGuard keys that begin so are left to agents: the lower key decides, and stand-ins decide nothing.
RESERVED = 0

_INITIATION, _RESPONSE = 148, 92
_CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
_IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
_MAC_LABEL = b"mac1----"
_DATAGRAM = 2048


def stand_in_identity(number: int) -> Identity:
    """The keys of one stand-in."""
    return _identity(f"stand-in {number}", reserved=False)


def agent_identity(number: int = 0) -> Identity:
    """Keys for an agent that decides for every pair with a stand-in."""
    return _identity(f"agent {number}", reserved=True)


def _identity(name: str, *, reserved: bool) -> Identity:
    attempt = 0
    while True:
        halves = [hashlib.sha256(f"{name} {part} {attempt}".encode()).digest() for part in range(3)]
        identity = identity_of(*(Secret(half) for half in halves))
        if (identity.public.wireguard.raw[0] == RESERVED) is reserved:
            return identity
        attempt += 1


@dataclass(slots=True)
class _StandIn:
    socket: socket.socket
    identity: Identity
    channel: Channel
    responder: _Responder
    received: int = 0  # bytes through WireGuard
    has_session: bool = False

    def take(self) -> None:
        """Read one datagram, and answer it."""
        data, (host, port, *_) = self.socket.recvfrom(_DATAGRAM)
        answer = self._answer(data, host, port)
        if answer is not None:
            self.socket.sendto(answer, (host, port))

    def _answer(self, data: bytes, host: str, port: int) -> bytes | None:
        if data[:4] == b"\1\0\0\0" and len(data) == _INITIATION:
            response = self.responder.respond(data)
            self.received += len(data)
            return response
        if data[:4] == b"\4\0\0\0":
            self.has_session = True
            self.received += len(data)
            return None
        try:
            opened = self.channel.open(data)
        except WireError:
            return None
        match opened:
            case Hello(_, cookie):
                return cookie
            case Received(sender, Ping(transaction)):
                seen = endpoint_at(host, port)
                return self._seal(sender, Pong(transaction, seen, self.has_session, self.received))
            case Received(sender, Nominate(sequence)):
                return self._seal(sender, Nominated(sequence))
            case _:
                return None

    def _seal(self, to: PublicKey, message: Message) -> bytes:
        return self.channel.seal(to, message)


class _Responder:
    """Answers handshake initiations of one known initiator."""

    def __init__(self, secret: Secret, initiator: PublicKey) -> None:
        self._private = X25519PrivateKey.from_private_bytes(secret.raw)
        self._initiator = initiator.raw
        self._static = self._private.exchange(X25519PublicKey.from_public_bytes(initiator.raw))
        public = self._private.public_key().public_bytes_raw()
        self._chain = _hash(_CONSTRUCTION)
        self._start = _hash(_hash(self._chain + _IDENTIFIER) + public)

    def respond(self, initiation: bytes) -> bytes | None:
        """The response; None for what is not the initiator's."""
        sender, ephemeral = initiation[4:8], initiation[8:40]
        sealed_static, sealed_time = initiation[40:88], initiation[88:116]
        chain = _derive(self._chain, ephemeral, 1)[0]
        digest = _hash(self._start + ephemeral)
        theirs = X25519PublicKey.from_public_bytes(ephemeral)
        chain, key = _derive(chain, self._private.exchange(theirs), 2)
        try:
            if _open(key, sealed_static, digest) != self._initiator:
                return None
            digest = _hash(digest + sealed_static)
            chain, key = _derive(chain, self._static, 2)
            _open(key, sealed_time, digest)
        except InvalidTag:
            return None
        digest = _hash(digest + sealed_time)
        own = X25519PrivateKey.from_private_bytes(secrets.token_bytes(32))
        own_public = own.public_key().public_bytes_raw()
        chain = _derive(chain, own_public, 1)[0]
        digest = _hash(digest + own_public)
        chain = _derive(chain, own.exchange(theirs), 1)[0]
        chain = _derive(chain, own.exchange(X25519PublicKey.from_public_bytes(self._initiator)), 1)[0]
        chain, mixed, key = _derive(chain, bytes(32), 3)
        digest = _hash(digest + mixed)
        empty = ChaCha20Poly1305(key).encrypt(bytes(12), b"", digest)
        response = struct.pack("<I4s4s", 2, secrets.token_bytes(4), sender) + own_public + empty
        mac = hashlib.blake2s(response, key=_hash(_MAC_LABEL + self._initiator), digest_size=16).digest()
        return response + mac + bytes(16)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2s(data).digest()


def _derive(key: bytes, data: bytes, count: int) -> list[bytes]:
    """HKDF over HMAC-BLAKE2s, as the whitepaper's Kdf1 to Kdf3."""
    secret = hmac.digest(key, data, "blake2s")
    found: list[bytes] = []
    for number in range(1, count + 1):
        found.append(hmac.digest(secret, (found[-1] if found else b"") + bytes([number]), "blake2s"))
    return found


def _open(key: bytes, sealed: bytes, digest: bytes) -> bytes:
    return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, digest)


def main() -> None:
    """Be so many peers, until killed."""
    address, count, wireguard, probe = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    agent = frozenset({PublicKey.parse(probe)})
    poll = select.epoll()
    by_descriptor: dict[int, _StandIn] = {}
    for number in range(int(count)):
        identity = stand_in_identity(number)
        assert identity.wireguard is not None
        each = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        each.bind((address, FIRST_PORT + number))
        channel = Channel(secret=identity.probe, boot_id=secrets.token_bytes(BOOT_ID_BYTES))
        channel.set_correspondents(agent)
        responder = _Responder(identity.wireguard, PublicKey.parse(wireguard))
        by_descriptor[each.fileno()] = _StandIn(each, identity, channel, responder)
        poll.register(each.fileno(), select.EPOLLIN)
    print("ready", flush=True)
    while True:
        for descriptor, _ in poll.poll():
            by_descriptor[descriptor].take()


if __name__ == "__main__":
    main()
