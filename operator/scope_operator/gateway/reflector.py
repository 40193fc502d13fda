"""The reflector: tells members of a mesh where their datagrams come from, before there is any other peer to
ask.

`Reflector` decides, without I/O: it answers an authenticated ping with the endpoint that it was seen from,
and passes a sealed datagram between two members of one mesh that both spoke to it a moment ago, so that a
call to punch travels where no path is yet. It answers nobody else, never with more bytes than it got, and
never to an address that did not just prove to hold a member's key.

`ReflectorSockets` is its shell: UDP sockets on every address and port, each answer leaving from the address
that the question came to, which is what makes it pass the asker's NAT.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from scope.admission import Buckets, Rate, source_of
from scope.channel import Channel, Confirmed, Hello, NotACorrespondent, Received
from scope.model import ConfigError, Endpoint, IPAddress, Peer, PublicKey, endpoint_at
from scope.wire import MAX_DATAGRAM, Forward, Forwarded, Message, Ping, Pong, WireError

log = logging.getLogger(__name__)

HEARD_SECONDS = 60.0  # a NAT keeps a mapping at least so long for who refreshes it every 20 s
SOURCE_RATE = Rate(200, 1000)  # datagrams of one address: a hundred agents behind one NAT start at once
FORWARD_RATE = Rate(20, 100)  # of one member, as for the courier
RECEIVE_BATCH = 64  # datagrams taken from one socket before the others get their turn


@dataclass(frozen=True, slots=True)
class Leg:
    """How a datagram came and its answer goes: our socket by number, our address, their endpoint."""

    socket: int
    local: IPAddress | None
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A datagram to send."""

    leg: Leg
    data: bytes


class Reflector:
    """The decisions. `channel` holds the registry's probe key; `now` is monotonic seconds everywhere."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._mesh_of: dict[PublicKey, str] = {}
        self._heard: dict[PublicKey, tuple[Leg, float]] = {}
        self._sources = Buckets[str](SOURCE_RATE)
        self._forwards = Buckets[PublicKey](FORWARD_RATE)

    @property
    def probe_key(self) -> PublicKey:
        """Whom to seal pings for."""
        return self._channel.public_key

    def set_peers(self, peers: Iterable[Peer]) -> None:
        """Speak with these peers, but for the removed ones, and with nobody else."""
        self._mesh_of = {
            peer.report.keys.probe: peer.spec.mesh
            for peer in peers
            if peer.report is not None and peer.assignment.tombstone is None
        }
        self._channel.set_correspondents(frozenset(self._mesh_of))
        self._heard = {key: heard for key, heard in self._heard.items() if key in self._mesh_of}

    def receive(self, data: bytes, leg: Leg, now: float) -> Outgoing | None:
        """What to send for an arrived datagram: nothing, or one datagram no larger."""
        if self._sources.take(source_of(str(leg.remote.address)), now) > 0:
            return None
        try:
            opened = self._channel.open(data)
        except WireError:
            return None
        match opened:
            case Hello(cookie=cookie):
                return Outgoing(leg, cookie)
            case Confirmed():
                return None
            case Received(sender=sender, message=message):
                self._heard[sender] = (leg, now)
                return self._answer(sender, message, leg, now, size=len(data))

    def _answer(
        self, sender: PublicKey, message: Message, leg: Leg, now: float, *, size: int
    ) -> Outgoing | None:
        match message:
            case Ping(transaction):
                pong = Pong(transaction, observed=leg.remote, has_session=False, received=0)
                outgoing = self._sealed(sender, pong, leg)
            case Forward(to, datagram):
                outgoing = self._passed_on(sender, to, datagram, now)
            case _:  # the rest is between peers
                outgoing = None
        if outgoing is not None and len(outgoing.data) > size:
            return None
        return outgoing

    def _passed_on(self, sender: PublicKey, to: PublicKey, datagram: bytes, now: float) -> Outgoing | None:
        leg, at = self._heard.get(to, (None, 0.0))
        if (
            leg is None
            or now - at > HEARD_SECONDS
            or self._mesh_of.get(to) != self._mesh_of.get(sender)
            or self._forwards.take(sender, now) > 0
        ):
            return None
        return self._sealed(to, Forwarded(sender, datagram), leg)

    def _sealed(self, to: PublicKey, message: Message, leg: Leg) -> Outgoing | None:
        try:
            return Outgoing(leg, self._channel.seal(to, message))
        except NotACorrespondent:
            return None


# --- the shell ----------------------------------------------------------------------------------------------


class ReflectorSockets:
    """The sockets of a reflector; `now` is a monotonic clock."""

    def __init__(self, reflector: Reflector, *, now: Callable[[], float]) -> None:
        self._reflector = reflector
        self._now = now
        self._sockets: list[socket.socket] = []

    def open(self, endpoints: Iterable[tuple[IPAddress, int]]) -> tuple[Endpoint, ...]:
        """Listen on all of `endpoints` (port 0: any). Raises ConfigError when one is taken."""
        loop = asyncio.get_running_loop()
        for address, port in endpoints:
            number = len(self._sockets)
            self._sockets.append(_bound(address, port))
            loop.add_reader(self._sockets[-1], self._read, number)
        return tuple(endpoint_at(*sock.getsockname()[:2]) for sock in self._sockets)

    def close(self) -> None:
        """Stop answering."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()

    def _read(self, number: int) -> None:
        sock = self._sockets[number]
        for _ in range(RECEIVE_BATCH):
            try:
                data, ancillary, _flags, address = sock.recvmsg(MAX_DATAGRAM + 1, socket.CMSG_SPACE(32))
            except (BlockingIOError, InterruptedError):
                return
            except (
                OSError
            ) as error:  # an ICMP error of an earlier answer: the next datagram is another matter
                log.debug("reflector.receive_failed reason=%s", error)
                continue
            if address[1] == 0:  # nobody can be answered there
                continue
            leg = Leg(number, _local_address(ancillary), endpoint_at(address[0], address[1]))
            outgoing = self._reflector.receive(data, leg, self._now())
            if outgoing is not None:
                self._send(outgoing)

    def _send(self, outgoing: Outgoing) -> None:
        leg = outgoing.leg
        to = (str(leg.remote.address), leg.remote.port)
        try:
            self._sockets[leg.socket].sendmsg([outgoing.data], _from_address(leg.local), 0, to)
        except OSError as error:  # a full buffer or no route: a lost datagram, which its asker repeats
            log.debug("reflector.send_failed to=%s reason=%s", leg.remote, error)


def _bound(address: IPAddress, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.bind((str(address), port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on UDP {address} port {port}: {error.strerror}; stop what uses it, or name "
            "other ports "
            "with --reflector-ports"
        ) from None
    return sock


_IP_PKTINFO = 8  # linux/in.h; the socket module names it from Python 3.12 on
_IN_PKTINFO = struct.Struct("=i4s4s")  # interface, our address, the header's destination
_IN6_PKTINFO = struct.Struct("=16si")


def _local_address(ancillary: list[tuple[int, int, bytes]]) -> IPAddress | None:
    """The address that a datagram was sent to."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            return IPv4Address(_IN_PKTINFO.unpack_from(data)[1])
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return IPv6Address(_IN6_PKTINFO.unpack_from(data)[0])
    return None


def _from_address(local: IPAddress | None) -> list[tuple[int, int, bytes]]:
    """What makes an answer leave from `local`, by whatever interface the routes say."""
    match local:
        case None:
            return []
        case IPv4Address():
            return [(socket.IPPROTO_IP, _IP_PKTINFO, _IN_PKTINFO.pack(0, local.packed, bytes(4)))]
        case IPv6Address():
            return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IN6_PKTINFO.pack(local.packed, 0))]
