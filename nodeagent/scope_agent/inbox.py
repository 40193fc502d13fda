"""What waits for the agent, in the order in which it came: datagrams only while they are news.

A machine that does not keep up would else work through a long queue of old questions. Its answers come after
their askers have asked again, so the queue never ends, and no path is found. What is too old is passed over
instead, which costs next to nothing, and what is answered is answered in time.
"""

from __future__ import annotations

from collections import deque

from scope_agent.inputs import DatagramArrived, Input

MAX_WAITING = 4096  # inputs; datagrams beyond this are dropped: a flood must not grow the process
STALE = 1.0  # seconds: by then who sent a datagram has said it again, or has given up waiting


class Inbox:
    """Inputs that wait. `dropped` counts the datagrams that nobody will look at. Times are monotonic."""

    def __init__(self) -> None:
        self.dropped = 0
        self._waiting: deque[tuple[float, Input]] = deque()

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether a datagram would be taken."""
        return len(self._waiting) < MAX_WAITING

    def put(self, event: Input, now: float) -> None:
        """Queue an input that came now."""
        if isinstance(event, DatagramArrived) and not self.has_room:
            self.dropped += 1
            return
        self._waiting.append((now, event))

    def take(self, now: float) -> Input | None:
        """The next input that is worth the agent's time; None when nothing waits."""
        while self._waiting:
            came, event = self._waiting.popleft()
            if not isinstance(event, DatagramArrived) or now - came <= STALE:
                return event
            self.dropped += 1
        return None
