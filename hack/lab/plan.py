"""Who gets which address in a lab: pure, and the same for the same index every time.

    198.51.100.N          the public side of site N's router (or of its carrier)
    203.0.113.N           server N
    192.0.2.1             the internet's end of every uplink
    198.18.N.0/24         machines of a site without NAT
    10.N.0.0/24           machines of a site with NAT
    100.64.N.0/24         between a carrier and the home router behind it
    2001:db8:N::/48       a site; its LAN is the first /64
    2001:db8:ffff:N::1    server N

All of it is reserved for documentation, benchmarks or private use, so a packet that strayed outside
its namespace would still reach nobody. In each LAN the router is number 1 and machines start at 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from lab.nat import Nat

CORE_IPV4 = IPv4Address("192.0.2.1")
CORE_IPV6 = IPv6Address("2001:db8::1")
# Both ends of every link between routers use the same pair: such a link has no third party on it.
UPSTREAM_LINK_LOCAL = IPv6Address("fe80::1")
DOWNSTREAM_LINK_LOCAL = IPv6Address("fe80::2")

# One octet numbers sites and servers, and one numbers a LAN's machines.
MAX_INDEX = 250
MAX_MACHINES = 200
_FIRST_MACHINE = 10


@dataclass(frozen=True, slots=True)
class SitePlan:
    """A site's addresses. A family the site does not have is None throughout."""

    public_ipv4: IPv4Address | None
    lan_ipv4: IPv4Network | None
    carrier_ipv4: IPv4Network | None
    prefix_ipv6: IPv6Network | None
    lan_ipv6: IPv6Network | None

    def router_ipv4(self) -> IPv4Address | None:
        return self.lan_ipv4[1] if self.lan_ipv4 else None

    def router_ipv6(self) -> IPv6Address | None:
        return self.lan_ipv6[1] if self.lan_ipv6 else None

    def machine_ipv4(self, number: int) -> IPv4Address | None:
        """The IPv4 address of the site's machine `number`, counted from 0."""
        return self.lan_ipv4[_FIRST_MACHINE + number] if self.lan_ipv4 else None

    def machine_ipv6(self, number: int) -> IPv6Address | None:
        """The IPv6 address of the site's machine `number`, counted from 0."""
        return self.lan_ipv6[_FIRST_MACHINE + number] if self.lan_ipv6 else None


def has_ipv6(nat: Nat, *, wanted: bool | None = None) -> bool:
    """Whether a site has IPv6: as wanted, else only where its kind is public or nothing but IPv6.

    ValueError for an IPv6-only site without IPv6.
    """
    if nat is Nat.IPV6_ONLY and wanted is False:
        raise ValueError(
            "an IPv6-only site without IPv6 has no addresses: leave ipv6 out, or choose another kind"
        )
    if wanted is not None:
        return wanted
    return nat in (Nat.NONE, Nat.IPV6_ONLY)


def site_plan(index: int, nat: Nat, *, ipv6: bool, lan: IPv4Network | None = None) -> SitePlan:
    """The addresses of site `index` (from 1). `lan` replaces the default private network."""
    _check(index)
    prefix = IPv6Network(f"2001:db8:{index:x}::/48") if ipv6 else None
    lan_ipv6 = next(prefix.subnets(new_prefix=64)) if prefix else None
    if nat is Nat.IPV6_ONLY:
        return SitePlan(None, None, None, prefix, lan_ipv6)
    default_lan = IPv4Network(f"198.18.{index}.0/24" if nat is Nat.NONE else f"10.{index}.0.0/24")
    carrier = IPv4Network(f"100.64.{index}.0/24") if nat is Nat.CGNAT else None
    return SitePlan(IPv4Address(f"198.51.100.{index}"), lan or default_lan, carrier, prefix, lan_ipv6)


def server_addresses(index: int) -> tuple[IPv4Address, IPv6Address]:
    """The two public addresses of server `index` (from 1)."""
    _check(index)
    return IPv4Address(f"203.0.113.{index}"), IPv6Address(f"2001:db8:ffff:{index:x}::1")


def _check(index: int) -> None:
    if not 1 <= index <= MAX_INDEX:
        raise ValueError(f"a lab has room for {MAX_INDEX} sites and as many servers, not for number {index}")
