"""A WireGuard device in virtual time: enough of the protocol that an agent can tell no difference.

Modelled: one handshake at a time per peer, initiations at most every 5 s, two crossing initiations that
spoil each other, a pre-shared key that both sides must hold when the answer is made and taken, a responder
that sends only after the initiator's first packet, endpoints that follow the source of every authenticated
packet, allowed IPs checked on arrival, 128 staged packets, rekey after 120 s, reject after 180 s, keepalive
at its interval and on its rise from 0, byte counters with handshakes in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, assert_never

from scope_agent.wireguard.device import (
    NO_PSK,
    Action,
    AddAddress,
    AddAllowedIps,
    AddGuard,
    AddPeer,
    AddRoute,
    CreateDevice,
    ObservedDevice,
    ObservedPeer,
    RemoveAddress,
    RemoveGuard,
    RemovePeer,
    RemoveRoute,
    SetAllowedIps,
    SetEndpoint,
    SetFwmark,
    SetKeepalive,
    SetListenPort,
    SetMtu,
    SetPrivateKey,
    SetPsk,
    SetUp,
)

from scope.model import Endpoint, IPAddress, IPInterface, IPNetwork, PublicKey, Secret

REKEY_AFTER = 120.0
REJECT_AFTER = 180.0
REKEY_TIMEOUT = 5.0
RETRY_JITTER = 0.333
GIVE_UP_AFTER = 90.0
KEEPALIVE_TIMEOUT = 10.0
MAX_STAGED = 128
INITIATION_BYTES, RESPONSE_BYTES, OVERHEAD_BYTES = 148, 92, 32


@dataclass(frozen=True, slots=True)
class Initiation:
    """The first message of a handshake."""

    sender: PublicKey
    number: int


@dataclass(frozen=True, slots=True)
class Response:
    """The second."""

    sender: PublicKey
    number: int
    psk: Secret | None = None  # what the responder mixed in


@dataclass(frozen=True, slots=True)
class Transport:
    """A packet of a session; `content` None is a keepalive."""

    sender: PublicKey
    session: int
    content: Content | None = None


WireGuardDatagram: TypeAlias = Initiation | Response | Transport


def size_of(datagram: WireGuardDatagram, payload: int) -> int:
    """Bytes as WireGuard counts them."""
    match datagram:
        case Initiation():
            return INITIATION_BYTES
        case Response():
            return RESPONSE_BYTES
        case Transport(content=None):
            return OVERHEAD_BYTES
        case Transport():
            return OVERHEAD_BYTES + payload
        case _:
            assert_never(datagram)


@dataclass(slots=True)
class _Session:
    number: int
    born: float
    initiator: bool


@dataclass(slots=True)
class _Peer:
    key: PublicKey
    endpoint: Endpoint | None = None
    allowed_ips: frozenset[IPNetwork] = frozenset()
    keepalive: int = 0
    psk: Secret | None = None
    rx: int = 0
    tx: int = 0
    last_handshake: float | None = None
    session: _Session | None = None
    previous: _Session | None = None
    pending: _Session | None = None  # answered by us, not yet used by the initiator
    initiation: int | None = None  # of ours, unanswered
    initiated: float = -10.0
    trying_since: float | None = None
    staged: deque[Content | None] = field(default_factory=lambda: deque(maxlen=MAX_STAGED))
    traversed: float = -1.0  # the last authenticated packet in either direction
    keepalive_armed: bool = False
    answer_armed: bool = False
    sent: float = -1.0
    heard: float = -1.0
    retry_armed: bool = False


class Content(Protocol):
    """What a packet is, as far as cryptokey routing goes."""

    @property
    def source(self) -> IPAddress: ...

    @property
    def destination(self) -> IPAddress: ...


class Device:
    """One device. `schedule(delay, call)` runs something later, `send` puts a datagram on the wire."""

    def __init__(
        self,
        *,
        name: str,
        now: Callable[[], float],
        wall: Callable[[], float],
        random: Callable[[], float],
        schedule: Callable[[float, Callable[[], None]], None],
        send: Callable[[Endpoint, WireGuardDatagram], None],
        deliver: Callable[[Content], None],
        payload: int = 128,
    ) -> None:
        self.name = name
        self.payload = payload
        self.public_key: PublicKey | None = None
        self.listen_port = 0
        self.endpoint_changes = 0
        self.payload_packets = 0  # what the device's own counters show: payload, not handshakes
        self._now, self._wall, self._random = now, wall, random
        self._schedule, self._send, self._deliver = schedule, send, deliver
        self._exists = self._up = False
        self._mtu = self._fwmark = 0
        self._addresses: frozenset[IPInterface] = frozenset()
        self._routes: frozenset[IPNetwork] = frozenset()
        self._guarded: frozenset[IPNetwork] = frozenset()
        self.peers: dict[PublicKey, _Peer] = {}

    # --- configuration -------------------------------------------------------------------------------------

    def observe(self) -> ObservedDevice:
        """The device as it is."""
        return ObservedDevice(
            name=self.name,
            exists=self._exists,
            up=self._up,
            public_key=self.public_key,
            listen_port=self.listen_port,
            mtu=self._mtu,
            fwmark=self._fwmark,
            addresses=self._addresses,
            routes=self._routes,
            guarded=self._guarded,
            peers={
                key: ObservedPeer(
                    key,
                    endpoint=p.endpoint,
                    allowed_ips=p.allowed_ips,
                    keepalive=p.keepalive,
                    psk=p.psk,
                    rx=p.rx,
                    tx=p.tx,
                    last_handshake=p.last_handshake,
                )
                for key, p in self.peers.items()
            },
        )

    def delete(self) -> None:
        """What a person with `ip link delete` does; guards are routes of their own and stay."""
        self._exists = self._up = False
        self.public_key, self.listen_port, self._mtu, self._fwmark = None, 0, 0, 0
        self._addresses, self._routes = frozenset(), frozenset()
        self.peers.clear()

    def apply(self, action: Action) -> None:
        """Perform one action."""
        match action:
            case CreateDevice():
                self._exists = True
            case SetPrivateKey(secret):
                self.public_key = _public(secret.raw)
            case SetListenPort(port):
                self.listen_port = port
            case SetFwmark(mark):
                self._fwmark = mark
            case SetMtu(mtu):
                self._mtu = mtu
            case SetUp():
                self._up = True
            case AddAddress(address):
                self._addresses |= {address}
            case RemoveAddress(address):
                self._addresses -= {address}
            case AddRoute(prefix):
                self._routes |= {prefix}
            case RemoveRoute(prefix):
                self._routes -= {prefix}
            case AddGuard(prefix):
                self._guarded |= {prefix}
            case RemoveGuard(prefix):
                self._guarded -= {prefix}
            case AddPeer(key=key, endpoint=endpoint, allowed_ips=allowed_ips, keepalive=keepalive, psk=psk):
                peer = self.peers.setdefault(key, _Peer(key))
                peer.psk = psk
                peer.endpoint = endpoint or peer.endpoint
                self._allow(peer, allowed_ips)
                self._keep_alive(peer, keepalive)
            case RemovePeer(key):
                self.peers.pop(key, None)
            case SetEndpoint(key, endpoint):
                peer = self.peers[key]
                if peer.endpoint != endpoint:
                    self.endpoint_changes += 1
                peer.endpoint = endpoint
            case SetPsk(key, psk):
                self.peers[key].psk = None if psk == NO_PSK else psk
            case AddAllowedIps(key, allowed_ips):
                self._allow(self.peers[key], self.peers[key].allowed_ips | allowed_ips)
            case SetAllowedIps(key, allowed_ips):
                self._allow(self.peers[key], allowed_ips)
            case SetKeepalive(key, keepalive):
                self._keep_alive(self.peers[key], keepalive)
            case _:
                assert_never(action)

    def _allow(self, peer: _Peer, allowed_ips: frozenset[IPNetwork]) -> None:
        for other in self.peers.values():
            if other is not peer:
                other.allowed_ips -= allowed_ips
        peer.allowed_ips = allowed_ips

    def _keep_alive(self, peer: _Peer, seconds: int) -> None:
        rises = peer.keepalive == 0 and seconds > 0
        peer.keepalive = seconds
        if rises and self._up:
            self._send_keepalive(peer)
            self._arm_keepalive(peer)

    # --- traffic -------------------------------------------------------------------------------------------

    def send_packet(self, content: Content) -> bool:
        """A packet that the machine routes into the device; False when no peer is there to take it."""
        peer = self._holder(content.destination)
        if peer is None or not self._up:
            return False
        self.payload_packets += 1
        self._transmit(peer, content)
        return True

    def receive(self, source: Endpoint, datagram: WireGuardDatagram) -> None:
        """A datagram from the wire."""
        peer = self.peers.get(datagram.sender)
        if peer is None or not self._up:
            return
        match datagram:
            case Initiation(number=number):
                self._initiated(peer, number, source)
            case Response(number=number, psk=psk):
                if psk == peer.psk:
                    self._responded(peer, number, source)
            case Transport(session=number, content=content):
                self._transported(peer, number, content, source)
            case _:
                assert_never(datagram)

    def _transmit(self, peer: _Peer, content: Content | None) -> None:
        session = peer.session
        if session is None or self._now() - session.born >= REJECT_AFTER:
            if content is not None or not peer.staged:
                peer.staged.append(content)
            self._initiate(peer)
            return
        self._put(peer, Transport(self._own(), session.number, content))
        if content is not None and not peer.retry_armed:
            peer.retry_armed = True
            at = self._now()
            self._schedule(KEEPALIVE_TIMEOUT + REKEY_TIMEOUT, lambda: self._check_heard(peer, at))
        if session.initiator and self._now() - session.born > REKEY_AFTER:
            self._initiate(peer)

    def _put(self, peer: _Peer, datagram: WireGuardDatagram) -> None:
        if peer.endpoint is None:
            return
        peer.tx += size_of(datagram, self.payload)
        peer.sent = peer.traversed = self._now()
        self._send(peer.endpoint, datagram)

    def _own(self) -> PublicKey:
        assert self.public_key is not None
        return self.public_key

    def _took(self, peer: _Peer, datagram: WireGuardDatagram, source: Endpoint) -> None:
        """What every authenticated packet does."""
        peer.rx += size_of(datagram, self.payload)
        peer.heard = peer.traversed = self._now()
        if peer.endpoint != source:
            self.endpoint_changes += 1
        peer.endpoint = source
        self._arm_keepalive(peer)

    # --- handshakes ----------------------------------------------------------------------------------------

    def _initiate(self, peer: _Peer) -> None:
        now = self._now()
        if now - peer.initiated < REKEY_TIMEOUT:
            return  # a retry, too, where an answer was sent since: the next packet asks
        if peer.trying_since is None:
            peer.trying_since = now
        peer.initiated = now
        peer.initiation = int(self._random() * 2**62)
        number = peer.initiation
        self._put(peer, Initiation(self._own(), number))
        delay = REKEY_TIMEOUT + RETRY_JITTER * max(self._random(), 1e-3)  # beyond what rounding takes away
        self._schedule(delay, lambda: self._retry(peer, number))

    def _retry(self, peer: _Peer, number: int) -> None:
        if peer.trying_since is None or peer.key not in self.peers:
            return
        if self._now() - peer.trying_since > GIVE_UP_AFTER:
            peer.trying_since = None
            peer.staged.clear()
            return
        self._initiate(peer)

    def _initiated(self, peer: _Peer, number: int, source: Endpoint) -> None:
        peer.initiation = None  # one handshake state: theirs replaces ours
        self._took(peer, Initiation(peer.key, number), source)
        peer.pending = _Session(number, self._now(), initiator=False)
        peer.initiated = self._now()  # who answered waits as long as who asked before it asks itself
        self._put(peer, Response(self._own(), number, peer.psk))

    def _responded(self, peer: _Peer, number: int, source: Endpoint) -> None:
        if peer.initiation != number:
            return
        peer.initiation, peer.trying_since = None, None
        self._took(peer, Response(peer.key, number), source)
        peer.previous, peer.session = peer.session, _Session(number, self._now(), initiator=True)
        peer.last_handshake = self._wall()
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        if not peer.staged:
            peer.staged.append(None)
        staged = list(peer.staged)
        peer.staged.clear()
        for content in staged:
            self._transmit(peer, content)

    def _transported(self, peer: _Peer, number: int, content: Content | None, source: Endpoint) -> None:
        if peer.pending is not None and peer.pending.number == number:
            peer.previous, peer.session, peer.pending = peer.session, peer.pending, None
            peer.last_handshake = self._wall()
            peer.trying_since = None
            self._took(peer, Transport(peer.key, number, content), source)
            if peer.staged:
                self._flush(peer)
        else:
            known = [s for s in (peer.session, peer.previous) if s is not None and s.number == number]
            if not known or self._now() - known[0].born >= REJECT_AFTER:
                return
            self._took(peer, Transport(peer.key, number, content), source)
        if content is None:
            return
        if not peer.answer_armed:
            peer.answer_armed = True
            at = self._now()
            self._schedule(KEEPALIVE_TIMEOUT, lambda: self._answer_silence(peer, at))
        if self._holder(content.source) is peer:
            self.payload_packets += 1
            self._deliver(content)

    def _holder(self, address: IPAddress) -> _Peer | None:
        """The peer with the longest prefix among the allowed IPs that hold an address."""
        best: tuple[int, _Peer] | None = None
        for peer in self.peers.values():
            for prefix in peer.allowed_ips:
                if (best is None or prefix.prefixlen > best[0]) and address in prefix:
                    best = prefix.prefixlen, peer
        return best[1] if best is not None else None

    def _answer_silence(self, peer: _Peer, since: float) -> None:
        peer.answer_armed = False
        if peer.sent < since and peer.key in self.peers:
            self._send_keepalive(peer)

    def _check_heard(self, peer: _Peer, since: float) -> None:
        peer.retry_armed = False
        if peer.heard < since and peer.key in self.peers:
            self._initiate(peer)

    # --- keepalive -----------------------------------------------------------------------------------------

    def _send_keepalive(self, peer: _Peer) -> None:
        self._transmit(peer, None)

    def _arm_keepalive(self, peer: _Peer) -> None:
        if peer.keepalive and not peer.keepalive_armed:
            peer.keepalive_armed = True
            self._schedule(peer.keepalive, lambda: self._tick_keepalive(peer))

    def _tick_keepalive(self, peer: _Peer) -> None:
        peer.keepalive_armed = False
        if not peer.keepalive or self.peers.get(peer.key) is not peer:
            return
        wait = peer.traversed + peer.keepalive - self._now()
        if wait <= 0:
            self._send_keepalive(peer)
            wait = float(peer.keepalive)
        peer.keepalive_armed = True
        self._schedule(wait, lambda: self._tick_keepalive(peer))


def _public(private: bytes) -> PublicKey:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return PublicKey(X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())
