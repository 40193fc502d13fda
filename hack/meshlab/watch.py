"""Every ordered pair of members: path, family, RTT, and when each thing first happened.

`look` asks all agents at once and starts a ping for each pair as soon as both addresses are known. A pair's
clock starts when both of its members had joined: earlier neither could know of the other.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lab import place_reason

from meshlab.member import Member, Reach, Status
from meshlab.pinger import Flow, Pinger

_POLL_S = 0.1
_POLL_SHARE = 3.0  # on a busy machine a look is followed by this many times as long for what is looked at


class WatchError(Exception):
    """What was waited for did not come; the message says what was still missing."""


@dataclass(slots=True)
class PairRecord:
    """One member's way to another. Times are monotonic seconds."""

    source: Member
    target: Member
    known_at: float
    reach: Reach | None = None
    direct_at: float | None = None  # first since `known_at`
    pinged_at: float | None = None  # likewise
    changed_at: float | None = None  # when `Watch.mark` was last called for it
    flow: Flow | None = None
    has_hubs: bool = False

    @property
    def obstacle(self) -> str | None:
        """Why the places of the two have no direct path now; None where they have one."""
        return place_reason(self.source.machine.place, self.target.machine.place)

    @property
    def is_possible(self) -> bool:
        """Whether there is a way between the two places at all: a hub connects any two, by TCP if need be."""
        return self.has_hubs or self.obstacle is None

    @property
    def is_direct(self) -> bool:
        return self.reach is not None and self.reach.is_direct

    @property
    def is_relayed(self) -> bool:
        return self.reach is not None and self.reach.is_relayed

    @property
    def is_routed(self) -> bool:
        """Whether hubs of a tree lead from one to the other."""
        return self.reach is not None and self.reach.is_routed

    @property
    def is_at_best(self) -> bool:
        """Whether the path is direct, or relayed where it cannot be direct; in a tree also routed."""
        return self.is_direct or self.is_routed or (self.is_relayed and self.obstacle is not None)

    @property
    def is_pinged(self) -> bool:
        """Whether a ping came back since the pair was known, or marked."""
        return self.flow is not None and self.flow.first is not None

    @property
    def rtt_ms(self) -> float | None:
        """Of the last ping, if that is an answer to the present path."""
        return self.flow.rtt_ms if self.flow is not None and self.is_pinged else None

    @property
    def direct_s(self) -> float | None:
        """From when both had joined until the path was first direct."""
        return max(0.0, self.direct_at - self.known_at) if self.direct_at is not None else None

    @property
    def first_ping_s(self) -> float | None:
        """From when both had joined until the first ping came back."""
        return self.pinged_at - self.known_at if self.pinged_at is not None else None

    @property
    def healed_at(self) -> float | None:
        """When the path was at its best and answered again after the last mark; None before."""
        if not self.is_at_best or not self.is_pinged or self.reach is None or self.flow is None:
            return None
        return self.flow.first

    def describe(self) -> str:
        """The way in words: its path, why it is none, whether a ping came back, what WireGuard says."""
        name = f"{self.source.name} -> {self.target.name}"
        if self.reach is None:
            return f"{name}: unknown to its agent"
        reach = self.reach
        handshake = "never" if reach.handshake_s is None else f"{reach.handshake_s:g} s ago"
        pinged = "pinged" if self.is_pinged else "not pinged"
        return (
            f"{name}: {reach.path} {reach.endpoint or reach.reason or reach.hub}, {pinged}, "
            f"last handshake {handshake}, {reach.rx} bytes in and {reach.tx} out"
        )


class Watch:
    """Follows members. Not thread-safe: one thread looks."""

    def __init__(
        self, members: Iterable[Member], pinger: Pinger | None = None, *, has_hubs: bool = False
    ) -> None:
        self._has_hubs = has_hubs
        self.members: list[Member] = list(members)
        self.pairs: dict[tuple[str, str], PairRecord] = {}
        self.statuses: dict[str, Status] = {}
        self._pinger = pinger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for member in self.members:
            member.hang_up()

    def add(self, member: Member) -> None:
        """Follow one more."""
        self.members.append(member)

    def drop(self, member: Member) -> None:
        """Follow it no longer."""
        self.members.remove(member)
        member.hang_up()
        self.statuses.pop(member.name, None)
        for key in [key for key in self.pairs if member.name in key]:
            self._stop(self.pairs.pop(key))

    def look(self) -> None:
        """Ask every agent, and bring the pairs up to date."""
        asked = [member for member in self.members if member.ask()]
        for member in asked:
            if (status := member.answer()) is not None:
                self.statuses[member.name] = status
        joined = {member.name: at for member in self.members if (at := member.joined_at()) is not None}
        for source, target in itertools.permutations(self.members, 2):
            if source.name in joined and target.name in joined:
                self._update(source, target, known_at=max(joined[source.name], joined[target.name]))

    def mark(self, pairs: Iterable[PairRecord]) -> float:
        """Begin anew to wait for pings of these pairs; the time of the mark."""
        now = time.monotonic()
        for pair in pairs:
            pair.changed_at = now
            if pair.flow is not None and self._pinger is not None:
                self._pinger.restart(pair.flow)
        return now

    def pace(self, pairs: Iterable[PairRecord], every_s: float | None = None) -> None:
        """Ping these pairs so often; None: as ever."""
        for pair in pairs:
            if pair.flow is not None and self._pinger is not None:
                self._pinger.pace(pair.flow, every_s)

    def of(self, *members: Member) -> list[PairRecord]:
        """The pairs that have one of these members on either side."""
        names = {member.name for member in members}
        return [pair for key, pair in self.pairs.items() if names & set(key)]

    def until(self, done: Callable[[], bool], *, within_s: float, missing: Callable[[], str]) -> float:
        """Look until it is done: the seconds it took. WatchError with what is `missing` when time is over."""
        started = time.monotonic()
        while True:
            looked = time.monotonic()
            self.look()
            took = time.monotonic() - looked
            if done():
                return time.monotonic() - started
            for member in self.members:
                member.check_alive()
            if time.monotonic() - started > within_s:
                raise WatchError(f"not within {within_s:g} s: {missing()}")
            time.sleep(max(_POLL_S, min(_POLL_SHARE * took, 1.0)))

    def is_complete(self) -> bool:
        """Whether every pair of members with a possible way is at its best, and pinged."""
        count = len(self.members)
        return len(self.pairs) == count * (count - 1) and not self.unfinished()

    def unfinished(self) -> list[PairRecord]:
        """The pairs with a possible way that are not at their best, or have no ping back yet."""
        return [
            pair
            for pair in self.pairs.values()
            if pair.is_possible and not (pair.is_at_best and pair.is_pinged)
        ]

    def describe_unfinished(self) -> str:
        """Those pairs in words."""
        lines = [pair.describe() for pair in self.unfinished()]
        count = len(self.members)
        unknown = count * (count - 1) - len(self.pairs)
        return "\n  ".join(
            [*lines, *([f"{unknown} pairs have a member that has not joined"] if unknown else [])]
        )

    def _update(self, source: Member, target: Member, *, known_at: float) -> None:
        key = (source.name, target.name)
        pair = self.pairs.setdefault(key, PairRecord(source, target, known_at, has_hubs=self._has_hubs))
        status, peer = self.statuses.get(source.name), self.statuses.get(target.name)
        if status is None or peer is None:
            return
        pair.reach = status.peers.get(peer.peer)
        if pair.is_direct and pair.direct_at is None and pair.reach is not None:
            pair.direct_at = pair.reach.since
        if pair.flow is None and peer.address is not None and self._pinger is not None:
            pair.flow = self._pinger.flow(source.machine, peer.address)
        if pair.flow is not None and pair.pinged_at is None:
            pair.pinged_at = pair.flow.first

    def _stop(self, pair: PairRecord) -> None:
        if pair.flow is not None and self._pinger is not None:
            self._pinger.stop(pair.flow)
