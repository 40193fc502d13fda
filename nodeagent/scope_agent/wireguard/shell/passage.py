"""What passes the chains of others: counters of a table of ours, and whose chains there are. It blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from scope.model import Family
from scope_agent.wireguard.losing import CAME, PASSED, ForeignChain, Passage
from scope_agent.wireguard.shell.nft import ask_nft, list_forward_chains

_OURS: Final = "scope_"  # tables of every mesh of this machine
_FAMILIES: Final[Mapping[str, frozenset[Family]]] = {
    "ip": frozenset({Family.IPV4}),
    "ip6": frozenset({Family.IPV6}),
    "inet": frozenset(Family),
}


def read_passages(table: str) -> dict[Family, Passage]:
    """What the counters of a table in the family `inet` say. Raises NftError."""
    shown = ask_nft(["--json", "list", "counters", "table", "inet", table])
    counters = [entry["counter"] for entry in json.loads(shown or '{"nftables": []}')["nftables"][1:]]
    packets = {each["name"]: each["packets"] for each in counters}
    return {
        family: Passage(packets.get(CAME[family], 0), packets.get(PASSED[family], 0)) for family in Family
    }


def list_foreign_chains() -> list[ForeignChain]:
    """The chains of others that see what is forwarded. Raises NftError."""
    return [
        ForeignChain(str(chain), _FAMILIES[chain.family], chain.drops)
        for chain in list_forward_chains()
        if chain.family in _FAMILIES and not chain.table.startswith(_OURS)
    ]
