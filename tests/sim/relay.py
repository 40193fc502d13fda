"""A hub's relay in virtual time: what rules in a kernel do, and a forwarder beside them. No agent is needed.

A knock teaches, per address family, where a side of a grant is. What comes from where a side last knocked, to
the port where it did, and looks like WireGuard's or like a probe, leaves the other side's port towards where
that one last knocked. Rules serve one family; the forwarder serves what goes from one family to the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from scope.model import Endpoint, Family, PublicKey
from scope.relay import KNOCK_BYTES, KNOCK_MAGIC, MAPPING_VALID, Side
from scope.wire import AskRelay, Granted, Refused, RefusedBecause, is_datagram

FIRST_PORT, LAST_PORT = 26000, 26255
LIFETIME = 86400


@dataclass(frozen=True, slots=True)
class _Pair:
    sides: tuple[Side, Side]

    def other(self, side: Side) -> Side:
        return self.sides[1] if side is self.sides[0] else self.sides[0]

    def of(self, peer: PublicKey) -> Side:
        return self.sides[0] if self.sides[0].peer == peer else self.sides[1]


@dataclass(slots=True)
class Relay:
    """One hub's. `send(port, to, payload)` puts a datagram on the wire from one of its ports."""

    now: Callable[[], float]
    random_bytes: Callable[[int], bytes]
    send: Callable[[int, Endpoint, object], None]
    forwards: bool = True  # False: whatever is granted, nothing is passed on
    has_forwarder: bool = True
    refuses: RefusedBecause | None = None
    passed: int = 0
    knocked: Callable[[PublicKey], None] = lambda peer: None  # a side was taught
    _pairs: dict[frozenset[PublicKey], _Pair] = field(default_factory=dict)
    _by_token: dict[bytes, tuple[_Pair, Side]] = field(default_factory=dict)
    _side: dict[tuple[Endpoint, int], tuple[_Pair, Side, float]] = field(default_factory=dict)
    _seen: dict[tuple[int, Family], tuple[Endpoint, float]] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    # --- what the hub's agent does -------------------------------------------------------------------------

    def ask(
        self, asker: PublicKey, request: AskRelay, members: frozenset[PublicKey]
    ) -> list[tuple[PublicKey, Granted | Refused]]:
        """Answers, by the WireGuard key of whom they are for."""
        if self.refuses is not None:
            return [(asker, Refused(request.peer, self.refuses))]
        if request.peer not in members or asker not in members or asker == request.peer:
            return [(asker, Refused(request.peer, RefusedBecause.UNKNOWN_PEER))]
        pair = self._pairs.get(frozenset((asker, request.peer)))
        if pair is None:
            first, second = (self._new_side(key) for key in sorted((asker, request.peer)))
            pair = self._pairs[frozenset((asker, request.peer))] = _Pair((first, second))
            for side in pair.sides:
                self._by_token[side.token] = pair, side
        sides = sorted(pair.sides, key=lambda side: side.peer != asker)
        return [
            (side.peer, Granted(pair.other(side).peer, side.token, side.port, LIFETIME, user_space=False))
            for side in sides
        ]

    def _new_side(self, peer: PublicKey) -> Side:
        taken = {side.port for pair in self._pairs.values() for side in pair.sides if side.peer == peer}
        port = next(port for port in range(FIRST_PORT, LAST_PORT + 1) if port not in taken)
        return Side(next(self._ids), peer, self.random_bytes(8), port)

    def forget(self) -> None:
        """A reboot: grants are on the disk, what was learned is not."""
        self._side.clear()
        self._seen.clear()

    # --- what its kernel and its forwarder do --------------------------------------------------------------

    def arrived(self, source: Endpoint, port: int, payload: object) -> None:
        """A datagram for one of the ports."""
        now = self.now()
        if isinstance(payload, bytes) and payload[:4] == KNOCK_MAGIC:
            if len(payload) == KNOCK_BYTES and payload[4:] in self._by_token:
                pair, side = self._by_token[payload[4:]]
                if side.port == port:
                    self._side[(source, port)] = pair, side, now
                    self._seen[(side.id, source.family)] = source, now
                    self.knocked(side.peer)
            return
        if not self.forwards or (isinstance(payload, bytes) and not is_datagram(payload)):
            return
        pair_side = self._side.get((source, port))
        if pair_side is None or now - pair_side[2] > MAPPING_VALID:
            return
        other = pair_side[0].other(pair_side[1])
        families = (source.family, *Family) if self.has_forwarder else (source.family,)
        for family in families:
            where, at = self._seen.get((other.id, family), (None, 0.0))
            if where is not None and now - at <= MAPPING_VALID:
                self.passed += 1
                self.send(other.port, where, payload)
                return
