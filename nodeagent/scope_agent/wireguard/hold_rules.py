"""Rules of the packet filter that make data from one endpoint look as if it came from another one. Pure.

They stand on the way in, after every filter: what the firewall does not let in stays out, and connection
tracking has seen each datagram as it came. They touch WireGuard's data messages alone, so probes and
handshakes pass as they are, and nothing that came over loopback, where what was diverted is put back in. A
rule works only while its endpoint is in a set whose elements expire by themselves, whoever loaded them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from scope.model import Endpoint, Family, IPAddress

_DATA = "0x04000000"  # the first four bytes of a data message: type 4 and three zeros


@dataclass(frozen=True, slots=True)
class Relabel:
    """The packet filter writes `shown` as the source of what comes from `seen` to `own`, all of one family.

    What comes to another address of ours is not touched: WireGuard answers from where it was asked.
    """

    seen: Endpoint
    shown: Endpoint
    own: IPAddress
    seconds: float


@dataclass(frozen=True, slots=True)
class Divert:
    """What comes from `seen` goes to another local port, whose holder puts it back in."""

    seen: Endpoint
    port: int
    seconds: float


Rule: TypeAlias = Relabel | Divert


def load(port: int, rules: Sequence[Rule]) -> str:
    """The table for WireGuard's port `port` with these rules, in place of an earlier one, in one step.

    Of two rules for one endpoint the first that fits is taken.
    """
    return (
        f"{delete(port)}"
        f"table inet {_table(port)} {{\n"
        f"  set from4 {{ type ipv4_addr . inet_service; flags timeout;{_elements(rules, Family.IPV4)}\n  }}\n"
        f"  set from6 {{ type ipv6_addr . inet_service; flags timeout;{_elements(rules, Family.IPV6)}\n  }}\n"
        f"  chain in {{ type filter hook input priority 300;\n"
        f'    iifname != "lo" udp dport {port} @th,64,32 {_DATA} jump held\n  }}\n'
        f"  chain held {{\n{''.join(_line(rule) for rule in rules)}  }}\n"
        f"}}\n"
    )


def delete(port: int) -> str:
    """Remove the table, whether or not there is one."""
    return f"add table inet {_table(port)}\ndelete table inet {_table(port)}\n"


def _table(port: int) -> str:
    """Named by WireGuard's port, so that the next agent replaces what a crash left behind."""
    return f"scope_hold_{port}"


def _elements(rules: Iterable[Rule], family: Family) -> str:
    elements = [
        f"{rule.seen.address} . {rule.seen.port} timeout {max(1, round(rule.seconds * 1000))}ms"
        for rule in {rule.seen: rule for rule in rules if rule.seen.family is family}.values()
    ]
    return f" elements = {{ {', '.join(elements)} }};" if elements else ""


def _line(rule: Rule) -> str:
    is_v4 = rule.seen.family is Family.IPV4
    layer, live = ("ip", "from4") if is_v4 else ("ip6", "from6")
    match rule:
        case Relabel(shown=shown, own=own):
            # A fragment with another source than its fellows would be the loss of all; IPv4's are whole here.
            whole = "" if is_v4 else "exthdr frag missing "
            rewrite = f"{layer} saddr set {shown.address} udp sport set {shown.port}"
            action = f"{layer} daddr {own} {whole}{rewrite}"
        case Divert(port=port):
            action = f"udp dport set {port}"
        case _:
            assert_never(rule)
    source = f"{layer} saddr {rule.seen.address} udp sport {rule.seen.port} {layer} saddr . udp sport @{live}"
    return f"    {source} {action} accept\n"
