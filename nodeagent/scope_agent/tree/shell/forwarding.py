"""What a hub of a tree forwards, in its kernel: rules loaded, put back, taken away. All of it blocks."""

from __future__ import annotations

import shutil
from collections.abc import Collection

from scope.model import Family
from scope_agent.tree.rules import ForwardedPrefixes, delete, load, table
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell.nft import NftError, ask_nft, read_generation, run_nft

_SETTINGS = {Family.IPV4: "net.ipv4.ip_forward", Family.IPV6: "net.ipv6.conf.all.forwarding"}


class TreeForwarding:
    """The table of one mesh device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._loaded: ForwardedPrefixes | None = None
        self._shown: str | None = None  # the table as `nft` shows it
        self._generation: int | None = None  # of the ruleset, when the table was last known to be whole

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

    def check(self) -> None:
        """Put back what others took away or changed. Raises ApplyError."""
        forwarded, generation = self._loaded, read_generation()
        if forwarded is None or (generation is not None and generation == self._generation):
            return
        try:
            shown = self._show()
        except NftError as error:
            raise ApplyError(str(error)) from None
        if shown == self._shown:
            self._generation = generation
        else:
            self._load(forwarded)

    def remove(self) -> None:
        """Leave nothing behind. Raises ApplyError."""
        self._loaded = None
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
            self._shown = self._show()
        except NftError as error:
            raise ApplyError(f"what this hub forwards cannot be held to the mesh: {error}") from None

    def _show(self) -> str | None:
        return ask_nft(["list", "table", "inet", table(self._device)])
