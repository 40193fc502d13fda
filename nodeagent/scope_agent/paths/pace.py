"""How many pings searches may send: a rate with a burst, which a machine that does not keep up lowers.

Where many agents share a processor, and all search all others at once, what they ask exceeds what they can
answer. An agent whose timers come late is one of those that ask too much: it asks half as much, again and
again, until they come in time, and then by and by more. So a crowd comes together a few pairs at a time.
"""

from __future__ import annotations

# A ping is about 150 bytes on the wire. A thousand peers that are searched at once are spread over seconds, a
# hundred are not held up; home routers take this rate of new sessions. Peers that are there already make no
# new session; one that answers a search goes before those that do not, by up to a burst more.
PACE_PER_SECOND = 400.0
PACE_BURST = 120
SLOWEST = 5.0  # pings in a second: a search goes on under any load
LATE = 0.1  # seconds; a timer is held up so long by a full processor, hardly by our own work
ADAPT_EVERY = 0.5  # seconds between two changes: until the last one shows
SPEED_UP = 1.25  # from the slowest to the full pace takes ten seconds
ROUNDING = 1e-6  # of a token: a timer computed from a share of one may come that much too early


class Pace:
    """Tokens, one for each ping of a search. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._rate = PACE_PER_SECOND
        self._tokens = float(PACE_BURST)
        self._earned_at = 0.0
        self._adapted_at = 0.0

    def earn(self, now: float, *, late: float) -> None:
        """Let time pass up to now; `late`: for how long our timer was due."""
        if now - self._adapted_at > ADAPT_EVERY:
            self._adapted_at = now
            if late > LATE:
                self._rate = max(SLOWEST, self._rate / 2)
            else:
                self._rate = min(PACE_PER_SECOND, self._rate * SPEED_UP)
        burst = max(1.0, PACE_BURST * self._rate / PACE_PER_SECOND)
        self._tokens = min(burst, self._tokens + (now - self._earned_at) * self._rate)
        self._earned_at = now

    def spend(self) -> None:
        """A ping leaves."""
        self._tokens -= 1.0

    @property
    def may_search(self) -> bool:
        """Whether a peer that may be there or not may be pinged now."""
        return self._tokens > 1.0 - ROUNDING

    @property
    def may_answer(self) -> bool:
        """Whether a peer that was heard lately may be pinged now."""
        return self._tokens > -PACE_BURST

    def next_search(self) -> float:
        """When `may_search` holds again."""
        return self._earned_at + (1.0 - self._tokens) / self._rate
