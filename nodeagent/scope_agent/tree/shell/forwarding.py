"""What a hub of a tree forwards, in its kernel: rules loaded, put back, taken away. All of it blocks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping
from typing import Final

from scope.model import Family
from scope_agent.tree.losing import ForeignChain, Losses, Passage
from scope_agent.tree.rules import CAME, PASSED, ForwardedPrefixes, delete, load, table
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell.nft import (
    ForwardChain,
    NftError,
    ask_nft,
    list_forward_chains,
    read_generation,
    run_nft,
)

COUNT_AGAIN: Final = 10.0  # seconds: `nft` takes some milliseconds; while something is lost, at each look
_OURS: Final = "scope_"  # tables of every mesh of this machine
_FAMILIES: Final[Mapping[str, frozenset[Family]]] = {
    "ip": frozenset({Family.IPV4}),
    "ip6": frozenset({Family.IPV6}),
    "inet": frozenset(Family),
}
_SETTINGS = {Family.IPV4: "net.ipv4.ip_forward", Family.IPV6: "net.ipv6.conf.all.forwarding"}


class TreeForwarding:
    """The table of one mesh device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._loaded: ForwardedPrefixes | None = None
        self._shown: str | None = None  # the table as `nft` shows it
        self._generation: int | None = None  # of the ruleset, when the table was last known to be whole
        self._losses = Losses()
        self._count_at = 0.0

    def apply(self, forwarded: ForwardedPrefixes, *, off: Collection[Family]) -> None:
        """Forward this and nothing else. `off`: families that the kernel does not forward. Raises ApplyError.

        The rules stand in any case: they are what bounds it once somebody turns a family on.
        """
        self._load(forwarded)
        versions = {prefix.version for prefix in forwarded.inside}
        stuck = [_SETTINGS[each] for each in off if (4 if each is Family.IPV4 else 6) in versions]
        if stuck:
            raise ApplyError(
                f"this hub cannot forward between its edges: {' and '.join(stuck)} cannot be turned on from "
                f"here; set {' and '.join(f'{name} = 1' for name in stuck)} in /etc/sysctl.d"
            )

    def check(self) -> str:
        """Put back what others took away or changed. Why they lose what is forwarded, in words; "" for not.

        Raises ApplyError.
        """
        forwarded, generation = self._loaded, read_generation()
        if forwarded is None:
            return ""
        has_moved = generation is None or generation != self._generation
        try:
            if has_moved and self._show() != self._shown:
                self._load(forwarded)
            elif has_moved:
                self._generation = generation
            if has_moved or self._losses.is_losing or time.monotonic() >= self._count_at:
                self._count(has_moved=has_moved)
        except NftError as error:
            raise ApplyError(str(error)) from None
        return self._losses.why(self._device)

    def remove(self) -> None:
        """Leave nothing behind. Raises ApplyError."""
        self._loaded, self._losses = None, Losses()
        if shutil.which("nft") is None:  # nobody loaded anything
            return
        try:
            run_nft(delete(self._device))
        except NftError as error:
            raise ApplyError(str(error)) from None

    def _load(self, forwarded: ForwardedPrefixes) -> None:
        try:
            run_nft(load(self._device, forwarded))
            self._loaded, self._generation = forwarded, None
            self._losses.begin()
            self._shown = self._show()
        except NftError as error:
            raise ApplyError(f"what this hub forwards cannot be held to the mesh: {error}") from None

    def _count(self, *, has_moved: bool) -> None:
        """See what passes. Raises NftError."""
        now = time.monotonic()
        self._count_at = now + COUNT_AGAIN
        shown = ask_nft(["--json", "list", "counters", "table", "inet", table(self._device)])
        counters = [entry["counter"] for entry in json.loads(shown or '{"nftables": []}')["nftables"][1:]]
        packets = {each["name"]: each["packets"] for each in counters}
        passages = {
            family: Passage(packets.get(CAME[family], 0), packets.get(PASSED[family], 0)) for family in Family
        }
        self._losses.count(passages, has_moved=has_moved, now=now)
        if self._losses.is_losing:
            self._losses.blame(_foreign(list_forward_chains()))

    def _show(self) -> str | None:
        """The table as it is, whatever it counted."""
        return ask_nft(["--stateless", "list", "table", "inet", table(self._device)])


def _foreign(chains: list[ForwardChain]) -> list[ForeignChain]:
    return [
        ForeignChain(str(chain), _FAMILIES[chain.family], chain.drops)
        for chain in chains
        if chain.family in _FAMILIES and not chain.table.startswith(_OURS)
    ]
