"""Rtnetlink as values: the few messages of links, addresses, routes and rules that we need, as bytes.

Pure; `shell.links` owns the sockets. Written out here, though WireGuard's own messages are left to pyroute2:
every agent speaks this before its first ping, and pyroute2's half of it takes longer to load than to use.

A message is a 16-byte header (length, type, flags, sequence, port), a fixed body, then attributes: 2 bytes
length, 2 bytes type, data, padded to 4. Integers are in the machine's order unless a name says otherwise.
Layouts: linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface

from scope.model import IPInterface, IPNetwork

AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10

REQUEST, ACK, ROOT, MATCH, EXCLUSIVE, CREATE = 0x1, 0x4, 0x100, 0x200, 0x200, 0x400
DUMP = ROOT | MATCH
DUMP_INTERRUPTED = 0x10

ERROR, DONE = 2, 3
NEW_LINK, DELETE_LINK, GET_LINK = 16, 17, 18
NEW_ADDRESS, DELETE_ADDRESS, GET_ADDRESS = 20, 21, 22
NEW_ROUTE, DELETE_ROUTE, GET_ROUTE = 24, 25, 26
NEW_RULE, DELETE_RULE, GET_RULE = 32, 33, 34

# Marks the routes that Scope made, so that no other is ever touched; unused in iproute2's rt_protos.
PROTOCOL = 83
# Below what network managers give to their own routes (100 and more), so that the mesh's prefixes go to it.
ROUTE_METRIC = 92
# Above every metric in use. Its low 16 bits tell apart the guards of several meshes on one machine.
GUARD_METRIC = 0x5C0000

TABLE_MAIN = 254
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_UNICAST, _BLACKHOLE = 1, 6
_UP = 0x1
_NO_DUPLICATE_DETECTION, _NO_PREFIX_ROUTE = 0x02, 0x200

_IFLA_NAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_INFO_KIND, _IFLA_EXT_MASK = 3, 4, 18, 1, 29
_IFLA_MASTER = 10
_SKIP_STATISTICS = 1 << 3
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_TO_TABLE = 1
_FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL = 6, 15, 21
_RTA_DESTINATION, _RTA_OUTPUT, _RTA_PRIORITY, _RTA_TABLE = 1, 4, 6, 15

_NESTED, _TYPE_MASK = 0x8000, 0x3FFF


class NetlinkError(Exception):
    """Bytes from the kernel that are not what the kernel's headers describe."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask: a type, flags and a body."""

    kind: int
    flags: int
    body: bytes

    def encoded(self, sequence: int) -> bytes:
        """The whole message."""
        return struct.pack("=IHHII", 16 + len(self.body), self.kind, self.flags, sequence, 0) + self.body


@dataclass(frozen=True, slots=True)
class Reply:
    """One message from the kernel; `body` starts after its header."""

    kind: int
    flags: int
    sequence: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `kind` is what made it: "wireguard", "tun", or "" for hardware.

    `master` is the index of the bridge or bond that it is a port of, 0 of none.
    """

    index: int
    name: str
    kind: str
    mtu: int
    up: bool
    master: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """A route made by Scope: into an interface, or a blackhole where `index` is None."""

    prefix: IPNetwork
    index: int | None
    metric: int


@dataclass(frozen=True, slots=True)
class ForeignRoute:
    """A route that somebody else made: into the interface `index`, 0 where it has several ways."""

    prefix: IPNetwork
    index: int
    protocol: int


def replies(data: bytes) -> Iterator[Reply]:
    """Split what one read returned. Raises NetlinkError."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < 16:
            raise NetlinkError("a message header is cut off")
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data, offset)
        if not 16 <= length <= len(data) - offset:
            raise NetlinkError(f"a message of {length} bytes where {len(data) - offset} are left")
        yield Reply(kind, flags, sequence, data[offset + 16 : offset + length])
        offset += (length + 3) & ~3


def error_of(reply: Reply) -> tuple[int, str]:
    """The positive errno of an ERROR reply (0: done) and the kernel's sentence, if it gave one."""
    if len(reply.body) < 20:
        raise NetlinkError("an error is cut off")
    (code,) = struct.unpack_from("=i", reply.body)
    (echoed,) = struct.unpack_from("=I", reply.body, 4)
    capped = reply.flags & 0x100
    start = 20 if capped else 4 + max(16, (echoed + 3) & ~3)
    text = ""
    if reply.flags & 0x200 and start <= len(reply.body):
        text = dict(attributes(reply.body[start:])).get(1, b"").rstrip(b"\0").decode("utf-8", "replace")
    return -code, text


# --- links, addresses, routes -------------------------------------------------------------------------------


def create_wireguard(name: str) -> Request:
    """Make a kernel WireGuard device."""
    kind = attribute(_IFLA_INFO_KIND, b"wireguard")
    body = _link_body() + attribute(_IFLA_NAME, _text(name)) + attribute(_IFLA_LINKINFO | _NESTED, kind)
    return Request(NEW_LINK, REQUEST | ACK | CREATE | EXCLUSIVE, body)


def get_link(name: str) -> Request:
    """Ask for one interface by name."""
    mask = attribute(_IFLA_EXT_MASK, struct.pack("=I", _SKIP_STATISTICS))
    return Request(GET_LINK, REQUEST | ACK, _link_body() + mask + attribute(_IFLA_NAME, _text(name)))


def get_links() -> Request:
    """Ask for every interface."""
    mask = attribute(_IFLA_EXT_MASK, struct.pack("=I", _SKIP_STATISTICS))
    return Request(GET_LINK, REQUEST | DUMP, _link_body() + mask)


def set_up(index: int) -> Request:
    """Bring an interface up."""
    return Request(NEW_LINK, REQUEST | ACK, _link_body(index, flags=_UP, change=_UP))


def set_mtu(index: int, mtu: int) -> Request:
    """Set an interface's MTU, in bytes."""
    return Request(NEW_LINK, REQUEST | ACK, _link_body(index) + attribute(_IFLA_MTU, struct.pack("=I", mtu)))


def delete_link(index: int) -> Request:
    """Remove an interface."""
    return Request(DELETE_LINK, REQUEST | ACK, _link_body(index))


def parse_link(reply: Reply) -> Link:
    """Read one interface. Raises NetlinkError."""
    index, flags = _unpack("=xxxxiI", reply.body)
    found = dict(attributes(reply.body[16:]))
    info = dict(attributes(found.get(_IFLA_LINKINFO, b"")))
    return Link(
        index=index,
        name=_string(found.get(_IFLA_NAME, b"")),
        kind=_string(info.get(_IFLA_INFO_KIND, b"")),
        mtu=_number("=I", found.get(_IFLA_MTU)),
        up=bool(flags & _UP),
        master=_number("=I", found.get(_IFLA_MASTER)),
    )


def add_address(index: int, address: IPInterface) -> Request:
    """Give an interface an address, without duplicate address detection and without a connected route."""
    return Request(NEW_ADDRESS, REQUEST | ACK | CREATE | EXCLUSIVE, _address_body(index, address))


def remove_address(index: int, address: IPInterface) -> Request:
    """Take an address from an interface."""
    return Request(DELETE_ADDRESS, REQUEST | ACK, _address_body(index, address))


def get_addresses(index: int) -> Request:
    """Ask for an interface's addresses, or for all where `index` is 0."""
    return Request(GET_ADDRESS, REQUEST | DUMP, struct.pack("=BBBBI", AF_UNSPEC, 0, 0, 0, index))


def parse_address(reply: Reply, index: int) -> IPInterface | None:
    """Read one address; None for another interface's and for link-local ones, which the kernel makes."""
    found = parse_any_address(reply)
    return found[1] if found is not None and found[0] == index else None


def parse_any_address(reply: Reply) -> tuple[int, IPInterface] | None:
    """Read one address with its interface's index; None for link-local ones."""
    _, length, _, scope, owner = _unpack("=BBBBI", reply.body)
    found = dict(attributes(reply.body[8:]))
    raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if scope == _SCOPE_LINK or raw is None:
        return None
    try:
        return owner, ip_interface((ip_address(raw), length))
    except ValueError as error:
        raise NetlinkError(f"an address cannot be read: {error}") from None


def add_route(index: int, prefix: IPNetwork, table: int = TABLE_MAIN) -> Request:
    """Send a prefix into an interface; refused with EEXIST where prefix and metric are taken."""
    body = _route_body(prefix, ROUTE_METRIC, index, table)
    return Request(NEW_ROUTE, REQUEST | ACK | CREATE | EXCLUSIVE, body)


def remove_route(index: int, prefix: IPNetwork, table: int = TABLE_MAIN) -> Request:
    """Remove a route that `add_route` made."""
    return Request(DELETE_ROUTE, REQUEST | ACK, _route_body(prefix, ROUTE_METRIC, index, table))


def add_guard(prefix: IPNetwork, metric: int, table: int = TABLE_MAIN) -> Request:
    """Lay a blackhole route."""
    body = _route_body(prefix, metric, None, table)
    return Request(NEW_ROUTE, REQUEST | ACK | CREATE | EXCLUSIVE, body)


def remove_guard(prefix: IPNetwork, metric: int, table: int = TABLE_MAIN) -> Request:
    """Remove a blackhole route that `add_guard` made."""
    return Request(DELETE_ROUTE, REQUEST | ACK, _route_body(prefix, metric, None, table))


def get_routes(family: int, table: int = TABLE_MAIN) -> Request:
    """Ask for Scope's routes of one family (AF_INET, AF_INET6) in a table."""
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, table, PROTOCOL, 0, 0, 0)
    return Request(GET_ROUTE, REQUEST | DUMP, body)


def parse_route(reply: Reply, table: int = TABLE_MAIN) -> Route | None:
    """Read one route; None for what Scope did not make. Kernels before 4.20 send more than was asked for."""
    family, length, _, _, said, protocol, _, kind = _unpack("=BBBBBBBB", reply.body)
    found = dict(attributes(reply.body[12:]))
    if protocol != PROTOCOL or _number("=I", found.get(_RTA_TABLE), said) != table:
        return None
    if kind not in {_UNICAST, _BLACKHOLE} or family not in {AF_INET, AF_INET6}:
        return None
    raw = found.get(_RTA_DESTINATION, bytes(4 if family == AF_INET else 16))
    index = _number("=I", found.get(_RTA_OUTPUT)) if kind == _UNICAST else None
    return Route(_network(raw, length), index, _number("=I", found.get(_RTA_PRIORITY)))


def get_all_routes(family: int) -> Request:
    """Ask for the routes of one family in the main table, whoever made them."""
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, TABLE_MAIN, 0, 0, 0, 0)
    return Request(GET_ROUTE, REQUEST | DUMP, body)


def parse_any_route(reply: Reply) -> ForeignRoute | None:
    """Read one unicast route of the main table; None for another, and for those that Scope made."""
    family, length, _, _, said, protocol, _, kind = _unpack("=BBBBBBBB", reply.body)
    found = dict(attributes(reply.body[12:]))
    if protocol == PROTOCOL or _number("=I", found.get(_RTA_TABLE), said) != TABLE_MAIN:
        return None
    if kind != _UNICAST or family not in {AF_INET, AF_INET6}:
        return None
    raw = found.get(_RTA_DESTINATION, bytes(4 if family == AF_INET else 16))
    return ForeignRoute(_network(raw, length), _number("=I", found.get(_RTA_OUTPUT)), protocol)


def add_rule(family: int, *, table: int, priority: int) -> Request:
    """Have all packets of a family look into a table; refused with EEXIST where that rule is there."""
    return Request(NEW_RULE, REQUEST | ACK | CREATE | EXCLUSIVE, _rule_body(family, table, priority))


def remove_rule(family: int, *, table: int, priority: int) -> Request:
    """Remove a rule that `add_rule` made."""
    return Request(DELETE_RULE, REQUEST | ACK, _rule_body(family, table, priority))


def get_rules(family: int) -> Request:
    """Ask for the rules of one family."""
    return Request(GET_RULE, REQUEST | DUMP, struct.pack("=BBBBBBBBI", family, *[0] * 8))


def is_rule(reply: Reply, *, table: int, priority: int) -> bool:
    """Whether this is a rule that `add_rule` made."""
    said = _unpack("=BBBBBBBB", reply.body)[4]
    found = dict(attributes(reply.body[12:]))
    return (
        _number("=I", found.get(_FRA_TABLE), said) == table
        and _number("=I", found.get(_FRA_PRIORITY)) == priority
        and _number("=B", found.get(_FRA_PROTOCOL)) == PROTOCOL
    )


def guard_metric(name: str) -> int:
    """The metric of the guards that belong to the device of that name."""
    value = 0
    for byte in name.encode():
        value = (value * 31 + byte) & 0xFFFF
    return GUARD_METRIC + value


# --- bodies and attributes ----------------------------------------------------------------------------------


def _link_body(index: int = 0, *, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", AF_UNSPEC, 0, index, flags, change)


def _address_body(index: int, address: IPInterface) -> bytes:
    family = AF_INET if address.version == 4 else AF_INET6
    raw = address.ip.packed
    flags = _NO_PREFIX_ROUTE | (_NO_DUPLICATE_DETECTION if family == AF_INET6 else 0)
    return (
        struct.pack("=BBBBI", family, address.network.prefixlen, 0, _SCOPE_UNIVERSE, index)
        + attribute(_IFA_LOCAL, raw)
        + attribute(_IFA_ADDRESS, raw)
        + attribute(_IFA_FLAGS, struct.pack("=I", flags))
    )


def _rule_body(family: int, table: int, priority: int) -> bytes:
    return (
        struct.pack("=BBBBBBBBI", family, 0, 0, 0, table, 0, 0, _TO_TABLE, 0)
        + attribute(_FRA_PRIORITY, struct.pack("=I", priority))
        + attribute(_FRA_PROTOCOL, struct.pack("=B", PROTOCOL))
    )


def _route_body(prefix: IPNetwork, metric: int, index: int | None, table: int) -> bytes:
    family = AF_INET if prefix.version == 4 else AF_INET6
    kind = _BLACKHOLE if index is None else _UNICAST
    scope = _SCOPE_LINK if index is not None and family == AF_INET else _SCOPE_UNIVERSE
    body = struct.pack("=BBBBBBBBI", family, prefix.prefixlen, 0, 0, table, PROTOCOL, scope, kind, 0)
    body += attribute(_RTA_DESTINATION, prefix.network_address.packed)
    body += attribute(_RTA_PRIORITY, struct.pack("=I", metric))
    return body if index is None else body + attribute(_RTA_OUTPUT, struct.pack("=I", index))


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split into (type, data). Raises NetlinkError."""
    offset = 0
    while len(data) - offset >= 4:
        length, kind = struct.unpack_from("=HH", data, offset)
        if not 4 <= length <= len(data) - offset:
            raise NetlinkError(f"an attribute of {length} bytes where {len(data) - offset} are left")
        yield kind & _TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _unpack(layout: str, data: bytes) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data)
    except struct.error:
        raise NetlinkError(f"a body of {len(data)} bytes is cut off") from None


def _number(layout: str, data: bytes | None, default: int = 0) -> int:
    if data is None:
        return default
    return _unpack(layout, data)[0]


def _network(raw: bytes, length: int) -> IPNetwork:
    try:
        return IPv4Network((raw, length)) if len(raw) == 4 else IPv6Network((raw, length))
    except ValueError as error:
        raise NetlinkError(f"a prefix cannot be read: {error}") from None


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _string(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")
