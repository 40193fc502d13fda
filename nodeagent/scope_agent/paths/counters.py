"""What the byte counters of both WireGuards say of the path in use.

Our own device tells whether data leaves and whether anything comes back. The peer's receive counter, which
each of its pings and echoes carries, tells whether what we send arrives: probes can pass where data does not.
"""

from __future__ import annotations

import enum

from scope_agent.paths.route import NEVER

SUSPECT_AFTER = 0.3  # bytes out and none back: longer than most round trips; a doubt too many costs one ping
# Counters are compared no oftener: what was sent within one such time shows, by the end of the next, in the
# counter of the peer, which reads it every quarter of a second and reports it half a second late at most.
STALL_WINDOW = 1.0
STALL_BYTES = 200  # less than this between two echoes is keepalives and handshakes
STALLS = 2  # comparisons in a row: one may have met a burst of loss
# What keepalives (32 bytes) and handshake messages (148, 92) may add up to between two looks at the device.
_OVERHEAD = frozenset(148 * a + 92 * b + 32 * c for a in range(3) for b in range(3) for c in range(3))


class Flow(enum.Enum):
    """What a comparison showed of our data on its way to the peer."""

    ARRIVES = enum.auto()
    STALLED = enum.auto()


class Counters:
    """The counters of one pair, in bytes since the device began, -1 before they were read."""

    def __init__(self) -> None:
        self._tx = self._rx = -1
        self._tx_moved = NEVER
        self._moved = NEVER
        self._unanswered_since: float | None = None
        self._compared: tuple[int, int, float] | None = None  # our bytes out, theirs in, when
        self._stalls = 0

    @property
    def received(self) -> int:
        """What to tell the peer: bytes that came from it, 0 for none or not known."""
        return max(self._rx, 0)

    def is_active(self, now: float, *, within: float) -> bool:
        """Whether data left within so many seconds."""
        return now - self._tx_moved < within

    def is_flowing(self, now: float, *, within: float) -> bool:
        """Whether data left or came within so many seconds."""
        return now - self._moved < within

    @property
    def suspect_at(self) -> float | None:
        """When what was sent without an answer makes the path suspect."""
        return self._unanswered_since + SUSPECT_AFTER if self._unanswered_since is not None else None

    def forgive(self) -> None:
        """The path answered a probe, or is another one: count the silence anew."""
        self._unanswered_since = None

    def read(self, *, tx: int, rx: int, now: float) -> bool:
        """Take our device's counters; whether data left since the last reading."""
        sent = tx - self._tx if self._tx >= 0 else 0
        is_data = sent > 0 and sent not in _OVERHEAD
        if rx != self._rx:
            self._unanswered_since = None
        elif is_data and self._unanswered_since is None:
            self._unanswered_since = now
        if is_data:
            self._tx_moved = now
        came = rx - self._rx if self._rx >= 0 else 0
        if is_data or (came > 0 and came not in _OVERHEAD):
            self._moved = now
        self._tx, self._rx = tx, rx
        return is_data

    def compare(self, received: int, now: float) -> Flow | None:
        """Hold what we sent between two reports of the peer's counter against what arrived there.

        None while there is nothing to tell. A counter of 0 is unknown: nobody holds a session and has
        received nothing.
        """
        if received == 0:
            self._compared = None
        if self._tx < 0 or received == 0:
            return None
        if self._compared is None or received < self._compared[1]:
            self._compared, self._stalls = (self._tx, received, now), 0
            return None
        sent, arrived = self._tx - self._compared[0], received - self._compared[1]
        if arrived > 0:
            self._stalls = 0
        elif sent <= STALL_BYTES or now - self._compared[2] < STALL_WINDOW:
            return None
        else:
            self._stalls += 1
        self._compared = (self._tx, received, now)
        if arrived > 0:
            return Flow.ARRIVES
        return Flow.STALLED if self._stalls >= STALLS else None

    def forget_comparison(self) -> None:
        """The peer counts anew."""
        self._compared = None

    def forget_stalls(self) -> None:
        """The stalled path was given up: the next one is judged by itself."""
        self._stalls = 0
