"""Real pings through the mesh: ICMP echoes to a peer's mesh address, from a socket of our own.

An unprivileged ICMP socket is used where the kernel lets this user have one (net.ipv4.ping_group_range), else
a raw one, which takes root. Either way the packet goes where any program's would: by the mesh's route into
the WireGuard device. So a reply proves the whole way there and back, not just that the agents can talk.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from scope.ctl.errors import CommandError
from scope.ctl.local import AgentStatus, PeerView, mesh_addresses
from scope.model import IPAddress

INTERVAL = 1.0  # seconds from ping to ping, as `ping` has it
TIMEOUT = 2.0  # seconds until a ping counts as lost: a relayed path round the world takes a third of one
PAYLOAD_BYTES = 56  # as `ping` sends by default
NONCE_BYTES = 16  # of the payload: a raw socket hears everybody's replies, and this one is ours

_ECHO_REQUEST = {4: 8, 6: 128}  # RFC 792, RFC 4443
_ECHO_REPLY = {4: 0, 6: 129}
_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ping: a peer, by name and one of its addresses."""

    name: str
    address: IPAddress


def choose_target(status: AgentStatus, wanted: str, *, version: int | None) -> Target:
    """The peer that was meant, by name or mesh address; IPv6 unless `version` says 4. Raises CommandError."""
    peer = named(status, wanted)
    addresses = mesh_addresses(peer)
    try:
        given = ip_address(wanted)
    except ValueError:
        given = None
    if given is not None and version in (None, given.version):
        return Target(peer.name, given)
    fitting = sorted((a for a in addresses if version in (None, a.version)), key=lambda a: -a.version)
    if not fitting:
        family = f" of IPv{version}" if version else ""
        raise CommandError(
            f"{peer.name} has no mesh address{family} yet: the registry assigns it; "
            "`scopectl get peers` shows what it has"
        )
    return Target(peer.name, fitting[0])


def find_peer(status: AgentStatus, name: str) -> PeerView | None:
    """The peer of that exact name."""
    return next((peer for peer in status.peers if peer.name == name), None)


class Pinger:
    """One open ICMP socket towards an address. Raises CommandError where the kernel refuses it."""

    def __init__(
        self, address: IPAddress, *, nonce: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = address
        self._version = address.version
        self._clock = clock
        self._payload = nonce[:NONCE_BYTES].ljust(PAYLOAD_BYTES, b"\0")
        self._identifier = int.from_bytes(nonce[:2])
        self._socket, self._is_raw = _open(self._version)

    def __enter__(self) -> Pinger:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ping(self, sequence: int, *, timeout: float = TIMEOUT) -> float | str:
        """Seconds until the reply, or why there is none."""
        sent = self._clock()
        try:
            self._socket.sendto(
                encode_echo(self._version, self._identifier, sequence, self._payload), (str(self._address), 0)
            )
        except OSError as error:
            return _send_refused(error)
        deadline = sent + timeout
        while (left := deadline - self._clock()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                break
            data, source = self._socket.recvfrom(65536)
            received = self._clock()
            packet = strip_header(data) if self._is_raw and self._version == 4 else data
            from_peer = ip_address(str(source[0]).partition("%")[0]) == self._address
            if from_peer and is_reply(packet, self._version, sequence, self._payload):
                return received - sent
        return f"no reply within {timeout:g} s"


def encode_echo(version: int, identifier: int, sequence: int, payload: bytes) -> bytes:
    """An ICMP echo request. The kernel fills in ICMPv6's checksum, which covers addresses we do not know."""
    blank = _HEADER.pack(_ECHO_REQUEST[version], 0, 0, identifier, sequence & 0xFFFF) + payload
    if version == 6:
        return blank
    return blank[:2] + struct.pack("!H", _checksum(blank)) + blank[4:]


def is_reply(packet: bytes, version: int, sequence: int, payload: bytes) -> bool:
    """Whether an ICMP packet answers our echo of that number; the kernel may have changed the identifier."""
    if len(packet) < _HEADER.size:
        return False
    kind, code, _, _, number = _HEADER.unpack_from(packet)
    expected = (_ECHO_REPLY[version], 0, sequence & 0xFFFF)
    return (kind, code, number) == expected and packet[_HEADER.size :] == payload


def strip_header(packet: bytes) -> bytes:
    """What follows the IPv4 header, which a raw IPv4 socket delivers too."""
    return packet[(packet[0] & 0x0F) * 4 :] if packet else b""


def named(status: AgentStatus, wanted: str) -> PeerView:
    """The peer of that name, of that address, or the only one whose name has it as its last part."""
    for peer in status.peers:
        if wanted == peer.name or wanted in map(str, mesh_addresses(peer)):
            return peer
    short = [peer for peer in status.peers if peer.name.rpartition(".")[2] == wanted]
    if len(short) == 1:
        return short[0]
    if wanted == status.peer:
        raise CommandError(f"{wanted} is this machine: name another peer")
    if short:
        raise CommandError(
            f"{wanted} is not one peer but {len(short)}: {', '.join(peer.name for peer in short)}"
        )
    raise CommandError(f"this agent knows no peer {wanted!r}{_known(status.peers)}")


def _known(peers: Sequence[PeerView]) -> str:
    if not peers:
        return ": it knows of no other peer yet; `scopectl status` says whether it reaches the registry"
    names = [peer.name for peer in peers[:8]]
    return f"; it knows {', '.join(names)}" + (f" and {len(peers) - 8} more" if len(peers) > 8 else "")


def _open(version: int) -> tuple[socket.socket, bool]:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            return socket.socket(family, kind, protocol), kind is socket.SOCK_RAW
        except PermissionError:
            continue
        except OSError as error:
            raise CommandError(
                f"this kernel gives no ICMP socket for IPv{version}: {error.strerror}"
            ) from None
    raise CommandError(
        "this user may not send pings: run this with sudo, or allow it with "
        "`sysctl -w net.ipv4.ping_group_range='0 2147483647'`"
    )


def _send_refused(error: OSError) -> str:
    if error.errno in (errno.EDESTADDRREQ, errno.ENOKEY):
        return "WireGuard has no endpoint or key for this peer yet"
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return "no route to the mesh: is the device up?"
    return os.strerror(error.errno) if error.errno else str(error)


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2]))
    if len(data) % 2:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
