"""Whom the forwarder relays for: pairs with a grant, where their sides knocked, how much they may. Pure.

A side is known by its token and found where it last knocked. It may knock at several addresses of the hub and
over both families, so for each of the hub's addresses the last place counts: from there its datagrams are
taken. What is meant for it goes to where it last knocked over the family that the datagram came by, as the
hub's kernel would do it, and to its last place of the other family where it has none of that one, or has it
no longer.

Time is monotonic seconds, but for the end of a grant, which is wall clock. What is kept is bounded by the
number of grants: PLACES for each side, and nothing for a stranger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from scope.model import RelayLimits
from scope.relay import MAPPING_VALID, Grant, Grants, Side
from scope_dataplane.batches import Control

Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]  # as the module `socket` has it

# Of the hub's addresses, at which one side is heard: peers try four at most, later perhaps others.
PLACES: Final = 8
# A side knocks every 20 s wherever it can. A family over which it was silent for longer, while it knocked
# over the other one, is one that it no longer has.
LEFT: Final = 25.0
# A bucket holds what its rate brings in this time, so a limit lets short bursts through: WireGuard sends 64
# kB at once where it can, and TCP inside grows by bursts.
BURST_S: Final = 0.25
CAPPED: Final = 60.0  # seconds for which a side counts as over its limit: a person looks meanwhile


@dataclass(slots=True, eq=False)
class Place:
    """Where a side is found: its address, and the address of ours that it knocked at."""

    version: int  # of IP
    address: Address
    answer_from: Control
    at: float
    batches: bool = True  # whether the way there takes them


@dataclass(slots=True, eq=False)
class End:
    """One side of a pair, and what was learned of it. The counts are of what came from it."""

    side: Side
    pair: Pair = field(repr=False)
    found: dict[int, Place] = field(default_factory=dict)  # by version of IP
    heard: dict[Control, tuple[int, Address]] = field(default_factory=dict)  # by the address of ours
    passed_bytes: int = 0
    passed_packets: int = 0
    dropped_packets: int = 0  # granted, and yet not passed on
    capped_at: float = float("-inf")  # when some of it was last over a limit

    @property
    def other(self) -> End:
        """The side that it speaks with."""
        first, second = self.pair.ends
        return second if self is first else first


@dataclass(slots=True, eq=False)
class Pair:
    """Two sides, until their grant ends."""

    expires: float
    bucket: Bucket
    ends: tuple[End, End] = field(init=False)


@dataclass(slots=True, eq=False)
class Bucket:
    """Bytes that may pass at this instant. It may be overdrawn by one batch, which is then waited out."""

    rate: int  # bytes a second; 0: no limit
    level: float
    at: float

    def has_room(self, now: float) -> bool:
        """Whether anything may pass now."""
        if self.rate == 0:
            return True
        self.level = min(self.rate * BURST_S, self.level + (now - self.at) * self.rate)
        self.at = now
        return self.level > 0

    def take(self, size: int) -> None:
        """So many bytes pass."""
        if self.rate:
            self.level -= size

    def change(self, rate: int) -> None:
        """Another rate from now on."""
        if rate != self.rate:
            self.rate, self.level = rate, rate * BURST_S


@dataclass(slots=True, eq=False)
class _Source:
    end: End
    at: float


class Pairs:
    """All pairs of one file of grants."""

    def __init__(self) -> None:
        self.wrong_knocks = 0  # with no token of ours, or at a port of another side
        self.strange_packets = 0  # from where nobody knocked
        self._pairs: dict[tuple[bytes, bytes], Pair] = {}
        self._ends: dict[bytes, End] = {}  # by token
        self._sources: dict[tuple[int, Address], _Source] = {}  # by our port and the sender's address
        self._total = Bucket(0, 0.0, 0.0)
        self._next_end = float("inf")

    def replace(self, grants: Grants, *, now: float, wall: float) -> None:
        """These grants from now on, less those that ended. What is known of those that stay, stays."""
        self._total.change(grants.limits.total)
        kept = {
            (grant.sides[0].token, grant.sides[1].token): self._pair(grant, grants.limits, now)
            for grant in grants.grants
            if grant.expires > wall
        }
        self._keep(kept)

    def expire(self, wall: float) -> None:
        """Forget the grants that have ended."""
        if wall >= self._next_end:
            self._keep({key: pair for key, pair in self._pairs.items() if pair.expires > wall})

    def ports(self) -> frozenset[int]:
        """Our ports that sides knock at."""
        return frozenset(end.side.port for end in self._ends.values())

    def knock(
        self, token: bytes, *, port: int, version: int, address: Address, answer_from: Control, now: float
    ) -> bool:
        """Learn where a side is. Whether there is such a side."""
        end = self._ends.get(token)
        if end is None or end.side.port != port:
            self.wrong_knocks += 1
            return False
        key = (port, address)
        earlier = end.heard.pop(answer_from, None)
        if earlier is None and len(end.heard) >= PLACES:
            # Knocking moves a place to the end of the dictionary: the first was not used for longest.
            earlier = end.heard.pop(next(iter(end.heard)))
        end.heard[answer_from] = key
        if earlier is not None and earlier != key:
            self._forget(end, earlier)
        # A NAT may give a port that was one side's to another side; who knocked last has it.
        self._sources[key] = _Source(end, now)
        end.found[version] = Place(version, address, answer_from, now)
        return True

    def source(self, port: int, address: Address, now: float) -> End | None:
        """The side that is heard at our port from that address."""
        source = self._sources.get((port, address))
        return source.end if source is not None and now - source.at <= MAPPING_VALID else None

    def destination(self, end: End, version: int, now: float) -> Place | None:
        """Where the other side of `end` is found for what came over that version of IP; None: it is not."""
        found = end.other.found
        same, other = found.get(version), found.get(10 - version)
        if same is not None and other is not None and other.at - same.at > LEFT:
            same = None
        place = same or other
        return place if place is not None and now - place.at <= MAPPING_VALID else None

    def admit(self, end: End, size: int, now: float) -> bool:
        """Whether so many bytes may pass now, which are then taken from what the pair and all may."""
        pair, total = end.pair.bucket, self._total
        if not (pair.has_room(now) and total.has_room(now)):
            end.capped_at = now
            return False
        pair.take(size)
        total.take(size)
        return True

    def report(self, now: float) -> list[dict[str, Any]]:
        """Every pair for the agent, by its sides' ids: how much they sent, and over what they are found."""
        return [
            {
                "sides": [
                    {
                        "id": end.side.id,
                        "families": [
                            version
                            for version, place in sorted(end.found.items())
                            if now - place.at <= MAPPING_VALID
                        ],
                        "bytes": end.passed_bytes,
                        "packets": end.passed_packets,
                        "dropped": end.dropped_packets,
                        "capped": now - end.capped_at <= CAPPED,
                    }
                    for end in pair.ends
                ]
            }
            for pair in self._pairs.values()
        ]

    def _pair(self, grant: Grant, limits: RelayLimits, now: float) -> Pair:
        first, second = grant.sides
        pair = self._pairs.get((first.token, second.token))
        if pair is None:
            pair = Pair(grant.expires, Bucket(limits.pair, limits.pair * BURST_S, now))
            pair.ends = End(first, pair), End(second, pair)
            return pair
        pair.expires = grant.expires
        pair.bucket.change(limits.pair)
        for end, side in zip(pair.ends, grant.sides, strict=True):
            if end.side.port != side.port:  # it has to knock there first
                self._forget_all(end)
            end.side = side
        return pair

    def _keep(self, kept: dict[tuple[bytes, bytes], Pair]) -> None:
        for key, pair in self._pairs.items():
            if key not in kept:
                for end in pair.ends:
                    self._forget_all(end)
        self._pairs = kept
        self._ends = {end.side.token: end for pair in kept.values() for end in pair.ends}
        self._next_end = min((pair.expires for pair in kept.values()), default=float("inf"))

    def _forget_all(self, end: End) -> None:
        keys = set(end.heard.values())
        end.heard.clear()
        end.found.clear()
        for key in keys:
            self._forget(end, key)

    def _forget(self, end: End, key: tuple[int, Address]) -> None:
        """No longer hear a side from there, unless it knocked from there at another address of ours too."""
        source = self._sources.get(key)
        if source is not None and source.end is end and key not in end.heard.values():
            del self._sources[key]
