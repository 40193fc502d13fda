"""What a hub relayed, pair by pair: the counts of its kernel and of its forwarder in one list. Pure.

A pair may have counts of both: the kernel relays within a family of addresses, the forwarder from one to the
other. The kernel counts whole IP packets since its rules were loaded, the forwarder what is in them since its
process started; so the sums say which pair takes how much, and are no bill.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from scope.model import Forwarding, PublicKey
from scope.relay import Grant, Grants

SHOWN: Final = 64  # pairs: a person reads no more, and a status is asked for often


@dataclass(frozen=True, slots=True)
class Sent:
    """What a side was sent."""

    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted on this machine, by ids of sides.

    `capped`: sides of pairs that were over a limit within the last minute. `error`: in words, why counts are
    missing.
    """

    kernel: Mapping[int, Sent]
    user_space: Mapping[int, Sent]
    capped: frozenset[int] = frozenset()
    error: str = ""


@dataclass(frozen=True, slots=True)
class RelayedPair:
    """One grant. `sent`: to each of the two; `by`: what relayed any of it."""

    peers: tuple[PublicKey, PublicKey]
    sent: tuple[Sent, Sent]
    by: tuple[Forwarding, ...]
    is_capped: bool

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.sent[0].bytes + self.sent[1].bytes


@dataclass(frozen=True, slots=True)
class Relayed:
    """All that is granted: how many pairs and what they were sent, and of these the SHOWN busiest."""

    pairs: int
    sent: Sent
    busiest: tuple[RelayedPair, ...]
    error: str


def relayed(grants: Grants, counted: Counted) -> Relayed:
    """What these grants were worth."""
    pairs = [_relayed(grant, counted) for grant in grants.grants]
    return Relayed(
        len(pairs),
        Sent(sum(sent.packets for pair in pairs for sent in pair.sent), sum(pair.bytes for pair in pairs)),
        tuple(heapq.nlargest(SHOWN, pairs, key=lambda pair: pair.bytes)),
        counted.error,
    )


def _relayed(grant: Grant, counted: Counted) -> RelayedPair:
    ids = [side.id for side in grant.sides]
    by = (
        (Forwarding.KERNEL, [counted.kernel.get(each, Sent()) for each in ids]),
        (Forwarding.USER_SPACE, [counted.user_space.get(each, Sent()) for each in ids]),
    )
    first, second = (
        Sent(sum(each.packets for each in sent), sum(each.bytes for each in sent))
        for sent in zip(*(sent for _, sent in by), strict=True)
    )
    return RelayedPair(
        (grant.sides[0].peer, grant.sides[1].peer),
        (first, second),
        tuple(what for what, sent in by if any(each.packets for each in sent)),
        not counted.capped.isdisjoint(ids),
    )
