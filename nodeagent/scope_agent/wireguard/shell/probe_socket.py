"""Sending and receiving probes on WireGuard's own UDP port, which WireGuard itself holds.

A mapping that a NAT made for another socket is not WireGuard's: so probes leave from WireGuard's port,
through raw sockets (`scope_agent.wireguard.raw`), one per family. Raw sockets read after the firewall, so
probes pass where WireGuard passes; packet sockets read before it and would promise paths that it lacks.

Without CAP_NET_RAW, ordinary sockets on a port of their own do it, with nftables rules that put WireGuard's
port in the place of theirs on the way out and theirs in the place of WireGuard's on the way in. The rules
rewrite outside connection tracking, so that it sees WireGuard's port in both directions.

Nothing blocks: descriptors are for `add_reader`, and a full buffer is an answer like another.
"""

from __future__ import annotations

import array
import enum
import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from scope.model import ConfigError, Endpoint, IPAddress
from scope_agent.wireguard import raw
from scope_agent.wireguard.shell.nft import NftError, run_nft

# One call reads no more than this of each family; whoever reads on bounds what it takes.
READ_AT_ONCE = 64
# Enough for the answers of a thousand peers that were pinged at once.
BUFFER_BYTES = 1 << 20

_DATAGRAM_BYTES = 65535
_SO_ATTACH_FILTER = 26
_IPV6_CHECKSUM, _UDP_CHECKSUM_OFFSET = 7, 6
_IP_PKTINFO = 8

_INSTRUCTION_BYTES = 8

_ADVICE = (
    "Probing on WireGuard's port needs CAP_NET_RAW (or, in its place, CAP_NET_ADMIN and nftables' `nft`): "
    "run as root, or give the service AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW (in Kubernetes: "
    "capabilities.add [NET_ADMIN, NET_RAW])"
)

_BUSY = {errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM}
_REFUSED = {errno.EPERM, errno.EACCES}


class SendResult(enum.Enum):
    """What became of a datagram, as far as this machine can tell."""

    SENT = enum.auto()
    BUSY = enum.auto()  # a buffer is full: the datagram is dropped, as the network might have
    UNREACHABLE = enum.auto()  # no route, a blackhole, or no address of that family
    REFUSED = enum.auto()  # the machine's own firewall
    TOO_LARGE = enum.auto()


@dataclass(frozen=True, slots=True)
class Arrived:
    """A datagram: who sent it, to which address and port of ours, its payload."""

    source: Endpoint
    own: IPAddress
    port: int
    data: bytes


class ProbeSocket(Protocol):
    """A way to send and receive probes on WireGuard's port."""

    @property
    def port(self) -> int:
        """WireGuard's port, from which datagrams leave."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What to watch for reading."""

    def send(
        self, endpoint: Endpoint, data: bytes, *, ttl: int | None = None, port: int | None = None
    ) -> SendResult:
        """Send a datagram that starts with the magic, from WireGuard's port or another one.

        `ttl` is its hop limit. Never blocks, never raises.
        """

    def receive(self) -> Iterator[Arrived]:
        """What arrived. At most `READ_AT_ONCE` of each family."""

    def hear(self, ports: range) -> None:
        """Keep, over IPv4, also what comes to these ports. Raises ConfigError where that cannot be."""

    def move(self, port: int) -> None:
        """Follow WireGuard to another port."""

    def close(self) -> None:
        """Give everything back."""


def open_probe_socket(port: int, *, fwmark: int = 0, interface: str | None = None) -> ProbeSocket:
    """Open the best probe socket that this process may have.

    `fwmark` is the device's, so that policy routing treats both alike; `interface` binds to an underlay.
    Raises ConfigError, naming the capability that is missing.
    """
    try:
        return RawProbeSocket(port, fwmark=fwmark, interface=interface)
    except PermissionError:
        pass
    try:
        return RewrittenProbeSocket(port, fwmark=fwmark, interface=interface)
    except PermissionError as error:
        raise ConfigError(f"{_ADVICE}. Opening a socket: {error.strerror}") from None


class RawProbeSocket:
    """Probes through raw sockets; needs CAP_NET_RAW."""

    def __init__(self, port: int, *, fwmark: int = 0, interface: str | None = None) -> None:
        """Raises PermissionError without the capability, ConfigError where `interface` is missing."""
        self._port, self._also = port, raw.NO_PORTS
        self._fwmark, self._interface = fwmark, interface
        self._v4 = _open(socket.AF_INET, socket.SOCK_RAW, fwmark, interface)
        self._v6 = _open(socket.AF_INET6, socket.SOCK_RAW, fwmark, interface)
        for each in self._open_sockets():
            _attach(each, raw.drop_all())
            _drain(each)
        if self._v6 is not None:
            self._v6.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _UDP_CHECKSUM_OFFSET)
            self._v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        self.move(port)

    @property
    def port(self) -> int:
        """WireGuard's port."""
        return self._port

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What to watch for reading."""
        return tuple(each.fileno() for each in self._open_sockets())

    def send(
        self, endpoint: Endpoint, data: bytes, *, ttl: int | None = None, port: int | None = None
    ) -> SendResult:
        """Send one datagram from WireGuard's port, or over IPv4 from another one."""
        if len(data) > raw.MAX_PAYLOAD:
            return SendResult.TOO_LARGE
        try:
            match endpoint.address:
                case IPv4Address():
                    own = self._port if port is None else port
                    self._send_v4(endpoint, endpoint.address, data, ttl=ttl, own=own)
                case IPv6Address():
                    self._send_v6(endpoint.address, endpoint.port, data, ttl)
        except OSError as error:
            return _result(error)
        return SendResult.SENT

    def receive(self) -> Iterator[Arrived]:
        """What has arrived; whatever is not a probe to a port of ours is skipped."""
        if self._v4 is not None:
            for packet, _, (host, _) in _read(self._v4):
                opened = raw.open_datagram(raw.udp_part(packet), self._port, also=self._also)
                if opened is not None:
                    source_port, port, data = opened
                    source = Endpoint(IPv4Address(host), source_port)
                    yield Arrived(source, IPv4Address(packet[16:20]), port, data)
        if self._v6 is not None:
            for packet, ancillary, (host, *_) in _read(self._v6):
                opened = raw.open_datagram(packet, self._port)
                local = _local_v6(ancillary)
                if opened is not None and local is not None:
                    source_port, port, data = opened
                    yield Arrived(_source_v6(host, source_port), local, port, data)

    def move(self, port: int) -> None:
        """Follow WireGuard to another port; the new filter takes the old one's place in one step."""
        self._port = port
        self.hear(self._also)
        if self._v6 is not None:
            _attach(self._v6, raw.keep_probes_v6(port))

    def hear(self, ports: range) -> None:
        """Keep, over IPv4, also what comes to these ports."""
        self._also = ports
        if self._v4 is not None:
            _attach(self._v4, raw.keep_probes_v4(self._port, also=ports))

    def close(self) -> None:
        """Close both sockets."""
        for each in self._open_sockets():
            each.close()

    def _send_v4(
        self, endpoint: Endpoint, address: IPv4Address, data: bytes, *, ttl: int | None, own: int
    ) -> None:
        if self._v4 is None:
            raise OSError(errno.EAFNOSUPPORT, "no IPv4")
        source = _source_towards(address, self._fwmark, self._interface)
        packet = raw.datagram_v4(source, address, source_port=own, port=endpoint.port, payload=data)
        # The checksum covers the source address, so the packet must leave with the one it was made for.
        ancillary = [(socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, source.packed, bytes(4)))]
        if ttl is not None:
            ancillary.append((socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", ttl)))
        self._v4.sendmsg([packet], ancillary, socket.MSG_DONTWAIT, (str(address), 0))

    def _send_v6(self, address: IPv6Address, port: int, data: bytes, ttl: int | None) -> None:
        if self._v6 is None:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        packet = raw.datagram_v6(source_port=self._port, port=port, payload=data)
        ancillary = []
        if ttl is not None:
            ancillary.append((socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, struct.pack("=i", ttl)))
        self._v6.sendmsg([packet], ancillary, socket.MSG_DONTWAIT, (str(address), 0, 0, 0))

    def _open_sockets(self) -> tuple[socket.socket, ...]:
        return tuple(each for each in (self._v4, self._v6) if each is not None)


class RewrittenProbeSocket:
    """Probes through ordinary sockets whose port nftables rewrites; needs CAP_NET_ADMIN and `nft`.

    The rules outlive a crash of the agent, and are replaced by its next start.
    """

    def __init__(self, port: int, *, fwmark: int = 0, interface: str | None = None) -> None:
        """Raises ConfigError where the rules cannot be made."""
        self._port = port
        self._v4 = _open(socket.AF_INET, socket.SOCK_DGRAM, fwmark, interface)
        self._v6 = _open(socket.AF_INET6, socket.SOCK_DGRAM, fwmark, interface)
        self._own_port = self._bind()
        if self._v4 is not None:
            self._v4.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        if self._v6 is not None:
            self._v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        try:
            self.move(port)
        except ConfigError:
            self._close_sockets()
            raise

    @property
    def port(self) -> int:
        """WireGuard's port."""
        return self._port

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What to watch for reading."""
        return tuple(each.fileno() for each in self._open_sockets())

    def send(
        self, endpoint: Endpoint, data: bytes, *, ttl: int | None = None, port: int | None = None
    ) -> SendResult:
        """Send one datagram, which leaves from WireGuard's port and no other."""
        if port is not None:
            return SendResult.REFUSED
        ancillary: list[tuple[int, int, bytes]] = []
        match endpoint.address:
            case IPv4Address():
                sender, level, option = self._v4, socket.IPPROTO_IP, socket.IP_TTL
            case IPv6Address():
                sender, level, option = self._v6, socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT
        if sender is None:
            return SendResult.UNREACHABLE
        if ttl is not None:
            ancillary.append((level, option, struct.pack("=i", ttl)))
        try:
            sender.sendmsg([data], ancillary, socket.MSG_DONTWAIT, (str(endpoint.address), endpoint.port))
        except OSError as error:
            return _result(error)
        return SendResult.SENT

    def receive(self) -> Iterator[Arrived]:
        """What has arrived; whatever is not a probe is skipped."""
        if self._v4 is not None:
            for data, ancillary, (host, port) in _read(self._v4):
                local_v4 = _local_v4(ancillary)
                if port and local_v4 is not None and data.startswith(raw.MAGIC):
                    yield Arrived(Endpoint(IPv4Address(host), port), local_v4, self._port, data)
        if self._v6 is not None:
            for data, ancillary, (host, port, *_) in _read(self._v6):
                local_v6 = _local_v6(ancillary)
                if port and local_v6 is not None and data.startswith(raw.MAGIC):
                    yield Arrived(_source_v6(host, port), local_v6, self._port, data)

    def move(self, port: int) -> None:
        """Follow WireGuard to another port. Raises ConfigError."""
        table = _table(port)
        magic = f"0x{raw.MAGIC.hex()}"
        _run_nft(
            f"add table inet {table}\n"
            f"delete table inet {table}\n"
            f"table inet {table} {{\n"
            # Before connection tracking (-200) on the way out; after every filter (0) on the way in.
            f"  chain out {{ type filter hook output priority -300;\n"
            f"    udp sport {self._own_port} @th,64,32 {magic} udp sport set {port}\n  }}\n"
            f"  chain in {{ type filter hook input priority 300;\n"
            f"    udp dport {port} @th,64,32 {magic} udp dport set {self._own_port}\n  }}\n"
            f"}}\n"
        )
        if port != self._port:
            _run_nft(_without_table(self._port))
        self._port = port

    def hear(self, ports: range) -> None:
        """These sockets have one port. Raises ConfigError."""
        if ports:
            raise ConfigError("the agent has no CAP_NET_RAW")

    def close(self) -> None:
        """Remove the rules and close the sockets."""
        self._close_sockets()
        _run_nft(_without_table(self._port))

    def _bind(self) -> int:
        """Both families on one port, so that one pair of rules serves both."""
        port = 0
        if self._v6 is not None:
            self._v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self._v6.bind(("", 0))
            port = self._v6.getsockname()[1]
        if self._v4 is not None:
            self._v4.bind(("", port))
            port = self._v4.getsockname()[1]
        return port

    def _close_sockets(self) -> None:
        for each in self._open_sockets():
            each.close()

    def _open_sockets(self) -> tuple[socket.socket, ...]:
        return tuple(each for each in (self._v4, self._v6) if each is not None)


def _without_table(port: int) -> str:
    """Rules that remove a table, also where another tool has flushed it away."""
    return f"add table inet {_table(port)}\ndelete table inet {_table(port)}\n"


def _open(family: int, kind: int, fwmark: int, interface: str | None) -> socket.socket | None:
    """A non-blocking UDP socket, raw or not; None where the kernel has no such family."""
    try:
        opened = socket.socket(family, kind | socket.SOCK_CLOEXEC, socket.IPPROTO_UDP)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return None
        raise
    opened.setblocking(False)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    _route_like_device(opened, fwmark, interface)
    return opened


def _route_like_device(target: socket.socket, fwmark: int, interface: str | None) -> None:
    if fwmark:
        target.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, fwmark)
    if interface is None:
        return
    try:
        target.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise ConfigError(f"There is no interface {interface} to send probes from") from None
        raise


def _attach(target: socket.socket, program: bytes) -> None:
    code = array.array("B", program)
    address, _ = code.buffer_info()
    target.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program) // _INSTRUCTION_BYTES, address)
    )


def _drain(target: socket.socket) -> None:
    """Read away what came in before there was a filter; with the filter that drops all, no more comes."""
    while True:
        try:
            target.recv(1)
        except BlockingIOError:
            return


def _source_towards(address: IPv4Address, fwmark: int, interface: str | None) -> IPv4Address:
    """The source address that routing would choose. Asked on a new socket, since a used one keeps its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as trial:
        _route_like_device(trial, fwmark, interface)
        trial.connect((str(address), 9))
        return IPv4Address(trial.getsockname()[0])


_Ancillary = list[tuple[int, int, bytes]]


def _read(source: socket.socket) -> Iterator[tuple[bytes, _Ancillary, tuple[str, int]]]:
    for _ in range(READ_AT_ONCE):
        try:
            data, ancillary, _, sender = source.recvmsg(_DATAGRAM_BYTES, 128)
        except BlockingIOError:
            return
        except OSError:  # an ICMP error of an earlier datagram; reading it clears it
            continue
        yield data, ancillary, sender


def _local_v4(ancillary: _Ancillary) -> IPv4Address | None:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO) and len(data) >= 12:
            return IPv4Address(data[8:12])
    return None


def _local_v6(ancillary: _Ancillary) -> IPv6Address | None:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO) and len(data) >= 16:
            return IPv6Address(data[:16])
    return None


def _source_v6(host: str, port: int) -> Endpoint:
    return Endpoint(IPv6Address(host.partition("%")[0]), port)


def _result(error: OSError) -> SendResult:
    if error.errno in _BUSY:
        return SendResult.BUSY
    if error.errno in _REFUSED:
        return SendResult.REFUSED
    if error.errno == errno.EMSGSIZE:
        return SendResult.TOO_LARGE
    return SendResult.UNREACHABLE


def _table(port: int) -> str:
    """Named by WireGuard's port, so that the next start replaces what a crash left behind."""
    return f"scope_probe_{port}"


def _run_nft(rules: str) -> None:
    """Raises ConfigError, naming what is missing."""
    try:
        run_nft(rules)
    except NftError as error:
        raise ConfigError(f"{_ADVICE}. {error}") from None
