"""Whether the path in use still carries: from silence to doubt, and from doubt to a verdict.

Our own counters say when what was sent stays without an answer. That, or a hint from elsewhere, puts the path
in doubt, and perhaps it is our own mapping that moved, which is checked with it. Any echo ends the doubt.
"""

from __future__ import annotations

from scope_agent.paths.counters import Counters
from scope_agent.paths.doubt import Doubt, Ruling


class Liveness:
    """What is held against the path in use. It is asked for timers and rulings only while there is one."""

    def __init__(self) -> None:
        self.counters = Counters()
        self._doubt = Doubt()
        self._checks_mapping = False

    @property
    def is_in_doubt(self) -> bool:
        """Whether the path is being asked."""
        return self._doubt.is_open

    def clear(self) -> None:
        """The path answered, or is another one: nothing is held against it."""
        self.counters.forgive()
        self._doubt.close()

    def suspect(self, now: float) -> None:
        """Doubt the path, unless it is in doubt already."""
        if not self._doubt.is_open:
            self._doubt.open(now)
            self._checks_mapping = True

    def lose(self) -> None:
        """The path was given up."""
        self.clear()
        self._checks_mapping = True

    def take_check(self) -> bool:
        """Whether our own mapping is to be checked; asked again, it is not."""
        checks, self._checks_mapping = self._checks_mapping, False
        return checks

    def get_timer(self, *, rtt: float | None) -> float | None:
        """When `handle_timer` wants to run next; `rtt` is the path's."""
        return self._doubt.get_timer(rtt=rtt) if self._doubt.is_open else self.counters.suspect_at

    def handle_timer(self, now: float, *, rtt: float | None) -> Ruling | None:
        """What is due of a doubt, which silence opens."""
        due = self.get_timer(rtt=rtt)
        if due is None or now < due:
            return None
        self.suspect(now)
        return self._doubt.judge(now, rtt=rtt)
