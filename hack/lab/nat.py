"""The kinds of NAT, and the nftables text that makes a router behave like each one.

Pure: `router_rules` returns one atomic nftables script, loading it is someone else's business. A
router's interfaces are `wan` (towards the internet) and `lan` (its bridge, or the customer's side
of a carrier). Loading a script again forgets all that its maps had learned.

Where nothing else is said a mapping keeps the machine's own port, as Linux routers do, and is the
same towards every destination. The cone kinds remember each mapping in a map that is filled after
source NAT has chosen the port; arriving datagrams are looked up in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network


class Nat(Enum):
    """What stands between a site's machines and the internet. The value is its name for people."""

    NONE = "none"
    """Public addresses of both families on the machines themselves, no firewall."""
    FULL_CONE = "full cone"
    """One mapping for all destinations; anyone may send to it."""
    ADDRESS_RESTRICTED = "address-restricted"
    """One mapping for all destinations; addresses the machine has sent to may answer from any port."""
    PORT_RESTRICTED = "port-restricted"
    """One mapping for all destinations; only endpoints the machine has sent to may answer."""
    PORT_RESTRICTED_OPEN_INPUT = "port-restricted, open input"
    """The same, but the router itself takes unsolicited datagrams: one that comes before the machine
    sends occupies the mapping's port towards that sender, and the machine's flow moves to another."""
    SYMMETRIC = "symmetric"
    """A fresh random port for every destination; only that destination may answer."""
    CGNAT = "carrier-grade"
    """Two NATs in a row: a port-restricted home router behind a port-restricted carrier on 100.64/10."""
    HAIRPIN = "full cone with hairpin"
    """Full cone, and machines of the site reach each other through the public endpoint too."""
    IPV6_ONLY = "IPv6 only"
    """No IPv4 at all; a stateful firewall refuses what was not asked for."""
    UDP_BLOCKED = "UDP blocked"
    """TCP passes through a port-restricted NAT, UDP does not leave or enter."""


# The kernel's own for a UDP flow with answers (nf_conntrack_udp_timeout_stream).
MAPPING_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class RouterRules:
    """What `router_rules` needs to know: `public` and `lan` are None where there is no IPv4.

    `ports` is the inclusive range of external UDP ports, None to keep the machines' own.
    `mapping_timeout_s` is how long a cone mapping lives without an outgoing datagram.
    """

    nat: Nat
    public: IPv4Address | None
    lan: IPv4Network | None
    ports: tuple[int, int] | None = None
    mapping_timeout_s: int = MAPPING_TIMEOUT_S


# Outside the ephemeral range (32768-60999) and every port people choose, so a machine's own port is
# never inside and a rebinding always changes it; disjoint, so the next one changes it again.
REBIND_PORTS = ((61000, 62999), (63000, 64999))
# Where a cone NAT puts a machine whose own port another machine of the site already holds.
CLASH_PORTS = (65000, 65535)

_TABLES = ("ip lab_nat", "inet lab_filter")
_CONES = (Nat.FULL_CONE, Nat.ADDRESS_RESTRICTED, Nat.HAIRPIN)
# Far more mappings than a lab makes; nftables wants a bound.
_MAP_SIZE = 65536


def rebind_ports(generation: int) -> tuple[int, int] | None:
    """The external port range after so many rebindings; None (ports are kept) before the first."""
    return REBIND_PORTS[(generation - 1) % len(REBIND_PORTS)] if generation else None


def router_rules(rules: RouterRules) -> str:
    """An nftables script that replaces whatever NAT and firewall the router had, in one transaction."""
    forget = "".join(f"table {table}\ndelete table {table}\n" for table in _TABLES)
    return forget + _nat_table(rules) + _filter_table(rules)


def udp_block(*, blocked: bool) -> str:
    """A script that stops all UDP through the router, both ways and silently, or lets it pass again."""
    script = "table inet lab_block\ndelete table inet lab_block\n"
    if not blocked:
        return script
    return script + _table(
        "inet lab_block",
        [_chain("forward", "type filter hook forward priority -10; policy accept;", _UDP_BLOCK)],
    )


_UDP_BLOCK = ['iifname "wan" meta l4proto udp drop', 'oifname "wan" meta l4proto udp drop']


def _nat_table(rules: RouterRules) -> str:
    if rules.public is None or rules.nat in (Nat.NONE, Nat.IPV6_ONLY):
        return ""
    if rules.nat in _CONES:
        return _table("ip lab_nat", _cone(rules))
    to_ports = f" to :{rules.ports[0]}-{rules.ports[1]}" if rules.ports else ""
    random = " fully-random" if rules.nat is Nat.SYMMETRIC else ""
    source_nat = [f'oifname "wan" meta l4proto udp masquerade{to_ports}{random}', 'oifname "wan" masquerade']
    return _table("ip lab_nat", [_chain("source", _SOURCE_HOOK, source_nat)])


_SOURCE_HOOK = "type nat hook postrouting priority srcnat; policy accept;"


def _cone(rules: RouterRules) -> list[str]:
    public, timeout = rules.public, _timeout(rules)
    to_mapped = f"ip daddr {public} meta l4proto udp dnat ip to udp dport map @mapped"
    arriving = [f'iifname "wan" {to_mapped}']
    # Two flows of one machine share its port; a second machine on the same port gets one of its own,
    # which the kernel then keeps for all of that machine's destinations.
    own_port = f"snat ip to {public}"
    clash = f"snat ip to {public}:{CLASH_PORTS[0]}-{CLASH_PORTS[1]}"
    choose = (
        [f"meta l4proto udp snat ip to {public}:{rules.ports[0]}-{rules.ports[1]}"]
        if rules.ports
        else [
            f"meta l4proto udp ip saddr . udp sport . udp sport @owners {own_port}",
            f"meta l4proto udp udp sport @taken {clash}",
            f"meta l4proto udp {own_port}",
        ]
    )
    leaving = [f'oifname "wan" {rule}' for rule in choose] + ['oifname "wan" masquerade']
    if rules.nat is Nat.HAIRPIN:
        arriving.append(f'iifname "lan" {to_mapped}')
        leaving = [f'ip saddr {rules.lan} oifname "lan" ct status dnat {rule}' for rule in choose] + leaving
    learnt = f"ct direction original ct status snat meta l4proto udp ip saddr {public}"
    inside = "ct original ip saddr . ct original proto-src"
    return [
        f" map mapped {{ type inet_service : ipv4_addr . inet_service; {timeout} }}",
        f" set taken {{ type inet_service; {timeout} }}",
        f" set owners {{ type ipv4_addr . inet_service . inet_service; {timeout} }}",
        _chain("arriving", "type nat hook prerouting priority dstnat; policy accept;", arriving),
        _chain("source", _SOURCE_HOOK, leaving),
        _chain(
            "learn",
            "type filter hook postrouting priority 150; policy accept;",
            [
                f"{learnt} update @mapped {{ udp sport : {inside} }}",
                f"{learnt} update @taken {{ udp sport }}",
                f"{learnt} update @owners {{ {inside} . udp sport }}",
            ],
        ),
    ]


def _filter_table(rules: RouterRules) -> str:
    if rules.nat is Nat.NONE:
        return ""
    parts: list[str] = []
    forward: list[str] = []
    if rules.nat is Nat.UDP_BLOCKED:
        forward += _UDP_BLOCK
    if rules.nat is Nat.ADDRESS_RESTRICTED:
        parts.append(f" set contacted {{ type ipv4_addr . inet_service . ipv4_addr; {_timeout(rules)} }}")
        forward += [
            'oifname "wan" meta nfproto ipv4 update @contacted { ip saddr . udp sport . ip daddr }',
            'iifname "wan" meta nfproto ipv4 ct state established,related accept',
            'iifname "wan" meta l4proto udp ip daddr . udp dport . ip saddr @contacted accept',
            'iifname "wan" meta nfproto ipv4 drop',
        ]
    forward += [
        'iifname "wan" meta nfproto ipv6 ct state established,related accept',
        'iifname "wan" meta nfproto ipv6 drop',
    ]
    parts.append(_chain("forward", "type filter hook forward priority filter; policy accept;", forward))
    if rules.nat is not Nat.PORT_RESTRICTED_OPEN_INPUT:
        # Without it an unsolicited datagram confirms a conntrack entry that takes the port.
        refuse = ['iifname "wan" ct state new,invalid drop']
        parts.append(_chain("input", "type filter hook input priority filter; policy accept;", refuse))
    return _table("inet lab_filter", parts)


def _timeout(rules: RouterRules) -> str:
    return f"flags dynamic,timeout; timeout {rules.mapping_timeout_s}s; size {_MAP_SIZE};"


def _table(name: str, parts: list[str]) -> str:
    return f"table {name} {{\n" + "\n".join(parts) + "\n}\n"


def _chain(name: str, hook: str, rules: list[str]) -> str:
    return "\n".join([f" chain {name} {{", f"  {hook}", *(f"  {rule}" for rule in rules), " }"])
