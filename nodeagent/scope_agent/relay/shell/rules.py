"""A hub's rules in its kernel: loaded, changed, looked after, and taken away again.

Other programs share the packet filter, and some begin with `nft flush ruleset`. The kernel numbers its
rulesets: one small netlink message tells the number, some microseconds each time. Only where it has
moved without us does `nft` show our table, which takes some milliseconds, and is compared with what it was.
To listen to the kernel's notices instead would cost more where others change rules all day, and a notice can
be lost.

Everything here blocks, for as long as `nft` takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from scope.model import Family, RelayLimits
from scope.relay import Grants
from scope_agent.relay.counting import Sent
from scope_agent.relay.rules import change, delete, is_change, load, mark_of, table
from scope_agent.wireguard.shell.nft import NftError, ask_nft, read_generation, run_nft


class KernelRelay:
    """The table of one mesh device. `seed`: 32 secret bits, the same at each start of the agent."""

    def __init__(self, device: str, *, seed: int) -> None:
        self._device = device
        self._seed = seed
        self._loaded: Grants | None = None
        self._families: frozenset[Family] = frozenset()
        self._shape = ""  # the table without its elements, as `nft` shows it
        self._generation: int | None = None  # of the ruleset, when the table was last known to be whole

    def apply(self, grants: Grants, wall: float, *, families: frozenset[Family] = frozenset(Family)) -> bool:
        """Relay these grants and no others, over `families`. Raises NftError.

        True: the kernel knows no side's place, and all are to knock.
        """
        if families != self._families:
            self._families, self._loaded = families, None
        before = read_generation()
        knew = self._loaded is not None or self._show() != ""
        if self._loaded is None or not self._change(self._loaded, grants, wall):
            self._loaded = None
            knew = self._load(grants, wall) and knew
            self._shape = self._show()
        self._loaded = grants
        after = read_generation()
        # Anything else: somebody changed rules meanwhile, and the next check looks whether ours.
        if before is not None and after == before + 1:
            self._generation = after
        return not knew

    def has_moved(self) -> bool:
        """Whether anybody changed rules, whoever's, since `is_whole` or `apply` last looked."""
        generation = read_generation()
        return generation is None or generation != self._generation

    def is_whole(self) -> bool:
        """Whether the rules are in the kernel as they were loaded; where not, `apply` loads them again.

        Raises NftError.
        """
        if self._loaded is None:
            return False
        generation = read_generation()
        if generation is not None and generation == self._generation:
            return True
        if self._show() != self._shape or self._count_tokens() != 2 * len(self._loaded.grants):
            self._loaded = None
            return False
        self._generation = generation
        return True

    def counters(self) -> Mapping[int, Sent]:
        """What each side was sent since the rules were loaded whole, by its id. Raises NftError."""
        ids = self._ids()
        counted: dict[int, Sent] = {}
        for key in self._keys("port"):
            mark, counter = (key["val"], key["counter"]) if isinstance(key, dict) else (key, None)
            if counter is not None and mark in ids:
                counted[ids[mark]] = Sent(counter["packets"], counter["bytes"])
        return counted

    def capped(self) -> frozenset[int]:
        """Ids of pairs, the even ones, that were over a limit within the last minute. Raises NftError."""
        if self._loaded is None or self._loaded.limits == RelayLimits():
            return frozenset()
        ids = self._ids()
        marks = (_plain(element) for element in self._listed("set", "capped"))
        return frozenset(ids[mark] for mark in marks if isinstance(mark, int) and mark in ids)

    def remove(self) -> None:
        """Relay nothing, and leave nothing behind. Raises NftError."""
        self._loaded = None
        run_nft(delete(self._device))

    def _change(self, before: Grants, after: Grants, wall: float) -> bool:
        """Whether what differs could be changed alone."""
        if not is_change(before, after):
            return False
        text = change(self._device, before, after, wall=wall)
        if not text:
            return True
        try:
            run_nft(text)
        except NftError:  # not what we believe it is
            return False
        return True

    def _load(self, grants: Grants, wall: float) -> bool:
        """Whether what was learned could stay: not over the maps of another release."""
        text = load(self._device, grants, wall=wall, seed=self._seed, families=self._families)
        try:
            run_nft(text)
            return True
        except NftError:
            run_nft(delete(self._device) + text)
            return False

    def _show(self) -> str:
        """The table without elements; "" where there is none."""
        return ask_nft(["--terse", "list", "table", "inet", table(self._device)]) or ""

    def _count_tokens(self) -> int:
        return len(self._keys("token"))

    def _ids(self) -> dict[int, int]:
        """Sides by their marks."""
        grants = self._loaded.grants if self._loaded is not None else ()
        return {mark_of(side.id): side.id for grant in grants for side in grant.sides}

    def _keys(self, name: str) -> list[object]:
        """Of a map."""
        return [_plain(key) for key, _ in self._listed("map", name)]

    def _listed(self, kind: str, name: str) -> list[Any]:
        """The elements of a map or set as `nft` has them in JSON."""
        shown = ask_nft(["--json", "list", kind, "inet", table(self._device), name])
        if shown is None:
            return []
        (listed,) = (entry[kind] for entry in json.loads(shown)["nftables"] if kind in entry)
        return list(listed.get("elem", []))


def _plain(key: object) -> object:
    """The key of an element; what else is said of it stays where it is the counter."""
    if isinstance(key, dict) and "elem" in key:
        element = key["elem"]
        return element if "counter" in element else element["val"]
    return key
