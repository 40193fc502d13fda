"""Rules that give WireGuard another port towards single peers, and what is asked of them. Pure.

A symmetric NAT lets a peer in at a port that belongs to one local port of ours (`scope_agent.paths.birthday`
finds it). Where that is not WireGuard's own, the packet filter writes it in the place of WireGuard's towards
this peer alone, and WireGuard's in its place on the way back; probes that share WireGuard's port are turned
alike. The rules know nothing but the map that holds them, and stand outside of connection tracking's sight:
before it on the way out, and after it and every filter on the way in. So it sees one flow on the port that
was found, as it did when the port was found, and whatever the machine's firewall and its own NAT made of that
flow they go on making of it.

While ports are searched, the kernel would answer what comes to them, where no socket is bound, by "port
unreachable", and routers may take that for the end of a flow: so it does not.

Everything is IPv4, where symmetric NATs are. The table is the device's, outlives the agent, and is read again
by the next one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from scope.model import Endpoint

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Opening:
    """WireGuard speaks to `endpoint`, of IPv4, from `port` of ours in place of its own."""

    endpoint: Endpoint
    port: int


@dataclass(frozen=True, slots=True)
class Search:
    """Ports of ours, from `first` to `last`, that listen for probes of `endpoint`."""

    endpoint: Endpoint
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PortRules:
    """All that is asked of the packet filter and the probe socket. `port` is WireGuard's own."""

    port: int = 0
    openings: tuple[Opening, ...] = ()
    search: Search | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no table is needed."""
        return not self.openings and self.search is None


def table(device: str) -> str:
    """The name of a device's table, in the family `ip`."""
    name = device if _PLAIN_NAME.fullmatch(device) else device.encode().hex()
    return f"scope_ports_{name}"


def load(device: str, rules: PortRules) -> str:
    """The table, in place of an earlier one, in one step; without rules, no table."""
    if rules.is_empty:
        return delete(device)
    out = [
        f"{opening.endpoint.address} . {opening.endpoint.port} : {opening.port}" for opening in rules.openings
    ]
    back = [
        f"{opening.endpoint.address} . {opening.endpoint.port} . {opening.port} : {rules.port}"
        for opening in rules.openings
    ]
    return (
        f"{delete(device)}"
        f"table ip {table(device)} {{\n"
        f"  map out {{ type ipv4_addr . inet_service : inet_service;{_elements(out)}\n  }}\n"
        f"  map in {{ type ipv4_addr . inet_service . inet_service : inet_service;{_elements(back)}\n  }}\n"
        # Before connection tracking (-200) on the way out; on the way in after every filter (0) and before
        # what holds an endpoint (300), which knows WireGuard's port alone.
        f"  chain out {{ type filter hook output priority -300;\n"
        f'    oifname != "lo" udp sport {rules.port} udp sport set ip daddr . udp dport map @out\n  }}\n'
        f"  chain in {{ type filter hook input priority 290;\n"
        f'    iifname != "lo" udp dport set ip saddr . udp sport . udp dport map @in\n  }}\n'
        f"{_quiet(rules.search)}"
        f"}}\n"
    )


def delete(device: str) -> str:
    """Remove the table, whether or not there is one."""
    return f"add table ip {table(device)}\ndelete table ip {table(device)}\n"


def parse_openings(shown: str) -> tuple[Opening, ...]:
    """The openings in `nft --json list map ip TABLE out`; raises ValueError where it is no such map."""
    found = []
    try:
        (listed,) = (entry["map"] for entry in json.loads(shown)["nftables"] if "map" in entry)
        for element in listed.get("elem", []):
            key, port = element
            address, peer_port = key["concat"]
            found.append(Opening(Endpoint(IPv4Address(address), _port(peer_port)), _port(port)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a map of ours: {error!r}") from None
    return tuple(sorted(found, key=lambda opening: str(opening.endpoint)))


def _port(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value < 65536:
        raise ValueError(f"a port is 1 to 65535, not {value!r}")
    return value


def _elements(elements: list[str]) -> str:
    return f" elements = {{ {', '.join(elements)} }};" if elements else ""


def _quiet(search: Search | None) -> str:
    """No word of "port unreachable": the datagram that it quotes begins 8 bytes into the ICMP message."""
    if search is None:
        return ""
    refusal = (
        f"ip daddr {search.endpoint.address} icmp type destination-unreachable icmp code port-unreachable"
    )
    return (
        f"  chain quiet {{ type filter hook output priority 0;\n"
        f"    {refusal} @th,240,16 {search.first}-{search.last} drop\n  }}\n"
    )
