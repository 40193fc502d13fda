"""Who else leads to pods of our own cluster on this machine: their routes are left to them. Pure.

A network of a cluster leads to its pods by routes in the main table, whatever makes them. Ours are looked at
before those, so a prefix that has one there is not led into the mesh. Default routes lead everywhere and mean
no pods, nor do the two halves that some programs make of one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from scope.model import IPNetwork

_WIDEST: Final = {4: 8, 6: 16}  # as wide as a prefix of pods may be: a wider route is a default one
_PROTOCOLS: Final = {  # linux/rtnetlink.h
    2: "kernel",
    3: "boot",
    4: "static",
    9: "ra",
    11: "zebra",
    12: "bird",
    16: "dhcp",
    186: "bgp",
    187: "isis",
    188: "ospf",
    189: "rip",
    192: "eigrp",
}


@dataclass(frozen=True, slots=True)
class OwnedRoute:
    """A route of somebody else's; `device` is "" where there are several ways, `protocol` who made it."""

    prefix: IPNetwork
    device: str
    protocol: int


def owners(pods: Iterable[IPNetwork], routes: Iterable[OwnedRoute]) -> dict[IPNetwork, OwnedRoute]:
    """Which of these prefixes others lead to, whole, in part, or as a part of more; and by which route."""
    specific = [each for each in routes if each.prefix.prefixlen >= _WIDEST[each.prefix.version]]
    of = {each.prefix: each for each in specific}
    lengths = {version: {p.prefixlen for p in of if p.version == version} for version in (4, 6)}
    starts = sorted((each.prefix.version, int(each.prefix.network_address)) for each in specific)
    by_start = {(p.version, int(p.network_address)): route for p, route in of.items()}
    found: dict[IPNetwork, OwnedRoute] = {}
    for prefix in pods:
        wider = (
            of.get(prefix.supernet(new_prefix=length))
            for length in sorted(lengths[prefix.version], reverse=True)
            if length <= prefix.prefixlen
        )
        owner = next((route for route in wider if route is not None), None)
        if owner is None:
            at = bisect_left(starts, (prefix.version, int(prefix.network_address)))
            inside = at < len(starts) and starts[at] <= (prefix.version, int(prefix.broadcast_address))
            owner = by_start[starts[at]] if inside else None
        if owner is not None:
            found[prefix] = owner
    return found


def tell(owned: Mapping[IPNetwork, OwnedRoute]) -> str:
    """Who leads to pods of our own cluster, in words; "" for nobody."""
    if not owned:
        return ""
    prefix = min(owned, key=_order)
    route = owned[prefix]
    by = f"{route.device or 'several interfaces'} (protocol {_PROTOCOLS.get(route.protocol, route.protocol)})"
    more = f" and {len(owned) - 1} more" if len(owned) > 1 else ""
    return f"another network leads to {prefix}{more}, by {by}: pods of this cluster stay with it"


def _order(prefix: IPNetwork) -> tuple[int, IPv4Address | IPv6Address]:
    return prefix.version, prefix.network_address
