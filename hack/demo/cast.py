"""The mesh, sites and machines of the demo.

Chosen so that every kind of NAT is there, two machines share a LAN, IPv4 and IPv6 both carry paths, and some
pairs cannot be direct: behind a symmetric NAT towards a port-restricted one, without a family in common,
and where no UDP passes. Two machines without a NAT are hubs for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab import Nat


@dataclass(frozen=True, slots=True)
class Role:
    """A machine, and the site it starts at."""

    name: str
    site: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A site. `ipv6` None: only where its kind says so."""

    name: str
    nat: Nat
    ipv6: bool | None = None


MESH = "demo"
# Names of machines are at most five characters: they head the columns of the table.
SCENES = (
    Scene("frankfurt", Nat.NONE),
    Scene("vienna", Nat.NONE),
    Scene("berlin", Nat.FULL_CONE),
    Scene("lyon", Nat.ADDRESS_RESTRICTED),
    Scene("oslo", Nat.PORT_RESTRICTED),
    Scene("madrid", Nat.PORT_RESTRICTED, ipv6=True),
    Scene("hotel", Nat.SYMMETRIC),
    Scene("mobile", Nat.CGNAT, ipv6=True),
    Scene("village", Nat.IPV6_ONLY),
    Scene("bank", Nat.UDP_BLOCKED),
)
ROLES = (
    Role("web", "frankfurt"),
    Role("hub", "vienna"),
    Role("nas", "berlin"),
    Role("book", "lyon"),
    Role("desk", "oslo"),
    Role("tv", "oslo"),
    Role("work", "madrid"),
    Role("guest", "hotel"),
    Role("phone", "mobile"),
    Role("six", "village"),
    Role("till", "bank"),
)
HUBS = ("hub", "web")
ROAMER, ROAMS_TO = "book", "berlin"
REBOOTS = "oslo"
LEAVER = "tv"
NEWCOMER = Role("pad", "lyon")
# Where the registry is a cluster, all others are its Nodes: one of these is carried about, the other has no
# IPv4, by which alone the lab's API server is reached.
OFF_CLUSTER = frozenset({"phone", "six"})
