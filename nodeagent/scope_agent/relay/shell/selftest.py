"""Whether this machine's kernel relays: a hub relays a datagram to itself before it grants anything.

Forwarding may be off, another table may drop what is forwarded, a firewall may know nothing of untracked
packets: no rule of ours can overrule these, and a look at the settings would miss some. So a TUN device of
our own, for a moment, plays two sides that are outside of the machine: each knocks, one sends, and what is
sent is to come out of the device again, from the port of the other. It uses a table of its own with the same
rules, so nobody's relay is touched, and the device's own address for the hub's.

The sides are addresses of 192.0.2.0/24 and 2001:db8::/32, which are for documentation and so nobody's, at
host routes that the device takes with it. Where there is no TUN device to be had, settings are looked at
instead. A firewall that treats this device otherwise than the one to the Internet deceives the test: either
the forwarder serves what the kernel could, or sides find by their own probes that nothing passes here.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network
from pathlib import Path
from typing import Final, Self

from scope.model import ConfigError, Family, IPAddress, PublicKey, RelayLimits
from scope.relay import Grant, Grants, Side, knock
from scope_agent.relay.rules import delete, load
from scope_agent.relay.shell.forwarding import FORWARDING, is_on
from scope_agent.wireguard.device import AddAddress, AddRoute, ApplyError, SetUp
from scope_agent.wireguard.shell.links import Links
from scope_agent.wireguard.shell.nft import NftError, list_forward_chains, run_nft

PATIENCE: Final = 0.5  # seconds for one datagram to pass one machine
_TRIES: Final = 3  # a machine that is busy, or whose rules change just now
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NAMED: Final = "scoperelay%d"  # the kernel counts
_DATA: Final = b"\4\0\0\0" + bytes(28)  # as WireGuard's shortest
_PORTS: Final = (26000, 26001)  # of the hub that the device plays
_SIDE_PORT: Final = 51820
_TOKENS: Final = (b"scopeone", b"scopetwo")  # they open nothing but this device's own table
_HUB: Final[dict[Family, IPAddress]] = {
    Family.IPV4: IPv4Address("192.0.2.129"),
    Family.IPV6: IPv6Address("2001:db8:5c0e::81"),
}
_SIDES: Final[dict[Family, tuple[IPAddress, IPAddress]]] = {
    Family.IPV4: (IPv4Address("192.0.2.130"), IPv4Address("192.0.2.131")),
    Family.IPV6: (IPv6Address("2001:db8:5c0e::82"), IPv6Address("2001:db8:5c0e::83")),
}
_GRANTS: Final = Grants(
    *_PORTS,
    RelayLimits(),
    (
        Grant(
            (
                Side(2, PublicKey(bytes([1]) * 32), _TOKENS[0], _PORTS[0]),
                Side(3, PublicKey(bytes([2]) * 32), _TOKENS[1], _PORTS[1]),
            ),
            3600.0,
        ),
    ),
)


def has_family(family: Family) -> bool:
    """Whether the machine speaks it at all."""
    if family is Family.IPV4:
        return True
    disabled = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
    try:
        return disabled.read_text().strip() == "0"
    except OSError:
        return False


def why_not(family: Family) -> str:
    """Why the kernel does not relay a family, in words; "" where it does. Blocks up to some seconds."""
    if not is_on(family):
        return f"forwarding is off: {FORWARDING[family].replace('/', '.')} is 0"
    try:
        with _Tun() as tun:
            return "" if _relays(tun, family) else _who_drops()
    except NftError as error:
        return str(error)
    except (OSError, ApplyError, ConfigError) as error:
        # Not a sign that it fails: only that it cannot be tried.
        try:
            dropping = _dropping_chains()
        except NftError as error_of_nft:
            return str(error_of_nft)
        untried = f"tried by no datagram, as there is no TUN device ({error})"
        return f"{_named(dropping)} may drop it; {untried}" if dropping else ""


class _Tun:
    """A TUN device of its own, which goes with its descriptor. Raises OSError."""

    def __init__(self) -> None:
        self._descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            request = struct.pack("16sH22x", _NAMED.encode(), _IFF_TUN | _IFF_NO_PI)
            answer = fcntl.ioctl(self._descriptor, _TUNSETIFF, request)
        except OSError:
            os.close(self._descriptor)
            raise
        self.name = answer[:16].rstrip(b"\0").decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def put_in(self, packet: bytes) -> None:
        """What comes from outside. Raises OSError."""
        os.write(self._descriptor, packet)

    def come_out(self, deadline: float) -> Iterable[bytes]:
        """What leaves, until the deadline."""
        while (left := deadline - time.monotonic()) > 0.0:
            if select.select([self._descriptor], [], [], left)[0]:
                yield os.read(self._descriptor, 65535)


def _relays(tun: _Tun, family: Family) -> bool:
    hub, sides = _HUB[family], _SIDES[family]
    links = Links(tun.name)
    try:
        links.apply(AddAddress(ip_interface(hub)))
        links.apply(SetUp())
        for side in sides:
            links.apply(AddRoute(ip_network(side)))
    finally:
        links.close()
    # Nobody learns of the table, so its seed and the time are no matter.
    run_nft(load(tun.name, _GRANTS, wall=0.0, seed=0))
    try:
        return any(_passes(tun, hub, sides) for _ in range(_TRIES))
    finally:
        run_nft(delete(tun.name))


def _passes(tun: _Tun, hub: IPAddress, sides: tuple[IPAddress, IPAddress]) -> bool:
    for side, token, port in zip(sides, _TOKENS, _PORTS, strict=True):
        tun.put_in(_datagram(side, _SIDE_PORT, hub, port, knock(token)))
    tun.put_in(_datagram(sides[0], _SIDE_PORT, hub, _PORTS[0], _DATA))
    ports = struct.pack("!HH", _PORTS[1], _SIDE_PORT)
    return any(
        _is_between(packet, hub, sides[1]) and ports in packet and packet.endswith(_DATA)
        for packet in tun.come_out(time.monotonic() + PATIENCE)
    )


def _is_between(packet: bytes, source: IPAddress, target: IPAddress) -> bool:
    return source.packed + target.packed in packet[: 40 if source.version == 6 else 20]


def _datagram(source: IPAddress, source_port: int, target: IPAddress, port: int, data: bytes) -> bytes:
    length = 8 + len(data)
    ends = source.packed + target.packed
    udp = struct.pack("!HHHH", source_port, port, length, 0) + data
    checksum = _checksum(ends + struct.pack("!II", length, socket.IPPROTO_UDP) + udp) or 0xFFFF
    udp = udp[:6] + struct.pack("!H", checksum) + udp[8:]
    if source.version == 6:
        return struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64) + ends + udp
    header = struct.pack("!BBHIBBH", 0x45, 0, 20 + length, 0, 64, socket.IPPROTO_UDP, 0)
    return header[:10] + struct.pack("!H", _checksum(header + ends)) + ends + udp


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    words: tuple[int, ...] = struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])
    total = sum(words)
    total += data[-1] << 8 if len(data) & 1 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _who_drops() -> str:
    dropping = _dropping_chains()
    if dropping:
        return f"{_named(dropping)} drops it: let it accept what has `ct state untracked`"
    return (
        "a datagram that this machine relayed to itself was lost: look at its firewall and its routing rules"
    )


def _dropping_chains() -> list[str]:
    """Chains of others on the way of what is forwarded that drop what no rule accepts. Raises NftError."""
    return [str(chain) for chain in list_forward_chains() if chain.drops]


def _named(chains: list[str]) -> str:
    return "the foreign chain " + ", ".join(chains)
