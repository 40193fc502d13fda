"""What the packet filter does for pods of other clusters, as text for `nft`. Pure.

Networks of clusters masquerade what leaves them, so a pod of another cluster would see the Node's address in
place of a pod's. Their rules are left alone: a chain in front of them gives the connection its own address as
the one to be translated to, and what was given an address once is not given another. It is so in both
directions, as some masquerade what comes from outside, too.

Pods believe in the MTU of their cluster. What they say of it as a TCP connection begins is cut to what fits
into the mesh: not every network lets the message through by which they would learn it later.

What is forwarded between pods and the mesh is counted before all chains of others and behind them: where it
comes and does not pass, one of those drops it (`wireguard/losing.py`).

Pods that others see by other addresses have them on the way: what comes from the mesh is turned to the pod's
own address before anything else looks at it, and what goes into the mesh is turned back behind all else.
Packet by packet, as a translation of connections would keep the cluster's own (of Services) from its turn. A
message of ICMP has the beginning of the packet in it that it is about, with an address to be turned, too.
`nft` has no words for a change there that keeps the checksum right: it makes chains, which `icmp.py` fills.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final

from scope.model import Family, IPNetwork, Translation
from scope_agent.wireguard.losing import CAME, FIRST, LAST, PASSED

_BEFORE_MASQUERADE: Final = 99  # linux/netfilter_ipv4.h: NF_IP_PRI_NAT_SRC is 100
_MANGLE: Final = -150
_BEFORE_ALL: Final = -300  # NF_IP_PRI_RAW: connections are known from -200 on
_AFTER_ALL: Final = 150  # behind NF_IP_PRI_NAT_SRC
_ICMP_HEADER: Final = 8  # bytes, of either ICMP, before the packet that a message is about
_ICMP_CHECKSUM: Final = 2
_ERRORS: Final = {
    4: "icmp type { destination-unreachable, time-exceeded, parameter-problem }",
    6: "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
}
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")
_VERSIONS: Final = {4: ("ip", 40), 6: ("ip6", 60)}  # nft's name; bytes of IP and TCP before the data


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """What is done here for pods: our own have the prefixes `offered`, those elsewhere `reached`.

    Of these `beside` are of our own cluster, and its own network may lead there. `mtu` is the mesh device's.
    `translated` are those of `offered` that others see as something else; those of `beside` see what is.
    """

    offered: frozenset[IPNetwork]
    reached: frozenset[IPNetwork]
    mtu: int
    beside: frozenset[IPNetwork] = frozenset()
    translated: frozenset[Translation] = frozenset()


class Way(enum.Enum):
    """Of a packet, seen from the Node."""

    IN = "in"  # from the mesh
    OUT = "out"


@dataclass(frozen=True, slots=True)
class Quoted:
    """A chain that turns an address of the packet that a message of ICMP is about: the way of the message."""

    chain: str
    translation: Translation
    way: Way


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes behind the beginning of a message of ICMP; `checksum` is what changes with them."""

    offset: int
    size: int
    checksum: int


def quoted_at(quoted: Quoted) -> Place:
    """The address to be turned: of what the pod sent where the message comes to it, else of what it was sent.

    In IPv4 the header of the packet has a checksum of its own; where that is kept right, the message's stays.
    """
    is_source = quoted.way is Way.IN
    if quoted.translation.inside.version == 4:
        return Place(_ICMP_HEADER + (12 if is_source else 16), 4, _ICMP_HEADER + 10)
    return Place(_ICMP_HEADER + (8 if is_source else 24), 16, _ICMP_CHECKSUM)


def table(device: str) -> str:
    """The name of a device's table, in the family `inet`."""
    name = device if _PLAIN_NAME.fullmatch(device) else device.encode().hex()
    return f"scope_pods_{name}"


def load(device: str, network: PodNetwork) -> str:
    """Everything, in place of what was there, in one step."""
    name = table(device)
    rules = [("forward", each) for each in _clamps(device, network.mtu)]
    for version, (family, _) in _VERSIONS.items():
        here, there = (_of(version, side) for side in (network.offered, network.reached))
        if here and there:
            rules.append(("postrouting", _keep(family, here, there)))
            rules.append(("postrouting", _keep(family, there, here)))
    chains = [f"add chain inet {name} {each.chain}\n" for each in quoted(network)]
    chains += (f"add counter inet {name} {each}\n" for each in (*CAME.values(), *PASSED.values()))
    for chain, priority, counters in (("first", FIRST, CAME), ("last", LAST, PASSED)):
        chains.append(
            f"add chain inet {name} {chain} "
            f"{{ type filter hook forward priority {priority}; policy accept; }}\n"
        )
        rules += ((chain, rule) for rule in _counts(device, network.offered, counters))
    if network.translated:
        rules += _translations(device, network)
        chains += (
            f"add chain inet {name} coming "
            f"{{ type filter hook prerouting priority {_BEFORE_ALL}; policy accept; }}\n",
            f"add chain inet {name} going "
            f"{{ type filter hook postrouting priority {_AFTER_ALL}; policy accept; }}\n",
        )
    return "".join(
        (
            delete(device),
            f"add table inet {name}\n",
            *chains,
            f"add chain inet {name} postrouting "
            f"{{ type nat hook postrouting priority {_BEFORE_MASQUERADE}; policy accept; }}\n",
            f"add chain inet {name} forward "
            f"{{ type filter hook forward priority {_MANGLE}; policy accept; }}\n",
            *(f"add rule inet {name} {chain} {rule}\n" for chain, rule in rules),
        )
    )


def quoted(network: PodNetwork) -> tuple[Quoted, ...]:
    """The chains whose rules are not for `nft` to make, two for each translation."""
    ordered = sorted(
        network.translated, key=lambda each: (each.inside.version, int(each.inside.network_address))
    )
    return tuple(
        Quoted(f"quoted_{way.value}_{number}", each, way)
        for number, each in enumerate(ordered)
        for way in Way
    )


def _translations(device: str, network: PodNetwork) -> Iterable[tuple[str, str]]:
    """Each as the name of a chain and a rule."""
    for each in quoted(network):
        inside, outside = each.translation.inside, each.translation.outside
        family, _ = _VERSIONS[inside.version]
        before, after = (outside, inside) if each.way is Way.IN else (inside, outside)
        beside = _of(inside.version, network.beside)
        elsewhere = f" {family} daddr != {{ {_joined(beside)} }}" if beside else ""
        if each.way is Way.IN:
            chain, match, address = "coming", f'iifname "{device}"', f"{family} daddr"
        else:
            chain, match, address = "going", f'oifname "{device}"{elsewhere}', f"{family} saddr"
        place = quoted_at(each)
        net, mask = int(before.network_address), int(before.netmask)
        about = f"@th,{place.offset * 8},{place.size * 8} & {mask:#x} == {net:#x}"
        yield chain, f"{match} {_ERRORS[inside.version]} {about} jump {each.chain}"
        host = type(inside.network_address)(int(inside.hostmask))
        changed = f"{address} & {host} | {after.network_address}"
        yield chain, f"{match} {address} {before} {address} set {changed}"


def delete(device: str) -> str:
    """Remove the table, whether or not there is one."""
    return f"add table inet {table(device)}\ndelete table inet {table(device)}\n"


def _keep(family: str, sources: Iterable[IPNetwork], destinations: Iterable[IPNetwork]) -> str:
    """Let what goes from here to there keep its source."""
    same = ", ".join(f"{prefix} : {prefix}" for prefix in sources)
    return (
        f"{family} saddr {{ {_joined(sources)} }} {family} daddr {{ {_joined(destinations)} }} "
        f"snat {family} prefix to {family} saddr map {{ {same} }}"
    )


def _counts(device: str, offered: Iterable[IPNetwork], counters: Mapping[Family, str]) -> Iterable[str]:
    """What comes from the mesh to our own pods, and what these send there."""
    for version, family in ((4, Family.IPV4), (6, Family.IPV6)):
        if own := _of(version, offered):
            name, _ = _VERSIONS[version]
            for way, end in (("iifname", "daddr"), ("oifname", "saddr")):
                yield f'{way} "{device}" {name} {end} {{ {_joined(own)} }} counter name "{counters[family]}"'


def _clamps(device: str, mtu: int) -> Iterable[str]:
    for way in ("iifname", "oifname"):
        for version, (_, header) in _VERSIONS.items():
            yield (
                f'{way} "{device}" meta nfproto ipv{version} tcp flags syn '
                f"tcp option maxseg size set {mtu - header}"
            )


def _of(version: int, prefixes: Iterable[IPNetwork]) -> list[IPNetwork]:
    """Sorted, without what is part of another: `nft` refuses sets that overlap."""
    if version == 4:
        return list(collapse_addresses(each for each in prefixes if isinstance(each, IPv4Network)))
    return list(collapse_addresses(each for each in prefixes if isinstance(each, IPv6Network)))


def _joined(prefixes: Iterable[IPNetwork]) -> str:
    return ", ".join(map(str, prefixes))
