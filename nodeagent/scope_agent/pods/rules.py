"""What the packet filter does for pods of other clusters, as text for `nft`. Pure.

Networks of clusters masquerade what leaves them, so a pod of another cluster would see the Node's address in
place of a pod's. Their rules are left alone: a chain in front of them gives the connection its own address as
the one to be translated to, and what was given an address once is not given another. It is so in both
directions, as some masquerade what comes from outside, too.

Pods believe in the MTU of their cluster. What they say of it as a TCP connection begins is cut to what fits
into the mesh: not every network lets the message through by which they would learn it later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final

from scope.model import IPNetwork

_BEFORE_MASQUERADE: Final = 99  # linux/netfilter_ipv4.h: NF_IP_PRI_NAT_SRC is 100
_MANGLE: Final = -150
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")
_VERSIONS: Final = {4: ("ip", 40), 6: ("ip6", 60)}  # nft's name; bytes of IP and TCP before the data


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """What is done here for pods: our own have the prefixes `offered`, those elsewhere `reached`.

    Of these `beside` are of our own cluster, and its own network may lead there. `mtu` is the mesh device's.
    """

    offered: frozenset[IPNetwork]
    reached: frozenset[IPNetwork]
    mtu: int
    beside: frozenset[IPNetwork] = frozenset()


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
    return "".join(
        (
            delete(device),
            f"add table inet {name}\n",
            f"add chain inet {name} postrouting "
            f"{{ type nat hook postrouting priority {_BEFORE_MASQUERADE}; policy accept; }}\n",
            f"add chain inet {name} forward "
            f"{{ type filter hook forward priority {_MANGLE}; policy accept; }}\n",
            *(f"add rule inet {name} {chain} {rule}\n" for chain, rule in rules),
        )
    )


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
