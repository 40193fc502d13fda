"""The table of `scope_agent.wireguard.port_rules` in the kernel: read, loaded, looked after.

Other programs share the packet filter, and some begin with `nft flush ruleset`. That takes from WireGuard its
way to the peers whose ports were found, and `check` gives it back. Everything blocks, for as long as `nft`
takes.
"""

from __future__ import annotations

from scope_agent.wireguard.port_rules import Opening, PortRules, delete, load, parse_openings, table
from scope_agent.wireguard.shell.nft import NftError, ask_nft, read_generation, run_nft


class PortTable:
    """The table of one device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._rules = PortRules()
        self._shape = ""  # the table as `nft` showed it once it was loaded
        self._generation: int | None = None  # of the ruleset, when the table was last known to be whole

    @property
    def is_empty(self) -> bool:
        """Whether no rules are to be looked after."""
        return self._rules.is_empty

    def read(self) -> tuple[Opening, ...]:
        """What an earlier agent left in the kernel; nothing where it cannot be read."""
        try:
            shown = ask_nft(["--json", "list", "map", "ip", table(self._device), "out"])
            return parse_openings(shown) if shown is not None else ()
        except (NftError, ValueError):
            return ()

    def apply(self, rules: PortRules) -> None:
        """Have these rules and no others. Raises NftError."""
        self._shape = ""
        run_nft(load(self._device, rules))
        self._rules = rules
        if not rules.is_empty:
            self._generation = read_generation()
            self._shape = self._show()

    def check(self) -> bool:
        """Put right what others did to the table: whether anything was amiss. Raises NftError."""
        if self._rules.is_empty:
            return False
        generation = read_generation()
        if generation is not None and generation == self._generation:
            return False
        if self._show() == self._shape:
            self._generation = generation
            return False
        self.apply(self._rules)
        return True

    def remove(self) -> None:
        """Leave nothing behind. Raises NftError."""
        self._rules = PortRules()
        run_nft(delete(self._device))

    def _show(self) -> str:
        return ask_nft(["list", "table", "ip", table(self._device)]) or ""
