"""What a hub of a tree forwards, in its kernel: rules loaded, put back, taken away. All of it blocks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from typing import Final

from scope.model import Family
from scope_agent.tree.rules import ForwardedPrefixes, delete, load, table
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.losing import Losses
from scope_agent.wireguard.shell.nft import NftError, ask_nft, read_generation, run_nft
from scope_agent.wireguard.shell.passage import list_foreign_chains, read_passages

COUNT_AGAIN: Final = 10.0  # seconds: `nft` takes some milliseconds; while something is lost, at each look
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
        return self._losses.why("between edges", f"what goes from {self._device} to {self._device}")

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
        self._losses.count(read_passages(table(self._device)), has_moved=has_moved, now=now)
        if self._losses.is_losing:
            self._losses.blame(list_foreign_chains())

    def _show(self) -> str | None:
        """The table as it is, whatever it counted."""
        return ask_nft(["--stateless", "list", "table", "inet", table(self._device)])
