"""The rules by which a hub's kernel relays: what is granted as text for `nft`. Pure.

One table for each mesh device. It holds two kinds of things. What is *granted* stands in maps that only the
agent writes: which token belongs to which side, whose other side is whose, and at which port it is reached.
What is *learned* stands in maps that only the kernel writes: a knock with the right token at the right port
says where its side is, and at which address of ours it wants to be spoken to. Both are kept apart, so that
what is granted and the rules themselves can be written anew without forgetting where anybody is.

A datagram that comes from where a side last knocked, to its port, and looks like WireGuard's or like a probe,
goes on to where the other side last knocked, from that one's port and from the address at which it knocked.
A datagram that the rules cannot serve stays as it came, its mark included, for whoever else it is meant for:
connections that the machine masquerades may use the same ports, and the forwarder listens there. Therefore

- nothing is written into a datagram before it is known to be one of ours; the look-ups that come before need
  a register, and the only one that rules have is the mark. It is borrowed from datagrams that have none, and
  taken back. Who marks packets before us gets them served by the forwarder.
- connection tracking is told last to leave a datagram alone, and only one that is relayed.
- what comes over loopback is left to the forwarder: it is of peers that TCP carries, and a datagram that left
  for the world with one of their loopback addresses, or came back with one, would be dropped as a martian.
- fragments are left to the forwarder, whose socket gets them whole; only the first would bear a port. Where
  the machine tracks connections they are whole before they come here.
- the source address is written on the way out: earlier, it would be one of ours that comes from outside, and
  the kernel would drop it. Until then a mark says for which side a datagram is.

A knock that tells nothing new only winds the clocks of what is known. One that does takes away where the side
was: nothing passes from there any more, and a side does not fill the maps by moving. The kernel takes away
only what fields of the packet at hand name, so for a moment the knock is dressed as the one before it. (Two
knocks that two processors take at one moment may leave both places, until the unused one expires.) Knocks of
one side are counted, and those beyond a few a second do nothing: the most that a side can do is to move
itself. Knocks with a wrong token touch no map at all.

What was learned is believed for MAPPING_VALID. Tokens expire by themselves, too: an agent that is dead for
longer than a grant lasts leaves nothing open. The counters count what each side was sent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from scope.model import Family, RelayLimits
from scope.relay import KNOCK_MAGIC, MAPPING_VALID, MIN_WIREGUARD, WIREGUARD_TYPES, Grant, Grants, Side
from scope.wire import MAGIC, MIN_DATAGRAM

MAX_ID: Final = 0x3FFF  # fourteen bits of the mark that nobody else uses
_MARK: Final = 0x53000000
# The bits of an id within the mark. In between lie those that other programs of the same machine act on:
# 8 to 11 Cilium, 14 and 15 kube-proxy, 16 to 19 Calico and Tailscale.
_ID_BITS: Final = ((0x00FF, 0), (0x0300, 4), (0x3C00, 10))
_ID_MASK: Final = 0x00F030FF
_MARK_MASK: Final = 0xFFFFFFFF & ~_ID_MASK

# Of one side: four addresses of ours, and a network that changes. Each may take away what the one before it
# said, which the kernel clears away once a second; and beyond sixteen that wait for it, it can note no new
# one.
_KNOCKS_PER_SECOND, _KNOCK_BURST = 3, 10
# Seconds after which a pair's pace starts anew, many times its burst; and it is over its limit no more.
_PACE_FORGOTTEN: Final = 60
_LEARNED_SIZE: Final = 32768  # every side there can be, and as many that the kernel has yet to clear away
_MOVING_SIZE: Final = 16384  # every side there can be
_MOVING_VALID: Final = 5  # seconds; it is needed within one packet
_KEPT_LONGER: Final = 10  # seconds: what is looked up last is the last to expire
_AGENT_FIRST: Final = 60  # seconds by which a token outlasts its grant: a living agent takes it away
# The kernel's arithmetic on a limit overflows beyond 18 GB/s together with its burst.
_MAX_RATE: Final = 12_500_000_000
_MIN_BURST: Final = 1 << 18  # bytes: WireGuard sends what it has encrypted as a batch of 128
_UDP_HEADER: Final = 8
_HOOKS: Final = {
    "in": " { type filter hook prerouting priority raw; policy accept; }",
    "out": " { type filter hook postrouting priority 300; policy accept; }",
}
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class _Layer:
    """How a family is spoken of. `tag` tells its maps and chains from the other's."""

    tag: str
    name: str
    type: str
    whole: str  # what a datagram is that is no fragment

    @property
    def place(self) -> str:
        """Where a datagram comes from, and where it came to."""
        return f"{self.name} saddr . udp sport . {self.name} daddr . udp dport"

    @property
    def known(self) -> dict[str, str]:
        """What is known of a side, by map: where it is, and which address of ours it spoke to."""
        return {
            f"address{self.tag}": f"{self.name} saddr",
            f"source{self.tag}": "udp sport",
            f"own{self.tag}": f"{self.name} daddr",
        }


_LAYERS: Final = {
    Family.IPV4: _Layer("4", "ip", "ipv4_addr", "meta nfproto ipv4 ip frag-off & 0x3fff 0"),
    Family.IPV6: _Layer("6", "ip6", "ipv6_addr", "meta nfproto ipv6 exthdr frag missing"),
}


def table(device: str) -> str:
    """The name of a device's table, in the family `inet`."""
    name = device if _PLAIN_NAME.fullmatch(device) else device.encode().hex()
    return f"scope_relay_{name}"


def load(
    device: str, grants: Grants, *, wall: float, seed: int, families: Collection[Family] = tuple(Family)
) -> str:
    """Everything, in place of what was there, in one step. What was learned stays.

    `wall` is the wall clock: grants that have expired are left out. `seed`, 32 bits, is secret and the same
    each time. What comes over another family than `families` is left as it is. Raises ValueError where ids
    are none of a pair.
    """
    name = table(device)
    paced = f"type mark; {_kept(_PACE_FORGOTTEN)}"
    maps = (*_GRANTED, *_learned(), *(("set", each, paced) for each in _PACED))
    chains = _ways(grants, families)
    for layer in _LAYERS.values():
        chains |= _family_chains(layer, grants.limits, seed=seed)
    return "".join(
        (
            f"add table inet {name}\n",
            *(f"add {kind} inet {name} {each} {{ {definition} }}\n" for kind, each, definition in maps),
            *(f"add chain inet {name} {each}{_HOOKS.get(each, '')}\n" for each in chains),
            *(f"flush chain inet {name} {each}\n" for each in chains),
            *(f"flush {kind} inet {name} {each}\n" for kind, each, _ in _GRANTED),
            *(f"flush set inet {name} {each}\n" for each in _PACED),  # they would keep an earlier limit
            *(f"add rule inet {name} {each} {rule}\n" for each, rules in chains.items() for rule in rules),
            _elements("add", device, grants.grants, wall=wall),
        )
    )


def change(device: str, before: Grants, after: Grants, *, wall: float) -> str:
    """From one state to the next, where ports and limits are the same: the work of what differs alone.

    A grant that is renewed gets a later end. "" where nothing differs.
    """
    had = {grant.sides[0].id: grant for grant in before.grants}
    has = {grant.sides[0].id: grant for grant in after.grants}
    differ = [
        (had.get(key), has.get(key)) for key in had.keys() | has.keys() if had.get(key) is not has.get(key)
    ]
    renewed = [new for was, new in differ if was and new and was.sides == new.sides and was != new]
    gone = [was for was, new in differ if was and (not new or was.sides != new.sides)]
    new = [new for was, new in differ if new and (not was or was.sides != new.sides)]
    return (
        _elements("delete", device, gone, wall=None)
        + _tokens("delete", device, renewed, wall=None)
        + _tokens("add", device, renewed, wall=wall)
        + _elements("add", device, new, wall=wall)
    )


def delete(device: str) -> str:
    """Remove the table, whether or not there is one."""
    return f"add table inet {table(device)}\ndelete table inet {table(device)}\n"


def is_change(before: Grants, after: Grants) -> bool:
    """Whether `change` leads from one to the other."""
    return (before.first_port, before.last_port, before.limits) == (
        after.first_port,
        after.last_port,
        after.limits,
    )


def mark_of(side_id: int) -> int:
    """The mark of what is on its way to a side. Raises ValueError."""
    if not 1 <= side_id <= MAX_ID:
        raise ValueError(f"the id of a side is 1 to {MAX_ID}, not {side_id}")
    return _MARK | sum((side_id & bits) << shift for bits, shift in _ID_BITS)


# --- what is granted ----------------------------------------------------------------------------------------

_KNOCKED: Final = "udp dport . @th,96,64"  # what a knock says: port and token
_SIDE: Final = f"meta mark set {_KNOCKED} map @token"
_OTHER: Final = "meta mark set meta mark xor 1"
_PAIR: Final = "meta mark & 0xfffffffe"
_GRANTED: Final = (
    ("map", "token", f"typeof {_KNOCKED} : meta mark; flags timeout;"),
    ("set", "sides", f"typeof {_KNOCKED} . meta mark;"),  # a side's token, with the mark of the other one
    ("map", "port", "type mark : inet_service; counter;"),
)


def _elements(verb: str, device: str, grants: Iterable[Grant], *, wall: float | None) -> str:
    """All elements of grants; `wall` None: they are to go, and how long they would last is no matter."""
    grants = [grant for grant in grants if wall is None or grant.expires > wall]
    sides, ports = [], []
    for grant in grants:
        first, second = grant.sides
        if first.id ^ second.id != 1:
            raise ValueError(
                f"the ids of a pair differ in their last bit alone, not as {first.id} and {second.id}"
            )
        for side, other in ((first, second), (second, first)):
            sides.append(f"{_knocked(side)} . {mark_of(other.id):#010x}")
            ports.append(f"{mark_of(side.id):#010x} : {side.port}")
    return (
        _tokens(verb, device, grants, wall=wall)
        + _statement(verb, device, "sides", sides)
        + _statement(verb, device, "port", ports)
    )


def _tokens(verb: str, device: str, grants: Iterable[Grant], *, wall: float | None) -> str:
    elements = [
        _knocked(side) + ("" if wall is None else _lasting(grant, wall)) + f" : {mark_of(side.id):#010x}"
        for grant in grants
        for side in grant.sides
    ]
    return _statement(verb, device, "token", elements)


def _statement(verb: str, device: str, name: str, elements: Sequence[str]) -> str:
    return f"{verb} element inet {table(device)} {name} {{ {', '.join(elements)} }}\n" if elements else ""


def _knocked(side: Side) -> str:
    return f"{side.port} . 0x{side.token.hex()}"


def _lasting(grant: Grant, wall: float) -> str:
    return f" timeout {max(1, round(grant.expires - wall)) + _AGENT_FIRST}s"


# --- what is learned ----------------------------------------------------------------------------------------


def _learned() -> Iterable[tuple[str, str, str]]:
    for family, layer in _LAYERS.items():
        place = f"{layer.type} . inet_service . {layer.type} . inet_service"
        types = dict(zip(layer.known, (layer.type, "inet_service", layer.type), strict=True))
        if family is Family.IPV4:
            yield "map", "place4", f"type {place} : mark; {_kept(MAPPING_VALID)}"
        else:
            yield "map", "place6", f"type mark : mark; {_kept(MAPPING_VALID)}"
            yield "set", "exact6", f"type {place} . mark; {_kept(MAPPING_VALID)}"
        for name, type_ in types.items():
            longer = 0.0 if name.startswith("address") else _KEPT_LONGER
            yield "map", name, f"type mark : {type_}; {_kept(MAPPING_VALID + longer)}"
        for name, type_ in types.items():
            yield "map", f"new_{name}", f"type mark : {type_}; {_kept(_MOVING_VALID, size=_MOVING_SIZE)}"


# By pair and by side: how much passes; pairs that were over a limit of late.
_PACED: Final = ("pace", "knocks", "capped")


def _kept(seconds: float, *, size: int = _LEARNED_SIZE) -> str:
    return f"flags dynamic,timeout; timeout {round(seconds)}s; size {size};"


# --- the rules ----------------------------------------------------------------------------------------------


def _ways(grants: Grants, families: Collection[Family]) -> dict[str, list[str]]:
    ports = f"{grants.first_port}-{grants.last_port}"
    relayed = f"meta mark & {_MARK_MASK:#010x} == {_MARK:#010x} meta l4proto udp"
    return {
        "in": [
            f'meta mark 0 iifname != "lo" udp dport {ports} {layer.whole} goto in{layer.tag}'
            for family, layer in _LAYERS.items()
            if family in families
        ],
        "out": [
            f"{relayed} {layer.name} saddr set meta mark map @own{layer.tag} meta mark set 0"
            for layer in _LAYERS.values()
        ],
    }


def _family_chains(layer: _Layer, limits: RelayLimits, *, seed: int) -> dict[str, list[str]]:
    tag, place, known = layer.tag, layer.place, layer.known
    words = ", ".join(f"0x{number.to_bytes(4, 'little').hex()}" for number in WIREGUARD_TYPES)
    look, forget, learn = _places6(place, seed) if layer.tag == "6" else _places4(place)
    return {
        f"in{tag}": [
            f"udp length >= {_UDP_HEADER + MIN_WIREGUARD} @th,64,32 {{ {words} }} goto relay{tag}",
            f"udp length >= {_UDP_HEADER + MIN_DATAGRAM} @th,64,32 0x{MAGIC.hex()} goto relay{tag}",
            f"@th,64,32 0x{KNOCK_MAGIC.hex()} fib daddr type local goto knock{tag}",
        ],
        f"relay{tag}": [*look[:-1], f"{look[-1]} goto carry{tag}", "meta mark set 0"],
        f"carry{tag}": [
            *_limit(limits),
            f"{layer.name} daddr set meta mark map @address{tag} udp dport set meta mark map @source{tag} "
            "udp sport set meta mark map @port notrack accept",
            # The other side has not knocked: as it came. Else somebody took the grant away just now.
            "fib daddr type local meta mark set 0 accept",
            "drop",
        ],
        f"knock{tag}": [
            f"{_SIDE} update @knocks {{ meta mark limit rate {_KNOCKS_PER_SECOND}/second "
            f"burst {_KNOCK_BURST} packets }} goto side{tag}",
            "meta mark set 0",
        ],
        f"side{tag}": [
            *look[:-1],
            f"{look[-1]} {_KNOCKED} . meta mark @sides goto again{tag}",
            # An update alone keeps the value that an element has.
            f"{_SIDE} {_each('delete', known, prefix='new_')} {_each('update', known, prefix='new_')} "
            f"goto moved{tag}",
            "meta mark set 0",
        ],
        f"moved{tag}": [
            f"{_dress(known)} {_OTHER} {forget}",
            f"{_SIDE} {_dress(known, prefix='new_')}",
            _each("delete", known),
            f"{_OTHER} {forget}",
            f"goto again{tag}",
        ],
        f"again{tag}": [f"{_SIDE} {_each('update', known)}", f"{_OTHER} {learn}", "meta mark set 0"],
    }


def _places4(place: str) -> tuple[list[str], str, str]:
    """Rules that turn the place of a datagram into the mark of whom it is for; to forget it; to learn it."""
    return (
        [f"meta mark set {place} map @place4"],
        f"delete @place4 {{ {place} : meta mark }}",
        f"update @place4 {{ {place} : meta mark }}",
    )


def _places6(place: str, seed: int) -> tuple[list[str], str, str]:
    """The same, over a hash: nft 1.0.6 fails at rules that write to a map by a key of more than 16 bytes.

    The set tells places apart that have one hash.
    """
    hashed = f"jhash {place} mod 4294967295 seed {seed:#010x}"
    return (
        [f"meta mark set {hashed}", f"meta mark set meta mark map @place6 {place} . meta mark @exact6"],
        f"delete @place6 {{ {hashed} : meta mark }} delete @exact6 {{ {place} . meta mark }}",
        f"update @place6 {{ {hashed} : meta mark }} update @exact6 {{ {place} . meta mark }}",
    )


def _each(verb: str, known: dict[str, str], *, prefix: str = "") -> str:
    return " ".join(f"{verb} @{prefix}{name} {{ meta mark : {value} }}" for name, value in known.items())


def _dress(known: dict[str, str], *, prefix: str = "") -> str:
    return " ".join(f"{value} set meta mark map @{prefix}{name}" for name, value in known.items())


def _limit(limits: RelayLimits) -> Iterable[str]:
    """What is over a limit is dropped, and its pair noted. Bytes are those of IP packets."""
    dropped = f"update @capped {{ {_PAIR} }} drop"
    if limits.total:
        yield f"{_over(limits.total)} {dropped}"
    if limits.pair:
        yield f"update @pace {{ {_PAIR} {_over(limits.pair)} }} {dropped}"


def _over(rate: int) -> str:
    rate = min(rate, _MAX_RATE)
    return f"limit rate over {rate} bytes/second burst {max(_MIN_BURST, rate // 8)} bytes"
