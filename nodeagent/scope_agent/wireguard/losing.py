"""Whether others' rules lose what this machine forwards for a mesh. Pure.

Our rules can let a packet go on, but a chain of another program that drops it has the last word. To look at
the rules would not do: which of them a packet meets a whole packet filter would have to tell, and `nft` does
not show those of the older `iptables`. So what is forwarded is counted, before all other chains and behind
them. Where three packets came and none got through, something between drops them; where one
got through, somebody wants the others dropped.

One that got through speaks for the rules as they are: it counts until somebody changes rules, and for ten
minutes, as not every packet filter tells of its changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from scope.model import Family

CAME: Final = {Family.IPV4: "came4", Family.IPV6: "came6"}  # counters of a table
PASSED: Final = {Family.IPV4: "passed4", Family.IPV6: "passed6"}
FIRST: Final = -500  # of chains: before all that linux/netfilter_ipv4.h has a name for
LAST: Final = 2**31 - 1  # NF_IP_PRI_LAST
ENOUGH: Final = 3  # packets: one alone may have come between two counters
BELIEVED: Final = 600.0  # seconds
_MAX_NAMED: Final = 42  # characters: with it the whole reason fits into a status


@dataclass(frozen=True, slots=True)
class Passage:
    """IP packets that are forwarded for the mesh: before other chains, and behind them."""

    came: int = 0
    passed: int = 0


@dataclass(frozen=True, slots=True)
class ForeignChain:
    """A chain of another program on the way of what is forwarded."""

    name: str  # as `nft` names it: family, table, chain
    families: frozenset[Family]
    drops: bool  # what none of its rules accepts


class Losses:
    """What one device loses. `count` takes what was counted; where it `is_losing`, `blame` finds out why."""

    def __init__(self) -> None:
        self._start: dict[Family, tuple[Passage, float]] = {}  # what was counted before, and until when
        self._latest: dict[Family, tuple[Passage, float]] = {}  # what was counted last, and when
        self._lost: dict[Family, tuple[str, ...]] = {}  # families, with the chains that may drop them

    @property
    def is_losing(self) -> bool:
        """Whether nothing passes of some family."""
        return bool(self._lost)

    def begin(self) -> None:
        """The counters start at zero. What was lost is so until they tell otherwise."""
        self._start = {}

    def count(self, seen: Mapping[Family, Passage], *, has_moved: bool, now: float) -> None:
        """Take what the counters say. `has_moved`: somebody changed rules, whoever's, since the last time."""
        for family, passage in seen.items():
            start, since = self._start.setdefault(family, (Passage(), now))
            self._latest[family] = passage, now
            if passage.passed > start.passed:
                self._lost.pop(family, None)
                if has_moved or now - since > BELIEVED:
                    self._start[family] = self._latest[family]
            elif passage.came - start.came >= ENOUGH:
                self._lost.setdefault(family, ())

    def blame(self, chains: Iterable[ForeignChain]) -> None:
        """Take the foreign chains that there are. Where those are gone that were blamed, nothing is known."""
        chains = list(chains)
        for family, before in tuple(self._lost.items()):
            on_the_way = [chain for chain in chains if family in chain.families]
            blamed = [chain for chain in on_the_way if chain.drops] or on_the_way
            names = tuple(chain.name for chain in blamed)
            if before and not set(before) & set(names):
                del self._lost[family]
                self._start[family] = self._latest[family]
            else:
                self._lost[family] = names

    def why(self, lost: str, wanted: str) -> str:
        """Why nothing passes, and what to do, in words; "" where nothing is known to be lost.

        `lost` and `wanted` say what is lost, and what is to be let through.
        """
        if not self._lost:
            return ""
        families = " and ".join(sorted(self._lost))
        names = ", ".join(dict.fromkeys(name for names in self._lost.values() for name in names))
        if len(names) > _MAX_NAMED:
            names = names[: _MAX_NAMED - 1] + "…"
        by = f"the foreign chain {names}" if names else "a firewall that `nft` does not show (iptables?)"
        return f"{by} drops {families} {lost}: let it accept {wanted}"
