"""A path in doubt: three pings, and a verdict when none was answered.

Silence alone condemns nothing, because the far application may have nothing to say. So a doubt is put to the
path itself, and any echo ends it.
"""

from __future__ import annotations

import enum

PINGS = (0.0, 0.1, 0.2)  # three, so that two may be lost
VERDICT_AFTER = 0.15  # patience after the last ping, at least, for jitter and a busy peer; else two RTTs


class Ruling(enum.Enum):
    """What a doubt asks for."""

    PING = enum.auto()
    LAST_PING = enum.auto()  # and time to look round for another route
    DEAD = enum.auto()


class Doubt:
    """Whether the path in use is in doubt, and how far it was asked."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._asked = 0

    @property
    def is_open(self) -> bool:
        """Whether the path is in doubt."""
        return self._since is not None

    def open(self, now: float) -> None:
        """Begin to doubt."""
        self._since, self._asked = now, 0

    def close(self) -> None:
        """The path answered, or is no longer in use."""
        self._since = None

    def get_timer(self, *, rtt: float | None) -> float | None:
        """When `judge` wants to run next."""
        if self._since is None:
            return None
        if self._asked < len(PINGS):
            return self._since + PINGS[self._asked]
        return self._since + PINGS[-1] + max(VERDICT_AFTER, 2 * (rtt or 0.0))

    def judge(self, now: float, *, rtt: float | None) -> Ruling | None:
        """What is due of an open doubt; DEAD closes it."""
        due = self.get_timer(rtt=rtt)
        if due is None or now < due:
            return None
        if self._asked < len(PINGS):
            self._asked += 1
            return Ruling.LAST_PING if self._asked == len(PINGS) else Ruling.PING
        self.close()
        return Ruling.DEAD
