"""Which pairs of places can have a direct path, and in words why the others cannot. Pure.

The one table that demo, tests and benchmarks judge by. What counts is how a kind's outermost NAT
maps and filters, not how it is built: two port-restricted NATs in a row are port-restricted, and
hairpin changes nothing between sites. Guessing ports (birthday punching) is not counted on:
a mesh has to allow it, and a guess may miss.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from lab.nat import Nat
from lab.plan import has_ipv6

# The kinds of the grid. Left out: hairpin, which differs only inside its own site.
GRID_KINDS = (
    Nat.NONE,
    Nat.FULL_CONE,
    Nat.ADDRESS_RESTRICTED,
    Nat.PORT_RESTRICTED,
    Nat.PORT_RESTRICTED_OPEN_INPUT,
    Nat.SYMMETRIC,
    Nat.CGNAT,
    Nat.IPV6_ONLY,
    Nat.UDP_BLOCKED,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine is: the site's name (or the server's), its kind, whether it has IPv6."""

    site: str
    nat: Nat
    ipv6: bool


def reason(a: Nat, b: Nat) -> str | None:
    """Why no direct path is possible between two sites of these kinds; None where one is."""
    return place_reason(Place("a", a, has_ipv6(a)), Place("b", b, has_ipv6(b)))


def place_reason(a: Place, b: Place) -> str | None:
    """Why no direct path is possible between two places; None where one is, as within one LAN."""
    if a.site == b.site:
        return None
    filters = {_Filter.of(a.nat), _Filter.of(b.nat)}
    if _Filter.NO_UDP in filters:
        return "no UDP passes at one of the sites"
    shared = _families(a) & _families(b)
    if not shared:
        return "one site has only IPv6 and the other only IPv4"
    if 6 in shared or _Filter.PER_DESTINATION not in filters:
        return None
    if filters == {_Filter.PER_DESTINATION}:
        return "both NATs are symmetric: each takes a port that the other side cannot know"
    if _Filter.BY_ENDPOINT in filters:
        return (
            "one NAT is symmetric and takes a port that the other side cannot know, "
            "and the other lets in only endpoints it has sent to"
        )
    return None


class _Filter(Enum):
    """What a site lets in, as far as its peers must care."""

    ANYONE = "anyone"
    BY_ADDRESS = "addresses sent to"
    BY_ENDPOINT = "endpoints sent to"
    PER_DESTINATION = "endpoints sent to, at a port of their own"
    NO_UDP = "no UDP"

    @staticmethod
    def of(nat: Nat) -> _Filter:
        match nat:
            case Nat.NONE | Nat.FULL_CONE | Nat.HAIRPIN:
                return _Filter.ANYONE
            case Nat.ADDRESS_RESTRICTED:
                return _Filter.BY_ADDRESS
            case Nat.PORT_RESTRICTED | Nat.PORT_RESTRICTED_OPEN_INPUT | Nat.CGNAT | Nat.IPV6_ONLY:
                return _Filter.BY_ENDPOINT
            case Nat.SYMMETRIC:
                return _Filter.PER_DESTINATION
            case Nat.UDP_BLOCKED:
                return _Filter.NO_UDP
        assert_never(nat)


def _families(place: Place) -> set[int]:
    ipv4 = set() if place.nat is Nat.IPV6_ONLY else {4}
    return ipv4 | ({6} if place.ipv6 else set())
