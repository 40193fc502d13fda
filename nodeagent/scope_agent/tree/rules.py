"""The rules by which a hub of a tree forwards, and nothing else, as text for `nft`. Pure.

The kernel's settings let it forward anything. The table, one for each mesh device, bounds what that means for
the mesh: what comes out of the device goes on only into it, or to what this machine itself offers, and only
between prefixes of the mesh; what goes into the device comes from there. Other interfaces are none of its
business.

A hub sends what it forwards out of the interface that it came in by, which routers take for a detour and tell
the sender of. Here it is none, so those redirects stay at home. (WireGuard in the kernel sees to it itself,
in user space a TUN device does not.)

What goes from the mesh into the mesh is counted twice, before all chains of others and behind them: where it
comes, and does not pass, one of those drops it (`wireguard/losing.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final

from scope.model import Addressing, Family, IPNetwork
from scope_agent.wireguard.losing import CAME, FIRST, LAST, PASSED

_CHAINS: Final = (("forward", "forward", FIRST), ("passed", "forward", LAST), ("output", "output", 0))
_NAMES: Final = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class ForwardedPrefixes:
    """What a hub forwards: among prefixes `inside` the mesh, and between these and those it `offered`."""

    inside: tuple[IPNetwork, ...]
    offered: tuple[IPNetwork, ...]


def forwarded_prefixes(
    addressing: Addressing, *, routes: Iterable[IPNetwork], own: Iterable[IPNetwork]
) -> ForwardedPrefixes:
    """For a mesh, the prefixes that others offer, and those that this machine does."""
    space = [prefix for prefix in (addressing.ipv4, addressing.ipv6) if prefix is not None]
    offered = [route for route in own if not any(_overlap(route, prefix) for prefix in space)]
    return ForwardedPrefixes(_collapsed((*space, *routes)), _collapsed(offered))


def table(device: str) -> str:
    """The name of a device's table, in the family `inet`."""
    name = device if _PLAIN_NAME.fullmatch(device) else device.encode().hex()
    return f"scope_tree_{name}"


def load(device: str, forwarded: ForwardedPrefixes) -> str:
    """Everything, in place of what was there, in one step."""
    comes, goes = f'iifname "{device}"', f'oifname "{device}"'
    inside, offered = forwarded.inside, forwarded.offered
    rules = [
        *(
            f'{comes} {goes} {pair} counter name "{CAME[family]}" accept'
            for family, pair in _between(inside, inside)
        ),
        *(f"{comes} {pair} accept" for _, pair in _between(inside, offered)),
        *(f"{goes} {pair} accept" for _, pair in _between(offered, inside)),
        f"{comes} drop",
        f"{goes} drop",
    ]
    passed = [
        f'{comes} {goes} meta nfproto ipv{family.value[-1]} counter name "{PASSED[family]}"'
        for family in Family
    ]
    redirects = [f"{goes} icmp type redirect drop", f"{goes} icmpv6 type nd-redirect drop"]
    name = table(device)
    return "".join(
        (
            delete(device),
            f"add table inet {name}\n",
            *(f"add counter inet {name} {each}\n" for each in (*CAME.values(), *PASSED.values())),
            *(
                f"add chain inet {name} {chain} {{ type filter hook {hook} priority {at}; policy accept; }}\n"
                for chain, hook, at in _CHAINS
            ),
            *(f"add rule inet {name} forward {rule}\n" for rule in rules),
            *(f"add rule inet {name} passed {rule}\n" for rule in passed),
            *(f"add rule inet {name} output {rule}\n" for rule in redirects),
        )
    )


def delete(device: str) -> str:
    """Remove the table, whether or not there is one."""
    return f"add table inet {table(device)}\ndelete table inet {table(device)}\n"


def _between(
    sources: tuple[IPNetwork, ...], destinations: tuple[IPNetwork, ...]
) -> Iterable[tuple[Family, str]]:
    for family, name in _NAMES.items():
        version = 4 if family is Family.IPV4 else 6
        here, there = (
            ", ".join(str(prefix) for prefix in side if prefix.version == version)
            for side in (sources, destinations)
        )
        if here and there:
            yield family, f"{name} saddr {{ {here} }} {name} daddr {{ {there} }}"


def _collapsed(prefixes: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    """Sorted, without what is part of another: `nft` refuses sets that overlap."""
    prefixes = list(prefixes)
    return (
        *collapse_addresses([each for each in prefixes if isinstance(each, IPv4Network)]),
        *collapse_addresses([each for each in prefixes if isinstance(each, IPv6Network)]),
    )


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    if isinstance(one, IPv4Network) and isinstance(other, IPv4Network):
        return one.overlaps(other)
    return isinstance(one, IPv6Network) and isinstance(other, IPv6Network) and one.overlaps(other)
