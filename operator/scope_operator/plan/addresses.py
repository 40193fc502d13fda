"""Which address a peer has inside its mesh: assigned once, kept for the peer's life, never given to two.

A peer's place in a prefix is the hash of the mesh's name and its own, and then the next free place (linear
probing), so a registry that is rebuilt from nothing gives nearly everyone the address they had; the address
that an agent says it holds is honoured when it is free, which covers the rest. Addresses that the peer has
stay while they lie in the mesh's prefixes: a widened prefix moves nobody.

`taken` maps every address in use to the name of its peer, so that one assignment costs the same in a mesh of
ten peers and of ten thousand. A removed peer's address is kept back for `HOLD` seconds: a peer that has not
yet heard of the removal still routes it to the removed key, and would send a newcomer's traffic there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

from scope.model import Addressing, Family, IPAddress, IPInterface, IPNetwork, Mesh, Peer
from scope_operator.plan.conditions import REMOVED

HOLD = 86400.0  # a peer that is away for longer than a day lists everything anew before it uses the mesh


@dataclass(frozen=True, slots=True)
class Assigned:
    """The addresses of a peer, IPv4 first, and the families in which none was left for it."""

    addresses: tuple[IPInterface, ...]
    exhausted: tuple[Family, ...] = ()


def assign_addresses(mesh: Mesh, peer: Peer, *, taken: Mapping[IPAddress, str]) -> Assigned:
    """The addresses of a peer that is not removed, one in each prefix of its mesh."""
    addresses: list[IPInterface] = []
    exhausted: list[Family] = []
    for prefix in _prefixes(mesh.spec.addressing):
        number = _address_in(prefix, mesh.meta.name, peer, taken)
        if number is None:
            exhausted.append(Family.IPV4 if prefix.version == 4 else Family.IPV6)
        elif isinstance(prefix, IPv4Network):
            addresses.append(IPv4Interface((number, prefix.prefixlen)))
        else:
            addresses.append(IPv6Interface((number, prefix.prefixlen)))
    return Assigned(tuple(addresses), tuple(exhausted))


def is_released(peer: Peer, *, wall: float) -> bool:
    """Whether a removed peer's addresses may be given to others."""
    removal = removed_at(peer)
    return removal is not None and wall >= removal + HOLD


def removed_at(peer: Peer) -> float | None:
    """Wall-clock time of a peer's removal; None for a member."""
    if peer.assignment.tombstone is None:
        return None
    times = (each.changed for each in peer.assignment.conditions if each.type == REMOVED)
    return next(times, peer.assignment.last_seen)


def _prefixes(addressing: Addressing) -> tuple[IPNetwork, ...]:
    return tuple(prefix for prefix in (addressing.ipv4, addressing.ipv6) if prefix is not None)


def _address_in(prefix: IPNetwork, mesh: str, peer: Peer, taken: Mapping[IPAddress, str]) -> int | None:
    usable, name = _usable(prefix), peer.meta.name
    present = (interface.ip for interface in peer.assignment.addresses)
    reported = peer.report.held_addresses if peer.report is not None else ()
    for address in (*present, *reported):
        fits = address.version == prefix.version and int(address) in usable
        if fits and taken.get(address, name) == name:
            return int(address)
    digest = hashlib.sha256(f"{mesh}\0{name}".encode()).digest()
    size = usable.stop - usable.start  # more than `len` can say, of an IPv6 prefix
    start = int.from_bytes(digest, "big") % size
    # Each step but the last meets an address in use, so there are no more steps than addresses in use.
    for step in range(min(size, len(taken) + 1)):
        number = usable.start + (start + step) % size
        if taken.get(_address(prefix, number), name) == name:
            return number
    return None


def _address(prefix: IPNetwork, number: int) -> IPAddress:
    return type(prefix.network_address)(number)


def _usable(prefix: IPNetwork) -> range:
    """The addresses, as numbers, that a peer may have.

    Not IPv4's network and broadcast address, and not IPv6's subnet-router anycast address (RFC 4291, section
    2.6.1), which is the prefix itself.
    """
    first = int(prefix.network_address)
    if isinstance(prefix, IPv6Network):
        return range(first + 1, first + prefix.num_addresses)
    return range(first + 1, first + prefix.num_addresses - 1)
