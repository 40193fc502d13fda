"""What is to be seen of the demo at one moment, as values: one thread makes them, another shows them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from lab import Machine
from meshlab import Member, PairRecord, Watch

_FRESH_S = 1.0  # how long news is highlighted
_QUIET_S = 3.5  # three pings at the calm pace of one a second, and some


class Mood(Enum):
    """How a kind of text is meant."""

    PLAIN = "plain"
    GOOD = "good"
    BAD = "bad"


class Show(Enum):
    """What a cell of the table shows."""

    SELF = "self"
    AWAITED = "awaited"  # one of the two has not joined
    SEARCHING = "searching"
    IMPOSSIBLE = "impossible"
    DIRECT = "direct"
    RELAYED = "relayed"
    ROUTED = "routed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Cell:
    """One member's way to another."""

    show: Show
    family: str | None = None
    rtt_ms: float | None = None
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One member and its ways to all, itself included, in the order of the rows."""

    name: str
    place: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, `at` seconds after the start."""

    at: float
    text: str
    mood: Mood = Mood.PLAIN


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds: the median and the largest of some; None where there are none."""

    median: float
    largest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        return Spread(statistics.median(values), max(values)) if values else None

    def __str__(self) -> str:
        return f"median {self.median:.2f} s, slowest {self.largest:.2f} s"


@dataclass(frozen=True, slots=True)
class Tally:
    """Unordered pairs, counted."""

    direct: int = 0
    possible: int = 0  # to be direct
    relayed: int = 0
    relayable: int = 0  # not direct, but through a hub
    impossible: int = 0
    routed: int = 0  # by the hubs of a tree
    ipv6: int = 0
    direct_s: Spread | None = None
    first_ping_s: Spread | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """All that a screen shows but the clock. `started` is monotonic."""

    started: float
    stage: int
    stages: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    events: tuple[Event, ...] = ()
    tally: Tally = Tally()


def rows_of(watch: Watch) -> tuple[Row, ...]:
    """The table now."""
    now = time.monotonic()
    return tuple(
        Row(
            source.name,
            place_text(source.machine, hub=hub_of(source, watch)),
            tuple(_cell(source, target, watch, now) for target in watch.members),
        )
        for source in watch.members
    )


def tally_of(watch: Watch) -> Tally:
    """The pairs counted now: one is direct or relayed when it is so, and pinged, both ways."""
    ways = watch.pairs
    both = [(way, ways[b, a]) for (a, b), way in ways.items() if a < b and (b, a) in ways]
    settled = [pair for pair in both if all(way.is_at_best and way.is_pinged for way in pair)]
    direct = [pair for pair in settled if all(way.is_direct for way in pair)]
    routed = [pair for pair in settled if any(way.is_routed for way in pair)]
    possible = [there for there, _ in both if there.obstacle is None]
    relayable = [there for there, _ in both if there.obstacle is not None and there.is_possible]
    return Tally(
        direct=len(direct),
        possible=len(possible),
        relayed=len(settled) - len(direct) - len(routed),
        relayable=len(relayable),
        impossible=len(both) - len(possible) - len(relayable),
        routed=len(routed),
        ipv6=sum(there.reach is not None and there.reach.family == "IPv6" for there, _ in direct),
        direct_s=Spread.of([s for way in ways.values() if (s := way.direct_s) is not None]),
        first_ping_s=Spread.of([s for way in ways.values() if (s := way.first_ping_s) is not None]),
    )


def place_text(machine: Machine, *, hub: str = "") -> str:
    """Where a machine is, and behind what or, in a tree, attached to which hub."""
    site = machine.site
    if hub:
        return f"{site.name}, attached to {hub}"
    also = " + IPv6" if site.place.ipv6 and site.plan.public_ipv4 is not None else ""
    return f"{site.name}, {site.nat.value.replace('none', 'no NAT')}{also}"


def _cell(source: Member, target: Member, watch: Watch, now: float) -> Cell:
    if source is target:
        return Cell(Show.SELF)
    pair = watch.pairs.get((source.name, target.name))
    if pair is None:
        return Cell(Show.AWAITED)
    if pair.is_at_best and pair.is_pinged and pair.reach is not None and pair.flow is not None:
        if pair.flow.last is not None and now - pair.flow.last > _QUIET_S:
            return Cell(Show.LOST)
        fresh = pair.flow.first is not None and now - pair.flow.first < _FRESH_S
        show = Show.DIRECT if pair.is_direct else Show.ROUTED if pair.is_routed else Show.RELAYED
        return Cell(show, pair.reach.family, pair.rtt_ms, fresh)
    if not pair.is_possible and not pair.is_direct:
        return Cell(Show.IMPOSSIBLE)
    return Cell(Show.LOST if _was_direct(pair) else Show.SEARCHING)


def hub_of(member: Member, watch: Watch) -> str:
    """The machine that an edge of a tree is attached to, and by which it reaches others; "" for no edge."""
    status = watch.statuses.get(member.name)
    if status is None or not any(reach.is_routed for reach in status.peers.values()):
        return ""
    machines = {said.peer: name for name, said in watch.statuses.items()}
    return machines.get(status.hub, "")


def _was_direct(pair: PairRecord) -> bool:
    return pair.direct_at is not None and not pair.is_at_best
