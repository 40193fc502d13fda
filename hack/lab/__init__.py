"""An internet in network namespaces: sites behind every kind of NAT, with machines in them.

    with Lab(delay_ms=10) as lab:                    # 40 ms round trip between any two sites
        berlin = lab.site("berlin", nat=Nat.PORT_RESTRICTED)
        laptop = berlin.machine("laptop")
        registry = lab.server("registry")            # straight on the internet, IPv4 and IPv6
        laptop.run(["ping", "-c1", str(registry.ipv4)])

Tests, demo and benchmarks build on it alike. It needs Linux, root, iproute2, nftables and
util-linux, and touches nothing outside the namespaces it makes, save `/run/netns` and
`/run/scope-lab`.

    nat      the kinds of NAT and the nftables text that makes a router behave like each: pure
    plan     who gets which address: pure
    grid     which pairs of kinds can be direct, and why the others cannot: pure
    netns    entering, configuring and removing network namespaces
    shim     a process of its own that delays, jitters and loses frames between pairs of interfaces
    uplinks  starting and steering that process
    hosts    machines and servers: their processes, sockets and private directories
    internet Lab and Site: the whole put together
"""

from lab.grid import GRID_KINDS, Place, place_reason, reason
from lab.hosts import Host
from lab.internet import Lab, Machine, Server, Site, Traffic
from lab.nat import Nat
from lab.netns import LabError

__all__ = [
    "GRID_KINDS",
    "Host",
    "Lab",
    "LabError",
    "Machine",
    "Nat",
    "Place",
    "Server",
    "Site",
    "Traffic",
    "place_reason",
    "reason",
]
